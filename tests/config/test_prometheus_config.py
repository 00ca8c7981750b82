"""Does Prometheus take what we ship, and does each alert fire when it must and only then?"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_server import CONFIG, tool
from queries import alerts

PROMETHEUS = CONFIG / "prometheus"
ALERTS_PAGE = Path(__file__).parents[2] / "docs" / "alerts.md"


def promtool(*arguments: str) -> None:
    ended = subprocess.run(
        [tool("promtool"), *arguments], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def rule_tests() -> list[dict[str, Any]]:
    tests: list[dict[str, Any]] = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())[
        "tests"
    ]
    return tests


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    """The configuration, the rules, and the rules' own tests."""
    promtool(*arguments)


def test_the_jobs_ask_the_ports_that_the_image_opens() -> None:
    """By the service name of the compose file."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    targets = {
        job["job_name"]: [target for found in job["static_configs"] for target in found["targets"]]
        for job in config["scrape_configs"]
    }
    assert targets == {"tensorserve": ["tensorserve:9400"], "vllm": ["tensorserve:8000"]}


@pytest.mark.parametrize("name", alerts())
def test_an_alert_says_severity_cause_and_remedy(name: str) -> None:
    """Whoever is woken by it has nothing else at first."""
    alert = alerts()[name]
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook"}
    assert "{{ $labels.instance }}" in alert["annotations"]["summary"]
    assert len(alert["annotations"]["description"]) > 80


@pytest.mark.parametrize("name", alerts())
def test_the_runbook_of_an_alert_has_a_section_of_that_name(name: str) -> None:
    """The anchor is made by GitHub from the heading."""
    runbook = alerts()[name]["annotations"]["runbook"]
    anchors = {
        re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^##+ (.+)$", ALERTS_PAGE.read_text(), re.MULTILINE)
    }
    assert runbook == f"docs/alerts.md#{name.lower()}"
    assert name.lower() in anchors


def test_the_page_has_no_alert_that_is_gone() -> None:
    """Nor one that was renamed."""
    assert set(re.findall(r"^## (Tensorserve\w+)$", ALERTS_PAGE.read_text(), re.MULTILINE)) == set(
        alerts()
    )


@pytest.mark.parametrize("name", alerts())
def test_the_rule_tests_show_an_alert_firing_and_silent(name: str) -> None:
    """An alert that always fires would pass a test of the first kind alone."""
    fires = silent = False
    for test in rule_tests():
        instances = {
            found
            for series in test["input_series"]
            for found in re.findall(r'instance="(\w+)"', series["series"])
        }
        for case in test.get("alert_rule_test", []):
            if case["alertname"] == name:
                firing = {alert["exp_labels"]["instance"] for alert in case["exp_alerts"]}
                fires |= bool(firing)
                silent |= firing < instances
    assert (fires, silent) == (True, True)
