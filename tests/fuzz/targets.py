"""What must hold for any manifest, setting, URI, name or configuration? The targets of fuzz.py.

Each takes bytes and gives what became of them. Raised is only what is a finding: anything but one
of our errors with an exit code of its own, or an answer that the rest of the program cannot use.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.bundle_names import leaves_bundle
from tensorserve.checkpoint import read_safetensors
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.fingerprint import MOST_RANKS
from tensorserve.lora import rank_of
from tensorserve.manifest import parse_manifest
from tensorserve.plan import describe, make_plan, served_name_of, split_model_uri
from tensorserve.secret import redact_uri
from tensorserve.settings import Settings
from tensorserve.sources import join
from tensorserve.sources.addresses import host_and_port

PASSWORD = "CANARY"
"""In URIs: what must not be shown where it stands at the end of the user info."""


def manifest(data: bytes) -> str:
    """manifest.json, whole."""
    try:
        made = parse_manifest(data, "fuzzed")
    except (CorruptError, ConfigurationError) as error:
        return _refused(error)
    for name in [*made.tensors_files, *(entry.name for entry in made.files)]:
        assert not leaves_bundle(name)
        assert not any(part == ".." for part in name.split("/"))
    if made.fingerprint is not None:
        assert made.fingerprint.ranks <= MOST_RANKS
    return "accepted"


def json_of_others(data: bytes) -> str:
    """An adapter's configuration, and JSON as such."""
    try:
        assert 0 < rank_of(data, "fuzzed") <= 65536
    except ConfigurationError as error:
        _refused(error)
    try:
        read_json(data)
    except ValueError as error:
        return "refused" if len(str(error)) < 500 else "refused at length"
    return "accepted"


_SCRATCH = Path(tempfile.mkdtemp(prefix="tensorserve-fuzz-")) / "model.safetensors"


def safetensors(data: bytes) -> str:
    """A checkpoint's header."""
    _SCRATCH.write_bytes(struct.pack("<Q", len(data)) + data + bytes(16))
    try:
        tensors = read_safetensors(_SCRATCH)
    except (CorruptError, ConfigurationError) as error:
        return _refused(error)
    assert all(tensor.offset >= 8 and tensor.length >= 0 for tensor in tensors)
    return "accepted"


def uri(data: bytes) -> str:
    """A model's URI, from the variable to the plan, as `plan` prints it."""
    text = data.decode(errors="surrogateescape")
    _check_shown(text, redact_uri(text))
    try:
        settings = Settings.from_environment(
            {"TENSORSERVE_MODEL_URI": text, "TENSORSERVE_STATE_DIR": "/run/ts"}
        )
        plan = make_plan(settings)
        printed = json.dumps(describe(plan, settings))
    except ConfigurationError as error:
        _check_shown(text, str(error))
        return _refused(error)
    _check_shown(text, printed)
    _check_shown(text, " ".join(plan.argv))
    for template in plan.tensors:
        joined = join(plan.bundle_uri, plan.shards(template)[0])
        if joined.startswith(("http://", "https://")):
            host_and_port(joined, "fuzzed")
    again, names = split_model_uri(settings.model_uri)
    assert (again, names) == (plan.bundle_uri, plan.tensors)
    name = served_name_of(settings.model_uri)
    assert name
    assert all(ord(character) >= 32 for character in name), name
    return "accepted"


def settings(data: bytes) -> str:
    """An environment: lines of NAME=VALUE; what follows a line `--` are arguments."""
    lines, _, arguments = data.decode(errors="surrogateescape").partition("\n--\n")
    environ = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_STATE_DIR": "/run/ts"}
    for line in lines.split("\n"):
        name, equals, value = line.partition("=")
        # Files of this machine are not what is fuzzed.
        if equals and name and not name.endswith("_FILE"):
            environ[name] = value
    try:
        read = Settings.from_environment(environ)
        plan = make_plan(read, tuple(arguments.split("\n")) if arguments else ())
        json.dumps(describe(plan, read))
    except ConfigurationError as error:
        return _refused(error)
    assert 0 < plan.port < 65536
    assert 1 <= plan.tensor_parallel_size <= MOST_RANKS
    return "accepted"


def name(data: bytes) -> str:
    """A file's name in a bundle, and where it leads over HTTP."""
    text = data.decode(errors="surrogateescape")
    if leaves_bundle(text):
        return "refused"
    for base in ("https://host/a?sig=1", "https://host", "file:///a", "s3://bucket/a", "/a"):
        joined = join(base, text)
        if base.startswith("https"):
            path = joined.partition("://host")[2].partition("?")[0]
            assert path.isascii()
            assert "#" not in path
            assert not {"..", "."} & set(path.split("/"))
    return "accepted"


def _check_shown(text: str, shown: str) -> None:
    """No password, where the text has a proper one: scheme://user:…CANARY@…"""
    scheme, separator, rest = text.partition("://")
    before, at, _ = rest.partition(f"{PASSWORD}@")
    if (
        separator
        and at
        and scheme.isalpha()
        and scheme.lower() != "file"
        and rest.count(PASSWORD) == 1
        and ":" in before.partition("/")[0]
        and not (scheme.lower() == "s3" and "/" in before)
    ):
        assert PASSWORD not in shown, shown


def _refused(error: TensorserveError) -> str:
    assert error.message
    assert error.exit_code not in {0, 1, 70}
    return "refused"


TARGETS: dict[str, Callable[[bytes], str]] = {
    "manifest": manifest,
    "json": json_of_others,
    "safetensors": safetensors,
    "uri": uri,
    "settings": settings,
    "name": name,
}
