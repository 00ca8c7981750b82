"""rewrap: other recipients, the same weights; over no manifest but the one that was read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from s3server import S3Server

from hf_samples import ACCESS, make_model
from manifests import rewrite
from s3_clients import s3_access, s3_client
from tensorserve.bundle.keys import GivenKey, parse_passphrase
from tensorserve.bundle.manifest import MANIFEST, read_manifest
from tensorserve.bundle.verify import verify
from tensorserve.config.settings import SourceSettings
from tensorserve.config.unwrapping import with_key
from tensorserve.errors import ConfigurationError, CorruptError, UsageError, WrongKeyError
from tensorserve.packing import rewrap as module
from tensorserve.packing.destination import replace_version, version_of
from tensorserve.packing.pack import pack
from tensorserve.packing.recipients import without
from tensorserve.packing.rewrap import Rewrapped, rewrap
from tensorserve.packing.sign import sign
from tensorserve.secret import Secret
from tensorserve.sources import Access, NotFoundError, ReplacedError
from tensorserve.wrapping.base import Services, WrappedKey
from tensorserve.wrapping.providers import for_wrapping

KEY = GivenKey(bytes(range(32)), "the test")


@dataclass(frozen=True)
class Place:
    """A bundle, whose key is wrapped for the wrapping key `a`, and how it is reached."""

    uri: str
    access: Access
    wrapping: Path

    def key(self, name: str) -> str:
        """The wrapping key `name`, as --add has it."""
        path = self.wrapping / name
        path.write_bytes(name.encode().ljust(32, b"."))
        return f"file:{path}"

    def rewrap(self, *, add: str = "", remove: str = "", key: object = KEY) -> Rewrapped:
        return rewrap(
            self.uri,
            self.access,
            key,  # type: ignore[arg-type]
            Services(),
            add=[self.key(name) for name in add],
            remove=[self.key(name) for name in remove],
        )

    def opens(self, name: str) -> bool:
        """Whether a start with this wrapping key gets the model's key."""
        environ = {"TENSORSERVE_KEY_URI": self.key(name), **self.environ()}
        try:
            found = with_key(SourceSettings.from_environment(environ), self.uri).key
        except WrongKeyError:
            return False
        assert found is not None
        return found.reveal() == KEY.reveal()

    def environ(self) -> dict[str, str]:
        s3 = self.access.s3
        if s3.access_key_id is None or s3.secret_access_key is None:
            return {}
        return {
            "AWS_ENDPOINT_URL_S3": str(s3.endpoint_url),
            "AWS_ACCESS_KEY_ID": s3.access_key_id.reveal_text(),
            "AWS_SECRET_ACCESS_KEY": s3.secret_access_key.reveal_text(),
        }


def packed(directory: Path, uri: str, access: Access = ACCESS) -> Place:
    place = Place(uri, access, directory / "wrapping")
    place.wrapping.mkdir()
    by = for_wrapping(place.key("a"), Services())
    source = make_model(directory / "hf")
    secret = Secret(KEY.reveal(), "the test")
    result = pack(source, uri, access=access, key=secret, recipients=(by,))
    assert result.recipients == (f"file:{by.key}",)
    assert "key fingerprint: " in str(result)
    return place


@pytest.fixture
def disk(tmp_path: Path) -> Place:
    """In a directory."""
    return packed(tmp_path, str(tmp_path / "b"))


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """In a directory, and in a real S3 server."""
    if request.param == "disk":
        yield packed(tmp_path, str(tmp_path / "b"))
        return
    server: S3Server = request.getfixturevalue("s3")
    bucket = request.getfixturevalue("bucket")
    yield packed(tmp_path, f"s3://{bucket}/{tmp_path.name}", Access(s3=s3_access(server)))


def manifest_of(place: Place) -> bytes:
    from tensorserve import sources

    source = sources.open_source(sources.join(place.uri, MANIFEST), place.access)
    try:
        return source.read(0, source.size)
    finally:
        source.close()


def test_the_recipients_change_and_the_rest_does_not(place: Place) -> None:
    """The new one opens it, the old one does not any more, and every byte is still authentic."""
    assert place.opens("a")
    done = place.rewrap(add="b", remove="a")
    assert not place.opens("a")
    assert place.opens("b")
    assert done.sha256 == hashlib.sha256(manifest_of(place)).hexdigest()
    assert "no longer for file:" in str(done)
    verified = verify(place.uri, place.access, KEY)
    assert {result.state for result in verified.results} == {"ok"}


def test_several_recipients_each_open_it(disk: Place) -> None:
    """Adding one twice wraps for it anew, which a service with a rotated key needs."""
    disk.rewrap(add="bc")
    before = manifest_of(disk)
    assert len(disk.rewrap(add="b").recipients) == 3
    assert manifest_of(disk) != before
    assert all(map(disk.opens, "abc"))
    assert len(disk.rewrap(remove="bc").recipients) == 1


def test_a_bundle_without_wrapped_keys_gets_them(tmp_path: Path) -> None:
    """Of an earlier release, say: the key is given."""
    place = Place(str(tmp_path / "b"), ACCESS, tmp_path / "wrapping")
    place.wrapping.mkdir()
    pack(make_model(tmp_path / "hf"), place.uri, access=ACCESS, key=Secret(KEY.reveal()))
    place.rewrap(add="a")
    assert place.opens("a")


def test_a_recipient_is_removed_however_it_is_written() -> None:
    """As --wrap had it, or as the manifest has it."""
    google = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
    entries = [
        WrappedKey("gcpkms", google, "x"),
        WrappedKey("azurekeyvault", "my-vault/models", "x"),
        WrappedKey("vault", "transit/models", "x"),
    ]
    for names in (
        [f"gcpkms:{google}", "azurekeyvault:my-vault/models"],
        [f"gcpkms://{google}", "azurekeyvault://My-Vault/models"],
        [f"gcpkms://kms.example/{google}", "azurekeyvault://my-vault/models/"],
    ):
        assert without(entries, names, Services()) == (entries[2],)
    with pytest.raises(UsageError, match="not wrapped for it"):
        without(entries, ["kbs:///a/b/c"], Services())


def test_nobody_left_is_refused(disk: Place) -> None:
    """64, and nothing is written: the key may be nowhere else."""
    before = manifest_of(disk)
    for words, said in (
        ({"remove": "a"}, "Nobody would be left"),
        ({"add": "b", "remove": "c"}, "the key is not wrapped for it"),
        ({}, "nothing to do"),
    ):
        with pytest.raises(UsageError, match=said):
            disk.rewrap(**words)
    assert manifest_of(disk) == before


def test_too_many_recipients_are_refused(disk: Place) -> None:
    """As many as a reader takes."""
    disk.rewrap(add="bcdefghijklmnop")
    with pytest.raises(ConfigurationError, match="17 recipients"):
        disk.rewrap(add="q")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (None, "needs the model's key"),
        (parse_passphrase(Secret("p", "the test")), "a passphrase cannot be wrapped"),
    ],
)
def test_without_a_key_nothing_is_rewrapped(disk: Place, key: object, said: str) -> None:
    """78."""
    with pytest.raises(ConfigurationError, match=said):
        disk.rewrap(add="b", key=key)


def test_what_is_not_authentic_is_not_rewrapped(disk: Place) -> None:
    """65: another key's, or changed; rewrapping would vouch for it."""
    with pytest.raises(CorruptError):
        disk.rewrap(add="b", key=GivenKey(bytes(32), "another"))
    rewrite(Path(disk.uri), {"made_by": {}})
    before = manifest_of(disk)
    with pytest.raises(CorruptError):
        disk.rewrap(add="b")
    assert manifest_of(disk) == before


def test_a_passphrases_bundle_has_no_key_to_wrap(tmp_path: Path) -> None:
    """78; whoever has derived its key may give that as a key."""
    place = Place(str(tmp_path / "b"), ACCESS, tmp_path / "wrapping")
    place.wrapping.mkdir()
    passphrase = parse_passphrase(Secret("p", "the test"))
    pack(make_model(tmp_path / "hf"), place.uri, access=ACCESS, passphrase=Secret("p"))
    manifest = read_manifest(place.uri, ACCESS, passphrase)
    assert manifest is not None
    assert manifest.parameters is not None
    derived = passphrase.for_parameters(manifest.parameters.derivation, "the test")
    with pytest.raises(ConfigurationError, match="bundle with a passphrase"):
        place.rewrap(add="a", key=GivenKey(derived, "the test"))


def test_a_manifest_that_changed_meanwhile_is_kept(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operators at once: the slower one is told, and loses nothing of the other's."""
    slow = module.wrapped_for

    def overtaken(*given: object, **more: object) -> object:
        monkeypatch.setattr(module, "wrapped_for", slow)
        place.rewrap(add="b")
        return slow(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "wrapped_for", overtaken)
    with pytest.raises(ReplacedError, match="Run the command again") as caught:
        place.rewrap(add="c")
    assert caught.value.exit_code == 65
    assert place.opens("b")
    assert not place.opens("c")
    place.rewrap(add="c")
    assert place.opens("c")


def test_a_manifest_that_is_gone_is_not_written(disk: Place) -> None:
    """Nor anything else left behind."""
    (Path(disk.uri) / MANIFEST).unlink()
    before = sorted(Path(disk.uri).iterdir())
    with pytest.raises(NotFoundError):
        disk.rewrap(add="b")
    with pytest.raises(NotFoundError):
        replace_version(disk.uri, MANIFEST, b"{}", ACCESS, "1")
    assert sorted(Path(disk.uri).iterdir()) == before


def test_signing_again_keeps_the_recipients(disk: Place) -> None:
    """They are bound to the manifest's salt, which it takes over."""
    sign(disk.uri, ACCESS, KEY, wish="auto")
    assert disk.opens("a")


def test_a_place_that_cannot_be_written_is_said_at_once() -> None:
    """A web server, and a single file."""
    with pytest.raises(UsageError, match="whole bundle"):
        rewrap("/b/model.tensors", ACCESS, KEY, Services(), add=["file:/k"])
    with pytest.raises(ConfigurationError, match="cannot be written there"):
        rewrap("https://example.org/m", ACCESS, KEY, Services(), add=["file:/k"])


def test_s3_compares_and_writes_in_one_step(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    """The object is looked at as the server has it, not as this process remembers it."""
    place = packed(tmp_path, f"s3://{bucket}/step", Access(s3=s3_access(s3)))
    before = manifest_of(place)
    with pytest.raises(ReplacedError):
        replace_version(place.uri, MANIFEST, b"{}", place.access, '"0123"')
    with pytest.raises(NotFoundError):
        version_of(place.uri, "another.json", place.access)
    stored = s3_client(s3).get_object(Bucket=bucket, Key=f"step/{MANIFEST}")["Body"].read()
    assert stored == before
