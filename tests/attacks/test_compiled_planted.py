"""Attack: compiled code is planted in the bundle. What is loaded of it runs as the engine."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starting import Ended, start
from victims import GIVEN, KEY, Store, make_bundle

from sealed_caches import archive_of, member, sealed_archive, sealed_files
from tensorserve.bundle.compiled import CHUNK_BYTES, MAX_SEALED_BYTES, Contents, name_of
from tensorserve.bundle.keys import GivenKey

CODE = {"vllm/torch_compile_cache/0123456789/rank_0_0/c.py": b"print('compiled')\n"}
FORGED = GivenKey(bytes(32), "who has no key")
NEVER_SEALED = "ab" * 32


@dataclass
class Server:
    """A server whose caches stay where they are; its bundle is attacked."""

    directory: Path
    bundle: Path
    store: Store
    key: dict[str, str]

    def start(self, **environ: str) -> Ended:
        """A start from the bundle as it is now."""
        given = self.store.put(self.bundle) | self.key | environ
        environment = {"XDG_CACHE_HOME": str(self.directory / "caches")} | given
        return start(self.directory, environment)

    def fingerprint(self, **environ: str) -> str:
        """What this server would take compiled code for."""
        (event,) = compiled(self.start(**environ))
        assert event["result"] == "absent"
        return str(event["fingerprint"])

    def plant(self, fingerprint: str, sealed: bytes) -> None:
        """`sealed` is in the bundle, under the name of `fingerprint`."""
        path = self.bundle / name_of(fingerprint)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(sealed)

    def refused(self, **environ: str) -> str:
        """What a start says that must end with 65; nothing of the archive is left anywhere."""
        ended = self.start(**environ)
        assert ended.code == 65, (ended.code, ended.text)
        assert self.unpacked() == []
        return ended.text

    def unpacked(self) -> list[str]:
        """Files of compiled code, and what fetching has left."""
        root = self.directory / "caches/tensorserve-compiled"
        return [path.relative_to(root).as_posix() for path in root.rglob("*")]


def compiled(ended: Ended) -> list[dict[str, Any]]:
    """The events about compiled code."""
    return [event for event in ended.events if event["event"] == "compiled_cache"]


@pytest.fixture
def server(tmp_path: Path, bundle: Path) -> Server:
    """Of an encrypted bundle in a directory."""
    place = InPlace(None, tmp_path)
    return Server(tmp_path, bundle, place, {"TENSORSERVE_KEY": KEY.hex()})


class InPlace(Store):
    """The bundle is served from where it is."""

    def put(self, bundle: Path) -> dict[str, str]:
        return {"TENSORSERVE_MODEL_URI": str(bundle)}


def sealed(server: Server, fingerprint: str, key: GivenKey = GIVEN) -> bytes:
    """As the key's owner seals it."""
    return sealed_files(CODE, server.directory / "made", fingerprint=fingerprint, key=key)


def test_the_owners_own_is_taken(server: Server) -> None:
    """So that the refusals below are not of something else; and only once."""
    fingerprint = server.fingerprint()
    server.plant(fingerprint, sealed(server, fingerprint))
    for result in ("brought", "kept"):
        ended = server.start()
        assert ended.code is None, ended.text
        (event,) = compiled(ended)
        assert (event["result"], event["fingerprint"], event["keys"]) == (result, fingerprint, 1)
        place = server.directory / "caches/tensorserve-compiled" / fingerprint[:32]
        assert event["folder"] == str(place / "vllm")
        assert {name: (place / name).read_bytes() for name in CODE} == CODE


def test_by_who_can_write_the_bucket(tmp_path: Path, bundle: Path, store: Store) -> None:
    """Without the key: sealed with another one."""
    server = Server(tmp_path, bundle, store, {})
    fingerprint = server.fingerprint()
    server.plant(fingerprint, sealed(server, fingerprint, FORGED))
    assert "MAC does not fit the key" in server.refused()


def test_of_another_model(server: Server, tmp_path: Path) -> None:
    """Of the same key: its manifest, and so its fingerprint, is another one."""
    other_bundle = make_bundle(tmp_path / "other", seed=2)
    other = Server(tmp_path, other_bundle, server.store, server.key)
    theirs, ours = other.fingerprint(), server.fingerprint()
    assert theirs != ours
    server.plant(ours, sealed(server, theirs))
    assert "sealed for another fingerprint and renamed" in server.refused()


def test_an_old_one_under_a_new_name(server: Server) -> None:
    """Of an earlier image with a fault that was mended since."""
    server.plant(server.fingerprint(), sealed(server, NEVER_SEALED))
    assert "sealed for another fingerprint and renamed" in server.refused()


def test_of_an_engine_that_this_one_is_not(server: Server) -> None:
    """Under its own name: it is not looked at, and the engine compiles as without it."""
    server.plant(NEVER_SEALED, sealed(server, NEVER_SEALED))
    ended = server.start()
    assert ended.code is None
    assert [event["result"] for event in compiled(ended)] == ["absent"]
    one = server.fingerprint(TENSORSERVE_VLLM_MAX_MODEL_LEN="512")
    assert one != server.fingerprint(TENSORSERVE_VLLM_MAX_MODEL_LEN="256")


def test_what_differs_between_pods_has_no_part(server: Server) -> None:
    """Else nobody would ever find what was compiled elsewhere. (Each start has other ports.)"""
    one = server.fingerprint(TENSORSERVE_MODEL_NAME="one", VLLM_HOST_IP="127.0.0.1")
    assert one == server.fingerprint(TENSORSERVE_MODEL_NAME="other", TENSORSERVE_VLLM_API_KEY="abc")


def test_changed_cut_off_or_reordered(server: Server) -> None:
    """A flipped byte, a missing end, chunks that change places."""
    fingerprint = server.fingerprint()
    data = os.urandom(2 * CHUNK_BYTES)
    right = sealed_archive(data, Contents(len(data), 0, 0), fingerprint=fingerprint, key=GIVEN)
    box = CHUNK_BYTES + 16
    one, two = right[-2 * box : -box], right[-box:]
    flipped = bytearray(right)
    flipped[-9] ^= 1
    for bad in (bytes(flipped), right[:-box] + two + one, right[: -2 * box] + two + one):
        server.plant(fingerprint, bad)
        assert "is not believed" in server.refused()
    server.plant(fingerprint, right[:-box])
    assert "bytes after its header" in server.refused()


def test_one_of_a_size_that_fills_the_disk(server: Server) -> None:
    """It is refused before a byte of it is read."""
    fingerprint = server.fingerprint()
    server.plant(fingerprint, b"")
    os.truncate(server.bundle / name_of(fingerprint), MAX_SEALED_BYTES + 1)
    assert "sealed compiled code has at most" in server.refused()


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ((member("../../planted"),), "not a name below the cache"),
        ((member("/tmp/planted"),), "not a name below the cache"),
        ((member("vllm", tarfile.SYMTYPE, "/tmp"), member("vllm/planted")), "not a regular file"),
        ((member("a"), member("b", tarfile.LNKTYPE, "a")), "not a regular file"),
        ((member("null", tarfile.CHRTYPE),), "not a regular file"),
        ((member("a"), member("a")), "twice"),
    ],
    ids=["path", "absolute", "symlink", "hardlink", "device", "duplicate"],
)
def test_an_archive_that_reaches_out(
    server: Server, members: tuple[tarfile.TarInfo, ...], said: str
) -> None:
    """By who has the key, whose mistake or malice must not write outside of the cache."""
    fingerprint = server.fingerprint()
    archive, contents = archive_of(*members)
    (server.directory / "caches/tensorserve-compiled").mkdir(parents=True)
    before = outside(server)
    bad = sealed_archive(archive, contents, fingerprint=fingerprint, key=GIVEN)
    server.plant(fingerprint, bad)
    assert said in server.refused()
    assert outside(server) == before
    assert not Path("/tmp/planted").exists()


def outside(server: Server) -> set[Path]:
    """What is where a name could lead to."""
    caches = server.directory / "caches"
    others = (path for path in server.directory.iterdir() if not path.name.startswith("state-"))
    return {*others, *caches.iterdir()}


def test_an_archive_that_unpacks_without_end(server: Server) -> None:
    """50 MB of zeros in 50 kB, announced as one byte."""
    fingerprint = server.fingerprint()
    archive, _ = archive_of(member("zeros"), data=bytes(50_000_000))
    bomb = sealed_archive(archive, Contents(len(archive), 1, 1), fingerprint=fingerprint, key=GIVEN)
    server.plant(fingerprint, bomb)
    assert "more than its header says" in server.refused()


def test_by_a_server_that_was_broken_into(server: Server, signing: Signing) -> None:
    """It has the model's key, so it can seal; the job's key it has not."""
    asks = {"TENSORSERVE_COMPILED_SIGNATURE_KEY_FILE": str(signing.public)}
    fingerprint = server.fingerprint(**asks)
    server.plant(fingerprint, sealed(server, fingerprint))
    assert "is not signed" in server.refused(**asks)
    archive, contents = archive_of(member("a"))
    forged = sealed_archive(
        archive, contents, fingerprint=fingerprint, key=GIVEN, signing_key=signing.key()
    )
    server.plant(fingerprint, forged)
    assert "signature is not of the key" in server.refused(**asks)


class TestOfABundleThatIsNotEncrypted:
    """Whoever can write it could write code for it."""

    @pytest.fixture
    def plain(self, tmp_path: Path) -> Server:
        bundle = make_bundle(tmp_path / "plain", key=None)
        return Server(tmp_path, bundle, InPlace(None, tmp_path), {})

    def test_nothing_is_looked_at(self, plain: Server) -> None:
        ended = plain.start()
        assert (ended.code, compiled(ended)) == (None, [])

    def test_required_is_a_mistake(self, plain: Server) -> None:
        ended = plain.start(TENSORSERVE_COMPILED="required")
        assert ended.code == 78
        assert "TENSORSERVE_COMPILED_KEY_FILE" in ended.text

    def test_with_a_key_of_its_own(self, plain: Server) -> None:
        own = {"TENSORSERVE_COMPILED_KEY": "11" * 32}
        fingerprint = plain.fingerprint(**own)
        plain.plant(fingerprint, sealed(plain, fingerprint, FORGED))
        assert "MAC does not fit the key from TENSORSERVE_COMPILED_KEY" in plain.refused(**own)
        right = GivenKey(bytes([0x11]) * 32, "the test")
        plain.plant(fingerprint, sealed(plain, fingerprint, right))
        assert [event["result"] for event in compiled(plain.start(**own))] == ["brought"]


def test_required_and_absent(server: Server) -> None:
    """No start without it, and the way to get it."""
    ended = server.start(TENSORSERVE_COMPILED="required")
    assert ended.code == 78
    assert "has no compiled code for this engine" in ended.text
    assert "tensorserve precompile URI" in ended.text


def test_switched_off(server: Server) -> None:
    """Not even a forged one is looked at."""
    fingerprint = server.fingerprint()
    server.plant(fingerprint, b"forged")
    ended = server.start(TENSORSERVE_COMPILED="off")
    assert (ended.code, compiled(ended)) == (None, [])


@dataclass(frozen=True)
class Signing:
    """The public key that a server has, and a maker of keys that it has not."""

    public: Path
    key: Callable[[], Any]


@pytest.fixture
def signing(tmp_path: Path) -> Signing:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    from tensorserve.crypto.ed25519 import SigningKey

    public = Ed25519PrivateKey.generate().public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "sign.pub").write_bytes(pem)
    return Signing(tmp_path / "sign.pub", lambda: SigningKey(Ed25519PrivateKey.generate()))
