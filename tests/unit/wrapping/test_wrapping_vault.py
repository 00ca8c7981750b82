"""vault: against a real OpenBao: what it is asked, how one logs in, and what refusals mean."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from certificates import PrivateCA
from http_server import Handler, HttpServer
from key_services import GOOD_JWT, OpenBao, TokenReviews, openbao
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
from tensorserve.wrapping.base import (
    Binding,
    Reference,
    Services,
    VaultAccess,
    WrappedKey,
    fingerprint_of,
)
from tensorserve.wrapping.providers import for_unwrapping, for_wrapping, shown
from tensorserve.wrapping.unwrap import unwrap_key
from waiting import wait_for

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))
QUICK = RetryPolicy(deadline=1.0, backoff_base=0.01, backoff_cap=0.05)
DECRYPT = "transit/decrypt/models"


def services(bao: OpenBao, **changes: Any) -> Services:
    access = VaultAccess(address=bao.url, token=Secret(bao.token), ca_file=bao.ca_file)
    return Services(vault=replace(access, **changes), policy=QUICK)


def wrapped(bao: OpenBao, key: str = "transit/models", binding: Binding = BINDING) -> WrappedKey:
    by = for_wrapping(f"vault:{key}", services(bao))
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), binding))


def unwrapped(
    given: Services, *entries: WrappedKey, uri: str | None = "vault:transit/models"
) -> bytes:
    reference = None if uri is None else Reference.parse(uri, "the test")
    found = unwrap_key(entries, BINDING, reference, given, "manifest.json")
    assert found.proves_sender
    assert found.by.startswith("vault:transit/")
    return found.key.reveal()


def test_what_transit_wraps_it_unwraps(bao: OpenBao) -> None:
    """Named in full, by its kind alone, and by the manifest alone."""
    entry = wrapped(bao)
    assert entry.wrapped.startswith("vault:v1:")
    for uri in ("vault:transit/models", "vault:", None):
        assert unwrapped(services(bao), entry, uri=uri) == MODEL_KEY


def test_it_is_bound_to_its_bundle(bao: OpenBao) -> None:
    """Associated data: transit itself refuses it for another bundle."""
    for other in (replace(BINDING, manifest="bb" * 32), replace(BINDING, key="bb" * 32)):
        with pytest.raises(WrongKeyError, match="another bundle"):
            unwrapped(services(bao), wrapped(bao, binding=other))


@pytest.mark.parametrize("text", ["vault:v1:AAAA", "zzz", "vault:v9:{}", "vault:v1:!"])
def test_damage_is_refused(bao: OpenBao, text: str) -> None:
    """65, whatever transit calls it."""
    entry = wrapped(bao)
    text = text.format(entry.wrapped.removeprefix("vault:v1:"))
    with pytest.raises(WrongKeyError):
        unwrapped(services(bao), replace(entry, wrapped=text))


def test_a_policy_for_decrypting_alone_is_enough(bao: OpenBao) -> None:
    """A server needs `update` on one path; wrapping is refused with what to grant."""
    entry = wrapped(bao)
    bao.policy("server", DECRYPT)
    given = services(bao, token=Secret(bao.token_for("server")))
    assert unwrapped(given, entry) == MODEL_KEY
    with pytest.raises(PermissionDeniedError) as caught:
        for_wrapping("vault:transit/models", given).wrap(Secret(MODEL_KEY), BINDING)
    assert 'path "transit/encrypt/models" { capabilities = ["update"] }' in str(caught.value)


def test_who_may_not_decrypt_is_told_what_to_grant(bao: OpenBao) -> None:
    """77: a token without the policy, and one that is none; neither is in the message."""
    entry = wrapped(bao)
    bao.policy("nothing", "transit/decrypt/other")
    for token in (bao.token_for("nothing"), "s.no-such-token"):
        with pytest.raises(PermissionDeniedError, match=DECRYPT) as caught:
            unwrapped(services(bao, token=Secret(token)), entry)
        assert token not in str(caught.value)
        assert bao.url in str(caught.value)
    with pytest.raises(PermissionDeniedError, match="no credentials for Vault"):
        unwrapped(services(bao, token=None), entry)


def test_an_app_role_logs_in_and_out(bao: OpenBao) -> None:
    """Its token is revoked when the key is there; a wrong SecretID is said as such."""
    entry = wrapped(bao)
    bao.policy("approle-server", DECRYPT)
    role, secret = bao.app_role("approle-server")
    before = tokens(bao)
    given = services(bao, token=None, role_id=role, secret_id=Secret(secret))
    assert unwrapped(given, entry) == MODEL_KEY
    assert unwrapped(given, entry, uri=None) == MODEL_KEY
    assert tokens(bao) == before
    for changes, said in (
        ({"secret_id": Secret("wrong-secret")}, "refuses to log an AppRole in by auth/approle"),
        ({"auth_mount": "elsewhere"}, "by auth/elsewhere"),
    ):
        wrong = replace(given, vault=replace(given.vault, **changes))
        with pytest.raises(PermissionDeniedError, match=said) as caught:
            unwrapped(wrong, entry)
        assert "wrong-secret" not in str(caught.value)


def tokens(bao: OpenBao) -> set[str]:
    return set(bao.ask("LIST", "auth/token/accessors")["data"]["keys"])


def test_a_service_account_logs_in(bao: OpenBao, tmp_path: Path) -> None:
    """OpenBao has its token reviewed, here by a stand-in for Kubernetes' API."""
    entry = wrapped(bao)
    bao.policy("pod", DECRYPT)
    jwt = tmp_path / "token"
    jwt.write_text(GOOD_JWT + "\n")
    ca = PrivateCA(tmp_path)
    with HttpServer(TokenReviews, tls=ca.context()) as kubernetes:
        bao.kubernetes_role("pod", "pod", kubernetes.url, ca)
        given = services(bao, token=None, kubernetes_role="pod", jwt_file=str(jwt))
        assert unwrapped(given, entry) == MODEL_KEY
        jwt.write_text(GOOD_JWT[:-8] + "AAAAAAAA")
        with pytest.raises(PermissionDeniedError, match="Kubernetes role 'pod'"):
            unwrapped(given, entry)
        jwt.unlink()
        with pytest.raises(ConfigurationError, match="service account's token"):
            unwrapped(given, entry)


def test_a_sealed_one_is_waited_for(bao: OpenBao, told: list[str]) -> None:
    """Until the deadline; the log says so. Then 69."""
    entry = wrapped(bao)
    given = replace(services(bao), policy=replace(QUICK, deadline=30.0))
    bao.seal()
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(unwrapped(given, entry)))
    try:
        waiting.start()
        wait_for(lambda: told)
        assert not found
        with pytest.raises(SourceUnavailableError, match="sealed"):
            unwrapped(services(bao), entry)
    finally:
        bao.unseal()
    waiting.join(30)
    assert found == [MODEL_KEY]
    assert len(told) == 1
    assert "sealed" in told[0]
    assert bao.url in told[0]


def test_nobody_there_is_69() -> None:
    """After the deadline, with the address."""
    given = Services(
        vault=VaultAccess(address="http://127.0.0.1:9", token=Secret("t")), policy=QUICK
    )
    with pytest.raises(SourceUnavailableError, match=r"127\.0\.0\.1:9 cannot be reached"):
        unwrapped(given, WrappedKey("vault", "transit/models", "vault:v1:AAAA"))


def test_a_service_that_is_away_is_waited_for_once(told: list[str]) -> None:
    """However many recipients a manifest has at it."""
    access = VaultAccess(address="http://127.0.0.1:9", token=Secret("t"))
    given = Services(vault=access, policy=QUICK)
    entries = [WrappedKey("vault", f"transit/k{n}", "vault:v1:AAAA") for n in range(16)]
    with pytest.raises(SourceUnavailableError):
        unwrapped(given, *entries, uri="vault:")
    assert len(told) == 1


def test_a_missing_key_and_mount_are_said(bao: OpenBao) -> None:
    """78; transit's own words are in it."""
    for key in ("transit/none", "no-mount/models"):
        entry = replace(wrapped(bao), key=key)
        with pytest.raises(ConfigurationError, match="no such key, or no transit engine"):
            unwrapped(services(bao), entry, uri="vault:")


def test_a_public_keys_type_is_refused_both_ways(bao: OpenBao) -> None:
    """What anybody can encrypt with proves no sender: such keys have no associated data."""
    bao.make_key("rsa", "rsa-2048")
    with pytest.raises(ConfigurationError, match="aes256-gcm96"):
        wrapped(bao, "transit/rsa")
    plain = bao.ask("POST", "transit/encrypt/rsa", {"plaintext": "AAAA"})["data"]["ciphertext"]
    with pytest.raises(TensorserveError) as caught:
        unwrapped(services(bao), WrappedKey("vault", "transit/rsa", plain), uri="vault:")
    assert caught.value.exit_code in {65, 78}


def test_a_rotated_key_opens_what_it_wrapped_before(bao: OpenBao) -> None:
    """Until min_decryption_version excludes it; then the message says how to go on."""
    bao.make_key("rotated")
    entry = wrapped(bao, "transit/rotated")
    bao.ask("POST", "transit/keys/rotated/rotate", {})
    assert unwrapped(services(bao), entry, uri="vault:") == MODEL_KEY
    assert wrapped(bao, "transit/rotated").wrapped.startswith("vault:v2:")
    bao.ask("POST", "transit/keys/rotated/config", {"min_decryption_version": 2})
    with pytest.raises(PermissionDeniedError, match="min_decryption_version") as caught:
        unwrapped(services(bao), entry, uri="vault:")
    assert "tensorserve rewrap" in str(caught.value.hint)


def test_its_certificate_is_checked(tmp_path: Path) -> None:
    """With the CA of VAULT_CACERT; vault://HOST is https. Without it 69, at once."""
    with openbao(PrivateCA(tmp_path)) as bao:
        entry = wrapped(bao)
        assert unwrapped(services(bao), entry) == MODEL_KEY
        host = bao.url.removeprefix("https://")
        elsewhere = services(bao, address="http://127.0.0.1:9")
        assert unwrapped(elsewhere, entry, uri=f"vault://{host}/transit/models") == MODEL_KEY
        with pytest.raises(SourceUnavailableError, match="not trusted") as caught:
            unwrapped(services(bao, ca_file=None), entry)
        assert "VAULT_CACERT" in str(caught.value.hint)


class Redirects(Handler):
    """Sends everybody elsewhere, and notes who came."""

    def do_POST(self) -> None:
        self.owner.seen.append(self.path)
        self.answer(307, {"Location": f"{self.owner.target}{self.path}"}, b"")


class Listens(Handler):
    """Where nobody may come with a token."""

    def do_POST(self) -> None:
        self.owner.seen.append(self.headers.get("X-Vault-Token"))
        self.answer(200, {}, b"{}")


def test_a_redirect_gets_no_token() -> None:
    """requests would send it along to another host."""
    with HttpServer(Listens) as other, HttpServer(Redirects) as server:
        other.seen, server.seen, server.target = [], [], other.url  # type: ignore[attr-defined]
        given = Services(vault=VaultAccess(address=server.url, token=Secret("token")), policy=QUICK)
        with pytest.raises(TensorserveError):
            unwrapped(given, WrappedKey("vault", "transit/models", "vault:v1:AAAA"))
        assert server.seen == ["/v1/transit/decrypt/models"]  # type: ignore[attr-defined]
        assert other.seen == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[]", b"{}", b'{"data": null}', b'{"data": {"plaintext": 1}}', b""]
)
def test_what_is_no_vault_is_69(answer: bytes) -> None:
    """A web page at the address, or another service: a message, no traceback."""

    class Page(Handler):
        def do_POST(self) -> None:
            self.answer(200, {"Content-Type": "application/json"}, answer)

    with HttpServer(Page) as server:
        access = VaultAccess(address=server.url, token=Secret("t"))
        entry = WrappedKey("vault", "transit/models", "vault:v1:AAAA")
        for changes in ({}, {"role_id": "r", "secret_id": Secret("s")}):
            given = Services(vault=replace(access, **changes), policy=QUICK)
            with pytest.raises(SourceUnavailableError, match="is no"):
                unwrapped(given, entry)


@pytest.mark.parametrize(
    "key",
    ["models", "../sys/models", "a/../b", "transit/", "/transit/models", "transit/a b", "a//b",
     "transit/./x", "transit/..", "sys/%2e%2e/x", "transit/a?b", "transit/a#b"],
)  # fmt: skip
def test_what_leads_to_another_path_is_refused(bao: OpenBao, key: str) -> None:
    """In --wrap, in the URI, and in a manifest: nothing is asked."""
    with pytest.raises(ConfigurationError):
        for_wrapping(f"vault:{key}", services(bao))
    with pytest.raises(ConfigurationError, match="names no key"):
        unwrapped(services(bao), WrappedKey("vault", key, "vault:v1:AAAA"), uri="vault:")


def from_environment(**variables: str) -> VaultAccess:
    return SourceSettings.from_environment(variables).vault


def test_the_variables_are_vaults_and_openbaos(tmp_path: Path) -> None:
    """With _FILE for the token; OpenBao's own names win, as its command line has it."""
    (tmp_path / "t").write_text("token\n")
    access = from_environment(
        VAULT_ADDR="https://v:8200/", VAULT_TOKEN_FILE=str(tmp_path / "t"), VAULT_NAMESPACE="n",
        VAULT_CACERT="/ca", BAO_ADDR="https://b:8200",
    )  # fmt: skip
    assert (access.address, access.namespace, access.ca_file) == ("https://b:8200", "n", "/ca")
    assert access.token is not None
    assert access.token.reveal() == b"token"
    for variables, said in (
        ({"VAULT_TOKEN": "a", "BAO_TOKEN": "b"}, "both set and differ"),
        ({"VAULT_ADDR": "v:8200"}, "not a URL"),
        ({"VAULT_ADDR": "https://u:p@v"}, "has an @ in it"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            from_environment(**variables)


def test_the_plan_says_where_and_as_whom() -> None:
    """No token, and nobody is asked."""
    access = VaultAccess(address="https://v:8200", token=Secret("secret-token"))
    reference = Reference.parse("vault:transit/models", "the test")
    cases: list[tuple[VaultAccess, str]] = [
        (access, "vault:transit/models (at https://v:8200, with a token)"),
        (replace(access, kubernetes_role="r"), "with Kubernetes role 'r'"),
        (replace(access, role_id="r"), "with an AppRole"),
        (VaultAccess(), "VAULT_ADDR is not set, with no credentials"),
    ]
    for given, said in cases:
        text = shown(reference, Services(vault=given))
        assert said in text
        assert "secret-token" not in text
    with pytest.raises(ConfigurationError, match="no address of Vault"):
        for_unwrapping(reference, Services())


def test_errors_show_no_key(bao: OpenBao) -> None:
    """Neither the model's nor the wrapped one."""
    entry = wrapped(bao)
    bad: list[Callable[[], object]] = [
        lambda: unwrapped(services(bao), replace(entry, wrapped=entry.wrapped[:-6])),
        lambda: unwrapped(services(bao, token=Secret("x-token-x")), entry),
        lambda: unwrapped(services(bao), replace(entry, key="transit/none"), uri="vault:"),
    ]
    for ask in bad:
        with pytest.raises(TensorserveError) as caught:
            ask()
        text = f"{caught.value}{caught.value.__cause__}"
        assert entry.wrapped[12:40] not in text
        assert "x-token-x" not in text
