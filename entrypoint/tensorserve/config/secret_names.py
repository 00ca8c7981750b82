"""Which secrets are there, and what may they be made of?"""

from __future__ import annotations

VLLM_PREFIX = "TENSORSERVE_VLLM_"
HUB_TOKEN = "HF_TOKEN"
# botocore's names, and the aliases that tensorizer's users know.
AWS_SECRETS = {
    "AWS_ACCESS_KEY_ID": "S3_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY": "S3_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN": None,
}
# As the Azure command line and azure-identity name them; other tools' aliases.
AZURE_SECRETS = {
    "AZURE_STORAGE_CONNECTION_STRING": None,
    "AZURE_STORAGE_KEY": "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN": None,
    "AZURE_CLIENT_SECRET": None,
}
# OpenBao's command line takes its own name first.
VAULT_SECRETS = {"BAO_TOKEN": "VAULT_TOKEN"}
IN_HEADERS = frozenset(
    name
    for pair in (AWS_SECRETS | AZURE_SECRETS | VAULT_SECRETS).items()
    for name in pair
    if name is not None
) | {HUB_TOKEN, f"{VLLM_PREFIX}{HUB_TOKEN}"}
# Kept as bytes: they need not be UTF-8.
BYTES = frozenset(
    {
        "TENSORSERVE_KEY",
        "TENSORSERVE_PASSPHRASE",
        "TENSORSERVE_COMPILED_KEY",
        "TENSORSERVE_COMPILED_SIGNATURE_KEY",
        "TENSORSERVE_SIGNATURE_KEY",
        "TENSORSERVE_SIGNATURE_CERTIFICATES",
        "TENSORSERVE_SIGNATURE_TRUST_ROOT",
        "TENSORSERVE_ADAPTERS_KEY",
    }
)
RAW_KEYS = frozenset({"TENSORSERVE_KEY", "TENSORSERVE_COMPILED_KEY", "TENSORSERVE_ADAPTERS_KEY"})
