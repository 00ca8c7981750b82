"""Digests of a manifest, for sealed files whose headers have none: each tensor's is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.tensors_file import OpenTensors, open_tensors
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.engine.checked_load import checked_as
from tensorserve.errors import CorruptError
from tensorserve.launch.context import Shard
from tensorserve.launch.preflight import check_weights
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream
from tensorserve.loading.reference import ReferenceStream
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access

SECRET = Secret(bytes(range(32)), "the test")
TENSORS = {
    "a": torch.arange(3 * 1024**2, dtype=torch.int32),
    "b": torch.ones(5),
    "c": torch.ones(7),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encrypted; the largest tensor has six chunks."""
    directory = tmp_path_factory.mktemp("digests")
    (directory / "hf").mkdir()
    save_file(TENSORS, directory / "hf" / "model.safetensors")
    (directory / "hf" / "config.json").write_text("{}")
    pack(directory / "hf", str(directory / "b"), access=Access(), key=SECRET)
    return directory / "b"


def checked(bundle: Path) -> Shard:
    """What the checks hand over with TENSORSERVE_VERIFY=hashes."""
    settings = Settings.from_environment(
        {
            "TENSORSERVE_MODEL_URI": str(bundle),
            "TENSORSERVE_KEY": SECRET.reveal().hex(),
            "TENSORSERVE_VERIFY": "hashes",
        }
    )
    return check_weights(settings, make_plan(settings)).shards[0]


def opened_in(bundle: Path) -> OpenTensors:
    return open_tensors(str(bundle / "model.tensors"), Access(), parse_key(SECRET))


@pytest.fixture(params=["auto", "reference"])
def loader(request: pytest.FixtureRequest) -> str:
    """Who reads: ours, or tensorizer's own reader, which knows nothing of a manifest."""
    return str(request.param)


def load(bundle: Path, options: LoadOptions, loader: str) -> dict[str, torch.Tensor]:
    opened = opened_in(bundle)
    records, progress = opened.index.tensors, LoadProgress()
    stream: TensorStream | ReferenceStream
    if loader == "reference":
        stream = ReferenceStream(
            opened.source,
            opened.index,
            records,
            key=opened.key,
            options=options,
            progress=progress,
        )
    else:
        stream = TensorStream(
            opened.source,
            records,
            encrypted=True,
            key=opened.key,
            options=options,
            progress=progress,
        )
    try:
        with stream:
            return {record.name: tensor.clone() for record, tensor in stream}
    finally:
        opened.source.close()


def options_of(bundle: Path, shard: Shard) -> LoadOptions:
    opened = opened_in(bundle)
    opened.source.close()
    index = opened.index
    return checked_as(LoadOptions(connections=2), shard, index, index.tensors, "the file")


def test_tensors_with_their_digests_are_given_out(bundle: Path, loader: str) -> None:
    """All of them, as they went in."""
    options = options_of(bundle, checked(bundle))
    assert options.verify_hashes
    assert len(options.digests) == len(TENSORS)
    found = load(bundle, options, loader)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("number", range(3))
def test_another_digest_ends_the_load(bundle: Path, number: int, loader: str) -> None:
    """Of whichever tensor."""
    options = options_of(bundle, checked(bundle))
    offset = sorted(options.digests)[number]
    options.digests[offset] = bytes(32)  # type: ignore[index]
    with pytest.raises(CorruptError, match="the sha256 that the manifest gives"):
        load(bundle, options, loader)


def test_a_missing_digest_ends_the_load(bundle: Path, loader: str) -> None:
    """What should be compared and cannot be is an error."""
    with pytest.raises(CorruptError, match="is sealed, but neither"):
        load(bundle, LoadOptions(connections=2, verify_hashes=True), loader)


def test_another_index_than_the_checked_one_is_refused(bundle: Path) -> None:
    """Of a file that was replaced in between, under the same version."""
    shard = checked(bundle)
    opened = opened_in(bundle)
    opened.source.close()
    index = opened.index
    object.__setattr__(shard, "index_sha256", "0" * 64)
    with pytest.raises(CorruptError, match="not the one that this start checked"):
        checked_as(LoadOptions(), shard, index, index.tensors, "the file")
