"""pack: from a Hugging Face directory to a bundle in a directory, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensorizer import DecryptionParams, TensorDeserializer

from hf_samples import ACCESS, SMALL_FILES, make_model, make_sharded, tensors
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.manifest import check_index, read_manifest
from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.bundle.verify import verify
from tensorserve.errors import ConfigurationError, CorruptError, UsageError
from tensorserve.packing import destination
from tensorserve.packing.key_file import prepare_key
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret

KEY = Secret(bytes(range(32)), "the test")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "hf")


def bundle_of(tmp_path: Path) -> Path:
    return tmp_path / "bundles" / "m"


def read_back(path: Path, key: bytes | None) -> dict[str, torch.Tensor]:
    encryption = DecryptionParams.from_key(key) if key else None
    with TensorDeserializer(path, device="cpu", encryption=encryption, verify_hash=True) as found:
        return {name: found[name].data.clone() for name in found}


@pytest.mark.parametrize("make", [make_model, make_sharded])
def test_tensorizer_reads_the_packed_tensors(tmp_path: Path, make: object) -> None:
    """Bit for bit, from one file and from shards."""
    source = make(tmp_path / "hf")  # type: ignore[operator]
    pack(source, str(bundle_of(tmp_path)), access=ACCESS, key=KEY)
    found = read_back(bundle_of(tmp_path) / "model.tensors", KEY.reveal())
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_small_files_come_along_and_code_does_not(tmp_path: Path, model: Path) -> None:
    """Configuration, tokenizer, templates; no code, no other weights, no read-me. Of the weights
    themselves, the header."""
    result = pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    bundle = bundle_of(tmp_path)
    present = {str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file()}
    assert present == {*SMALL_FILES, "model.safetensors", "model.tensors", "manifest.json"}
    assert set(result.left_out) == {"README.md", "modeling_own.py", "pytorch_model.bin"}
    assert "README.md" in str(result)
    for name in SMALL_FILES:
        assert (bundle / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.parametrize("sealed", ["plain", "key", "passphrase"])
def test_what_was_packed_verifies(tmp_path: Path, model: Path, sealed: str) -> None:
    """With the key, with the passphrase, and without encryption; the manifest fits the file."""
    from tensorserve.bundle.keys import parse_passphrase

    phrase = Secret("correct horse", "the test")
    given = {"key": KEY} if sealed == "key" else {}
    given |= {"passphrase": phrase} if sealed == "passphrase" else {}
    pack(model, str(bundle_of(tmp_path)), access=ACCESS, **given)
    opens = {"plain": None, "key": parse_key(KEY), "passphrase": parse_passphrase(phrase)}[sealed]
    lines: list[str] = []
    verify(str(bundle_of(tmp_path)), ACCESS, opens, lines.append)
    assert len(lines) == 1 + len(SMALL_FILES) + 1 + 1
    assert all(line.startswith("ok ") for line in lines[:-1])
    manifest = read_manifest(str(bundle_of(tmp_path)), ACCESS, opens)
    assert manifest is not None
    assert manifest.authenticated_by == (None if sealed == "plain" else "key")
    assert manifest.sha256 in lines[-1]
    opened = open_tensors(str(bundle_of(tmp_path) / "model.tensors"), ACCESS, opens)
    check_index(manifest, "model.tensors", opened.index)
    opened.source.close()
    assert (manifest.encryption and manifest.encryption.key) == (
        None if sealed == "plain" else sealed
    )


def test_no_plain_weights_are_in_an_encrypted_bundle(tmp_path: Path, model: Path) -> None:
    """Neither in the file nor in one left behind."""
    pack(model, str(bundle_of(tmp_path)), access=ACCESS, key=KEY)
    plain = tensors()["model.embed.weight"].numpy().tobytes()[:64]
    for path in bundle_of(tmp_path).parent.rglob("*"):
        assert path.is_dir() or plain not in path.read_bytes()


def test_progress_ends_at_the_size(tmp_path: Path, model: Path) -> None:
    """In bytes of tensors, growing."""
    seen: list[tuple[int, int]] = []
    result = pack(
        model, str(bundle_of(tmp_path)), access=ACCESS, progress=lambda *now: seen.append(now)
    )
    assert seen == sorted(seen)
    assert seen[-1] == (result.data_bytes, result.data_bytes)


# Whole or not at all ------------------------------------------------------------------------------


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path, model: Path) -> None:
    """Ctrl-C in the middle of the tensors."""

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    bundle_of(tmp_path).parent.mkdir()
    with pytest.raises(KeyboardInterrupt):
        pack(model, str(bundle_of(tmp_path)), access=ACCESS, progress=interrupt)
    assert list(bundle_of(tmp_path).parent.iterdir()) == []


def test_the_bundle_appears_only_when_it_is_complete(tmp_path: Path, model: Path) -> None:
    """Nothing stands under its name while tensors are written."""
    seen = []
    pack(
        model,
        str(bundle_of(tmp_path)),
        access=ACCESS,
        progress=lambda *_: seen.append(bundle_of(tmp_path).exists()),
    )
    assert seen
    assert not any(seen)


def test_an_existing_bundle_is_not_replaced_unasked(tmp_path: Path, model: Path) -> None:
    """It stays as it was."""
    pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    before = (bundle_of(tmp_path) / "model.tensors").read_bytes()
    with pytest.raises(ConfigurationError, match="--overwrite"):
        pack(model, str(bundle_of(tmp_path)), access=ACCESS, key=KEY)
    assert (bundle_of(tmp_path) / "model.tensors").read_bytes() == before


def test_overwrite_replaces_the_whole_bundle(tmp_path: Path, model: Path) -> None:
    """Files that the old one had and the new one has not are gone; nothing else is touched."""
    pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    (bundle_of(tmp_path) / "own-notes.txt").write_text("mine")
    (model / "tokenizer.json").unlink()
    pack(model, str(bundle_of(tmp_path)), access=ACCESS, key=KEY, overwrite=True)
    names = {path.name for path in bundle_of(tmp_path).iterdir()}
    assert names == {
        *("1_Pooling", "chat_template.jinja", "config.json"),
        *("manifest.json", "model.safetensors", "model.tensors", "own-notes.txt"),
    }
    verify(str(bundle_of(tmp_path)), ACCESS, parse_key(KEY))


def test_a_failed_overwrite_keeps_the_old_bundle(tmp_path: Path, model: Path) -> None:
    """And it still verifies."""

    def fail(*_: int) -> None:
        raise RuntimeError

    pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    before = sorted(bundle_of(tmp_path).iterdir())
    with pytest.raises(RuntimeError):
        pack(model, str(bundle_of(tmp_path)), access=ACCESS, key=KEY, overwrite=True, progress=fail)
    assert sorted(bundle_of(tmp_path).iterdir()) == before
    verify(str(bundle_of(tmp_path)), ACCESS, None)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_no_bundle_is_never_replaced(
    tmp_path: Path, model: Path, overwrite: bool
) -> None:
    """Somebody's home, for example."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(ConfigurationError, match="not a bundle"):
        pack(model, str(home), access=ACCESS, overwrite=overwrite)
    assert [path.name for path in home.iterdir()] == ["letter.txt"]


def test_an_empty_directory_is_filled(tmp_path: Path, model: Path) -> None:
    """It may be a mounted volume, which cannot be renamed: it stays the same directory."""
    bundle_of(tmp_path).mkdir(parents=True)
    inode = bundle_of(tmp_path).stat().st_ino
    pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    assert bundle_of(tmp_path).stat().st_ino == inode
    verify(str(bundle_of(tmp_path)), ACCESS, None)
    assert not [path for path in bundle_of(tmp_path).iterdir() if path.name.startswith(".")]


def test_a_bundle_inside_of_the_model_is_refused(model: Path) -> None:
    """The next pack would take its files for the model's."""
    with pytest.raises(ConfigurationError, match="inside"):
        pack(model, str(model / "bundle"), access=ACCESS)


def test_a_disk_that_is_too_small_is_found_before_writing(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both figures are named."""
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ConfigurationError, match="1000 bytes free"):
        pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    assert list(bundle_of(tmp_path).parent.iterdir()) == []


def test_a_disk_that_fills_up_is_named_and_cleaned(tmp_path: Path, model: Path) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    script = """
import resource, signal, sys
from pathlib import Path
from tensorserve.errors import ConfigurationError
from tensorserve.packing.pack import pack
from tensorserve.sources import Access
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    pack(Path(sys.argv[1]), sys.argv[2], access=Access())
except ConfigurationError as error:
    print(error.message)
"""
    words = [sys.executable, "-c", script, str(model), str(bundle_of(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "model.tensors could not be written: File too large" in done.stdout
    assert list(bundle_of(tmp_path).parent.iterdir()) == []


def test_a_write_that_fails_late_is_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file system sets no bytes aside (NFS), and the last ones find no room."""
    monkeypatch.setattr(destination, "reserve", lambda *_: None)
    target = destination.open_destination(
        str(bundle_of(tmp_path)), ACCESS, overwrite=False, needed=0
    )
    opened = Path.open
    monkeypatch.setattr(
        Path, "open", lambda _path, _mode, **options: opened(Path("/dev/full"), "wb", **options)
    )
    with (
        pytest.raises(
            ConfigurationError, match=r"config\.json could not be written: No space left"
        ),
        target.create("config.json", 2) as out,
    ):
        out.write(b"{}")
    target.discard()


def test_memory_is_bounded_by_the_largest_tensors(tmp_path: Path) -> None:
    """240 MB in tensors of 8 MB: three of them at a time."""
    source = tmp_path / "hf"
    source.mkdir()
    megabytes = 8
    save_file(
        {f"t{i}": torch.full((megabytes, 1024, 1024), i, dtype=torch.uint8) for i in range(30)},
        source / "model.safetensors",
    )
    (source / "config.json").write_text("{}")
    script = """
import re, sys
from pathlib import Path
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access
def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s+(\\d+)", status)[1])
# Not ru_maxrss: a child inherits its parent's.
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
pack(Path(sys.argv[1]), sys.argv[2], access=Access(), key=Secret(bytes(32)))
print((memory("VmHWM") - before) * 1024)
"""
    words = [sys.executable, "-c", script, str(source), str(bundle_of(tmp_path))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    # One at least is filled, so that much must have been seen.
    assert 0.9 * megabytes * 1024**2 < int(done.stdout) < 4 * megabytes * 1024**2


# Sources that will not do -------------------------------------------------------------------------


def test_pickles_are_refused_with_the_reason(tmp_path: Path, model: Path) -> None:
    """And with the way out."""
    (model / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="pickles") as caught:
        pack(model, str(bundle_of(tmp_path)), access=ACCESS)
    assert "save_pretrained" in str(caught.value)


def test_a_directory_without_config_is_refused(tmp_path: Path, model: Path) -> None:
    """vLLM would fail after a minute of imports."""
    (model / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"config\.json"):
        pack(model, str(bundle_of(tmp_path)), access=ACCESS)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    """An interrupted download."""
    source = make_sharded(tmp_path / "hf")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CorruptError, match="model-00002-of-00002"):
        pack(source, str(bundle_of(tmp_path)), access=ACCESS)


@pytest.mark.parametrize("cut", [4, 100, 1_000_000])
def test_a_truncated_safetensors_file_is_refused(tmp_path: Path, model: Path, cut: int) -> None:
    """At any place."""
    path = model / "model.safetensors"
    os.truncate(path, cut)
    with pytest.raises(CorruptError, match=r"model\.safetensors"):
        pack(model, str(bundle_of(tmp_path)), access=ACCESS)


def test_four_bit_floats_keep_their_bytes(tmp_path: Path) -> None:
    """safetensors counts values, torch counts bytes of two values."""
    packed = torch.arange(32, dtype=torch.uint8).reshape(4, 8).view(torch.float4_e2m1fn_x2)
    source = make_model(tmp_path / "hf", {"w": packed})
    pack(source, str(bundle_of(tmp_path)), access=ACCESS)
    found = read_back(bundle_of(tmp_path) / "model.tensors", None)["w"]
    assert found.dtype == packed.dtype
    assert found.shape == packed.shape
    assert torch.equal(found.view(torch.uint8), packed.view(torch.uint8))


# Keys ---------------------------------------------------------------------------------------------


def test_a_key_file_is_made_for_its_owner_only(tmp_path: Path) -> None:
    """32 raw bytes, as vLLM's encryption_keyfile wants them."""
    path = tmp_path / "key"
    key, passphrase = prepare_key(path, None)
    assert passphrase is None
    assert key is not None
    assert path.read_bytes() == key.reveal()
    assert len(key.reveal()) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert "new" in key.origin


def test_a_key_file_that_exists_is_used(tmp_path: Path) -> None:
    """In hex too, and it is left as it is."""
    path = tmp_path / "key"
    path.write_text(bytes(range(32)).hex() + "\n")
    key, _ = prepare_key(path, None)
    assert key is not None
    assert parse_key(key).reveal() == bytes(range(32))
    assert path.read_text() == bytes(range(32)).hex() + "\n"


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    """Before anything is packed with it."""
    path = tmp_path / "key"
    path.write_text("secret")
    with pytest.raises(ConfigurationError, match="not a 32-byte key"):
        prepare_key(path, None)
    with pytest.raises(ConfigurationError, match="could not be created"):
        prepare_key(tmp_path / "missing" / "key", None)
    with pytest.raises(UsageError):
        prepare_key(path, path)
    with pytest.raises(ConfigurationError, match=r"passphrase file .* cannot be read"):
        prepare_key(None, tmp_path / "nothing")


def test_without_files_nothing_is_encrypted() -> None:
    """Neither key nor passphrase."""
    assert prepare_key(None, None) == (None, None)
