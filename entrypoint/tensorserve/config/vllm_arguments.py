"""Which arguments of `vllm serve` were given, as vLLM's own parser reads them?

Follows FlexibleArgumentParser (vllm/utils/argparse_utils.py, 0.32.0) and Python's argparse below
it: underscores count as dashes in a name, `--name=value` and `--name value` are the same, short
names and unambiguous beginnings of long ones are accepted, the last of several wins, and
`--name.key value` sets one key of an argument that is a JSON object. vLLM is started with the
arguments as they were understood here, each under its full name.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tensorserve.bounded_json import MOST_DIGITS, read_json
from tensorserve.config.vllm_flags import SECRET, VLLM_VERSION, Flag, known_flags, nearest_flag
from tensorserve.errors import ConfigurationError

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}
# What argparse takes for a value although it begins with a dash.
_NEGATIVE = re.compile(r"-\d+|-\d*\.\d+")
# vLLM's own short form of --optimization-level, which is none of argparse's.
_LEVEL = "-O"
_LEVELS = frozenset("0123")
# vLLM's suffixes of numbers (human_readable_int).
_SUFFIXED = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([kmgt])|(\d{1,9})([KMGT])")


@dataclass(frozen=True)
class Argument:
    """One argument of `vllm serve`, under its full name."""

    name: str
    """Without dashes in front: "max-model-len"."""
    values: tuple[str, ...] = ()
    """None for a switch."""
    keys: str = ""
    """"model" of --speculative-config.model; "" where the argument is given as a whole."""
    off: bool = False
    """Given as --no-<name>."""

    def words(self) -> tuple[str, ...]:
        """The words for an argument list."""
        if self.keys:
            return (f"--{self.name}.{self.keys}={self.values[0]}",)
        option = f"--no-{self.name}" if self.off else f"--{self.name}"
        if len(self.values) == 1:
            # In one word with "=", so that a value that begins with "-" stays a value.
            return (f"{option}={self.values[0]}",)
        return (option, *self.values)


@dataclass(frozen=True)
class Arguments:
    """The arguments of one `vllm serve`, in order."""

    given: tuple[Argument, ...] = ()

    def words(self) -> tuple[str, ...]:
        """The words for an argument list."""
        return tuple(word for argument in self.given for word in argument.words())

    @property
    def names(self) -> frozenset[str]:
        """Full names of those given, as a whole or by key."""
        return frozenset(argument.name for argument in self.given)

    def last(self, name: str) -> Argument | None:
        """The one that counts, of those given as a whole."""
        return next((a for a in reversed(self.given) if a.name == name and not a.keys), None)

    def value(self, name: str) -> str | None:
        """The (first) value of `name`; None where it is not given or has none."""
        argument = self.last(name)
        return argument.values[0] if argument is not None and argument.values else None

    def switch(self, name: str) -> bool | None:
        """Whether `name` is switched on; None where it is not given."""
        argument = self.last(name)
        return None if argument is None else not argument.off

    def text(self, name: str) -> str | None:
        """The value of `name` as vLLM takes it: JSON where keys of it are given one by one.

        They take the place of a value that is given as a whole.
        """
        by_key = [argument for argument in self.given if argument.name == name and argument.keys]
        if not by_key:
            return self.value(name)
        found: dict[str, Any] = {}
        for argument in by_key:
            _update(found, _nested(argument))
        return json.dumps(found)

    def options(self, name: str) -> dict[str, Any] | None:
        """The JSON object that `name` is given as; None where it is not given.

        Raises ConfigurationError for a text that is no JSON object.
        """
        text = self.text(name)
        if text is None:
            return None
        try:
            options = read_json(text)
        except ValueError as error:
            raise ConfigurationError(f"--{name} is no JSON: {error}.") from error
        if not isinstance(options, dict):
            raise ConfigurationError(f"--{name} is no JSON object.")
        return options

    def adding(self, *arguments: Argument) -> Arguments:
        """These, and `arguments` behind them."""
        return Arguments((*self.given, *arguments))

    def without(self, *names: str) -> Arguments:
        """These, less those of `names`."""
        return Arguments(tuple(a for a in self.given if a.name not in names))


def parse_arguments(words: Sequence[str]) -> Arguments:
    """The arguments that `words` are, as they stand behind `vllm serve DIRECTORY`.

    Raises ConfigurationError for what vLLM has no flag for, for an ambiguous beginning of a name,
    and for a value too few or too many.
    """
    left, found = list(words), []
    while left:
        word = left.pop(0)
        if _is_value(word):
            raise ConfigurationError(
                f"Unexpected argument {word!r}: the model comes from TENSORSERVE_MODEL_URI.",
                hint="After `--`, only flags of `vllm serve` may follow.",
            )
        if word.startswith(_LEVEL) and (word != _LEVEL or (left and left[0] in _LEVELS)):
            value = word.removeprefix(_LEVEL).removeprefix("=") if word != _LEVEL else left.pop(0)
            found.append(Argument("optimization-level", (value,)))
            continue
        option, equals, attached = word.partition("=")
        option, _, keys = option.partition(".")
        flag, off, joined = _flag_of(option, attachable=not equals and not keys)
        values = [attached] if equals else [] if joined is None else [joined]
        if keys:
            if not equals and left:  # whatever it looks like
                values.append(left.pop(0))
        elif not values and flag.kind in {"value", "values"}:
            while left and _is_value(left[0]):
                values.append(left.pop(0))
                if flag.kind == "value":
                    break
        if values and (flag.kind in {"switch", "set"} or off):
            raise ConfigurationError(f"{option} takes no value.", hint=f"Give {option} alone.")
        # --hf-token is the one that may be left without (argparse's nargs="?"); it is a secret.
        if not values and (keys or flag.kind in {"value", "values"}) and flag.name != "hf-token":
            raise ConfigurationError(f"{option} takes a value.")
        if keys and flag.name in SECRET:
            raise ConfigurationError(f"{option} has no keys.", hint=f"Give {option} a text.")
        found.append(Argument(flag.name, tuple(values), keys, off))
    return Arguments(tuple(found))


def argument_of(flag: Flag, text: str, variable: str) -> Argument | None:
    """The argument that ``variable=text`` asks for; None where it asks for the default.

    Raises ConfigurationError, naming `variable`, for a value that vLLM would refuse.
    """
    if flag.kind in {"switch", "set"}:
        value = text.strip().lower()
        if value in _TRUE:
            return Argument(flag.name)
        if value in _FALSE:
            return Argument(flag.name, off=True) if flag.kind == "switch" else None
        raise ConfigurationError(
            f"{variable}={text!r} is not a truth value.",
            hint=f"Use {variable}=true or {variable}=false.",
        )
    if flag.type == "int":
        try:
            # As plain digits, for other readers: Python, and so vLLM, takes "+4", "1_000" and
            # digits of other scripts.
            text = str(int(text))
        except ValueError:  # also for thousands of digits
            raise ConfigurationError(
                f"{variable}={text[:80]!r} is not a whole number.",
                hint=f"For example {variable}=4.",
            ) from None
    if len(text) > MOST_DIGITS and text.isdecimal():
        raise ConfigurationError(f"{variable} is a number of {len(text)} digits.")
    if flag.choices and text not in flag.choices:
        near = difflib.get_close_matches(text, flag.choices, 1)
        raise ConfigurationError(
            f"{variable}={text!r} is not one of {', '.join(flag.choices)}.",
            hint=f"Did you mean {near[0]}?" if near else None,
        )
    return Argument(flag.name, tuple(_words(text)) if flag.kind == "values" else (text,))


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


def _is_value(word: str) -> bool:
    """Whether argparse takes `word` for a value (ArgumentParser._parse_optional)."""
    if not word.startswith("-") or word == "-" or _NEGATIVE.fullmatch(word):
        return True
    return " " in word.partition("=")[0]


@cache
def _long_options() -> dict[str, tuple[Flag, bool]]:
    """{name without dashes: (flag, whether the name switches it off)}."""
    flags = known_flags()
    found = {f"no-{name}": (flag, True) for name, flag in flags.items() if flag.kind == "switch"}
    return found | {name: (flag, False) for name, flag in flags.items()}


@cache
def _short_options() -> dict[str, Flag]:
    return {short: flag for flag in known_flags().values() for short in flag.short}


def _flag_of(option: str, *, attachable: bool) -> tuple[Flag, bool, str | None]:
    """(flag, whether it is switched off, value that is joined to a short name).

    `attachable`: whether a value may be joined ("-n2") and a short name be cut.
    """
    found: dict[str, tuple[Flag, bool, str | None]] = {}
    if option.startswith("--"):
        name, known = option[2:].replace("_", "-"), _long_options()
        names = [name] if name in known else [n for n in known if name and n.startswith(name)]
        found = {f"--{full}": (*known[full], None) for full in names}
    elif option in _short_options():
        found = {option: (_short_options()[option], False, None)}
    elif attachable:
        for short, flag in _short_options().items():
            if short == option[:2]:
                found[short] = flag, False, option[2:]
            elif short.startswith(option):
                found[short] = flag, False, None
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise ConfigurationError(
            f"{option} may be {', '.join(sorted(found)[:6])}{' …' if len(found) > 6 else ''}.",
            hint="Write the name in full.",
        )
    near = nearest_flag(option.lstrip("-"))
    raise ConfigurationError(
        f"`vllm serve` {VLLM_VERSION} has no flag {option}.",
        hint=f"Did you mean --{near}?" if near else "See `vllm serve --help=all`.",
    )


def _nested(argument: Argument) -> dict[str, Any]:
    """{"a": {"b": value}} of --name.a.b value; --name.a+ adds to a list."""
    text, keys = argument.values[0], argument.keys
    if keys.endswith("+"):
        keys = keys.removesuffix("+")
        value: Any = text.split(",")
    else:
        value = _json_or_text(text)
    *above, last = keys.split(".")
    found = {last: value}
    for key in reversed(above):
        found = {key: found}
    return found


def _json_or_text(text: str) -> Any:
    try:
        return read_json(text)
    except ValueError:
        number = _SUFFIXED.fullmatch(text.strip())
    if number is None:
        return text
    digits, letter = (number[1], number[2]) if number[2] else (number[3], number[4])
    power = "kmgt".index(letter.lower()) + 1
    return int(float(digits) * 1000**power) if letter.islower() else int(digits) * 1024**power


def _update(found: dict[str, Any], more: dict[str, Any]) -> None:
    """As vLLM merges keys: objects into objects, lists behind lists, else the last wins."""
    for key, value in more.items():
        there = found.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            _update(there, value)
        elif isinstance(value, list) and isinstance(there, list):
            found[key] = there + value
        else:
            found[key] = value
