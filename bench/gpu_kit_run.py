"""On the GPU machine: installs the kit beside itself and runs its tests or its benches.

    python3 run tests|bench|sweep [--device cpu] [--minutes 8] [--size 4GB] [--output FOLDER]

Needs nothing but Python's own modules. Results are JSON files, named after the device, in --output,
else in $OUT, else in gpu-results/ here. It ends by itself within --minutes and half a minute more.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import suppress
from pathlib import Path

KIT = Path(__file__).resolve().parent
LOOK = """
import json, platform, sys
import torch, tensorizer
import tensorserve.loading.stream, tensorserve.packing.pack
from bench.device import device_facts
from bench.results import versions
device = sys.argv[1]
if device != "cpu" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU here (--device cpu tries the kit itself)")
print(json.dumps({"device": device_facts(device), "versions": versions()}))
"""
# A process that does not end when it was asked to.
_PATIENCE = 10.0


def main() -> int:
    """The exit code of the command that was run: 0 for success, 124 for a timeout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("tests", "bench", "sweep"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", default=8.0, type=float)
    parser.add_argument("--size", default="4GB", help="of the model that the benches load")
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--target", type=Path, default=KIT / "site", help="where to install")
    parser.epilog = "What stands after -- goes to pytest, or to the bench."
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options = parser.parse_args(sys.argv[1:end])
    options.more = sys.argv[end + 1 :]
    until = time.monotonic() + 60 * options.minutes
    output: Path = options.output or Path(os.environ.get("OUT") or "gpu-results")
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    install(options.target)
    built = build()
    environment = surroundings(options.target)
    seen = look(options.device, environment)
    if isinstance(seen, str):
        print(f"Nothing was run: {seen}", file=sys.stderr)
        return 69
    name = re.sub(r"[^a-z0-9]+", "-", seen["device"]["name"].lower()).strip("-")[:40].strip("-")
    print(f"{seen['device']['name']}; {seen['versions']}; C: {built}", flush=True)
    result = output / f"gpu-{options.what}-{name}.json"
    left = max(1.0, (until - time.monotonic()) / 60)
    words = command(options, result, left)
    code = run(words, environment, output / f"gpu-{options.what}-{name}.log", until)
    if result.exists():
        add(result, {"kit": json.loads((KIT / "KIT.json").read_text())["commit"], "built": built})
        print(f"\nResult: {result}")
    return code


def install(target: Path) -> None:
    """Unpack the wheels: they hold modules, whatever pip there is; once."""
    mark = target / "installed"
    wheels = sorted((KIT / "wheels").glob("*.whl"))
    names = "\n".join(wheel.name for wheel in wheels)
    if mark.exists() and mark.read_text() == names:
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)
    mark.write_text(names)


def build() -> dict[str, str]:
    """Compile our C in its place; where that cannot be, take what the kit brings. Says which."""
    about = json.loads((KIT / "KIT.json").read_text())
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    how = {}
    for name, processor in about["sources"].items():
        source = KIT / name
        library = source.with_name(f"_{source.stem}.so")
        if processor not in {None, platform.machine()}:
            how[source.stem] = f"not for {platform.machine()}"
            continue
        how[source.stem] = "brought along"
        if compiler:
            words = [*compiler.split(), *about["flags"], "-o", str(library), str(source)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if not done.returncode:
                how[source.stem] = f"compiled by {compiler}"
            else:
                how[source.stem] = f"brought along; {compiler} said: {done.stderr[-300:]}"
        if how[source.stem].startswith("brought"):
            shutil.copyfile(KIT / "prebuilt" / library.name, library)
        try:
            ctypes.CDLL(str(library))
        except OSError as error:
            how[source.stem] = f"cannot be loaded: {error}"
    return how


def surroundings(target: Path) -> dict[str, str]:
    """The environment in which all of it is found. Nothing of tensorserve's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TENSORSERVE")}
    paths = [str(target), str(KIT / "entrypoint"), str(KIT)]
    libraries = [str(KIT / "lib"), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "LD_LIBRARY_PATH": os.pathsep.join(libraries),
        "PYTHONUNBUFFERED": "1",
        # The machine's own pytest plugins may not fit this pytest.
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }


def look(device: str, environment: dict[str, str]) -> dict | str:
    """What is there, or why nothing can be run."""
    words = [sys.executable, "-c", LOOK, device]
    done = subprocess.run(
        words, cwd=KIT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return done.stderr.strip()[-2000:]
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def command(options: argparse.Namespace, result: Path, minutes: float) -> list[str]:
    """What is run, in the kit's folder."""
    python = [sys.executable, "-m"]
    if options.what == "tests":
        tests = options.more or ["tests/gpu", "tests/unit/loading/test_loading_gpu_staging.py"]
        return [
            *python,
            *("pytest", "--quiet", "-p", "pytest_timeout", "--timeout", "120"),
            *("-p", "no:cacheprovider"),
            *("-p", "bench.gpu_kit_report", "--device", options.device),
            *("--report", str(result), *tests),
        ]
    module = "bench.gpu" if options.what == "bench" else "bench.gpu_sweep"
    words = ["--device", options.device, "--minutes", f"{minutes - 0.2:.2f}"]
    return [
        *(*python, module, *words, "--size", options.size, "--output", str(result)),
        *options.more,
    ]


def run(words: list[str], environment: dict[str, str], log: Path, until: float) -> int:
    """Run it, its output here and in `log`; ended when time is up."""
    process = subprocess.Popen(
        words,
        cwd=KIT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def show() -> None:
        with log.open("w") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)

    shower = threading.Thread(target=show, daemon=True)
    shower.start()
    try:
        code = process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        print("\nTime is up: it is ended; what it has found so far is in the result.", flush=True)
        code = 124
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    shower.join(_PATIENCE)
    return code


def add(result: Path, more: dict) -> None:
    """To what the result says already."""
    result.write_text(json.dumps(json.loads(result.read_text()) | more, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
