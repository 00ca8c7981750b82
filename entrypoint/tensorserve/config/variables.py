"""Which variables are there?

The only list of the public interface: docs/configuration.md and the README's table are made from
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorserve.config import value_parsers as parse
from tensorserve.wrapping.base import CDH_URL, VaultAccess

PREFIX = parse.PREFIX
HANDOFF_VARIABLE = "TENSORSERVE_INTERNAL_HANDOFF"
"""Names the memory that a start hands over (launch/handoff.py). Not for users."""


@dataclass(frozen=True)
class Variable:
    """One variable of the public interface.

    ``secret`` variables may also be given as NAME_FILE and are never shown;
    ``private`` ones (a presigned URI) are shown redacted and never put into a child's environment.
    """

    name: str
    attribute: str
    parse: Callable[[str, str], Any]
    default: Any
    meaning: str
    accepts: str
    secret: bool = False
    private: bool = False
    shown_default: str | None = None


def default_state_dir(environ: Mapping[str, str]) -> Path:
    """Where a start keeps its event log and small files: a private directory, best on tmpfs."""
    for base in (environ.get("XDG_RUNTIME_DIR"), "/run", "/tmp"):
        if base and os.access(base, os.W_OK | os.X_OK):
            return Path(base) / ("tensorserve" if base != "/tmp" else f"tensorserve-{os.getuid()}")
    return Path("/tmp") / f"tensorserve-{os.getuid()}"


VARIABLES: tuple[Variable, ...] = (
    Variable(
        "TENSORSERVE_MODEL_URI", "model_uri", parse.model_uri, None,
        "The model: a bundle's directory, or one `.tensors` file. Required.",
        "path, `file://`, `http(s)://`, `s3://`, `gs://`, `az://`, `hf://`",
        private=True, shown_default="required",
    ),
    Variable(
        "TENSORSERVE_MODEL_NAME", "model_name", parse.text, None,
        "The name that clients ask for.", "text", shown_default="last parts of the URI",
    ),
    Variable(
        "TENSORSERVE_KEY", "key", parse.text, None,
        "The key of an encrypted model.", "32 bytes: raw (in a file), hex or base64",
        secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_PASSPHRASE", "passphrase", parse.text, None,
        "The passphrase of a model sealed with one (Argon2id).", "text",
        secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_KEY_URI", "key_uri", parse.key_uri, None,
        "The key by reference: who unwraps the one in the manifest (docs/keys.md).",
        "`file:PATH`, `age:PATH`, `vault:MOUNT/KEY`, `vault://HOST/MOUNT/KEY`, `awskms:KEY`, "
        "`gcpkms:NAME`, `azurekeyvault://VAULT/KEY`, `kbs:///REPOSITORY/TYPE/TAG`",
        shown_default="what the manifest names, where it is set up here",
    ),
    Variable(
        "TENSORSERVE_KEY_FINGERPRINT", "key_fingerprint", parse.fingerprint, None,
        "The only key that is accepted, by its public name, which `pack --wrap` and `rewrap` "
        "print. Needed (or the pin below) where the key is wrapped for a public key (`age:`, "
        "`azurekeyvault:`).",
        "64 hex digits", shown_default="any key",
    ),
    Variable(
        "TENSORSERVE_VAULT_KUBERNETES_ROLE", "vault.kubernetes_role", parse.text, None,
        "The role to log in to Vault with by the pod's service account, instead of `VAULT_TOKEN`.",
        "text", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_VAULT_JWT_FILE", "vault.jwt_file", parse.jwt_file, VaultAccess.jwt_file,
        "The service account's token for it.", "absolute path",
    ),
    Variable(
        "TENSORSERVE_VAULT_ROLE_ID", "vault.role_id", parse.text, None,
        "The RoleID to log in to Vault with by AppRole, instead of `VAULT_TOKEN`.",
        "text", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_VAULT_SECRET_ID", "vault.secret_id", parse.text, None,
        "The SecretID of the AppRole.", "text", secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_VAULT_AUTH_MOUNT", "vault.auth_mount", parse.mount, None,
        "Where the method to log in is mounted.", "path",
        shown_default="`kubernetes` or `approle`",
    ),
    Variable(
        "TENSORSERVE_CDH_URL", "cdh_url", parse.loopback_url, CDH_URL,
        "Where a confidential guest's data hub answers, for `kbs:`.", "http:// of this machine",
    ),
    Variable(
        "TENSORSERVE_HOST", "host", parse.parse_host, "0.0.0.0", "Where the API listens.", "address"
    ),
    Variable("TENSORSERVE_PORT", "port", parse.port, 8000, "The API's port.", "1–65535"),
    Variable(
        "TENSORSERVE_METRICS_HOST", "metrics_host", parse.parse_host, "0.0.0.0",
        "Where the metrics listen.", "address",
    ),
    Variable(
        "TENSORSERVE_METRICS_PORT", "metrics_port", parse.port, 9400, "The metrics' port.",
        "1–65535",
    ),
    Variable(
        "TENSORSERVE_FETCH_CONNECTIONS", "fetch_connections", parse.count(1, 512), None,
        "How many ranges are read at once.", "1–512", shown_default="automatic",
    ),
    Variable(
        "TENSORSERVE_FETCH_DEADLINE", "fetch_deadline", parse.seconds, 300.0,
        "How long a range may make no progress, retries included, before the start is given up.",
        "seconds, 1–86400",
        shown_default="300, or half of a shorter `TENSORSERVE_START_DEADLINE`",
    ),
    Variable(
        "TENSORSERVE_HOST_MEMORY_LIMIT", "host_memory_limit", parse.memory_limit, None,
        "Host memory for weights that are being loaded, for all ranks of the machine together. "
        "Automatic: a quarter of what is available at the start within the container's limit, at "
        "most 1GiB for each rank and 4GiB for what is fetched ahead.",
        "size, at least 64MiB", shown_default="automatic, a quarter of what is available",
    ),
    Variable(
        "TENSORSERVE_PREFETCH", "prefetch", parse.choice("auto", "off"), "auto",
        "Whether weights behind a network are fetched into memory (still sealed; three eighths of "
        "the limit above, or all beyond 1GiB for each rank) while vLLM imports.",
        "`auto`, `off`",
    ),
    Variable(
        "TENSORSERVE_SHARE_LOAD", "share_load", parse.choice("auto", "on", "off"), "auto",
        "Whether tensor-parallel ranks of one machine that read one file each fetch and open a "
        "part of it and give it to the others (NCCL on GPUs, gloo on CPUs). `auto`: no, since "
        "it was not run on a GPU yet and brings little on a CPU.",
        "`auto`, `on`, `off`",
    ),
    Variable(
        "TENSORSERVE_IMPORT_ONCE", "import_once", parse.choice("auto", "off"), "auto",
        "Whether vLLM is imported once, beside the checks, and its processes are forked from that "
        "import. `off`: after the checks, and again in each process.",
        "`auto`, `off`",
    ),
    Variable(
        "TENSORSERVE_VERIFY", "verify", parse.choice("auto", "hashes", "manifest", "tags"), "auto",
        "How encrypted weights are authenticated. `auto`: an authenticated manifest, else each "
        "tensor's own digest, and both where a signature is needed; `hashes`: the digests always; "
        "`manifest`: such a manifest or no start (of plain weights: one that is pinned); `tags`: "
        "without such a manifest, each chunk's tag alone (whoever can write the bundle can then "
        "exchange tensors). Plain weights have no tags: a pinned bundle's digests are compared "
        "with every value.",
        "`auto`, `hashes`, `manifest`, `tags`",
    ),
    Variable(
        "TENSORSERVE_MANIFEST_SHA256", "manifest_sha256", parse.sha256, None,
        "The only bundle that is served: the SHA-256 of its `manifest.json`, which `pack`, `sign` "
        "and `verify` print.",
        "64 hex digits", shown_default="any bundle of the key's owner",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_KEY", "signature_key", parse.text, None,
        "The public half of `pack --sign-key` and `sign --sign-key`, or several of them: a bundle "
        "without a signature (`model.sig`) of one, or whose `manifest.json` is not what was "
        "signed, is refused (65) before a key is asked for (docs/signatures.md). So are adapters "
        "that are found while serving.",
        "EC public keys in PEM", secret=True, shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_CERTIFICATES", "signature_certificates", parse.text, None,
        "The same for signers with certificates: those of the authorities above them.",
        "certificates in PEM", secret=True, shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_IDENTITY", "signature_identity", parse.text, None,
        "The same for Sigstore's keyless signatures: the signer's identity, as it stands in the "
        "certificate. Needs the next two and the library `sigstore`, which the images do not have.",
        "e-mail address or URI", shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_ISSUER", "signature_issuer", parse.text, None,
        "The OIDC issuer that vouched for that identity.", "URL", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_SIGNATURE_TRUST_ROOT", "signature_trust_root", parse.text, None,
        "Sigstore's trust root, which a start does not fetch (docs/signatures.md has where it "
        "comes from).",
        "trusted_root.json", secret=True, shown_default="none",
    ),
    Variable(
        "TENSORSERVE_LOADER", "loader", parse.choice("auto", "reference"), "auto",
        "Who makes tensors of what is read: `auto` is our own loader; `reference` is tensorizer's "
        "own reader over the same sources and checks. It is slower, and tells whether our loader "
        "or the file is at fault.",
        "`auto`, `reference`",
    ),
    Variable(
        "TENSORSERVE_COMPILED", "compiled", parse.compiled, "auto",
        "Whether the engine takes the compiled code that `tensorserve precompile` put into the "
        "bundle for exactly this engine. `auto`: if it is there; `required`: no start without "
        "it (78). A bundle that is not encrypted has such code only with a key of its own (below).",
        "`auto`, `off`, `required`",
    ),
    Variable(
        "TENSORSERVE_COMPILED_KEY", "compiled_key", parse.text, None,
        "The key of sealed compiled code.", "32 bytes: raw (in a file), hex or base64",
        secret=True, shown_default="derived from the model's key",
    ),
    Variable(
        "TENSORSERVE_COMPILED_SIGNATURE_KEY", "compiled_signature_key", parse.text, None,
        "The public half of `precompile --sign-key`: compiled code without its signature is "
        "refused (65). A server that was broken into can seal code, but cannot sign it.",
        "an Ed25519 public key in PEM", secret=True, shown_default="none: no signature is needed",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_URI", "adapters_uri", parse.adapters_uri, None,
        "Where LoRA adapters are found while serving: a request for the model `NAME` is answered "
        "with the adapter that `tensorserve pack-adapter` put there under `NAME/` "
        "(docs/adapters.md).",
        "path, `file://`, `http(s)://`, `s3://`, `gs://`, `az://`, `hf://`",
        private=True, shown_default="none: only the adapters in the bundle are served",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_KEY", "adapters_key", parse.text, None,
        "The key of those adapters, if it is not the model's. Where there is a key, plain adapters "
        "are refused.",
        "32 bytes: raw (in a file), hex or base64",
        secret=True, shown_default="the model's key or passphrase",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_ALLOW", "adapters_allow", parse.adapter_names, (),
        "Names of adapters that may be served; `*` stands for any characters. All others are "
        "refused before the store is asked.",
        "names, comma-separated", shown_default="all names",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_TTL", "adapters_ttl", parse.seconds, 300.0,
        "After how long the store is asked whether an adapter is still there and the same. One "
        "that nobody has used for so long is let go.",
        "seconds, 1–86400", shown_default="300",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_COUNT", "adapters_count", parse.count(1, 4096), 16,
        "How many of those adapters are held at once; of more, the one that was used longest ago "
        "gives way. Also `--max-cpu-loras`, if that is not set.",
        "1–4096",
    ),
    Variable(
        "TENSORSERVE_ADAPTERS_MEMORY", "adapters_memory", parse.adapters_memory, 1024**3,
        "Host memory for those adapters. Each of vLLM's workers has its own copy besides.",
        "size, at least 1MiB", shown_default="1GiB",
    ),
    Variable(
        "TENSORSERVE_ALLOWED_HOSTS", "allowed_hosts", parse.hosts, (),
        "Link-local or metadata hosts that a URI may name all the same.", "names, comma-separated",
        shown_default="none",
    ),
    Variable(
        "TENSORSERVE_S3_ADDRESSING_STYLE", "s3.addressing_style",
        parse.choice("virtual", "path", "auto"), None,
        "Where the bucket stands in an S3 URL. `virtual`: in the host name, as CoreWeave's, "
        "Alibaba's and Tencent's stores want it; `path`: in the path; `auto`: in the path with an "
        "endpoint of one's own, else in the host name.",
        "`virtual`, `path`, `auto`", shown_default="`addressing_style` of the AWS configuration",
    ),
    Variable(
        "TENSORSERVE_S3_UNSIGNED", "s3.unsigned", parse.truth, False,
        "Whether S3 is asked without credentials, as `aws --no-sign-request` does: for public "
        "buckets.",
        "`true`, `false`", shown_default="`false`",
    ),
    Variable(
        "TENSORSERVE_S3_REQUEST_PAYER", "s3.request_payer", parse.choice("requester"), None,
        "`requester`: the account of the credentials pays for reading a requester-pays bucket.",
        "`requester`", shown_default="none",
    ),
    Variable(
        "TENSORSERVE_GCS_UNSIGNED", "gcs.unsigned", parse.truth, False,
        "Whether Google Cloud Storage is asked without credentials: for public buckets.",
        "`true`, `false`", shown_default="`false`",
    ),
    Variable(
        "TENSORSERVE_ENGINE_RESTARTS", "engine_restarts", parse.count(0, 100), 0,
        "How often a crashed engine is started again before the container ends.", "0–100",
    ),
    Variable(
        "TENSORSERVE_START_DEADLINE", "start_deadline", parse.deadline, None,
        "How long a start may advance in nothing (phases, bytes, what vLLM prints) before it is "
        "ended; 0: for ever. More than `TENSORSERVE_FETCH_DEADLINE`, within which a source may be "
        "away.",
        "seconds, 1–86400, or 0", shown_default="1800, or twice `TENSORSERVE_FETCH_DEADLINE`",
    ),
    Variable(
        "TENSORSERVE_FAILURE_LINGER", "failure_linger", parse.linger, 10.0,
        "After a failure, how long the metrics wait for one more scrape before the container ends.",
        "seconds, 0–300",
    ),
    Variable(
        "TENSORSERVE_STATE_DIR", "state_dir", parse.path, None,
        "Event log and the model's small files (configuration, tokenizer).", "absolute path",
        shown_default="`/run/tensorserve`, else a private directory in `/tmp`",
    ),
    Variable(
        "TENSORSERVE_PASS_ENV", "pass_env", parse.variable_names, (),
        "Further variables that vLLM may see; by default it gets an allow-list.",
        "names, comma-separated", shown_default="none",
    ),
)  # fmt: skip
BY_NAME = {variable.name: variable for variable in VARIABLES}
