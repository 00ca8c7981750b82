"""Which model drafts, by the flags of `vllm serve`, and whether it is where vLLM will look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorserve.drafts import Draft, check_draft, draft_of, local_bundle
from tensorserve.errors import ConfigurationError
from tensorserve.plan import make_plan
from tensorserve.settings import Settings

OFFLINE = {"HF_HUB_OFFLINE": "1"}


def flag(**options: object) -> str:
    return f"--speculative-config={json.dumps(options)}"


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A Hugging Face directory, as far as it is looked at."""
    directory = tmp_path / "draft"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(1000))
    return directory


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ((), None),
        ((flag(method="draft_model", model="/d"),), Draft("draft_model", "/d")),
        (("-sc", '{"model": "/d"}'), Draft(None, "/d")),
        (("--speculative_config", '{"model": "/d"}'), Draft(None, "/d")),
        (("--spec-method=eagle3", "--spec-model", "/d"), Draft("eagle3", "/d")),
        (("--speculative-config.model", "/d"), Draft(None, "/d")),
        ((flag(method="mtp", num_speculative_tokens=1),), Draft("mtp", None)),
        # Without a model.
        ((flag(method="ngram", num_speculative_tokens=2),), None),
        ((flag(model="[ngram]"),), None),
        ((flag(method="suffix"),), None),
        ((flag(model="my_module.MyProposer"),), None),
        ((flag(method="custom_class", model="a.B"),), None),
    ],
)
def test_what_drafts_follows_from_the_flags(argv: tuple[str, ...], found: Draft | None) -> None:
    """In each way in which vLLM takes it."""
    assert draft_of(("vllm", "serve", "/m", *argv)) == found


@pytest.mark.parametrize("text", ["/models/draft", "{", "[1]", "3"])
def test_what_vllm_could_not_read_is_refused_with_the_plan(text: str) -> None:
    """Before anything else is looked at; with an example."""
    settings = Settings.from_environment(
        {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": text}
    )
    with pytest.raises(ConfigurationError, match="--speculative-config is no JSON"):
        make_plan(settings)


def test_a_directory_is_enough(draft: Path) -> None:
    """Its weights take memory, too."""
    assert check_draft(Draft(None, str(draft)), "s3://b/m", OFFLINE) == (str(draft), 1000)


def test_a_relative_directory_is_one(draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM sees it, not a name of the hub."""
    monkeypatch.chdir(draft.parent)
    assert check_draft(Draft(None, "draft"), "s3://b/m", OFFLINE)[1] == 1000


@pytest.mark.parametrize(
    "uri", ["{0}", "{0}/", "file://{0}", "{0}/model.tensors", "file://{0}/model.tensors"]
)
def test_the_bundles_own_directory_holds_its_draft(tmp_path: Path, uri: str) -> None:
    """Its weights are in the bundle: no safetensors are looked for."""
    (tmp_path / "model.tensors").write_bytes(b"")
    found = check_draft(Draft("mtp", str(tmp_path)), uri.format(tmp_path), OFFLINE)
    assert found == ("in the bundle", 0)


def test_a_bundle_elsewhere_is_in_no_directory() -> None:
    assert local_bundle("s3://bucket/model") is None
    assert local_bundle("https://host/model.tensors") is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/models/none", "does not exist"),
        ("../none", "does not exist"),
        ("a/b/c", "does not exist"),
        ("s3://bucket/draft", "takes a directory"),
        ("org/draft", "not in the hub's cache"),
        ("draft", "not in the hub's cache"),
    ],
)
def test_a_draft_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, words: str
) -> None:
    """78, and what to do."""
    monkeypatch.chdir(tmp_path)
    environ = OFFLINE | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    with pytest.raises(ConfigurationError, match=words) as raised:
        check_draft(Draft(None, model), "s3://b/m", environ)
    assert raised.value.hint


def test_a_draft_of_the_hub_may_be_in_its_cache(tmp_path: Path) -> None:
    """As the hub's own library keeps it."""
    cached = tmp_path / "models--org--draft"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "config.json").write_text("{}")
    environ = OFFLINE | {"HF_HUB_CACHE": str(tmp_path)}
    assert check_draft(Draft(None, "org/draft"), "s3://b/m", environ) == ("org/draft", 0)


def test_where_the_hub_may_be_asked_nothing_is_refused() -> None:
    """The user's own wish (TENSORSERVE_PASS_ENV, HF_HUB_OFFLINE=0)."""
    check_draft(Draft(None, "org/draft"), "s3://b/m", {"HF_HUB_OFFLINE": "0"})


@pytest.mark.parametrize(
    ("gone", "words"), [("config.json", "no config.json"), ("model.safetensors", "no weights")]
)
def test_a_directory_that_is_no_model_is_refused(draft: Path, gone: str, words: str) -> None:
    (draft / gone).unlink()
    with pytest.raises(ConfigurationError, match=words):
        check_draft(Draft(None, str(draft)), "s3://b/m", OFFLINE)


def test_that_a_draft_is_a_bundle_is_said(draft: Path) -> None:
    """vLLM reads it, not we."""
    (draft / "model.safetensors").rename(draft / "model.tensors")
    with pytest.raises(ConfigurationError, match="It is a bundle"):
        check_draft(Draft(None, str(draft)), "s3://b/m", OFFLINE)
