"""How is S3 reached? One botocore client resolves listing, reading and writing alike.

Endpoint, addressing, region, proxies, CA bundle, credentials and signatures are those of the client
(botocore: args.py, the endpoint ruleset, signers.py, endpoint.py). Reads take the prepared request
of a GetObject from it and sign each range with its signer, which avoids the client's 1.5 ms for
each call.
"""

from __future__ import annotations

import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tensorserve.errors import ConfigurationError
from tensorserve.secret import redact_text
from tensorserve.sources.base import S3Access
from tensorserve.sources.cloud_account import Shared
from tensorserve.sources.library_logs import hold_back
from tensorserve.sources.proxies import ProxyRule
from tensorserve.sources.s3_credentials import find_credentials, provider_errors

_SETTINGS_HINT = "The AWS variables and the profile are read as boto3 does: docs/s3.md."
# Variables that botocore reads itself, unless AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is set.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@contextmanager
def _setting_errors(what: str) -> Iterator[None]:
    """Turns botocore's errors about settings into ConfigurationError about `what`."""
    from botocore.exceptions import BotoCoreError, MissingDependencyException

    try:
        yield
    except MissingDependencyException as error:
        raise ConfigurationError(
            f"{what}: a multi-region access point is not supported (it needs SigV4A, for which "
            "botocore needs awscrt).",
            hint="Use a bucket, or the access point of one region.",
        ) from error
    except (BotoCoreError, ValueError) as error:
        raise ConfigurationError(
            f"{what}: {redact_text(str(error)).rstrip('.')}.", hint=_SETTINGS_HINT
        ) from error


@dataclass(frozen=True)
class ObjectRequest:
    """A GET of one object as botocore prepares it, without range and signature."""

    url: str
    headers: Mapping[str, str]
    """Headers of every request: User-Agent, request payer."""
    auth_path: str | None
    context: Mapping[str, Any]
    signer: Any
    """A botocore RequestSigner."""
    client: Any
    """Kept alive here: the signer has only a weak reference to the client's events."""
    generation: int
    """The generation of the credentials (S3Account.generation)."""

    @property
    def place(self) -> tuple[str, str | None]:
        """(URL, region that the signature is for)."""
        return self.url, self.context.get("signing", {}).get("region")

    def signed(self, url: str, headers: Mapping[str, str]) -> dict[str, str]:
        """`headers` and those that S3 needs, with a new signature for a GET of `url`."""
        from botocore.awsrequest import AWSRequest

        request = AWSRequest(
            method="GET",
            url=url,
            data=b"",
            headers={**self.headers, **headers},
            auth_path=self.auth_path,
        )
        request.context = dict(self.context)  # a copy: the signer stores the timestamp in it
        self.signer.sign("GetObject", request)
        return dict(request.headers.items())


class S3Account:
    """botocore's session, credentials and client for one S3Access. Thread-safe."""

    def __init__(self, access: S3Access) -> None:
        hold_back()
        self._access = access
        self._lock = threading.Lock()
        self.generation = 0
        self._client: Any = None
        self._session: Any = self._new_session()
        with _setting_errors("The AWS configuration"):
            self.region: str = (
                access.region or self._session.get_config_variable("region") or "us-east-1"
            )
        self.unsigned = access.unsigned
        self._credentials: Any = None if access.unsigned else find_credentials(self._session)

    def _new_session(self) -> Any:
        # Imported here: importing botocore takes a third of a second, and most commands need none.
        import botocore.session

        access = self._access
        session: Any = botocore.session.get_session()
        if access.access_key_id is not None and access.secret_access_key is not None:
            session.set_credentials(
                access.access_key_id.reveal_text(),
                access.secret_access_key.reveal_text(),
                access.session_token.reveal_text() if access.session_token else None,
            )
        return session

    def object_request(self, bucket: str, key: str) -> ObjectRequest:
        """The prepared GET of an object. Raises ConfigurationError if botocore cannot resolve it,
        and the errors of provider_errors()."""
        if self._credentials is not None:
            with self._lock:
                self._frozen()  # errors of the credentials are raised here, without the object
        client, generation = self.client(), self.generation
        with _setting_errors(f"s3://{bucket}/{key}"):
            params, signer = client.get_object(Bucket=bucket, Key=key)[_HELD]
        headers = {name: value for name, value in params["headers"].items() if value is not None}
        return ObjectRequest(
            url=params["url"],
            headers=headers,
            auth_path=params.get("auth_path"),
            context=params["context"],
            signer=signer,
            client=client,
            generation=generation,
        )

    def signed(
        self, request: ObjectRequest, url: str, headers: Mapping[str, str]
    ) -> dict[str, str]:
        """As `ObjectRequest.signed`. Raises the errors of provider_errors()."""
        with provider_errors():
            return request.signed(url, headers)

    def find_region(self, bucket: str) -> None:
        """Makes botocore find the region of `bucket`, which its next requests use."""
        from botocore.exceptions import BotoCoreError, ClientError

        # The response is not used here: botocore's S3RegionRedirectorv2 has processed it. Not a
        # HEAD, whose error has no document with the region.
        with suppress(ClientError, BotoCoreError):
            self.client().list_objects_v2(Bucket=bucket, MaxKeys=1)

    def renew(self, refused: int) -> bool:
        """Gets credentials newer than generation `refused` from the chain; False if it has none.

        Raises PermissionDeniedError if the provider refuses, TryAgain if it cannot be reached.
        """
        with self._lock:
            if self.generation != refused:
                return True  # another thread has renewed them already
            if self._access.access_key_id is not None or self._credentials is None:
                return False
            before = self._frozen()
            if hasattr(self._credentials, "_expiry_time"):
                # botocore refreshes credentials that it considers expired; the server refused them.
                self._credentials._expiry_time = self._credentials._time_fetcher()
            else:
                # A credentials file, which a sidecar may have updated: only a new session reads it
                # again, and only a new client uses the result.
                session = self._new_session()
                with provider_errors():
                    found = session.get_credentials()
                if found is not None:
                    self._session, self._credentials, self._client = session, found, None
            if self._frozen() == before:
                return False
            self.generation += 1
            return True

    def _frozen(self) -> Any:
        """A consistent snapshot of key, secret and token, renewed by botocore if expired."""
        with provider_errors():
            return self._credentials.get_frozen_credentials()

    def client(self) -> Any:
        """The botocore client, for listing and writing. Thread-safe."""
        with self._lock:
            if self._client is None:
                with _setting_errors("The AWS configuration"):
                    self._client = self._new_client()
            return self._client

    def other_client(self, service: str, *, region: str, endpoint: str | None) -> Any:
        """A client of another of AWS's services, with the same credentials and CAs.

        `endpoint` None: as botocore finds it (AWS_ENDPOINT_URL_<SERVICE>). Raises
        ConfigurationError.
        """
        from botocore.config import Config

        with self._lock, _setting_errors(f"AWS {service}"):
            return self._session.create_client(
                service,
                region_name=region,
                endpoint_url=endpoint,
                verify=self.ca_bundle(),
                config=Config(
                    connect_timeout=5,
                    read_timeout=10,
                    retries={"max_attempts": 2, "mode": "standard"},
                ),
            )

    def _new_client(self) -> Any:
        from botocore import UNSIGNED
        from botocore.config import Config

        access = self._access
        given: dict[str, Any] = {}
        if access.unsigned:
            given["signature_version"] = UNSIGNED
        if access.addressing_style is not None:
            given["s3"] = {"addressing_style": access.addressing_style}
        client = self._session.create_client(
            "s3",
            region_name=self.region,
            endpoint_url=self._given_endpoint(),
            verify=self.ca_bundle(),
            config=Config(
                connect_timeout=5,
                read_timeout=30,
                retries={"max_attempts": 5, "mode": "standard"},
                # Servers other than AWS's do not support the default checksums.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                **given,
            ),
        )
        client.meta.events.register_last("before-call.s3.GetObject", _hold)
        if access.request_payer is not None:
            client.meta.events.register("provide-client-params.s3", _payer(access.request_payer))
        return client

    def _given_endpoint(self) -> str | None:
        """The endpoint to pass to botocore; None if it is in botocore's own variables.

        botocore then reads it itself and respects AWS_IGNORE_CONFIGURED_ENDPOINT_URLS.
        """
        given = self._access.endpoint_url
        found = [os.environ.get(name) for name in _ENDPOINT_VARIABLES]
        return None if given in found else given

    def ca_bundle(self) -> str:
        """The file of trusted CAs, for the client and for reads.

        Found as botocore does; then the system's file instead of certifi's, because CAs are added
        to an image's system file.
        """
        from botocore.httpsession import get_cert_path

        return (
            self._access.ca_bundle
            or self._session.get_config_variable("ca_bundle")
            or os.environ.get("REQUESTS_CA_BUNDLE")
            or os.environ.get("SSL_CERT_FILE")
            or _system_cas()
            or str(get_cert_path(True))
        )

    def proxy_rule(self, request: ObjectRequest) -> ProxyRule:
        """The proxy rule for `request`. botocore decides once, for the client's endpoint."""
        meta = request.client.meta
        if meta.config.proxies is not None:
            rule = ProxyRule.of(meta.config.proxies)
        else:
            rule = ProxyRule.for_url(meta.endpoint_url)
        return rule.held_to(urlsplit(request.url).netloc)


def _system_cas() -> str | None:
    """The file with all of the system's CAs; None if there is none."""
    paths = ssl.get_default_verify_paths()
    debian = Path(paths.capath or "/etc/ssl/certs") / "ca-certificates.crt"
    return paths.cafile or (str(debian) if debian.is_file() else None)


_HELD = "Held"


class _NotSent:
    """Stands for the HTTP response of a request that is not sent."""

    status_code = 200


def _hold(params: Any, request_signer: Any, **_: Any) -> tuple[Any, Any]:
    """Ends a GetObject before it is signed and sent; its result has the prepared request."""
    return _NotSent(), {_HELD: (params, request_signer)}


def _payer(payer: str) -> Any:
    def add_payer(params: dict[str, Any], model: Any, **_: Any) -> None:
        if "RequestPayer" in model.input_shape.members:
            params.setdefault("RequestPayer", payer)

    return add_payer


account_for = Shared(S3Account)
