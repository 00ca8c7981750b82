"""Attack: a bundle in the place of the signed one. Refused before any key service is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starting import command, refused, start
from victims import KEY, make_bundle

from http_server import Handler, HttpServer
from model_signers import Pair, make_pair
from sigstore_stand_in import Sigstore
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import MANIFEST, SIGNATURE, parse_manifest, rewrapped
from tensorserve.bundle.verify import describe_file
from tensorserve.bundle.wrapped_keys import WrappedKeys
from tensorserve.packing.model_signer import BundleSigner
from tensorserve.sources import Access, list_names
from tensorserve.wrapping.base import WrappedKey, fingerprint_of

OWNER = GivenKey(KEY, "the test")


class Vault(Handler):
    """A key service that notes each request, and has no key."""

    def do_POST(self) -> None:
        self.owner.seen.append(self.path)
        self.answer(403, {"Content-Type": "application/json"}, b'{"errors": []}')

    do_PUT = do_GET = do_POST


@pytest.fixture
def vault() -> Iterator[Any]:
    with HttpServer(Vault) as server:
        server.seen = []  # type: ignore[attr-defined]
        yield server


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def attacker(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("attacker"))


def wrap_for_vault(bundle: Path) -> None:
    """The key is wrapped for the owner's Vault, as the manifest's MAC confirms."""
    path = bundle / MANIFEST
    recipients = (WrappedKey("vault", "transit/models", "vault:v1:AAAA"),)
    wrapped = WrappedKeys(fingerprint_of(KEY), recipients)
    path.write_bytes(rewrapped(path.read_bytes(), MANIFEST, OWNER, wrapped))


def sign_as(signer: BundleSigner, bundle: Path) -> None:
    access = Access()
    names = set(list_names(str(bundle), access) or ()) - {SIGNATURE}
    files = {name: describe_file(str(bundle), name, access).sha256 for name in names}
    (bundle / SIGNATURE).write_bytes(signer.sign(files, str(bundle)))


@pytest.fixture(scope="module")
def signed_bundle(owner: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's, signed; not touched."""
    bundle = make_bundle(tmp_path_factory.mktemp("packed"))
    wrap_for_vault(bundle)
    sign_as(owner.signer, bundle)
    return bundle


@pytest.fixture
def bundle(signed_bundle: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(signed_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def environ(bundle: Path, owner: Pair) -> dict[str, str]:
    return {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_SIGNATURE_KEY_FILE": str(owner.public),
    }


def asking(vault: Any) -> dict[str, str]:
    return {
        "TENSORSERVE_KEY_URI": "vault:",
        "VAULT_ADDR": vault.url,
        "VAULT_TOKEN": "owners-token",
    }


def unsigned(bundle: Path, _: Pair) -> None:
    (bundle / SIGNATURE).unlink()


def signed_by_another_key(bundle: Path, attacker: Pair) -> None:
    sign_as(attacker.signer, bundle)


def another_signature_with_the_owners_hint(bundle: Path, attacker: Pair) -> None:
    hint = json.loads((bundle / SIGNATURE).read_text())["verificationMaterial"]
    sign_as(attacker.signer, bundle)
    document = json.loads((bundle / SIGNATURE).read_text())
    document["verificationMaterial"] = hint
    (bundle / SIGNATURE).write_text(json.dumps(document))


def manifest_changed(bundle: Path, _: Pair) -> None:
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    document["files"] = document["files"][1:]
    path.write_text(json.dumps(document))


def manifest_indented_anew(bundle: Path, _: Pair) -> None:
    path = bundle / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text())))


def recipients_changed(bundle: Path, _: Pair) -> None:
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    document["wrapped_keys"]["recipients"][0]["key"] = "transit/others"
    path.write_text(json.dumps(document))


def manifest_removed(bundle: Path, _: Pair) -> None:
    (bundle / MANIFEST).unlink()


def small_file_changed(bundle: Path, _: Pair) -> None:
    path = bundle / "chat_template.jinja"
    path.write_text(path.read_text().upper())


def small_file_removed(bundle: Path, _: Pair) -> None:
    (bundle / "tokenizer.json").unlink()


def weights_of_another_size(bundle: Path, _: Pair) -> None:
    with (bundle / "model.tensors").open("ab") as weights:
        weights.write(b"x")


def signature_of_another_bundle(bundle: Path, _: Pair) -> None:
    """The owner signed that one too."""
    shutil.copy(bundle.parent / "other" / SIGNATURE, bundle / SIGNATURE)


def bundle_under_a_key_of_his_own(bundle: Path, attacker: Pair) -> None:
    """Complete, encrypted, with a good MAC, a signature of his own and the owner's recipient."""
    key = bytes(32)
    his = make_bundle(bundle.parent / "his", seed=2, key=key)
    path = his / MANIFEST
    wrapped = parse_manifest((bundle / MANIFEST).read_bytes(), MANIFEST).wrapped_keys
    assert wrapped is not None
    made = rewrapped(path.read_bytes(), MANIFEST, GivenKey(key, "his"), wrapped)
    path.write_bytes(made)
    sign_as(attacker.signer, his)
    shutil.rmtree(bundle)
    his.rename(bundle)


ATTACKS: dict[Callable[[Path, Pair], None], str] = {
    unsigned: "is not signed",
    signed_by_another_key: "its signature is not of the key",
    another_signature_with_the_owners_hint: "its signature is not of the key",
    manifest_changed: "is not the file that was signed",
    manifest_indented_anew: "is not the file that was signed",
    recipients_changed: "is not the file that was signed",
    manifest_removed: "says that there was one",
    small_file_changed: "chat_template.jinja (its SHA-256 is another)",
    small_file_removed: "tokenizer.json (missing)",
    weights_of_another_size: "model.tensors (",
    signature_of_another_bundle: "is not the file that was signed",
    bundle_under_a_key_of_his_own: "its signature is not of the key",
}


def test_the_owners_bundle_asks_for_its_key(bundle: Path, owner: Pair, vault: Any) -> None:
    """Else the attacks would show nothing: with a good signature, Vault is asked."""
    code, said = command("verify", environ(bundle, owner) | asking(vault), str(bundle))
    assert code == 77, said
    assert vault.seen == ["/v1/transit/decrypt/models"]


def test_the_owners_bundle_starts(tmp_path: Path, bundle: Path, owner: Pair) -> None:
    """With the key at hand; the log and the start page say who signed."""
    ended = start(tmp_path, environ(bundle, owner) | {"TENSORSERVE_KEY": KEY.hex()})
    assert (ended.code, ended.mode) == (None, "manifest"), ended.text
    known = [event for event in ended.events if event["event"] == "signature"]
    assert [event["fingerprint"] for event in known] == [owner.signer.by.fingerprint]
    checks = [event["name"] for event in ended.events if event["event"] == "check"]
    assert checks.index("signature") < checks.index("weights")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_refused_before_a_key_is_asked_for(
    bundle: Path, owner: Pair, attacker: Pair, vault: Any, attack: Callable[[Path, Pair], None]
) -> None:
    """65, and no request to the key service."""
    if attack is signature_of_another_bundle:
        other = make_bundle(bundle.parent / "others", seed=3)
        sign_as(owner.signer, other)
        other.rename(bundle.parent / "other")
    attack(bundle, attacker)
    code, said = command("verify", environ(bundle, owner) | asking(vault), str(bundle))
    assert (code, vault.seen) == (65, []), said
    assert ATTACKS[attack] in said
    assert "owners-token" not in said


def test_refused_by_a_start_as_well(tmp_path: Path, bundle: Path, owner: Pair, vault: Any) -> None:
    """The same check, before vLLM and before the key."""
    recipients_changed(bundle, owner)
    said = refused(tmp_path, environ(bundle, owner) | asking(vault))
    assert "is not the file that was signed" in said
    assert vault.seen == []


def test_sigstores_signer_comes_before_the_key(bundle: Path, tmp_path: Path, vault: Any) -> None:
    """An attacker has an account too, and Sigstore signs for him: Vault is asked for the owner."""
    with Sigstore() as instance:
        asked = {"TENSORSERVE_MODEL_URI": str(bundle)} | instance.settings(tmp_path) | asking(vault)
        for identity in ("attacker@example.org", None):
            code, said = command("verify", asked, str(bundle))
            assert (code, vault.seen) == (65, []), said
            assert ("signed with a key" if identity else "do not match") in said
            sign_as(instance.signer(tmp_path, identity or instance.identity), bundle)
    code, said = command("verify", asked, str(bundle))
    assert (code, vault.seen) == (77, ["/v1/transit/decrypt/models"]), said


def test_weights_of_the_same_size_are_refused_as_they_are_read(bundle: Path, owner: Pair) -> None:
    """The signature does not read them: the manifest that it covers binds them."""
    weights = bundle / "model.tensors"
    data = bytearray(weights.read_bytes())
    data[-5000] ^= 1
    weights.write_bytes(data)
    code, said = command(
        "verify", environ(bundle, owner) | {"TENSORSERVE_KEY": KEY.hex()}, str(bundle)
    )
    assert code == 65
    assert "model.tensors" in said
