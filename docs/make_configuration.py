"""Makes the tables of docs/configuration.md from the settings class. `--check` only compares."""

from __future__ import annotations

import sys
from pathlib import Path

from tensorserve.child_environment import CHILD_NAMES, CHILD_PREFIXES
from tensorserve.settings import AWS_SECRETS
from tensorserve.variables import VARIABLES
from tensorserve.vllm_flags import OWNED, RENAMED

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
    return f"""# Configuration

{BEGIN}

Everything is set by environment variables, read once at the start. Precedence: what stands on the
command line after `--` (or after the image's name, if it begins with `-`) wins over
`TENSORSERVE_VLLM_<FLAG>`, which wins over vLLM's default. A variable with our prefix that is not in
this table is an error that names the nearest known one; so are two values for the same thing.
`tensorserve plan` shows what the settings mean without starting anything, secrets redacted.

A secret `X` may be given as `X_FILE`, the path of a file that holds it. Prefer that: what is in a
container's environment is shown by `docker inspect`.

{variables_table()}

## Flags of vLLM

`TENSORSERVE_VLLM_<FLAG>` is `--<flag>` with underscores for dashes. `true` and `false` become
`--flag` and `--no-flag`; a list is a JSON array or words parted by spaces; all else is passed
on as one word, JSON included. Names, truth values, whole numbers and choices are checked before
vLLM is started. These have another way, or none:

| flag | instead |
|---|---|
{renamed}
{owned}

`TENSORSERVE_VLLM_API_KEY` and `TENSORSERVE_VLLM_HF_TOKEN` (also as `_FILE`, and as vLLM's own
`VLLM_API_KEY` and `HF_TOKEN`) reach vLLM through memory, not through its arguments or environment.
With an API key every route asks for it but `/health`, `/ping` and `/version`: vLLM's own check
leaves `/invocations`, `/tokenize`, `/metrics` and others open, so `plan` adds a `--middleware` of
ours after your own. `--grpc`, `--grpc-port` and `VLLM_USE_RUST_FRONTEND` know no such thing and are
refused with a key.

## S3

The standard AWS variables and files are honoured: keys, profiles, roles, web identity, container
and instance credentials, `AWS_REGION`, `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_CA_BUNDLE`.
{secrets} may also be given as `_FILE`. `S3_ACCESS_KEY_ID`, `S3_SECRET_ACCESS_KEY` and
`S3_ENDPOINT_URL` are accepted as aliases; two that contradict are an error.

## What vLLM sees of the environment

An allow-list; add names with `TENSORSERVE_PASS_ENV`.

- by name: {", ".join(f"`{name}`" for name in sorted(CHILD_NAMES))}
- by prefix: {", ".join(f"`{prefix}*`" for prefix in CHILD_PREFIXES)}

Switched on unless you set them: `HF_HUB_OFFLINE=1` (everything is in the bundle),
`VLLM_NO_USAGE_STATS=1`, `DO_NOT_TRACK=1`.

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
