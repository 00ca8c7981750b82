"""How are blobs of Azure opened (an HTTP source with signed requests) and listed?"""

from __future__ import annotations

from urllib.parse import quote, unquote, urlencode
from xml.etree import ElementTree

from tensorserve.errors import SourceUnavailableError
from tensorserve.sources.azure_account import account_for
from tensorserve.sources.azure_errors import Asked
from tensorserve.sources.azure_uri import split_az
from tensorserve.sources.base import Access, FetchObserver, Source
from tensorserve.sources.calls import Calls
from tensorserve.sources.cloud_account import CloudSigner
from tensorserve.sources.http import HttpSource
from tensorserve.sources.s3_errors import LIST

_PAGE = 1000  # a kilobyte of XML for each


def open_object(uri: str, access: Access, observer: FetchObserver | None) -> Source:
    """Opens az://container/blob. Raises the sources' errors."""
    container, name = split_az(uri)
    account = account_for(access.azure)
    asked = Asked(uri, container, account.name)
    return HttpSource(
        account.url(container, name),
        access,
        observer,
        signer=CloudSigner(account, asked.explain),
        name=uri,
    )


def list_objects(uri: str, access: Access) -> dict[str, int]:
    """{name below the prefix: size in bytes}. Raises the sources' errors."""
    container, name = split_az(uri)
    prefix = name.rstrip("/") + "/" if name else ""
    account = account_for(access.azure)
    asked = Asked(uri, container, account.name, LIST)
    calls = Calls(access, CloudSigner(account, asked.explain), uri)
    query = {"restype": "container", "comp": "list", "prefix": prefix, "maxresults": str(_PAGE)}
    found: dict[str, int] = {}
    marker = ""
    try:
        while True:
            given = urlencode(query | ({"marker": marker} if marker else {}), quote_via=quote)
            answer = calls.send("GET", account.url(container, "", given))
            blobs, marker = _page(answer.body, uri)
            for each, size in blobs:
                below = each.removeprefix(prefix)
                if below and not below.endswith("/"):
                    found[below] = size
            if not marker:
                return found
    finally:
        calls.close()


def _page(body: bytes, uri: str) -> tuple[list[tuple[str, int]], str]:
    """([(name, size)], where the next page begins)."""
    try:
        root = ElementTree.fromstring(body)
        blobs = [(_name(blob), _size(blob)) for blob in root.iter("Blob") if not _is_folder(blob)]
    except (ElementTree.ParseError, ValueError) as error:
        raise SourceUnavailableError(
            f"{uri}: the answer to a listing is not Azure's.",
            hint="Check AZURE_STORAGE_ACCOUNT or BlobEndpoint, and what stands between here and "
            "Azure.",
        ) from error
    return blobs, root.findtext("NextMarker") or ""


def _name(blob: ElementTree.Element) -> str:
    name = blob.find("Name")
    text = "" if name is None else name.text or ""
    # Characters that XML cannot have are percent-encoded.
    return unquote(text) if name is not None and name.get("Encoded") == "true" else text


def _size(blob: ElementTree.Element) -> int:
    return int(blob.findtext("Properties/Content-Length") or "0")


def _is_folder(blob: ElementTree.Element) -> bool:
    """A folder of an account with a hierarchical namespace is listed as a blob of no bytes."""
    return blob.findtext("Properties/ResourceType") == "directory"
