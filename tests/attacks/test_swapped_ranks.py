"""Attack: the files of two tensor-parallel ranks change places; their indexes are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forging import MANIFEST, downgrade, exchange, rewrite
from loads import load
from starting import command, refused
from victims import KEY, Store, make_source

from tensorserve.bundle.engine_fingerprint import VLLM, Fingerprint
from tensorserve.bundle.layout import RANK_MARKER
from tensorserve.errors import CorruptError
from tensorserve.format import TensorSpec
from tensorserve.packing import pack as pack_module
from tensorserve.packing.pack import pack
from tensorserve.packing.tensor_source import Read, TensorsSource
from tensorserve.secret import Secret
from tensorserve.sources import Access

ENGINE = Fingerprint("0.32.0", "cpu", "LlamaForCausalLM", "float32", "none", 2, 1, False)
FILES = ("model-rank-000.tensors", "model-rank-001.tensors")


def rank_source(rank: int) -> TensorsSource:
    """A rank's parameters, as `pack` gets them from vLLM (tests/e2e has the real ones)."""
    specs = (TensorSpec("w", "uint8", (64, 64)), TensorSpec(RANK_MARKER, "uint8", (1,)))

    def read(_name: str, _start: int, buffer: memoryview) -> None:
        buffer[:] = bytes([rank + 1]) * len(buffer)

    @contextmanager
    def reading() -> Iterator[Read]:
        yield read

    return TensorsSource(specs, reading)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle for two ranks, whose files have changed places."""

    @contextmanager
    def engine(*_: object) -> Iterator[tuple[Fingerprint, list[TensorsSource]]]:
        yield ENGINE, [rank_source(0), rank_source(1)]

    monkeypatch.setattr(pack_module, "engine_parameters", engine)
    bundle = tmp_path / "ranks"
    pack(
        make_source(tmp_path / "source"),
        str(bundle),
        access=Access(),
        key=Secret(KEY, "the test"),
        layout=VLLM,
        tensor_parallel_size=2,
    )
    exchange(bundle / FILES[0], bundle / FILES[1])
    return bundle


def put(store: Store, bundle: Path) -> dict[str, str]:
    return store.put(bundle) | {"TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE": "2"}


def test_with_the_manifest_made_to_fit(tmp_path: Path, ranks: Path, store: Store) -> None:
    """Its MAC cannot be."""
    rewrite(ranks)
    assert "somebody without the key" in refused(tmp_path, put(store, ranks))


@pytest.mark.parametrize("manifest", ["none", "version 1"])
def test_without_the_manifest(tmp_path: Path, ranks: Path, store: Store, manifest: str) -> None:
    """Nothing would say which file is which rank's."""
    if manifest == "none":
        (ranks / MANIFEST).unlink()
    else:
        rewrite(ranks, downgrade)
    refused(tmp_path, put(store, ranks))


def test_with_the_manifest_as_it_was(ranks: Path, store: Store) -> None:
    """Size and index fit; the headers do not, which the load finds in each rank's file."""
    environ = put(store, ranks)
    for rank in range(2):
        with pytest.raises(CorruptError, match="not those of the manifest"):
            load(environ, rank)
    del environ["TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE"]
    code, said = command("verify", environ, environ.pop("TENSORSERVE_MODEL_URI"))
    assert code == 65
    assert "2 of" in said
