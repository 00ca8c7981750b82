"""Attack: the wrapped keys of a manifest, which are read before anything authenticates it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyrage
import pytest
from starting import command, refused, start
from victims import KEY, make_bundle

from http_server import Handler, HttpServer
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.wrapped_keys import MOST_RECIPIENTS
from tensorserve.wrapping.base import Services, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping


class Anybody(Handler):
    """A service that notes whoever comes, with what."""

    def do_POST(self) -> None:
        self.owner.seen.append((self.path, dict(self.headers), self.body()))
        self.answer(403, {"Content-Type": "application/json"}, b'{"errors": []}')

    do_PUT = do_GET = do_POST


@contextmanager
def listening() -> Iterator[Any]:
    with HttpServer(Anybody) as server:
        server.seen = []  # type: ignore[attr-defined]
        yield server


@pytest.fixture(scope="module")
def wrapping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's wrapping key."""
    path = tmp_path_factory.mktemp("wrapping") / "key"
    path.write_bytes(bytes(range(7, 39)))
    return path


@pytest.fixture(scope="module")
def wrapped_bundle(wrapping: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's bundle, whose key is wrapped with it; not touched."""
    by = for_wrapping(f"file:{wrapping}", Services())
    return make_bundle(tmp_path_factory.mktemp("packed"), recipients=(by,))


@pytest.fixture
def bundle(wrapped_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(wrapped_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def change(bundle: Path, **members: Any) -> None:
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    document["wrapped_keys"] |= members
    path.write_text(json.dumps(document))


def environ(bundle: Path, wrapping: Path) -> dict[str, str]:
    return {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_KEY_URI": f"file:{wrapping}",
    }


def test_the_owners_bundle_starts(tmp_path: Path, bundle: Path, wrapping: Path) -> None:
    """Else the attacks would show nothing."""
    ended = start(tmp_path, environ(bundle, wrapping))
    assert (ended.code, ended.mode) == (None, "manifest"), ended.text
    shown = ended.text + json.dumps(ended.events)
    assert KEY.hex() not in shown
    assert any(e.get("name") == "key" for e in ended.events)


def test_the_wrapped_key_of_another_bundle(tmp_path: Path, bundle: Path, wrapping: Path) -> None:
    """Of the same wrapping key and even of the same model's key."""
    by = for_wrapping(f"file:{wrapping}", Services())
    for number, key in enumerate((KEY, bytes(32))):
        other = make_bundle(tmp_path / str(number), seed=2, key=key, recipients=(by,))
        change(bundle, **json.loads((other / MANIFEST).read_text())["wrapped_keys"])
        assert "for another bundle" in refused(tmp_path, environ(bundle, wrapping))


def test_any_other_change_beside_a_good_wrapped_key(
    tmp_path: Path, bundle: Path, wrapping: Path
) -> None:
    """The key comes out, and the MAC is not its own."""
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    document["files"] = []
    path.write_text(json.dumps(document))
    assert "the MAC of manifest.json is not this key's" in refused(
        tmp_path, environ(bundle, wrapping)
    )


def test_the_wrapped_keys_are_taken_away(tmp_path: Path, bundle: Path, wrapping: Path) -> None:
    """Or the manifest, or the encryption with them: a reference demands a sealed bundle."""
    given = environ(bundle, wrapping)
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    del document["wrapped_keys"]
    path.write_text(json.dumps(document))
    assert "it holds no wrapped key" in refused(tmp_path, given)
    path.unlink()
    assert "there is none" in refused(tmp_path, given)
    plain = make_bundle(tmp_path / "plain", seed=2, key=None)
    said = refused(tmp_path, given | {"TENSORSERVE_MODEL_URI": str(plain)})
    assert "it holds no wrapped key" in said


def test_a_bundle_of_the_attackers_for_a_public_recipient(tmp_path: Path) -> None:
    """age: whoever knows the recipient can wrap a key of his own for it, with a good MAC."""
    identity = pyrage.x25519.Identity.generate()
    (tmp_path / "identity").write_text(str(identity))
    by = for_wrapping(f"age:{identity.to_public()}", Services())
    mine = make_bundle(tmp_path / "mine", recipients=(by,))
    his = make_bundle(tmp_path / "his", seed=2, key=bytes(32), recipients=(by,))
    given = {"TENSORSERVE_KEY_URI": f"age:{tmp_path / 'identity'}"}
    said = refused(tmp_path, given | {"TENSORSERVE_MODEL_URI": str(his)}, code=78)
    assert "anybody can wrap a key of his own" in said
    given["TENSORSERVE_KEY_FINGERPRINT"] = fingerprint_of(KEY)
    said = refused(tmp_path, given | {"TENSORSERVE_MODEL_URI": str(his)})
    assert "it is another model's key" in said
    ended = start(tmp_path, given | {"TENSORSERVE_MODEL_URI": str(mine)})
    assert (ended.code, ended.mode) == (None, "manifest"), ended.text


ADDRESSES = (
    "//127.0.0.1:{port}/transit/models",
    "http://127.0.0.1:{port}/transit/models",
    "127.0.0.1:{port}/transit/models",
    "transit/../../sys/models",
    "../sys/raw/models",
    "transit@127.0.0.1:{port}/models",
)


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("uri", [None, "vault:"])
def test_a_name_that_leads_elsewhere(bundle: Path, name: str, uri: str | None) -> None:
    """No request to the attacker's host, nor to another path of the owner's Vault."""
    with listening() as his, listening() as vault:
        entry = {"provider": "vault", "key": name.format(port=his.port), "wrapped": "vault:v1:A"}
        change(bundle, recipients=[entry])
        given = {
            "TENSORSERVE_MODEL_URI": str(bundle),
            "VAULT_ADDR": vault.url,
            "VAULT_TOKEN": "owners-token",
        }
        if uri is not None:
            given["TENSORSERVE_KEY_URI"] = uri
        code, said = command("verify", given, str(bundle))
        assert (code, his.seen, vault.seen) == (78, [], []), said
        assert "owners-token" not in said


def test_a_name_within_the_rules_asks_the_owners_service(bundle: Path) -> None:
    """And no other: the manifest has no say in where. At most once for each recipient."""
    with listening() as vault:
        entries = [
            {"provider": "vault", "key": f"transit/k{n}", "wrapped": "vault:v1:A"}
            for n in range(MOST_RECIPIENTS)
        ]
        change(bundle, recipients=entries)
        given = {"VAULT_ADDR": vault.url, "VAULT_TOKEN": "owners-token"}
        code, said = command("verify", given, str(bundle))
        assert code == 77, said
        assert [path for path, *_ in vault.seen] == [
            f"/v1/transit/decrypt/k{n}" for n in range(MOST_RECIPIENTS)
        ]


def test_too_many_and_too_large_recipients(bundle: Path) -> None:
    """Refused before anybody is asked."""
    one = {"provider": "vault", "key": "transit/models", "wrapped": "vault:v1:A"}
    with listening() as vault:
        given = {"VAULT_ADDR": vault.url, "VAULT_TOKEN": "t"}
        for recipients in (
            [one] * (MOST_RECIPIENTS + 1),
            [one | {"wrapped": "A" * 100_000}],
            [one | {"key": "a/" * 5_000 + "b"}],
        ):
            change(bundle, recipients=recipients)
            code, said = command("verify", given, str(bundle))
            assert (code, vault.seen) == (65, []), said


def test_a_file_of_this_machine(bundle: Path) -> None:
    """A manifest opens none, whatever it names."""
    change(bundle, recipients=[{"provider": "file", "key": "/etc/passwd", "wrapped": "A"}])
    code, said = command("verify", {}, str(bundle))
    assert code == 78
    assert "none of these can be asked" in said


@pytest.mark.parametrize(
    "entry",
    [
        {"provider": "gcpkms", "key": "projects/his/locations/global/keyRings/r/cryptoKeys/k"},
        {"provider": "azurekeyvault", "key": "his-vault/models"},
        {"provider": "azurekeyvault", "key": "127.0.0.1:{port}/models"},
        {"provider": "kbs", "key": "default/wrapping-key/models"},
    ],
    ids=lambda entry: entry["provider"],
)
def test_a_project_or_a_vault_of_the_attackers(bundle: Path, entry: dict[str, str]) -> None:
    """Where everybody may decrypt: a name of Google's or Azure's counts in TENSORSERVE_KEY_URI
    alone, and the guest's hub is asked for what the owner names."""
    with listening() as his:
        named = entry | {"key": entry["key"].format(port=his.port), "wrapped": "AAAA"}
        change(bundle, recipients=[named])
        given = {
            "TENSORSERVE_CDH_URL": his.url,
            "IDENTITY_ENDPOINT": his.url,
            "IDENTITY_HEADER": "owners-header",
        }
        code, said = command("verify", given, str(bundle))
        assert (code, his.seen) == (78, []), said
        assert "none of these can be asked" in said
