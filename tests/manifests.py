"""Manifests as somebody writes them who has the key, and as somebody does who has not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorserve.bundle.keys import ModelKey
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.manifest_mac import Parameters


def rewrite(
    bundle: Path,
    change: Mapping[str, Any] | Callable[[dict[str, Any]], object],
    key: ModelKey | None = None,
) -> None:
    """Change members of the bundle's manifest.json; with `key`, its MAC fits afterwards."""
    path = bundle / MANIFEST
    document = json.loads(path.read_text())
    if callable(change):
        change(document)
    else:
        document |= change
    if key is not None:
        parameters = Parameters.from_json(document["authentication"])
        document["authentication"]["mac"] = parameters.keys(key, "the test").mac(document)
    path.write_text(json.dumps(document))


def as_version_1(bundle: Path) -> None:
    """As releases before the MAC wrote it, and as anybody can write it."""

    def older(document: dict[str, Any]) -> None:
        document["version"] = 1
        del document["authentication"]
        for entry in document["tensors_files"].values():
            entry.pop("digests", None)

    rewrite(bundle, older)
