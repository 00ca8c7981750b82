"""Compiled code is found again: a server takes what `tensorserve precompile` has sealed.

A random Llama of one layer: compiling it takes a tenth of the time that SmolLM2 needs.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import tiny_models
from running import BIN, Tensorserve, clean_environment

PROMPTS = ["The capital of France is", "1 2 3 4"]
LOADED = "Directly load AOT compilation from path"


def test_a_server_compiles_nothing_and_answers_the_same(tmp_path: Path, model_dir: Path) -> None:
    """On a machine whose caches are empty: as with them, and as a server that compiles itself."""
    model = tiny_models.one_layer(tmp_path / "model", model_dir)
    bundle = tmp_path / "bundle"
    run("pack", model, bundle, "--encrypt", "--key-file", tmp_path / "key")
    common = {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_KEY_FILE": str(tmp_path / "key"),
        "TENSORSERVE_VLLM_ENFORCE_EAGER": "false",
        # vLLM runs the model with as many once before it is ready.
        "TENSORSERVE_VLLM_MAX_NUM_BATCHED_TOKENS": "512",
        "XDG_CACHE_HOME": str(tmp_path / "caches"),
        # As in the image: torch would compile its headers once more, to try the compiler.
        "TORCHINDUCTOR_VEC_ISA_OK": "1",
    }
    (tmp_path / "job").mkdir()
    environment = Tensorserve(tmp_path / "job", common).environment
    said = run("precompile", bundle, environ=environment)
    (sealed,) = (bundle / "compiled").iterdir()
    assert f"compiled/{sealed.name}" in said
    assert "requests answered" in said
    assert list((tmp_path / "caches/tensorserve-compiled").iterdir()) == []

    required = common | {"TENSORSERVE_COMPILED": "required"}
    alone = common | {"TENSORSERVE_COMPILED": "off", "XDG_CACHE_HOME": str(tmp_path / "alone")}
    taken, itself = Served(tmp_path / "required", required), Served(tmp_path / "off", alone)

    assert taken.results == ["brought"]
    assert taken.metric == {"brought"}
    # The job's state directory was another one.
    assert [LOADED in one.said for one in (taken, itself)] == [True, False]
    assert "Compiling model again" not in taken.said
    assert itself.results == []
    assert taken.answers == itself.answers


class Served:
    """What a server of `environ` said and did until it was stopped."""

    def __init__(self, directory: Path, environ: dict[str, str]) -> None:
        directory.mkdir()
        with Tensorserve(directory, environ) as engine:
            engine.wait_ready()
            self.answers = engine.completions("model", PROMPTS)
            self.said = engine.text
            results = ("brought", "kept", "unused", "absent", "no_place")
            name = "tensorserve_compiled_cache"
            self.metric = {one for one in results if engine.metric(name, result=one)}
            self.results = [event["result"] for event in compiled(engine.events())]


def compiled(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == "compiled_cache"]


def run(*words: object, environ: dict[str, str] | None = None) -> str:
    """What a command of ours prints."""
    done = subprocess.run(
        [BIN / "tensorserve", *map(str, words)],
        env=environ or clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout
