"""Which commands are there? The only module that prints for the user and ends the process."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorserve.config.tidying import has_controls, tidied, tidy_process
from tensorserve.errors import ConfigurationError, TensorserveError, UsageError
from tensorserve.linux import end_with_parent, hide_memory, no_core_files
from tensorserve.secret import without_secrets
from tensorserve.version import __version__

if TYPE_CHECKING:
    from tensorserve.config.settings import SourceSettings

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
        # The reader (`| head`) has closed; without this the interpreter would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    # A bug ends with its own exit code and a traceback that can be reported.
    except Exception as error:  # noqa: BLE001
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
        if words[0] in {"up", "serve", "plan", "check", "engine", "precompile"} and "--" in words:
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

    from tensorserve.packing.options import add_pack_options, add_sign_options

    add_pack_options(
        commands.add_parser("pack", help="make a bundle from a Hugging Face directory")
    )

    from tensorserve.packing.adapter_options import add_adapter_options

    add_adapter_options(
        commands.add_parser(
            "pack-adapter", help="make a bundle of one LoRA adapter, to be found while serving"
        )
    )

    verify = commands.add_parser("verify", help="read a whole bundle and authenticate every byte")
    verify.add_argument("uri", metavar="URI")
    sign = commands.add_parser(
        "sign",
        help="verify a whole bundle; write a manifest that its key authenticates, or a signature",
    )
    sign.add_argument("uri", metavar="URI", help="directory, s3://, gs:// or az://")
    add_sign_options(sign)

    rewrap = commands.add_parser(
        "rewrap", help="wrap a bundle's key for other recipients; the weights stay as they are"
    )
    rewrap.add_argument("uri", metavar="URI", help="directory, s3://, gs:// or az://")
    for word, does in (("add", "wrap the key for it, also anew"), ("remove", "take its key out")):
        rewrap.add_argument(
            f"--{word}",
            metavar="PROVIDER:KEY",
            action="append",
            default=[],
            help=f"{does}; may be repeated",
        )
    add_sign_options(rewrap)

    rekey = commands.add_parser(
        "rekey", help="copy a bundle to another place, sealed with a new key; the old one stays"
    )
    rekey.add_argument("uri", metavar="URI", help="the bundle, whose key is set as for a start")
    rekey.add_argument("destination", metavar="DEST", help="directory, s3://, gs:// or az://")
    rekey.add_argument(
        "--key-file", type=Path, help="the new key; made (0600) if it does not exist"
    )
    rekey.add_argument(
        "--wrap",
        metavar="PROVIDER:KEY",
        action="append",
        default=[],
        help="wrap the new key for a recipient, as `pack` does; may be repeated. Without "
        "--key-file the key is nowhere else",
    )
    add_sign_options(rekey)
    rekey.add_argument("--overwrite", action="store_true", help="replace a bundle at DEST")

    precompile = commands.add_parser(
        "precompile",
        help="start once with the same settings, and put what was compiled into the bundle, sealed",
    )
    precompile.add_argument("uri", metavar="URI", help="directory, s3://, gs:// or az://")
    precompile.add_argument(
        "--sign-key", metavar="PEM", type=Path, help="sign it with this Ed25519 private key"
    )

    report = commands.add_parser("report", help="the time line of the last start")
    report.add_argument("--json", action="store_true", help="for programs")
    commands.add_parser("health", help="exit code 0 when ready (a container's health check)")
    for name in ("engine", "exporter", "watch"):
        commands.add_parser(name)  # what supervisord runs; no help text, so not listed
    return parser


def _variables_help() -> str:
    from tensorserve.config.variables import VARIABLES

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
    from tensorserve.launch.supervisor import up

    return up(environ, options.arguments)


def _serve(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.launch.serve import serve

    serve(environ, options.arguments)


def _engine(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.variables import HANDOFF_VARIABLE
    from tensorserve.launch.engine_process import run_engine

    return run_engine(lambda: main(["serve"]), _left_by_up(environ, HANDOFF_VARIABLE))


def _exporter(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    end_with_parent()
    from tensorserve.launch.companions import COMPANIONS_VARIABLE, receive_companions
    from tensorserve.telemetry.exporter import serve_exporter

    found = receive_companions(_left_by_up(environ, COMPANIONS_VARIABLE))
    serve_exporter(found.state_dir, found.metrics_host, found.metrics_port)
    return 0


def _watch(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    end_with_parent()
    from tensorserve.launch.companions import COMPANIONS_VARIABLE
    from tensorserve.launch.supervisor import watch

    watch(_left_by_up(environ, COMPANIONS_VARIABLE))
    return 0


def _left_by_up(environ: Mapping[str, str], variable: str) -> str:
    if variable not in environ:
        raise UsageError("Only `tensorserve up` runs this command.", hint="Run `tensorserve up`.")
    return environ[variable]


def _health(_options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import http.client

    from tensorserve.config.settings import metrics_address

    host, port = metrics_address(environ)
    host = "localhost" if host in {"0.0.0.0", "::"} else host
    connection = http.client.HTTPConnection(host, port, timeout=4)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.read(4096).decode(errors="replace").strip())
        return int(response.status != 200)
    except (OSError, UnicodeError) as error:  # UnicodeError: no host name
        print(f"no answer on port {port}: {error}")
        return 1
    finally:
        connection.close()


def _plan(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.launch_plan import describe, make_plan
    from tensorserve.config.settings import Settings

    settings = Settings.from_environment(environ)
    _warn(*settings.warnings)
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
    from tensorserve.config.launch_plan import make_plan
    from tensorserve.config.settings import Settings
    from tensorserve.launch.completeness import check_files
    from tensorserve.launch.preflight import Passed, check_adapters, run_checks

    settings = Settings.from_environment(environ)
    _warn(*settings.warnings)
    plan = make_plan(settings, options.arguments)

    def report(passed: Passed) -> None:
        print(f"ok  {passed.name:16} {passed.found}", flush=True)

    checked = run_checks(settings, plan, report, _note)
    for passed in check_files(checked.settings, plan, checked):
        report(passed)
    if (found := check_adapters(checked.settings)) is not None:
        report(found[0])
        _warn(*found[1])
    if checked.weights.warning is not None:
        _warn(checked.weights.warning)
    print("Everything that a start needs is there.")
    return 0


def _note(text: str) -> None:
    print(f"tensorserve: {text}", file=sys.stderr, flush=True)


def _warn(*warnings: str) -> None:
    for warning in warnings:
        print(f"tensorserve: warning: {warning}", file=sys.stderr, flush=True)


def _settings(environ: Mapping[str, str]) -> SourceSettings:
    """The settings of commands whose URI is an argument."""
    from tensorserve.config.settings import SourceSettings

    settings = SourceSettings.from_environment(environ)
    _warn(*settings.warnings)
    return settings


def _settings_with_key(environ: Mapping[str, str], uri: str) -> SourceSettings:
    """The same, with the key of the bundle at `uri` if it is given by reference."""
    from tensorserve.bundle.location import split_model_uri
    from tensorserve.config.unwrapping import with_key

    return with_key(_settings(environ), split_model_uri(uri)[0], _note)


def _uri(text: str, what: str) -> str:
    """`text` as a variable's value would be read. Raises ConfigurationError for what is no URI."""
    from tensorserve.config.value_parsers import parse_uri

    name = "TENSORSERVE_MODEL_URI"
    text = tidied({name: text, "HOME": os.environ.get("HOME", "")}).get(name, "")
    if not text or has_controls(text):
        raise ConfigurationError(f"{what} is empty, or has a line break or such in it.")
    return parse_uri(text, what)


def _stop_cleanly() -> None:
    """SIGTERM ends a command as Ctrl-C does: unfinished output is removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


def _pack(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.access import access_for, services_for
    from tensorserve.packing.options import pack_as_asked

    _stop_cleanly()
    options.destination = _uri(options.destination, "DEST")
    settings = _settings(environ)
    with _ByteBar("packing") as bar:
        result = pack_as_asked(options, access_for(settings), bar, services_for(settings, _note))
    print(result)
    return 0


def _pack_adapter(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.packing.adapter_options import pack_adapter_as_asked

    _stop_cleanly()
    options.destination = _uri(options.destination, "DEST")
    if options.model is not None:
        options.model = _uri(options.model, "--model")
    settings = _settings(environ)
    with _ByteBar("packing") as bar:
        done = pack_adapter_as_asked(
            options, settings, lambda uri: _settings_with_key(environ, uri), bar
        )
    print(done)
    return 0


def _verify(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.bundle.location import split_model_uri
    from tensorserve.bundle.model_signature import read_signature
    from tensorserve.bundle.verify import verify
    from tensorserve.config.access import access_for, compiled_key_for, key_for
    from tensorserve.config.signature import trust_for
    from tensorserve.crypto.ed25519 import VerifyingKey

    uri = _uri(options.uri, "URI")
    settings = _settings_with_key(environ, uri)
    access, key = access_for(settings), key_for(settings)
    signer = settings.compiled_signature_key
    trust, signature = trust_for(settings), None
    if trust is not None:
        signature = read_signature(split_model_uri(uri)[0], access, trust)
    with _ByteBar("verifying") as bar:
        verify(
            uri,
            access,
            key,
            bar.print,
            bar,
            wish=settings.verify,
            pin=settings.manifest_sha256,
            compiled_key=compiled_key_for(settings, encrypted=key is not None),
            compiled_signature_key=None if signer is None else VerifyingKey.parse(signer),
            signature=signature,
        )
    return 0


def _sign(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.bundle.location import split_model_uri
    from tensorserve.config.access import access_for, key_for
    from tensorserve.config.unwrapping import with_key
    from tensorserve.packing.options import signer_of
    from tensorserve.packing.sign import sign

    _stop_cleanly()
    uri = _uri(options.uri, "URI")
    signer = signer_of(options)
    # It may not be signed yet.
    given = replace(_settings(environ), signature_key=None, signature_certificates=None)
    settings = with_key(given, split_model_uri(uri)[0], _note)
    access, key = access_for(settings), key_for(settings)
    with _ByteBar("verifying") as bar:
        signed = sign(
            uri,
            access,
            key,
            bar.print,
            bar,
            wish=settings.verify,
            pin=settings.manifest_sha256,
            signer=signer,
        )
    print(signed)
    return 0


def _rewrap(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.config.access import access_for, key_for, services_for
    from tensorserve.config.signature import trust_for
    from tensorserve.config.unwrapping import with_key
    from tensorserve.packing.options import signer_of
    from tensorserve.packing.rewrap import rewrap

    _stop_cleanly()
    uri = _uri(options.uri, "URI")
    signer = signer_of(options)
    given = _settings(environ)
    settings = with_key(given, uri, _note)
    done = rewrap(
        uri,
        access_for(settings),
        key_for(settings),
        services_for(given, _note),
        add=options.add,
        remove=options.remove,
        pin=settings.manifest_sha256,
        signer=signer,
        trust=trust_for(settings),
    )
    print(done)
    return 0


def _rekey(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.bundle.keys import parse_key
    from tensorserve.config.access import access_for, key_for, services_for
    from tensorserve.config.unwrapping import with_key
    from tensorserve.packing.key_file import new_key
    from tensorserve.packing.options import signer_of
    from tensorserve.packing.rekey import rekey
    from tensorserve.wrapping.providers import for_wrapping

    _stop_cleanly()
    uri, destination = _uri(options.uri, "URI"), _uri(options.destination, "DEST")
    if not options.wrap and options.key_file is None:
        raise UsageError(
            "`rekey` needs a new key.",
            hint="Add --wrap PROVIDER:KEY, or --key-file PATH (made if it does not exist).",
        )
    signer = signer_of(options)
    given = _settings(environ)
    settings = with_key(given, uri, _note)
    services = services_for(given, _note)
    recipients = [for_wrapping(text, services) for text in options.wrap]
    with _ByteBar("sealing anew") as bar:
        done = rekey(
            uri,
            destination,
            access_for(settings),
            key_for(settings),
            parse_key(new_key(options.key_file)),
            recipients=recipients,
            signer=signer,
            overwrite=options.overwrite,
            pin=settings.manifest_sha256,
            progress=bar,
        )
    print(done)
    return 0


def _precompile(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from tensorserve.packing.precompile import precompile

    _stop_cleanly()
    made = precompile(
        _uri(options.uri, "URI"),
        environ,
        options.arguments,
        options.sign_key,
        lambda line: print(f"tensorserve: {line}", file=sys.stderr, flush=True),
    )
    print(made)
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
        """Print a line above the bar."""
        self._bar.clear()
        print(line, flush=True)

    def __enter__(self) -> _ByteBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _report(options: argparse.Namespace, environ: Mapping[str, str]) -> int:
    import shutil

    from tensorserve.config.variables import default_state_dir
    from tensorserve.telemetry import events_path, fold, read_events
    from tensorserve.telemetry.report import render_report, report_json

    environ = tidied(environ)
    directory = Path(environ.get("TENSORSERVE_STATE_DIR") or default_state_dir(environ))
    if has_controls(str(directory)):
        raise ConfigurationError("TENSORSERVE_STATE_DIR has a line break or such in it.")
    try:
        events = read_events(events_path(directory))
    except OSError as error:
        raise ConfigurationError(
            f"{str(events_path(directory))[:200]} cannot be read: {error.strerror}.",
            hint="Set TENSORSERVE_STATE_DIR to the state directory of the start.",
        ) from error
    if not events:
        raise ConfigurationError(
            f"There is no start to report: {events_path(directory)} is missing or empty.",
            hint="Set TENSORSERVE_STATE_DIR to the state directory of the start.",
        )
    state = fold(events)
    if options.json:
        print(json.dumps(report_json(state), indent=2))
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in environ
        print(render_report(state, shutil.get_terminal_size().columns, color))
    return 0


_COMMANDS = {
    "up": _up, "serve": _serve, "plan": _plan, "check": _check, "pack": _pack,
    "pack-adapter": _pack_adapter, "verify": _verify, "sign": _sign, "rewrap": _rewrap,
    "rekey": _rekey, "precompile": _precompile,
    "report": _report, "health": _health, "engine": _engine, "exporter": _exporter, "watch": _watch,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
