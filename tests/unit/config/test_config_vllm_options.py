"""What a start has to know of vLLM's arguments, in each spelling, from variables and from words."""

from __future__ import annotations

from typing import Any

import pytest

from tensorserve.config.draft_model import Draft
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.ranks import Parallel
from tensorserve.config.settings import Settings
from tensorserve.config.vllm_arguments import parse_arguments
from tensorserve.config.vllm_options import VllmOptions, options_of

# (flag, its value, short names, the field that it fills, what is in it)
FLAGS: list[tuple[str, str | None, str, str, Any]] = [
    ("trust-remote-code", None, "", "remote_code", True),
    ("enable-lora", None, "", "lora", True),
    ("no-enable-lora", None, "", "lora", False),
    ("tensor-parallel-size", "2", "-tp", "parallel", Parallel(tensor=2)),
    ("pipeline-parallel-size", "2", "-pp", "parallel", Parallel(pipeline=2)),
    ("data-parallel-size", "2", "-dp", "parallel", Parallel(data=2)),
    ("data-parallel-size-local", "2", "-dpl", "parallel", Parallel(data_here=2)),
    ("nnodes", "2", "-n", "parallel", Parallel(nodes=2)),
    ("enable-expert-parallel", None, "-ep", "parallel", Parallel(experts=True)),
    ("distributed-executor-backend", "ray", "", "parallel", Parallel(by_ray=True)),
    ("data-parallel-backend", "ray", "-dpb", "parallel", Parallel(by_ray=True)),
    ("data-parallel-rank", "1", "-dpn", "parallel", Parallel(one_replica=True)),
    ("data-parallel-external-lb", None, "-dpe", "parallel", Parallel(one_replica=True)),
    ("shutdown-timeout", "60", "", "drain_seconds", 60),
    ("speculative-config", '{"model":"/d"}', "-sc", "draft", Draft(None, "/d")),
    ("spec-model", "/d", "", "draft", Draft(None, "/d")),
    ("spec-method", "mtp", "", "draft", Draft("mtp", None)),
    ("max-num-seqs", "8", "", "max_num_seqs", 8),
    ("dtype", "half", "", "dtype", "float16"),
    ("quantization", "fp8", "-q", "quantization", "fp8"),
    ("cpu-offload-gb", "4", "", "smaller_on_gpu", True),
    ("offload-group-size", "4", "", "smaller_on_gpu", True),
    ("offload-backend", "uva", "", "smaller_on_gpu", True),
    ("skip-tokenizer-init", None, "", "tokenizer", False),
    ("tokens-only", None, "", "tokenizer", False),
    ("hf-overrides", '{"a":1}', "", "hf_overrides", '{"a":1}'),
    ("pooler-config", "{}", "", "pooler", True),
    ("moe-backend", "triton", "", "moe_backend", True),
    ("kernel-config", "{}", "", "moe_backend", True),
    ("attention-backend", "FLASH_ATTN", "", "attention_backend", True),
    ("attention-config", "{}", "-ac", "attention_backend", True),
]


def spellings(flag: str, value: str | None, short: str) -> list[list[str]]:
    names = [f"--{flag}", f"--{flag.replace('-', '_')}", *([short] if short else [])]
    if value is None:
        return [[name] for name in names]
    return [words for name in names for words in ([name, value], [f"{name}={value}"])]


@pytest.mark.parametrize(("flag", "value", "short", "field", "found"), FLAGS)
def test_a_flag_means_the_same_in_each_spelling(
    flag: str, value: str | None, short: str, field: str, found: object
) -> None:
    """Underscores, "=", short names, a variable; and it changes what it is not given for."""
    default = getattr(VllmOptions(), field)
    assert default != found
    assert getattr(options_of(parse_arguments([])), field) == default
    for words in spellings(flag, value, short):
        assert getattr(options_of(parse_arguments(words)), field) == found, words
    name = flag.removeprefix("no-").upper().replace("-", "_")
    text = value or ("false" if flag.startswith("no-") else "true")
    environ = {"TENSORSERVE_MODEL_URI": "/m", f"TENSORSERVE_VLLM_{name}": text}
    plan = make_plan(Settings.from_environment(environ))
    assert getattr(plan.options, field) == found


@pytest.mark.parametrize(
    ("words", "field", "found"),
    [
        ("--trust-remote-code --no-trust-remote-code", "remote_code", False),
        ("--no-enable-lora --enable-lora", "lora", True),
        ("--shutdown-timeout 6 --shutdown_timeout=60", "drain_seconds", 60),
        ("--no-enable-expert-parallel", "parallel", Parallel()),
        ("--no-skip-tokenizer-init", "tokenizer", True),
        ("--moe-backend auto", "moe_backend", False),
        ("--kernel-config.moe_backend=triton", "moe_backend", True),
        ("-ac.mla_prefill_backend=FLASH_ATTN", "attention_backend", True),
        ("--hf_overrides.a 1", "hf_overrides", '{"a": 1}'),
        ("--dtype auto", "dtype", None),
        ("--pipeline-parallel 2", "parallel", Parallel(pipeline=2)),
    ],
)
def test_the_last_one_counts(words: str, field: str, found: object) -> None:
    """As in vLLM; and what switches something off is no wish for it."""
    assert getattr(options_of(parse_arguments(words.split())), field) == found


def test_arguments_win_over_variables() -> None:
    """For what a start knows as well."""
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_VLLM_SHUTDOWN_TIMEOUT": "6"}
    settings = Settings.from_environment(environ)
    assert make_plan(settings).options.drain_seconds == 6
    assert make_plan(settings, ("--shutdown_timeout=60",)).options.drain_seconds == 60
