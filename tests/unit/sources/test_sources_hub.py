"""hf://: a model's repository on a hub. The hub is a stand-in of ours, which huggingface_hub takes.

Not tried: huggingface.co itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_servers import Hub, without_clouds
from tensorserve.bundle.not_a_bundle import explain_missing
from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
)
from tensorserve.sources import (
    Access,
    ForbiddenError,
    HubAccess,
    NotFoundError,
    RetryPolicy,
    list_names,
    open_source,
)
from tensorserve.sources.hub_uri import split_hf

POLICY = RetryPolicy(attempts=3, deadline=5, backoff_base=0.01)
TOKEN = "hf_canary"
DATA = os.urandom(400_000)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub("org/model", token=TOKEN) as server:
        server.put("config.json", b"{}")
        server.put("v1/model.tensors", DATA)
        yield server


def access_of(hub: Hub) -> Access:
    return Access(hub=hub.access, policy=POLICY)


def test_the_stand_in_is_a_hub_to_huggingface_hub(hub: Hub, tmp_path: Path) -> None:
    """Its client finds the revision, lists the files and follows the redirect to the store."""
    program = (
        "import sys; from huggingface_hub import HfApi, hf_hub_download as get\n"
        "info = HfApi().model_info('org/model', files_metadata=True)\n"
        "print(info.sha, sorted((f.rfilename, f.size) for f in info.siblings))\n"
        "print(open(get('org/model', 'v1/model.tensors'), 'rb').read() == "
        "open(sys.argv[1], 'rb').read(), get('org/model', 'config.json'))\n"
    )
    expected = tmp_path / "expected"
    expected.write_bytes(DATA)
    environ = without_clouds(dict(os.environ)) | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    words = [sys.executable, "-c", program, str(expected)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{hub.commit} [('config.json', 2), ('v1/model.tensors', 400000)]" in done.stdout
    assert f"True {tmp_path}" in done.stdout
    assert f"/snapshots/{hub.commit}/config.json" in done.stdout


def test_the_token_stays_with_the_hub(hub: Hub) -> None:
    """The store has a signature of its own in its address."""
    source = open_source("hf://org/model/v1/model.tensors", access_of(hub))
    assert source.read(100_000, 50_000) == DATA[100_000:150_000]
    assert all(headers["Authorization"] == f"Bearer {TOKEN}" for _, headers in hub.seen)
    assert len(hub.store.seen) == 2
    assert not any("Authorization" in headers for headers in hub.store.seen)
    source.close()


def test_the_hub_is_asked_once_for_many_ranges(hub: Hub) -> None:
    """It limits requests; the store's address is used for as long as it is good."""
    source = open_source("hf://org/model/v1/model.tensors", access_of(hub))
    for start in range(70_000, 170_000, 10_000):
        assert source.read(start, 1000) == DATA[start : start + 1000]
    assert len([path for path, _ in hub.seen if "/resolve/" in path]) == 1
    hub.store.signature += 1  # the address that is known has expired
    assert source.read(200_000, 1000) == DATA[200_000:201_000]
    assert len([path for path, _ in hub.seen if "/resolve/" in path]) == 2
    source.close()


def test_a_branch_that_moves_does_not_mix_versions(hub: Hub) -> None:
    """Its commit is looked up once in a process."""
    access, first = access_of(hub), hub.commit
    source = open_source("hf://org/model/v1/model.tensors", access)
    assert source.pinned
    assert source.version
    assert source.version.startswith(first)
    hub.put("v1/model.tensors", bytes(400_000))
    hub.put("config.json", b"other")
    assert source.read(100_000, 1000) == DATA[100_000:101_000]
    assert open_source("hf://org/model/config.json", access).read(0, 2) == b"{}"
    assert list_names("hf://org/model", access) == {"config.json": 2, "v1/model.tensors": 400_000}
    by_commit = open_source(f"hf://org/model@{hub.commit}/config.json", access)
    assert by_commit.read(0, 5) == b"other"


def test_a_directory_is_listed_with_sizes(hub: Hub) -> None:
    """Relative to it."""
    assert list_names("hf://org/model/v1", access_of(hub)) == {"model.tensors": 400_000}


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (401, "RepoNotFound", SourceUnavailableError, "the token in HF_TOKEN may not see it"),
        (404, "RepoNotFound", SourceUnavailableError, "the token in HF_TOKEN may not see it"),
        (404, "RevisionNotFound", ConfigurationError, "no revision 'main'"),
        (403, "GatedRepo", ForbiddenError, "conditions have not been accepted"),
        (404, "EntryNotFound", NotFoundError, "does not exist"),
        (403, "", ForbiddenError, "does not let the token"),
        (429, "", SourceUnavailableError, "answers 429"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, status: int, code: str, kind: type[TensorserveError], said: str
) -> None:
    """By X-Error-Code; nothing of the token in the message."""
    hub.error = status, code
    with pytest.raises(kind, match=said) as caught:
        open_source("hf://org/model/config.json", access_of(hub))
    assert TOKEN not in str(caught.value)


def test_a_private_model_without_a_token_names_the_variable(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """77, and the variable is named; a token that `hf auth login` left is found."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    access = Access(hub=HubAccess(hub.url), policy=POLICY)
    with pytest.raises(PermissionDeniedError, match="HF_TOKEN"):
        open_source("hf://org/model/config.json", access)
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    assert open_source("hf://org/model/config.json", access).read(0, 2) == b"{}"


def test_an_answer_that_is_no_hubs_is_said(hub: Hub) -> None:
    """A proxy's page, or another server in HF_ENDPOINT."""
    hub.error = 200, ""
    with pytest.raises(SourceUnavailableError, match="HF_ENDPOINT"):
        open_source("hf://org/model/config.json", access_of(hub))


def test_a_model_that_is_no_bundle_is_packed_first(hub: Hub) -> None:
    """The command for it; `pack` gets it from the hub itself."""
    hub.put("weights/model.safetensors", b"x")
    with pytest.raises(CorruptError, match="tensorserve pack org/model DEST --encrypt"):
        raise explain_missing(
            "hf://org/model/weights", access_of(hub), NotFoundError("nothing"), sealed=True
        )


@pytest.mark.parametrize(
    "uri",
    [
        *("hf://", "hf://org", "hf://org/", "hf:///model", "hf://org/model@", "hf://org/m@../x"),
        *("hf://o..g/model", "hf://org/mo--del", "hf://org/m?x", "hf://org/-m", "hf://a@b/c"),
    ],
)
def test_what_names_no_model_is_refused(uri: str) -> None:
    """Before anything is asked."""
    with pytest.raises(ConfigurationError, match="does not name a model"):
        split_hf(uri)


def test_the_parts_of_a_uri() -> None:
    """As huggingface_hub's file system writes them."""
    place = split_hf("hf://org/model@refs%2Fpr%2F1/a b/c")
    assert (place.repository, place.revision) == ("org/model", "refs/pr/1")
    assert place.path == "a b/c"
    assert replace(place, path="") == split_hf("hf://org/model@refs%2Fpr%2F1")
    assert split_hf("hf://org/model").revision == "main"
