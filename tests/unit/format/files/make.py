"""Makes the sample files beside it, with each released tensorizer that we claim to read.

    python tests/unit/format/files/make.py

downloads the wheels of tensorizer below (no dependencies, from pip's index) to a temporary folder,
lets each write the same contents in a process of its own, and puts down ``*.tensors.gz`` (as
written, gzipped: tensorizer reserves 256 KiB for the index) and ``expected.json``. Nonces and salts
are random, so two runs differ; the contents do not. What is expected comes from the tensors before
they are written, and each tensorizer has to read back what it wrote.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = ("2.10.1", "2.11.0", "2.11.1", "2.12.0", "2.12.1")
KEY = bytes(range(32))
PASSPHRASE = "correct horse battery staple"
SMALL_CHUNK = 1024  # bytes; tensorizer's own is 2 MiB, which would make large files


def contents() -> dict[str, tuple[str, Any]]:
    """(how it is sealed, what is written) by the file's name."""
    import torch

    def noise(count: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(count)
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)

    plain = {
        "bool": noise(7) % 2 == 1,
        **{
            name: noise(6 * size).view(getattr(torch, name)).reshape(3, 2)
            for name, size in (
                *(("uint8", 1), ("int8", 1), ("int16", 2), ("int32", 4), ("int64", 8)),
                *(("float16", 2), ("float32", 4), ("float64", 8)),
                *(("complex64", 8), ("complex128", 16)),
            )
        },
        "scalar": torch.tensor(3.25),
        "transposed": noise(15).reshape(3, 5).t(),
        "größe.重み": noise(3),
    }
    opaque = {
        name: noise(4 * size).view(getattr(torch, name))
        for name, size in (("bfloat16", 2), ("float8_e4m3fn", 1), ("float8_e5m2", 1))
    }
    meta = {
        # Not bfloat16: tensorizer cannot read back its own opaque dtypes without data.
        "meta": torch.empty((3, 5), dtype=torch.float16, device="meta"),
        "real": noise(24).view(torch.float32),
    }
    long = meta | {"long": torch.empty((2**32 + 1, 2), dtype=torch.float16, device="meta")}
    nested = {"layers": [{"weight": noise(5)}, {"weight": noise(6)}], "head": noise(4)}
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    chunks = {"chunks": noise(3 * SMALL_CHUNK + 5), "one_chunk": noise(SMALL_CHUNK)}
    return {
        "plain": ("plain", plain | {"empty": torch.empty((0, 4))}),
        "opaque": ("plain", opaque),
        "meta": ("plain", meta),
        "long": ("plain", long),
        "nested": ("plain", nested),
        "module": ("plain", module),
        "key": ("key", plain | opaque),
        "key-meta": ("key", meta),
        "key-long": ("key", long),
        "key-chunks": ("key", chunks),
        "passphrase": ("passphrase", opaque | {"nested": nested}),
    }


def describe(path: str, kind: int, tensor: Any) -> dict[str, Any]:
    """What a reader has to find."""
    import torch

    data = b""
    if not tensor.is_meta:
        flat = tensor.detach().contiguous().reshape(-1)
        data = flat.view(torch.uint8).numpy().tobytes()
    return {
        "name": path,
        "kind": kind,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "meta": tensor.is_meta,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def flattened(content: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, tensor) in the order of the file."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    found = []
    for key, value in pairs:
        name = f"{prefix}.{key}" if prefix else str(key)
        found += flattened(value, name) if isinstance(value, (dict, list)) else [(name, value)]
    return found


def described(content: Any) -> list[dict[str, Any]]:
    """All tensors of a state dict or a module, as the file will have them."""
    import torch

    if not isinstance(content, torch.nn.Module):
        return [describe(name, 2, tensor) for name, tensor in flattened(content)]
    return [
        describe(f"{prefix}.{name}", kind, tensor)
        for prefix, module in content.named_modules()
        for kind, tensors in enumerate(
            (module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        )
        for name, tensor in tensors
    ]


def write_all(folder: Path) -> None:
    """Writes every file with the tensorizer that is imported; its expectations to stdout."""
    import torch
    from tensorizer import DecryptionParams, EncryptionParams, TensorDeserializer, TensorSerializer
    from tensorizer._version import __version__
    from tensorizer.serialization import TENSORIZER_VERSION

    least = {"opslimit": EncryptionParams.OpsLimit.MIN, "memlimit": EncryptionParams.MemLimit.MIN}
    expected = {}
    for name, (sealing, content) in contents().items():
        encryption = {
            "plain": lambda: None,
            "key": lambda: EncryptionParams(KEY),
            "passphrase": lambda: EncryptionParams.from_string(PASSPHRASE, **least),
        }[sealing]()
        decryption = {
            "plain": lambda: None,
            "key": lambda: DecryptionParams.from_key(KEY),
            "passphrase": lambda: DecryptionParams.from_string(PASSPHRASE),
        }[sealing]()
        path = folder / f"{name}-{__version__}.tensors"
        if "long" in name and TENSORIZER_VERSION < 5:
            continue  # 2.10.1 has no long shapes, and waits for ever when given one
        serializer = TensorSerializer(path, encryption=encryption)
        if name == "key-chunks":
            assert serializer._crypt_chunk_size == 2 * 1024**2
            serializer._crypt_chunk_size = SMALL_CHUNK
        if isinstance(content, torch.nn.Module):
            serializer.write_module(content)
        else:
            serializer.write_state_dict(content)
        serializer.close()
        if "long" not in name:  # tensorizer makes zeros of what is on the meta device
            with TensorDeserializer(
                path, device="cpu", encryption=decryption, verify_hash=True, num_readers=1
            ) as found:
                assert len(list(found.tree())) > 0
        data = path.read_bytes()
        expected[path.name] = {
            "sealing": sealing,
            "data_version": int.from_bytes(data[5:9], "little"),
            "feature_flags": int.from_bytes(data[9:41], "little"),
            "tensors": described(content),
        }
    json.dump(expected, sys.stdout)


def main() -> None:
    """Fetches each tensorizer and lets it write."""
    for old in HERE.glob("*.tensors.gz"):
        old.unlink()
    expected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for version in VERSIONS:
            folder = Path(temporary) / version
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                    *("--dest", str(folder), f"tensorizer=={version}"),
                ],
                check=True,
            )
            for wheel in folder.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(folder / "package")
            written = subprocess.run(
                [sys.executable, __file__, "--write", str(folder)],
                env=os.environ | {"PYTHONPATH": str(folder / "package")},
                check=True,
                capture_output=True,
                text=True,
            )
            expected |= json.loads(written.stdout)
            for path in sorted(folder.glob("*.tensors")):
                packed = gzip.compress(path.read_bytes(), mtime=0)
                (HERE / f"{path.name}.gz").write_bytes(packed)
    lines = [f"{json.dumps(name)}: {json.dumps(what)}" for name, what in sorted(expected.items())]
    (HERE / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--write"]:
        write_all(Path(sys.argv[2]))
    else:
        main()
