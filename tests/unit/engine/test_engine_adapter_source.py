"""One adapter of a store, packed as a user would: authenticated, checked, held in memory alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_signers import Pair, make_pair
from rangeserver import Fault, RangeServer
from sigstore_stand_in import Sigstore
from tensorserve.bundle.adapter_fit import BaseModel
from tensorserve.cli import main as tensorserve
from tensorserve.config.settings import Settings
from tensorserve.engine.adapters.refusal import AdapterRefused
from tensorserve.engine.adapters.source import AdapterSource

MODULE = "model.layers.0.self_attn.q_proj"
KEY, OTHER_KEY = "11" * 32, "22" * 32
WEIGHTS, CONFIG = "adapter_model.tensors", "adapter_config.json"
MANIFEST, SIGNATURE = "manifest.json", "model.sig"


def make_adapter(directory: Path, *, rank: int = 4, into: int = 16, value: float = 1.0) -> Path:
    directory.mkdir()
    name = f"base_model.model.{MODULE}"
    tensors = {
        f"{name}.lora_A.weight": torch.full((rank, into), value),
        f"{name}.lora_B.weight": torch.full((24, rank), value),
    }
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


@dataclass
class Place:
    """A store in a directory, and the server's settings."""

    tmp_path: Path
    model: Path

    @property
    def store(self) -> Path:
        return self.tmp_path / "store"

    def pack(self, name: str, *options: str, key: str | None = KEY, **shape: int | float) -> Path:
        """With `tensorserve pack-adapter`; gives its folder."""
        adapter = make_adapter(self.tmp_path / f"of-{name}", **shape)  # type: ignore[arg-type]
        words = ["pack-adapter", str(adapter), str(self.store / name), *options]
        if key is not None:
            file = self.tmp_path / f"key-{key[:4]}"
            file.write_text(key)
            words += ["--encrypt", "--key-file", str(file)]
        assert tensorserve(words) == 0
        return self.store / name

    def source(self, uri: str | None = None, **environ: str) -> AdapterSource:
        """Of a server with the model's KEY, unless `environ` says another."""
        given = {
            "TENSORSERVE_MODEL_URI": "/model",
            "TENSORSERVE_ADAPTERS_URI": uri or str(self.store),
            "TENSORSERVE_STATE_DIR": str(self.tmp_path / "state"),
            "TENSORSERVE_KEY": KEY,
        } | environ
        settings = Settings.from_environment({n: v for n, v in given.items() if v})
        base = BaseModel.at(self.model, frozenset({"served"}), 8, 100)
        return AdapterSource(settings, base, self.tmp_path / "found")


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """An empty store, and the model's directory as vLLM sees it."""
    model = tmp_path / "model"
    model.mkdir()
    save_file({f"{MODULE}.weight": torch.zeros(24, 16)}, model / "model.safetensors")
    return Place(tmp_path, model)


def refusal(source: AdapterSource, name: str) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        source.hold(source.find(name))
    return caught.value


def test_it_is_what_was_packed_and_in_memory_alone(place: Place) -> None:
    """The configuration is a file, as in a bundle; the weights are a link."""
    place.pack("sql")
    source = place.source()
    held = source.hold(source.find("sql"))
    link = held.directory / "adapter_model.safetensors"
    original = load_file(place.tmp_path / "of-sql" / "adapter_model.safetensors")
    found = load_file(link)
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())
    assert (held.directory / CONFIG).read_bytes() == (
        place.tmp_path / "of-sql" / CONFIG
    ).read_bytes()
    assert link.is_symlink()
    assert "memfd:adapter" in str(link.resolve())
    assert oct(held.directory.stat().st_mode & 0o777) == "0o700"
    held.release()
    assert not held.directory.exists()
    assert not link.exists()


def test_the_same_adapter_again_is_elsewhere(place: Place) -> None:
    """vLLM's prefix cache goes by name and path."""
    place.pack("sql")
    source = place.source()
    held = [source.hold(source.find("sql")) for _ in "12"]
    assert len({one.directory for one in held}) == 2
    for one in held:
        one.release()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TENSORSERVE_ADAPTERS_KEY": KEY, "TENSORSERVE_KEY": ""},
        {"TENSORSERVE_ADAPTERS_KEY": KEY, "TENSORSERVE_KEY": OTHER_KEY},
    ],
    ids=["the model's", "its own", "its own before the model's"],
)
def test_its_key(place: Place, environ: dict[str, str]) -> None:
    """The model's, unless adapters have one of their own."""
    place.pack("sql")
    source = place.source(**environ)
    source.hold(source.find("sql")).release()


def test_a_passphrase_opens_it_too(place: Place) -> None:
    """As it opens the model."""
    adapter, file = make_adapter(place.tmp_path / "of-sql"), place.tmp_path / "passphrase"
    file.write_text("correct horse battery staple")
    words = ["pack-adapter", str(adapter), str(place.store / "sql"), "--encrypt"]
    assert tensorserve([*words, "--passphrase-file", str(file)]) == 0
    source = place.source(TENSORSERVE_KEY="", TENSORSERVE_PASSPHRASE_FILE=str(file))
    source.hold(source.find("sql")).release()


def test_a_plain_one_is_served_where_there_is_no_key(place: Place) -> None:
    """As a plain model is."""
    place.pack("sql", key=None)
    source = place.source(TENSORSERVE_KEY="")
    source.hold(source.find("sql")).release()


def flip(name: str, at: int = -100) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        path = place.store / "sql" / name
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    return change


def another_key(place: Place) -> None:
    shutil.rmtree(place.store / "sql")
    place.pack("sql2", key=OTHER_KEY)
    (place.store / "sql2").rename(place.store / "sql")


def plain(place: Place) -> None:
    shutil.rmtree(place.store / "sql")
    shutil.rmtree(place.tmp_path / "of-sql")
    place.pack("sql", key=None)


def relabelled(place: Place) -> None:
    place.pack("rude")
    shutil.rmtree(place.store / "sql")
    (place.store / "rude").rename(place.store / "sql")


def other_weights(place: Place) -> None:
    place.pack("rude", value=2.0)
    shutil.copy(place.store / "rude" / WEIGHTS, place.store / "sql" / WEIGHTS)


def without_identity(place: Place) -> None:
    """What a bundle of a model has at its root, under the same key."""
    path = place.store / "sql" / MANIFEST
    document = json.loads(path.read_text())
    del document["adapter"]
    path.write_text(json.dumps(document))


def other_rank(place: Place) -> None:
    path = place.store / "sql" / CONFIG
    path.write_text(path.read_text().replace('"r": 4', '"r": 2'))


ATTACKS = {
    "a bit of the weights": (flip(WEIGHTS), "corrupt"),
    "the manifest's MAC": (flip(MANIFEST, -20), "corrupt"),
    "another key": (another_key, "corrupt"),
    "a plain adapter": (plain, "corrupt"),
    "another adapter's folder": (relabelled, "corrupt"),
    "another adapter's weights": (other_weights, "corrupt"),
    "not an adapter": (without_identity, "corrupt"),
    "another configuration": (other_rank, "corrupt"),
    "no weights": (lambda place: (place.store / "sql" / WEIGHTS).unlink(), "not_found"),
}


@pytest.mark.parametrize(("change", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_what_is_not_as_it_was_packed_is_refused(
    place: Place, change: Callable[[Place], None], reason: str
) -> None:
    """And nothing of it stays: no directory for vLLM, no memory."""
    place.pack("sql")
    change(place)
    found = refusal(place.source(), "sql")
    assert found.reason == reason, found.message
    assert list((place.tmp_path / "found").iterdir()) == []
    assert str(place.tmp_path) not in found.said


@pytest.fixture
def owner(tmp_path: Path) -> Pair:
    """Whose signature the server asks for."""
    return make_pair(tmp_path, "owner")


@pytest.mark.parametrize("key", [KEY, None], ids=["encrypted", "plain"])
@pytest.mark.parametrize("verify", ["auto", "manifest"])
def test_a_signed_one_is_served(place: Place, owner: Pair, key: str | None, verify: str) -> None:
    """Where the model has to be signed, adapters have to be."""
    place.pack("sql", "--sign-key", str(owner.private), key=key)
    given = {"TENSORSERVE_VERIFY": verify, "TENSORSERVE_KEY": key or ""}
    source = place.source(TENSORSERVE_SIGNATURE_KEY_FILE=str(owner.public), **given)
    source.hold(source.find("sql")).release()


def unsigned(place: Place, _: Pair) -> None:
    (place.store / "sql" / SIGNATURE).unlink()


def by_another(place: Place, _: Pair) -> None:
    words = ["sign", str(place.store / "sql"), "--sign-key"]
    assert tensorserve([*words, str(make_pair(place.tmp_path, "other").private)]) == 0


def packed_by_who_has_the_key(place: Place, _: Pair) -> None:
    """With the signature of what was there."""
    signature = (place.store / "sql" / SIGNATURE).read_bytes()
    shutil.rmtree(place.tmp_path / "of-sql")
    place.pack("sql", "--overwrite", value=2.0)
    (place.store / "sql" / SIGNATURE).write_bytes(signature)


def signed_for_another_name(place: Place, owner: Pair) -> None:
    place.pack("rude", "--sign-key", str(owner.private))
    shutil.copy(place.store / "rude" / SIGNATURE, place.store / "sql" / SIGNATURE)


@pytest.mark.parametrize(
    "change", [unsigned, by_another, packed_by_who_has_the_key, signed_for_another_name]
)
def test_what_is_not_signed_is_refused(
    place: Place,
    owner: Pair,
    change: Callable[[Place, Pair], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before its key is used; nothing of it stays."""
    monkeypatch.setenv("TENSORSERVE_KEY", KEY)
    place.pack("sql", "--sign-key", str(owner.private))
    change(place, owner)
    for key in (KEY, OTHER_KEY):
        given = {"TENSORSERVE_SIGNATURE_KEY_FILE": str(owner.public), "TENSORSERVE_KEY": key}
        found = refusal(place.source(**given), "sql")
        assert (found.reason, found.status) == ("signature", 400), found.message
        assert str(place.tmp_path) not in found.said
    assert list((place.tmp_path / "found").iterdir()) == []


def test_an_identity_signs_adapters_too(place: Place) -> None:
    """Sigstore's keyless signing: that identity alone."""
    with Sigstore() as instance:
        for name, identity in (("sql", instance.identity), ("rude", "mallory@example.com")):
            instance.signer(place.tmp_path, identity)
            given = ("--sign-identity-token", str(place.tmp_path / "token"))
            place.pack(name, *given, "--sign-trust-config", str(place.tmp_path / "config.json"))
        source = place.source(**instance.settings(place.tmp_path))
    source.hold(source.find("sql")).release()
    assert refusal(source, "rude").reason == "signature"


def test_one_that_is_not_there_is_no_refusal(place: Place, owner: Pair) -> None:
    """404, as without signatures."""
    place.store.mkdir()
    source = place.source(TENSORSERVE_SIGNATURE_KEY_FILE=str(owner.public))
    assert refusal(source, "sql").status == 404


def test_an_encrypted_one_without_a_key_is_refused(place: Place) -> None:
    """With what to set."""
    place.pack("sql")
    assert refusal(place.source(TENSORSERVE_KEY=""), "sql").reason == "configuration"


@pytest.mark.parametrize(
    ("options", "shape", "reason"),
    [
        ((), {"into": 32}, "other_model"),
        ((), {"rank": 16}, "rank"),
        (("--base-model", "another"), {}, "other_model"),
    ],
    ids=["sizes", "rank", "name"],
)
def test_one_of_another_model_is_refused(
    place: Place, options: tuple[str, ...], shape: dict[str, int], reason: str
) -> None:
    """Before vLLM sees it."""
    place.pack("sql", *options, **shape)
    found = refusal(place.source(), "sql")
    assert (found.reason, found.status) == (reason, 400)
    assert list((place.tmp_path / "found").iterdir()) == []


def test_the_name_of_its_model_may_be_recorded(place: Place) -> None:
    """The one that is served."""
    place.pack("sql", "--base-model", "served")
    source = place.source()
    source.hold(source.find("sql")).release()


def test_over_http_and_what_is_not_there(place: Place) -> None:
    """A server that hides what is missing says 403, as S3 without the right to list."""
    place.pack("sql")
    with RangeServer(place.store) as server:
        source = place.source(server.url)
        source.hold(source.find("sql")).release()
        assert (refusal(source, "new").reason, refusal(source, "new").status) == ("not_found", 404)
        server.missing = (403, b"")
        assert (refusal(source, "new").reason, refusal(source, "new").status) == ("permission", 404)


def test_a_store_that_does_not_answer_is_told_so(place: Place) -> None:
    """After the deadline, which is never more than 30 s here."""
    place.pack("sql")
    with RangeServer(place.store) as server:
        server.faults = [Fault("status", times=10**6, beyond=0)]
        found = refusal(place.source(server.url, TENSORSERVE_FETCH_DEADLINE="1"), "sql")
    assert (found.reason, found.status) == ("source_unavailable", 503)
    assert server.fired["status"] > 1


def test_damage_on_the_way_is_fetched_again(place: Place) -> None:
    """A connection that ends in the middle."""
    place.pack("sql")
    with RangeServer(place.store) as server:
        server.faults = [Fault("reset", times=1, after=100, beyond=0)]
        source = place.source(server.url)
        source.hold(source.find("sql")).release()
        assert server.fired["reset"] == 1
