"""How are objects of Google Cloud Storage opened (an HTTP source with a token) and listed?

Objects are read by the XML API (https://storage.googleapis.com/BUCKET/OBJECT), whose ETag changes
with the bytes and whose If-Match pins them, and listed by the JSON API.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote, urlencode

from tensorserve.bounded_json import read_json
from tensorserve.errors import SourceUnavailableError
from tensorserve.sources.base import Access, FetchObserver, Source
from tensorserve.sources.calls import Calls
from tensorserve.sources.cloud_account import CloudSigner
from tensorserve.sources.gcs_account import account_for
from tensorserve.sources.gcs_errors import Asked
from tensorserve.sources.gcs_uri import split_gs
from tensorserve.sources.http import HttpSource
from tensorserve.sources.s3_errors import LIST

_PAGE = 1000  # the most that Google gives


def open_object(uri: str, access: Access, observer: FetchObserver | None) -> Source:
    """Opens gs://bucket/object. Raises the sources' errors."""
    bucket, name = split_gs(uri)
    account = account_for(access.gcs)
    asked = Asked(uri, bucket, unsigned=account.unsigned)
    return HttpSource(
        object_url(account.base, bucket, name),
        access,
        observer,
        signer=CloudSigner(account, asked.explain),
        name=uri,
    )


def object_url(base: str, bucket: str, name: str) -> str:
    """Where the XML API has an object."""
    return f"{base}/{bucket}/{quote(name, safe='/-_.~')}"


def list_objects(uri: str, access: Access) -> dict[str, int]:
    """{name below the prefix: size in bytes}. Raises the sources' errors."""
    bucket, name = split_gs(uri)
    prefix = name.rstrip("/") + "/" if name else ""
    account = account_for(access.gcs)
    asked = Asked(uri, bucket, LIST, unsigned=account.unsigned)
    calls = Calls(access, CloudSigner(account, asked.explain), uri)
    found: dict[str, int] = {}
    token = ""
    query = {
        "prefix": prefix,
        "fields": "items(name,size),nextPageToken",
        "maxResults": str(_PAGE),
    }
    try:
        while True:
            given = query | ({"pageToken": token} if token else {})
            url = f"{account.base}/storage/v1/b/{bucket}/o?{urlencode(given, quote_via=quote)}"
            page = _page(calls.send("GET", url).body, uri)
            for each, size in page[0]:
                below = each.removeprefix(prefix)
                if below and not below.endswith("/"):
                    found[below] = size
            token = page[1]
            if not token:
                return found
    finally:
        calls.close()


def _page(body: bytes, uri: str) -> tuple[list[tuple[str, int]], str]:
    """([(name, size)], the next page's token)."""
    try:
        document: Any = read_json(body)
        items = [(str(each["name"]), int(each["size"])) for each in document.get("items", ())]
        return items, str(document.get("nextPageToken", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceUnavailableError(
            f"{uri}: the answer to a listing is not Google's.",
            hint="Check STORAGE_EMULATOR_HOST, and what stands between here and Google.",
        ) from error
