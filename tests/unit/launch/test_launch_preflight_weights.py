"""What is said of the weights that a start would read."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tensorizer import TensorSerializer

from rangeserver import RangeServer
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.launch.preflight.results import Passed
from tensorserve.launch.preflight.weights import check_weights
from tensorserve.telemetry import Check


def _said(uri: str) -> str:
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": uri})
    found: list[Passed] = []
    check_weights(settings, make_plan(settings), found.append)
    return next(passed.found for passed in found if passed.name is Check.WEIGHTS)


def test_what_reads_the_weights_is_said(tmp_path: Path) -> None:
    """With versions, where it is not this package: LD_LIBRARY_PATH may name another libcurl."""
    serializer = TensorSerializer(tmp_path / "model.tensors")
    serializer.write_state_dict({"a": torch.ones(4)})
    serializer.close()
    assert _said(str(tmp_path / "model.tensors")).endswith(" GB")
    with RangeServer(tmp_path) as server:
        said = _said(f"{server.url}/model.tensors")
    assert re.search(r" GB, read by \w+ [\d.]+ with OpenSSL [\d.]+$", said)
