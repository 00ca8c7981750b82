"""What does a signature add to a start? `python -m bench.signature`.

The check that comes before the key (config/signature.py), of a signed bundle with a tokenizer of 17
MB, as large models have it: on a disk, and in a real S3 server on this machine. Each time in a new
process, imports included, as a start has them: of a key, and of an identity of a private Sigstore.
The peer is the same process without the setting. Seconds, and the difference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from safetensors.torch import save_file

import bench.directories  # noqa: F401 - finds the demo's and the tests' modules
from tensorserve.packing.model_signer import ModelSigner
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, S3Access

from s3server import S3Server  # isort: skip
from sigstore_stand_in import Sigstore  # isort: skip

TOKENIZER_BYTES = 17_000_000
KEY = bytes(range(32))
# Settings and key, as `serve` and `check` get them; the time of these two alone.
_PROGRAM = """
import os, sys, time
from tensorserve.config.settings import SourceSettings
from tensorserve.config.unwrapping import with_key
from tensorserve.sources import open_source
from tensorserve.config.access import access_for
began = time.perf_counter()
settings = SourceSettings.from_environment(os.environ)
spent = time.perf_counter() - began
# What any start does: the client and its connection are there.
open_source(sys.argv[1] + "/manifest.json", access_for(settings)).close()
began = time.perf_counter()
found = with_key(settings, sys.argv[1])
print(spent + time.perf_counter() - began, found.signed_by)
"""


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        source, (private, public) = _model(work / "model"), _pair(work)
        signer = ModelSigner.read(private, None)
        signed = {"TENSORSERVE_SIGNATURE_KEY_FILE": str(public)}
        key = Secret(KEY, "the bench")
        pack(source, str(work / "bundle"), access=Access(), key=key, signer=signer)
        _report("disk, a key", str(work / "bundle"), {}, signed, options.repetitions)
        with Sigstore() as instance:
            keyless, identity = instance.signer(work), instance.settings(work)
            pack(source, str(work / "keyless"), access=Access(), key=key, signer=keyless)
        _report("disk, Sigstore", str(work / "keyless"), {}, identity, options.repetitions)
        with S3Server(work / "s3") as server:
            server.make_bucket("bench")
            access = Access(
                s3=S3Access(
                    endpoint_url=server.endpoint_url,
                    region="us-east-1",
                    access_key_id=Secret(server.access_key),
                    secret_access_key=Secret(server.secret_key),
                )
            )
            uri = "s3://bench/bundle"
            pack(source, uri, access=access, key=key, signer=signer)
            _report("S3, a key", uri, dict(server.environment), signed, options.repetitions)
    return 0


def _report(
    place: str, uri: str, environ: dict[str, str], signed: dict[str, str], repetitions: int
) -> None:
    # In turns: what else the machine does meets both.
    pairs = [(_seconds(uri, environ), _seconds(uri, environ | signed)) for _ in range(repetitions)]
    without, with_ = (median(times) for times in zip(*pairs, strict=True))
    print(
        f"{place}: without {without:.4f} s, with a signature {with_:.4f} s, "
        f"it adds {with_ - without:.3f} s (median of {repetitions})"
    )


def _seconds(uri: str, environ: dict[str, str]) -> float:
    ours = {name: os.environ.get(name, "") for name in ("PATH", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, uri],
        env=ours | {"TENSORSERVE_KEY": KEY.hex(), "AWS_EC2_METADATA_DISABLED": "true"} | environ,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, by = done.stdout.split(" ", 1)
    assert (by.strip() != "None") == any("_SIGNATURE_" in name for name in environ)
    return float(seconds)


def _model(directory: Path) -> Path:
    directory.mkdir()
    save_file({"weight": torch.zeros(1024, 1024)}, directory / "model.safetensors")
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    (directory / "tokenizer.json").write_bytes(os.urandom(TOKENIZER_BYTES))
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (directory / name).write_text("{}")
    return directory


def _pair(directory: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = directory / "sign.pem", directory / "sign.pub"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


if __name__ == "__main__":
    sys.exit(main())
