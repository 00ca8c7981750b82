"""verify: finds every damage, names it, and goes on."""

from __future__ import annotations

import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from hf_samples import ACCESS, make_model
from manifests import as_version_1, rewrite
from rangeserver import RangeServer
from sealed_caches import FINGERPRINT, sealed_files
from tensorserve.bundle.compiled import name_of
from tensorserve.bundle.keys import GivenKey, ModelKey, parse_key
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.verify import verify
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format import read_index
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, RetryPolicy, open_source

SECRET = Secret(bytes(range(32)), "the test")
KEY = parse_key(SECRET)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encrypted bundle that is not touched."""
    directory = tmp_path_factory.mktemp("packed")
    pack(make_model(directory / "hf"), str(directory / "b"), access=ACCESS, key=SECRET)
    return directory / "b"


@pytest.fixture
def bundle(tmp_path: Path, packed: Path) -> Path:
    """A copy of it."""
    shutil.copytree(packed, tmp_path / "b")
    return tmp_path / "b"


def place_of(bundle: Path, tensor: str) -> tuple[int, int]:
    """Offsets of a tensor's header and data."""
    source = open_source(str(bundle / "model.tensors"), ACCESS)
    records = {record.name: record for record in read_index(source).tensors}
    source.close()
    return records[tensor].header_offset, records[tensor].data_offset


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def damaged(bundle: Path, key: object = KEY) -> tuple[str, list[str]]:
    """The message and the lines of a verify that must fail."""
    lines: list[str] = []
    with pytest.raises(CorruptError) as caught:
        verify(str(bundle), ACCESS, key, lines.append)  # type: ignore[arg-type]
    assert caught.value.exit_code == 65
    return caught.value.message, lines


def test_a_flipped_bit_of_data_is_named(bundle: Path) -> None:
    """Tensor and file, in the line and in the error."""
    _, data = place_of(bundle, "model.layers.1.weight")
    flip(bundle / "model.tensors", data + 100)
    message, lines = damaged(bundle)
    assert "'model.layers.1.weight'" in message
    assert [line for line in lines if line.startswith("DAMAGED")] == [lines[0]]
    assert "1 of 5 tensors" in lines[0]


def test_all_damaged_tensors_are_named(bundle: Path) -> None:
    """Not only the first."""
    for name in ("model.embed.weight", "model.layers.0.weight", "model.scale"):
        flip(bundle / "model.tensors", place_of(bundle, name)[1] + 1)
    message, _ = damaged(bundle)
    assert "3 of 5 tensors" in message
    for name in ("model.embed.weight", "model.layers.0.weight", "model.scale"):
        assert f"'{name}'" in message


def test_more_damaged_tensors_than_fit_a_line_are_all_named(tmp_path: Path) -> None:
    """In lines below that of the file, each with its reason; so for each of several files."""
    import torch
    from tensorizer import TensorSerializer

    (tmp_path / "b").mkdir()
    names = [f"layer.{number}.weight" for number in range(12)]
    for rank in range(2):
        path = tmp_path / "b" / f"model-rank-{rank:03d}.tensors"
        serializer = TensorSerializer(str(path))
        serializer.write_state_dict({name: torch.ones(64) for name in names})
        serializer.close()
        source = open_source(str(path), ACCESS)
        for record in read_index(source).tensors:
            flip(path, record.data_offset + 3)
        source.close()
    message, lines = damaged(tmp_path / "b", None)
    assert "2 of 2 files are damaged" in message
    assert "and 7 more" in message
    for rank, line in enumerate(lines):
        first, *others = line.splitlines()
        assert first.startswith(f"DAMAGED    model-rank-{rank:03d}.tensors  12 of 12 tensors")
        assert [other.split("'")[1] for other in others] == names
        assert all("does not have the" in other for other in others)


def test_a_file_whose_tensors_have_no_data_is_damaged(tmp_path: Path) -> None:
    """As it would be refused at the start: nothing in it is wrong but what it lacks."""
    import torch
    from tensorizer import TensorSerializer

    (tmp_path / "b").mkdir()
    serializer = TensorSerializer(str(tmp_path / "b" / "model.tensors"))
    content = {"a.weight": torch.ones(4), "b.weight": torch.ones(4, device="meta")}
    serializer.write_state_dict(content)
    serializer.close()
    message, _ = damaged(tmp_path / "b", None)
    assert "1 tensor has a shape and no data, for example 'b.weight'" in message


@pytest.mark.parametrize("sealed", [False, True])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, sealed: bool) -> None:
    """256 MB in one tensor, read with the default number of threads."""
    import torch

    peaks = []
    for size in (1, 64):
        source = make_model(tmp_path / f"hf{size}", {"w": torch.zeros(size, 1024, 1024)})
        bundle = tmp_path / f"b{size}"
        pack(source, str(bundle), access=ACCESS, key=SECRET if sealed else None)
        peaks.append(peak_of_verify(bundle, sealed))
    assert peaks[1] - peaks[0] < 100 * 1024**2


def peak_of_verify(bundle: Path, sealed: bool) -> int:
    """Most bytes that `tensorserve verify` had resident."""
    key = {"TENSORSERVE_KEY": bytes(range(32)).hex()} if sealed else {}
    program = (
        "import sys; from tensorserve.cli import main; code = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read()); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "verify", str(bundle)],
        env={"PATH": os.environ["PATH"]} | key,
        capture_output=True,
        text=True,
        check=True,
    )
    # Not getrusage: that remembers what the parent had.
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", done.stdout)
    return int(peak) * 1024


@pytest.mark.parametrize("chunk", [0, 1])
def test_any_chunk_of_a_large_tensor_counts(bundle: Path, chunk: int) -> None:
    """The last one is short."""
    _, data = place_of(bundle, "model.embed.weight")
    flip(bundle / "model.tensors", data + chunk * 2 * 1024**2 + 17)
    message, _ = damaged(bundle)
    assert f"chunk {chunk} of tensor 'model.embed.weight'" in message


def test_a_flipped_bit_in_any_header_byte_is_noticed(bundle: Path) -> None:
    """Each byte of one header: structure, hashes, nonce, tags."""
    header, data = place_of(bundle, "model.scale")
    path = bundle / "model.tensors"
    whole = path.read_bytes()
    for offset in range(header, data, 3):
        path.write_bytes(whole)
        flip(path, offset)
        damaged(bundle)


def test_a_flipped_bit_of_a_plain_bundle_is_noticed(tmp_path: Path) -> None:
    """By its hash."""
    pack(make_model(tmp_path / "hf"), str(tmp_path / "b"), access=ACCESS)
    flip(tmp_path / "b" / "model.tensors", place_of(tmp_path / "b", "model.norm.weight")[1])
    message, _ = damaged(tmp_path / "b", None)
    assert "'model.norm.weight'" in message


def test_a_changed_configuration_is_noticed(bundle: Path) -> None:
    """Of the same length."""
    flip(bundle / "config.json", 5)
    message, lines = damaged(bundle)
    assert "config.json" in message
    assert sum(line.startswith("ok ") for line in lines) == 6


def test_missing_files_are_named(bundle: Path) -> None:
    """Small ones and the tensors."""
    (bundle / "tokenizer.json").unlink()
    (bundle / "model.tensors").unlink()
    message, _ = damaged(bundle)
    assert "tokenizer.json: missing" in message
    assert "model.tensors: missing" in message


def test_a_truncated_file_is_damaged(bundle: Path) -> None:
    """And the small files are still checked."""
    path = bundle / "model.tensors"
    path.write_bytes(path.read_bytes()[:-100])
    message, lines = damaged(bundle)
    assert "truncated" in message
    assert sum(line.startswith("ok ") for line in lines) == 6


def test_tensors_exchanged_under_the_same_key_are_noticed(tmp_path: Path, bundle: Path) -> None:
    """Every chunk and hash fits, names and shapes too; only the manifest knows."""
    import torch

    from hf_samples import tensors

    other = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    source = make_model(tmp_path / "other", other)
    pack(source, str(tmp_path / "c"), access=ACCESS, key=SECRET)
    (tmp_path / "c" / "model.tensors").replace(bundle / "model.tensors")
    message, _ = damaged(bundle)
    assert "exchanged" in message


def test_another_index_is_noticed(tmp_path: Path, bundle: Path) -> None:
    """A bundle with the tensors of another model."""
    import torch

    source = make_model(tmp_path / "other", {"w": torch.zeros(4)})
    pack(source, str(tmp_path / "c"), access=ACCESS, key=SECRET)
    (tmp_path / "c" / "model.tensors").replace(bundle / "model.tensors")
    message, _ = damaged(bundle)
    assert MANIFEST in message


def test_the_wrong_key_is_said_at_once(bundle: Path) -> None:
    """It is no damage."""
    with pytest.raises(WrongKeyError, match="another test"):
        verify(str(bundle), ACCESS, parse_key(Secret(bytes(32), "another test")))
    with pytest.raises(ConfigurationError):
        verify(str(bundle), ACCESS, None)


def test_a_single_file_is_verified(bundle: Path) -> None:
    """Without looking at the others."""
    flip(bundle / "config.json", 0)
    lines: list[str] = []
    results = verify(str(bundle / "model.tensors"), ACCESS, KEY, lines.append).results
    assert [(result.name, result.state) for result in results] == [
        ("model.tensors", "ok"),
        (MANIFEST, "ok"),
    ]
    assert "every chunk authenticated" in lines[0]


def test_a_whole_bundle_is_verified_over_http(bundle: Path) -> None:
    """Where nothing can be listed: what the manifest names; a flipped bit is found there too."""
    with RangeServer(bundle) as server:
        access = Access(policy=RetryPolicy(attempts=2, deadline=5))
        states = {result.name: result.state for result in verify(server.url, access, KEY).results}
        assert set(states.values()) == {"ok"}
        assert {"model.tensors", "config.json"} <= states.keys()
        flip(bundle / "model.tensors", -100)
    with RangeServer(bundle) as server, pytest.raises(CorruptError, match=r"model\.tensors"):
        verify(server.url, access, KEY)


def test_what_stands_beside_a_single_file_is_nobodys_business(bundle: Path) -> None:
    """A link that leads elsewhere, as /tmp has them."""
    (bundle / "elsewhere").symlink_to("/proc/self/environ")
    results = verify(str(bundle / "model.tensors"), ACCESS, KEY).results
    assert [result.state for result in results] == ["ok", "ok"]


def test_files_that_nobody_vouches_for_are_shown(bundle: Path) -> None:
    """They are not damage, but they are not checked."""
    (bundle / "added.json").write_text("{}")
    states = {r.name: r.state for r in verify(str(bundle), ACCESS, KEY).results}
    assert states["added.json"] == "unchecked"
    (bundle / MANIFEST).unlink()
    states = {r.name: r.state for r in verify(str(bundle), ACCESS, KEY, wish="tags").results}
    assert states["model.tensors"] == "ok"
    assert states["config.json"] == states[MANIFEST] == "unchecked"


def test_sealed_tensors_without_manifest_and_digests_are_damage(bundle: Path) -> None:
    """Every chunk is authentic, and nothing says which tensor is which."""
    (bundle / MANIFEST).unlink()
    message, _ = damaged(bundle)
    assert "5 of 5 tensors are encrypted, but neither" in message
    assert "TENSORSERVE_VERIFY=tags" in message


def test_the_line_of_the_manifest_says_which_rule_holds(bundle: Path) -> None:
    """Authenticated; of version 1, which is not authenticated; pinned."""
    lines: list[str] = []
    verify(str(bundle), ACCESS, KEY, lines.append)
    whole = (bundle / MANIFEST).read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()
    assert lines[-1] == (
        f"ok         {MANIFEST}  version 2, authenticated by the key, SHA-256 {sha256}"
    )
    as_version_1(bundle)
    lines.clear()
    verify(str(bundle), ACCESS, KEY, lines.append, wish="tags")
    assert lines[-1].startswith(f"unchecked  {MANIFEST}  version 1, not authenticated, SHA-256 ")
    assert lines[-1].endswith("`tensorserve sign` adds one that the key authenticates")
    pin = hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()
    lines.clear()
    verify(str(bundle), ACCESS, KEY, lines.append, pin=pin)
    assert "version 1, the pinned one" in lines[-1]
    with pytest.raises(CorruptError, match="TENSORSERVE_MANIFEST_SHA256"):
        verify(str(bundle), ACCESS, KEY, pin=sha256)


def test_progress_ends_at_the_size(bundle: Path) -> None:
    """In bytes of tensors."""
    seen: list[tuple[int, int]] = []
    verify(str(bundle), ACCESS, KEY, progress=lambda *now: seen.append(now))
    assert seen[-1][0] == seen[-1][1] > 0


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server that knows no ranges and no listing."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(quiet, directory=str(tmp_path))
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_there_is_said(tmp_path: Path, web: str) -> None:
    """An empty directory, and a server that has none of the names."""
    (tmp_path / "nothing").mkdir()
    for uri in (str(tmp_path / "nothing"), f"{web}/nothing"):
        with pytest.raises(CorruptError, match="neither"):
            verify(uri, ACCESS, None)


@pytest.mark.parametrize(
    "change",
    [
        {"version": True},
        {"files": {}},
        {"files": [{"name": "../x", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "/x", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "a//b", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "a\0b", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "\ud800", "size": 1, "sha256": "0" * 64}]},
        {"files": [{"name": "x", "size": -1, "sha256": "0" * 64}]},
        {"files": [{"name": "x", "size": 1.0, "sha256": "0" * 64}]},
        {"files": [{"name": "x", "size": 1, "sha256": "0" * 63}]},
        {"files": [{"name": "x", "size": 1}]},
        {"files": [{"name": "x", "size": 1, "sha256": "0" * 64}] * 2},
        {"tensors_files": {"../m.tensors": {}}},
        {"tensors_files": {"m.tensors": {"size": "1"}}},
        {"encryption": "yes"},
        {"format": "other"},
        {"made_by": None},
    ],
)
def test_a_lying_manifest_is_refused(bundle: Path, change: dict[str, object]) -> None:
    """Types and names are checked before anything is done with them."""
    rewrite(bundle, change, KEY)
    with pytest.raises(CorruptError, match="is not a manifest"):
        verify(str(bundle), ACCESS, KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"authentication": None},
        {"authentication": {}},
        {"authentication": {"scheme": "none"}},
        {"authentication": {"scheme": "hkdf-sha256, hmac-sha256", "salt": "0", "passphrase": None}},
        {"encryption": None},
    ],
)
def test_a_manifest_without_a_right_authentication_is_none(
    bundle: Path, change: dict[str, object]
) -> None:
    """Not even of a bundle that calls itself plain: where there is a MAC, it is compared."""
    rewrite(bundle, change)
    with pytest.raises(CorruptError):
        verify(str(bundle), ACCESS, KEY)


@pytest.mark.parametrize(
    "content",
    [
        '{"format": "tensorserve-bundle", "format": "tensorserve-bundle"}',
        '{"format": 1.5}',
        '{"format": NaN}',
    ],
)
def test_what_can_be_read_in_two_ways_is_no_manifest(bundle: Path, content: str) -> None:
    """The MAC is over what we read; another reader must not read something else."""
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(CorruptError, match="is not a manifest"):
        verify(str(bundle), ACCESS, KEY)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", "[" * 100_000])
def test_what_is_no_json_object_is_no_manifest(bundle: Path, content: str) -> None:
    """Deep nesting included."""
    (bundle / MANIFEST).write_text(content)
    with pytest.raises(CorruptError, match="is not a manifest"):
        verify(str(bundle), ACCESS, KEY)


def test_a_later_manifest_is_said_to_be_one(bundle: Path) -> None:
    """It is not damaged: this release is too old for it."""
    rewrite(bundle, {"version": 3})
    with pytest.raises(ConfigurationError, match="version 3"):
        verify(str(bundle), ACCESS, KEY)


class TestCompiledCode:
    """compiled/<fingerprint>.sealed, which no manifest lists."""

    @pytest.fixture
    def sealed(self, bundle: Path, tmp_path: Path) -> Path:
        """In the bundle, sealed by the model's key."""
        path = bundle / name_of(FINGERPRINT)
        path.parent.mkdir()
        path.write_bytes(sealed_files({"vllm/a.py": b"code"}, tmp_path / "made", key=KEY))
        return path

    @staticmethod
    def result(bundle: Path, **options: ModelKey | None) -> str:
        """The line of the sealed file."""
        lines: list[str] = []
        with suppress(CorruptError):
            verify(str(bundle), ACCESS, KEY, lines.append, **options)  # type: ignore[arg-type]
        (line,) = [line for line in lines if name_of(FINGERPRINT) in line]
        return line

    @pytest.mark.usefixtures("sealed")
    def test_it_is_authenticated_by_the_models_key(self, bundle: Path) -> None:
        assert self.result(bundle).startswith("ok ")
        assert self.result(bundle).endswith(
            "compiled code, 1 files, 0.0 MB, authenticated, not signed"
        )

    def test_a_changed_byte_is_damage(self, bundle: Path, sealed: Path) -> None:
        flip(sealed, sealed.stat().st_size - 1)
        message, _ = damaged(bundle)
        assert "is not believed: its SHA-256 is not the one in its header" in message

    def test_a_key_of_its_own_is_taken(self, bundle: Path, sealed: Path, tmp_path: Path) -> None:
        own = GivenKey(bytes(range(1, 33)), "the test")
        sealed.write_bytes(sealed_files({"a": b"code"}, tmp_path / "own", key=own))
        assert "its MAC does not fit" in self.result(bundle)
        assert self.result(bundle, compiled_key=own).startswith("ok ")

    def test_a_file_that_only_looks_like_it_is_unchecked(self, bundle: Path, sealed: Path) -> None:
        other = sealed.with_name("notes.sealed")
        sealed.rename(other)
        lines: list[str] = []
        verify(str(bundle), ACCESS, KEY, lines.append)
        assert lines[-1] == "unchecked  compiled/notes.sealed  not in manifest.json"
