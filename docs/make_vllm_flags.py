"""The flags of `vllm serve`, from the parser of the installed vLLM (its import takes seconds).

.venv/bin/python docs/make_vllm_flags.py           prints the list
.venv/bin/python docs/make_vllm_flags.py --write   keeps it in config/vllm_flags.json
"""

from __future__ import annotations

import json
import sys

from tensorserve.config.vllm_flags import FLAGS_FILE, VLLM_VERSION


def read_from_vllm() -> dict[str, dict[str, object]]:
    """The flags of the installed vLLM, from its own parser."""
    import argparse

    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    found: dict[str, dict[str, object]] = {}
    for action in parser._actions:
        longs = [o for o in action.option_strings if o.startswith("--")]
        if not longs or "--help" in longs:
            continue
        entry: dict[str, object] = {}
        if isinstance(action, argparse.BooleanOptionalAction):
            entry["kind"] = "switch"
            longs = [o for o in longs if not o.startswith("--no-")] or longs[:1]
        elif action.nargs == 0:
            entry["kind"] = "set"
        elif action.nargs in ("+", "*"):
            entry["kind"] = "values"
        else:
            entry["kind"] = "value"
        kind = getattr(action.type, "__name__", None)
        if kind in {"int", "float", "str"}:
            entry["type"] = kind
        if action.choices and all(isinstance(c, str) for c in action.choices):
            entry["choices"] = sorted(action.choices)
        shorts = [o for o in action.option_strings if not o.startswith("--")]
        if shorts:
            entry["short"] = shorts
        for long in longs:
            found[long.removeprefix("--")] = entry
    return dict(sorted(found.items()))


def main() -> None:
    """Exits with a message where another vLLM is installed than the one that is served with."""
    import vllm

    if not vllm.__version__.startswith(VLLM_VERSION):
        sys.exit(f"vLLM {vllm.__version__} is installed, the list is for {VLLM_VERSION}")
    text = json.dumps({"vllm": VLLM_VERSION, "flags": read_from_vllm()}, indent=1) + "\n"
    if "--write" in sys.argv:
        FLAGS_FILE.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
