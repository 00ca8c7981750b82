"""SRC as a name of the hub: from a cache laid out as huggingface_hub lays it out."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hf_samples import make_model
from tensorserve.bundle.manifest import read_manifest
from tensorserve.errors import ConfigurationError
from tensorserve.packing.hub import model_directory
from tensorserve.sources import Access

REVISION = "a" * 40


def cached(home: Path) -> Path:
    """A model `tests/tiny` in a hub cache."""
    repository = home / "hub" / "models--tests--tiny"
    make_model(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    return home


def test_a_model_of_the_cache_is_packed_by_its_name(tmp_path: Path) -> None:
    """`pack organisation/model`, without a network; the suffix takes the model's whole name."""
    home = cached(tmp_path / "home")
    words = ["pack", "tests/tiny", str(tmp_path / "out"), "--suffix", "v1"]
    run = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", *words],
        env={"PATH": "", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert (
        read_manifest(str(tmp_path / "out" / "vllm" / "tests" / "tiny" / "v1"), Access(), None)
        is not None
    )


@contextmanager
def hub(repository: Path, asked: list[str]) -> Iterator[str]:
    """As much of the hub's HTTP interface as a download takes, for `tests/tiny`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def _answer(self, *, body: bool) -> None:
            asked.append(self.path)
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            found, code = b"{}", 200
            if path.startswith("/api/models/tests/tiny/tree/"):
                entries = [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40}
                    for f in repository.iterdir()
                ]
                found = json.dumps(entries).encode()
            elif path.startswith("/api/models/tests/tiny"):
                files = [{"rfilename": file.name} for file in repository.iterdir()]
                found = json.dumps(
                    {"id": "tests/tiny", "sha": REVISION, "siblings": files}
                ).encode()
            elif path == f"/tests/tiny/resolve/{REVISION}/{name}":
                found = (repository / name).read_bytes()
            else:
                code = 404
            self.send_response(code)
            self.send_header("X-Repo-Commit", REVISION)
            self.send_header("ETag", f'"{sha256(found).hexdigest()}"')
            self.send_header("Content-Length", str(len(found)))
            self.end_headers()
            if body:
                self.wfile.write(found)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_model_is_fetched_from_the_hub_once(tmp_path: Path) -> None:
    """What no cache has comes over HTTP, without pickles and code; the second time nothing does."""
    repository = make_model(tmp_path / "repository")
    (repository / "pytorch_model.bin").write_bytes(b"a pickle")
    (repository / "modeling_tiny.py").write_text("code")
    # As `AutoTokenizer.from_pretrained` leaves a cache: part of the model is there.
    part = tmp_path / "home/hub/models--tests--tiny"
    (part / "snapshots" / REVISION).mkdir(parents=True)
    (part / "snapshots" / REVISION / "tokenizer.json").write_bytes(
        (repository / "tokenizer.json").read_bytes()
    )
    (part / "refs").mkdir()
    (part / "refs" / "main").write_text(REVISION)
    asked: list[str] = []
    with hub(repository, asked) as endpoint:
        environ = {"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint}
        for number in (1, 2):
            words = ["pack", "tests/tiny", str(tmp_path / f"out-{number}")]
            run = subprocess.run(
                [sys.executable, "-m", "tensorserve.cli", *words],
                env=environ,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, run.stderr
            if number == 1:
                first = [path for path in asked if "/resolve/" in path]
    assert [path for path in asked if "/resolve/" in path] == first != []
    assert not any("pytorch_model" in path or ".py" in path for path in asked)
    manifests = [read_manifest(str(tmp_path / f"out-{n}"), Access(), None) for n in (1, 2)]
    assert manifests[0] is not None
    assert manifests[0].files == manifests[1].files  # type: ignore[union-attr]


def test_code_is_fetched_where_it_was_asked_for(tmp_path: Path) -> None:
    """And still no pickle."""
    repository = make_model(tmp_path / "repository")
    asked: list[str] = []
    with hub(repository, asked) as endpoint:
        words = ["pack", "tests/tiny", str(tmp_path / "out"), "--trust-remote-code"]
        run = subprocess.run(
            [sys.executable, "-m", "tensorserve.cli", *words],
            env={"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    assert "code: modeling_own.py, SHA-256 " in run.stdout
    assert not any("pytorch_model" in path for path in asked)


def test_a_name_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    """Offline: says what was tried, with exit code 78."""
    run = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", "pack", "tests/none", str(tmp_path / "out")],
        env={"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == ConfigurationError.exit_code, run.stderr
    assert "is not in the hub's cache" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it looks like a name of the hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "model").mkdir(parents=True)
    assert model_directory(Path("my/model")) == (Path("my/model"), "model")
    assert model_directory(Path("./missing")) == (Path("./missing"), tmp_path.name)


@pytest.mark.parametrize("endpoint", ["garbage", "ftp://host", "http://[::1", "http://a\nb"])
def test_a_hubs_address_that_is_none_is_said(tmp_path: Path, endpoint: str) -> None:
    """With our settings, before the hub's own library reads it, some of it when it is imported."""
    run = subprocess.run(
        [sys.executable, "-m", "tensorserve.cli", "pack", "tests/none", str(tmp_path / "out")],
        env={"PATH": "", "HF_HOME": str(tmp_path), "HF_ENDPOINT": endpoint},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 78, run.stderr
    assert run.stderr.count("tensorserve: error: HF_ENDPOINT=") == 1


@pytest.mark.parametrize("url", ["https://huggingface.co/tests/tiny", "s3://bucket/model"])
def test_a_url_is_no_model_to_pack(url: str) -> None:
    """78; a path has lost one of its slashes by then."""
    with pytest.raises(ConfigurationError, match="SRC is a URL"):
        model_directory(Path(url))
