"""Which queries do the dashboard and the rules ask, and which metrics do they name?"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml
from prometheus_server import CONFIG

# Not what our own rules record: their names have a colon before the metric's.
_METRIC = re.compile(r"(?<![\w:])(?:tensorserve_|vllm:)\w+")


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana loads it."""
    content: dict[str, Any] = json.loads((CONFIG / "grafana" / "dashboard.json").read_text())
    return content


def panels() -> list[dict[str, Any]]:
    """All panels but the rows, which hold nothing."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    """Alerting and recording rules."""
    groups = yaml.safe_load((CONFIG / "prometheus" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    """Alerting rules by name."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def metrics_in(expression: str) -> set[str]:
    """Names of samples of ours and of vLLM's in a query."""
    return set(_METRIC.findall(expression))
