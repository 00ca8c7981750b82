"""Where does a command begin and end? Errors become messages and exit codes here."""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Mapping

from tensorserve.commands import bundles, looks, starts
from tensorserve.commands.parser import Parser
from tensorserve.config.tidying import tidy_process
from tensorserve.errors import ConfigurationError, TensorserveError, of_file
from tensorserve.linux import hide_memory, no_core_files
from tensorserve.secret import without_secrets

SIGINT_CODE = 130
# Other processes open memory of these (launch/handoff.py), or of their forks.
_HAND_OVER = frozenset({"up", "serve", "engine", "pack"})


def main(argv: list[str] | None = None) -> int:
    """Run one command; give the process's exit code."""
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A printed file name may not be UTF-8.
            stream.reconfigure(errors="backslashreplace")
    # A core file would hold keys and weights in plain text.
    no_core_files()
    # botocore and others read the environment themselves.
    tidy_process()
    if words[:1] == ["container"]:
        words = _container_words(words[1:])
    try:
        options = Parser.parse(words)
        if options.command not in _HAND_OVER:
            hide_memory()
        return _run(options, os.environ)
    except ConfigurationError as error:
        for problem in (*error.problems, *_notes(error)):
            _complain(problem)
        return error.exit_code
    except TensorserveError as error:
        _complain("\n".join((str(error), *_notes(error))))
        return error.exit_code
    except KeyboardInterrupt as error:
        for note in _notes(error):
            _complain(note)
        return SIGINT_CODE
    except BrokenPipeError:
        # The reader (`| head`) has closed; without this the interpreter would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001
        if (said := of_file(error)) is not None:
            _complain("\n".join((str(said), *_notes(error))))
            return said.exit_code
        # A bug ends with its own exit code and a traceback that can be reported.
        lines = "".join(traceback.format_exception(error))
        print(without_secrets(lines, os.environ), file=sys.stderr, end="", flush=True)
        _complain(
            f"internal error ({type(error).__name__}): please report it with the lines above."
        )
        return TensorserveError.exit_code


def _container_words(words: list[str]) -> list[str]:
    """The words of the image's entry point as a command of tensorserve; another program is exec'd.

    `docker run IMAGE [tensorserve] plan` and `docker run IMAGE bash` both do what they say.
    """
    if words[:1] == ["tensorserve"]:
        return words[1:]
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        try:
            os.execvp(words[0], words)
        except OSError as error:
            _complain(f"{words[0]!r} is neither a command of tensorserve nor a program here.")
            # As shells do: 126 found but not executable, 127 not found.
            raise SystemExit(126 if isinstance(error, PermissionError) else 127) from error
    return words


def _notes(error: BaseException) -> list[str]:
    """Notes that were added to an error, such as files that could not be removed."""
    return list(getattr(error, "__notes__", ()))


def _complain(text: str) -> None:
    print(f"tensorserve: error: {text}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _COMMANDS[options.command](options, environ)


def _engine(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.variables import HANDOFF_VARIABLE
    from tensorserve.launch.engine_process import run_engine

    return run_engine(lambda: main(["serve"]), starts.left_by_up(environ, HANDOFF_VARIABLE))


_COMMANDS = {
    "up": starts.run_up, "serve": starts.run_serve, "engine": _engine,
    "exporter": starts.run_exporter, "watch": starts.run_watch,
    "plan": looks.run_plan, "check": looks.run_check, "health": looks.run_health,
    "report": looks.run_report,
    "pack": bundles.run_pack, "pack-adapter": bundles.run_pack_adapter,
    "verify": bundles.run_verify, "sign": bundles.run_sign, "rewrap": bundles.run_rewrap,
    "rekey": bundles.run_rekey, "precompile": bundles.run_precompile,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
