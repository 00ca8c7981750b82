"""The archive in a sealed cache: regular files below one directory, each once, and nothing else."""

from __future__ import annotations

import gzip
import io
import os
import socket
import tarfile
from pathlib import Path

import pytest

from sealed_caches import archive_of, member
from tensorserve.bundle import compiled_archive
from tensorserve.bundle.compiled import Contents
from tensorserve.bundle.compiled_archive import files_below, pack_files, unpack_files
from tensorserve.errors import ConfigurationError, CorruptError


def packed(directory: Path) -> tuple[bytes, Contents]:
    out = io.BytesIO()
    contents = pack_files(directory, files_below(directory), out)
    assert contents.archive_bytes == len(out.getvalue())
    return out.getvalue(), contents


def unpack(archive: bytes, contents: Contents, directory: Path) -> None:
    """In pieces of an odd size."""
    directory.mkdir(exist_ok=True)
    pieces = (archive[at : at + 777] for at in range(0, len(archive), 777))
    unpack_files(pieces, contents, directory, "the cache")


def refused(archive: bytes, contents: Contents, tmp_path: Path) -> str:
    """What is said of an archive that must be refused. Nothing is outside of its directory."""
    outside = tmp_path / "outside"
    outside.mkdir(parents=True)
    with pytest.raises(CorruptError, match="archive is refused") as caught:
        unpack(archive, contents, outside / "in")
    assert [path.name for path in outside.iterdir()] == ["in"]
    return caught.value.message


class TestRoundTrip:
    """What was packed is there again."""

    def test_names_contents_and_modes(self, tmp_path: Path) -> None:
        """Long names as inductor's, files without bytes, programs."""
        made = tmp_path / "made"
        long = f"vllm/{'a' * 200}/{'b' * 255}/c.py"
        files = {long: b"x" * 700, "triton/ü": b"", "t/run": os.urandom(600_000)}
        for name, data in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(data)
        (made / "t/run").chmod(0o755)
        (made / "empty folder").mkdir()
        unpack(*packed(made), tmp_path / "found")
        found = [path for path in (tmp_path / "found").rglob("*") if path.is_file()]
        names = {path.relative_to(tmp_path / "found").as_posix(): path for path in found}
        assert {name: path.read_bytes() for name, path in names.items()} == files
        modes = {name: path.stat().st_mode & 0o777 for name, path in names.items()}
        assert modes == {long: 0o600, "triton/ü": 0o600, "t/run": 0o700}
        folders = [path for path in (tmp_path / "found").rglob("*") if path.is_dir()]
        assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}

    def test_modification_times_to_the_nanosecond(self, tmp_path: Path) -> None:
        """ninja builds anew where an input is newer than what was built from it."""
        made = tmp_path / "made"
        made.mkdir()
        moments = [1_764_510_000_123_456_789, 1_764_510_000_123_456_788, 1_764_510_000 * 10**9, 5]
        for number, moment in enumerate(moments):
            (made / str(number)).write_bytes(b"x")
            os.utime(made / str(number), ns=(moment, moment))
        unpack(*packed(made), tmp_path / "found")
        found = [(tmp_path / "found" / str(n)).stat().st_mtime_ns for n in range(len(moments))]
        assert found == moments

    def test_it_is_compressed(self, tmp_path: Path) -> None:
        """Generated code repeats itself."""
        (tmp_path / "made").mkdir()
        (tmp_path / "made/code.py").write_bytes(b"def kernel(): ...\n" * 10_000)
        archive, contents = packed(tmp_path / "made")
        assert len(archive) < 5000
        assert (contents.files, contents.files_bytes) == (1, 180_000)

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "made").mkdir()
        unpack(*packed(tmp_path / "made"), tmp_path / "found")
        assert list((tmp_path / "found").iterdir()) == []


class TestPacking:
    """What the job refuses to pack."""

    def test_links_and_devices(self, tmp_path: Path) -> None:
        """A link to a file, to a folder, a named pipe, a socket."""
        (tmp_path / "file").write_bytes(b"x")
        for number, make in enumerate(
            (
                lambda path: path.symlink_to(tmp_path / "file"),
                lambda path: path.symlink_to(tmp_path),
                lambda path: path.symlink_to("nowhere"),
                os.mkfifo,
                lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
            )
        ):
            root = tmp_path / f"root{number}"
            (root / "sub").mkdir(parents=True)
            make(root / "sub/entry")
            with pytest.raises(ConfigurationError, match=r"sub/entry .* not a regular file"):
                files_below(root)

    def test_names_that_no_bundle_may_have(self, tmp_path: Path) -> None:
        (tmp_path / "a\nb").write_bytes(b"x")
        with pytest.raises(ConfigurationError, match="not a name"):
            files_below(tmp_path)

    def test_a_file_that_changed(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x")
        found = files_below(tmp_path)
        (tmp_path / "a").write_bytes(b"xy")
        with pytest.raises(ConfigurationError, match="changed while it was packed"):
            pack_files(tmp_path, found, io.BytesIO())

    def test_a_file_that_became_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"x")
        found = files_below(tmp_path)
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").symlink_to("b")
        with pytest.raises(OSError, match="a"):
            pack_files(tmp_path, found, io.BytesIO())

    def test_more_than_a_start_takes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("a", "b"):
            (tmp_path / name).write_bytes(b"xyz")
        found = files_below(tmp_path)
        for limit, value in (("MAX_FILES", 1), ("MAX_FILES_BYTES", 5)):
            with monkeypatch.context() as patch:
                patch.setattr(compiled_archive, limit, value)
                with pytest.raises(ConfigurationError, match="too much"):
                    pack_files(tmp_path, found, io.BytesIO())


class TestUnpacking:
    """What only a holder of the key can have sealed, and is refused all the same."""

    @pytest.mark.parametrize(
        "name",
        [
            "../up",
            "a/../../up",
            "/absolute",
            "a//b",
            "./a",
            "a\\b",
            "%2e%2e/up",
            "a\nb",
            "a/" * 600,
        ],
    )
    def test_names_outside_the_directory(self, name: str, tmp_path: Path) -> None:
        assert "not a name below the cache" in refused(*archive_of(member(name)), tmp_path)

    def test_components_longer_than_a_disk_takes(self, tmp_path: Path) -> None:
        assert "not a name" in refused(*archive_of(member("a" * 256)), tmp_path)

    @pytest.mark.parametrize(
        "kind",
        [
            tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE,
            tarfile.DIRTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, b"Z",
        ],
    )  # fmt: skip
    def test_links_devices_and_other_kinds(self, kind: bytes, tmp_path: Path) -> None:
        bad = member("entry", kind, "/etc/passwd")
        assert "not a regular file" in refused(*archive_of(bad), tmp_path)

    def test_a_file_below_a_link(self, tmp_path: Path) -> None:
        """The link is refused before the file that would be written through it."""
        link = member("sub", tarfile.SYMTYPE, str(tmp_path))
        assert "'sub' is not a regular file" in refused(
            *archive_of(link, member("sub/planted")), tmp_path
        )
        assert not (tmp_path / "planted").exists()

    def test_names_that_come_twice(self, tmp_path: Path) -> None:
        """Also as a folder and a file."""
        for names in (("a", "a"), ("a", "a/b"), ("a/b", "a")):
            said = refused(
                *archive_of(*map(member, names)), tmp_path / "-".join(names).replace("/", "_")
            )
            assert "twice" in said

    def test_more_or_less_than_its_header_says(self, tmp_path: Path) -> None:
        archive, right = archive_of(member("a"), member("b"), data=b"xyz")
        for files, size, word in ((1, 6, "more"), (2, 5, "more"), (3, 6, "less"), (2, 7, "less")):
            contents = Contents(right.archive_bytes, files, size)
            assert f"holds {word}" in refused(archive, contents, tmp_path / f"{files}{size}")

    def test_a_bomb(self, tmp_path: Path) -> None:
        """Not more comes out than was announced: files, headers, zeros behind the last file."""
        archive, _ = archive_of(member("a"))
        bomb = gzip.compress(gzip.decompress(archive)[:1024] + bytes(50_000_000))
        assert "unpacks to more" in refused(bomb, Contents(len(bomb), 1, 1), tmp_path / "zeros")
        large, _ = archive_of(member("a"), data=bytes(50_000_000))
        assert "more than its header says" in refused(large, Contents(len(large), 1, 1), tmp_path)
        named = tarfile.TarInfo("a")
        named.pax_headers = {"comment": "x" * 50_000_000}
        padded, _ = archive_of(named)
        assert "unpacks to more" in refused(padded, Contents(len(padded), 1, 1), tmp_path / "pax")

    def test_damage_behind_the_tags(self, tmp_path: Path) -> None:
        """What is no gzip, no tar, cut off, or has invalid times."""
        archive, right = archive_of(member("a"), data=os.urandom(5000))
        for number, bad in enumerate(
            (
                b"",
                b"no gzip",
                archive[:-20],
                archive[: len(archive) // 2],
                gzip.compress(b"no tar" * 999),
            )
        ):
            refused(bad, right, tmp_path / str(number))
        for number, moment in enumerate(("-5", "nan", "1.x", "1e300", "9" * 13)):
            timed = member("a")
            timed.pax_headers = {"mtime": moment}
            refused(*archive_of(timed), tmp_path / f"time{number}")

    def test_a_full_disk_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(compiled_archive.os, "open", full)
        with pytest.raises(ConfigurationError, match="No space left"):
            unpack(*archive_of(member("a")), tmp_path / "found")
