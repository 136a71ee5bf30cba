"""A run that goes on in the middle of an epoch: which rows come next, and what of that is exact."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_softprompt.data.loader import ResumableLoader

_ANEW = ". Random numbers, as of dropout, are drawn anew"


def go_on(trainer: Trainer) -> str | None:
    """Let the loaders of a resumed run go on where they stopped, as far as they can, and say how far that is.

    Lightning 2.6 restores what a loader with `state_dict` saved. Any other one begins its epoch again, while the count
    of batches goes on: the first rows come twice and the last ones not at all. Unless the order of the rows is drawn
    anew, the batches that were trained on are skipped here.

    Args:
        trainer: in `on_train_start`, when loaders have begun and no batch is taken.

    Returns:
        One line; None for a run that begins, or resumes at the start of an epoch.
    """
    loop: Any = trainer.fit_loop
    _load_late_states(loop)
    done = loop.epoch_loop.batch_progress.current.completed + loop.epoch_loop.restarted_on_train_batch_end
    loaders = loop._combined_loader.flattened
    for loader in loaders:
        if isinstance(loader, ResumableLoader):
            loader.go_on_behind(done)
    if trainer.ckpt_path is None or not loop.restarted_mid_epoch or not 0 < done < trainer.num_training_batches:
        return None
    words = (
        f"resumed from {trainer.ckpt_path}, in the middle of epoch {trainer.current_epoch}, behind batch {done}: "
        "prompts, optimizer and schedule are those of the checkpoint"
    )
    waiting = done % trainer.accumulate_grad_batches
    if waiting:
        words += f", but gradients of the last {waiting} batches, which no step had taken yet, are lost"
    if all(map(_keeps_state, loaders)):
        return f"{words}; rows go on where they stopped, by the loader's own state{_ANEW}"
    if any(map(_is_shuffled, loaders)) or isinstance(loop._data_fetcher, _DataLoaderIterDataFetcher):
        return (
            f"{words}; the order of the rows is drawn anew, so that some of this epoch come twice and others not; a "
            f"loader with state_dict and load_state_dict goes on exactly{_ANEW}"
        )
    for loader in loaders:
        _set_sampler_epoch(loader, trainer.current_epoch)  # Lightning tells them later, and their order depends on it
    iter(loop._data_fetcher)  # as processes that make batches have asked for the order already
    for _ in range(done):
        next(loop._data_fetcher)
    loop._data_fetcher.fetched -= done  # Lightning adds them when the epoch goes on
    words += f"; rows go on where they stopped, as {done} batches were skipped"
    if all(map(_has_known_order, loaders)):
        return words + _ANEW
    return f"{words}, which is exact if the loader gives the same rows in the same order again{_ANEW}"


def _load_late_states(loop: Any) -> None:
    """Give loaders their saved state if Lightning has not.

    Lightning 2.6 loads it when it makes the loaders, if the loops are restored by then. Where `configure_optimizers`
    asks for `estimated_stepping_batches`, as `CausalLMModule` does, they are made before.
    """
    if loop.restarting and loop._combined_loader_states_to_load:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def _keeps_state(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _is_shuffled(loader: Any) -> bool:
    """Whether the order of a loader's rows is drawn in each run anew, as with shuffle=True."""
    return not _keeps_state(loader) and isinstance(_sampler(loader), RandomSampler)


def _has_known_order(loader: Any) -> bool:
    return _keeps_state(loader) or isinstance(_sampler(loader), SequentialSampler | DistributedSampler)


def _sampler(loader: Any) -> Any:
    if not isinstance(loader, DataLoader):
        return None
    return getattr(loader.batch_sampler, "sampler", loader.sampler)
