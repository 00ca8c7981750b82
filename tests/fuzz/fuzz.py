"""Fuzzes what comes from outside: manifests, settings, URIs, names, JSON, and indexes of weights.

    .venv/bin/python tests/fuzz/fuzz.py --seconds 60
    .venv/bin/python tests/fuzz/fuzz.py --inputs 1000000 --seed 7

A seeded mutator over the seeds in `tests/fuzz/seeds` and words that parsers stumble over, so it
needs nothing that is in no lock. Guided by coverage is fuzz_index.py (atheris). Each target gets
the same share of the inputs. A finding ends the run with 1; its input is kept in
tests/fuzz/found/<target>-<hash>, where tests/unit/project/test_project_fuzz_seeds.py replays it
from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
SEEDS, FOUND = HERE / "seeds", HERE / "found"
_MOST_BYTES = 4096
_BATCH = 250
# What parsers stumble over, in any of the languages that are spoken here.
TEXTS = (
    *("[", "]", "{", "}", '"', "\\", "\\u0000", "\\ud800", ":", ",", "null", "true", "-1", "1.5"),
    *("0", "1e999", "NaN", "Infinity", "1000000000", "9" * 20, "9" * 41, "9" * 4400, "1,"),
    *("%", "%2e%2e", "%2f", "%00", "%03d", "%0d", "%s", "%%", "..", "../", "./", "//", "/"),
    *("'", "\u00a0", "\ufeff", "\u200b", "~/", "s3:/", "AWS_", "S3_", "=\n"),
    *("@", "?", "#", "&", "=", " ", "\t", "\n", "\r\n", "\0", "\x1b[2J", "\x7f", "ü", "\u202e"),
    *("http://", "https://", "s3://", "file://", "HTTPS://", "user:CANARY@", "u:p/CANARY@"),
    *("gs://", "az://", "hf://", "hf://o/m@", "AZURE_", "STORAGE_EMULATOR_HOST=", "AccountName="),
    *("[::1]", "[", "::ffff:169.254.169.254", "169.254.169.254", "2852039166", "0xA9FEA9FE"),
    *(".tensors", "model-rank-%03d.tensors", "vllm/", "localhost", ":65536", ":x", ":٣"),
    *("TENSORSERVE_", "TENSORSERVE_VLLM_", "\n--\n", "--", "-tp", "--port", "--api-key"),
    *('{"a":', "[" * 100, "]" * 100, '{"a":' * 70, "tensor_parallel_size", "size"),
)
WORDS = (*(text.encode() for text in TEXTS), b"\xff", b"\xc3\x28", b"\xed\xa0\x80")


def mutated(seed: bytes, others: list[bytes], source: random.Random) -> bytes:
    """`seed` after one to eight changes; at most _MOST_BYTES and one word long."""
    data = bytearray(seed)
    for _ in range(source.choice((1, 1, 2, 2, 3, 5, 8))):
        at = source.randrange(len(data) + 1)
        kind = source.randrange(8)
        if kind == 0 and data:
            data[min(at, len(data) - 1)] ^= 1 << source.randrange(8)
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] = source.randrange(256)
        elif kind == 2:
            del data[at : at + source.choice((1, 1, 2, 4, 16, 64))]
        elif kind in {3, 4}:
            data[at:at] = source.choice(WORDS)
        elif kind == 5:
            word = source.choice(WORDS)
            data[at : at + len(word)] = word
        elif kind == 6:
            begin = source.randrange(len(data) + 1)
            data[at:at] = data[begin : begin + source.choice((1, 4, 16, 64))]
        else:
            other = source.choice(others)
            begin = source.randrange(len(other) + 1)
            data[at:] = other[begin:]
        del data[_MOST_BYTES + 4400 :]
    return bytes(data)


def seeds_of(target: str) -> list[bytes]:
    """The target's files in SEEDS, and what was found before."""
    folder = HERE / "corpus" if target == "index" else SEEDS / target
    kept = [path.read_bytes() for path in sorted(folder.iterdir())]
    kept += [path.read_bytes() for path in sorted(FOUND.glob(f"{target}-*"))]
    return [*kept, b""]


def inputs(seeds: list[bytes], source: random.Random) -> Iterator[bytes]:
    """The seeds as they are, and then mutations of them without end."""
    yield from seeds
    while True:
        yield mutated(source.choice(seeds), seeds, source)


def run(
    targets: dict[str, Callable[[bytes], str]], seed: int, most: int | None, seconds: float | None
) -> tuple[dict[str, Counter[str]], bool]:
    """What became of how many inputs of each target, and whether there was no finding."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in targets}
    streams = {name: inputs(seeds_of(name), random.Random(f"{seed} {name}")) for name in targets}
    began = time.monotonic()
    done = 0
    while (most is None or done < most) and (seconds is None or time.monotonic() - began < seconds):
        for name, target in targets.items():
            for _ in range(_BATCH):
                data = next(streams[name])
                try:
                    counts[name][target(data)] += 1
                # Anything that is not one of our errors is what is looked for.
                except BaseException:  # noqa: BLE001
                    traceback.print_exc()
                    print(f"{name}: kept in {keep(name, data)}", file=sys.stderr)
                    return counts, False
                done += 1
    return counts, True


def keep(target: str, data: bytes) -> Path:
    """Write a finding where a test replays it."""
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{target}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    return path


def main() -> int:
    """0 without a finding, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("targets", nargs="*", help="all of them by default")
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    from index_target import check
    from targets import TARGETS

    known = {**TARGETS, "index": check}
    chosen = {name: known[name] for name in options.targets or known}
    seed = options.seed or random.SystemRandom().randrange(1, 2**31)
    if options.seconds is None and options.inputs is None:
        options.seconds = 60.0
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    counts, clean = run(chosen, seed, options.inputs, options.seconds)
    took = time.monotonic() - began
    for name, counted in counts.items():
        parts = ", ".join(f"{how} {count:,}" for how, count in sorted(counted.items()))
        print(f"{name:12} {sum(counted.values()):>9,} inputs: {parts}")
    total = sum(sum(counted.values()) for counted in counts.values())
    print(f"{total:,} inputs in {took:.0f} s, {'no finding' if clean else 'ONE FINDING'}")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
