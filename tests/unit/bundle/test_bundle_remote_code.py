"""A model's own code: packed if it is asked for, named if not, and digested."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from hf_samples import ACCESS, make_model
from tensorserve.bundle.download import fetch_artifacts
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.manifest import read_manifest
from tensorserve.cli import main as tensorserve
from tensorserve.errors import CorruptError
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret

KEY = Secret(bytes(range(32)), "the test")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = make_model(tmp_path / "hf")
    (directory / "modeling_own.py").write_text("from .parts import *\n")
    (directory / "parts.py").write_text("")
    (directory / "deeper").mkdir()
    (directory / "deeper" / "more.py").write_text("more = 1\n")
    for hidden in ("__pycache__", ".git"):
        (directory / hidden).mkdir()
        (directory / hidden / "old.py").write_text("")
    named = {"architectures": ["Own"], "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (directory / "config.json").write_text(json.dumps(named))
    return directory


def test_code_is_packed_with_its_digests(tmp_path: Path, model: Path) -> None:
    """All Python files but hidden ones; the terminal and the authenticated manifest say which."""
    bundle = tmp_path / "b"
    result = pack(model, str(bundle), access=ACCESS, key=KEY, trust_remote_code=True)
    names = {"modeling_own.py", "parts.py", "deeper/more.py"}
    assert set(result.code) == names
    manifest = read_manifest(str(bundle), ACCESS, parse_key(KEY))
    assert manifest is not None
    assert manifest.authenticated_by == "key"
    digests = {entry.name: entry.sha256 for entry in manifest.files}
    for name in names:
        digest = hashlib.sha256((model / name).read_bytes()).hexdigest()
        assert digests[name] == result.code[name] == digest
        assert f"code: {name}, SHA-256 {digest}" in str(result)
    assert not [note for note in result.notes if "code" in note]
    written = fetch_artifacts(
        str(bundle), ACCESS, tmp_path / "served", manifest, remote_code=True, sealed=True
    )
    assert names <= set(written)


def test_changed_code_is_not_served(tmp_path: Path, model: Path) -> None:
    """It is held to the manifest as every other file."""
    bundle = tmp_path / "b"
    pack(model, str(bundle), access=ACCESS, key=KEY, trust_remote_code=True)
    (bundle / "parts.py").write_text("#")
    manifest = read_manifest(str(bundle), ACCESS, parse_key(KEY))
    with pytest.raises(CorruptError, match=r"parts\.py is 1 bytes"):
        fetch_artifacts(
            str(bundle), ACCESS, tmp_path / "served", manifest, remote_code=True, sealed=True
        )


def test_code_that_is_left_out_is_said(tmp_path: Path, model: Path) -> None:
    """Each file with the way to take it, and that the model names it."""
    result = pack(model, str(tmp_path / "b"), access=ACCESS)
    assert not result.code
    said = str(result)
    assert "(code; --trust-remote-code includes it)" in said
    assert "note: the model names code of its own (modeling_own.py), which is left out" in said


def test_code_that_is_not_there_ends_the_pack(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """78, where it was asked for: what the named file imports, for one."""
    (model / "parts.py").unlink()
    words = ["pack", str(model), str(tmp_path / "b")]
    assert tensorserve([*words, "--trust-remote-code"]) == 78
    said = capsys.readouterr().err
    # transformers reads imports by this form alone.
    assert "modeling_own.py names parts.py, which is not in the model's directory" in said
    assert not (tmp_path / "b").exists()
    assert tensorserve(words) == 0
