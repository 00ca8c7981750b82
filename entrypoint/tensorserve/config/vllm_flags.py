"""Which flags does `vllm serve` have? Known without importing vLLM, which takes seconds.

The list is read from vLLM's own argument parser by ``docs/make_vllm_flags.py`` and kept beside this
file; a test holds it against the installed vLLM.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FLAGS_FILE = Path(__file__).with_name("vllm_flags.json")
VLLM_VERSION = "0.32.0"

# Set by tensorserve: the bundle decides them, and a user's value would conflict.
OWNED = {
    "model": "The bundle is the model: set TENSORSERVE_MODEL_URI",
    "load-format": "Weights are always loaded by tensorserve's own loader",
    "model-loader-extra-config": "Use TENSORSERVE_FETCH_CONNECTIONS and _VERIFY",
    "tokenizer": "The tokenizer comes from the bundle",
    "hf-config-path": "The configuration comes from the bundle",
    "config": "Set single flags with TENSORSERVE_VLLM_<FLAG>, or pass them after `--`",
    "headless": "Several machines take Ray: see docs/kubernetes.md",
}
# Flags with a variable of their own, because other parts of a start need their values.
RENAMED = {
    "host": "TENSORSERVE_HOST",
    "port": "TENSORSERVE_PORT",
    "served-model-name": "TENSORSERVE_MODEL_NAME",
}
# Secret: not in an argument list, which every process can read.
SECRET = frozenset({"api-key", "hf-token"})


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
