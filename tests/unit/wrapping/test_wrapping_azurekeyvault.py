"""azurekeyvault: against a stand-in that does the real cryptography; Azure itself was not asked.

Its tokens are azure-identity's, from a managed identity's endpoint of ours.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding

from key_stand_ins import KeyVault
from tensorserve.config.access import services_for
from tensorserve.config.settings import SourceSettings
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
    WrongKeyError,
)
from tensorserve.secret import Secret
from tensorserve.sources import RetryPolicy
from tensorserve.wrapping.base import Binding, Reference, Services, WrappedKey, fingerprint_of
from tensorserve.wrapping.providers import for_wrapping, name_of, shown
from tensorserve.wrapping.unwrap import unwrap_key

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))
QUICK = RetryPolicy(deadline=0.2, backoff_base=0.01, backoff_cap=0.05)
GIVEN = replace(services_for(SourceSettings.from_environment({})), policy=QUICK)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyVault]:
    """With the key `models`."""
    with KeyVault(tmp_path_factory.mktemp("vault")) as running:
        running.make_key("models")
        yield running


@pytest.fixture
def vault(server: KeyVault, monkeypatch: pytest.MonkeyPatch) -> KeyVault:
    """The environment that asks it."""
    server.reset()
    for name in ("HTTPS_PROXY", "https_proxy", "AZURE_CLIENT_ID", "AZURE_TENANT_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server


def wrapped(vault: KeyVault, name: str = "models", binding: Binding = BINDING) -> WrappedKey:
    by = for_wrapping(f"azurekeyvault://{vault.host}/{name}", GIVEN)
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), binding))


def unwrapped(
    vault: KeyVault, *entries: WrappedKey, name: str = "models", given: Services = GIVEN
) -> bytes:
    reference = Reference.parse(f"azurekeyvault://{vault.host}/{name}", "the test")
    return unwrap_key(entries, BINDING, reference, given, "manifest.json").key.reveal()


def test_what_the_vault_wraps_it_unwraps(vault: KeyVault) -> None:
    """By the vault's and the key's name, which the manifest has; the version is beside it."""
    entry = wrapped(vault)
    assert entry.key == f"{vault.host}/models"
    version = next(reversed(vault.keys["models"]))
    assert entry.wrapped.startswith(f"{version}:")
    assert unwrapped(vault, entry) == MODEL_KEY
    assert vault.asked == [
        "/keys/models//wrapkey?api-version=7.4",
        f"/keys/models/{version}/unwrapkey?api-version=7.4",
    ]


def test_a_rotated_key_opens_what_it_wrapped_before(vault: KeyVault) -> None:
    """Each entry names its version; one in the URI is the only one."""
    old = vault.make_key("rotated")
    entry = wrapped(vault, "rotated")
    new = vault.make_key("rotated")
    assert unwrapped(vault, entry, name="rotated") == MODEL_KEY
    assert wrapped(vault, "rotated").wrapped.startswith(f"{new}:")
    assert unwrapped(vault, entry, name=f"rotated/{old}") == MODEL_KEY
    with pytest.raises(WrongKeyError, match=f"wrapped with version {old}"):
        unwrapped(vault, entry, name=f"rotated/{new}")
    assert wrapped(vault, f"rotated/{old}").wrapped.startswith(f"{old}:")


def test_it_is_bound_to_its_bundle(vault: KeyVault) -> None:
    """RSA-OAEP has no associated data: the binding is that of AES-GCM below it."""
    for other in (replace(BINDING, manifest="bb" * 32), replace(BINDING, key="bb" * 32)):
        with pytest.raises(WrongKeyError, match="another bundle"):
            unwrapped(vault, wrapped(vault, binding=other))


def test_what_the_vault_unwraps_is_not_the_models_key(vault: KeyVault) -> None:
    """Who may only see the vault's answers, or its log, has no key of a model."""
    entry = wrapped(vault)
    version, value, _ = entry.wrapped.split(":")
    scheme = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    found = vault.keys["models"][version].decrypt(base64.b64decode(value), scheme)
    assert len(found) == 32
    assert found != MODEL_KEY


def test_it_proves_no_sender(vault: KeyVault) -> None:
    """Whoever has the public key can do the same: the fingerprint or a pin is demanded."""
    reference = Reference.parse(f"azurekeyvault://{vault.host}/models", "the test")
    found = unwrap_key([wrapped(vault)], BINDING, reference, GIVEN, "manifest.json")
    assert not found.proves_sender


def test_another_key_and_damage_are_refused(vault: KeyVault) -> None:
    """65; what has not its three parts is not even sent."""
    entry = wrapped(vault)
    version, value, sealed = entry.wrapped.split(":")
    vault.make_key("other")
    with pytest.raises(WrongKeyError, match="is not wrapped for azurekeyvault:"):
        unwrapped(vault, entry, name="other")
    vault.asked.clear()
    for text in ("!", "", f"{version}:{value}", f"../x:{value}:{sealed}", f"{entry.wrapped}:AAAA",
                 f"{version}:!:{sealed}"):  # fmt: skip
        with pytest.raises(WrongKeyError):
            unwrapped(vault, replace(entry, wrapped=text))
    assert vault.asked == []
    for text in (f"{version}:AAAA:{sealed}", f"{version}:{value}:AAAA"):
        with pytest.raises(WrongKeyError):
            unwrapped(vault, replace(entry, wrapped=text))


def test_a_missing_key_is_said(vault: KeyVault) -> None:
    """78, with the vault and the name."""
    with pytest.raises(ConfigurationError, match="no such key") as caught:
        wrapped(vault, "none")
    assert f"{vault.host}/none" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (403, "Forbidden", PermissionDeniedError, "Key Vault Crypto User"),
        (401, "Unauthorized", PermissionDeniedError, "unwrapKey is refused"),
        (429, "Throttled", SourceUnavailableError, "429"),
        (503, "", SourceUnavailableError, "503"),
        (307, "", SourceUnavailableError, "307"),
    ],
)
def test_what_a_refusal_means(
    vault: KeyVault, status: int, code: str, kind: type[TensorserveError], said: str
) -> None:
    """Each with its exit code, Azure's words, and what to grant."""
    entry = wrapped(vault)
    error = {"code": code, "message": "as it says", "innererror": {"code": "ForbiddenByRbac"}}
    vault.refuse = (status, {"error": error})
    with pytest.raises(kind, match=said) as caught:
        unwrapped(vault, entry)
    if kind is PermissionDeniedError:
        assert "ForbiddenByRbac" in str(caught.value)
        assert "as it says" in str(caught.value)
    text = f"{caught.value}{caught.value.__cause__}"
    assert vault.token not in text
    assert entry.wrapped[40:80] not in text


def test_a_key_of_another_type_is_said(vault: KeyVault) -> None:
    """78 where it should wrap."""
    vault.refuse = (400, {"error": {"code": "BadParameter", "message": "incompatible"}})
    with pytest.raises(ConfigurationError, match="incompatible") as caught:
        wrapped(vault)
    assert "type RSA" in str(caught.value.hint)


@pytest.mark.parametrize(
    "answer", [{}, {"value": 1, "kid": "x"}, {"value": "!"}, {"value": "AAAA"}]
)
def test_what_is_no_vault_is_an_error(vault: KeyVault, answer: dict[str, object]) -> None:
    """Another service at the address: a message, no traceback."""
    entry = wrapped(vault)
    vault.refuse = (200, answer)
    with pytest.raises(TensorserveError):
        unwrapped(vault, entry)
    with pytest.raises(SourceUnavailableError, match="no such service"):
        wrapped(vault)


def test_a_missing_library_names_the_command(
    vault: KeyVault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """78."""
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'tensorserve\[azure\]'"):
        wrapped(vault)


@pytest.mark.parametrize(
    "text",
    ["", "models", "my-vault", "//my-vault", "//my-vault/", "//my-vault/a/b", "//my-vault/a b",
     "//my-vault/models/1", "//x/models", "//evil.example/models", "//my-vault.evil.net/models",
     "//my-vault.vault.azure.net.evil.net/models", "//my-vault.vault.azure.net:444/models",
     "//127.0.0.1.evil.net/models", "//my-vault/../models", "//my-vault/..", "//-vault/models"],
)  # fmt: skip
def test_what_is_no_key_of_azures_is_refused(text: str) -> None:
    """No token goes to another host than Azure's vaults and this machine."""
    with pytest.raises(ConfigurationError):
        for_wrapping(f"azurekeyvault:{text}", GIVEN)
    with pytest.raises(ConfigurationError):
        shown(Reference.parse(f"azurekeyvault:{text}", "the test"), GIVEN)


def test_a_manifest_asks_nobody(vault: KeyVault) -> None:
    """A vault's name says no tenant: TENSORSERVE_KEY_URI names it, or nobody does."""
    entry = wrapped(vault)
    vault.asked.clear()
    with pytest.raises(ConfigurationError, match="none of these can be asked"):
        unwrap_key([entry], BINDING, None, GIVEN, "manifest.json")
    assert vault.asked == []


def test_the_plan_says_where_and_as_whom() -> None:
    """The host, and how the token is found; the name is one however it is written."""
    for text, host, name in (
        ("//My-Vault/models", "my-vault.vault.azure.net", "my-vault/models"),
        (":my-vault/models", "my-vault.vault.azure.net", "my-vault/models"),
        ("//v-1.vault.azure.cn/m", "v-1.vault.azure.cn", "v-1.vault.azure.cn/m"),
        (
            "//hsm1.managedhsm.azure.net/m",
            "hsm1.managedhsm.azure.net",
            "hsm1.managedhsm.azure.net/m",
        ),
    ):
        reference = Reference.parse(f"azurekeyvault:{text.removeprefix(':')}", "the test")
        assert f"(at {host}, with azure-identity's default" in shown(reference, GIVEN)
        assert name_of(reference) == name
    environ = {"AZURE_TENANT_ID": "t", "AZURE_CLIENT_ID": "c", "AZURE_CLIENT_SECRET": "secret-x"}
    given = services_for(SourceSettings.from_environment(environ))
    text = shown(Reference.parse("azurekeyvault://my-vault/models", "the test"), given)
    assert "a service principal" in text
    assert "secret-x" not in text
