"""A stand-in of the Hugging Face Hub: a server in this process that answers what saving and loading prompts asks."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_stand_in"


class Hub(ThreadingHTTPServer):
    """Repositories by id; a repository maps each branch to its commits, and a commit is its files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.messages: list[str] = []
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repository][branch][-1]


def sha_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(json.dumps({name: data.hex() for name, data in files.items()}).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, status: int, content: Any = None, data: bytes = b"", **headers: str) -> None:
        body = data if content is None else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _commit(self, repository: str, revision: str) -> dict[str, bytes] | None:
        branches = self.server.repositories[repository]
        commits = branches.get(revision) or [each for all in branches.values() for each in all]
        return next((each for each in reversed(commits) if revision in branches or sha_of(each) == revision), None)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        is_api = path.startswith("api/models/")
        owner, name, kind, revision = [*path.removeprefix("api/models/").split("/"), "revision", "main"][:4]
        repository = f"{owner}/{name}"
        if repository not in self.server.repositories:
            return self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = self._commit(repository, revision)
        if files is None:
            return self._answer(404, {"error": f"Invalid rev id: {revision}"}, X_Error_Code="RevisionNotFound")
        if is_api and kind == "revision":
            siblings = [{"rfilename": each} for each in files]
            return self._answer(200, {"id": repository, "sha": sha_of(files), "siblings": siblings})
        if is_api:
            tree = [{"type": "file", "path": each, "size": len(files[each]), "oid": "0"} for each in files]
            return self._answer(200, tree)
        wanted = path.split("/", 4)[4]
        if wanted not in files:
            return self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(files[wanted]).hexdigest()}"'
        return self._answer(200, data=files[wanted], ETag=etag, X_Repo_Commit=sha_of(files))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"POST {path}")
        if path == "api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid username or password."})
        if path == "api/repos/create":
            return self._create(json.loads(body))
        owner, name, kind, revision = path.removeprefix("api/models/").split("/")
        branches = self.server.repositories[f"{owner}/{name}"]
        if kind == "branch":
            is_new = revision not in branches
            branches.setdefault(revision, [branches["main"][-1]])
            return self._answer(201 if is_new else 409, {})
        if kind == "preupload":
            modes = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        files = dict(branches[revision][-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                del files[value["path"]]
        branches[revision].append(files)
        oid = sha_of(files)
        return self._answer(200, {"commitUrl": f"{self.server.address}/{owner}/{name}/commit/{oid}", "commitOid": oid})

    def _create(self, asked: dict[str, Any]) -> None:
        repository = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.address}/{repository}"}
        if repository in self.server.repositories:
            return self._answer(409, url)
        self.server.repositories[repository] = {"main": [{".gitattributes": b""}]}
        # Versions of huggingface_hub differ in how they ask for it.
        self.server.private[repository] = "private" in (asked.get("visibility"), asked.get("private") and "private")
        return self._answer(200, url)


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    """A running stand-in, which huggingface_hub takes for the Hub in this process."""
    with Hub() as hub, pytest.MonkeyPatch.context() as patched:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        patched.setattr(constants, "HF_HUB_OFFLINE", False)
        patched.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
        hub.shutdown()
