"""kbs: against a stand-in that answers as CoCo's api-server-rest does; no real guest was asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from key_stand_ins import DataHub
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
from tensorserve.wrapping.providers import for_wrapping, shown
from tensorserve.wrapping.unwrap import unwrap_key

MODEL_KEY = bytes(range(32))
BINDING = Binding("aa" * 32, fingerprint_of(MODEL_KEY))
QUICK = RetryPolicy(deadline=60.0, backoff_base=0.001, backoff_cap=0.01)
WRAPPING = bytes(range(9, 41))
RESOURCE = "default/wrapping-key/models"


@pytest.fixture
def hub() -> Iterator[DataHub]:
    """A guest's hub, whose broker has the wrapping key."""
    with DataHub() as server:
        server.resources[RESOURCE] = WRAPPING
        yield server


@pytest.fixture
def entry(tmp_path: Path) -> WrappedKey:
    """The model's key, wrapped with the wrapping key in a file, as the packing machine does."""
    (tmp_path / "wrapping").write_text(WRAPPING.hex() + "\n")
    by = for_wrapping(f"file:{tmp_path / 'wrapping'}", Services())
    return WrappedKey(by.kind, by.key, by.wrap(Secret(MODEL_KEY), BINDING))


def given(hub: DataHub) -> Services:
    return replace(services_for(SourceSettings.from_environment(hub.environ)), policy=QUICK)


def unwrapped(hub: DataHub, *entries: WrappedKey, uri: str = f"kbs:///{RESOURCE}") -> bytes:
    reference = Reference.parse(uri, "the test")
    found = unwrap_key(entries, BINDING, reference, given(hub), "manifest.json")
    assert found.proves_sender
    assert found.by == f"kbs:///{RESOURCE} at {hub.url}"
    return found.key.reveal()


@pytest.mark.parametrize("form", ["raw", "hex"])
def test_the_resource_unwraps_what_the_file_wrapped(
    hub: DataHub, entry: WrappedKey, form: str
) -> None:
    """The broker has the wrapping key in any form that a file may have; it is asked once."""
    hub.resources[RESOURCE] = WRAPPING if form == "raw" else WRAPPING.hex().encode() + b"\n"
    other = replace(entry, key="0" * 16)
    age = WrappedKey("age", "age1x", "AAAA")
    assert unwrapped(hub, age, other, entry) == MODEL_KEY
    assert unwrapped(hub, entry, uri=f"kbs:{RESOURCE}") == MODEL_KEY
    assert hub.asked == [f"/cdh/resource/{RESOURCE}"] * 2


def test_no_proxy_gets_the_key(
    hub: DataHub, entry: WrappedKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says: it would be in clear there."""
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert unwrapped(hub, entry) == MODEL_KEY


def test_it_is_bound_to_its_bundle(hub: DataHub, entry: WrappedKey) -> None:
    """As any key that is wrapped with a wrapping key."""
    reference = Reference.parse(f"kbs:///{RESOURCE}", "the test")
    other = replace(BINDING, manifest="bb" * 32)
    with pytest.raises(WrongKeyError, match="another bundle"):
        unwrap_key([entry], other, reference, given(hub), "manifest.json")


def test_another_wrapping_key_is_said(hub: DataHub, entry: WrappedKey) -> None:
    """65, with both names and no key."""
    hub.resources[RESOURCE] = bytes(32)
    with pytest.raises(WrongKeyError, match=f"wrapped for file:{entry.key}") as caught:
        unwrapped(hub, entry)
    assert WRAPPING.hex() not in str(caught.value)
    with pytest.raises(WrongKeyError, match="is not wrapped for kbs:"):
        unwrapped(hub, WrappedKey("vault", "transit/models", "vault:v1:AAAA"))


def test_a_resource_that_is_no_key_is_said(hub: DataHub, entry: WrappedKey) -> None:
    """78, without what is in it."""
    hub.resources[RESOURCE] = b"canary"
    with pytest.raises(ConfigurationError, match="is not 32 bytes") as caught:
        unwrapped(hub, entry)
    assert "canary" not in str(caught.value)


def test_a_hub_that_does_not_get_it_is_asked_some_times(hub: DataHub, entry: WrappedKey) -> None:
    """A guest whose agents are starting, and a broker that refuses, are both 500: then 69."""
    with pytest.raises(SourceUnavailableError, match="KBS: resource not found") as caught:
        unwrapped(hub, entry, uri="kbs:///default/wrapping-key/none")
    assert "policy" in str(caught.value.hint)
    assert len(hub.asked) == 6


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (403, PermissionDeniedError, "its own guest alone"),
        (404, ConfigurationError, "guest_components_rest_api"),
        (405, SourceUnavailableError, "405"),
        (302, SourceUnavailableError, "302"),
    ],
)
def test_what_a_refusal_means(
    hub: DataHub, entry: WrappedKey, status: int, kind: type[TensorserveError], said: str
) -> None:
    """Each with its exit code."""
    hub.refuse = (status, b"")
    with pytest.raises(kind, match=said):
        unwrapped(hub, entry)


def test_nobody_there_is_69(entry: WrappedKey, told: list[str]) -> None:
    """Outside of a confidential guest, after the deadline; a line says what is waited for."""
    policy = replace(QUICK, deadline=0.5)
    services = Services(cdh_url="http://127.0.0.1:9", policy=policy)
    reference = Reference.parse(f"kbs:///{RESOURCE}", "the test")
    with pytest.raises(SourceUnavailableError, match=r"no connection to 127\.0\.0\.1:9"):
        unwrap_key([entry], BINDING, reference, services, "manifest.json")
    assert len(told) == 1


def test_nothing_is_wrapped_through_a_broker(hub: DataHub) -> None:
    """78, and what to do instead."""
    with pytest.raises(ConfigurationError, match="nothing is wrapped") as caught:
        for_wrapping(f"kbs:///{RESOURCE}", given(hub))
    assert "--wrap file:PATH" in str(caught.value.hint)
    assert hub.asked == []


@pytest.mark.parametrize(
    "text", ["", "///", "///a/b", "///a/b/c/d", "///a/../c", "///a/b/c?d", "//host/a/b/c",
             "///a/b/c%2e", "a b/c/d"],
)  # fmt: skip
def test_what_is_no_resource_is_refused(hub: DataHub, entry: WrappedKey, text: str) -> None:
    """For a start and for `plan`; a broker's address is the guest's matter."""
    with pytest.raises(ConfigurationError):
        unwrapped(hub, entry, uri=f"kbs:{text}")
    with pytest.raises(ConfigurationError):
        shown(Reference.parse(f"kbs:{text}", "the test"), given(hub))
    assert hub.asked == []


@pytest.mark.parametrize(
    "url",
    ["https://127.0.0.1:8006", "http://10.0.0.1:8006", "http://127.0.0.1:8006/x", "127.0.0.1:8006",
     "http://u:p@127.0.0.1", "http://127.0.0.1.evil.net", "http://127.0.0.1:99999"],
)  # fmt: skip
def test_the_hub_is_on_this_machine(url: str) -> None:
    """78: its answer is a key in clear."""
    with pytest.raises(ConfigurationError, match="TENSORSERVE_CDH_URL"):
        SourceSettings.from_environment({"TENSORSERVE_CDH_URL": url})


def test_the_plan_says_where(hub: DataHub) -> None:
    """And whose recipients it opens."""
    reference = Reference.parse(f"kbs:///{RESOURCE}", "the test")
    text = shown(reference, Services())
    assert "recipients of `file:`, by the Confidential Data Hub at http://127.0.0.1:8006" in text
    assert hub.url in shown(reference, given(hub))
