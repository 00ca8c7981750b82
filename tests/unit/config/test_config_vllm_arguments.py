"""Arguments of `vllm serve`: read as the installed vLLM's own parser reads them."""

from __future__ import annotations

from typing import Any

import pytest

from tensorserve.config.vllm_arguments import Argument, Arguments, parse_arguments
from tensorserve.errors import ConfigurationError

# Everything that FlexibleArgumentParser and argparse below it make the same.
SPELLINGS = [
    "",
    "-pp 2",
    "-pp=2",
    "--pipeline-parallel-size 2",
    "--pipeline-parallel-size=2",
    "--pipeline_parallel_size 2",
    "--pipeline_parallel-size=2",
    "--pipeline-parallel 2",
    "--pipeline_par=2",
    "-pp 4 --pipeline_parallel_size=2",
    "--trust-remote-code",
    "--trust_remote_code",
    "--trust-remote",
    "--no-trust-remote-code",
    "--no_trust_remote_code",
    "--no-trust-remote",
    "--trust-remote-code --no-trust-remote-code",
    "-ep",
    "-e",
    "--enable_expert_parallel",
    "-n2",
    "-n=2",
    "-n 2",
    "--nnodes=2",
    "-qfp8",
    "-q=fp8",
    "-q fp8",
    "--quantization fp8",
    "-tp 2 -dp=4 -dpl 2",
    "--shutdown-timeout 6 --shutdown_timeout=60",
    "--max-logprobs -1",
    "--max-logprobs=-1",
    "-O3",
    "-O=3",
    "-O 3",
    "--optimization-level 3",
    "--optimization_level=3",
    '-sc {"method":"mtp"}',
    '-s {"method":"mtp"}',
    '--speculative_config={"method":"mtp"}',
    "-sc.method=mtp",
    "-sc.method mtp",
    "--speculative-config.method mtp",
    "--speculative_config.num_speculative_tokens=3",
    "--speculative-config.a.b 1 --speculative-config.a.c 2k",
    "--speculative-config.a+ x --speculative-config.a+=y,z",
    '-sc.method=mtp --speculative-config {"model":"x"}',
    "--spec-model x --spec-tokens 3",
    "-cc.mode=3",
    "--kernel_config.moe_backend=triton",
    "--hf-overrides.a 1.5",
    "--lora-modules a=b c=d",
    "--lora-modules=a=b",
    "--lora-modules a=b --lora-modules c=d",
    "--enable-lora --max-lora-rank=64",
    "--no-enable-lora",
    "--middleware a --middleware b",
    "--grpc",
    "-dpm",
    "-dpe",
    "--data-parallel-rank 1",
    "--gpu-memory-utilization .5",
    "--uds /run/a.sock",
    "--chat-template /t_t.jinja",
    "--ssl-cert-reqs=2",
]


@pytest.fixture(scope="module")
def vllms() -> Any:
    """vLLM's own parser, which gives what the words make of its settings."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    return lambda words: repr(sorted(vars(parser.parse_args(["/m", *words])).items()))


@pytest.mark.parametrize("words", SPELLINGS)
def test_vllm_is_given_what_it_would_have_read(vllms: Any, words: str) -> None:
    """Its own parser makes the same of our words as of the user's."""
    given = words.split()
    assert vllms(parse_arguments(given).words()) == vllms(given)


@pytest.mark.parametrize(
    "words",
    [
        "-tp2",
        "-pp",
        "-p 2",
        "-tp -tp",
        "--data-p 2",
        "--trust-remote-code=true",
        "--trust-remote-code true",
        "--no-trust-remote-code=1",
        "--max-logprobs -1e3",
        "--nnodes",
        "-d 1",
        "--pipeline-parallel-sizes 2",
        "-O",
        "--grpc=1",
        "-xyz",
        "--",
    ],
)
def test_what_vllm_refuses_is_refused(vllms: Any, words: str) -> None:
    """Before a model is loaded, and with a message of ours. vLLM takes a lone `--` for nothing."""
    if words != "--":
        with pytest.raises(SystemExit):
            vllms(words.split())
    with pytest.raises(ConfigurationError):
        parse_arguments(words.split())


def test_a_value_may_be_anything(vllms: Any) -> None:
    """Words with spaces, an empty one, and JSON with dots, dashes and underscores in it."""
    for value in ("", "a b", "- a", '{"a_b.c": "--d_e=f"}', "a=b", "-1", "-.5", "-"):
        for given in (["--chat-template", value], [f"--chat-template={value}"]):
            read = parse_arguments(given)
            assert read == Arguments((Argument("chat-template", (value,)),))
            assert vllms(read.words()) == vllms([f"--chat-template={value}"])


def test_a_list_of_values_keeps_its_words() -> None:
    """One that begins with a dash is joined to the flag, or it would be taken for a flag."""
    assert Argument("api-key", ("a", "b")).words() == ("--api-key", "a", "b")
    assert Argument("api-key", ("-a",)).words() == ("--api-key=-a",)


def test_no_value_of_a_secret_is_in_a_message() -> None:
    """The flag's name says enough."""
    for words in (["--api-kye", "canary"], ["--api-kye=canary"]):
        with pytest.raises(ConfigurationError) as caught:
            parse_arguments(words)
        assert "canary" not in str(caught.value)
