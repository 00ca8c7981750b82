"""What do commands print beside their result, and how do they read what was typed?"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tensorserve.config.tidying import has_controls, tidied
from tensorserve.errors import ConfigurationError

if TYPE_CHECKING:
    from tensorserve.config.settings import SourceSettings


def warn(*warnings: str) -> None:
    """Print warnings."""
    for warning in warnings:
        print(f"tensorserve: warning: {warning}", file=sys.stderr, flush=True)


def read_settings(environ: Mapping[str, str]) -> SourceSettings:
    """The settings of commands whose URI is an argument."""
    from tensorserve.config.settings import SourceSettings

    settings = SourceSettings.from_environment(environ)
    warn(*settings.warnings)
    return settings


def read_settings_with_key(environ: Mapping[str, str], uri: str) -> SourceSettings:
    """The same, with the key of the bundle at `uri` if it is given by reference."""
    from tensorserve.bundle.location import split_model_uri
    from tensorserve.config.unwrapping import with_key

    return with_key(read_settings(environ), split_model_uri(uri)[0])


def typed_uri(text: str, what: str) -> str:
    """`text` as a variable's value would be read. Raises ConfigurationError for what is no URI."""
    from tensorserve.config.value_parsers import parse_uri

    name = "TENSORSERVE_MODEL_URI"
    text = tidied({name: text, "HOME": os.environ.get("HOME", "")}).get(name, "")
    if not text or has_controls(text):
        raise ConfigurationError(f"{what} is empty, or has a line break or such in it.")
    return parse_uri(text, what)


def stop_cleanly() -> None:
    """SIGTERM ends a command as Ctrl-C does: unfinished output is removed."""

    def stop(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)


class ByteBar:
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

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
