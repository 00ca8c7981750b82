"""Bundles of layout `vllm`: what a start checks of them before vLLM is imported.

Their files are written here by the packer's own parts, from tensors of a test instead of an engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_samples import ACCESS, make_model
from manifests import rewrite
from tensorserve.bundle.engine_fingerprint import VLLM, Fingerprint
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.layout import RANK_MARKER
from tensorserve.bundle.manifest import parse_manifest, read_manifest
from tensorserve.bundle.verify import verify
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import TensorSpec
from tensorserve.launch.preflight import Weights, check_weights
from tensorserve.packing import pack as pack_module
from tensorserve.packing.pack import pack
from tensorserve.packing.tensor_source import Read, TensorsSource
from tensorserve.secret import Secret

ENGINE = Fingerprint("0.32.0", "cpu", "LlamaForCausalLM", "bfloat16", "none", 2, 1, False)
KEY = bytes(range(32))
GIVEN = parse_key(Secret(KEY, "the test"))


def rank_source(rank: int) -> TensorsSource:
    """A rank that holds `w`, filled with its number, and the marker."""
    content = {"w": torch.full((64, 64), rank + 1, dtype=torch.uint8), RANK_MARKER: torch.zeros(1)}

    def read(name: str, start: int, buffer: memoryview) -> None:
        data = content[name].to(torch.uint8).view(-1)
        buffer[:] = bytes(data[start : start + len(buffer)].tolist())

    @contextmanager
    def reading() -> Iterator[Read]:
        yield read

    specs = (TensorSpec("w", "uint8", (64, 64)), TensorSpec(RANK_MARKER, "uint8", (1,)))
    return TensorsSource(specs, reading)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks, encrypted. vLLM itself is in tests/e2e and tests/models."""

    @contextmanager
    def engine(
        _source: Path, _dtype: str | None, ranks: int, _code: bool
    ) -> Iterator[tuple[Fingerprint, list[TensorsSource]]]:
        yield replace(ENGINE, tensor_parallel_size=ranks), [rank_source(r) for r in range(ranks)]

    monkeypatch.setattr(pack_module, "engine_parameters", engine)
    result = pack(
        make_model(tmp_path / "hf"),
        str(tmp_path / "bundle"),
        access=ACCESS,
        key=Secret(KEY, "the test"),
        layout=VLLM,
        tensor_parallel_size=2,
    )
    assert "in 2 files" in str(result)
    return tmp_path / "bundle"


def check(bundle: Path, ranks: int = 2, file: str = "", **environ: str) -> Weights:
    settings = Settings.from_environment(
        {
            "TENSORSERVE_MODEL_URI": str(bundle / file) if file else str(bundle),
            "TENSORSERVE_KEY": KEY.hex(),
            "TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": str(ranks),
        }
        | environ
    )
    return check_weights(settings, make_plan(settings))


def test_each_rank_has_its_file(bundle: Path) -> None:
    """The manifest says for which engine; the loader is told."""
    manifest = read_manifest(str(bundle), ACCESS, GIVEN)
    assert manifest is not None
    assert manifest.layout == "vllm"
    assert manifest.fingerprint == ENGINE
    assert list(manifest.tensors_files) == ["model-rank-000.tensors", "model-rank-001.tensors"]
    shards = check(bundle).shards
    assert [shard.uri.rpartition("/")[2] for shard in shards] == list(manifest.tensors_files)
    assert [shard.fingerprint for shard in shards] == [ENGINE.to_json()] * 2


@pytest.mark.parametrize(
    ("ranks", "environ", "said"),
    [
        (1, {}, "tensor-parallel size: the bundle has 2, this start 1"),
        (4, {}, "tensor-parallel size: the bundle has 2, this start 4"),
        (2, {"TENSORSERVE_VLLM_PIPELINE_PARALLEL_SIZE": "2"}, "pipeline-parallel size"),
        (2, {"TENSORSERVE_VLLM_ENABLE_EXPERT_PARALLEL": "true"}, "expert parallelism"),
        (2, {"TENSORSERVE_VLLM_DTYPE": "half"}, "dtype: the bundle has bfloat16, this start float"),
    ],
)
def test_another_engine_is_refused_before_vllm_starts(
    bundle: Path, ranks: int, environ: dict[str, str], said: str
) -> None:
    """As far as the flags say it."""
    with pytest.raises(ConfigurationError, match=said):
        check(bundle, ranks, **environ)


def test_another_vllm_is_refused_before_it_starts(bundle: Path) -> None:
    """Its version is known without importing it."""
    rewrite(bundle, lambda document: document["fingerprint"].update(vllm="0.31.0"), GIVEN)
    with pytest.raises(ConfigurationError, match=r"the bundle has 0\.31\.0, this start 0\.32\.0"):
        check(bundle)


def test_without_its_manifest_a_rank_file_is_no_checkpoint(bundle: Path) -> None:
    """Cut, fused or transposed tensors must not go through a checkpoint's way."""
    (bundle / "manifest.json").unlink()
    with pytest.raises(CorruptError, match=r"no manifest\.json says for which engine"):
        check(bundle)


def test_a_manifest_of_this_layout_makes_no_checkpoint_of_it(tmp_path: Path) -> None:
    """The other way round."""
    key = Secret(KEY, "the test")
    pack(make_model(tmp_path / "m"), str(tmp_path / "hf-bundle"), access=ACCESS, key=key)
    fingerprint = replace(ENGINE, tensor_parallel_size=1).to_json()
    change = {"layout": "vllm", "fingerprint": fingerprint}
    rewrite(tmp_path / "hf-bundle", change, GIVEN)
    with pytest.raises(CorruptError, match="does not hold one rank's parameters"):
        check(tmp_path / "hf-bundle", 1)


def test_ranks_that_changed_places_are_noticed(bundle: Path) -> None:
    """Their indexes are equal, their headers are not."""
    first, second = bundle / "model-rank-000.tensors", bundle / "model-rank-001.tensors"
    first.rename(bundle / "x")
    second.rename(first)
    (bundle / "x").rename(second)
    with pytest.raises(CorruptError, match="2 of"):
        verify(str(bundle), ACCESS, GIVEN)


def test_a_manifest_of_this_layout_needs_fingerprint_and_files(bundle: Path) -> None:
    """Without them nobody could say whether it fits."""
    document = json.loads((bundle / "manifest.json").read_text())
    with pytest.raises(CorruptError, match="fingerprint"):
        parse_manifest(json.dumps(document | {"fingerprint": None}).encode(), "manifest.json")
    del document["tensors_files"]["model-rank-001.tensors"]
    with pytest.raises(CorruptError, match="lacks files of its 2 ranks"):
        parse_manifest(json.dumps(document).encode(), "manifest.json")


def test_an_unknown_layout_is_refused_by_name(bundle: Path) -> None:
    """What a release before this one says of layout vllm, too."""
    document = json.loads((bundle / "manifest.json").read_text()) | {"layout": "later"}
    with pytest.raises(ConfigurationError, match="layout 'later'"):
        parse_manifest(json.dumps(document).encode(), "manifest.json")
