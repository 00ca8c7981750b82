"""compose.yaml's demo, as a user runs it: it answers, and Prometheus has seen it."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path

import container
import pytest
import vault
import yaml
from containers import complaints, needs_podman, tracebacks
from queries import panels
from running import request
from stack import Stack, ask

ROOT = Path(__file__).parents[2]

pytestmark = needs_podman


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack() as running:

        def ready() -> bool:
            assert running.state("demo", "Running") == "true", running.log("demo")
            return running.query("tensorserve_ready") == [1.0]

        running.wait(ready, "tensorserve_ready 1 in Prometheus", 240)
        yield running


def test_the_published_port_answers_the_documented_request(stack: Stack) -> None:
    """docs/compose.md's curl, from an encrypted model that the one-shot packed."""
    assert "Paris" in ask(stack)


# What a start without trouble has nothing to show for. tests/config shows them after one with.
EMPTY_WITHOUT_TROUBLE = {"Retries by reason", "Failures by reason"}


def test_every_panel_of_the_dashboard_shows_this_start(stack: Stack) -> None:
    """Its queries, run by the stack's Prometheus on what it scraped since the container began."""

    def empty() -> set[str]:
        # While somebody asks: of what came before the first scrape no rate can be told.
        ask(stack)
        return {
            panel["title"]
            for panel in panels()
            for target in panel["targets"]
            if not any(map(math.isfinite, stack.query(_for_this_start(target["expr"]))))
        }

    left: list[set[str]] = []

    def complete() -> bool:
        left.append(empty() - EMPTY_WITHOUT_TROUBLE)
        return not left[-1]

    try:
        stack.wait(complete, "data in every panel", 90)
    except AssertionError as error:
        raise AssertionError(f"no data in {left[-1]}") from error


def _for_this_start(expression: str) -> str:
    for variable, value in (("$__rate_interval", "5m"), ("$instance", ".*"), ("$model", ".*")):
        expression = expression.replace(variable, value)
    return expression


def test_prometheus_has_both_jobs_and_the_rules(stack: Stack) -> None:
    """Our exporter, vLLM's own metrics, and the alert rules, by the names in config/."""
    stack.wait(lambda: stack.query('up{job="vllm"}') == [1.0], "vLLM's own metrics", 30)
    assert stack.query('up{job="tensorserve"}') == [1.0]
    assert stack.query("tensorserve_load_size_bytes")[0] > 1e8
    status, body = request(f"http://127.0.0.1:{stack.prometheus}/api/v1/rules")
    groups = json.loads(body)["data"]["groups"]
    assert status == 200
    names = {rule["name"] for group in groups for rule in group["rules"]}
    assert "TensorserveLoadFailed" in names
    assert all(rule["health"] == "ok" for group in groups for rule in group["rules"])


def test_no_warning_or_error_of_ours_in_any_log(stack: Stack) -> None:
    """In the product and in the one-shot that packed."""
    for service in ("demo", "pack"):
        assert complaints(stack.log(service)) == []
        assert tracebacks(stack.log(service)) == []


def test_secrets_are_only_in_the_demos_volume(stack: Stack) -> None:
    """Not in the container's configuration or environment; readable by its user alone."""
    done = stack.exec(
        "demo", "stat", "-c", "%a", "/run/demo/model.key", "/run/demo/aws-credentials"
    )
    assert done.stdout.split() == ["600", "600"]
    credentials = stack.exec("demo", "cat", "/run/demo/aws-credentials").stdout
    secret = credentials.split("aws_secret_access_key = ")[1].split()[0]
    words = ["podman", "inspect", stack.container("demo")]
    inspected = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert secret not in inspected
    assert secret not in stack.log("demo")


SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]


def test_the_gpu_service_is_hardened_as_the_demo_is() -> None:
    """It cannot be run without a GPU; that it is hardened as the demo is can be seen."""
    product, demo = SERVICES["tensorserve"], SERVICES["demo"]
    for name in ("read_only", "cap_drop", "security_opt", "shm_size", "healthcheck", "ulimits"):
        assert product[name] == demo[name], name
    assert product["tmpfs"] == demo["tmpfs"]
    assert product["shm_size"] == "1g"
    assert product["healthcheck"]["test"] == ["CMD", "tensorserve", "health"]


def test_the_gpu_service_has_gpus_limits_and_secret_files() -> None:
    """What compose gives a container that needs a GPU, and no secret in its environment."""
    product = SERVICES["tensorserve"]
    resources = product["deploy"]["resources"]
    (device,) = resources["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert set(resources["limits"]) == {"memory", "pids"}
    assert product["secrets"] == ["model-key", "aws-credentials"]
    for secret in product["secrets"]:
        assert f"/run/secrets/{secret}" in product["environment"].values()
    names = set(product["environment"])
    assert names.isdisjoint({"TENSORSERVE_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"})


def test_the_vault_profile_gives_a_key_to_nobody() -> None:
    """The product's container alone differs from the demo's, and holds no key."""
    product, demo = SERVICES["demo-vault"], SERVICES["demo"]
    given = product["environment"]
    assert given["TENSORSERVE_KEY_URI"] == vault.WRAPPING_KEY
    assert given["VAULT_ADDR"] == vault.ADDRESS == "http://vault:8200"
    assert given["VAULT_TOKEN_FILE"] == str(vault.token_file(Path("/run/demo"), "server"))
    assert given["TENSORSERVE_MODEL_URI"] == container.WRAPPED_URI
    assert not {name for name in given if name.endswith(("KEY", "TOKEN"))}
    assert "TENSORSERVE_KEY_FILE" not in given
    differ = {name for name in product if product[name] != demo.get(name)}
    assert differ == {"profiles", "environment", "depends_on"}
    holders = {
        name
        for name, service in SERVICES.items()
        if any(str(volume).startswith("vault:") for volume in service.get("volumes", []))
    }
    assert holders == {"vault"}
    needed = {"demo-vault", *product["depends_on"], *SERVICES["pack-vault"]["depends_on"]}
    in_profile = {name for name, one in SERVICES.items() if "vault" in one.get("profiles", [])}
    assert needed == in_profile == {"demo-vault", "pack-vault", "vault", "s3"}


@pytest.mark.parametrize("name", SERVICES)
def test_services_are_hardened_and_publish_on_loopback_alone(name: str) -> None:
    """Also those beside the product; who wants a port open says so."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all("-127.0.0.1:" in port for port in service.get("ports", []))
