"""awskms: against moto's server, a stand-in for AWS's; what moto lacks is answered here."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from http_server import Handler, HttpServer
from key_services import Kms
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
from tensorserve.wrapping.providers import for_wrapping, shown
from tensorserve.wrapping.unwrap import unwrap_key

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))
QUICK = RetryPolicy(deadline=1.0, backoff_base=0.01, backoff_cap=0.05)


@pytest.fixture
def given(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> Services:
    """As the environment gives it; botocore reads the endpoint itself."""
    for name, value in kms.environ.items():
        monkeypatch.setenv(name, value)
    settings = SourceSettings.from_environment(kms.environ)
    return Services(s3=settings.s3, policy=QUICK)


def wrapped(key: str, given: Services, binding: Binding = BINDING) -> WrappedKey:
    by = for_wrapping(f"awskms:{key}", given)
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), binding))


def unwrapped(given: Services, *entries: WrappedKey, uri: str | None) -> bytes:
    reference = None if uri is None else Reference.parse(uri, "the test")
    found = unwrap_key(entries, BINDING, reference, given, "manifest.json")
    assert found.proves_sender
    return found.key.reveal()


def test_what_kms_wraps_it_unwraps(kms: Kms, given: Services) -> None:
    """By alias, by ARN, by the manifest alone; one key has several names."""
    arn = kms.make_key("models")
    by_alias, by_arn = wrapped("alias/models", given), wrapped(arn, given)
    for entry in (by_alias, by_arn):
        for uri in ("awskms:alias/models", f"awskms:{arn}", "awskms:///alias/models"):
            assert unwrapped(given, entry, uri=uri) == MODEL_KEY
    for uri in (None, "awskms:"):
        assert unwrapped(given, by_alias, uri=uri) == MODEL_KEY


def test_it_is_bound_to_its_bundle(kms: Kms, given: Services) -> None:
    """By the encryption context, with the manifest's salt and the key's fingerprint."""
    kms.make_key("bound")
    entry = wrapped("alias/bound", given)
    context = {"tensorserve": "model key v1", "manifest": "aa" * 32, "key": BINDING.key}
    blob = base64.b64decode(entry.wrapped)
    assert kms.client().decrypt(CiphertextBlob=blob, EncryptionContext=context)["Plaintext"] == (
        MODEL_KEY
    )
    for other in (replace(BINDING, manifest="bb" * 32), replace(BINDING, key="bb" * 32)):
        with pytest.raises(WrongKeyError, match="another bundle"):
            unwrapped(given, wrapped("alias/bound", given, other), uri="awskms:alias/bound")


def test_another_key_is_named_in_the_request(kms: Kms, given: Services) -> None:
    """KMS would find the key in what is wrapped, whoever's it is."""
    kms.make_key("mine")
    kms.make_key("other")
    entry = wrapped("alias/other", given)
    # moto answers AccessDeniedException where AWS has IncorrectKeyException (below).
    with pytest.raises((WrongKeyError, PermissionDeniedError)):
        unwrapped(given, entry, uri="awskms:alias/mine")


def test_a_manifest_names_no_key_of_another_account(kms: Kms, given: Services) -> None:
    """Nor of another region: an ARN counts only where TENSORSERVE_KEY_URI names one."""
    arn = kms.make_key("foreign")
    entry = wrapped(arn, given)
    for uri in (None, "awskms:"):
        with pytest.raises(ConfigurationError, match="any account and region") as caught:
            unwrapped(given, entry, uri=uri)
        assert f"TENSORSERVE_KEY_URI=awskms:{arn}" in str(caught.value.hint)


def test_damage_is_refused(kms: Kms, given: Services) -> None:
    """65; what is no base64 is not even sent."""
    kms.make_key("damaged")
    good = wrapped("alias/damaged", given)
    for text in ("!", f"{good.wrapped[:-8]}AAAAAAA="):
        with pytest.raises(WrongKeyError):
            unwrapped(given, replace(good, wrapped=text), uri="awskms:")


def test_a_missing_key_is_said(kms: Kms, given: Services) -> None:
    """78, with the region that was asked."""
    with pytest.raises(ConfigurationError, match="no such key") as missing:
        wrapped("alias/none", given)
    assert kms.region in str(missing.value)


class Answers(Handler):
    """One answer for everything."""

    def do_POST(self) -> None:
        status, code = self.owner.answers[0]
        if len(self.owner.answers) > 1:
            self.owner.answers.pop(0)
        body = json.dumps({"__type": code, "message": "as it says"}).encode()
        self.body()
        self.answer(status, {"Content-Type": "application/x-amz-json-1.1"}, body)


@contextmanager
def answering(
    monkeypatch: pytest.MonkeyPatch, kms: Kms, *answers: tuple[int, str]
) -> Iterator[Services]:
    with HttpServer(Answers) as server:
        server.answers = list(answers)  # type: ignore[attr-defined]
        environ = kms.environ | {"AWS_ENDPOINT_URL_KMS": server.url, "AWS_ACCESS_KEY_ID": "other"}
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        yield Services(s3=SourceSettings.from_environment(environ).s3, policy=QUICK)


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (400, "AccessDeniedException", PermissionDeniedError, "kms:Decrypt is refused"),
        (403, "InvalidSignatureException", PermissionDeniedError, "InvalidSignatureException"),
        (400, "ExpiredTokenException", PermissionDeniedError, "ExpiredTokenException"),
        (400, "DisabledException", PermissionDeniedError, "cannot be used"),
        (400, "KMSInvalidStateException", PermissionDeniedError, "cannot be used"),
        (400, "IncorrectKeyException", WrongKeyError, "another wrapping key"),
        (400, "ValidationException", ConfigurationError, "AWS_ENDPOINT_URL_KMS"),
        (404, "NoSuchBucket", ConfigurationError, "AWS_ENDPOINT_URL_KMS"),
        (400, "ThrottlingException", SourceUnavailableError, "ThrottlingException"),
        (500, "KMSInternalException", SourceUnavailableError, "KMSInternalException"),
        (503, "", SourceUnavailableError, "503"),
    ],
)
def test_what_a_refusal_means(
    monkeypatch: pytest.MonkeyPatch,
    kms: Kms,
    status: int,
    code: str,
    kind: type[TensorserveError],
    said: str,
) -> None:
    """Each with its exit code, and with what to do."""
    with (
        answering(monkeypatch, kms, (status, code)) as given,
        pytest.raises(kind, match=said) as caught,
    ):
        unwrapped(given, WrappedKey("awskms", "alias/models", "AAAA"), uri="awskms:")
    assert said in str(caught.value)


def test_nobody_there_is_69(monkeypatch: pytest.MonkeyPatch, kms: Kms) -> None:
    """After the deadline."""
    with answering(monkeypatch, kms, (200, "")) as given:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:9")
        with pytest.raises(SourceUnavailableError, match="cannot be reached"):
            unwrapped(given, WrappedKey("awskms", "alias/models", "AAAA"), uri="awskms:")


@pytest.mark.parametrize("key", ["alias/", "a b", "arn:aws:s3:::bucket", "alias/x?y", "../x"])
def test_what_is_no_key_is_refused(given: Services, key: str) -> None:
    """In --wrap; in a manifest it is no name of the own account."""
    with pytest.raises(ConfigurationError):
        for_wrapping(f"awskms:{key}", given)
    with pytest.raises(ConfigurationError):
        unwrapped(given, WrappedKey("awskms", key, "AAAA"), uri="awskms:")


def test_without_credentials_a_manifest_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """78, which says what it would need; with the URI it is 77."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    given = Services(s3=SourceSettings.from_environment({"AWS_REGION": "eu-west-9"}).s3)
    entry = WrappedKey("awskms", "alias/models", "AAAA")
    with pytest.raises(ConfigurationError, match="none of these can be asked"):
        unwrapped(given, entry, uri=None)
    with pytest.raises(PermissionDeniedError, match="no AWS credentials"):
        unwrapped(given, entry, uri="awskms:")


def test_the_plan_says_where() -> None:
    """The host, or the region."""
    given = Services(s3=SourceSettings.from_environment({"AWS_REGION": "eu-west-9"}).s3)
    for uri, said in (
        ("awskms:alias/m", "awskms:alias/m (in eu-west-9)"),
        ("awskms://kms.example/alias/m", "(in kms.example)"),
    ):
        assert said in shown(Reference.parse(uri, "the test"), given)
