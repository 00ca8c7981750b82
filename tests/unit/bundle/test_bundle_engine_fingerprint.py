"""For which engine is a bundle of layout `vllm`, and what is said where this start has another?"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorserve.bundle.engine_fingerprint import Fingerprint, check_fingerprint
from tensorserve.errors import ConfigurationError

PACKED = Fingerprint("0.32.0", "cpu", "LlamaForCausalLM", "bfloat16", "none", 2, 1, False)


def test_the_engine_that_it_was_packed_for_is_taken() -> None:
    """Whole, and as far as it is known."""
    check_fingerprint(PACKED, PACKED.to_json())
    check_fingerprint(PACKED, {"tensor_parallel_size": 2})
    check_fingerprint(PACKED, {})


@pytest.mark.parametrize(
    ("change", "said", "mend"),
    [
        (
            {"vllm": "0.33.0"},
            "vLLM: the bundle has 0.32.0, this start 0.33.0",
            "Pack the model again",
        ),
        ({"device": "cuda"}, "device: the bundle has cpu, this start cuda", "Pack the model again"),
        ({"architecture": "Other"}, "model class: the bundle has LlamaForCausalLM", "Pack"),
        ({"quantization": "fp8"}, "quantization: the bundle has none, this start fp8", "Pack"),
        (
            {"dtype": "float16"},
            "dtype: the bundle has bfloat16",
            "TENSORSERVE_VLLM_DTYPE=bfloat16",
        ),
        (
            {"tensor_parallel_size": 4, "pipeline_parallel_size": 2},
            "tensor-parallel size: the bundle has 2, this start 4; pipeline-parallel size: the "
            "bundle has 1, this start 2",
            "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE=2 and TENSORSERVE_VLLM_PIPELINE_PARALLEL_SIZE=1",
        ),
        (
            {"expert_parallel": True},
            "expert parallelism: the bundle has false, this start true",
            "TENSORSERVE_VLLM_ENABLE_EXPERT_PARALLEL=false",
        ),
    ],
)
def test_each_difference_is_named_with_what_to_do(
    change: dict[str, object], said: str, mend: str
) -> None:
    """Bundle and start, in a user's words; exit code 78."""
    with pytest.raises(ConfigurationError) as caught:
        check_fingerprint(PACKED, PACKED.to_json() | change)
    assert said in caught.value.message
    assert caught.value.hint is not None
    assert mend in caught.value.hint
    assert "--layout hf" in caught.value.hint


def test_parameters_of_another_stage_are_refused() -> None:
    """A later release may store them processed; this one would process them twice."""
    with pytest.raises(ConfigurationError, match="parameters taken"):
        check_fingerprint(replace(PACKED, stage="after post-processing"), {})


def test_what_is_written_is_read() -> None:
    """And what is missing or of another type is named."""
    assert Fingerprint.from_json(PACKED.to_json()) == PACKED
    for name in PACKED.to_json():
        with pytest.raises(ValueError, match=name):
            Fingerprint.from_json({k: v for k, v in PACKED.to_json().items() if k != name})
    with pytest.raises(ValueError, match="expert_parallel"):
        Fingerprint.from_json(PACKED.to_json() | {"expert_parallel": 1})
    with pytest.raises(ValueError, match="tensor_parallel_size"):
        Fingerprint.from_json(PACKED.to_json() | {"tensor_parallel_size": True})
    with pytest.raises(ValueError, match="below 1"):
        Fingerprint.from_json(PACKED.to_json() | {"tensor_parallel_size": 0})
    with pytest.raises(ValueError, match="not an object"):
        Fingerprint.from_json(None)
