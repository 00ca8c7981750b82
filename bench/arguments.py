"""Which command-line options do all benches that load or write the model have?"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.model import parse_size


def model_arguments(description: str, *, repetitions: int) -> argparse.ArgumentParser:
    """A parser with `--size` (of the model), `--repetitions` (with its default) and `--output`.

    `description`: a module's docstring; its first line is shown.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--size", default="1.5GB", type=parse_size)
    parser.add_argument("--repetitions", default=repetitions, type=int)
    parser.add_argument("--output", type=Path)
    return parser
