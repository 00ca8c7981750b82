"""The bundles that are attacked: encrypted, in a directory and in a real S3 server."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from s3server import S3Server
from safetensors.torch import save_file

from s3_clients import s3_client
from tensorserve.bundle.keys import GivenKey
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access

KEY = bytes(range(40, 72))
BUCKET = "attacks"
GIVEN = GivenKey(KEY, "the test")
LAYERS = ("model.layers.0.weight", "model.layers.1.weight")


def make_source(directory: Path, seed: int = 1) -> Path:
    """A checkpoint with two tensors that only their names tell apart."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(64, 64, generator=generator) for name in LAYERS}
    tensors["model.embed.weight"] = torch.randn(700, 1024, generator=generator)
    tensors["model.norm.weight"] = torch.ones(16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    return directory


def make_adapter(directory: Path, value: float) -> Path:
    """As PEFT saves one."""
    directory.mkdir()
    content = {"base_model.model.a.lora_A.weight": torch.full((4, 16), value)}
    save_file(content, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}')
    return directory


def make_bundle(directory: Path, seed: int = 1, key: bytes | None = KEY, **options: Any) -> Path:
    """A packed bundle `directory`/bundle."""
    source = make_source(directory / "source", seed)
    secret = Secret(key, "the test") if key else None
    pack(source, str(directory / "bundle"), access=Access(), key=secret, **options)
    return directory / "bundle"


@dataclass(frozen=True)
class Store:
    """A place where bundles are: `put` one, and start from what it gives."""

    s3: S3Server | None
    directory: Path

    def put(self, bundle: Path) -> dict[str, str]:
        """The variables of a start from `bundle` as it is now."""
        key = {"TENSORSERVE_KEY": KEY.hex()}
        if self.s3 is None:
            place = self.directory / secrets.token_hex(4)
            shutil.copytree(bundle, place)
            return key | {"TENSORSERVE_MODEL_URI": str(place)}
        prefix = secrets.token_hex(8)
        client = s3_client(self.s3)
        for path in bundle.rglob("*"):
            if path.is_file():
                name = f"{prefix}/{path.relative_to(bundle)}"
                client.upload_file(str(path), BUCKET, name)
        return key | _environment(self.s3) | {"TENSORSERVE_MODEL_URI": f"s3://{BUCKET}/{prefix}"}


def _environment(s3: S3Server) -> Mapping[str, str]:
    return s3.environment | {"AWS_EC2_METADATA_DISABLED": "true"}
