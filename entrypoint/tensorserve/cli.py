"""The commands. The only module that prints for the user and ends the process."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorserve import __version__
from tensorserve.errors import ConfigurationError, TensorserveError, UsageError
from tensorserve.linux import end_with_parent, hide_memory, no_core_files

SIGINT_CODE = 130
# Others open what is in these processes' memory (handoff.py), or in what is forked from them.
_HAND_OVER = frozenset({"up", "serve", "engine", "pack"})


def main(argv: list[str] | None = None) -> int:
    """Run one command; give the process's exit code."""
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What is printed may name a file whose name is not UTF-8.
            stream.reconfigure(errors="backslashreplace")
    # A core would hold keys and weights in plain text.
    no_core_files()
    if words[:1] == ["container"]:
        words = _container_words(words[1:])
    try:
        options = _Parser.parse(words)
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
        # The reader (`| head`) has enough; keep the interpreter from complaining at its own exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # The last line of defence: a mistake of ours ends with its own exit code, and can be reported.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        _complain(
            f"internal error ({type(error).__name__}): please report it with the lines above."
        )
        return TensorserveError.exit_code


def _container_words(words: list[str]) -> list[str]:
    """What the image's entry point was given, as our own words; another program is exec'd.

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
    """What was added to an error on its way up, as what could not be removed after it."""
    return list(getattr(error, "__notes__", ()))


def _complain(text: str) -> None:
    print(f"tensorserve: error: {text}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """argparse with our exit code for wrong usage, and `up` where no command is named."""

    def error(self, message: str) -> Any:
        raise UsageError(message, hint=f"See `{self.prog} --help`.")

    @classmethod
    def parse(cls, words: list[str]) -> argparse.Namespace:
        # As in every image whose server takes flags: `docker run IMAGE --max-model-len 4096`.
        if not words or (
            words[0].startswith("-") and words[0] not in {"-h", "--help", "--version"}
        ):
            words = ["up", "--", *(words[1:] if words[:1] == ["--"] else words)]
        arguments: list[str] = []
        if words[0] in {"up", "serve", "plan", "check", "engine"} and "--" in words:
            cut = words.index("--")
            words, arguments = words[:cut], words[cut + 1 :]
        parsed = _parser().parse_args(words)
        parsed.arguments = tuple(arguments)
        return parsed


def _parser() -> _Parser:
    parser = _Parser(
        prog="tensorserve",
        description="Serve encrypted Tensorizer models with vLLM. Configured by environment "
        "variables: docs/configuration.md, or `tensorserve plan --help`.",
    )
    parser.add_argument("--version", action="version", version=f"tensorserve {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=_Parser, metavar="COMMAND"
    )

    commands.add_parser("up", help="check, serve, and export metrics (the container's default)")
    commands.add_parser("serve", help="the engine alone: check, then become `vllm serve`")
    plan = commands.add_parser(
        "plan",
        help="show what would be started, secrets redacted",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_variables_help(),
    )
    plan.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("check", help="try everything that a start needs, and start nothing")

    from tensorserve.pack_options import add_pack_options

    add_pack_options(
        commands.add_parser("pack", help="make a bundle from a Hugging Face directory")
    )

    verify = commands.add_parser("verify", help="read a whole bundle and authenticate every byte")
    verify.add_argument("uri", metavar="URI")
    sign = commands.add_parser(
        "sign", help="verify a whole bundle and write a manifest for it, authenticated by its key"
    )
    sign.add_argument("uri", metavar="URI", help="directory or s3://bucket/prefix")

    report = commands.add_parser("report", help="the time line of the last start")
    report.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("health", help="exit code 0 when ready (a container's health check)")
    for name in ("engine", "exporter", "watch"):
        commands.add_parser(name)  # what supervisord runs; no help text, so not listed
    return parser


def _variables_help() -> str:
    from tensorserve.variables import VARIABLES

    lines = ["variables:"]
    for variable in VARIABLES:
        name = f"{variable.name}[_FILE]" if variable.secret else variable.name
        default = variable.shown_default or variable.default
        lines.append(f"  {name}\n      {variable.meaning} ({variable.accepts}; default: {default})")
    lines.append(
        "  TENSORSERVE_VLLM_<FLAG>\n      any flag of `vllm serve`: TENSORSERVE_VLLM_DTYPE=float16"
    )
    return "\n".join(lines)


def _run(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    return _COMMANDS[options.command](options, environ)


def _up(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.supervise import up

    return up(environ, options.arguments)


def _serve(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.launch import serve

    serve(environ, options.arguments)


def _engine(_options: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    from tensorserve.engine import run_engine

    return run_engine(lambda: main(["serve"]))


def _exporter(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    end_with_parent()
    from tensorserve.telemetry.exporter import serve_exporter

    serve_exporter(
        Path(environ["TENSORSERVE_STATE_DIR"]),
        environ["TENSORSERVE_METRICS_HOST"],
        int(environ["TENSORSERVE_METRICS_PORT"]),
    )
    return 0


def _watch(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    end_with_parent()
    from tensorserve.supervise import watch

    watch(environ)
    return 0


def _health(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import http.client

    from tensorserve.settings import Settings

    # Only the port is asked for; the model's own variable need not be set for a health check.
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/", **environ})
    host = settings.metrics_host if settings.metrics_host not in {"0.0.0.0", "::"} else "localhost"
    connection = http.client.HTTPConnection(host, settings.metrics_port, timeout=4)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.read(4096).decode(errors="replace").strip())
        return int(response.status != 200)
    except OSError as error:
        print(f"no answer on port {settings.metrics_port}: {error}")
        return 1
    finally:
        connection.close()


def _plan(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.plan import describe, make_plan
    from tensorserve.settings import Settings

    settings = Settings.from_environment(environ)
    description = describe(make_plan(settings, options.arguments), settings)
    if options.json:
        print(json.dumps(description, indent=2))
        return 0
    for title, content in description.items():
        print(title.replace("_", " "))
        if isinstance(content, dict):
            for name, value in content.items():
                print(f"  {name:34} {value}")
        elif isinstance(content, list):
            print(
                f"  {' '.join(content)}"
                if title == "command"
                else "\n".join(f"  {c}" for c in content)
            )
        else:
            print(f"  {content}")
    return 0


def _check(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.plan import make_plan
    from tensorserve.preflight import Weights, run_checks
    from tensorserve.settings import Settings

    settings = Settings.from_environment(environ)
    plan = make_plan(settings, options.arguments)
    weights = Weights()
    for passed in run_checks(settings, plan, weights):
        print(f"ok  {passed.name:16} {passed.found}", flush=True)
    if weights.warning is not None:
        print(f"tensorserve: warning: {weights.warning}", file=sys.stderr, flush=True)
    print("Everything that a start needs is there.")
    return 0


def _settings(environ: Mapping[str, str]) -> Any:
    """Those for commands that name their own URI."""
    from tensorserve.settings import Settings

    # The start's own URI is not needed here.
    return Settings.from_environment({"TENSORSERVE_MODEL_URI": "/", **environ})


def _stop_cleanly() -> None:
    """SIGTERM ends a command as Ctrl-C does: what was begun is undone."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _pack(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.opening import access_for
    from tensorserve.pack_options import pack_as_asked

    _stop_cleanly()
    access = access_for(_settings(environ))
    with _ByteBar("packing") as bar:
        result = pack_as_asked(options, access, bar)
    print(result)
    return 0


def _verify(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.opening import access_for, key_for
    from tensorserve.verifying import verify

    settings = _settings(environ)
    access, key = access_for(settings), key_for(settings)
    with _ByteBar("verifying") as bar:
        verify(
            options.uri,
            access,
            key,
            bar.print,
            bar,
            wish=settings.verify,
            pin=settings.manifest_sha256,
        )
    return 0


def _sign(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.opening import access_for, key_for
    from tensorserve.signing import sign

    _stop_cleanly()
    settings = _settings(environ)
    access, key = access_for(settings), key_for(settings)
    with _ByteBar("verifying") as bar:
        signed = sign(
            options.uri,
            access,
            key,
            bar.print,
            bar,
            wish=settings.verify,
            pin=settings.manifest_sha256,
        )
    print(signed)
    return 0


class _ByteBar:
    """tqdm's bar on a terminal, nothing elsewhere; called with (bytes done, bytes in all)."""

    def __init__(self, what: str) -> None:
        from tqdm import tqdm

        hidden = not sys.stderr.isatty()
        self._bar: Any = tqdm(unit="B", unit_scale=True, desc=what, disable=hidden, leave=False)

    def __call__(self, done: int, total: int) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def print(self, line: str) -> None:
        """A line of output that does not tear the bar."""
        self._bar.clear()
        print(line, flush=True)

    def __enter__(self) -> _ByteBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _report(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import shutil

    from tensorserve.telemetry import events_path, read_events
    from tensorserve.telemetry.report import render_report, report_json
    from tensorserve.variables import default_state_dir

    directory = Path(environ.get("TENSORSERVE_STATE_DIR") or default_state_dir())
    events = list(read_events(events_path(directory)))
    if not events:
        raise ConfigurationError(
            f"There is no start to report: {events_path(directory)} is missing or empty.",
            hint="Set TENSORSERVE_STATE_DIR to the state directory of the start.",
        )
    if options.json:
        print(json.dumps(report_json(events), indent=2))
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in environ
        print(render_report(events, shutil.get_terminal_size().columns, color))
    return 0


_COMMANDS = {
    "up": _up, "serve": _serve, "plan": _plan, "check": _check, "pack": _pack, "verify": _verify,
    "sign": _sign,
    "report": _report, "health": _health, "engine": _engine, "exporter": _exporter, "watch": _watch,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
