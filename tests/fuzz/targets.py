"""What must hold for any manifest, setting, URI, name or configuration? The targets of fuzz.py.

Each takes bytes and gives what became of them. Raised is only what is a finding: anything but one
of our errors with an exit code of its own, or an answer that the rest of the program cannot use.
"""

from __future__ import annotations

import ctypes
import json
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tensorserve.bounded_json import read_json
from tensorserve.bundle.adapters import rank_of
from tensorserve.bundle.engine_fingerprint import MOST_RANKS
from tensorserve.bundle.file_names import leaves_bundle
from tensorserve.bundle.location import served_name_of, split_model_uri
from tensorserve.bundle.manifest import parse_manifest
from tensorserve.bundle.model_signature import parse_signature, signed_files
from tensorserve.bundle.signature_envelope import Envelope
from tensorserve.bundle.signature_trust import SignedBy, TrustedCertificates
from tensorserve.bundle.wrapped_keys import MOST_RECIPIENTS
from tensorserve.config.launch_plan import describe, make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError, SignatureError, TensorserveError
from tensorserve.format.safetensors import read_safetensors
from tensorserve.launch.codec import decode, encode
from tensorserve.launch.context import Start
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources import join
from tensorserve.sources.curl import Callback, Job, curl
from tensorserve.sources.curl_transport import received_headers
from tensorserve.sources.schemes import scheme_of
from tensorserve.telemetry.probe import SCHEMES, split_health_url
from tensorserve.wrapping.base import WrappedKey
from tensorserve.wrapping.vault import _split

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
    if made.wrapped_keys is not None:
        assert made.parameters is not None
        assert 0 < len(made.wrapped_keys.recipients) <= MOST_RECIPIENTS
        for entry in made.wrapped_keys.recipients:
            text = f"{entry} {entry.wrapped}"
            assert text.isascii()
            assert text.isprintable()
            assert len(text) < 9_000
            _asked_of(entry)
    if made.adapter is not None:
        assert not leaves_bundle(made.adapter.name)
        assert "/" not in made.adapter.name
    if made.fingerprint is not None:
        assert made.fingerprint.ranks <= MOST_RANKS
    return "accepted"


def _asked_of(entry: WrappedKey) -> None:
    """What a manifest names is a key of this service, or refused; nothing is asked here."""
    if entry.provider != "vault":
        return
    try:
        mount, key = _split(entry.key)
    except ConfigurationError:
        return
    parts = [*mount.split("/"), key]
    assert all(part.strip(".") for part in parts), entry.key
    assert not set("%?#@:\\") & set(entry.key), entry.key


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
        scheme_of(joined).check(joined)
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
    _check_sendable(read)
    start = Start(read, plan)
    assert decode(Start, json.loads(json.dumps(encode(start)))) == start
    scheme, place, port = split_health_url(plan.health_url)
    assert scheme in SCHEMES
    assert place
    assert port is None or 0 < port < 65536
    assert 0 < plan.port < 65536
    assert 1 <= plan.tensor_parallel_size <= MOST_RANKS
    return "accepted"


def name(data: bytes) -> str:
    """A file's name in a bundle, and where it leads over HTTP."""
    text = data.decode(errors="surrogateescape")
    if leaves_bundle(text):
        return "refused"
    for base in (
        "https://host/a?sig=1",
        "https://host",
        "file:///a",
        "s3://bucket/a",
        "hf://o/m",
        "/a",
    ):
        joined = join(base, text)
        if base.startswith("https"):
            path = joined.partition("://host")[2].partition("?")[0]
            assert path.isascii()
            assert "#" not in path
            assert not {"..", "."} & set(path.split("/"))
    return "accepted"


class _Anybody:
    """Accepts every signature, so that what was signed is looked at, and then what it has to say
    of who signed."""

    origin = "the fuzzer"

    def signer(self, envelope: Envelope) -> SignedBy:
        root = Secret((Path(__file__).parent / "seeds/signature/root.pem").read_bytes(), "root")
        with suppress(ValueError):
            TrustedCertificates.parse(root).signer(envelope)
        return SignedBy("key", "0" * 64)


def signature(data: bytes) -> str:
    """model.sig, whole, or the statement in it."""
    try:
        if data.startswith(b'{"_type"'):
            files = signed_files(data)
        else:
            files = dict(parse_signature(data, "fuzzed", _Anybody()).files)
    except SignatureError as error:
        return _refused(error)
    except ValueError:
        return "refused"
    assert not any(leaves_bundle(name) for name in files)
    assert all(len(digest) == 64 for digest in files.values())
    return "accepted"


def answer(data: bytes) -> str:
    """A response's header: what fetch.c takes without Python, Python has to take as well."""
    found = curl()
    assert found is not None, "fetch.c is not built, or libcurl is not here"
    head, judged = ctypes.create_string_buffer(32 * 1024), []
    job = Job(
        head=ctypes.addressof(head),
        head_size=len(head),
        content_range=b"bytes 5-14/100",
        etag=b'"a"',
        wanted=10,
        judge=Callback(lambda: judged.append(1) or 0),
        next=Callback(lambda: 0),
    )
    for line in data.split(b"\n"):  # as libcurl gives it: whole lines
        ended = line + b"\n"
        if not found.header_line(ctypes.byref(job), ended, len(ended)):
            break
    assert 0 <= job.head_length <= len(head)
    assert job.status >= -1
    if not job.judged or judged:
        return "refused"
    headers = received_headers(head.raw[: job.head_length])
    assert job.status == 206
    expected = {"Content-Range": "bytes 5-14/100", "ETag": '"a"', "Content-Length": "10"}
    assert {name: headers.get(name) for name in expected} == expected
    assert "Content-Encoding" not in headers
    assert "Transfer-Encoding" not in headers
    return "accepted"


def _check_sendable(read: Settings) -> None:
    """No line break, nor anything else that no header has, in what goes into a request."""
    s3 = read.s3
    secrets = (s3.access_key_id, s3.secret_access_key, s3.session_token)
    texts = [secret.reveal_text() for secret in secrets if secret is not None]
    azure = read.azure
    stores = (azure.connection_string, azure.account_key, azure.sas_token, azure.client_secret)
    secrets = (*stores, read.hub.token)
    texts += [secret.reveal_text() for secret in secrets if secret is not None]
    places = (s3.region, s3.endpoint_url, read.gcs.emulator_host, read.hub.endpoint)
    texts += [text for text in places if text is not None]
    vault = read.vault
    texts += [secret.reveal_text() for secret in (vault.token,) if secret is not None]
    texts += [vault.address] if vault.address is not None else []
    for text in texts:
        assert text
        assert not any(ord(character) < 33 or ord(character) == 127 for character in text), text
    for _, secret in read.secret_flags:
        assert not any(ord(character) < 32 for character in secret.reveal_text())
    assert all(value for name, value in read.environment if name.startswith("AWS_"))


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
        and not (scheme.lower() in {"s3", "gs", "az", "hf"} and "/" in before)
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
    "signature": signature,
    "answer": answer,
}
