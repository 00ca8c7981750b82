"""Which variables are there that mean nothing, or nothing any more?"""

from __future__ import annotations

import difflib
import re

from tensorserve.config.secret_names import IN_HEADERS, VLLM_PREFIX
from tensorserve.config.store_settings import ENDPOINTS, REGIONS
from tensorserve.config.tidying import PREFIXES, has_controls
from tensorserve.config.variable_reader import VariableReader
from tensorserve.config.variables import BY_NAME, HANDOFF_VARIABLE, PREFIX, VARIABLES

# Variables that Kubernetes sets in each pod for a Service (enableServiceLinks).
_SERVICE_LINK = re.compile(
    r"TENSORSERVE_(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP)(_.*)?)"
)
_LINKED_PORT = re.compile(r"(tcp|udp)://")
# Variables that protect something, and what happens without them.
_GUARDS = {
    "TENSORSERVE_KEY": "a model that is not encrypted is served",
    "TENSORSERVE_PASSPHRASE": "a model that is not encrypted is served",
    "TENSORSERVE_KEY_URI": "a model that is not encrypted is served",
    "TENSORSERVE_KEY_FINGERPRINT": "any key is accepted",
    "TENSORSERVE_MANIFEST_SHA256": "any bundle is served",
    "TENSORSERVE_SIGNATURE_KEY": "the bundle needs no signature",
    "TENSORSERVE_SIGNATURE_CERTIFICATES": "the bundle needs no signature",
    "TENSORSERVE_SIGNATURE_IDENTITY": "the bundle needs no signature",
    "TENSORSERVE_VERIFY": "auto decides",
    "TENSORSERVE_COMPILED_KEY": "the model's key opens compiled code",
    "TENSORSERVE_COMPILED_SIGNATURE_KEY": "compiled code needs no signature",
    "TENSORSERVE_ADAPTERS_KEY": "the model's key opens adapters",
    "TENSORSERVE_ADAPTERS_ALLOW": "adapters of all names are served",
    "TENSORSERVE_VLLM_API_KEY": "the API needs no key",
}


def refuse_misplaced(reader: VariableReader) -> None:
    """Note unknown variables, those of a Kubernetes Service, and control characters."""
    _leave_out_kubernetes_links(reader)
    _refuse_unknown(reader)
    _refuse_controls(reader)


def _refuse_unknown(reader: VariableReader) -> None:
    known = set(BY_NAME) | {f"{v.name}_FILE" for v in VARIABLES if v.secret}
    # Empty ones too: an unknown name is a mistake whatever its value.
    for name in sorted({*reader.environ, *(n for n, v in reader.given.items() if not v.strip())}):
        if not name.startswith(PREFIX) or name in known or name == HANDOFF_VARIABLE:
            continue
        if name.startswith(VLLM_PREFIX):
            continue  # checked against vLLM's flags in flag_settings
        near = difflib.get_close_matches(name, known, 1, cutoff=0.6)
        reader.problem(
            f"{name} is not a variable of tensorserve.",
            f"Did you mean {near[0]}?" if near else "`tensorserve plan --help` lists them all.",
        )


def _refuse_controls(reader: VariableReader) -> None:
    """Refuse control characters in variables that libraries read: they would raise in there.

    Variables that are parsed here are checked where they are parsed.
    """
    parsed = {*IN_HEADERS, *REGIONS, *ENDPOINTS}
    for name in sorted(reader.environ.keys() - parsed):
        others = name.startswith(PREFIXES) and not name.startswith(PREFIX)
        if others and has_controls(reader.environ[name]):
            reader.bad_character(name)


def _leave_out_kubernetes_links(reader: VariableReader) -> None:
    """Report the variables of a Kubernetes Service named tensorserve as one problem."""
    links = {name for name in reader.environ if _SERVICE_LINK.fullmatch(name)}
    if not links:
        return
    links |= {n for n, text in reader.environ.items() if _LINKED_PORT.match(text) and _is_port(n)}
    reader.environ = {name: text for name, text in reader.environ.items() if name not in links}
    reader.problem(
        f"Kubernetes has set {min(links)} and {len(links) - 1} more, for a Service whose name "
        "begins with `tensorserve`.",
        "Set `enableServiceLinks: false` in the pod's spec (docs/kubernetes.md), or give the "
        "Service another name.",
    )


def empty_guards(reader: VariableReader) -> tuple[str, ...]:
    """A warning for each protecting variable that is set to an empty value."""
    return tuple(
        f"{name} is set to nothing, as if it were not set: {without}."
        for guard, without in _GUARDS.items()
        for name in (guard, f"{guard}_FILE")
        if name in reader.given
        and not {guard, f"{guard}_FILE", guard.removeprefix(PREFIX)} & reader.environ.keys()
    )


def _is_port(name: str) -> bool:
    return name.startswith(PREFIX) and name.endswith("_PORT")
