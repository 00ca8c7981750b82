"""How is the command of a start run in a new container of an image?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import bench.directories  # noqa: F401 - finds the tests' modules

from containers import LOCAL  # isort: skip


def in_container(
    image: str, words: list[str], environment: Mapping[str, str], visible: Iterable[Path]
) -> tuple[list[str], dict[str, str]]:
    """(command, environment) that run `words` in a new container, which ends with the command.

    The container uses this machine's network and has `visible` mounted at their own paths; no cache
    is kept. Raises RuntimeError if neither podman nor docker is installed.
    """
    engine = next((name for name in ("podman", "docker") if shutil.which(name)), None)
    if engine is None:
        raise RuntimeError("neither podman nor docker is installed")
    run = [engine, "run", "--rm", "--network=host", "--shm-size=1g", f"--user={os.getuid()}:0"]
    run += LOCAL if engine == "podman" else ()
    for path in visible:
        run += ["--volume", f"{path}:{path}"]
    for name, value in environment.items():
        if name not in ("PATH", "HOME"):
            run += ["--env", f"{name}={value}"]
    return [*run, image, *words], dict(os.environ)
