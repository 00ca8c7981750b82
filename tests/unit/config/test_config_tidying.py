"""What slips in around a value, and what is done with it."""

from __future__ import annotations

import pytest

from tensorserve.config.tidying import has_controls, tidied, tidy_process

URI = "TENSORSERVE_MODEL_URI"


@pytest.mark.parametrize("name", [URI, "AWS_REGION", "S3_ENDPOINT_URL", "TENSORSERVE_VLLM_DTYPE"])
@pytest.mark.parametrize(
    "text", ["x", "x\n", "x\r\n", " x ", "\tx", "\u00a0x\u00a0", "\ufeffx", "\u200bx\n\ufeff"]
)
def test_white_space_around_a_value_is_none_of_it(name: str, text: str) -> None:
    """Line ends of two systems, hard spaces, byte order marks."""
    assert tidied({name: text}) == {name: "x"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('"s3://b/m"', "s3://b/m"),
        ("'s3://b/m' \r\n", "s3://b/m"),
        ("\"'x'\"", "x"),
        ('" x "', "x"),
        ("'[1]'", "[1]"),
        ('"', '"'),
        ('"a" "b"', '"a" "b"'),
        ('{"a": "b"}', '{"a": "b"}'),
        ('"a', '"a'),
    ],
)
def test_quotes_around_a_value_are_none_of_it(text: str, value: str) -> None:
    """`docker run --env-file` keeps them, Compose does not."""
    assert tidied({URI: text}) == {URI: value}
    assert tidied(tidied({URI: text})) == {URI: value}


@pytest.mark.parametrize("text", ["", " ", "\r\n", '""', "' '"])
def test_an_empty_value_is_as_if_unset(text: str) -> None:
    """Compose's NAME: ${NAME:-}; with AWS's names, a role is meant."""
    names = (URI, "AWS_PROFILE", "S3_ACCESS_KEY_ID", "HF_HOME", "SSL_CERT_FILE", "VLLM_API_KEY")
    assert tidied(dict.fromkeys(names, text)) == {}


def test_an_empty_value_that_means_something_stays() -> None:
    """No GPU, no plugin, no proxy in spite of HTTPS_PROXY."""
    environ = {"CUDA_VISIBLE_DEVICES": "", "VLLM_PLUGINS": "", "https_proxy": "", "NO_PROXY": ""}
    assert tidied(environ) == environ


def test_a_passphrase_loses_its_line_end_alone() -> None:
    """Spaces and quotes may be part of it, as they are in a file."""
    assert tidied({"TENSORSERVE_PASSPHRASE": ' "a b" \r\n'}) == {
        "TENSORSERVE_PASSPHRASE": ' "a b" '
    }


def test_a_chat_template_keeps_its_spaces() -> None:
    """They are in every prompt; the path of a template has none around it."""
    name, template = "TENSORSERVE_VLLM_CHAT_TEMPLATE", " {{ messages }} \n"
    assert tidied({name: template}) == {name: template}
    assert tidied({name: "/t.jinja\r\n"}) == {name: "/t.jinja"}


def test_a_tilde_is_the_home_directory() -> None:
    """No shell has seen a value of an environment file; other values may begin with one."""
    environ = {"HOME": "/home/a", URI: "~/m", "TENSORSERVE_KEY_FILE": "~/k", "AWS_PROFILE": "~/x"}
    assert tidied(environ) == {
        "HOME": "/home/a",
        URI: "/home/a/m",
        "TENSORSERVE_KEY_FILE": "/home/a/k",
        "AWS_PROFILE": "~/x",
    }
    assert tidied({"HOME": "/home/a", URI: "~other/m"})[URI] == "~other/m"


def test_the_process_is_tidied_for_libraries() -> None:
    """botocore reads the environment for itself; our own variables are read with all mistakes."""
    environ = {"AWS_PROFILE": "", "AWS_REGION": "eu-central-1\r\n", URI: "", "OTHER": " x "}
    tidy_process(environ)
    assert environ == {"AWS_REGION": "eu-central-1", URI: "", "OTHER": " x "}


@pytest.mark.parametrize("text", ["a\nb", "a\x1b", "a\x7fb", "a\udcff"])
def test_what_cannot_be_printed_is_found(text: str) -> None:
    """Also bytes that are not UTF-8; a tab can be allowed."""
    assert has_controls(text)
    assert not has_controls("a\tb\n", allowed="\t\n")
    assert not has_controls("é 模型")
