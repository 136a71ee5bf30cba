"""Prompts on the Hugging Face Hub: a repository holds the files of a saved folder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_softprompt import __version__
from lightning_softprompt.errors import SoftPromptError
from lightning_softprompt.prompts.characters import without_control
from lightning_softprompt.prompts.folder import TENSOR_FILES, Saved, save_folder
from lightning_softprompt.prompts.index import INDEX_NAME
from lightning_softprompt.prompts.model_card import CARD_NAME, is_card, is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def find_folder(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of saved prompts that is meant: a folder here, else one downloaded from the Hub.

    Args:
        name: the path of a folder, or `"user/name"`. If there is such a path, the Hub is not asked.
        revision: the branch, tag or commit on the Hub; None means its main branch.
        token: the Hub's token; None means the one of the login, False none.
        cache_dir: where to keep what is downloaded; None means the Hub's usual cache.

    Raises:
        SoftPromptError: there is no such folder, and no such prompts on the Hub.
    """
    path = Path(name)
    if path.exists() or not isinstance(name, str):
        return path
    missing = f"there are no saved prompts {name!r}: there is no folder {str(path.absolute())!r}, and"
    if not _is_repository(name):
        raise SoftPromptError(f"{missing} ids on the Hugging Face Hub have the form 'user/name'; check the name")
    with _errors_say(f"{missing} nothing could be loaded from the Hugging Face Hub"):
        patterns = [INDEX_NAME, TENSOR_FILES]
        api = _api(token)
        found = Path(api.snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    if not (found / INDEX_NAME).is_file():
        raise SoftPromptError(
            f"{missing} the repository of that id on the Hugging Face Hub holds no {INDEX_NAME}; check the name and "
            "the revision"
        )
    return found


def push(
    saved: Saved,
    repo_id: str,
    private: bool | None,
    token: str | bool | None,
    commit_message: str | None,
    revision: str | None,
) -> str:
    """Upload `saved` in one commit, and return its address; `SoftPrompts.push_to_hub` says what the arguments mean.

    The tensors of earlier uploads are removed in the same commit. A README.md that the user wrote stays. Of a base that
    lies in a folder, the name of the folder alone is told, and not where it lies.

    Raises:
        SoftPromptError: what cannot be saved, or what the Hub refuses.
    """
    if not _is_repository(repo_id):
        raise SoftPromptError(f"a repository on the Hugging Face Hub has the form 'user/name', got {repo_id!r}")
    api = _api(token)
    base = saved.base
    if base is not None and not is_hub_id(base.name):
        saved = replace(saved, base=replace(base, name=Path(base.name).name))
    with tempfile.TemporaryDirectory() as folder:
        save_folder(Path(folder), saved, called=repo_id)
        with _errors_say(f"the prompts could not be saved as {repo_id!r} on the Hugging Face Hub"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            own_card = [] if _has_users_card(api, repo_id, revision) else [CARD_NAME]
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message or "Upload soft prompts",
                allow_patterns=[INDEX_NAME, TENSOR_FILES, *own_card],
                delete_patterns=TENSOR_FILES,
            )
    return str(commit.commit_url)


def _api(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="lightning-softprompt", library_version=__version__)


def _is_repository(name: str) -> bool:
    return is_hub_id(name) and "/" in name


def _has_users_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a README.md that its user wrote."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with tempfile.TemporaryDirectory() as folder:
        try:
            card = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, local_dir=folder)
        except RemoteEntryNotFoundError:
            return False
        return not is_card(Path(card).read_bytes())


@contextmanager
def _errors_say(what: str) -> Iterator[None]:
    """Raise an error of the Hub in the block as a `SoftPromptError` that begins with `what`."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = without_control(" ".join(str(error).split()))
        raise SoftPromptError(f"{what} ({reason}); check the name, the network and your token") from error
