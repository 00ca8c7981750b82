"""Does every panel of the dashboard show something on a real Prometheus, and explain itself?"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from complete_log import write_complete_log
from prometheus_client.parser import text_string_to_metric_families as parse
from prometheus_server import CONFIG, SCRAPE_SECONDS, Prometheus
from queries import dashboard, metrics_in, panels, rules
from vllm_metrics import VllmServer

from tensorserve.telemetry import PHASES
from tensorserve.telemetry.exporter import Exporter
from tensorserve.telemetry.metrics import StartCollector
from tensorserve.telemetry.readiness import Watcher

# Names of Grafana's own units; an unknown one is shown behind the number, as it is.
UNITS = {"binBps", "bool_yes_no", "bytes", "none", "percentunit", "reqps", "s", "short"}
GRAFANAS_WIDTH = 24

EXPRESSIONS = [
    pytest.param(panel["title"], target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in panels()
    for target in panel["targets"]
]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has scraped a real exporter and vLLM's families at least twice."""
    state_dir = tmp_path_factory.mktemp("state")
    stop = threading.Event()
    with VllmServer() as vllm, Exporter(state_dir, "127.0.0.1", 0) as exporter:
        write_complete_log(state_dir, f"http://{vllm.address}/health")
        watch = threading.Thread(target=exporter.watch, args=(stop,))
        watch.start()
        try:
            targets = {"tensorserve": f"127.0.0.1:{exporter.port}", "vllm": vllm.address}
            with Prometheus(tmp_path_factory.mktemp("prometheus"), targets) as server:
                server.wait_for(lambda: _scraped(server) == {"tensorserve", "vllm"}, 60)
                yield server
        finally:
            stop.set()
            watch.join()


def _scraped(server: Prometheus) -> set[str]:
    """The jobs that were scraped twice with success, the last time ready."""
    query = "sum_over_time(up[1m]) >= 2 and on (instance) tensorserve_ready == 1"
    return {sample["metric"]["job"] for sample in server.query(query)}


def _as_grafana_sends_it(expression: str) -> str:
    replaced = expression.replace("$__rate_interval", f"{30 * SCRAPE_SECONDS}s")
    for variable in dashboard()["templating"]["list"]:
        replaced = replaced.replace(f"${variable['name']}", variable.get("allValue", ""))
    assert "$" not in replaced, f"a variable is unknown: {replaced}"
    return replaced


@pytest.mark.parametrize(("title", "expression"), EXPRESSIONS)
def test_every_query_of_a_panel_returns_data(
    prometheus: Prometheus, title: str, expression: str
) -> None:
    """Executed by Prometheus, on what a real exporter says; not NaN alone, as of an empty rate."""
    found = prometheus.query(_as_grafana_sends_it(expression))
    values = [float(sample["value"][1]) for sample in found]
    assert any(math.isfinite(value) for value in values), f"{title}: {expression}: {found}"


def test_the_phases_on_the_dashboard_are_the_phases_that_we_have(prometheus: Prometheus) -> None:
    """In their order, and together they are the start-up time."""
    panel = next(panel for panel in panels() if panel["title"] == "Start-up time by phase")
    found = [
        sample
        for target in panel["targets"]
        for sample in prometheus.query(_as_grafana_sends_it(target["expr"]))
    ]
    assert [sample["metric"]["phase"] for sample in found] == list(PHASES)
    total = prometheus.query("tensorserve_startup_seconds")[0]["value"][1]
    assert math.isclose(sum(float(s["value"][1]) for s in found), float(total), abs_tol=1e-6)


def test_a_variable_of_the_dashboard_finds_its_values(prometheus: Prometheus) -> None:
    """`label_values(metric, label)` is Grafana's, which asks the series for their labels."""
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = variable["definition"].removeprefix("label_values(")[:-1].split(", ")
            series = prometheus.get("series", **{"match[]": metric})
            assert {found[label] for found in series} not in (set(), {""}), variable["name"]


def test_start_and_serving_of_a_container_have_the_same_instance(prometheus: Prometheus) -> None:
    """Or the dashboard's variable would choose one of them only."""
    assert len({sample["metric"]["instance"] for sample in prometheus.query("up")}) == 1


def test_every_rule_is_evaluated_without_an_error(prometheus: Prometheus) -> None:
    """promtool sees the syntax; only data shows a match that is not unique."""

    def evaluated() -> list[dict[str, Any]]:
        groups = prometheus.get("rules")["groups"]
        return [rule for group in groups for rule in group["rules"]]

    prometheus.wait_for(lambda: all(rule["health"] != "unknown" for rule in evaluated()), 30)
    assert len(evaluated()) == len(rules())
    assert [rule for rule in evaluated() if rule["health"] != "ok"] == []


def test_queries_and_rules_use_only_metrics_that_are_exported(tmp_path: Path) -> None:
    """Ours by the collector, vLLM's by the names in its loggers.py."""
    write_complete_log(tmp_path, "http://127.0.0.1:1/health")
    ours = {
        sample.name
        for family in StartCollector(Watcher(tmp_path).look).collect()
        for sample in family.samples
    }
    server = VllmServer()
    with server:
        vllms = {s.name for family in parse(server.scrape().decode()) for s in family.samples}
    expressions = [expression.values[1] for expression in EXPRESSIONS]
    variables = [v.get("definition", "") for v in dashboard()["templating"]["list"]]
    used = set().union(
        *map(metrics_in, [*expressions, *variables, *(rule["expr"] for rule in rules())])
    )
    assert used - ours - vllms == set()
    # What we export and nobody shows is a panel that was forgotten.
    assert ours - used == set()


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: str(panel["title"]))
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    """Title, description, a unit that Grafana knows, the dashboard's own data source."""
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
    assert all(source["uid"] == "${datasource}" for source in sources)


def test_panels_have_ids_of_their_own_and_titles_of_their_own() -> None:
    """Links and alerts refer to a panel by its id."""
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)


def test_panels_stand_inside_the_grid_and_not_over_each_other() -> None:
    """Grafana would push them about and show another order."""
    places = {panel["title"]: panel["gridPos"] for panel in dashboard()["panels"]}
    for title, place in places.items():
        assert min(place["x"], place["y"]) >= 0, title
        assert min(place["w"], place["h"]) > 0, title
        assert place["x"] + place["w"] <= GRAFANAS_WIDTH, title
    for (title, a), (other, b) in combinations(places.items(), 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, f"{title} and {other} overlap"


def test_grafana_has_the_data_source_at_prometheus_pace() -> None:
    """$__rate_interval is made from it: too small a one leaves rates empty."""
    provisioning = CONFIG / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())
    prometheus = yaml.safe_load((CONFIG / "prometheus" / "prometheus.yml").read_text())
    (source,) = sources["datasources"]
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    chosen = dashboard()["templating"]["list"][0]["current"]["value"]
    assert (source["type"], source["uid"]) == ("prometheus", chosen)


def test_grafana_loads_dashboards_from_a_folder() -> None:
    """The provider's file is what Grafana reads first."""
    path = CONFIG / "grafana" / "provisioning" / "dashboards" / "tensorserve.yml"
    (provider,) = yaml.safe_load(path.read_text())["providers"]
    assert provider["type"] == "file"
    assert Path(provider["options"]["path"]).is_absolute()
