"""Which draft model does `pack --draft` include, and is it complete?"""

from __future__ import annotations

import re
from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.errors import ConfigurationError
from tensorserve.packing.checkpoint import Checkpoint, read_checkpoint
from tensorserve.packing.hub import model_directory
from tensorserve.packing.weight_files import PICKLE_SUFFIXES

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")
# A pickle that vLLM's DFlash reads beside the weights (model_executor/models/qwen3_dflash.py,
# 0.32.0). Without it the draft model computes other tokens.
_MASK = "mask_embedding.pt"


def read_draft(given: str | Path) -> tuple[str, Checkpoint]:
    """(name in the bundle, checkpoint) of the draft model `given`.

    `given` is a directory, or organisation/model of the hub. Raises ConfigurationError if the draft
    needs pickles, and read_checkpoint's errors.
    """
    source, called = model_directory(Path(given))
    if not source.is_dir():
        raise ConfigurationError(
            f"--draft: {given} is not a directory.",
            hint="Give the Hugging Face directory of the draft model, or of EAGLE's heads.",
        )
    if not any(source.glob("*.safetensors")):
        pickles = sorted(p.name for p in source.iterdir() if p.name.endswith(PICKLE_SUFFIXES))
        if pickles:
            # Many EAGLE heads are published so. transformers cannot convert them.
            raise ConfigurationError(
                f"--draft: {source} has its weights as pickles only ({pickles[0]}): opening a "
                "pickle runs the code in it, so that is never done here.",
                hint="Convert it if you trust it: safetensors.torch.save_file(torch.load("
                f"'{pickles[0]}', weights_only=True), 'model.safetensors').",
            )
    if (source / _MASK).exists():
        raise ConfigurationError(
            f"--draft: {source / _MASK} is a pickle, which a bundle never includes; without it, "
            "vLLM would propose other tokens.",
            hint='Serve this draft from its own directory: set "model" in --speculative-config.',
        )
    name = _NOT_IN_NAMES.sub("-", called).lstrip("._-")[:128]
    return name or "model", read_checkpoint(source)


def refuse_drafts_alone(model: Checkpoint) -> None:
    """Raises ConfigurationError if `model` is a draft whose config.json names the target model.

    vLLM (0.32.0, transformers_utils/config.py, maybe_override_with_speculators) would serve the
    target model instead, from the hub.
    """
    if "config.json" not in model.files:
        return
    try:
        config = read_json((model.directory / "config.json").read_bytes())
        named = config["speculators_config"]["verifier"]["name_or_path"]
    except (ValueError, TypeError, KeyError):
        return  # not a speculators configuration
    raise ConfigurationError(
        f"{model.directory} is only a draft model, for {named} (speculators_config in its "
        "config.json).",
        hint=f"Pack that model with this draft: `tensorserve pack {named} DEST --draft "
        f"{model.directory}`.",
    )
