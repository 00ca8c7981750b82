"""gcpkms: against a stand-in that does the real cryptography; Google itself was not asked."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace

import pytest

from key_stand_ins import GoogleKms
from tensorserve.config.access import services_for
from tensorserve.config.settings import SourceSettings
from tensorserve.crypto.crc32c import crc32c
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
QUICK = RetryPolicy(deadline=0.2, backoff_base=0.01, backoff_cap=0.05)
NAME = "projects/p/locations/global/keyRings/r/cryptoKeys/models"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleKms]:
    """With the key `models`."""
    with GoogleKms(tmp_path_factory.mktemp("kms")) as running:
        running.make_key("models")
        yield running


@pytest.fixture
def kms(server: GoogleKms, monkeypatch: pytest.MonkeyPatch) -> GoogleKms:
    """The environment that asks it."""
    server.reset()
    for name in ("GOOGLE_CLOUD_QUOTA_PROJECT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environ.items():
        monkeypatch.setenv(name, value)
    return server


GIVEN = replace(services_for(SourceSettings.from_environment({})), policy=QUICK)


def wrapped(kms: GoogleKms, name: str = NAME, binding: Binding = BINDING) -> WrappedKey:
    by = for_wrapping(f"gcpkms://{kms.host}/{name}", GIVEN)
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), binding))


def unwrapped(
    kms: GoogleKms, *entries: WrappedKey, name: str = NAME, given: Services = GIVEN
) -> bytes:
    reference = Reference.parse(f"gcpkms://{kms.host}/{name}", "the test")
    found = unwrap_key(entries, BINDING, reference, given, "manifest.json")
    assert found.proves_sender
    return found.key.reveal()


def test_what_kms_wraps_it_unwraps(kms: GoogleKms) -> None:
    """By the key's full name, which the manifest has."""
    entry = wrapped(kms)
    assert entry.key == NAME
    assert unwrapped(kms, entry) == MODEL_KEY
    assert kms.asked == [f"/v1/{NAME}:encrypt", f"/v1/{NAME}:decrypt"]


def test_it_is_bound_to_its_bundle(kms: GoogleKms) -> None:
    """As additional authenticated data, with the manifest's salt and the key's fingerprint."""
    for other in (replace(BINDING, manifest="bb" * 32), replace(BINDING, key="bb" * 32)):
        with pytest.raises(WrongKeyError, match="another bundle"):
            unwrapped(kms, wrapped(kms, binding=other))


def test_another_key_and_damage_are_refused(kms: GoogleKms) -> None:
    """65; what is no base64 is not even sent."""
    entry, other = wrapped(kms), kms.make_key("other")
    with pytest.raises(WrongKeyError, match="The model's key is not wrapped for gcpkms:"):
        unwrapped(kms, entry, name=other)
    kms.asked.clear()
    with pytest.raises(WrongKeyError):
        unwrapped(kms, replace(entry, wrapped="!"))
    assert kms.asked == []
    for wrong in (f"{entry.wrapped[:-8]}AAAAAAA=", "AAAA"):
        with pytest.raises(WrongKeyError):
            unwrapped(kms, replace(entry, wrapped=wrong))


def _flipped(text: str) -> str:
    data = bytearray(base64.b64decode(text))
    data[3] ^= 1
    return base64.b64encode(data).decode()


def test_damage_on_the_way_is_asked_for_again(
    kms: GoogleKms, monkeypatch: pytest.MonkeyPatch, told: list[str]
) -> None:
    """CRC32C both ways: the same request again, within the deadline; then 69."""
    entry = wrapped(kms)

    def damage_once(answer: dict[str, str]) -> None:
        if len(kms.asked) == 1:
            answer["plaintext"] = _flipped(answer["plaintext"])

    kms.asked.clear()
    kms.change = damage_once
    patient = replace(GIVEN, policy=replace(QUICK, deadline=60.0))
    assert unwrapped(kms, entry, given=patient) == MODEL_KEY
    assert len(kms.asked) == 2
    assert "CRC32C" in told[0]
    monkeypatch.setattr("tensorserve.wrapping.gcpkms.crc32c", lambda data: crc32c(data) ^ 1)
    with pytest.raises(SourceUnavailableError, match="CRC32C"):
        unwrapped(kms, entry)


@pytest.mark.parametrize("field", ["Plaintext", "AdditionalAuthenticatedData"])
def test_an_unverified_request_wraps_nothing(kms: GoogleKms, field: str) -> None:
    """KMS has to say that it got what was sent."""
    kms.change = lambda answer: answer.pop(f"verified{field}Crc32c")
    with pytest.raises(SourceUnavailableError, match="CRC32C"):
        wrapped(kms)


def test_a_missing_key_is_said(kms: GoogleKms) -> None:
    """78, with the name that was asked for."""
    with pytest.raises(ConfigurationError, match="no such key") as caught:
        wrapped(kms, NAME.replace("models", "none"))
    assert "cryptoKeys/none" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [
        (403, "PERMISSION_DENIED", PermissionDeniedError, "roles/cloudkms.cryptoKeyDecrypter"),
        (401, "UNAUTHENTICATED", PermissionDeniedError, "UNAUTHENTICATED"),
        (400, "FAILED_PRECONDITION", PermissionDeniedError, "cannot be used"),
        (400, "INVALID_ARGUMENT", ConfigurationError, "symmetric encryption"),
        (429, "RESOURCE_EXHAUSTED", SourceUnavailableError, "429"),
        (503, "UNAVAILABLE", SourceUnavailableError, "503"),
        (302, "", SourceUnavailableError, "302"),
    ],
)
def test_what_a_refusal_means(
    kms: GoogleKms, status: int, code: str, kind: type[TensorserveError], said: str
) -> None:
    """Each with its exit code, Google's words, and what to grant."""
    entry = wrapped(kms)
    kms.refuse = (status, {"error": {"code": status, "status": code, "message": "as it says"}})
    with pytest.raises(kind, match=said) as caught:
        unwrapped(kms, entry)
    assert NAME in str(caught.value)
    if status in {400, 401, 403}:
        assert "as it says" in str(caught.value)
    text = f"{caught.value}{caught.value.__cause__}"
    assert kms.token not in text
    assert entry.wrapped[8:40] not in text


@pytest.mark.parametrize(
    "answer", [{}, {"plaintext": 1}, {"plaintext": "!"}, {"plaintext": "AAAA"}]
)
def test_what_is_no_kms_is_69(kms: GoogleKms, answer: dict[str, object]) -> None:
    """Another service at the address: a message, no traceback."""
    entry = wrapped(kms)
    kms.refuse = (200, answer)
    with pytest.raises(SourceUnavailableError):
        unwrapped(kms, entry)


def test_a_certificate_that_is_not_trusted_is_69(
    kms: GoogleKms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is sent."""
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SourceUnavailableError, match="TLS with 127"):
        wrapped(kms)
    assert kms.asked == []


@pytest.mark.parametrize(
    "text",
    ["", "models", f"{NAME}/cryptoKeyVersions/1", f"{NAME}?x", NAME.replace("/p/", "/../"),
     NAME.replace("global", ".."), f"//h@st/{NAME}", f"//host/path/{NAME}", "//projects/p"],
)  # fmt: skip
def test_what_is_no_key_is_refused(text: str) -> None:
    """In --wrap, and for `plan`."""
    with pytest.raises(ConfigurationError):
        for_wrapping(f"gcpkms:{text}", GIVEN)
    with pytest.raises(ConfigurationError):
        shown(Reference.parse(f"gcpkms:{text}", "the test"), GIVEN)


def test_a_manifest_asks_nobody(kms: GoogleKms) -> None:
    """A key of a project of his own is anybody's: TENSORSERVE_KEY_URI names it, or nobody does."""
    entry = wrapped(kms)
    kms.asked.clear()
    with pytest.raises(ConfigurationError, match="none of these can be asked"):
        unwrap_key([entry], BINDING, None, GIVEN, "manifest.json")
    assert kms.asked == []


def test_the_plan_says_where() -> None:
    """Google's own endpoint, or the one that is named; written in either way."""
    for text in (f"gcpkms:{NAME}", f"gcpkms://{NAME}", f"gcpkms:///{NAME}"):
        assert "(at cloudkms.googleapis.com, with Google's" in shown(
            Reference.parse(text, "the test"), GIVEN
        )
    reference = Reference.parse(f"gcpkms://kms.example/{NAME}", "the test")
    assert "(at kms.example," in shown(reference, GIVEN)
