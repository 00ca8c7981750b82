"""What is said where vLLM cannot build the model that is to be packed."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from hf_samples import ACCESS, make_model
from tensorserve.bundle.engine_fingerprint import VLLM
from tensorserve.errors import ConfigurationError
from tensorserve.packing.pack import pack
from tensorserve.packing.rank_parameters import _reason

# As vLLM 0.32.0 prints it: the cause in a rank first, then what its parents make of it.
OUTPUT = """\
(Worker_TP1 pid=7) ERROR 11-26 10:35:01 [multiproc_executor.py:988] Traceback (most recent call last):
(Worker_TP1 pid=7) ERROR 11-26 10:35:01 [multiproc_executor.py:988] ValueError: 9 heads, 2 ranks.
Traceback (most recent call last):
Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
"""  # noqa: E501


def test_the_cause_is_found_in_vllms_output() -> None:
    """Not the last line, which says to look above."""
    assert _reason(OUTPUT.splitlines()) == "ValueError: 9 heads, 2 ranks."
    assert _reason(OUTPUT.splitlines()[-1:]).startswith("Exception: WorkerProc")
    pydantic = ["pydantic.ValidationError: 1 validation error for X", "  Value error, why [type="]
    assert _reason(pydantic) == "Value error, why [type="
    assert _reason(["Killed"]) == "it ended."


def test_without_vllm_the_other_layout_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pack` runs on machines that have none. Nothing is left at the destination."""
    version = metadata.version

    def without_vllm(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", without_vllm)
    with pytest.raises(ConfigurationError, match="needs vLLM") as caught:
        pack(make_model(tmp_path / "hf"), str(tmp_path / "to" / "m"), access=ACCESS, layout=VLLM)
    assert "layout 'hf' needs no vLLM" in str(caught.value)
    assert list((tmp_path / "to").iterdir()) == []
