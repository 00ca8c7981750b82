"""By which file does the loader inside vLLM decide in which order a model is loaded?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from vllm.config.load import LoadConfig

from tensorserve.errors import CorruptError
from tensorserve.packing import pack
from tensorserve.settings import Settings
from tensorserve.sources import Access
from tensorserve.start import Shard, Start
from tensorserve.verification import NOTHING
from tensorserve.vllm_loader import TensorserveLoader


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
        loader._started = Start(settings, (), (shard,))
        return loader

    assert not with_index(None)._in_vllm_layout()
    with pytest.raises(CorruptError, match="not the one that this start checked"):
        with_index("0" * 64)._in_vllm_layout()
