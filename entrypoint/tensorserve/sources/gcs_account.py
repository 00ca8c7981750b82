"""Where is Google Cloud Storage asked, and with credentials or without?"""

from __future__ import annotations

from collections.abc import Mapping

from tensorserve.sources.base import GcsAccess
from tensorserve.sources.cloud_account import Shared
from tensorserve.sources.google_account import GoogleAccount

# read_write: `pack` writes. What may be done is decided by roles; scopes only narrow it.
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_PUBLIC = " Public buckets need no credentials: set TENSORSERVE_GCS_UNSIGNED=true."


class GcsAccount(GoogleAccount):
    """Endpoint and credentials for one GcsAccess. Thread-safe."""

    def __init__(self, access: GcsAccess) -> None:
        super().__init__(_SCOPE, "gs://", _PUBLIC)
        self.base = "https://storage.googleapis.com"
        self.unsigned = access.unsigned
        if access.emulator_host is not None:
            # As Google's libraries: an emulator gets no credentials, and needs no scheme.
            host = access.emulator_host.rstrip("/")
            self.base, self.unsigned = host if "://" in host else f"http://{host}", True

    def authorized(
        self, method: str, url: str, headers: Mapping[str, str], length: int
    ) -> dict[str, str]:
        """As `CloudAccount.authorized`: with a bearer token, if any."""
        if self.unsigned:
            return dict(headers)
        return super().authorized(method, url, headers, length)

    def _renewed(self) -> bool:
        return not self.unsigned and super()._renewed()


account_for = Shared(GcsAccount)
