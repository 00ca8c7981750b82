"""The compose file's demo, inside containers: `s3` is the S3 server, `pack` fills its bucket.

`vault`, `pack-vault` and `rotate` are for the profile whose key is wrapped by OpenBao. They share
one volume. What is secret there is made anew on the first start and never leaves it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import vault
from s3server import OPTIONS, READY_SECONDS, make_bucket, write_identities
from smollm2 import ensure_model

DIRECTORY = Path("/var/lib/tensorserve/demo")
CREDENTIALS = DIRECTORY / "aws-credentials"
KEY = DIRECTORY / "model.key"
# A volume that OpenBao alone has.
VAULT = Path("/var/lib/tensorserve/vault")
# Names of services in compose.yaml.
ENDPOINT_URL = "http://s3:8333"
MODEL_URI = "s3://models/vllm/SmolLM2-135M-Instruct/v1"
WRAPPED_URI = "s3://models/wrapped/SmolLM2-135M-Instruct/v1"
S3_VARIABLES = {
    "AWS_ENDPOINT_URL_S3": ENDPOINT_URL,
    "AWS_SHARED_CREDENTIALS_FILE": str(CREDENTIALS),
    "AWS_REGION": "us-east-1",
}


def serve_s3() -> None:
    """Become the S3 server, with credentials that only this volume knows."""
    if not CREDENTIALS.exists():
        _make_credentials()
    access_key, secret_key = _credentials()
    identities = DIRECTORY / "identities.json"
    write_identities(identities, access_key, secret_key)
    data = DIRECTORY / "s3"
    data.mkdir(exist_ok=True)
    weed = str(Path(sys.executable).with_name("weed"))
    words = [f"-dir={data}", "-ip=s3", "-ip.bind=0.0.0.0", f"-s3.config={identities}", *OPTIONS]
    os.execv(weed, [weed, "server", *words])


def pack_model() -> int:
    """Make the model, pack and encrypt it into the bucket; nothing if that was done before."""
    return _pack(MODEL_URI, "packed", ["--key-file", str(KEY)], {})


def pack_wrapped() -> int:
    """The same, with a new key that is nowhere but wrapped by OpenBao."""
    _wait_for(vault.token_file(DIRECTORY, "packer"), "vault")
    given = vault.environment(DIRECTORY, "packer")
    del given["TENSORSERVE_KEY_URI"]
    return _pack(WRAPPED_URI, "packed-vault", ["--wrap", vault.WRAPPING_KEY], given)


def _pack(uri: str, mark: str, options: list[str], variables: dict[str, str]) -> int:
    _wait_for(CREDENTIALS, "s3")
    access_key, secret_key = _credentials()
    make_bucket("models", ENDPOINT_URL, access_key, secret_key)
    done = DIRECTORY / mark
    if done.exists():
        print("packed already, in the bucket of the last run")
        return 0
    model = ensure_model(DIRECTORY)
    words = ["tensorserve", "pack", str(model), uri, "--encrypt", *options, "--overwrite"]
    subprocess.run(words, env=os.environ | S3_VARIABLES | variables, check=True)
    shutil.rmtree(model)
    done.touch()
    return 0


def _wait_for(path: Path, service: str) -> None:
    """The service makes it, and was started at the same time."""
    deadline = time.monotonic() + READY_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            sys.exit(f"{path} did not come: is the service {service} running?")
        time.sleep(0.1)


def _make_credentials() -> None:
    content = ConfigParser()
    content["default"] = {
        "aws_access_key_id": "demo-" + secrets.token_hex(8),
        "aws_secret_access_key": secrets.token_hex(20),
    }
    # Complete or absent: `pack` may read it at any time.
    half = CREDENTIALS.with_suffix(".part")
    half.touch(mode=0o600)
    with half.open("w") as file:
        content.write(file)
    half.rename(CREDENTIALS)


def _credentials() -> tuple[str, str]:
    content = ConfigParser()
    content.read(CREDENTIALS)
    section = content["default"]
    return section["aws_access_key_id"], section["aws_secret_access_key"]


def main(words: list[str]) -> int:
    """The service of compose.yaml that `words` name."""
    match words:
        case ["s3"]:
            serve_s3()
        case ["vault"]:
            vault.serve(VAULT, DIRECTORY)
        case ["pack-vault"]:
            return pack_wrapped()
        case ["rotate"]:
            return vault.rotate(WRAPPED_URI, DIRECTORY, S3_VARIABLES)
    return pack_model()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
