"""Which flags `vllm serve` knows, without importing vLLM (which costs seconds and torch).

The list is read once from vLLM's own argument parser and kept beside this file;
``python -m tensorserve.vllm_flags --write`` makes it anew, and a test holds it
against the installed vLLM.
"""

from __future__ import annotations

import difflib
import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tensorserve.bounded_json import MOST_DIGITS, read_json
from tensorserve.errors import ConfigurationError

FLAGS_FILE = Path(__file__).with_name("vllm_flags.json")
VLLM_VERSION = "0.32.0"

# What we set ourselves: the bundle decides them, so a user who sets one has a conflict.
OWNED = {
    "model": "The bundle is the model: set TENSORSERVE_MODEL_URI",
    "load-format": "Weights are always loaded by tensorserve's own loader",
    "model-loader-extra-config": "Use TENSORSERVE_FETCH_CONNECTIONS and _VERIFY",
    "tokenizer": "The tokenizer comes from the bundle",
    "hf-config-path": "The configuration comes from the bundle",
    "config": "Set single flags with TENSORSERVE_VLLM_<FLAG>, or pass them after `--`",
    "headless": "Several machines take Ray: see docs/kubernetes.md",
}
# Have a variable of their own, so that other parts of the start know them too.
RENAMED = {
    "host": "TENSORSERVE_HOST",
    "port": "TENSORSERVE_PORT",
    "served-model-name": "TENSORSERVE_MODEL_NAME",
}
# Their values must not stand in an argument list, where every process can read them.
SECRET = frozenset({"api-key", "hf-token"})

_INTEGERS = {"int"}
_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}


@dataclass(frozen=True)
class Flag:
    """One option of `vllm serve`.

    ``kind``: "switch" (--x / --no-x), "set" (--x only), "value", or "values" (one or more words).
    """

    name: str
    kind: str
    type: str | None = None
    choices: tuple[str, ...] = ()
    short: tuple[str, ...] = ()

    def arguments(self, text: str, variable: str) -> tuple[str, ...]:
        """The words for the argument list that ``variable=text`` asks for."""
        if self.kind in {"switch", "set"}:
            value = text.strip().lower()
            if value in _TRUE:
                return (f"--{self.name}",)
            if value in _FALSE:
                return (f"--no-{self.name}",) if self.kind == "switch" else ()
            raise ConfigurationError(
                f"{variable}={text!r} is not a truth value.",
                hint=f"Use {variable}=true or {variable}=false.",
            )
        if self.type in _INTEGERS:
            try:
                int(text)
            except ValueError:  # also for thousands of digits
                raise ConfigurationError(
                    f"{variable}={text[:80]!r} is not a whole number.",
                    hint=f"For example {variable}=4.",
                ) from None
        if len(text) > MOST_DIGITS and text.isdecimal():
            raise ConfigurationError(f"{variable} is a number of {len(text)} digits.")
        if self.choices and text not in self.choices:
            near = difflib.get_close_matches(text, self.choices, 1)
            raise ConfigurationError(
                f"{variable}={text!r} is not one of {', '.join(self.choices)}.",
                hint=f"Did you mean {near[0]}?" if near else None,
            )
        if self.kind == "values":
            return (f"--{self.name}", *_words(text))
        # One word with "=", so that a value which begins with "-" stays a value.
        return (f"--{self.name}={text}",)


def _words(text: str) -> list[str]:
    """The words of a list flag: a JSON array, or words parted by white space."""
    if text.lstrip().startswith("["):
        try:
            parsed = read_json(text)
        except ValueError:
            parsed = None
        if isinstance(parsed, list):
            return [item if isinstance(item, str) else json.dumps(item) for item in parsed]
    if text.lstrip().startswith("{"):
        return [text]
    return text.split()


@cache
def known_flags() -> dict[str, Flag]:
    """Every flag by its long name ("max-model-len")."""
    raw = json.loads(FLAGS_FILE.read_text())["flags"]
    return {
        name: Flag(
            name,
            entry["kind"],
            entry.get("type"),
            tuple(entry.get("choices", ())),
            tuple(entry.get("short", ())),
        )
        for name, entry in raw.items()
    }


def flag_for(variable_suffix: str) -> Flag | None:
    """The flag that TENSORSERVE_VLLM_<suffix> means, or None."""
    return known_flags().get(variable_suffix.lower().replace("_", "-"))


def nearest_flag(variable_suffix: str) -> str | None:
    """The known flag whose name is nearest to an unknown one."""
    wanted = variable_suffix.lower().replace("_", "-")
    near = difflib.get_close_matches(wanted, known_flags(), 1, cutoff=0.6)
    return near[0] if near else None


def read_from_vllm() -> dict[str, dict[str, object]]:
    """The flags of the installed vLLM, from its own parser. Imports vLLM (seconds)."""
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


if __name__ == "__main__":
    import vllm

    text = json.dumps({"vllm": VLLM_VERSION, "flags": read_from_vllm()}, indent=1) + "\n"
    if not vllm.__version__.startswith(VLLM_VERSION):
        sys.exit(f"vLLM {vllm.__version__} is installed, the list is for {VLLM_VERSION}")
    if "--write" in sys.argv:
        FLAGS_FILE.write_text(text)
    else:
        sys.stdout.write(text)
