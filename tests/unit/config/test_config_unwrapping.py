"""A key by reference becomes the model's key of the settings, or the start ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_samples import ACCESS, make_model
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.config.access import has_key, key_for
from tensorserve.config.launch_plan import describe, make_plan
from tensorserve.config.settings import Settings, SourceSettings
from tensorserve.config.unwrapping import with_key
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError, WrongKeyError
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.wrapping.base import Services, VaultAccess, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping

KEY = bytes(range(32))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """One whose key is wrapped for the wrapping key beside it."""
    (tmp_path / "wrapping").write_bytes(bytes(range(9, 41)))
    by = for_wrapping(f"file:{tmp_path / 'wrapping'}", Services())
    secret = Secret(KEY, "the test")
    pack(
        make_model(tmp_path / "hf"),
        str(tmp_path / "b"),
        access=ACCESS,
        key=secret,
        recipients=(by,),
    )
    return tmp_path / "b"


def settings(**variables: str) -> SourceSettings:
    given = {f"TENSORSERVE_{name.upper()}": value for name, value in variables.items()}
    return SourceSettings.from_environment(given)


def test_the_key_is_as_one_that_was_given(bundle: Path) -> None:
    """Before, nothing takes the start for one without a key; the credentials are dropped then."""
    uri = f"file:{bundle.parent / 'wrapping'}"
    given = SourceSettings.from_environment(
        {"TENSORSERVE_KEY_URI": uri, "VAULT_ADDR": "https://v", "VAULT_TOKEN": "token"}
    )
    assert has_key(given)
    with pytest.raises(TensorserveError):
        key_for(given)
    found = with_key(given, str(bundle))
    assert found.key is not None
    assert found.key.reveal() == KEY
    assert uri in found.key.origin
    assert given.vault.token is not None
    assert found.vault == VaultAccess()
    assert with_key(found, "/nowhere") is found


def test_without_a_reference_a_plain_start_is_as_before(tmp_path: Path) -> None:
    """No manifest, a plain bundle's, and a key that is given: nothing is asked."""
    pack(make_model(tmp_path / "hf"), str(tmp_path / "b"), access=ACCESS)
    for place in (tmp_path / "b", tmp_path / "hf"):
        given = settings()
        assert with_key(given, str(place)) is given
    given = settings(key=KEY.hex())
    assert with_key(given, "/nowhere") is given


def test_recipients_that_cannot_be_asked_are_named(bundle: Path) -> None:
    """78: with nothing set, the message says what the manifest asks for."""
    with pytest.raises(ConfigurationError, match=r"wrapped in .*manifest\.json for file:"):
        with_key(settings(), str(bundle))


@pytest.mark.parametrize("what", ["there is none", "it holds no wrapped key"])
def test_a_reference_demands_a_wrapped_key(bundle: Path, what: str) -> None:
    """65: somebody took it out; the start must not serve what is plain."""
    path = bundle / MANIFEST
    if what == "there is none":
        path.unlink()
    else:
        document = json.loads(path.read_text())
        del document["wrapped_keys"]
        path.write_text(json.dumps(document))
    with pytest.raises(CorruptError, match=what):
        with_key(settings(key_uri=f"file:{bundle.parent / 'wrapping'}"), str(bundle))


def test_the_fingerprint_names_the_only_key(bundle: Path) -> None:
    """Of a key that is unwrapped, and of one that is given."""
    uri = f"file:{bundle.parent / 'wrapping'}"
    right, wrong = fingerprint_of(KEY), fingerprint_of(bytes(32))
    assert with_key(settings(key_uri=uri, key_fingerprint=right), str(bundle)).key
    assert with_key(settings(key=KEY.hex(), key_fingerprint=right), str(bundle)).key
    for given in ({"key_uri": uri}, {"key": KEY.hex()}):
        with pytest.raises(WrongKeyError, match="another model's key"):
            with_key(settings(**given, key_fingerprint=wrong), str(bundle))


def test_the_pin_is_compared_before_anybody_is_asked(bundle: Path) -> None:
    """A manifest that is not the pinned one says nothing at all."""
    uri = "file:/not/opened"
    with pytest.raises(CorruptError, match="TENSORSERVE_MANIFEST_SHA256 is"):
        with_key(settings(key_uri=uri, manifest_sha256="0" * 64), str(bundle))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"KEY_URI": "file:/k", "KEY": KEY.hex()}, "Both TENSORSERVE_KEY_URI and a key"),
        ({"KEY_URI": "file:/k", "PASSPHRASE": "p"}, "Both TENSORSERVE_KEY_URI and a passphrase"),
        ({"KEY_URI": KEY.hex()}, "does not begin with the kind"),
        ({"KEY_URI": "s3://b/k"}, "'s3' is not a kind of wrapping key"),
        ({"KEY_FINGERPRINT": "ab"}, "is not the fingerprint of a key"),
        ({"KEY_FINGERPRINT": "ab" * 32, "PASSPHRASE": "p"}, "a passphrase is set"),
        ({"VAULT_ROLE_ID": "r"}, "one is set without the other"),
        ({"VAULT_ROLE_ID": "r", "VAULT_SECRET_ID": "s", "VAULT_KUBERNETES_ROLE": "k"}, "both set"),
        ({"VAULT_AUTH_MOUNT": "a/../b"}, "not the path of an auth method"),
    ],
)
def test_a_mistake_is_a_message(variables: dict[str, str], said: str) -> None:
    """78, and never the value of what may be a key."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        SourceSettings.from_environment({f"TENSORSERVE_{n}": v for n, v in variables.items()})
    assert KEY.hex() not in str(caught.value)


def test_the_plan_says_where_the_key_comes_from() -> None:
    """Without opening anything."""
    environ = {"TENSORSERVE_MODEL_URI": "s3://b/m", "TENSORSERVE_STATE_DIR": "/run/ts"}

    def key(**variables: str) -> object:
        given = Settings.from_environment(environ | variables)
        return describe(make_plan(given), given)["key"]

    assert key(TENSORSERVE_KEY_URI="file:/not/there") == (
        "the manifest's, unwrapped by file:/not/there"
    )
    assert key(TENSORSERVE_KEY=KEY.hex()) == "from TENSORSERVE_KEY"
    assert "none, unless" in str(key())
