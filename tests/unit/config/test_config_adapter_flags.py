"""What TENSORSERVE_ADAPTERS_URI adds to vLLM's arguments, and what contradicts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.config.adapter_flags import MIDDLEWARE
from tensorserve.config.launch_plan import (
    API_KEY_MIDDLEWARE,
    LaunchPlan,
    describe,
    make_plan,
    with_adapters,
)
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError

URI = {
    "TENSORSERVE_MODEL_URI": "s3://models/vllm/m/v1",
    "TENSORSERVE_ADAPTERS_URI": "s3://models/adapters",
}


def plan_of(*arguments: str, **environ: str) -> LaunchPlan:
    return make_plan(Settings.from_environment(URI | environ), arguments)


def test_lora_is_switched_on_and_said() -> None:
    """With more than vLLM's one slot; a variable takes the place of each."""
    plan = plan_of()
    added = ("--enable-lora", "--max-loras=4", "--max-lora-rank=32", "--max-cpu-loras=16")
    assert plan.chosen_for_adapters == added
    assert set(added) < set(plan.argv)
    assert plan.options.lora is True
    shown = describe(plan, Settings.from_environment(URI))["adapters"]
    assert isinstance(shown, dict)
    assert shown["flags added"] == " ".join(added)
    assert shown["from"] == "s3://models/adapters"
    assert dict(plan.environment)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_without_the_variable_nothing_is_added() -> None:
    """Nor is vLLM's resolver interface switched on."""
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m"})
    plan = make_plan(settings)
    assert plan.chosen_for_adapters == ()
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in dict(plan.environment)
    assert "adapters" not in describe(plan, settings)


def test_what_the_user_gives_wins() -> None:
    """By variable, or behind `--`."""
    plan = plan_of("--max_loras", "32", TENSORSERVE_VLLM_MAX_LORA_RANK="64")
    assert plan.chosen_for_adapters == ("--enable-lora", "--max-cpu-loras=32")


def test_the_number_of_adapters_is_that_of_vllms_cache() -> None:
    """Else it reads one again whenever it is the next one's turn."""
    assert "--max-cpu-loras=99" in plan_of(TENSORSERVE_ADAPTERS_COUNT="99").argv


def test_adapters_of_the_bundle_may_have_a_larger_rank() -> None:
    """The one that was chosen here gives way; the user's does not."""
    big = [("sql", Path("/sql"), 100)]
    assert "--max-lora-rank=128" in with_adapters(plan_of(), big).argv
    small = [("sql", Path("/sql"), 24)]
    assert "--max-lora-rank=32" in with_adapters(plan_of(), small).argv
    given = with_adapters(plan_of("--max-lora-rank", "64"), big).argv
    assert "--max-lora-rank=64" in given
    assert "--max-lora-rank=128" not in given


def test_the_api_key_is_asked_for_first() -> None:
    """vLLM calls the last middleware first."""
    plan = plan_of(TENSORSERVE_VLLM_API_KEY="secret-of-the-api")
    given = [word for word in plan.argv if word.startswith("--middleware")]
    assert given == [f"--middleware={MIDDLEWARE}", f"--middleware={API_KEY_MIDDLEWARE}"]


def test_one_api_server_where_vllm_would_start_several() -> None:
    """Of several, one would know an adapter and the others would not."""
    assert "--api-server-count=1" in plan_of("--data-parallel-size", "2").argv
    assert not [word for word in plan_of().argv if "api-server-count" in word]


CONTRADICTIONS = {
    "LoRA is off": ((), {"TENSORSERVE_VLLM_ENABLE_LORA": "false"}, "LoRA is switched off"),
    "servers": (("--api-server-count", "2"), {}, "--api-server-count is 2"),
    "machines": (("--nnodes", "2"), {}, "on 2 machines"),
    "gRPC": (("--grpc",), {}, "--grpc"),
    "headless": (("--headless",), {}, "--headless"),
    "Rust": ((), {"VLLM_USE_RUST_FRONTEND": "1"}, "VLLM_USE_RUST_FRONTEND"),
    "routes": ((), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, "load any directory"),
    "routes off": ((), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"}, "are both set"),
    "a directory": ((), {"VLLM_LORA_RESOLVER_CACHE_DIR": "/x"}, "nobody has authenticated"),
    "the hub": ((), {"VLLM_LORA_RESOLVER_HF_REPO_LIST": "a/b"}, "nobody has authenticated"),
}


@pytest.mark.parametrize(
    ("arguments", "environ", "said"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys()
)
def test_what_contradicts_it_is_refused(
    arguments: tuple[str, ...], environ: dict[str, str], said: str
) -> None:
    """With 78, and what to do."""
    with pytest.raises(ConfigurationError, match=said) as caught:
        plan_of(*arguments, **environ)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("TENSORSERVE_ADAPTERS_URI", "ftp://x/y", "'ftp' is not supported"),
        ("TENSORSERVE_ADAPTERS_ALLOW", "../x", "neither an adapter's name"),
        ("TENSORSERVE_ADAPTERS_ALLOW", "a/b", "neither an adapter's name"),
        ("TENSORSERVE_ADAPTERS_TTL", "0", "not a number of seconds"),
        ("TENSORSERVE_ADAPTERS_COUNT", "0", "not a whole number"),
        ("TENSORSERVE_ADAPTERS_MEMORY", "much", "is not a size"),
        ("TENSORSERVE_ADAPTERS_MEMORY", "0", "less than 1MiB"),
        ("TENSORSERVE_ADAPTERS_KEY", "short", "is not a 32-byte key"),
        ("TENSORSERVE_ADAPTER_URI", "s3://x", "Did you mean TENSORSERVE_ADAPTERS_URI?"),
    ],
)
def test_values_that_mean_nothing_are_refused(name: str, value: str, said: str) -> None:
    """No secret is in the message."""
    with pytest.raises(ConfigurationError) as caught:
        Settings.from_environment(URI | {name: value})
    assert said in "\n".join(caught.value.problems)


def test_settings_of_adapters_need_the_place_where_they_are() -> None:
    """A misspelt URI must not switch them off unseen."""
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_ADAPTERS_ALLOW": "sql"}
    with pytest.raises(ConfigurationError, match="TENSORSERVE_ADAPTERS_URI is not"):
        Settings.from_environment(environ)


def test_plan_says_where_the_key_comes_from_and_not_the_key() -> None:
    """As of all keys."""
    environ = URI | {"TENSORSERVE_ADAPTERS_KEY": "ab" * 32}
    settings = Settings.from_environment(environ)
    described = describe(make_plan(settings), settings)
    assert "ab" * 32 not in str(described)
    assert "adapters' key" in str(described["secrets_in_memory"])
    assert "from TENSORSERVE_ADAPTERS_KEY" in str(described["adapters"])
