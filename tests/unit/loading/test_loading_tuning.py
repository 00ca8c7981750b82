"""The loader's numbers fit one another, and each says where it comes from."""

from __future__ import annotations

import ast
import dataclasses
from itertools import pairwise
from types import ModuleType

import pytest

from tensorserve.format import CHUNK_BYTES
from tensorserve.loading import block_cache, tuning
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import tuning as transport


def test_a_part_is_a_chunk_and_whole_strips() -> None:
    """Else no part could be decrypted as a whole, nor be cut into strips."""
    assert DEFAULTS.part_bytes == CHUNK_BYTES
    assert DEFAULTS.part_bytes % DEFAULTS.strip_bytes == 0


def test_requests_end_at_common_boundaries() -> None:
    """Of jobs, long and short, of blocks fetched ahead, and of parts."""
    assert DEFAULTS.job_bytes % DEFAULTS.short_job_bytes == 0
    assert DEFAULTS.short_job_bytes % DEFAULTS.part_bytes == 0
    assert block_cache.BLOCK_BYTES % DEFAULTS.job_bytes == 0
    assert DEFAULTS.job_bytes % DEFAULTS.read_ahead_bytes == 0


def test_half_of_the_memory_is_left_for_tensors() -> None:
    """An eighth is kept, three eighths are for connections."""
    numerator, denominator = DEFAULTS.connections_part
    assert 1 / DEFAULTS.kept_part + numerator / denominator <= 0.5


@pytest.mark.parametrize("module", [tuning, transport], ids=["loading", "sources"])
def test_each_number_has_a_text(module: ModuleType) -> None:
    """Its unit and its origin stand right below it."""
    with open(str(module.__file__), encoding="utf-8") as file:
        body = next(
            node.body for node in ast.parse(file.read()).body if isinstance(node, ast.ClassDef)
        )
    texts = {
        field.target.id: text.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
    }
    assert set(texts) == {field.name for field in dataclasses.fields(module.Tuning)}
