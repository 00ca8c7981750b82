"""What the images set reaches the engine, and points to the one place that may be written."""

from __future__ import annotations

import re
from pathlib import Path

from tensorserve.config.compile_caches import cache_root, cache_variables
from tensorserve.config.environment import child_environment

DOCKERFILE = Path(__file__).parents[3] / "docker/Dockerfile"
CACHE = "/var/lib/tensorserve/cache"


def variables() -> dict[str, str]:
    """Every variable that an image has from an `ENV` of the Dockerfile."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    # Of this one only files are taken.
    kept = "\n".join(stage for stage in stages if "AS cuda-kernels" not in stage.split("\n")[0])
    lines = re.findall(r"^ENV (.+)$", kept, re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(lines)))


def test_the_engine_gets_every_variable_that_the_images_set() -> None:
    """Without its variable, a library would write to a place that is read-only."""
    ours = {name: value for name, value in variables().items() if "TENSORSERVE_" not in name}

    assert len(ours) > 25
    assert dict(child_environment(ours, None)) == ours


def test_what_is_compiled_or_cached_lies_below_the_cache_volume() -> None:
    """HOME as well: libraries without a variable of their own write there."""
    names = re.compile("HOME|CACHE|_DIR|TMP|BASE|EXTENSIONS")
    places = {name: value for name, value in variables().items() if names.search(name)}
    del places["CUDA_HOME"], places["TENSORSERVE_STATE_DIR"]

    assert {"HOME", "DG_JIT_CACHE_DIR", "HUMMING_TMP_DIR", "CUTE_DSL_CACHE_DIR"} <= places.keys()
    astray = {
        name: place for name, place in places.items() if not f"{place}/".startswith(f"{CACHE}/")
    }
    assert astray == {}


def test_the_images_know_every_cache_of_compiled_code() -> None:
    """As `up` gives them to the engine; other programs in the container see them too."""
    assert cache_root(variables()) == Path(CACHE)
    assert cache_variables(Path(CACHE)).items() <= variables().items()


def test_a_user_that_nobody_knows_has_a_name() -> None:
    """Python's getpass.getuser(), which libraries ask, raises for one without."""
    assert variables()["USER"]
