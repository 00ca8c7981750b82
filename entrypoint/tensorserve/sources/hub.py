"""How are files of a Hugging Face hub opened (an HTTP source with a token) and listed?

A revision is looked up once in a process and is its commit from then on, so that a branch that
moves cannot mix two versions. The hub redirects large files to a store: the token stays behind, and
further ranges go to the store directly for as long as its signed address is valid.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tensorserve.bounded_json import read_json
from tensorserve.errors import SourceUnavailableError
from tensorserve.secret import Secret
from tensorserve.sources.base import Access, FetchObserver, HubAccess, Source
from tensorserve.sources.calls import Calls
from tensorserve.sources.cloud_account import CloudAccount, CloudSigner
from tensorserve.sources.http import HttpSource
from tensorserve.sources.hub_errors import Asked
from tensorserve.sources.hub_uri import Place, split_hf

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_TOKEN_BYTES = 4096


class HubAccount(CloudAccount):
    """The token, if there is one. It cannot be renewed."""

    def __init__(self, token: Secret | None) -> None:
        super().__init__()
        self._token = token

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`."""
        del method, url, length
        if self._token is None:
            return dict(headers)
        return dict(headers) | {"Authorization": f"Bearer {self._token.reveal_text()}"}

    def _renewed(self) -> bool:
        return False


class HubSource(HttpSource):
    """A file of one commit, which never changes."""

    def __init__(self, url: str, commit: str, *arguments: Any, **named: Any) -> None:
        super().__init__(url, *arguments, **named)
        # The store's ETag is of the bytes, but weak ones and none are seen too.
        self.version: str | None = f"{commit}:{self.version or ''}"
        self.pinned = True


def open_object(uri: str, access: Access, observer: FetchObserver | None) -> Source:
    """Opens hf://organisation/model[@revision]/file. Raises the sources' errors."""
    place = split_hf(uri)
    commit, _ = _looked_up(uri, place, access, with_files=False)
    path = quote(place.path, safe="/-_.~")
    url = f"{access.hub.endpoint}/{place.repository}/resolve/{commit}/{path}"
    signer = _signer(uri, place, access)
    return HubSource(url, commit, access, observer, signer=signer, name=uri, keeps_redirects=True)


def list_objects(uri: str, access: Access) -> dict[str, int]:
    """{name below the directory: size in bytes}. Raises the sources' errors."""
    place = split_hf(uri)
    _, files = _looked_up(uri, place, access, with_files=True)
    prefix = place.path.rstrip("/") + "/" if place.path.strip("/") else ""
    return {
        name.removeprefix(prefix): size for name, size in files.items() if name.startswith(prefix)
    }


_commits: dict[tuple[HubAccess, str, str], str] = {}
_commits_lock = threading.Lock()


def _looked_up(
    uri: str, place: Place, access: Access, *, with_files: bool
) -> tuple[str, dict[str, int]]:
    """(commit, {name: size}) of a revision, which is looked up once; the files if asked for."""
    key = (access.hub, place.repository, place.revision)
    with _commits_lock:
        commit = _commits.get(key)
    if commit is None and _COMMIT.fullmatch(place.revision):
        commit = place.revision
    if commit is not None and not with_files:
        return commit, {}
    asked = quote(commit or place.revision, safe="")
    url = f"{access.hub.endpoint}/api/models/{place.repository}/revision/{asked}"
    calls = Calls(access, _signer(uri, place, access), uri)
    try:
        body = calls.send("GET", f"{url}?blobs=true" if with_files else url).body
    finally:
        calls.close()
    found, files = _revision(body, uri)
    with _commits_lock:
        return _commits.setdefault(key, found), files


def _revision(body: bytes, uri: str) -> tuple[str, dict[str, int]]:
    try:
        document: Any = read_json(body)
        commit = str(document["sha"])
        files = {
            str(each["rfilename"]): int(each.get("size") or 0)
            for each in document.get("siblings") or ()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        commit, files = "", {}
    if not _COMMIT.fullmatch(commit):
        raise SourceUnavailableError(
            f"{uri}: the answer about the revision is not a hub's.",
            hint="Check HF_ENDPOINT, and what stands between here and the hub.",
        )
    return commit, files


def _signer(uri: str, place: Place, access: Access) -> CloudSigner:
    token = access.hub.token or _kept_token()
    asked = Asked(uri, place, has_token=token is not None)
    return CloudSigner(HubAccount(token), asked.explain)


def _kept_token() -> Secret | None:
    """What `hf auth login` left, where huggingface_hub looks for it."""
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_TOKEN_BYTES).strip().decode("ascii")
    except (OSError, UnicodeDecodeError):
        return None
    sendable = text.isprintable() and " " not in text
    return Secret(text, str(path)) if sendable and text else None
