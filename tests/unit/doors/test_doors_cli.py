"""The command line: which words are a command, and how what fails ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tensorserve import cli
from tensorserve.cli import main


def test_wrong_usage_ends_with_64(capsys: pytest.CaptureFixture[str]) -> None:
    """One line that says what is wrong, and where help is."""
    assert main(["pack", "only-a-source"]) == 64
    assert main(["no-such-command"]) == 64
    said = capsys.readouterr().err
    assert said.count("tensorserve: error:") == 2
    assert "--help" in said


@pytest.mark.usefixtures("environ")
@pytest.mark.parametrize("words", [["--no-such-flag"], ["--", "--no-such-flag"]])
def test_words_that_begin_with_a_dash_are_vllms(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As in every image whose server takes flags."""
    assert main(words) == 78
    assert "has no flag --no-such-flag" in capsys.readouterr().err


@pytest.mark.usefixtures("environ")
def test_the_image_takes_our_commands_with_and_without_our_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`docker run IMAGE plan` and `docker run IMAGE tensorserve plan`."""
    assert main(["container", "plan"]) == 0
    assert main(["container", "tensorserve", "plan"]) == 0
    assert capsys.readouterr().out.count("command\n") == 2


def test_the_image_says_when_a_program_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """127, as a shell would."""
    with pytest.raises(SystemExit) as caught:
        main(["container", "no-such-program-here"])
    assert caught.value.code == 127
    assert "no-such-program-here" in capsys.readouterr().err


def test_no_command_leaves_a_core_file() -> None:
    """It would hold keys and plain text; `pack` and `verify` have both in memory as well."""
    script = """
import contextlib, resource
from tensorserve.cli import main
with contextlib.suppress(ValueError):  # who is not root may not raise what this process has
    resource.setrlimit(resource.RLIMIT_CORE, (1000, 1000))
main(["report"])
print(resource.getrlimit(resource.RLIMIT_CORE))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "(1, 1)"


def test_a_mistake_of_ours_ends_with_70(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a traceback to report, and told apart from a user's mistakes."""

    def broken(*_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setitem(cli._COMMANDS, "plan", broken)
    assert main(["plan"]) == 70
    said = capsys.readouterr().err
    assert "internal error (ZeroDivisionError)" in said
    assert "Traceback" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(13, "Permission denied", "/models/x"), 77, "Give user"),
        (OSError(40, "Too many levels of symbolic links", b"/models/x"), 78, "Check the path"),
        (OSError(9, "Bad file descriptor"), 70, "please report it"),
        (OSError(9, "Bad file descriptor", 5), 70, "please report it"),
    ],
    ids=["not allowed", "another reason", "of no file", "of a descriptor"],
)
def test_what_the_system_says_of_a_file_is_no_bug(
    error: OSError, code: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where nothing of ours expected it."""

    def refused(*_: object) -> int:
        raise error

    monkeypatch.setitem(cli._COMMANDS, "plan", refused)
    assert main(["plan"]) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert ("Traceback" in printed) == (code == 70)


# Nothing of the environment in a traceback -------------------------------------------------------


def test_a_traceback_has_no_credentials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistake of ours is printed to be reported; what libraries put into their errors is not."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-id")
    header = "AWS4-HMAC-SHA256 Credential=canary-key/x, SignedHeaders=host, Signature=canary-sig"

    def fail(*_: object) -> int:
        raise ValueError(
            f"Invalid header value {header.encode()!r} for canary-secret, canary-id, "
            "http://user:canary@host/?X-Amz-Signature=canary-query&X-Amz-Expires=9"
        )

    monkeypatch.setitem(cli._COMMANDS, "plan", fail)
    assert main(["plan"]) == 70
    said = capsys.readouterr().err
    assert "canary" not in said
    assert "SignedHeaders=host" in said
    assert "please report it" in said
