"""Prompts on the Hugging Face Hub, of which a stand-in answers here: saved in one commit, loaded, and found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from lightning_softprompt import SoftPromptError, SoftPrompts, TaskTemplate
from lightning_softprompt.base.fingerprint import BaseModel
from lightning_softprompt.prompts.files import LOCK_NAME
from lightning_softprompt.prompts.index import INDEX_NAME
from tests.prompts.hub_stand_in import TOKEN, Hub, hub_stand_in, sha_of

NAME = "user/prompts"


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_stand_in() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path, monkeypatch) -> Hub:
    monkeypatch.chdir(tmp_path)
    for told in (server.repositories, server.private, server.messages, server.requests):
        told.clear()
    return server


@pytest.fixture
def prompts() -> SoftPrompts:
    made = SoftPrompts(4)
    made.add("tone", torch.arange(8.0).reshape(2, 4))
    made.add("topic", torch.ones(3, 4))
    made.freeze("topic")
    made.templates["tone"] = TaskTemplate("{text} =>", " {tone}", [" good", " bad"])
    return made


def load(name: str = NAME, **options) -> SoftPrompts:
    return SoftPrompts.from_pretrained(name, token=TOKEN, cache_dir="cache", **options)


def test_what_is_pushed_is_loaded(hub, prompts, monkeypatch) -> None:
    address = prompts.push_to_hub(NAME, token=TOKEN)
    files = hub.files(NAME)
    assert address == f"{hub.address}/{NAME}/commit/{sha_of(files)}" and hub.messages == ["Upload soft prompts"]
    tensors = [name for name in files if name.endswith(".safetensors")]
    assert set(files) == {".gitattributes", "README.md", INDEX_NAME, *tensors} and len(tensors) == 1
    assert LOCK_NAME not in files and f'"{NAME}"' in files["README.md"].decode()
    found = load()
    assert found.tasks == prompts.tasks and torch.equal(found["tone"], prompts["tone"])
    assert found.templates == prompts.templates and not found["topic"].requires_grad
    assert not any("README" in asked for asked in hub.requests if asked.startswith("GET") and "resolve" in asked)
    with monkeypatch.context() as patched:
        patched.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load().tasks == prompts.tasks  # from the cache


def test_where_a_base_lies_on_this_machine_is_not_told(hub, prompts) -> None:
    for name, told in (("/home/me/models/tiny llama", "tiny llama"), ("../tiny", "tiny"), ("org/tiny", "org/tiny")):
        prompts.base = BaseModel(name, 4, (1, 2), (0.5, 0.25))
        prompts.push_to_hub(NAME, token=TOKEN)
        found = load().base
        assert found is not None and found.name == told and found.fingerprint == (0.5, 0.25)
        assert prompts.base.name == name and b"/home/me" not in b"".join(hub.files(NAME).values())


def test_a_later_push_replaces_the_whole_in_one_commit(hub, prompts) -> None:
    prompts.push_to_hub(NAME, token=TOKEN, private=True)
    first, first_files = load(), hub.files(NAME)
    assert hub.private == {NAME: True}
    prompts["tone"].data += 1
    prompts.remove("topic")
    prompts.push_to_hub(NAME, token=TOKEN, commit_message="Without the topic")
    assert hub.messages[1:] == ["Without the topic"] and len(hub.repositories[NAME]["main"]) == 3
    assert len(hub.files(NAME)) == len(first_files) == 4 and set(hub.files(NAME)) != set(first_files)
    assert load().tasks == ("tone",) and torch.equal(load()["tone"], prompts["tone"])
    assert torch.equal(load(revision=sha_of(first_files))["tone"], first["tone"])


def test_a_branch_has_prompts_of_its_own(hub, prompts) -> None:
    prompts.push_to_hub(NAME, token=TOKEN)
    prompts.rename("topic", "theme")
    for _ in range(2):
        prompts["tone"].data += 1
        prompts.push_to_hub(NAME, token=TOKEN, revision="next")
    assert load().tasks == ("tone", "topic") and load(revision="next").tasks == ("tone", "theme")
    assert torch.equal(load(revision="next")["tone"], prompts["tone"])


def test_the_users_card_stays(hub, prompts) -> None:
    prompts.push_to_hub(NAME, token=TOKEN)
    hub.files(NAME)["README.md"] = b"# My own words"
    prompts["tone"].data += 1
    prompts.push_to_hub(NAME, token=TOKEN)
    assert hub.files(NAME)["README.md"] == b"# My own words" and torch.equal(load()["tone"], prompts["tone"])


def test_a_local_folder_wins(hub, prompts) -> None:
    prompts.push_to_hub(NAME, token=TOKEN)
    prompts.subset(["topic"]).save_pretrained(NAME)
    hub.requests.clear()
    assert load().tasks == ("topic",) and not hub.requests
    prompts.push_to_hub(NAME, token=TOKEN)  # a folder of that name is no obstacle
    assert set(hub.repositories) == {NAME}
    (Path(NAME) / INDEX_NAME).unlink()
    with pytest.raises(SoftPromptError, match="holds no saved prompts"):
        load()


def test_names_that_are_neither_are_told_what_was_looked_for(hub, prompts, tmp_path) -> None:
    prompts.push_to_hub(NAME, token=TOKEN)
    hub.repositories["user/other"] = {"main": [{"config.json": b"{}"}]}
    cases = {
        "user/gone": ("nothing could be loaded from the Hugging Face Hub", {}),
        NAME: ("nothing could be loaded from the Hugging Face Hub", {"revision": "gone"}),
        "user/other": (f"holds no {INDEX_NAME}", {}),
        "prompts": ("have the form 'user/name'", {}),
        "a/b/c": ("have the form 'user/name'", {}),
        "x\x1b[2J": ("have the form 'user/name'", {}),
    }
    for name, (message, options) in cases.items():
        with pytest.raises(SoftPromptError) as caught:
            load(name, **options)
        told = str(caught.value)
        assert told.startswith(f"there are no saved prompts {name!r}: there is no folder {str(tmp_path / name)!r}, and")
        assert message in told and "\x1b" not in told and "\n" not in told
    with pytest.raises(SoftPromptError, match="gone holds no saved prompts"):  # a path is never an id
        SoftPrompts.from_pretrained(Path("user/gone"))


def test_what_the_hub_refuses_is_one_clear_line(hub, prompts, monkeypatch) -> None:
    for name in ("prompts", "a/b/c", "../prompts", "user/na me", "/user/name"):
        with pytest.raises(SoftPromptError, match="has the form 'user/name', got"):
            prompts.push_to_hub(name, token=TOKEN)
    with pytest.raises(SoftPromptError, match=f"could not be saved as '{NAME}' on the Hugging Face Hub .*your token"):
        prompts.push_to_hub(NAME, token="hf_wrong")
    prompts.templates["gone"] = TaskTemplate()
    with pytest.raises(SoftPromptError, match="template of task 'gone'"):
        prompts.push_to_hub(NAME, token=TOKEN)
    assert not hub.repositories
    del prompts.templates["gone"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SoftPromptError, match="offline mode is enabled"):
        prompts.push_to_hub(NAME, token=TOKEN)
    with pytest.raises(SoftPromptError, match="nothing could be loaded from the Hugging Face Hub"):
        load("user/gone")


def test_what_comes_from_the_hub_is_checked(hub, prompts) -> None:
    prompts.push_to_hub(NAME, token=TOKEN)
    files = hub.files(NAME)
    files[INDEX_NAME] = files[INDEX_NAME].replace(b'"tone"', b'"to\\u001bne"')
    with pytest.raises(SoftPromptError, match="no control characters"):
        load()
