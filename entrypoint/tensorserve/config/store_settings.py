"""How is each store and key service reached?"""

from __future__ import annotations

import re
from typing import Any

from tensorserve.config.secret_names import AWS_SECRETS, AZURE_SECRETS, VAULT_SECRETS
from tensorserve.config.tidying import has_controls
from tensorserve.config.variable_reader import VariableReader
from tensorserve.config.variables import VARIABLES
from tensorserve.errors import ConfigurationError
from tensorserve.secret import Secret, redact_uri
from tensorserve.sources.base import AzureAccess, GcsAccess, HubAccess, S3Access
from tensorserve.sources.ssrf_guard import host_and_port
from tensorserve.wrapping.base import VaultAccess

AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL", "AWS_ENDPOINT_URL")
ENDPOINTS = (*AWS_ENDPOINTS, "AWS_ENDPOINT_URL_STS")
REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_EMULATOR = "STORAGE_EMULATOR_HOST"
_PAIR = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
# botocore's rule: a region becomes a label of a host name.
_REGION = re.compile(r"(?![0-9]+$)(?!-)[a-zA-Z0-9-]{1,63}(?<!-)")
# Of the variables that say how a store is reached (Variable.attribute).
_S3_ATTRIBUTES = "s3."
_GCS_ATTRIBUTES = "gcs."
_VAULT_ATTRIBUTES = "vault."
STORE_ATTRIBUTES = frozenset(
    variable.attribute
    for variable in VARIABLES
    if variable.attribute.startswith((_S3_ATTRIBUTES, _GCS_ATTRIBUTES, _VAULT_ATTRIBUTES))
)


def read_stores(
    reader: VariableReader, values: dict[str, Any], hub_token: Secret | None
) -> dict[str, Any]:
    """How each kind of source is reached; takes what belongs to them out of `values`."""
    s3, gcs = _taken(values, _S3_ATTRIBUTES), _taken(values, _GCS_ATTRIBUTES)
    vault = _taken(values, _VAULT_ATTRIBUTES)
    return {
        "s3": _s3(reader, s3),
        "gcs": GcsAccess(**gcs, emulator_host=_endpoint(reader, _EMULATOR)),
        "azure": _azure(reader),
        "hub": _hub(reader, hub_token),
        "vault": _vault(reader, vault),
    }


def _s3(reader: VariableReader, own: dict[str, Any]) -> S3Access:
    secrets = reader.secrets(AWS_SECRETS)
    missing = [name for name in _PAIR if not reader.is_given(name, AWS_SECRETS[name])]
    if len(missing) == 1:
        reader.problem(
            f"{missing[0]} is missing while the other half of the pair is set.", "Set both."
        )
    for name in ENDPOINTS:
        if reader.environ.get(name):
            _check_endpoint(reader, name, reader.environ[name])
    endpoint = next((reader.environ[n] for n in AWS_ENDPOINTS if n in reader.environ), None)
    if endpoint is not None:
        scheme, separator, place = endpoint.partition("://")
        endpoint = f"{scheme.lower()}{separator}{place}"
    for name in REGIONS:
        region = reader.environ.get(name)
        if region is not None and not _REGION.fullmatch(region):
            reader.problem(
                f"{name}={region[:80]!r} is not the name of a region.",
                f"It has letters, digits and hyphens: {name}=eu-central-1.",
            )
    return S3Access(
        **own,
        endpoint_url=endpoint,
        region=reader.environ.get("AWS_REGION") or reader.environ.get("AWS_DEFAULT_REGION"),
        ca_bundle=reader.environ.get("AWS_CA_BUNDLE"),
        access_key_id=secrets["AWS_ACCESS_KEY_ID"],
        secret_access_key=secrets["AWS_SECRET_ACCESS_KEY"],
        session_token=secrets["AWS_SESSION_TOKEN"],
    )


def _azure(reader: VariableReader) -> AzureAccess:
    secrets = reader.secrets(AZURE_SECRETS)
    account, other = (
        reader.environ.get(name) for name in ("AZURE_STORAGE_ACCOUNT", "AZURE_STORAGE_ACCOUNT_NAME")
    )
    if account and other and account != other:
        reader.problem(
            "AZURE_STORAGE_ACCOUNT and AZURE_STORAGE_ACCOUNT_NAME are both set and differ.",
            "Set one of them.",
        )
    return AzureAccess(
        account=account or other,
        connection_string=secrets["AZURE_STORAGE_CONNECTION_STRING"],
        account_key=secrets["AZURE_STORAGE_KEY"],
        sas_token=secrets["AZURE_STORAGE_SAS_TOKEN"],
        tenant_id=reader.environ.get("AZURE_TENANT_ID"),
        client_id=reader.environ.get("AZURE_CLIENT_ID"),
        client_secret=secrets["AZURE_CLIENT_SECRET"],
    )


def _hub(reader: VariableReader, token: Secret | None) -> HubAccess:
    endpoint = _endpoint(reader, "HF_ENDPOINT")
    return HubAccess(token=token) if endpoint is None else HubAccess(endpoint, token)


def _vault(reader: VariableReader, own: dict[str, Any]) -> VaultAccess:
    if own["kubernetes_role"] and own["role_id"]:
        reader.problem(
            "TENSORSERVE_VAULT_KUBERNETES_ROLE and TENSORSERVE_VAULT_ROLE_ID are both set.",
            "Set one of them: it says how to log in to Vault.",
        )
    if (own["role_id"] is None) != (own["secret_id"] is None):
        reader.problem(
            "Of TENSORSERVE_VAULT_ROLE_ID and TENSORSERVE_VAULT_SECRET_ID(_FILE) one is set "
            "without the other.",
            "Set both.",
        )
    address = next((name for name in ("BAO_ADDR", "VAULT_ADDR") if name in reader.environ), None)
    return VaultAccess(
        **own,
        address=None if address is None else _endpoint(reader, address),
        namespace=reader.either("BAO_NAMESPACE", "VAULT_NAMESPACE"),
        ca_file=reader.either("BAO_CACERT", "VAULT_CACERT", "BAO_CAPATH", "VAULT_CAPATH"),
        token=reader.secrets(VAULT_SECRETS)["BAO_TOKEN"],
    )


def _endpoint(reader: VariableReader, name: str) -> str | None:
    """The URL in `name`, or host:port as STORAGE_EMULATOR_HOST may have it."""
    given = reader.environ.get(name)
    if given is None:
        return None
    url = f"http://{given}" if name == _EMULATOR and "://" not in given else given
    return url.rstrip("/") if _check_endpoint(reader, name, url) else None


def _check_endpoint(reader: VariableReader, name: str, endpoint: str) -> bool:
    """Whether `endpoint`, of the variable `name`, is a URL; else a problem is noted."""
    if "@" in endpoint:
        # User info would be sent beside the signature, and inherited by child processes.
        reader.problem(
            f"{name} has an @ in it: an endpoint has neither a user nor a password.",
            "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead."
            if name in ENDPOINTS
            else "Credentials have variables of their own (docs/clouds.md).",
        )
        return False
    try:
        host_and_port(endpoint, name)
        scheme = endpoint.partition("://")[0].lower()
        proper = (
            scheme in {"http", "https"}
            and not has_controls(endpoint)
            and not re.search(r"\s", endpoint)
        )
    except ConfigurationError:
        proper = False
    if not proper:
        reader.problem(f"{name}={redact_uri(endpoint)!r} is not a URL.", "Use https://host:port.")
    return proper


def _taken(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """What stands under `prefix` in `values`, without it, and not there any more."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values.pop(name) for name in names}
