"""How does a stream of bytes become an S3 object, without a copy on disk and all or nothing?

One part at a time is filled; a few are on their way. An object under construction is invisible
until it is complete (https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from tensorserve.errors import PermissionDeniedError, SourceUnavailableError
from tensorserve.secret import redact_text
from tensorserve.sources.s3 import s3_error

# S3 allows 10,000 parts of 5 MiB to 5 GiB. 16 MiB make a request's latency small beside it.
PART_BYTES = 16 * 1024**2
_MAX_PARTS = 9_000
_IN_FLIGHT = 3


class Bucket:
    """One bucket, for writing; botocore's errors become ours."""

    def __init__(self, client: Any, name: str, region: str) -> None:
        self.client = client
        self.name = name
        self._region = region

    @contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Turns what botocore raises about `key` into one of our errors."""
        from botocore.exceptions import BotoCoreError, ClientError

        name = f"s3://{self.name}/{key}"
        try:
            yield
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "AccessDenied":
                raise PermissionDeniedError(
                    f"{name}: access denied.",
                    hint="Packing needs s3:PutObject, s3:AbortMultipartUpload, s3:DeleteObject, "
                    "s3:GetObject and s3:ListBucket here.",
                ) from error
            raise s3_error(error, name, self.name, self._region) from error
        except BotoCoreError as error:
            raise SourceUnavailableError(
                f"{name} could not be written: {redact_text(str(error))}.",
                hint="Is AWS_ENDPOINT_URL_S3 right, and the server up?",
            ) from error

    def abort(self, key: str, upload_id: str) -> None:
        """Drops an upload's parts; one that is not there (any more) is no error."""
        from botocore.exceptions import ClientError

        with self.explained(key):
            try:
                self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                    raise

    def delete(self, key: str) -> None:
        """Deletes an object; one that is not there is no error."""
        with self.explained(key):
            self.client.delete_object(Bucket=self.name, Key=key)


class Upload:
    """An object being written: `write`, `close`, then `finish`, which makes it visible, or `abort`.

    Memory: four parts, of 16 MiB each for objects up to 144 GB.
    """

    def __init__(self, bucket: Bucket, key: str, size: int) -> None:
        """`size` is what will be written, in bytes; it decides how large the parts are."""
        self._bucket = bucket
        self._key = key
        self.part_bytes = max(PART_BYTES, -(-size // _MAX_PARTS))
        self._part = bytearray()
        self._id: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._sent = 0
        self._jobs: deque[Future[dict[str, Any]]] = deque()
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="tensorserve-upload")

    def write(self, data: bytes | memoryview, /) -> None:
        """Takes all of `data`; waits while enough parts are on their way."""
        view = memoryview(data)
        while view:
            taken = view[: self.part_bytes - len(self._part)]
            self._part += taken
            view = view[len(taken) :]
            if len(self._part) == self.part_bytes:
                self._send()

    def close(self) -> None:
        """All was written: waits until the server has it, unseen. Raises our errors for S3's.

        What is smaller than a part stays here until `finish`.
        """
        if self._id is not None:
            if self._part:
                self._send()
            while self._jobs:
                self._parts.append(self._jobs.popleft().result())
        self._pool.shutdown()

    def finish(self) -> None:
        """Makes the object visible. Raises our errors for S3's; abort afterwards."""
        client, place = self._bucket.client, {"Bucket": self._bucket.name, "Key": self._key}
        with self._bucket.explained(self._key):
            if self._id is None:
                client.put_object(**place, Body=bytes(self._part))
            else:
                client.complete_multipart_upload(
                    **place, UploadId=self._id, MultipartUpload={"Parts": self._parts}
                )
        self._id = None
        self._part = bytearray()

    def abort(self) -> None:
        """Leaves nothing behind, parts that are stored (and paid for) unseen included."""
        self._pool.shutdown(cancel_futures=True)
        self._part = bytearray()
        if self._id is not None:
            upload_id, self._id = self._id, None
            self._bucket.abort(self._key, upload_id)

    def _send(self) -> None:
        if self._id is None:
            with self._bucket.explained(self._key):
                answer = self._bucket.client.create_multipart_upload(
                    Bucket=self._bucket.name, Key=self._key
                )
            self._id = answer["UploadId"]
        while len(self._jobs) >= _IN_FLIGHT:
            self._parts.append(self._jobs.popleft().result())
        self._sent += 1
        # botocore takes no memoryview, and reads the body again when it tries again.
        self._jobs.append(self._pool.submit(self._put, self._sent, self._id, self._part))
        self._part = bytearray()

    def _put(self, number: int, upload_id: str, body: bytearray) -> dict[str, Any]:
        with self._bucket.explained(self._key):
            answer = self._bucket.client.upload_part(
                Bucket=self._bucket.name,
                Key=self._key,
                UploadId=upload_id,
                PartNumber=number,
                Body=body,
            )
        return {"ETag": answer["ETag"], "PartNumber": number}
