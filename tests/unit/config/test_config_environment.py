"""What the engine sees of AWS and proxies is what the checks before it saw."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import botocore
import pytest

from tensorserve.config.environment import CHILD_NAMES, child_environment

_NAME = re.compile(r"(AWS|BOTO|BOTOCORE)_[A-Z0-9_]*[A-Z0-9]")
# Read by botocore, and not passed on.
LEFT_OUT = {
    **dict.fromkeys(
        ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN"),
        "secrets, handed over in memory",
    ),
    "AWS_CONTAINER_AUTHORIZATION_TOKEN": "a secret; its _FILE form is passed on",
    **dict.fromkeys(("AWS_CREDENTIAL_EXPIRATION", "AWS_ACCOUNT_ID"), "beside keys in variables"),
    **dict.fromkeys(
        ("AWS_CSM_ENABLED", "AWS_CSM_HOST", "AWS_CSM_PORT", "AWS_CSM_CLIENT_ID"),
        "client-side monitoring",
    ),
    **dict.fromkeys(("AWS_CREDENTIAL_FILE", "BOTO_CONFIG"), "files of boto 2"),
    "AWS_LAMBDA_FUNCTION_NAME": "Lambda",
    **dict.fromkeys(
        (
            "BOTOCORE_EXPERIMENTAL__PLUGINS",
            "BOTO_EXPERIMENTAL__ADD_PROXY_HOST_HEADER",
            "BOTO_EXPERIMENTAL__NO_EMPTY_CONTINUE",
            "BOTO_DISABLE_CRT",
        ),
        "experiments; plugins are code",
    ),
}


def read_by_botocore() -> set[str]:
    """Every constant in its source that is the name of such a variable."""
    found = set()
    for path in Path(botocore.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and re.fullmatch(
                r"(AWS|BOTO|BOTOCORE)_[A-Z0-9_]*[A-Z0-9]", text
            ):
                found.add(text)
    return found


def test_the_engine_sees_each_variable_that_botocore_reads() -> None:
    """A new version of botocore that reads another one is noticed here."""
    found = read_by_botocore()
    assert len(found) > 50
    assert found - set(LEFT_OUT) <= CHILD_NAMES
    assert set(LEFT_OUT) <= found
    assert not set(LEFT_OUT) & CHILD_NAMES


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy"])
def test_a_proxy_is_passed_on_but_not_for_this_machine(name: str) -> None:
    """vLLM's processes talk to each other on localhost."""
    given = {name: "http://proxy:3128", "NO_PROXY": "internal, 127.0.0.1"}
    found = dict(child_environment(given, ()))
    assert found[name] == "http://proxy:3128"
    assert found["NO_PROXY"] == found["no_proxy"] == "internal,127.0.0.1,localhost,::1"
    assert dict(child_environment(found, ())) == found  # handed on once more


def test_no_proxy_of_all_stays_what_it_is() -> None:
    """`*` is not one of several words to urllib."""
    given = {"HTTP_PROXY": "http://proxy:3128", "no_proxy": "*"}
    assert dict(child_environment(given, ()))["NO_PROXY"] == "*"


def test_without_a_proxy_nothing_is_made_up() -> None:
    """NO_PROXY alone is passed on as it is."""
    assert child_environment({"PATH": "/bin"}, ()) == (("PATH", "/bin"),)
    assert child_environment({"NO_PROXY": "a"}, ()) == (("NO_PROXY", "a"),)
