"""Tests of what vLLM's configuration says."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from softprompt_vllm.base_model import ServedModel
from softprompt_vllm.model_files import served_model


def config(model: str, revision: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        model=model,
        revision=revision,
        dtype=torch.bfloat16,
        enable_prompt_embeds=True,
        get_inputs_embeds_size=lambda: 32,
        get_vocab_size=lambda: 61,
    )


def test_a_folder_is_where_its_files_lie(tmp_path: Path) -> None:
    found = served_model(config(str(tmp_path)))
    assert found == ServedModel(str(tmp_path), tmp_path, 32, 61, torch.bfloat16, True)


def test_a_model_of_the_hub_lies_in_its_cache(tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    asked = []

    def snapshot_download(model: str, **options: object) -> str:
        asked.append((model, options))
        if model == "user/unknown":
            raise OSError("not here")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert served_model(config("user/model", "v1")).folder == tmp_path
    assert served_model(config("user/unknown")).folder is None
    assert asked[0] == ("user/model", {"revision": "v1", "local_files_only": True})
