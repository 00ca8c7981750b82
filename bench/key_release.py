"""What does a key by reference add to a start: unwrapped by a local OpenBao, beside a given key?

    python -m bench.key_release

Each sample is a process of its own, as a start is: from the settings, read, to the model's key in
memory, with the imports of the service's client, the login, and the manifest. `--bound` is what it
may take with a local service.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import results, table
from bench.arguments import model_arguments
from bench.model import ensure_model
from bench.one_run import run_alone
from bench.running import MismatchError

from key_services import OpenBao, openbao  # isort: skip

_BOUND = 0.3  # seconds
_BASE = "given"
_SERVER = "bench-server"


@dataclass(frozen=True)
class Way:
    """One line of the table: how the key comes, with which variables."""

    name: str
    label: str
    environ: Mapping[str, str]


def main() -> int:
    """Measure, print the table, write the result; 1 beyond the bound."""
    parser = model_arguments(__doc__, repetitions=15)
    parser.set_defaults(size=100_000_000)
    parser.add_argument("--bound", default=_BOUND, type=float, help="seconds, of the median (0.3)")
    options = parser.parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """All ways, in turns."""
    started = results.machine()
    with _prepared(options) as (bundle, ways):
        samples: dict[str, list[dict[str, float]]] = {way.name: [] for way in ways}
        for repetition in range(options.repetitions):
            turn = repetition % len(ways)
            for way in [*ways[turn:], *ways[:turn]]:
                sample = _in_a_process(bundle, way)
                samples[way.name].append(sample)
                print(f"  {way.name}: {sample['seconds'] * 1000:.0f} ms", flush=True)
    rows = [("seconds", "of them the client's import", "how the key comes")]
    added = {}
    for way in ways:
        seconds = results.spread([one["seconds"] for one in samples[way.name]])
        imports = results.spread([one["import_seconds"] for one in samples[way.name]])
        added[way.name] = seconds[0]
        rows.append((table.shown(seconds), table.shown(imports), way.label))
    slowest = max(added.values())
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "samples": samples,
        "bound": options.bound,
        "within": slowest <= options.bound,
        "tables": [{"title": "a start's key, with a local service", "rows": rows}],
    }
    path = results.write("key-release", content, options.output)
    table.show(path)
    print(f"the slowest median is {slowest:.3f} s, the bound {options.bound:g} s")
    return 0 if content["within"] else 1


@contextmanager
def _prepared(options: argparse.Namespace) -> Iterator[tuple[Path, list[Way]]]:
    """A bundle whose key is wrapped by OpenBao and with a file, and the ways to get it."""
    from tensorserve.packing.pack import pack
    from tensorserve.secret import Secret
    from tensorserve.sources import Access
    from tensorserve.wrapping.base import Services, VaultAccess
    from tensorserve.wrapping.providers import for_wrapping

    model = ensure_model(options.size)
    with tempfile.TemporaryDirectory() as directory, openbao() as bao:
        wrapping, bundle = Path(directory) / "wrapping", Path(directory) / "bundle"
        wrapping.write_bytes(os.urandom(32))
        owner = VaultAccess(address=bao.url, token=Secret(bao.token))
        recipients = [
            for_wrapping(text, Services(vault=owner))
            for text in ("vault:transit/models", f"file:{wrapping}")
        ]
        key = Secret(model.key_file.read_bytes(), "the bench")
        pack(model.hugging_face, str(bundle), access=Access(), key=key, recipients=recipients)
        yield bundle, _ways(bao, str(model.key_file), str(wrapping))


def _ways(bao: OpenBao, key_file: str, wrapping: str) -> list[Way]:
    bao.policy(_SERVER, "transit/decrypt/models")
    role, secret = bao.app_role(_SERVER)
    by_vault = {"TENSORSERVE_KEY_URI": "vault:transit/models", "VAULT_ADDR": bao.url}
    by_token = by_vault | {"VAULT_TOKEN": bao.token_for(_SERVER)}
    by_role = by_vault | {
        "TENSORSERVE_VAULT_ROLE_ID": role,
        "TENSORSERVE_VAULT_SECRET_ID": secret,
    }
    return [
        Way(_BASE, "given, in a file (TENSORSERVE_KEY_FILE)", {"TENSORSERVE_KEY_FILE": key_file}),
        Way("file", "file: a wrapping key", {"TENSORSERVE_KEY_URI": f"file:{wrapping}"}),
        Way("token", "vault: a local OpenBao, with a token", by_token),
        Way("approle", "vault: the same, with the login of an AppRole", by_role),
    ]


def _in_a_process(bundle: Path, way: Way) -> dict[str, float]:
    words = [sys.executable, str(Path(__file__).with_name("key_release_worker.py")), str(bundle)]
    clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        words, env=clean | dict(way.environ), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise MismatchError(f"{way.label}: {done.stderr[-2000:]}")
    sample: dict[str, float] = json.loads(done.stdout)
    return sample


if __name__ == "__main__":
    sys.exit(main())
