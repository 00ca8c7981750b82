"""JSON of others: every number, depth and count of it has a bound, and an error is a ValueError."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tensorserve.bounded_json import MOST_DEPTH, read_json
from tensorserve.bundle.adapters import rank_of
from tensorserve.bundle.engine_fingerprint import MOST_RANKS, STAGE
from tensorserve.bundle.location import shard_name
from tensorserve.bundle.manifest import parse_manifest
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format.safetensors import read_safetensors

DIGEST = "0" * 64
TENSORS = {
    "size": 1000,
    "tensors": 1,
    "data_bytes": 1,
    "index_sha256": DIGEST,
    "headers_sha256": DIGEST,
}
FINGERPRINT = {
    "vllm": "0.32.0",
    "device": "cpu",
    "architecture": "A",
    "dtype": "bfloat16",
    "quantization": "none",
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "expert_parallel": False,
    "stage": STAGE,
}
HUGE = "9" * 4400


@pytest.mark.parametrize(
    "text",
    [
        HUGE,
        f"[-{HUGE}]",
        f'{{"a": {"1" * 41}}}',
        "[" * 100_000 + "]" * 100_000,
        '{"a":' * 5000 + "1" + "}" * 5000,
        "[" * (MOST_DEPTH + 1) + "]" * (MOST_DEPTH + 1),
        b"\xff\xfe",
        "",
    ],
)
def test_what_has_no_end_is_a_value_error(text: str | bytes) -> None:
    """Neither a RecursionError nor Python's own words for long numbers."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - any ValueError is right
        read_json(text)
    assert len(str(caught.value)) < 200


def test_ordinary_json_is_read_as_it_is() -> None:
    """A long number of some tokenizers, and Infinity of some configurations, are ordinary."""
    assert read_json('{"model_max_length": 1000000000000000019884624838656}')
    assert read_json('{"time_step_limit": [0.0, Infinity]}')
    nested = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert read_json(nested) == json.loads(nested)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "[1.0]", "[1e3]", "[NaN]", "[-Infinity]"])
def test_what_two_readers_could_read_differently_is_refused(text: str) -> None:
    """A manifest is read by others as well."""
    read_json(text)
    with pytest.raises(ValueError, match=r"twice|not a whole number"):
        read_json(text, strict=True)
    document = manifest().replace(b'"made_by": {}', b'"made_by": ' + text.encode())
    with pytest.raises(CorruptError):
        parse_manifest(document, "m")


def manifest(**changes: Any) -> bytes:
    """A manifest of version 1 in which `changes` have been made; a path's parts are parted by _."""
    document: dict[str, Any] = {
        "format": "tensorserve-bundle",
        "version": 1,
        "layout": "vllm",
        "files": [{"name": "config.json", "size": 1, "sha256": DIGEST}],
        "tensors_files": {"model.tensors": dict(TENSORS)},
        "encryption": None,
        "made_by": {},
        "fingerprint": dict(FINGERPRINT),
    }
    for path, value in changes.items():
        *parts, last = path.split("__")
        target: Any = document
        for part in parts:
            target = target[0] if part == "0" else target[part.replace("_dot_", ".")]
        target[last] = value
    return json.dumps(document).encode()


def test_the_manifest_to_be_changed_is_a_good_one() -> None:
    """Else the tests below would show nothing."""
    assert parse_manifest(manifest(), "m").fingerprint is not None


NUMBERS = [
    "version",
    "files__0__size",
    *(f"tensors_files__model_dot_tensors__{name}" for name in ("size", "tensors", "data_bytes")),
    "fingerprint__tensor_parallel_size",
    "fingerprint__pipeline_parallel_size",
]


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("value", [10**9 * 10**9, 10**39, -1, 10**18])
def test_every_number_of_a_manifest_has_a_bound(path: str, value: int) -> None:
    """Whatever is allocated or counted by it."""
    with pytest.raises((CorruptError, ConfigurationError)):
        parse_manifest(manifest(**{path: value}), "m")


def test_a_small_manifest_cannot_take_all_memory() -> None:
    """1.3 kB with a parallel size of 10^9 did: in a process that may have 2 GiB."""
    data = manifest(fingerprint__tensor_parallel_size=10**9)
    assert len(data) < 1300
    code = (
        "import sys, resource\n"
        "from tensorserve.errors import CorruptError\n"
        "from tensorserve.bundle.manifest import parse_manifest\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 * 1024**3,) * 2)\n"
        "try:\n"
        "    parse_manifest(sys.stdin.buffer.read(), 'm')\n"
        "except CorruptError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], input=data, capture_output=True, check=True, timeout=60
    )
    assert str(MOST_RANKS).encode() in run.stdout
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_a_manifest_names_a_bounded_number_of_files() -> None:
    """Each of them would be asked for."""
    entry = {"size": 1, "sha256": DIGEST}
    files = [{"name": f"{number}.json", **entry} for number in range(10_001)]
    with pytest.raises(CorruptError, match="at most 10000"):
        parse_manifest(manifest(files=files), "m")


@pytest.mark.parametrize("config", [f'{{"r": {HUGE}}}', '{"r": 100000}', '{"r": 0}', "[" * 9999])
def test_an_adapters_configuration_has_bounds(config: str) -> None:
    """It comes with the bundle."""
    with pytest.raises(ConfigurationError):
        rank_of(config.encode(), "adapter_config.json")


@pytest.mark.parametrize(
    "header",
    [
        f'{{"t": {{"dtype": "U8", "shape": [{HUGE}], "data_offsets": [0, 1]}}}}',
        '{"t": {"dtype": "U8", "shape": [' + "1," * 300 + '1], "data_offsets": [0, 1]}}',
        '{"t": {"dtype": "U8", "shape": [' + f"{2**63}," * 200 + '1], "data_offsets": [0, 1]}}',
        '{"t": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}',
        "[" * 5000,
        '{"t": {"dtype": ["U8"], "shape": [1], "data_offsets": [0, 1]}}',
        '{"t": {"dtype": "U8", "shape": [1], "data_offsets": 5}}',
        '{"t": 5}',
    ],
)
def test_a_safetensors_header_has_bounds(tmp_path: Path, header: str) -> None:
    """What is packed may come from anywhere."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0")
    with pytest.raises(CorruptError):
        read_safetensors(file)


@pytest.mark.parametrize("size", ["1000000000", HUGE, "0", "-1", "1e3", "٣x", "4097"])
def test_a_parallel_size_has_bounds(size: str) -> None:
    """A file for each rank is named and asked for."""
    environ = {"TENSORSERVE_MODEL_URI": "/m"}
    with pytest.raises(ConfigurationError):
        make_plan(Settings.from_environment(environ), ("--tensor-parallel-size", size))
    make_plan(Settings.from_environment(environ), ("--tensor-parallel-size", "4096"))


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("r-%03d.tensors", "r-007.tensors"),
        ("100%-%03d.tensors", "100%-007.tensors"),
        ("%s-%03d.tensors", "%s-007.tensors"),
        ("model.tensors", "model.tensors"),
    ],
)
def test_a_template_may_hold_other_percent_signs(template: str, name: str) -> None:
    """They are part of a file's name."""
    assert shard_name(template, 7) == name


@pytest.mark.parametrize(
    "data",
    [
        b'{"n":"\xed\xa0\xbd\xed\xb8\x80"}',
        '{"n":"a"}'.encode("utf-16"),
        '{"n":"a"}'.encode("utf-32"),
        '{"n":"a"}'.encode("utf-8-sig"),
        b'{"n":"\xff"}',
    ],
)
def test_what_is_authenticated_is_utf_8(data: bytes) -> None:
    """Surrogates as bytes are two characters to Python, and one in what a MAC is over."""
    with pytest.raises(ValueError, match=r"(?i)utf-8"):
        read_json(data, strict=True)
    assert read_json('{"n":"\U0001f600"}'.encode(), strict=True) == {"n": "\U0001f600"}
