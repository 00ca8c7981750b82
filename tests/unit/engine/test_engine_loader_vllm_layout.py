"""By which file does the loader inside vLLM decide in which order a model is loaded?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.config.load import LoadConfig

from tensorserve.bundle.trust import NOTHING
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.engine.loader import TensorserveLoader
from tensorserve.engine.rank_stream import Rank, RankStream
from tensorserve.errors import CorruptError
from tensorserve.launch.context import Shard, Start
from tensorserve.packing.pack import pack
from tensorserve.sources import Access


def test_the_layout_is_that_of_the_index_that_was_checked(tmp_path: Path) -> None:
    """A server may answer each opening otherwise, and name the same version each time: another
    layout would have weights processed before they are there.
    """
    (tmp_path / "hf").mkdir()
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    pack(tmp_path / "hf", str(tmp_path / "b"), access=Access())
    uri = str(tmp_path / "b" / "model.tensors")
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": uri})
    loader = TensorserveLoader(LoadConfig(model_loader_extra_config={"tensorizer_uri": uri}))

    def with_index(digest: str | None) -> TensorserveLoader:
        size = Path(uri).stat().st_size
        shard = Shard(uri, None, size, index_sha256=digest, verification=NOTHING)
        start = Start(settings, make_plan(settings), (shard,))
        loader._reading = RankStream(start, Rank(torch.device("cpu")))
        return loader

    assert not with_index(None)._in_vllm_layout()
    with pytest.raises(CorruptError, match="not the one that this start checked"):
        with_index("0" * 64)._in_vllm_layout()
