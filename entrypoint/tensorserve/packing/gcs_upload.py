"""How are objects written to Google Cloud Storage? As resumable uploads, visible with their end.

https://cloud.google.com/storage/docs/performing-resumable-uploads: parts are sent one after the
other, and bytes that the server has already are ignored, so that a part can be sent again.
"""

from __future__ import annotations

import re
from urllib.parse import quote, urlencode, urlsplit

from tensorserve.bounded_json import read_json
from tensorserve.errors import SourceUnavailableError
from tensorserve.packing.part_upload import PART_BYTES, PartUpload, Store, no_version
from tensorserve.sources import Access
from tensorserve.sources.calls import Answer, Calls
from tensorserve.sources.cloud_account import CloudSigner
from tensorserve.sources.gcs_account import account_for
from tensorserve.sources.gcs_errors import Asked
from tensorserve.sources.gcs_uri import split_gs
from tensorserve.sources.s3_errors import WRITE

_INCOMPLETE = frozenset({308})
_OTHER_VERSION = frozenset({412})
_GONE = frozenset({404, 410, 499})
"""What a session or an object that is not there answers; 499 is a cancelled session's answer."""
_HELD = re.compile(r"bytes=0-(\d{1,18})")


class _GcsStore(Store):
    def __init__(self, uri: str, access: Access) -> None:
        self.bucket, name = split_gs(uri)
        self._prefix = name.rstrip("/") + "/" if name.strip("/") else ""
        account = account_for(access.gcs)
        self.base = account.base
        self._account, self._access = account, access

    def upload(self, name: str, size: int) -> PartUpload:  # noqa: ARG002 - any size is allowed
        return _Upload(self, self._prefix + name)

    def delete(self, name: str) -> None:
        calls = self.calls(self._prefix + name)
        where = quote(self._prefix + name, safe="")
        try:
            calls.send("DELETE", f"{self.base}/storage/v1/b/{self.bucket}/o/{where}", also=_GONE)
        finally:
            calls.close()

    def version(self, name: str) -> str:
        where = quote(self._prefix + name, safe="")
        url = f"{self.base}/storage/v1/b/{self.bucket}/o/{where}?fields=generation"
        found = read_json(self._once("GET", url, self._prefix + name).body)
        generation = found.get("generation") if isinstance(found, dict) else None
        if not generation:
            raise no_version(f"gs://{self.bucket}/{self._prefix}{name}")
        return str(generation)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        query = {"uploadType": "media", "name": self._prefix + name, "ifGenerationMatch": version}
        asked = urlencode(query, quote_via=quote, safe="")
        url = f"{self.base}/upload/storage/v1/b/{self.bucket}/o?{asked}"
        return self._once("POST", url, self._prefix + name, data).status != 412

    def _once(self, method: str, url: str, name: str, body: bytes = b"") -> Answer:
        """One request with a whole answer, of which 412 is one."""
        calls = self.calls(name)
        kind = {"Content-Type": "application/octet-stream"} if body else {}
        try:
            return calls.send(method, url, kind, body, also=_OTHER_VERSION)
        finally:
            calls.close()

    def calls(self, name: str) -> Calls:
        """For requests about the object `name`."""
        uri = f"gs://{self.bucket}/{name}"
        asked = Asked(uri, self.bucket, WRITE, unsigned=self._account.unsigned)
        return Calls(self._access, CloudSigner(self._account, asked.explain), uri)


class _Upload(PartUpload):
    in_flight = 1
    last_is_held = True

    def __init__(self, store: _GcsStore, name: str) -> None:
        super().__init__(PART_BYTES)  # a multiple of 256 KiB, as Google demands
        self._store, self._name = store, name
        self._calls = store.calls(name)
        self._session = ""

    def finish(self) -> None:
        super().finish()
        self._calls.close()

    def _url(self, kind: str) -> str:
        query = urlencode({"uploadType": kind, "name": self._name}, quote_via=quote, safe="")
        return f"{self._store.base}/upload/storage/v1/b/{self._store.bucket}/o?{query}"

    def _begin(self) -> None:
        self._session = self._calls.send("POST", self._url("resumable")).headers.get("Location", "")
        # The token is sent there.
        if urlsplit(self._session)[:2] != urlsplit(self._store.base)[:2]:
            raise self._unusable("names another server for the upload")

    def _put(self, number: int, start: int, body: bytearray) -> None:
        del number
        self._put_range(start, body, "*")

    def _complete(self, parts: list[None], sent: int, last: bytearray) -> None:
        del parts
        self._put_range(sent, last, str(sent + len(last)))

    def _put_range(self, start: int, body: bytearray, total: str) -> None:
        """Sends all of `body`, in several requests where the server stores less of one."""
        end = start + len(body)
        while start < end:
            rest = bytes(body[start - end :])
            headers = {"Content-Range": f"bytes {start}-{end - 1}/{total}"}
            answer = self._calls.send("PUT", self._session, headers, rest, also=_INCOMPLETE)
            if answer.status != 308:
                if total == "*":
                    raise self._unusable("ended the upload before its last part")
                return
            held = self._held(answer)
            if held <= start:
                raise self._unusable("does not store what it is sent")
            start = min(held, end)
        if total != "*":
            raise self._unusable("does not end the upload")

    def _held(self, answer: Answer) -> int:
        found = _HELD.fullmatch(answer.headers.get("Range", ""))
        return int(found[1]) + 1 if found else 0

    def _put_whole(self, body: bytearray) -> None:
        kind = {"Content-Type": "application/octet-stream"}
        self._calls.send("POST", self._url("media"), kind, body)

    def _cancel(self) -> None:
        self._calls.send("DELETE", self._session, also=_GONE)
        self._calls.close()

    def _unusable(self, what: str) -> SourceUnavailableError:
        return SourceUnavailableError(
            f"gs://{self._store.bucket}/{self._name}: the server {what}.",
            hint="Check STORAGE_EMULATOR_HOST, and what stands between here and Google.",
        )


def open_store(uri: str, access: Access) -> Store:
    """The prefix `uri` for writing. Raises the sources' errors."""
    return _GcsStore(uri, access)
