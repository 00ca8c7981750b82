"""The bundle's small files: which are fetched, where they may go, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rangeserver import RangeServer
from tensorserve.bundle.download import artifact_names, fetch_artifacts, resolve_below
from tensorserve.bundle.manifest import FileEntry, Manifest
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.sources import Access

ACCESS = Access()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    directory = tmp_path / "bundle"
    (directory / "1_Pooling").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
        "modeling.py",
        ".hidden",
    ):
        (directory / name).write_text(name)
    (directory / "model.tensors").write_bytes(b"x")
    return directory


def entry(name: str, content: str) -> FileEntry:
    return FileEntry(name, len(content), hashlib.sha256(content.encode()).hexdigest())


def test_small_files_are_fetched_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    """No weights, no hidden files, and no code that vLLM could run."""
    out = tmp_path / "state" / "model"
    written = fetch_artifacts(str(bundle), ACCESS, out)
    assert set(written) == {"config.json", "tokenizer.json", "1_Pooling/config.json"}
    assert (out / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
    assert out.stat().st_mode & 0o777 == 0o700
    assert (out / "config.json").stat().st_mode & 0o777 == 0o600


def test_code_comes_only_where_the_user_trusts_it(bundle: Path, tmp_path: Path) -> None:
    """A9: `--trust-remote-code` is the user's word."""
    out = tmp_path / "model"
    assert "modeling.py" in fetch_artifacts(str(bundle), ACCESS, out, remote_code=True)


@pytest.mark.parametrize("authenticated_by", [None, "key", "pin"])
def test_code_beside_sealed_weights_must_be_vouched_for(
    bundle: Path, tmp_path: Path, authenticated_by: str | None
) -> None:
    """What a listing says, and a manifest that anybody may have written, vouch for nothing."""
    files = tuple(entry(name, name) for name in ("config.json", "modeling.py"))
    manifest = Manifest(
        files=files, tensors_files={}, encryption=None, authenticated_by=authenticated_by
    )
    out = tmp_path / "m"
    if authenticated_by is not None:
        written = fetch_artifacts(str(bundle), ACCESS, out, manifest, remote_code=True, sealed=True)
        assert "modeling.py" in written
        return
    for given in (manifest, None):
        with pytest.raises(CorruptError, match=r"would run modeling\.py"):
            fetch_artifacts(str(bundle), ACCESS, out, given, remote_code=True, sealed=True)
        assert not out.exists()
    assert "config.json" in fetch_artifacts(str(bundle), ACCESS, out, sealed=True)


def test_without_a_listing_known_names_are_tried(bundle: Path, tmp_path: Path) -> None:
    """An HTTP server without a manifest: what is not there is not an error."""
    with RangeServer(bundle) as server:
        written = fetch_artifacts(server.url, ACCESS, tmp_path / "model")
    assert set(written) == {"config.json", "tokenizer.json", "1_Pooling/config.json"}


def test_with_a_manifest_only_its_files_are_fetched_and_checked(
    bundle: Path, tmp_path: Path
) -> None:
    """A3: a file that was added is left out, one that was replaced ends the start."""
    files = (entry("config.json", "config.json"), entry("tokenizer.json", "tokenizer.json"))
    manifest = Manifest(files=files, tensors_files={}, encryption=None, made_by={})
    out = tmp_path / "model"
    assert set(fetch_artifacts(str(bundle), ACCESS, out, manifest)) == {
        "config.json",
        "tokenizer.json",
    }
    (bundle / "tokenizer.json").write_text("tokenizer.JSON")
    with pytest.raises(CorruptError, match=r"tokenizer\.json is not the file that was packed"):
        fetch_artifacts(str(bundle), ACCESS, out, manifest)
    assert not (out / "tokenizer.json").exists()


def test_a_file_of_another_size_than_its_manifest_is_not_written(
    bundle: Path, tmp_path: Path
) -> None:
    """Its digest would be known only when all of it stands in /tmp, which is memory."""
    manifest = Manifest(
        files=(entry("config.json", "config.json"),), tensors_files={}, encryption=None, made_by={}
    )
    with (bundle / "config.json").open("wb") as file:
        file.truncate(400 * 1024**2)  # takes no disk
    out = tmp_path / "model"
    with pytest.raises(CorruptError, match=r"419430400 bytes, manifest\.json says 11"):
        fetch_artifacts(str(bundle), ACCESS, out, manifest)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("how", ["manifest", "listing", "guessed"])
def test_all_small_files_together_have_a_bound(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Whatever says how large they are, or nothing: /tmp is memory."""
    monkeypatch.setattr("tensorserve.bundle.download.MAX_TOTAL_BYTES", 30)
    out = tmp_path / "model"
    names = ("config.json", "tokenizer.json", "1_Pooling/config.json")
    entries = tuple(entry(name, name) for name in names)
    manifest = Manifest(files=entries, tensors_files={}, encryption=None, made_by={})
    with RangeServer(bundle) as server:
        place = server.url if how == "guessed" else str(bundle)
        known = manifest if how == "manifest" else None
        with pytest.raises(CorruptError, match="the limit is 30"):
            fetch_artifacts(place, ACCESS, out, known)
    written = (
        sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if out.exists() else 0
    )
    assert written <= 30


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "a\0b", "", ".", "a//b", "a\\b", "a/./b"]
)
def test_names_that_leave_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    """A2."""
    with pytest.raises(CorruptError):
        resolve_below(tmp_path, name)


def test_links_in_the_way_are_refused(tmp_path: Path) -> None:
    """A2: a directory that is a link leads elsewhere."""
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="through a link"):
        resolve_below(tmp_path / "root", "sub/file")


def test_a_disk_that_cannot_be_written_is_said_as_such(bundle: Path, tmp_path: Path) -> None:
    """F10: a file stands where the directory should be made."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written"):
        fetch_artifacts(str(bundle), ACCESS, tmp_path / "file" / "model")


def test_what_an_earlier_start_left_is_removed(bundle: Path, tmp_path: Path) -> None:
    """A file of another model would confuse vLLM."""
    out = tmp_path / "model"
    out.mkdir()
    (out / "stale.json").write_text("x")
    fetch_artifacts(str(bundle), ACCESS, out)
    assert not (out / "stale.json").exists()


def test_sealed_compiled_code_is_no_small_file(bundle: Path) -> None:
    """launch/compiled_cache.py fetches the one that fits, after it is authenticated."""
    (bundle / "compiled").mkdir()
    (bundle / "compiled" / f"{'5e' * 32}.sealed").write_bytes(b"x")
    names = artifact_names(str(bundle), ACCESS, None)
    assert "config.json" in names
    assert not any(name.startswith("compiled") for name in names)
