"""rekey: a new key at another place; the old bundle serves on, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from s3server import S3Server
from safetensors.torch import save_file
from tensorizer import EncryptionParams, TensorSerializer

from hf_samples import ACCESS, SMALL_FILES, make_model, tensors
from manifests import rewrite
from model_signers import make_pair, verify_key
from rangeserver import RangeServer
from s3_clients import s3_access, s3_client
from tensorserve.bundle.compiled import name_of
from tensorserve.bundle.keys import GivenKey, ModelKey, parse_passphrase
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE, read_manifest
from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.bundle.verify import verify
from tensorserve.cli import main
from tensorserve.config.settings import SourceSettings
from tensorserve.config.unwrapping import with_key
from tensorserve.errors import ConfigurationError, CorruptError, UsageError, WrongKeyError
from tensorserve.format import read_tensor
from tensorserve.packing.lora import read_adapters
from tensorserve.packing.pack import pack
from tensorserve.packing.rekey import rekey
from tensorserve.packing.sign import sign
from tensorserve.secret import Secret
from tensorserve.sources import Access, list_names
from tensorserve.wrapping.base import Services, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping
from waiting import wait_for

OLD, NEW = GivenKey(bytes(range(32)), "the old one"), GivenKey(bytes(range(1, 33)), "the new one")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A bundle that `OLD` opens."""
    make_model(tmp_path / "hf", tensors() | {"empty.bias": torch.zeros(0, 4)})
    place = tmp_path / "old"
    pack(tmp_path / "hf", str(place), access=ACCESS, key=Secret(OLD.reveal(), "the test"))
    return place


def state(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def contents(uri: str, key: ModelKey, access: Access = ACCESS) -> dict[str, bytes]:
    """Every tensor of every file, in plain text."""
    manifest = read_manifest(uri, access, key)
    assert manifest is not None
    found = {}
    for name in manifest.tensors_files:
        opened = open_tensors(f"{uri}/{name}", access, key)
        for record in opened.index.tensors:
            data = read_tensor(opened.source, record, opened.index, opened.key, verify=False)
            found[f"{name}:{record.name}:{record.dtype}:{record.shape}"] = bytes(data)
        opened.source.close()
    return found


def test_all_is_sealed_anew(old: Path, tmp_path: Path) -> None:
    """The same tensors and files; verify passes; the old bundle is untouched."""
    before, told = state(old), []
    done = rekey(
        str(old), str(tmp_path / "new"), ACCESS, OLD, NEW, progress=lambda *n: told.append(n)
    )
    assert state(old) == before
    new = tmp_path / "new"
    assert {r.state for r in verify(str(new), ACCESS, NEW).results} == {"ok"}
    assert contents(str(new), NEW) == contents(str(old), OLD)
    after = state(new)
    assert set(after) == set(before)
    same = {name for name in before if before[name] == after[name]}
    assert same == set(SMALL_FILES) | {n for n in before if n.endswith(".safetensors")}
    assert told[-1] == (done.data_bytes, done.data_bytes)
    assert done.sha256 in str(done)
    assert done.fingerprint == fingerprint_of(NEW.reveal())


def test_the_old_key_opens_nothing_of_the_new_bundle(old: Path, tmp_path: Path) -> None:
    """Neither the manifest nor a chunk; and no chunk is the same."""
    new = tmp_path / "new"
    rekey(str(old), str(new), ACCESS, OLD, NEW)
    with pytest.raises(WrongKeyError):
        verify(str(new), ACCESS, OLD)
    with pytest.raises(WrongKeyError):
        open_tensors(str(new / "model.tensors"), ACCESS, OLD)
    (new / MANIFEST).unlink()
    with pytest.raises(WrongKeyError):
        verify(str(new), ACCESS, OLD)
    first, second = ((d / "model.tensors").read_bytes()[-4096:] for d in (old, new))
    assert first[:-64] != second[:-64]


def test_the_new_bundle_is_signed_as_asked(old: Path, tmp_path: Path) -> None:
    """By `model_signing`'s own judgement; a signature is not lost without a word."""
    owner = make_pair(tmp_path)
    sign(str(old), ACCESS, OLD, wish="auto", signer=owner.signer)
    new = tmp_path / "new"
    said = str(rekey(str(old), str(new), ACCESS, OLD, NEW, signer=owner.signer))
    assert "not signed" not in said
    code, output = verify_key(new, owner.public)
    assert code == 0, output
    said = str(rekey(str(old), str(new), ACCESS, OLD, NEW, overwrite=True))
    assert "not signed" in said
    assert not (new / SIGNATURE).exists()


def test_the_new_key_is_wrapped_as_asked(old: Path, tmp_path: Path) -> None:
    """For the recipients that are named, and not for those of the old bundle."""
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode().ljust(32, b"."))
    by = for_wrapping(f"file:{tmp_path / 'a'}", Services())
    done = rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW, recipients=[by])
    assert done.recipients == (f"file:{by.key}",)

    def opened(name: str) -> SourceSettings:
        environ = {"TENSORSERVE_KEY_URI": f"file:{tmp_path / name}"}
        return with_key(SourceSettings.from_environment(environ), str(tmp_path / "new"))

    found = opened("a").key
    assert found is not None
    assert found.reveal() == NEW.reveal()
    with pytest.raises(WrongKeyError):
        opened("b")


def test_a_passphrases_bundle_gets_a_key(tmp_path: Path) -> None:
    """Which can be wrapped then."""
    make_model(tmp_path / "hf")
    secret = Secret("words", "the test")
    pack(tmp_path / "hf", str(tmp_path / "old"), access=ACCESS, passphrase=secret)
    rekey(str(tmp_path / "old"), str(tmp_path / "new"), ACCESS, parse_passphrase(secret), NEW)
    assert {r.state for r in verify(str(tmp_path / "new"), ACCESS, NEW).results} == {"ok"}


@pytest.mark.parametrize("chunk", [2**16, 3 * 2**20, 2**30])
def test_a_file_of_tensorizers_is_sealed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """With other chunks than ours, a tensor in one chunk among them."""
    monkeypatch.setattr("tensorserve.format.writer._STEP", 4 * 2**20)
    (tmp_path / "old").mkdir()
    content = tensors() | {"large.weight": torch.arange(3_000_000, dtype=torch.float32)}
    params = EncryptionParams(OLD.reveal())
    serializer = TensorSerializer(str(tmp_path / "old" / "model.tensors"), encryption=params)
    monkeypatch.setattr(serializer, "_crypt_chunk_size", chunk)
    serializer.write_state_dict(content)
    serializer.close()
    (tmp_path / "old" / "config.json").write_text("{}")
    sign(str(tmp_path / "old"), ACCESS, OLD, wish="auto")
    rekey(str(tmp_path / "old"), str(tmp_path / "new"), ACCESS, OLD, NEW)
    assert contents(str(tmp_path / "new"), NEW) == contents(str(tmp_path / "old"), OLD)
    assert {r.state for r in verify(str(tmp_path / "new"), ACCESS, NEW).results} == {"ok"}


def test_adapters_are_sealed_anew(tmp_path: Path) -> None:
    """Every .tensors file of the manifest, in its folder."""
    make_model(tmp_path / "hf")
    (tmp_path / "french").mkdir()
    lora = {"q.lora_A.weight": torch.randn(4, 16), "q.lora_B.weight": torch.randn(16, 4)}
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in lora.items()},
        tmp_path / "french" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4}
    (tmp_path / "french" / "adapter_config.json").write_text(json.dumps(config))
    adapters = read_adapters([f"french={tmp_path / 'french'}"])
    secret = Secret(OLD.reveal(), "the test")
    pack(tmp_path / "hf", str(tmp_path / "old"), access=ACCESS, key=secret, adapters=adapters)
    rekey(str(tmp_path / "old"), str(tmp_path / "new"), ACCESS, OLD, NEW)
    found = contents(str(tmp_path / "new"), NEW)
    assert found == contents(str(tmp_path / "old"), OLD)
    assert {name.partition(":")[0] for name in found} > {"model.tensors"}


def test_compiled_code_is_left_out_and_named(old: Path, tmp_path: Path) -> None:
    """It is sealed with the old key."""
    name = name_of("ab" * 32)
    (old / "compiled").mkdir()
    (old / name).write_bytes(b"sealed")
    done = rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW)
    assert done.left_out == (name,)
    assert "tensorserve precompile" in str(done)
    assert not (tmp_path / "new" / "compiled").exists()


def test_damage_is_not_sealed_anew(old: Path, tmp_path: Path) -> None:
    """A chunk, a small file, a tensor of another bundle of the same key: 65, nothing is written."""

    def refused() -> None:
        with pytest.raises(CorruptError):
            rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "old"]

    good = state(old)
    for name in ("model.tensors", "config.json"):
        data = bytearray(good[name])
        data[len(data) // 2] ^= 1
        (old / name).write_bytes(data)
        refused()
        (old / name).write_bytes(good[name])
    content = {name: tensor.clone() for name, tensor in tensors().items()}
    content["empty.bias"] = torch.zeros(0, 4)
    content["model.norm.weight"] += 1
    make_model(tmp_path / "other", content)
    pack(tmp_path / "other", str(tmp_path / "exchanged"), access=ACCESS,
         key=Secret(OLD.reveal(), "the test"))  # fmt: skip
    (old / "model.tensors").write_bytes((tmp_path / "exchanged/model.tensors").read_bytes())
    with pytest.raises(CorruptError, match="sha256 that the manifest gives"):
        rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW)
    assert not (tmp_path / "new").exists()


def test_what_no_key_authenticates_is_refused(old: Path, tmp_path: Path) -> None:
    """No manifest, a plain bundle, another key, another manifest."""
    new = str(tmp_path / "new")
    with pytest.raises(WrongKeyError):
        rekey(str(old), new, ACCESS, NEW, OLD)
    with pytest.raises(ConfigurationError, match="needs the key"):
        rekey(str(old), new, ACCESS, None, NEW)
    with pytest.raises(ConfigurationError, match="is the key that the bundle has"):
        rekey(str(old), new, ACCESS, OLD, OLD)
    with pytest.raises(CorruptError, match="TENSORSERVE_MANIFEST_SHA256"):
        rekey(str(old), new, ACCESS, OLD, NEW, pin="0" * 64)
    rewrite(old, lambda document: document["files"].clear())
    with pytest.raises(CorruptError, match="MAC"):
        rekey(str(old), new, ACCESS, OLD, NEW)
    (old / MANIFEST).unlink()
    with pytest.raises(ConfigurationError, match=r"there is none.*\n.*tensorserve sign"):
        rekey(str(old), new, ACCESS, OLD, NEW)
    pack(tmp_path / "hf", str(tmp_path / "plain"), access=ACCESS)
    with pytest.raises(ConfigurationError, match="not authenticated by a key"):
        rekey(str(tmp_path / "plain"), new, ACCESS, OLD, NEW)
    assert not (tmp_path / "new").exists()


def test_the_new_place_is_another_one(old: Path, tmp_path: Path) -> None:
    """64 for the same, and for one within the other; 78 for one that holds a bundle."""
    link = tmp_path / "link"
    link.symlink_to(old)
    for uri, dest in (
        (str(old), str(old)), (str(old), f"{old}/"), (str(old), f"{old}/new"),
        (str(old), f"file://{old}"), (str(old), str(link)), (str(old), str(tmp_path)),
        ("s3://b/m", "s3://b/m/new"), ("s3://b/m/old", "s3://b/m"), ("az://b/m", "az://b/m/"),
        (str(old / "model.tensors"), str(tmp_path / "new")),
    ):  # fmt: skip
        with pytest.raises(UsageError):
            rekey(uri, dest, ACCESS, OLD, NEW)
    with pytest.raises(ConfigurationError, match="cannot be written there"):
        rekey(str(old), "https://example.org/m", ACCESS, OLD, NEW)
    rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW)
    with pytest.raises(ConfigurationError, match="is a bundle already"):
        rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW)
    rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW, overwrite=True)


def test_an_interruption_leaves_nothing(old: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle."""

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rekey(str(old), str(tmp_path / "new"), ACCESS, OLD, NEW, progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "old"]


def test_killed_in_the_middle_the_old_bundle_serves(old: Path, tmp_path: Path) -> None:
    """SIGKILL while tensors are written: no new bundle, and the next run makes it."""
    (tmp_path / "key").write_bytes(OLD.reveal())
    before = state(old)
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    environ["TENSORSERVE_KEY_FILE"] = str(tmp_path / "key")
    words = [str(Path(sys.executable).with_name("tensorserve")), "rekey"]
    more = [str(tmp_path / "new"), "--key-file", str(tmp_path / "new-key")]
    # So slow that it is in the middle when it is seen to have begun.
    with RangeServer(old, bytes_per_second=100_000) as server:
        running = subprocess.Popen([*words, server.url, *more], env=environ)
        try:
            wait_for(lambda: any(tmp_path.glob(".new.packing-*/model.tensors")), 60)
            assert running.poll() is None
        finally:
            running.send_signal(signal.SIGKILL)
            running.wait()
    assert not (tmp_path / "new").exists()
    assert state(old) == before
    assert {r.state for r in verify(str(old), ACCESS, OLD).results} == {"ok"}
    subprocess.run([*words, str(old), *more], env=environ, check=True, timeout=120)
    key = GivenKey((tmp_path / "new-key").read_bytes(), "the test")
    assert {r.state for r in verify(str(tmp_path / "new"), ACCESS, key).results} == {"ok"}


def test_a_bucket_gets_all_or_nothing(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """From prefix to prefix; interrupted, nothing is visible, and no part is left."""
    make_model(tmp_path / "hf")
    uri, new = f"s3://{bucket}/rekey/old", f"s3://{bucket}/rekey/new"
    access = Access(s3=s3_access(s3))
    pack(tmp_path / "hf", uri, access=access, key=Secret(OLD.reveal(), "the test"))

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rekey(uri, new, access, OLD, NEW, progress=stop)
    assert not list_names(new, access)
    uploads = s3_client(s3).list_multipart_uploads(Bucket=bucket, Prefix="rekey/")
    assert not uploads.get("Uploads")
    rekey(uri, new, access, OLD, NEW)
    assert contents(new, NEW, access) == contents(uri, OLD, access)
    for place, key in ((uri, OLD), (new, NEW)):
        assert {r.state for r in verify(place, access, key).results} == {"ok"}


def test_the_command(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """By a wrapped key, to a wrapped key; what is missing is said before anything is made."""
    monkeypatch.setenv("TENSORSERVE_KEY", OLD.reveal().hex())
    assert main(["rekey", str(old), str(tmp_path / "new")]) == 64
    assert "--key-file" in capsys.readouterr().err
    assert main(["rekey", str(old), str(tmp_path / "new"), "--wrap", "file:/none"]) == 78
    (tmp_path / "w").write_bytes(bytes(range(5, 37)))
    wrap = f"file:{tmp_path / 'w'}"
    assert main(["rekey", str(old), str(tmp_path / "new"), "--wrap", wrap]) == 0
    said = capsys.readouterr().out
    assert "nowhere but wrapped" in said
    assert "key fingerprint" in said
    monkeypatch.delenv("TENSORSERVE_KEY")
    monkeypatch.setenv("TENSORSERVE_KEY_URI", wrap)
    key = ["--key-file", str(tmp_path / "k")]
    assert main(["rekey", str(tmp_path / "new"), str(tmp_path / "third"), *key]) == 0
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o600
    assert "wrapped_keys" not in json.loads((tmp_path / "third" / MANIFEST).read_text())
