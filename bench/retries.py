"""What does a bad link cost: a load with every hundredth request killed, beside an undisturbed one?

    python -m bench.retries

The server is the tests' (tests/rangeserver.py): it closes the connection with a reset in the middle
of an answer. All connections together get `--rate`, as on a link of that width.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from bench import results, table
from bench.arguments import model_arguments
from bench.contestants import Job
from bench.model import Model, ensure_model
from bench.one_run import run_alone
from bench.running import MismatchError, Sample, measure

from rangeserver import Fault, RangeServer  # isort: skip

SHARES = (0.0, 0.01, 0.1)
_RATE = 300e6  # bytes a second; well below what the server itself can do


class KillingServer(RangeServer):  # type: ignore[misc] # outside of what mypy reads
    """Kills this share of all requests: a random one of each 1/share requests."""

    def __init__(self, directory: Path, share: float, seed: int, rate: float) -> None:
        super().__init__(directory, bytes_per_second=rate)
        self._every = round(1 / share) if share else 0
        self._random = random.Random(seed)
        self._number = 0
        # The default of 5 drops some of many simultaneous connections, which then wait 1 s.
        self._server.socket.listen(512)
        self._victim = 0

    def take_fault(self, start: int) -> Fault | None:
        """The fault for this request, if it is the victim of its block.

        The first request of all, for byte 0, opens the object and is let through.
        """
        with self._lock:
            if not self._every or not start:
                return None
            place = self._number % self._every
            self._number += 1
            if not place:
                # Of the first half of a block: a small file has fewer requests than a block.
                self._victim = self._random.randrange(max(1, self._every // 2))
            if place != self._victim:
                return None
            self.fired["reset"] += 1
            # Less than the response, so that the connection is certainly broken within it.
            return Fault("reset", after=self._random.randrange(self._length(start)))

    def _length(self, start: int) -> int:
        """Bytes of the latest request that begins at `start`."""
        for _, headers in reversed(self.requests):
            first, _, last = headers.get("Range", "").removeprefix("bytes=").partition("-")
            if first == str(start):
                return int(last) - start + 1
        raise AssertionError("the server notes a request before it asks for its fault")


def main() -> int:
    """Measure, print the table, write the result."""
    parser = model_arguments(__doc__, repetitions=3)
    parser.add_argument("--rate", default=_RATE, type=float, help="bytes a second, all together")
    options = parser.parse_args()
    return run_alone(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    """All shares, interleaved; then one load by tensorizer with a killed request."""
    model = ensure_model(options.size)
    started = results.machine()
    samples: dict[float, list[Sample]] = {share: [] for share in SHARES}
    for repetition in range(options.repetitions):
        for share in SHARES:
            sample = _load(model, share, repetition, options.rate)
            samples[share].append(sample)
            print(
                f"  {repetition + 1}/{options.repetitions}  {sample['seconds']:7.2f} s  "
                f"{sample['killed']} of {sample['requests']} requests killed",
                flush=True,
            )
    if not sum(sample["killed"] for sample in samples[0.01]):
        print("no request was killed: use a larger --size", file=sys.stderr)
        return 1
    peer = _peer(model, options.rate)
    rows = [("time, ratio", "requests killed", "seconds", "tensors")]
    for share, found in samples.items():
        ratios = [s["seconds"] / u["seconds"] for s, u in zip(found, samples[0.0], strict=True)]
        killed, asked = (sum(s[name] for s in found) for name in ("killed", "requests"))
        rows.append(
            (
                table.shown(results.spread(ratios), "×") if share else "base",
                f"this loader, {share:.0%} ({killed} of {asked})",
                table.shown(results.spread([s["seconds"] for s in found])),
                "the same",
            )
        )
    rows.append(("", "tensorizer, one request, once", "", peer))
    title = f"HTTP, {options.rate / 1e6:g} MB/s for all connections together, encrypted"
    content = {
        "machine": started,
        "arguments": results.arguments(options),
        "model": {"bytes": model.bytes, "digest": model.digest},
        "samples": {str(share): found for share, found in samples.items()},
        "tables": [{"title": title, "rows": rows}],
    }
    path = results.write("retries", content, options.output)
    table.show(path)
    return 0


def _load(model: Model, share: float, seed: int, rate: float) -> Sample:
    file = model.files["encrypted"]
    with KillingServer(file.parent, share, seed, rate) as server:
        job = Job("ours", f"{server.url}/{file.name}", "encrypted", str(model.key_file))
        sample = measure(job, {})
        assert sample is not None
        sample |= {"killed": server.fired["reset"], "requests": len(server.requests)}
    if sample["digest"] != model.digest:
        raise MismatchError(f"other tensors with {share:.0%} of the requests killed")
    return sample


def _peer(model: Model, rate: float) -> str:
    """The outcome of tensorizer's load when one of its requests is killed."""
    file = model.files["encrypted"]
    with RangeServer(file.parent, bytes_per_second=rate) as server:
        server.faults.append(Fault("reset", after=model.bytes // 4, beyond=0))
        job = Job(
            "tensorizer_reader", f"{server.url}/{file.name}", "encrypted", str(model.key_file)
        )
        try:
            sample = measure(job, {})
        except RuntimeError as error:
            return f"fails: {str(error).strip().splitlines()[-1][:100]}"
    assert sample is not None
    return "the same" if sample["digest"] == model.digest else "OTHERS"


if __name__ == "__main__":
    sys.exit(main())
