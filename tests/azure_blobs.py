"""How do tests make containers and blobs? With requests that the package signs."""

from __future__ import annotations

from tensorserve.sources import Access
from tensorserve.sources.azure_account import account_for
from tensorserve.sources.azure_errors import Asked
from tensorserve.sources.azure_uri import split_az
from tensorserve.sources.calls import Calls
from tensorserve.sources.cloud_account import CloudSigner


def make_container(name: str, access: Access) -> None:
    """A new container."""
    _put(f"az://{name}", "restype=container", {}, b"", access)


def put_blob(uri: str, data: bytes, access: Access) -> None:
    """Store a blob, in one request."""
    _put(uri, "", {"x-ms-blob-type": "BlockBlob"}, data, access)


def _put(uri: str, query: str, headers: dict[str, str], data: bytes, access: Access) -> None:
    container, name = split_az(uri)
    account = account_for(access.azure)
    signer = CloudSigner(account, Asked(uri, container, account.name).explain)
    calls = Calls(access, signer, uri)
    calls.send("PUT", account.url(container, name, query), headers, data)
    calls.close()
