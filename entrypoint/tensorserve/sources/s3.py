"""Objects in S3: an HTTP source with signed requests. botocore knows credentials and signatures."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from tensorserve.errors import (
    ConfigurationError,
    PermissionDeniedError,
    SourceUnavailableError,
)
from tensorserve.secret import redact_text
from tensorserve.sources.base import Access, FetchObserver, NotFoundError, S3Access, Unobserved
from tensorserve.sources.http import HttpSource
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.retry import Attempts, TryAgain
from tensorserve.sources.s3_uri import split_s3

_ERROR_CODE = re.compile(rb"<Code>([^<]+)</Code>")
_NO_CREDENTIALS_HINT = (
    "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or their _FILE forms), a profile, "
    "or give the machine a role."
)


def _no_credentials_hint() -> str:
    """botocore passes over a file that it may not read, and says nothing."""
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    if path and Path(path).exists() and not os.access(path, os.R_OK):
        return (
            f"AWS_SHARED_CREDENTIALS_FILE={path} cannot be read by this user "
            f"({os.getuid()}:{os.getgid()})."
        )
    return _NO_CREDENTIALS_HINT


def _passes(error: Exception) -> bool:
    """Whether botocore's `error` is of the way to a server, and not of what a server said."""
    from botocore.exceptions import ConnectionError, HTTPClientError, SSLError

    # A refused connection is no HTTPClientError to botocore, a broken one is.
    return isinstance(error, HTTPClientError | ConnectionError) and not isinstance(error, SSLError)


@contextmanager
def _provider_errors() -> Iterator[None]:
    """What goes wrong between botocore and whoever gives the credentials, as our errors."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:  # ClientError: what STS answers
        if _passes(error):
            raise TryAgain(
                "credentials",
                f"the credentials' provider cannot be reached: {redact_text(str(error))}",
            ) from error
        raise PermissionDeniedError(
            f"The AWS credentials could not be had or renewed: {redact_text(str(error))}.",
            hint=_NO_CREDENTIALS_HINT,
        ) from error


class S3Account:
    """Session, credentials, region and endpoint for one way to reach S3; safe for threads."""

    def __init__(self, access: S3Access) -> None:
        # Not at import: botocore costs a third of a second that most commands need not pay.
        import botocore.session
        from botocore.exceptions import BotoCoreError

        hold_back()
        self._access = access
        self._lock = threading.Lock()
        self.generation = 0
        session: Any = botocore.session.get_session()
        if access.access_key_id is not None and access.secret_access_key is not None:
            session.set_credentials(
                access.access_key_id.reveal_text(),
                access.secret_access_key.reveal_text(),
                access.session_token.reveal_text() if access.session_token else None,
            )
        self._session = session
        try:
            self._credentials: Any = session.get_credentials()
            region = access.region or session.get_config_variable("region")
        except BotoCoreError as error:
            raise PermissionDeniedError(
                f"The AWS credentials could not be had: {redact_text(str(error))}.",
                hint=_NO_CREDENTIALS_HINT,
            ) from error
        if self._credentials is None:
            raise PermissionDeniedError(
                "There are no AWS credentials.", hint=_no_credentials_hint()
            )
        self.region: str = region or "us-east-1"

    def url(self, bucket: str, key: str) -> str:
        """The object's URL: by host name at AWS, by path at other endpoints and dotted buckets."""
        path = quote(key, safe="/-_.~")
        if self._access.endpoint_url:
            base = self._access.endpoint_url.rstrip("/")
            if self._access.addressing_style == "virtual":
                parts = urlsplit(base)
                return f"{parts.scheme}://{bucket}.{parts.netloc}{parts.path}/{path}"
            return f"{base}/{bucket}/{path}"
        suffix = "amazonaws.com.cn" if self.region.startswith("cn-") else "amazonaws.com"
        if "." in bucket or self._access.addressing_style == "path":
            return f"https://s3.{self.region}.{suffix}/{bucket}/{path}"
        return f"https://{bucket}.s3.{self.region}.{suffix}/{path}"

    def signed(self, url: str, headers: dict[str, str]) -> Mapping[str, str]:
        """`headers` with a fresh signature (SigV4) for a GET of `url`."""
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(method="GET", url=url, headers=dict(headers))
        # The body is empty: its hash is a constant, and no chunked signing is wanted.
        request.context["payload_signing_enabled"] = False
        with self._lock:  # refreshing credentials is not re-entrant
            frozen = self._frozen()
        S3SigV4Auth(frozen, "s3", self.region).add_auth(request)
        return dict(request.headers.items())

    def renew(self, refused: int) -> bool:
        """Ask the chain for credentials newer than generation `refused`; False if it has none.

        Raises PermissionDeniedError if the provider refuses, TryAgain if it cannot be reached.
        """
        with self._lock:
            if self.generation != refused:
                return True  # another range was refused at the same moment, and has renewed them
            if self._access.access_key_id is not None:
                return False
            before = self._frozen()
            if hasattr(self._credentials, "_expiry_time"):
                # botocore refreshes when it believes that they expired; the server just said so.
                self._credentials._expiry_time = self._credentials._time_fetcher()
            else:
                # A file, perhaps with a sidecar that writes new ones into it: only a new session
                # reads it again.
                import botocore.session

                with _provider_errors():
                    found = botocore.session.get_session().get_credentials()
                self._credentials = found or self._credentials
            if self._frozen() == before:
                return False
            self.generation += 1
            return True

    def _frozen(self) -> Any:
        """Key, secret and token of one moment, renewed by botocore if their time is up."""
        with _provider_errors():
            return self._credentials.get_frozen_credentials()

    def client(self) -> Any:
        """A boto3-compatible client, for listing and writing."""
        from botocore.config import Config

        access = self._access
        keys: dict[str, str] = {}
        if access.access_key_id is not None and access.secret_access_key is not None:
            keys = {
                "aws_access_key_id": access.access_key_id.reveal_text(),
                "aws_secret_access_key": access.secret_access_key.reveal_text(),
            }
            if access.session_token is not None:
                keys["aws_session_token"] = access.session_token.reveal_text()
        style = access.addressing_style
        if style == "auto":
            style = "path" if access.endpoint_url else "auto"
        return self._session.create_client(
            "s3",
            region_name=self.region,
            endpoint_url=access.endpoint_url,
            verify=access.ca_bundle if access.ca_bundle else None,
            config=Config(
                s3={"addressing_style": style},
                connect_timeout=5,
                read_timeout=30,
                retries={"max_attempts": 5, "mode": "standard"},
                # Checksums that other servers than AWS's do not know.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
            **keys,
        )


class S3Signer:
    """Signs for one object, and says what S3's refusals mean."""

    def __init__(self, account: S3Account, name: str, bucket: str) -> None:
        self._account = account
        self._name = name
        self._bucket = bucket

    def sign(self, url: str, headers: dict[str, str]) -> Mapping[str, str]:
        """As `Signer.sign`."""
        return self._account.signed(url, headers)

    @property
    def generation(self) -> int:
        """As `Signer.generation`."""
        return self._account.generation

    def refresh(self, refused: int) -> bool:
        """As `Signer.refresh`."""
        return self._account.renew(refused)

    def explain(self, status: int, headers: Mapping[str, str], body: bytes) -> Exception | None:
        """As `Signer.explain`: from the code in S3's error document."""
        found = _ERROR_CODE.search(body)
        code = found[1].decode("ascii", "replace") if found else ""
        if code == "RequestTimeout":  # a 400 that passes: the server waited in vain for our request
            return TryAgain("request_timeout", "S3 gave up waiting for the request")
        return explain_code(
            code,
            status,
            headers,
            name=self._name,
            bucket=self._bucket,
            region=self._account.region,
        )


def explain_code(
    code: str, status: int, headers: Mapping[str, str], *, name: str, bucket: str, region: str
) -> Exception | None:
    """Our error for one of S3's codes; None where the HTTP status says enough."""
    if code == "NoSuchBucket":
        return SourceUnavailableError(
            f"The bucket {bucket!r} does not exist.",
            hint="Is its name right, and AWS_ENDPOINT_URL_S3 the right server?",
        )
    if code == "NoSuchKey" or (status == 404 and not code):
        return NotFoundError(f"{name} does not exist.", hint="Is the prefix right?")
    if code in {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraint"}:
        right = headers.get("x-amz-bucket-region")
        return ConfigurationError(
            f"The bucket {bucket!r} is not in region {region}.",
            hint=f"Set AWS_REGION={right}." if right else "Set AWS_REGION to the bucket's region.",
        )
    if code == "RequestTimeTooSkewed":
        return PermissionDeniedError(
            f"{name}: the clocks differ by {_skew(headers)}, and S3 refuses the signature.",
            hint="Set this machine's clock (NTP).",
        )
    if code in {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"}:
        return PermissionDeniedError(
            f"{name}: S3 does not know these credentials ({code}).",
            hint="Are AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY right, and for this server?",
        )
    if code in {"ExpiredToken", "TokenRefreshRequired"}:
        return PermissionDeniedError(
            f"{name}: the session token expired.", hint="Get a new one, or use a role that renews."
        )
    if status == 403:
        return PermissionDeniedError(
            f"{name}: access denied ({code or 'no reason given'}).",
            hint="The credentials need s3:GetObject and s3:ListBucket here; without the latter, S3 "
            "also says this where the object does not exist.",
        )
    return None


def open_s3(uri: str, access: Access, observer: FetchObserver | None) -> HttpSource:
    """Open s3://bucket/key."""
    bucket, key = split_s3(uri)
    account = account_for(access.s3)
    return HttpSource(
        account.url(bucket, key),
        access,
        observer,
        signer=S3Signer(account, uri, bucket),
        name=uri,
        ca_bundle=access.s3.ca_bundle,
    )


def list_s3(uri: str, access: Access) -> dict[str, int]:
    """{name below the prefix: bytes}. Raises our errors for S3's.

    A listing has the same patience as a range: botocore's own attempts end within seconds.
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
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if status == 429 or status >= 500:
            raise TryAgain(f"status_{status}", f"the server answers {status}") from error
        raise s3_error(error, uri, bucket, account.region) from error
    except BotoCoreError as error:
        if _passes(error):
            raise TryAgain("connect", redact_text(str(error)).rstrip(".")) from error
        text = redact_text(str(error))
        raise SourceUnavailableError(f"{uri} could not be listed: {text}.") from error
    return found


def s3_error(error: Any, name: str, bucket: str, region: str) -> Exception:
    """Our error for a botocore ClientError."""
    details = error.response.get("Error", {})
    meta = error.response.get("ResponseMetadata", {})
    explained = explain_code(
        details.get("Code", ""),
        meta.get("HTTPStatusCode", 0),
        meta.get("HTTPHeaders", {}),
        name=name,
        bucket=bucket,
        region=region,
    )
    return explained or SourceUnavailableError(f"{name}: S3 answers {details.get('Code')}.")


_accounts: dict[S3Access, S3Account] = {}
_accounts_lock = threading.Lock()


def account_for(access: S3Access) -> S3Account:
    """One account for equal settings: credentials are looked up once, not for each object."""
    with _accounts_lock:
        if access not in _accounts:
            _accounts[access] = S3Account(access)
        return _accounts[access]


def _skew(headers: Mapping[str, str]) -> str:
    try:
        there = parsedate_to_datetime(headers.get("Date") or headers.get("date") or "")
    except ValueError:
        return "too much"
    seconds = time.time() - there.timestamp()
    return f"{abs(seconds):.0f} s (this machine is {'ahead' if seconds > 0 else 'behind'})"
