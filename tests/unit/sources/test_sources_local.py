"""Files as sources, and names: what is readable, and what is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
)
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


def test_a_listing_names_files_and_refuses_links_that_lead_out(tmp_path: Path) -> None:
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
    with pytest.raises(ConfigurationError, match="'gcs'"):
        open_source("gcs://b/m", ACCESS)


@pytest.mark.parametrize(("offset", "length"), [(90, 11), (101, 1), (-1, 2)])
def test_bytes_beyond_the_end_are_refused(tmp_path: Path, offset: int, length: int) -> None:
    """An index that lies is told apart from a file that was cut off."""
    (tmp_path / "m").write_bytes(bytes(100))
    source = open_source(str(tmp_path / "m"), ACCESS)
    with pytest.raises(CorruptError, match="beyond its end"):
        source.read(offset, length)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer, for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(NotFoundError, match="not a regular file"):
        open_source(str(tmp_path / "pipe"), ACCESS)


def test_a_name_below_a_file_is_not_found(tmp_path: Path) -> None:
    """TENSORSERVE_MODEL_URI may be one file: there is nothing below it."""
    (tmp_path / "m.tensors").write_bytes(b"x")
    with pytest.raises(NotFoundError):
        open_source(join(str(tmp_path / "m.tensors"), "config.json"), ACCESS)


def test_a_file_uri_with_a_host_is_refused() -> None:
    """file://models/m (two slashes) means /m on the host "models", which nobody wants."""
    with pytest.raises(ConfigurationError, match="file:///models/m"):
        open_source("file://models/m", ACCESS)


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41b", "a b", "rank-%03d"])
def test_names_below_a_file_uri_are_found_as_they_are(tmp_path: Path, name: str) -> None:
    """What has a meaning in URIs is an ordinary character in a file's name."""
    (tmp_path / name).write_bytes(b"x")
    assert open_source(join(f"file://{tmp_path}", name), ACCESS).size == 1


def test_a_directory_that_cannot_be_listed_is_said_as_such(tmp_path: Path) -> None:
    """Files that are not seen would be missing later, for no visible reason."""
    (tmp_path / "bundle" / "closed").mkdir(parents=True)
    (tmp_path / "bundle" / "closed").chmod(0)
    for directory in [tmp_path / "bundle", *tmp_path.parents][:4]:
        if directory.stat().st_uid == os.getuid() and directory != Path("/tmp"):
            directory.chmod(0o755)
    tmp_path.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            list_names(str(tmp_path / "bundle"), ACCESS)
        except PermissionDeniedError:
            os._exit(0)
        except BaseException:  # noqa: BLE001 - the exit code tells the test
            os._exit(2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_directory_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    """A2: as for files."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptError, match="leads out"):
        list_names(str(tmp_path / "bundle"), ACCESS)


def test_a_link_to_itself_is_left_out(tmp_path: Path) -> None:
    """As one that leads nowhere is."""
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"x")
    assert list_names(str(tmp_path), ACCESS) == {"file": 1}


def unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To this user, also if it is root."""
    path.mkdir(mode=0)
    if os.geteuid() == 0:
        scandir, access = os.scandir, os.access

        def refused(place: str) -> Iterator[os.DirEntry[str]]:
            if Path(place) == path:
                raise PermissionError(13, "Permission denied", place)
            return scandir(place)

        monkeypatch.setattr(os, "scandir", refused)
        monkeypatch.setattr(os, "access", lambda at, mode: Path(at) != path and access(at, mode))


def test_a_volumes_lost_and_found_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 has it at a volume's root, for root alone. Any other folder may hide what is needed."""
    (tmp_path / "file").write_bytes(b"x")
    unreadable(tmp_path / "lost+found", monkeypatch)
    assert list_names(str(tmp_path), ACCESS) == {"file": 1}
    unreadable(tmp_path / "sub", monkeypatch)
    with pytest.raises(PermissionDeniedError, match="sub cannot be read"):
        list_names(str(tmp_path), ACCESS)


def test_what_the_system_refuses_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that is too long; a link that only its owner may follow."""
    with pytest.raises(SourceUnavailableError, match="too long"):
        list_names(str(tmp_path / ("a" * 300)), ACCESS)
    (tmp_path / "link").symlink_to("file")
    refusal = PermissionError(13, "Permission denied", str(tmp_path / "link"))

    def refused(_: object) -> str:
        raise refusal

    monkeypatch.setattr(os, "readlink", refused)
    with pytest.raises(PermissionDeniedError, match="link cannot be read"):
        list_names(str(tmp_path), ACCESS)
