"""Attack: the last of a bundle's rank files is hidden, so that fewer ranks seem to be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from loads import load
from starting import refused
from tensorizer import EncryptionParams, TensorSerializer
from victims import GIVEN, KEY, Store

from tensorserve.errors import ConfigurationError
from tensorserve.packing.sign import sign
from tensorserve.sources import Access

RANKS = "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE"


@pytest.fixture
def signed(tmp_path: Path) -> Path:
    """Three files, as vLLM's own path writes one for each rank, with a manifest by our key."""
    bundle = tmp_path / "ranks"
    bundle.mkdir()
    (bundle / "config.json").write_text("{}")
    for rank in range(3):
        path = bundle / f"model-rank-{rank:03d}.tensors"
        serializer = TensorSerializer(str(path), encryption=EncryptionParams(KEY))
        serializer.write_state_dict({"model.norm.weight": torch.full((9, 7), rank)})
        serializer.close()
    sign(str(bundle), Access(), GIVEN, wish="auto")
    return bundle


def test_the_manifest_says_how_many_there_are(tmp_path: Path, signed: Path, disk: Store) -> None:
    """Not what a server answers when it is asked for one more."""
    assert set(load(disk.put(signed) | {RANKS: "3"}, 2)) == {"model.norm.weight"}
    (signed / "model-rank-002.tensors").unlink()
    said = refused(tmp_path, disk.put(signed) | {RANKS: "2"}, code=78)
    assert "3 shards by its manifest.json, not 2" in said


def test_for_a_template_as_well(signed: Path, disk: Store) -> None:
    """The user may name the files."""
    (signed / "model-rank-002.tensors").unlink()
    environ = disk.put(signed) | {RANKS: "2"}
    environ["TENSORSERVE_MODEL_URI"] += "/model-rank-%03d.tensors"
    with pytest.raises(ConfigurationError, match="3 shards by its"):
        load(environ)


def test_a_file_that_is_not_in_the_manifest_is_not_taken_first(signed: Path, disk: Store) -> None:
    """One file for all ranks, put beside those that were packed, would be looked for first."""
    (signed / "model.tensors").write_bytes((signed / "model-rank-000.tensors").read_bytes())
    assert torch.equal(
        load(disk.put(signed) | {RANKS: "3"}, 2)["model.norm.weight"], torch.full((9, 7), 2)
    )
