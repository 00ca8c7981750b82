"""Each mistake gives one clear message and its exit code, and vLLM is never started for it.

Run through `tensorserve up`, as a container would, against a real S3 server and real files.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from running import request
from s3server import free_ports
from safetensors.torch import save_file
from tensorizer import EncryptionParams, TensorSerializer

from waiting import wait_for

PROGRAM = str(Path(sys.executable).with_name("tensorserve"))
KEY = bytes(range(32))
WRONG_KEY = bytes(32)


@dataclass
class Outcome:
    """How `up` ended."""

    code: int
    text: str
    events: list[dict[str, object]]

    def must_be(self, code: int, *said: str) -> None:
        """Exit code, exactly one error message with all of `said`, no traceback, no vLLM."""
        assert self.code == code, self.text
        for words in said:
            assert words in self.text, self.text
        assert "Traceback" not in self.text, self.text
        messages = self.text.count("tensorserve: error:")
        assert messages == 1, self.text
        assert not [e for e in self.events if e.get("phase") == "import"], "vLLM was started"
        assert "INFO" not in self.text, "vLLM printed something"


class Up:
    """Runs `tensorserve up` with a clean environment and free ports."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        port, metrics_port = free_ports(2)
        self.base = {
            "PATH": os.environ["PATH"],
            "HOME": str(state_dir),
            "TENSORSERVE_STATE_DIR": str(state_dir / "state"),
            "TENSORSERVE_HOST": "127.0.0.1",
            "TENSORSERVE_METRICS_HOST": "127.0.0.1",
            "TENSORSERVE_PORT": str(port),
            "TENSORSERVE_METRICS_PORT": str(metrics_port),
            "TENSORSERVE_FETCH_DEADLINE": "3",
            # Nobody scrapes these starts (but one).
            "TENSORSERVE_FAILURE_LINGER": "0",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def __call__(
        self,
        environ: dict[str, str],
        *,
        wrap: tuple[str, ...] = (),
        arguments: tuple[str, ...] = (),
    ) -> Outcome:
        done = subprocess.run(
            [*wrap, PROGRAM, "up", *arguments],
            env={k: v for k, v in (self.base | environ).items() if v},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        log = self.state_dir / "state" / "events.jsonl"
        events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return Outcome(done.returncode, done.stdout + done.stderr, events)


@pytest.fixture
def up(tmp_path: Path) -> Up:
    return Up(tmp_path)


def write_bundle(directory: Path, encryption: EncryptionParams | None) -> Path:
    directory.mkdir(parents=True)
    serializer = TensorSerializer(str(directory / "model.tensors"), encryption=encryption)
    serializer.write_state_dict({f"layers.{i}.weight": torch.randn(64, 64) for i in range(4)})
    serializer.close()
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def encrypted(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "encrypted", EncryptionParams(key=KEY))


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "plain", None)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """Sealed with a passphrase, by tensorizer itself."""
    return write_bundle(tmp_path / "sealed", EncryptionParams.from_string("open sesame"))


def test_an_unknown_variable(up: Up) -> None:
    """Names the nearest known one."""
    outcome = up({"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_KEYFILE": "x"})
    outcome.must_be(78, "TENSORSERVE_KEYFILE", "Did you mean TENSORSERVE_KEY_FILE")


def test_both_a_secret_and_its_file(up: Up, tmp_path: Path) -> None:
    """Which would win is never guessed."""
    (tmp_path / "k").write_bytes(KEY)
    outcome = up(
        {
            "TENSORSERVE_MODEL_URI": "/m",
            "TENSORSERVE_KEY": KEY.hex(),
            "TENSORSERVE_KEY_FILE": str(tmp_path / "k"),
        }
    )
    outcome.must_be(78, "Both TENSORSERVE_KEY and TENSORSERVE_KEY_FILE")


def test_no_model_uri(up: Up) -> None:
    """`docker run` with nothing set."""
    up({}).must_be(78, "TENSORSERVE_MODEL_URI is not set")


def test_a_uri_of_a_wrong_scheme(up: Up) -> None:
    """Names those that work."""
    up({"TENSORSERVE_MODEL_URI": "gcs://b/m"}).must_be(78, "'gcs'", "gs://")


def test_an_unknown_vllm_flag(up: Up) -> None:
    """Found without importing vLLM."""
    outcome = up({"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_VLLM_MAXMODELLEN": "1"})
    outcome.must_be(78, "MAXMODELLEN", "TENSORSERVE_VLLM_MAX_MODEL_LEN")


def s3_environ(s3, **changes: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL_S3": s3.endpoint_url,
        "AWS_ACCESS_KEY_ID": s3.access_key,
        "AWS_SECRET_ACCESS_KEY": s3.secret_key,
        "AWS_REGION": "us-east-1",
    } | changes


def test_a_bucket_that_does_not_exist(up: Up, s3) -> None:
    """Says the bucket's name."""
    outcome = up(s3_environ(s3) | {"TENSORSERVE_MODEL_URI": "s3://no-such-bucket/m"})
    outcome.must_be(69, "no-such-bucket")


def test_no_credentials(up: Up, s3, bucket: str) -> None:
    """Says which variables to set."""
    outcome = up(
        s3_environ(s3, AWS_ACCESS_KEY_ID="", AWS_SECRET_ACCESS_KEY="")
        | {"TENSORSERVE_MODEL_URI": f"s3://{bucket}/m"}
    )
    outcome.must_be(77, "credentials", "AWS_ACCESS_KEY_ID")


def test_wrong_credentials(up: Up, s3, bucket: str) -> None:
    """Not retried, not mistaken for a missing file."""
    outcome = up(
        s3_environ(s3, AWS_SECRET_ACCESS_KEY="wrong")
        | {"TENSORSERVE_MODEL_URI": f"s3://{bucket}/m"}
    )
    outcome.must_be(77)
    assert "wrong" not in outcome.text.replace("wrongly", "")


def test_a_missing_model_tensors(up: Up, plain: Path) -> None:
    """Names the file that was looked for."""
    (plain / "model.tensors").unlink()
    up({"TENSORSERVE_MODEL_URI": str(plain)}).must_be(65, "model.tensors")


def test_a_missing_config_json(up: Up, plain: Path) -> None:
    """vLLM would notice after a minute."""
    (plain / "config.json").unlink()
    up({"TENSORSERVE_MODEL_URI": str(plain)}).must_be(65, "config.json")


def test_a_file_that_is_not_a_tensors_file(up: Up, plain: Path) -> None:
    """A safetensors file under the wrong name, say."""
    save_file({"a": torch.ones(3)}, plain / "model.tensors")
    up({"TENSORSERVE_MODEL_URI": str(plain)}).must_be(65, "not a .tensors file")


def test_a_truncated_file(up: Up, encrypted: Path) -> None:
    """F9: both sizes are in the message."""
    path = encrypted / "model.tensors"
    os.truncate(path, path.stat().st_size - 1000)
    outcome = up({"TENSORSERVE_MODEL_URI": str(encrypted), "TENSORSERVE_KEY": KEY.hex()})
    outcome.must_be(65, "model.tensors")


def test_a_wrong_key(up: Up, encrypted: Path, tmp_path: Path) -> None:
    """F7: says where the key came from, and not the key."""
    key_file = tmp_path / "key"
    key_file.write_bytes(WRONG_KEY)
    outcome = up({"TENSORSERVE_MODEL_URI": str(encrypted), "TENSORSERVE_KEY_FILE": str(key_file)})
    outcome.must_be(65, f"TENSORSERVE_KEY_FILE={key_file}")
    assert WRONG_KEY.hex() not in outcome.text


def test_no_key_for_an_encrypted_file(up: Up, encrypted: Path) -> None:
    """Says which variables to set."""
    up({"TENSORSERVE_MODEL_URI": str(encrypted)}).must_be(78, "encrypted", "TENSORSERVE_KEY_FILE")


def test_a_key_for_a_plain_file(up: Up, plain: Path) -> None:
    """The file may have been replaced."""
    outcome = up({"TENSORSERVE_MODEL_URI": str(plain), "TENSORSERVE_KEY": KEY.hex()})
    outcome.must_be(78, "not encrypted")


def test_a_wrong_passphrase(up: Up, sealed: Path) -> None:
    """F7, through Argon2id."""
    outcome = up({"TENSORSERVE_MODEL_URI": str(sealed), "TENSORSERVE_PASSPHRASE": "close sesame"})
    outcome.must_be(65, "TENSORSERVE_PASSPHRASE")
    assert "close sesame" not in outcome.text


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield int(holder.getsockname()[1])


@pytest.mark.parametrize("variable", ["TENSORSERVE_PORT", "TENSORSERVE_METRICS_PORT"])
def test_a_port_in_use(up: Up, plain: Path, busy_port: int, variable: str) -> None:
    """Names the port and the variable."""
    outcome = up({"TENSORSERVE_MODEL_URI": str(plain), variable: str(busy_port)})
    outcome.must_be(78, f"Port {busy_port}", variable)


def test_dev_shm_too_small(up: Up, plain: Path) -> None:
    """A container's default of 64 MiB, made for real in a mount namespace of its own."""
    if os.getuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare to mount another /dev/shm")
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    outcome = up(
        {"TENSORSERVE_MODEL_URI": str(plain)},
        wrap=("unshare", "--mount", "sh", "-c", mount, "sh"),
    )
    outcome.must_be(78, "/dev/shm has 64 MiB free", "--shm-size")


def test_no_gpu_for_a_cuda_install(up: Up, plain: Path, tmp_path: Path) -> None:
    """The installed vLLM says that it is the CUDA build, and this machine has no GPU."""
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has a GPU")
    info = tmp_path / "site" / "vllm-0.32.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    outcome = up({"TENSORSERVE_MODEL_URI": str(plain), "PYTHONPATH": str(info.parent)})
    outcome.must_be(78, "No GPU is visible", "--gpus all")


def test_a_draft_model_that_is_not_there(up: Up, plain: Path) -> None:
    """vLLM would say so after a minute of imports, as an error of the hub's."""
    outcome = up(
        {
            "TENSORSERVE_MODEL_URI": str(plain),
            "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": '{"model": "/models/draft"}',
        }
    )
    outcome.must_be(78, "The draft model /models/draft does not exist", "Is the volume mounted?")


def test_weights_that_are_not_those_of_the_manifest(up: Up, tmp_path: Path) -> None:
    """A3: another model's weights, sealed with the same key, under this bundle's manifest."""
    from tensorserve.cli import main as tensorserve

    key_file = tmp_path / "key"
    bundles = []
    for number in range(2):
        source = tmp_path / f"source{number}"
        source.mkdir()
        (source / "config.json").write_text("{}")
        save_file({f"layer{number}": torch.ones(64, 64)}, source / "model.safetensors")
        bundles.append(tmp_path / f"bundle{number}")
        words = ["pack", str(source), str(bundles[-1]), "--encrypt", "--key-file", str(key_file)]
        assert tensorserve(words) == 0
    shutil.copy(bundles[1] / "model.tensors", bundles[0] / "model.tensors")
    outcome = up({"TENSORSERVE_MODEL_URI": str(bundles[0]), "TENSORSERVE_KEY_FILE": str(key_file)})
    outcome.must_be(65, "manifest")


def test_an_empty_name_of_a_secrets_file(up: Up) -> None:
    """As an unset variable of a compose file gives: there is no key then, and it is said."""
    up({"TENSORSERVE_MODEL_URI": "/no-such-bundle", "TENSORSERVE_KEY_FILE": " "}).must_be(
        65, "TENSORSERVE_KEY_FILE is set to nothing", "/no-such-bundle does not exist"
    )


def test_the_metrics_outlive_a_failure_until_they_were_asked(up: Up, encrypted: Path) -> None:
    """A scraper sees why the start failed; once it has, the container ends at once."""
    environ = up.base | {
        "TENSORSERVE_MODEL_URI": str(encrypted),
        "TENSORSERVE_KEY": WRONG_KEY.hex(),
        "TENSORSERVE_FAILURE_LINGER": "120",
    }
    process = subprocess.Popen(
        [PROGRAM, "up"], env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        log = up.state_dir / "state" / "events.jsonl"

        def failed() -> bool:
            assert process.poll() is None
            return log.exists() and '"engine_exit"' in log.read_text()

        wait_for(failed, 60)
        url = f"http://127.0.0.1:{environ['TENSORSERVE_METRICS_PORT']}/metrics"
        # The mistake may be found before the exporter is up.
        answers: list[tuple[int, bytes]] = []

        def answered() -> bool:
            answers.append(request(url))
            return answers[-1][0] == 200

        wait_for(answered, 60)
        assert b'tensorserve_failures_total{reason="wrong_key"} 1.0' in answers[-1][1]
        # 120 s if it did not notice.
        assert process.wait(30) == 65
    finally:
        process.kill()
        process.wait()
