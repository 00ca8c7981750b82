"""Makes the tables of docs/configuration.md from the settings class. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from tensorserve.config.environment import CHILD_NAMES, CHILD_PREFIXES
from tensorserve.config.secret_names import AWS_SECRETS, AZURE_SECRETS
from tensorserve.config.variables import VARIABLES
from tensorserve.config.vllm_flags import OWNED, RENAMED

PAGE = Path(__file__).with_name("configuration.md")
README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- made by docs/make_configuration.py -->", "<!-- end -->"


def variables_table() -> str:
    """One row for each variable."""
    rows = ["| variable | accepts | default | meaning |", "|---|---|---|---|"]
    for variable in VARIABLES:
        name = f"`{variable.name}`"
        if variable.secret:
            name += f" or `{variable.name}_FILE`"
        default = variable.shown_default or f"`{variable.default}`"
        rows.append(f"| {name} | {variable.accepts} | {default} | {variable.meaning} |")
    rows.append(
        "| `TENSORSERVE_VLLM_<FLAG>` | as vLLM's flag | vLLM's | Any flag of `vllm serve`: "
        "`TENSORSERVE_VLLM_MAX_MODEL_LEN=4096`. |"
    )
    return "\n".join(rows)


def page() -> str:
    """The whole of docs/configuration.md."""
    owned = "\n".join(f"| `--{name}` | {reason}. |" for name, reason in OWNED.items())
    renamed = "\n".join(f"| `--{name}` | Set `{variable}`. |" for name, variable in RENAMED.items())
    secrets = ", ".join(f"`{name}`" for name in AWS_SECRETS)
    azure_secrets = ", ".join(f"`{name}`" for name in AZURE_SECRETS)
    return f"""# Configuration

{BEGIN}

Everything is set by environment variables, which are read once at the start.

- **Precedence.** An argument after `--` (or after the image's name, if it begins with `-`) wins
  over `TENSORSERVE_VLLM_<FLAG>`, which wins over vLLM's default.
- **Mistakes.** A variable with our prefix that is not in this table is an error that names the
  nearest known one. Two values for the same thing are an error too. All mistakes are reported at
  once (78).
- **Plan.** `tensorserve plan` shows what the settings mean without starting anything, secrets
  redacted.
- **Secrets.** A secret `X` may be given as `X_FILE`, the path of a file that holds it. Prefer
  that: `docker inspect` shows a container's environment.

{variables_table()}

## How values are read

These rules hold for every variable with our prefix, `AWS_*`, `S3_*`, `AZURE_*`, `GOOGLE_*`,
`VAULT_*` and `BAO_*`:

- **Around a value.** White space, line ends (CR too), byte order marks and zero-width spaces
  around a value are removed, and so are quotes around all of it (`docker run --env-file` keeps
  them). Secrets in `_FILE` are read alike. Of a passphrase only the line end is removed, of a
  chat template nothing. 32 raw bytes of a key stay as they are.
- **Empty values.** An empty value means that the variable is not set: Compose's `NAME:
  ${{NAME:-}}`. A warning says what that means where a key, a passphrase, a pin,
  `TENSORSERVE_VERIFY` or vLLM's API key is empty, and no `_FILE` is set either. The same holds
  for paths that libraries read (`HF_HOME`, `SSL_CERT_FILE`, `XDG_*` and such). It does not hold
  for proxies: an empty `https_proxy` switches `HTTPS_PROXY` off.
- **Control characters.** A line break or another control character inside a value is refused
  (78). The message names the variable, not the value. Flags of vLLM may have line breaks and tabs
  (JSON, a chat template).
- **Numbers** are plain digits, with a fraction where seconds or sizes are meant: no `1_000`,
  `+5`, `1e3`. Whole numbers for flags of vLLM are what Python accepts, and become plain digits.
- **Choices** and truth values (`true`/`false`, `1`/`0`, `yes`/`no`, `on`/`off`) are not
  case-sensitive. Schemes of URIs are not either.
- **Paths.** `~` is `HOME` in `TENSORSERVE_MODEL_URI`, `TENSORSERVE_STATE_DIR`, `AWS_CA_BUNDLE`,
  `GOOGLE_APPLICATION_CREDENTIALS` and `_FILE` forms. A relative path of a model starts where the
  command was started.

The same holds for the URIs of `verify`, `sign` and `pack`.

## Flags of vLLM

`TENSORSERVE_VLLM_<FLAG>` is `--<flag>` with underscores for dashes. `true` and `false` become
`--flag` and `--no-flag`. A list is a JSON array or words with spaces between them. Everything
else is passed on as one word, JSON included. Names, truth values, whole numbers and choices are
checked before vLLM is started. These flags have another way, or none:

| flag | instead |
|---|---|
{renamed}
{owned}

**API key.** `TENSORSERVE_VLLM_API_KEY` and `TENSORSERVE_VLLM_HF_TOKEN` (also as `_FILE`, and as
vLLM's own `VLLM_API_KEY` and `HF_TOKEN`) reach vLLM through memory, not through its arguments or
environment. With an API key every route asks for it but `/health`, `/ping` and `/version`. vLLM's
own check leaves `/invocations`, `/tokenize`, `/metrics` and others open, so the plan adds a
`--middleware` of ours after your own. `--grpc`, `--grpc-port` and `VLLM_USE_RUST_FRONTEND` cannot
be guarded this way and are refused with a key.

**Readiness** follows the flags. `/health` is asked where vLLM listens:

- `TENSORSERVE_HOST` and `TENSORSERVE_PORT`, where no flag below is given.
- `TENSORSERVE_VLLM_UDS=/run/vllm/api.sock`: over that socket. The path has to be absolute. A
  socket that no process listens on is removed before the start.
- `--ssl-certfile`: over TLS. The certificate's signer is not checked.
- `--data-parallel-multi-port-external-lb`: at the port of its supervisor.
- `--ssl-cert-reqs=2`: a TLS handshake counts, since only clients with a certificate are answered.
  vLLM listens only when it serves, and ends when its engine dies.
- `--grpc`: a connection counts, since there is no `/health`.
- `--api-server-count=0`, on the further machines of several: never ready by this measure, since
  there is no API ([kubernetes.md](kubernetes.md#several-machines)).

`--ssl-keyfile` without `--ssl-certfile` is refused.

## S3

The standard AWS variables and files are honoured: keys, profiles, roles, web identity, container
and instance credentials, `AWS_REGION`, `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_CA_BUNDLE`.
{secrets} may also be given as `_FILE`. `S3_ACCESS_KEY_ID`, `S3_SECRET_ACCESS_KEY` and
`S3_ENDPOINT_URL` are accepted as aliases; two that contradict are an error. Other stores, proxies,
public and requester-pays buckets: [s3.md](s3.md).

## Google, Azure, a hub

Google's Application Default Credentials (`GOOGLE_APPLICATION_CREDENTIALS`, gcloud's, the
machine's), `GOOGLE_CLOUD_QUOTA_PROJECT`, `STORAGE_EMULATOR_HOST`; `AZURE_STORAGE_ACCOUNT`,
{azure_secrets} (each also as `_FILE`) and what azure-identity reads; `HF_TOKEN` or
`HF_TOKEN_FILE`, `HF_ENDPOINT`: [clouds.md](clouds.md).

## Signatures

`TENSORSERVE_SIGNATURE_KEY_FILE`, `TENSORSERVE_SIGNATURE_CERTIFICATES_FILE`, or Sigstore's three
(`TENSORSERVE_SIGNATURE_IDENTITY`, `_ISSUER`, `_TRUST_ROOT_FILE`): only a bundle that was signed is
served ([signatures.md](signatures.md)).

## Keys by reference

`TENSORSERVE_KEY_URI` and the services behind it: [keys.md](keys.md). For Vault and OpenBao
`VAULT_ADDR`, `VAULT_TOKEN` (also as `_FILE`), `VAULT_NAMESPACE`, `VAULT_CACERT` and `VAULT_CAPATH`,
or with `BAO_` in front, which wins. `AWS_ENDPOINT_URL_KMS` for KMS.

## What vLLM sees of the environment

An allow-list; add names with `TENSORSERVE_PASS_ENV`.

- by name: {", ".join(f"`{name}`" for name in sorted(CHILD_NAMES))}
- by prefix: {", ".join(f"`{prefix}*`" for prefix in CHILD_PREFIXES)}

Switched on unless you set them: `HF_HUB_OFFLINE=1` (everything is in the bundle),
`VLLM_NO_USAGE_STATS=1`, `DO_NOT_TRACK=1`. Where `XDG_CACHE_HOME` is set, each cache of compiled
code is put below it as well, unless its own variable is set ([caches.md](caches.md)).

{END}
"""


def readme_with_table() -> str:
    """README.md with its table brought up to date."""
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{variables_table()}\n{END}{after}"


def main() -> int:
    """Write both, or with --check say which differs."""
    wanted = {PAGE: page()}
    if BEGIN in README.read_text():
        wanted[README] = readme_with_table()
    if "--check" in sys.argv:
        stale = [p.name for p, text in wanted.items() if not p.exists() or p.read_text() != text]
        if stale:
            print(f"{', '.join(stale)}: run `make docs`", file=sys.stderr)
        return bool(stale)
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
