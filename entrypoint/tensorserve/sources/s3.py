"""How are S3 objects opened (an HTTP source with signed requests) and listed?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensorserve.errors import SourceUnavailableError
from tensorserve.secret import redact_text
from tensorserve.sources.base import Access, FetchObserver, Unobserved
from tensorserve.sources.http import HttpSource
from tensorserve.sources.http_body import tunnel_refusal
from tensorserve.sources.retry import Attempts, TryAgain
from tensorserve.sources.s3_client import S3Account, account_for
from tensorserve.sources.s3_credentials import passes
from tensorserve.sources.s3_errors import LIST, Asked, OtherRegionError, Refusal, explain
from tensorserve.sources.s3_uri import split_s3


class S3Signer:
    """Signs requests for one object and explains S3's refusals."""

    def __init__(self, account: S3Account, name: str) -> None:
        """`name` is an s3:// URI. Raises ConfigurationError if botocore cannot resolve it."""
        self._account = account
        self._bucket, self._key = split_s3(name)
        self._name = name
        self._request = account.object_request(self._bucket, self._key)
        self.url = self._request.url
        self.place = self._request.place
        self.proxies = account.proxy_rule(self._request)

    def sign(self, url: str, headers: dict[str, str]) -> Mapping[str, str]:
        """As `Signer.sign`."""
        request = self._request
        if request.generation != self._account.generation:  # its client may have old credentials
            request = self._request = self._account.object_request(self._bucket, self._key)
        return self._account.signed(request, url, headers)

    @property
    def generation(self) -> int:
        """As `Signer.generation`."""
        return self._account.generation

    def refresh(self, refused: int) -> bool:
        """As `Signer.refresh`."""
        return self._account.renew(refused)

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """As `Signer.explain`."""
        region = self.place[1] or self._account.region
        asked = Asked(self._name, self._bucket, region, unsigned=self._account.unsigned)
        return explain(Refusal.of_answer(status, headers, body), asked)


def open_object(uri: str, access: Access, observer: FetchObserver | None) -> HttpSource:
    """Opens s3://bucket/key. Raises the sources' errors."""
    account = account_for(access.s3)

    def opened(signer: S3Signer) -> HttpSource:
        return HttpSource(
            signer.url,
            access,
            observer,
            signer=signer,
            name=uri,
            ca_bundle=account.ca_bundle(),
            proxies=signer.proxies,
        )

    signer = _signer(account, uri, access, observer)
    try:
        return opened(signer)
    except OtherRegionError:
        # botocore does the same when it lists or writes.
        account.find_region(split_s3(uri)[0])
        moved = _signer(account, uri, access, observer)
        if moved.place == signer.place:
            raise
    return opened(moved)


def _signer(
    account: S3Account, uri: str, access: Access, observer: FetchObserver | None
) -> S3Signer:
    """The signer for `uri`. Retries like a range while the credentials' provider is unreachable."""
    attempts = Attempts(access.policy, observer or Unobserved(), uri)
    while True:
        try:
            return S3Signer(account, uri)
        except TryAgain as cause:
            attempts.failed(cause)


def list_objects(uri: str, access: Access) -> dict[str, int]:
    """{name below the prefix: size in bytes}. Raises the sources' errors.

    A listing is retried like a range, since botocore's own retries end within seconds.
    """
    attempts = Attempts(access.policy, Unobserved(), uri)
    while True:
        try:
            return _list(uri, access)
        except TryAgain as cause:
            attempts.failed(cause)


def _list(uri: str, access: Access) -> dict[str, int]:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_s3(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    account = account_for(access.s3)
    found: dict[str, int] = {}
    try:
        pages = account.client().get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", ()):
                name = entry["Key"].removeprefix(prefix)
                if name and not name.endswith("/"):
                    found[name] = entry["Size"]
    except ClientError as error:
        asked = Asked(uri, bucket, account.region, LIST, unsigned=account.unsigned)
        raise s3_error(error, asked) from error
    except BotoCoreError as error:
        raise way_error(error, uri, "listed") from error
    return found


def s3_error(error: Any, asked: Asked) -> Exception:
    """This package's error for a botocore ClientError; TryAgain for a transient one."""
    refusal = Refusal.of_client_error(error)
    explained = explain(refusal, asked)
    if explained is not None:
        return explained
    if refusal.status == 429 or refusal.status >= 500:
        return TryAgain(
            f"status_{refusal.status}", f"the server answers {refusal.code or refusal.status}"
        )
    return SourceUnavailableError(f"{asked.name}: S3 answers {refusal.code or refusal.status}.")


def way_error(error: Any, name: str, done: str) -> Exception:
    """This package's error for a botocore BotoCoreError; TryAgain for a transient one.

    `name` is the object's URI; `done` is what was attempted, as in "could not be listed".
    """
    text = redact_text(str(error)).rstrip(".")
    # A proxy's answer is in the wrapped exception.
    below = getattr(error, "kwargs", {}).get("error", "")
    refused = tunnel_refusal(f"{text} {below}", name, "S3")
    if refused is not None:
        return refused
    if passes(error):
        return TryAgain("connect", text)
    return SourceUnavailableError(f"{name} could not be {done}: {text}.")
