"""Which model drafts, by the flags of `vllm serve`, and whether it is where vLLM will look."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorserve.config.draft_model import (
    PACKED,
    Draft,
    check_draft,
    draft_from,
    draft_of,
    is_in_the_model,
    local_bundle,
    with_draft,
)
from tensorserve.config.launch_plan import describe, make_plan
from tensorserve.config.settings import Settings
from tensorserve.config.vllm_arguments import parse_arguments
from tensorserve.errors import ConfigurationError

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
    ("words", "found"),
    [
        ((), None),
        ((flag(method="draft_model", model="/d"),), Draft("draft_model", "/d")),
        (("-sc", '{"model": "/d"}'), Draft(None, "/d")),
        (("--speculative_config", '{"model": "/d"}'), Draft(None, "/d")),
        (("--spec-method=eagle3", "--spec-model", "/d"), Draft("eagle3", "/d")),
        (("--speculative-config.model", "/d"), Draft(None, "/d")),
        (("-sc.model=/d", "-sc.method", "eagle"), Draft("eagle", "/d")),
        # Keys that are given one by one take the place of the object, as in vLLM.
        (("-sc.method=mtp", flag(method="eagle", model="/d")), Draft("mtp", None)),
        ((flag(method="mtp", num_speculative_tokens=1),), Draft("mtp", None)),
        # Where vLLM needs a model and none is named, it is the one packed with the bundle.
        ((flag(num_speculative_tokens=2),), Draft(None, PACKED)),
        ((flag(method="eagle3", num_speculative_tokens=2),), Draft("eagle3", PACKED)),
        ((flag(method="mtp", model="bundle:draft"),), Draft("mtp", PACKED)),
        (("--spec-tokens=2",), Draft(None, PACKED)),
        (("--speculative-config.num_speculative_tokens", "2"), Draft(None, PACKED)),
        # Without a model.
        ((flag(method="ngram", num_speculative_tokens=2),), None),
        ((flag(model="[ngram]"),), None),
        ((flag(method="suffix"),), None),
        ((flag(model="my_module.MyProposer"),), None),
        ((flag(method="custom_class", model="a.B"),), None),
    ],
)
def test_what_drafts_follows_from_the_flags(words: tuple[str, ...], found: Draft | None) -> None:
    """In each way in which vLLM takes it."""
    assert draft_of(parse_arguments(words)) == found


@pytest.mark.parametrize(
    ("words", "served"),
    [
        (("-sc", '{"method": "eagle"}'), (flag(method="eagle"), "--spec-model=/d")),
        (("--spec-tokens=2",), ("--spec-tokens=2", "--spec-model=/d")),
        ((flag(model=PACKED, max_model_len=9),), (flag(model="/d", max_model_len=9),)),
        ((flag(model=None, max_model_len=9),), (flag(model="/d", max_model_len=9),)),
        (("--speculative_config", '{"model": "bundle:draft"}'), (flag(model="/d"),)),
        (("--spec-model", PACKED, "--spec-tokens=2"), ("--spec-tokens=2", "--spec-model=/d")),
        ((f"--speculative-config.model={PACKED}",), (flag(model="/d"),)),
    ],
)  # fmt: skip
def test_vllm_is_told_where_the_packed_draft_is(
    words: tuple[str, ...], served: tuple[str, ...]
) -> None:
    """Once: vLLM refuses a model that is named twice."""
    assert with_draft(parse_arguments(words), "/d").words() == served


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('{"num_speculative_tokens": 2}', "packed with the bundle"),
        ('{"model": "/models/draft"}', "/models/draft"),
        ('{"method": "mtp"}', "in the served model"),
        ('{"method": "ngram"}', None),
    ],
)
def test_the_plan_says_where_the_draft_is(text: str, shown: str | None) -> None:
    """Before anything is looked at."""
    settings = Settings.from_environment(
        {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": text}
    )
    assert describe(make_plan(settings), settings).get("draft") == shown


def test_each_method_takes_its_model_from_where_vllm_would() -> None:
    """All that the installed vLLM has: none, the served model, or the packed draft."""
    from typing import get_args

    from vllm.config.speculative import MTPModelTypes, SpeculativeMethod

    def methods(kind: object) -> set[str]:
        return {m for one in get_args(kind) for m in (methods(one) or {one})}

    every = methods(SpeculativeMethod)
    inside = {method for method in every if is_in_the_model(method)}
    assert inside == {*get_args(MTPModelTypes), "dspark"}
    packed = {m for m in every if (d := draft_from({"method": m})) is not None and d.packed}
    assert packed == {"draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash"}


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
