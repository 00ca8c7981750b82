"""pack to gs:// (a real fake-gcs-server) and az:// (Azurite, in `make test-clouds`).

Not tried: Google's and Microsoft's own servers.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from azure_blobs import make_container
from cloud_servers import azurite, gcs_server
from faultserver import Asked, FaultServer, Reply
from hf_samples import SMALL_FILES, make_model
from http_server import Handler, HttpServer
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.manifest import MANIFEST
from tensorserve.bundle.verify import verify
from tensorserve.cli import main
from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.packing import azure_upload, gcs_upload
from tensorserve.packing.destination import add_file, replace_version, version_of
from tensorserve.packing.pack import pack
from tensorserve.packing.part_upload import PartUpload, Store
from tensorserve.secret import Secret
from tensorserve.sources import (
    Access,
    AzureAccess,
    GcsAccess,
    NotFoundError,
    ReplacedError,
    RetryPolicy,
    S3Access,
    list_names,
    open_source,
)

SECRET = Secret(bytes(range(32)), "the test")
POLICY = RetryPolicy(attempts=3, deadline=10, backoff_base=0.01)
PART = 256 * 1024
KINDS = ("gs", *(("az",) if os.environ.get("TEST_CLOUDS") else ()))
_numbers = itertools.count()
Place = tuple[str, Access]


@pytest.fixture(scope="module", params=KINDS)
def cloud(request: pytest.FixtureRequest) -> Iterator[Place]:
    """The URI of a bucket, and how it is reached."""
    if request.param == "gs":
        with gcs_server() as gcs:
            gcs.make_bucket("models")
            yield "gs://models", Access(gcs=gcs.access, policy=POLICY)
    else:
        with azurite() as azure:
            access = Access(azure=azure.access, policy=POLICY)
            make_container("models", access)
            yield "az://models", access


@pytest.fixture
def place(cloud: Place) -> Place:
    """A prefix that no other test uses."""
    return f"{cloud[0]}/packing/{next(_numbers)}", cloud[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


def content(uri: str, access: Access) -> bytes:
    source = open_source(uri, access)
    try:
        return source.read(0, source.size)
    finally:
        source.close()


def store(uri: str, access: Access) -> Store:
    module: Any = gcs_upload if uri.startswith("gs://") else azure_upload
    opened: Store = module.open_store(uri, access)
    return opened


def test_a_bundle_verifies_and_is_replaced_as_a_whole(place: Place, model: Path) -> None:
    """Its files are those of a directory; a second pack wants --overwrite."""
    uri, access = place
    result = pack(model, uri, access=access, key=SECRET)
    names = {*SMALL_FILES, "manifest.json", "model.safetensors", "model.tensors"}
    assert set(list_names(uri, access) or ()) == names
    assert result.destination == uri
    assert {r.state for r in verify(uri, access, parse_key(SECRET)).results} == {"ok"}
    with pytest.raises(ConfigurationError, match="is a bundle already"):
        pack(model, uri, access=access, key=SECRET)
    pack(model, uri, access=access, key=SECRET, overwrite=True)
    assert {r.state for r in verify(uri, access, parse_key(SECRET)).results} == {"ok"}


def test_a_manifest_is_replaced_only_as_it_was_read(place: Place, model: Path) -> None:
    """`rewrap`: by If-Match at Azure's. fake-gcs-server knows no preconditions: see below."""
    uri, access = place
    pack(model, uri, access=access, key=SECRET)
    read = version_of(uri, MANIFEST, access)
    replace_version(uri, MANIFEST, b"{}", access, read)
    assert content(f"{uri}/{MANIFEST}", access) == b"{}"
    with pytest.raises(NotFoundError):
        version_of(uri, "another.json", access)
    if uri.startswith("az://"):
        with pytest.raises(ReplacedError):
            replace_version(uri, MANIFEST, b"[]", access, read)
        assert content(f"{uri}/{MANIFEST}", access) == b"{}"


@pytest.mark.parametrize("scheme", ["az", "gs", "s3"])
def test_an_answer_without_a_version_is_refused(scheme: str) -> None:
    """An empty If-Match would be no condition: 69, and nothing is written."""
    asked: list[str] = []

    class Silent(Handler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.answer(200, {}, b"{}")

        do_HEAD = do_GET

    with HttpServer(Silent) as front:
        account = f"AccountName=acc;AccountKey=YQ==;BlobEndpoint={front.url}/acc;"
        access = Access(
            s3=S3Access(
                endpoint_url=front.url,
                region="r",
                access_key_id=Secret("a"),
                secret_access_key=Secret("b"),
            ),
            gcs=GcsAccess(emulator_host=front.url),
            azure=AzureAccess(connection_string=Secret(account, "a test")),
            policy=POLICY,
        )
        with pytest.raises(SourceUnavailableError, match=f"{scheme}://models/m/.*no ETag"):
            version_of(f"{scheme}://models/m", MANIFEST, access)
    assert len(asked) == 1


def test_google_is_asked_for_one_generation() -> None:
    """Its documentation's condition, and its answer where the object is another one by now."""
    with FaultServer(
        lambda asked: Reply(412 if "ifGenerationMatch=17" in asked.path else 500)
    ) as front:
        access = Access(gcs=GcsAccess(emulator_host=front.url), policy=POLICY)
        with pytest.raises(ReplacedError, match="Run the command again"):
            replace_version("gs://models/m", MANIFEST, b"{}", access, "17")
    assert [asked.path for asked in front.requests] == [
        "/upload/storage/v1/b/models/o?uploadType=media&name=m%2Fmanifest.json&ifGenerationMatch=17"
    ]


def test_a_tensor_of_many_parts_arrives(place: Place, tmp_path: Path) -> None:
    """40 MiB: three parts."""
    uri, access = place
    tensors = {f"t{i}": torch.full((8, 1024**2), i, dtype=torch.uint8) for i in range(5)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    pack(tmp_path, uri, access=access)
    verify(uri, access, None)
    assert (list_names(uri, access) or {})["model.tensors"] > 40 * 1024**2


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, 3 * PART, 5 * PART + 7])
def test_an_object_is_whole_and_invisible_until_it_is_finished(place: Place, size: int) -> None:
    """Whatever its size, in parts of 256 KiB, and in pieces that do not fit them."""
    uri, access = place
    data = os.urandom(size)
    upload = store(uri, access).upload("a b+ü", size)
    upload.part_bytes = PART
    for start in range(0, size, 100_003):
        upload.write(data[start : start + 100_003])
    upload.close()
    with pytest.raises(NotFoundError):
        open_source(f"{uri}/a b+ü", access)
    upload.finish()
    assert content(f"{uri}/a b+ü", access) == data


def test_what_is_given_up_leaves_no_object(place: Place) -> None:
    """Nothing sent, parts sent, all sent; also deleting twice."""
    uri, access = place
    for count in (0, 3, 4):
        upload = store(uri, access).upload("x", 4 * PART)
        upload.part_bytes = PART
        upload.write(bytes(count * PART))
        if count == 4:
            upload.close()
        upload.abort()
        upload.abort()
    assert list_names(uri, access) == {}
    add_file(uri, "x", io.BytesIO(b"x"), access)
    for _ in range(2):
        store(uri, access).delete("x")
    assert list_names(uri, access) == {}


def test_a_pack_that_fails_leaves_nothing(
    place: Place, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of making the objects visible."""
    uri, access = place
    finished: list[str] = []
    finish = PartUpload.finish

    def failing(upload: PartUpload) -> None:
        finished.append("x")
        if len(finished) == 3:
            raise SourceUnavailableError("gone")
        finish(upload)

    monkeypatch.setattr(PartUpload, "finish", failing)
    with pytest.raises(SourceUnavailableError, match="gone"):
        pack(model, uri, access=access)
    assert len(finished) == 3
    assert list_names(uri, access) == {}


def test_a_missing_bucket_is_said(cloud: Place, model: Path) -> None:
    """69, before anything is made."""
    with pytest.raises(SourceUnavailableError, match="'no-such-bucket' does not exist"):
        pack(model, f"{cloud[0].partition('://')[0]}://no-such-bucket/m", access=cloud[1])


def test_a_hub_is_read_and_not_written(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    """78, with where to pack to."""
    assert main(["pack", str(model), "hf://org/model"]) == 78
    said = capsys.readouterr().err
    assert "a bundle cannot be written there" in said
    assert "gs://bucket/prefix" in said


# What no emulator shows ---------------------------------------------------------------------------


def upload_to(front: FaultServer) -> PartUpload:
    access = Access(gcs=GcsAccess(emulator_host=front.url), policy=POLICY)
    upload = store("gs://models/m", access).upload("x", 3 * PART)
    upload.part_bytes = PART
    return upload


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"Location": "http://192.0.2.1/session"}, "names another server"),
        ({}, "names another server"),
    ],
)
def test_an_upload_is_not_led_to_another_server(headers: dict[str, str], said: str) -> None:
    """The token would be sent there."""
    with FaultServer(lambda _: Reply(200, headers)) as front:
        upload = upload_to(front)
        with pytest.raises(SourceUnavailableError, match=said):
            upload.write(bytes(2 * PART))


def test_a_part_that_is_stored_in_part_is_continued() -> None:
    """308 says how much there is; the rest follows from there. 503 is sent again."""
    received = bytearray()
    answers: list[int] = []

    def answer(asked: Asked) -> Reply:
        if "Content-Range" not in asked.headers:
            return Reply(200, {"Location": f"{front.url}/session"})
        span, _, total = asked.headers["Content-Range"].removeprefix("bytes ").partition("/")
        first, last = map(int, span.split("-"))
        assert first == len(received)
        answers.append(first)
        if len(answers) == 2:
            return Reply(503)
        if total != "*":
            return Reply(200)
        stored = first + 100 if len(answers) == 3 else last + 1
        received.extend(bytes(stored - first))
        return Reply(308, {"Range": f"bytes=0-{stored - 1}"})

    with FaultServer(answer) as front:
        upload = upload_to(front)
        upload.write(bytes(3 * PART))
        upload.close()
        upload.finish()
    assert answers == [0, PART, PART, PART + 100, 2 * PART]


def test_an_upload_that_is_given_up_is_cancelled_at_the_server() -> None:
    """Its session is deleted (499 says so); a part that is on its way does not matter."""

    def answer(asked: Asked) -> Reply:
        if "uploadType" in asked.path:
            return Reply(200, {"Location": f"{front.url}/session"})
        if "Content-Range" not in asked.headers:
            return Reply(499, label="cancelled")
        return Reply(308, {"Range": f"bytes=0-{PART - 1}"})

    with FaultServer(answer) as front:
        upload = upload_to(front)
        upload.write(bytes(2 * PART))
        upload.abort()
        upload.abort()
    assert front.fired["cancelled"] == 1


@pytest.mark.parametrize("status", [308, 200])
def test_a_server_that_stores_nothing_ends_the_upload(status: int) -> None:
    """Instead of an endless loop."""

    def answer(asked: Asked) -> Reply:
        if "Content-Range" not in asked.headers:
            return Reply(200, {"Location": f"{front.url}/session"})
        return Reply(status)

    with FaultServer(answer) as front:
        upload = upload_to(front)
        upload.write(bytes(2 * PART))
        with pytest.raises(SourceUnavailableError, match=r"the server (does not store|ended)"):
            upload.write(bytes(2 * PART))


def test_a_denied_write_names_the_role() -> None:
    """77."""
    body = b'{"error": {"code": 403, "message": "no", "errors": [{"reason": "forbidden"}]}}'
    with FaultServer(lambda _: Reply(403, {}, body)) as front:
        upload = upload_to(front)
        upload.write(b"x")
        with pytest.raises(PermissionDeniedError, match="access denied"):
            upload.finish()
