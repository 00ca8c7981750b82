"""How is a token of Entra ID found for one of Azure's services? azure-identity finds and keeps it.

A service principal, a workload identity, a managed identity, the command line's login.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tensorserve.errors import ConfigurationError, PermissionDeniedError
from tensorserve.sources.base import AzureAccess
from tensorserve.sources.cloud_account import said
from tensorserve.sources.retry import TryAgain


class EntraToken:
    """The tokens of one identity for one `scope`. Not thread-safe."""

    def __init__(self, access: AzureAccess, scope: str, needed_by: str, ways: str) -> None:
        """`needed_by` names who needs a token, `ways` is the hint where there is none."""
        self._access, self._scope = access, scope
        self._needed_by, self._ways = needed_by, ways
        self._credential: Any = None
        self._token = ""

    def get(self) -> str:
        """A valid token. azure-identity keeps it, and renews it some minutes before it expires.

        Raises TryAgain, PermissionDeniedError, ConfigurationError.
        """
        with self._explained():
            if self._credential is None:
                self._credential = self._find()
            self._token = str(self._credential.get_token(self._scope).token)
        return self._token

    def renewed(self) -> bool:
        """Gets a token that was not kept; False if it is the same, or there was none before."""
        if self._credential is None:
            return False
        before = self._token
        self._credential = None  # it would give the token that it keeps
        return self.get() != before

    def _find(self) -> Any:
        try:
            from azure.identity import ClientSecretCredential, DefaultAzureCredential
        except ImportError as error:
            raise ConfigurationError(
                f"{self._needed_by} needs azure-identity, which is not installed here.",
                hint=f"Install it: pip install 'tensorserve[azure]'. {self._ways}",
            ) from error
        given = self._access
        if given.client_secret is not None and given.tenant_id and given.client_id:
            return ClientSecretCredential(
                given.tenant_id, given.client_id, given.client_secret.reveal_text()
            )
        return DefaultAzureCredential()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns azure-identity's errors into this package's, as CloudAccount.authorized raises."""
        try:
            yield
        except (ConfigurationError, PermissionDeniedError, TryAgain):
            raise
        except (ValueError, OSError) as error:
            raise ConfigurationError(
                f"The Azure credentials could not be read: {said(error)}.",
                hint="Check AZURE_TENANT_ID, AZURE_CLIENT_ID, AZURE_AUTHORITY_HOST and "
                "AZURE_FEDERATED_TOKEN_FILE.",
            ) from error
        except Exception as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> Exception:
        from azure.core.exceptions import (
            AzureError,
            ClientAuthenticationError,
            ServiceRequestError,
            ServiceResponseError,
        )

        if isinstance(error, ServiceRequestError | ServiceResponseError):
            return TryAgain("credentials", f"Entra ID cannot be reached: {said(error)}")
        if isinstance(error, ClientAuthenticationError):  # "no credentials found" is one too
            return PermissionDeniedError(
                f"The Azure credentials could not be obtained or renewed: {said(error)}.",
                hint=self._ways,
            )
        if isinstance(error, AzureError):
            return TryAgain("credentials", f"Entra ID answers with an error: {said(error)}")
        return error
