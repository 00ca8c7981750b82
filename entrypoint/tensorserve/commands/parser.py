"""Which commands are there, and which words does each take?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tensorserve.errors import UsageError
from tensorserve.version import __version__


class Parser(argparse.ArgumentParser):
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
        parsed = make_parser().parse_args(words)
        parsed.arguments = tuple(arguments)
        return parsed


def make_parser() -> Parser:
    parser = Parser(
        prog="tensorserve",
        description="Serve encrypted Tensorizer models with vLLM. Configured by environment "
        "variables: docs/configuration.md, or `tensorserve plan --help`.",
    )
    parser.add_argument("--version", action="version", version=f"tensorserve {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
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
