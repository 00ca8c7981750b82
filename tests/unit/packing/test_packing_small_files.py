"""What goes into a bundle beside the weights, what does not, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hf_samples import ACCESS, SMALL_FILES, make_model
from tensorserve.cli import main as tensorserve
from tensorserve.errors import ConfigurationError, CorruptError, PermissionDeniedError
from tensorserve.packing import small_files
from tensorserve.packing.checkpoint import read_checkpoint
from tensorserve.packing.pack import pack
from tensorserve.packing.small_files import describe_left_out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "hf")


@pytest.mark.parametrize(
    "name",
    [
        "tekken.json", "tokenizer.model", "tokenizer.model.v3", "spiece.model", "qwen.tiktoken",
        "vocab.json", "merges.txt", "generation_config.json", "preprocessor_config.json",
        "hf_quant_config.json", "additional_chat_templates/tool.jinja", "LICENSE",
        "2_Dense/config.json", "a name with spaces.json", "Ünïcode.txt",
    ],
)  # fmt: skip
def test_what_vllm_may_open_is_packed(tmp_path: Path, model: Path, name: str) -> None:
    """Byte for byte."""
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b'{"any": 1}')
    pack(model, str(tmp_path / "b"), access=ACCESS)
    assert (tmp_path / "b" / name).read_bytes() == b'{"any": 1}'


def test_what_is_left_out_is_said_with_the_reason(tmp_path: Path, model: Path) -> None:
    """Once for each reason, and short where there are many."""
    for number in range(9):
        (model / f"picture-{number}.png").write_bytes(b"")
    (model / "model.gguf").write_bytes(b"")
    (model / "manifest.json").write_text("{}")
    (model / "pipe.json").unlink(missing_ok=True)
    os.mkfifo(model / "pipe.json")
    result = pack(model, str(tmp_path / "b"), access=ACCESS)
    said = [line.strip() for line in str(result).splitlines() if "left out" in line]
    assert said == [
        "left out: README.md, picture-0.png, picture-1.png, picture-2.png and 6 more (vLLM does "
        "not read them)",
        "left out: manifest.json (the bundle has its own)",
        "left out: model.gguf (weights of another format)",
        "left out: modeling_own.py (code; --trust-remote-code includes it)",
        "left out: pipe.json (a pipe)",
        "left out: pytorch_model.bin (pickles, never opened)",
    ]
    assert describe_left_out({}) == []


# Links --------------------------------------------------------------------------------------------


def test_a_link_to_a_folder_is_followed(tmp_path: Path, model: Path) -> None:
    """As vLLM follows it, out of the directory too."""
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (model / "1_Pooling").rename(tmp_path / "elsewhere")
    (model / "1_Pooling").symlink_to("../elsewhere")
    result = pack(model, str(tmp_path / "b"), access=ACCESS)
    assert "1_Pooling/config.json" in result.files
    packed = json.loads((tmp_path / "b" / "1_Pooling" / "config.json").read_text())
    assert packed == {"pooling_mode_mean_tokens": True}


def test_a_hubs_cache_is_packed(tmp_path: Path) -> None:
    """A snapshot of links, each to a blob outside of it."""
    model = make_model(tmp_path / "snapshots" / "0123")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, name in enumerate(["model.safetensors", *SMALL_FILES]):
        (model / name).rename(blobs / str(number))
        (model / name).symlink_to(os.path.relpath(blobs / str(number), (model / name).parent))
    result = pack(model, str(tmp_path / "b"), access=ACCESS)
    assert result.files == SMALL_FILES


def test_a_circle_of_links_ends(tmp_path: Path, model: Path) -> None:
    """The folder that holds the link, and two that hold each other."""
    (model / "again").symlink_to(".")
    other = tmp_path / "other"
    other.mkdir()
    (other / "extra.json").write_text("{}")
    (other / "back").symlink_to(model)
    (model / "other").symlink_to(other)
    checkpoint = read_checkpoint(model)
    assert "other/extra.json" in checkpoint.files
    assert checkpoint.left_out["again"] == "a link to a folder that contains it"
    assert "other/back" in checkpoint.left_out


def test_a_link_to_everything_ends_with_a_reason(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one to the root would."""
    monkeypatch.setattr(small_files, "_MAX_ENTRIES", 4)
    with pytest.raises(ConfigurationError, match="more than 4 files") as caught:
        read_checkpoint(model)
    assert "link" in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "1_Pooling", "any.json"])
def test_a_link_to_nothing_is_named(tmp_path: Path, model: Path, name: str) -> None:
    """With what it leads to; stock would serve the model without it, or end."""
    if (model / name).is_dir():
        (model / name / "config.json").unlink()
        (model / name).rmdir()
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../../blobs/0123")
    with pytest.raises(CorruptError, match=rf"{name} is a link to \.\./\.\./blobs/0123"):
        pack(model, str(tmp_path / "b"), access=ACCESS)
    assert not (tmp_path / "b").exists()


def test_a_link_to_nothing_that_nobody_reads_is_left_out(model: Path) -> None:
    """A read-me, a pickle, weights of a folder: said, and no error."""
    (model / "README.md").unlink()
    for name in ("README.md", "old.bin", "1_Pooling/model.safetensors"):
        (model / name).symlink_to("gone")
    left_out = read_checkpoint(model).left_out
    assert {"README.md", "old.bin"} <= set(left_out)
    assert left_out["1_Pooling/model.safetensors"] == "a link to gone, which does not exist"


# Files that cannot be read ------------------------------------------------------------------------


@contextmanager
def without_roots_rights() -> Iterator[int]:
    """This process as a user who may not read everything; gives the user's number."""
    before = os.geteuid()
    os.seteuid(before or 65534)
    try:
        yield os.geteuid()
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "1_Pooling", "."])
def test_what_cannot_be_read_is_named(name: str) -> None:
    """77: a file, the weights, a folder, which os.walk would pass over in silence."""
    with TemporaryDirectory() as base:  # pytest's own is root's alone
        Path(base).chmod(0o755)
        model = make_model(Path(base, "hf"))
        (model / "model.safetensors").chmod(0o644)
        (model / name).chmod(0o100 if name == "." else 0)
        with without_roots_rights() as user, pytest.raises(PermissionDeniedError) as caught:
            read_checkpoint(model)
        assert f"{model / name} cannot be read by user {user}" in caught.value.message


def test_a_place_holder_of_git_lfs_is_no_tokenizer(tmp_path: Path, model: Path) -> None:
    """What `git clone` leaves without LFS, which vLLM would find out after a minute."""
    (model / "tokenizer.json").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(CorruptError, match=r"tokenizer\.json .*Git LFS"):
        pack(model, str(tmp_path / "b"), access=ACCESS)


def test_a_file_that_no_start_takes_is_refused_or_said(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer above a start's limit ends the pack; what vLLM does not ask for is said."""
    monkeypatch.setattr(small_files, "MAX_FILE_BYTES", 100)
    (model / "log.txt").write_bytes(bytes(101))
    assert "log.txt" in read_checkpoint(model).left_out
    (model / "tokenizer.json").write_bytes(bytes(101))
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json has 101 bytes"):
        read_checkpoint(model)


# The configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\n", "it is empty"),
        (b'\xef\xbb\xbf{"model_type": "llama"}', "BOM"),
        ('{"model_type": "llämä"}'.encode("latin-1"), "utf-8"),
        ('{"model_type": "llama"}'.encode("utf-16"), "utf-8"),
        (b'{"model_type": "llama"', "delimiter"),
        (b"[]", "not a JSON object, but a list"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "' + b" " * 17_000_000 + b'"}', "more than 16777216"),
    ],
    ids=["empty", "blank", "mark", "latin1", "utf16", "cut", "list", "deep", "number", "huge"],
)
def test_a_configuration_that_vllm_cannot_read_is_refused(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    """65, and no traceback; it is named, and nothing is written."""
    (model / "config.json").write_bytes(content)
    assert tensorserve(["pack", str(model), str(tmp_path / "b")]) == 65
    said = capsys.readouterr().err
    assert f"{model / 'config.json'}" in said
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "b").exists()


def test_a_configuration_that_is_a_directory_is_none(model: Path) -> None:
    """As where a volume's mount made one."""
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    with pytest.raises(ConfigurationError, match=r"no config\.json"):
        read_checkpoint(model)


def test_names_twice_in_a_configuration_mean_what_vllm_reads(tmp_path: Path, model: Path) -> None:
    """The file goes as it is; whoever reads it takes the last, as vLLM does."""
    content = b'{"model_type": "gpt2", "model_type": "llama"}'
    (model / "config.json").write_bytes(content)
    pack(model, str(tmp_path / "b"), access=ACCESS)
    assert (tmp_path / "b" / "config.json").read_bytes() == content


def test_a_model_without_a_tokenizer_is_packed_with_a_word(tmp_path: Path, model: Path) -> None:
    """It can be served to whoever sends tokens; `check` refuses other starts."""
    (model / "tokenizer.json").unlink()
    result = pack(model, str(tmp_path / "b"), access=ACCESS)
    assert "note: there is no tokenizer: it can be served with TENSORSERVE_VLLM_SKIP_TOKENI" in str(
        result
    )
