"""Files as sources, and names: what is readable, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tensorserve.errors import ConfigurationError, CorruptError, PermissionDeniedError
from tensorserve.sources import Access, NotFoundError, join, list_names, open_source

ACCESS = Access()


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_file_is_read_by_path_and_by_uri(tmp_path: Path, prefix: str) -> None:
    """Both forms mean the same file."""
    (tmp_path / "a b").write_bytes(b"0123456789")
    source = open_source(prefix + str(tmp_path / "a b"), ACCESS)
    assert source.size == 10
    assert source.read(3, 4) == b"3456"
    source.close()
    source.close()


def test_a_file_that_changes_is_never_a_mixture(tmp_path: Path) -> None:
    """F6 for files."""
    path = tmp_path / "m"
    path.write_bytes(bytes(100))
    source = open_source(str(path), ACCESS)
    path.write_bytes(bytes(99) + b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(CorruptError, match="changed"):
        source.read(0, 100)


def test_a_file_that_is_cut_off_is_said_as_such(tmp_path: Path) -> None:
    """F9 in the middle of a load."""
    path = tmp_path / "m"
    path.write_bytes(bytes(100))
    source = open_source(str(path), ACCESS)
    os.truncate(path, 50)
    with pytest.raises(CorruptError, match="ends at byte 50"):
        source.read(0, 100)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    """Exit code 65: an artifact is missing."""
    with pytest.raises(NotFoundError, match="does not exist"):
        open_source(str(tmp_path / "none"), ACCESS)


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    """Says what was expected."""
    with pytest.raises(NotFoundError, match="is a directory"):
        open_source(str(tmp_path), ACCESS)


def test_an_unreadable_file_is_a_matter_of_permission(tmp_path: Path) -> None:
    """Exit code 77, tried as another user."""
    path = tmp_path / "m"
    path.write_bytes(b"x")
    path.chmod(0)
    if os.getuid() == 0:
        tmp_path.chmod(0o755)
        pid = os.fork()
        if pid == 0:
            os.setuid(65534)
            try:
                open_source(str(path), ACCESS)
            except (PermissionDeniedError, NotFoundError):
                os._exit(0)
            os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0
    else:
        with pytest.raises(PermissionDeniedError):
            open_source(str(path), ACCESS)


def test_a_listing_names_files_below_and_refuses_links_that_lead_out(tmp_path: Path) -> None:
    """A2: a bundle cannot make us read another directory."""
    bundle = tmp_path / "bundle"
    (bundle / "sub").mkdir(parents=True)
    (bundle / "config.json").write_text("{}")
    (bundle / "sub" / "x").write_text("abc")
    (bundle / "inside").symlink_to("config.json")
    assert list_names(str(bundle), ACCESS) == {"config.json": 2, "sub/x": 3, "inside": 2}
    (tmp_path / "secret").write_text("s")
    (bundle / "outside").symlink_to(tmp_path / "secret")
    with pytest.raises(CorruptError, match="leads out"):
        list_names(str(bundle), ACCESS)


@pytest.mark.parametrize(
    ("base", "name", "joined"),
    [
        ("/m", "a.json", "/m/a.json"),
        ("s3://b/m", "a b.json", "s3://b/m/a b.json"),
        ("https://h/m/", "a b.json", "https://h/m/a%20b.json"),
        ("https://h/m?sig=x", "a.json", "https://h/m/a.json?sig=x"),
    ],
)
def test_names_are_joined_as_their_kind_wants(base: str, name: str, joined: str) -> None:
    """A query (an access token for a whole directory) stays."""
    assert join(base, name) == joined


def test_another_scheme_is_refused() -> None:
    """Names those that work."""
    with pytest.raises(ConfigurationError, match="'gs'"):
        open_source("gs://b/m", ACCESS)
