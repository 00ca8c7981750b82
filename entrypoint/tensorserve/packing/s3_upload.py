"""How are objects written to S3? As multipart uploads, which are invisible until completed
(https://docs.aws.amazon.com/AmazonS3/latest/userguide/mpuoverview.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorserve.errors import SourceUnavailableError
from tensorserve.packing.part_upload import PART_BYTES, PartUpload, Store, no_version
from tensorserve.sources import Access
from tensorserve.sources.retry import TryAgain
from tensorserve.sources.s3 import s3_error, way_error
from tensorserve.sources.s3_client import account_for
from tensorserve.sources.s3_errors import WRITE, Asked
from tensorserve.sources.s3_uri import split_s3

# S3 allows 10,000 parts of 5 MiB to 5 GiB.
_MAX_PARTS = 9_000
# What a conditional write answers where somebody else was faster.
_REPLACED = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})


class Bucket:
    """One bucket, for writing. botocore's errors become this package's."""

    def __init__(self, client: Any, name: str, region: str) -> None:
        self.client = client
        self.name = name
        self._region = region

    @contextmanager
    def explained(self, key: str) -> Iterator[None]:
        """Turns botocore's exceptions about `key` into errors of sources/s3_errors.py."""
        from botocore.exceptions import BotoCoreError, ClientError

        name = f"s3://{self.name}/{key}"
        try:
            yield
        except ClientError as error:
            raise _final(s3_error(error, Asked(name, self.name, self._region, WRITE))) from error
        except BotoCoreError as error:
            raise _final(way_error(error, name, "written")) from error

    def abort(self, key: str, upload_id: str) -> None:
        """Aborts a multipart upload and deletes its parts. An unknown upload is not an error."""
        from botocore.exceptions import ClientError

        with self.explained(key):
            try:
                self.client.abort_multipart_upload(Bucket=self.name, Key=key, UploadId=upload_id)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                    raise

    def delete(self, key: str) -> None:
        """Deletes an object. A missing object is not an error."""
        with self.explained(key):
            self.client.delete_object(Bucket=self.name, Key=key)

    def version(self, key: str) -> str:
        """An object's ETag."""
        with self.explained(key):
            # GetObject is held back by this client (sources/s3_client.py).
            answer = self.client.head_object(Bucket=self.name, Key=key)
        if not answer.get("ETag"):
            raise no_version(f"s3://{self.name}/{key}")
        return str(answer["ETag"])

    def replace(self, key: str, data: bytes, version: str) -> bool:
        """Replaces an object if its ETag is `version`; whether it was."""
        from botocore.exceptions import ClientError

        with self.explained(key):
            try:
                self.client.put_object(Bucket=self.name, Key=key, Body=data, IfMatch=version)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _REPLACED:
                    return False
                raise
        return True


def _final(error: Exception) -> Exception:
    """The error to raise: botocore has done all retries, so TryAgain becomes a final error."""
    if isinstance(error, TryAgain):
        return SourceUnavailableError(
            f"{error.message}.", hint="Check AWS_ENDPOINT_URL_S3, and that the server is running."
        )
    return error


class Upload(PartUpload):
    """An object of S3 under construction."""

    def __init__(self, bucket: Bucket, key: str, size: int) -> None:
        """`size` is the object's size in bytes, which determines the size of the parts."""
        super().__init__(max(PART_BYTES, -(-size // _MAX_PARTS)))
        self._bucket = bucket
        self._key = key
        self._id = ""

    def _begin(self) -> None:
        with self._bucket.explained(self._key):
            answer = self._bucket.client.create_multipart_upload(
                Bucket=self._bucket.name, Key=self._key
            )
        self._id = answer["UploadId"]

    def _put(self, number: int, _start: int, body: bytearray) -> dict[str, Any]:
        with self._bucket.explained(self._key):
            # botocore accepts no memoryview.
            answer = self._bucket.client.upload_part(
                Bucket=self._bucket.name,
                Key=self._key,
                UploadId=self._id,
                PartNumber=number,
                Body=body,
            )
        return {"ETag": answer["ETag"], "PartNumber": number}

    def _complete(self, parts: list[dict[str, Any]], _sent: int, _last: bytearray) -> None:
        with self._bucket.explained(self._key):
            self._bucket.client.complete_multipart_upload(
                Bucket=self._bucket.name,
                Key=self._key,
                UploadId=self._id,
                MultipartUpload={"Parts": parts},
            )

    def _put_whole(self, body: bytearray) -> None:
        with self._bucket.explained(self._key):
            self._bucket.client.put_object(
                Bucket=self._bucket.name, Key=self._key, Body=bytes(body)
            )

    def _cancel(self) -> None:
        self._bucket.abort(self._key, self._id)


class _S3Store(Store):
    def __init__(self, uri: str, access: Access) -> None:
        bucket, key = split_s3(uri)
        account = account_for(access.s3)
        self._prefix = key.rstrip("/") + "/" if key.strip("/") else ""
        self._bucket = Bucket(account.client(), bucket, account.region)

    def upload(self, name: str, size: int) -> Upload:
        return Upload(self._bucket, self._prefix + name, size)

    def delete(self, name: str) -> None:
        self._bucket.delete(self._prefix + name)

    def version(self, name: str) -> str:
        return self._bucket.version(self._prefix + name)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        return self._bucket.replace(self._prefix + name, data, version)


def open_store(uri: str, access: Access) -> Store:
    """The prefix `uri` for writing. Raises the sources' errors."""
    return _S3Store(uri, access)
