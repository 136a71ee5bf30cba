"""Strategies that start their processes themselves: those that would lose the prompts are refused before training."""

from __future__ import annotations

import pytest
import torch

from lightning_softprompt import SoftPromptCallback, SoftPromptError
from lightning_softprompt.training.launchers import check_launcher
from tests import modules
from tests.modules import TASKS, loader, trainer


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_true"])
def test_training_in_copies_of_the_process_is_refused_by_name(strategy: str, tmp_path) -> None:
    run = trainer(tmp_path, strategy=strategy, devices=2)
    start = "spawn" if "spawn" in strategy else "fork"
    with pytest.raises(SoftPromptError, match=rf"strategy='ddp_{start}'.*does not come back.*use strategy='ddp' in"):
        check_launcher(run)


def test_one_process_and_processes_of_a_script_are_not_refused(tmp_path) -> None:
    for options in ({}, {"strategy": "ddp", "devices": 2}, {"strategy": "ddp", "devices": 1}):
        check_launcher(trainer(tmp_path, **options))


def test_a_fit_that_forks_ends_before_training(tmp_path) -> None:
    callback = SoftPromptCallback(TASKS)
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="SoftPromptError: DDPStrategy with"):
        trainer(tmp_path, callback, strategy="ddp_fork", devices=2).fit(modules.Plain(), loader())
