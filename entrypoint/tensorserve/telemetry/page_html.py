"""How does the start page become HTML? The template, its escaping, and its security policy."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from importlib import resources
from typing import Any


def render(content: dict[str, Any]) -> str:
    """The page with `content` (page.view) in it; readable without its script."""
    values = {name: html.escape(str(value)) for name, value in content.items()}
    values["refresh"] = "10" if content["tone"] == "ready" else "2"
    values["detail_hidden"] = "" if content["detail"] else " hidden"
    values["caution_hidden"] = "" if content["caution"] else " hidden"
    values["signature_hidden"] = "" if content["signature"] else " hidden"
    values["phases"] = "".join(_row(bar) for bar in content["phases"])
    values["events"] = "".join(
        f'<li data-tone="{html.escape(event["tone"])}"><span>{html.escape(event["at"])}</span>'
        f"<span>{html.escape(event['text'])}</span></li>"
        for event in content["events"]
    )
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _template())


@cache
def policy() -> str:
    """The Content-Security-Policy of the page: its script and style by hash, and its JSON.

    Bars are SVG because their widths are attributes: `style` would need 'unsafe-inline'.
    """
    script, style = (_hash(_template(), name) for name in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _row(bar: dict[str, Any]) -> str:
    return (
        f'<tr data-state="{bar["state"]}"><th scope="row">{html.escape(bar["name"])}</th>'
        f'<td><svg aria-hidden="true"><rect x="{bar["x"]}%" width="{bar["width"]}%" height="100%" '
        f'rx="3"/></svg></td><td>{html.escape(bar["seconds"])}</td></tr>'
    )


@cache
def _template() -> str:
    return (resources.files("tensorserve.telemetry") / "page.html").read_text("utf-8")


def _hash(page: str, element: str) -> str:
    found = re.search(rf"<{element}>(.*?)</{element}>", page, re.DOTALL)
    assert found is not None
    return f"sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}"
