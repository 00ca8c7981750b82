"""How are blobs written to Azure? As blocks, which are invisible until their list is committed.

https://learn.microsoft.com/rest/api/storageservices/put-block-list. Blocks that are never committed
cannot be deleted; Azure drops them after a week.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from urllib.parse import quote

from tensorserve.packing.part_upload import PART_BYTES, PartUpload, Store, no_version
from tensorserve.sources import Access
from tensorserve.sources.azure_account import account_for
from tensorserve.sources.azure_errors import Asked
from tensorserve.sources.azure_uri import split_az
from tensorserve.sources.calls import Answer, Calls
from tensorserve.sources.cloud_account import CloudSigner
from tensorserve.sources.s3_errors import WRITE

_MAX_BLOCKS = 45_000  # of 50,000 that are allowed
_OTHER_VERSION = frozenset({412})
_GONE = frozenset({404})


class _AzureStore(Store):
    def __init__(self, uri: str, access: Access) -> None:
        self.container, name = split_az(uri)
        self._prefix = name.rstrip("/") + "/" if name.strip("/") else ""
        self.account = account_for(access.azure)
        self._access = access

    def upload(self, name: str, size: int) -> PartUpload:
        return _Upload(self, self._prefix + name, size)

    def delete(self, name: str) -> None:
        calls = self.calls(self._prefix + name)
        url = self.account.url(self.container, self._prefix + name)
        try:
            calls.send("DELETE", url, also=_GONE)
        finally:
            calls.close()

    def version(self, name: str) -> str:
        found = self._once("GET", name, {"Range": "bytes=0-0"}).headers.get("ETag")
        if not found:
            raise no_version(f"az://{self.container}/{self._prefix}{name}")
        return found

    def replace(self, name: str, data: bytes, version: str) -> bool:
        wanted = {"x-ms-blob-type": "BlockBlob", "If-Match": version}
        return self._once("PUT", name, wanted, data).status != 412

    def _once(
        self, method: str, name: str, headers: Mapping[str, str], body: bytes = b""
    ) -> Answer:
        """One request with a whole answer, of which 412 is one."""
        calls = self.calls(self._prefix + name)
        url = self.account.url(self.container, self._prefix + name)
        try:
            return calls.send(method, url, headers, body, also=_OTHER_VERSION)
        finally:
            calls.close()

    def calls(self, name: str) -> Calls:
        """For requests about the blob `name`."""
        uri = f"az://{self.container}/{name}"
        asked = Asked(uri, self.container, self.account.name, WRITE)
        return Calls(self._access, CloudSigner(self.account, asked.explain), uri)


class _Upload(PartUpload):
    def __init__(self, store: _AzureStore, name: str, size: int) -> None:
        super().__init__(max(PART_BYTES, -(-size // _MAX_BLOCKS)))
        self._store, self._name = store, name
        self._calls = store.calls(name)

    def finish(self) -> None:
        super().finish()
        self._calls.close()

    def _url(self, query: str = "") -> str:
        return self._store.account.url(self._store.container, self._name, query)

    def _begin(self) -> None: ...

    def _put(self, number: int, start: int, body: bytearray) -> str:
        del start
        block = b64encode(f"{number:08d}".encode()).decode()
        self._calls.send("PUT", self._url(f"comp=block&blockid={quote(block, safe='')}"), {}, body)
        return block

    def _complete(self, parts: list[str], sent: int, last: bytearray) -> None:
        del sent, last
        blocks = "".join(f"<Latest>{part}</Latest>" for part in parts)
        text = f'<?xml version="1.0" encoding="utf-8"?><BlockList>{blocks}</BlockList>'
        self._calls.send(
            "PUT", self._url("comp=blocklist"), {"Content-Type": "application/xml"}, text.encode()
        )

    def _put_whole(self, body: bytearray) -> None:
        self._calls.send("PUT", self._url(), {"x-ms-blob-type": "BlockBlob"}, body)

    def _cancel(self) -> None:
        self._calls.close()


def open_store(uri: str, access: Access) -> Store:
    """The prefix `uri` for writing. Raises the sources' errors."""
    return _AzureStore(uri, access)
