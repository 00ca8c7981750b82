"""Do the Kubernetes examples fit Kubernetes, the image and each other? Without a cluster."""

from __future__ import annotations

import base64
import copy
import http.client
import json
import re
import subprocess
import textwrap
import threading
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from rendering import (
    EXAMPLES,
    KUBERNETES,
    ROOT,
    SECRET_FILES,
    Manifest,
    Pod,
    copy_with_secrets,
    image_environment,
    of_kind,
    pods,
    quantity,
    render,
    rendered,
)

from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight import SHARED_MEMORY_BYTES, STATE_BYTES
from tensorserve.launch.stopping import supervisor_seconds
from tensorserve.sources.ssrf_guard import METADATA
from tensorserve.telemetry.exporter import Exporter

PAGE = ROOT / "docs" / "kubernetes.md"
# The oldest that the schemas know and the newest: nothing here needs a certain one.
VERSIONS = ("1.25", "1.37")
# Custom resources: no package ships their schemas in a form that is light enough to depend on.
CUSTOM = {
    "PodMonitor": "monitoring.coreos.com/v1",
    "LeaderWorkerSet": "leaderworkerset.x-k8s.io/v1",
}

every_pod = pytest.mark.parametrize("pod", list(pods()), ids=str)
every_example = pytest.mark.parametrize("example", EXAMPLES)


def plan_of(
    pod: Pod, folder: Path, more: dict[str, str] | None = None
) -> tuple[Settings, LaunchPlan]:
    """What `tensorserve plan` makes of the pod (and `more` variables), its secrets in `folder`."""
    environment = pod.environment | (more or {})
    for path, volume in pod.mounts.items():
        if "secret" in volume:
            place = folder / volume["name"]
            place.mkdir(parents=True, exist_ok=True)
            for name, content in secret_files(pod.example, volume["secret"]["secretName"]).items():
                (place / name).write_bytes(content)
            environment = {
                name: re.sub(rf"^{re.escape(path)}(?=/)", str(place), value)
                for name, value in environment.items()
            }
    settings = Settings.from_environment(environment)
    return settings, make_plan(settings, pod.arguments)


def secret_files(example: str, name: str) -> dict[str, bytes]:
    """The files of a secret, as rendered."""
    (secret,) = [s for s in of_kind(example, "Secret") if s["metadata"]["name"] == name]
    return {file: base64.b64decode(content) for file, content in secret["data"].items()}


def gpus(pod: Pod) -> int:
    return int(pod.container["resources"]["limits"].get("nvidia.com/gpu", 0))


# --- against Kubernetes ---


@pytest.mark.parametrize("version", VERSIONS)
@every_example
def test_every_manifest_fits_the_schemas_of_kubernetes(example: str, version: str) -> None:
    """Strictly: a field that Kubernetes does not know is an error."""
    for manifest in rendered(example):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@every_pod
def test_every_pod_fits_the_schemas_of_kubernetes(pod: Pod, version: str) -> None:
    """Those of a LeaderWorkerSet too, which the schemas do not know."""
    manifest = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod.template}
    kubernetes_validate.validate(manifest, version, strict=True)


def test_the_schemas_find_a_field_that_is_misspelt() -> None:
    """Otherwise the tests above would show nothing."""
    wrong = copy.deepcopy(of_kind("base", "Deployment")[0])
    wrong["spec"]["template"]["spec"]["enableServiceLink"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


@every_example
def test_custom_resources_are_those_we_know(example: str) -> None:
    """Each has a test of its own below."""
    found = {
        m["kind"]: m["apiVersion"]
        for m in rendered(example)
        if "." in m["apiVersion"] and not m["apiVersion"].startswith("networking.k8s.io/")
    }
    assert found.items() <= CUSTOM.items()
    assert "PodMonitor" in found


def test_the_leader_worker_set_has_the_fields_that_matter() -> None:
    """By hand, from the API's own types; the pods in it are held against Kubernetes' schema."""
    (group,) = of_kind("leaderworkerset", "LeaderWorkerSet")
    spec = group["spec"]
    assert set(spec) == {"replicas", "rolloutStrategy", "leaderWorkerTemplate"}
    assert spec["rolloutStrategy"] == {
        "type": "RollingUpdate",
        "rollingUpdateConfiguration": {"maxUnavailable": 1, "maxSurge": 0},
    }
    templates = spec["leaderWorkerTemplate"]
    assert set(templates) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert templates["size"] == 2
    assert templates["restartPolicy"] == "RecreateGroupOnPodRestart"


@every_pod
def test_a_pod_fulfils_the_restricted_pod_security_standard(pod: Pod) -> None:
    """And more: no writable root, no token."""
    security = pod.spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert (security["runAsUser"], security["runAsGroup"]) == (10001, 0)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod.container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod.spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod.spec)
    kinds = {kind for volume in pod.spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "persistentVolumeClaim", "secret"}


@every_pod
def test_the_user_is_that_of_the_image(pod: Pod) -> None:
    """Files of the image belong to it."""
    security = pod.spec["securityContext"]
    user = f"USER {security['runAsUser']}:{security['runAsGroup']}"
    assert user in (ROOT / "docker" / "Dockerfile").read_text()


def test_two_pods_never_want_the_same_gpu_or_volume() -> None:
    """A GPU is seldom free twice, and the volume can be mounted once."""
    (deployment,) = of_kind("base", "Deployment")
    (claim,) = of_kind("base", "PersistentVolumeClaim")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}
    assert deployment["spec"]["replicas"] == 1
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_the_cpu_overlay_asks_for_no_gpu() -> None:
    """Nor tolerates the taint of machines that have one."""
    (base,) = [pod for pod in pods() if pod.example == "base"]
    (cpu,) = [pod for pod in pods() if pod.example == "overlays/cpu"]
    assert gpus(base) == 1
    assert "nvidia" not in json.dumps(rendered("overlays/cpu"))
    assert cpu.container["image"] == "tensorserve:cpu"


# --- against the image ---


@every_pod
def test_tensorserve_takes_every_variable_and_argument(pod: Pod, tmp_path: Path) -> None:
    """The pod's whole environment through the real parser, with real files at its `_FILE`s."""
    settings, plan = plan_of(pod, tmp_path)
    assert settings.model_uri.startswith("s3://")
    assert settings.key is not None
    assert settings.key.reveal() == SECRET_FILES["model.key"]
    assert settings.s3.secret_access_key is not None
    assert settings.s3.secret_access_key.reveal() == b"a-secret-access-key"
    assert {f"--{name}" for name in ("served-model-name", "shutdown-timeout")} <= {
        word.partition("=")[0] for word in plan.argv
    }


@every_pod
def test_a_variable_that_is_misspelt_is_found(pod: Pod, tmp_path: Path) -> None:
    """Otherwise the test above would show nothing."""
    with pytest.raises(ConfigurationError):
        plan_of(pod, tmp_path, {"TENSORSERVE_MODEL_URL": "s3://bucket/model"})


@every_pod
def test_service_links_are_off_because_they_would_end_the_start(pod: Pod, tmp_path: Path) -> None:
    """For a service named `tensorserve`, Kubernetes sets what looks like settings of ours."""
    assert pod.spec["enableServiceLinks"] is False
    address = "10.43.7.20"
    links = {
        "TENSORSERVE_PORT": f"tcp://{address}:8000",
        "TENSORSERVE_SERVICE_HOST": address,
        "TENSORSERVE_SERVICE_PORT": "8000",
        "TENSORSERVE_SERVICE_PORT_HTTP": "8000",
        "TENSORSERVE_PORT_8000_TCP_ADDR": address,
    }
    for name, value in links.items():
        with pytest.raises(ConfigurationError):
            plan_of(pod, tmp_path, {name: value})


@every_pod
def test_secrets_are_files_and_never_values(pod: Pod) -> None:
    """A pod's environment is seen by whoever may read the pod."""
    for variable in pod.container["env"]:
        assert "secretKeyRef" not in variable.get("valueFrom", {})
        assert not re.search(r"(KEY|KEY_ID|PASSPHRASE|TOKEN)$", variable["name"])
    for volume in pod.spec["volumes"]:
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440


@every_pod
def test_all_that_the_image_writes_is_on_a_volume(pod: Pod) -> None:
    """The root is read-only, and of the image's folders HOME alone may stay so."""
    writable = [path for path, volume in pod.mounts.items() if "secret" not in volume]
    assert {"/tmp", "/dev/shm"} <= set(writable)
    written = {
        name: value
        for name, value in image_environment().items()
        if value.startswith("/") and name not in {"PATH", "HOME"}
    }
    assert len(written) >= 8
    for name, value in written.items():
        assert any(Path(value).is_relative_to(path) for path in writable), name


@every_pod
def test_what_lies_in_memory_is_large_enough_and_counted(pod: Pod) -> None:
    """Volumes in memory count against the container's limit, and so do bytes on their way."""
    memory = {
        path: quantity(volume["emptyDir"]["sizeLimit"])
        for path, volume in pod.mounts.items()
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    }
    assert memory.keys() == {"/tmp", "/dev/shm"}
    assert memory["/tmp"] > STATE_BYTES
    assert memory["/dev/shm"] > SHARED_MEMORY_BYTES
    resources = pod.container["resources"]
    limit = quantity(resources["limits"]["memory"])
    assert quantity(resources["requests"]["memory"]) <= limit
    # 4 GiB: vLLM itself, a little more than the demo's whole engine needs.
    assert sum(memory.values()) + 2**30 + 4 * 2**30 <= limit


@every_pod
def test_the_grace_period_covers_a_stop(pod: Pod, tmp_path: Path) -> None:
    """preStop, then vLLM's time for running requests, then the end of the processes."""
    drain = plan_of(pod, tmp_path)[1].options.drain_seconds
    assert drain > 0
    stop = pod.container.get("lifecycle", {}).get("preStop", {}).get("exec", {})
    seconds = int(stop.get("command", ["sleep", "0"])[1])
    stopped = supervisor_seconds(drain, serving=True)
    assert pod.spec["terminationGracePeriodSeconds"] >= seconds + stopped + 5


# --- probes and ports ---


@every_pod
def test_ports_are_those_that_the_image_listens_on(pod: Pod, tmp_path: Path) -> None:
    """A worker has no API."""
    settings, plan = plan_of(pod, tmp_path)
    expected = {"metrics": settings.metrics_port, "api": plan.port}
    if pod.role == "worker":
        del expected["api"]
    assert pod.ports == expected


@every_pod
def test_probes_ask_what_the_exporter_answers(pod: Pod, tmp_path: Path) -> None:
    """The real exporter, before any start: it lives, and is neither started nor ready."""
    expected = {"livenessProbe": 200, "readinessProbe": 503, "startupProbe": 503}
    if pod.role == "worker":
        expected = {"livenessProbe": 200}
    found = {}
    with Exporter(tmp_path, "127.0.0.1", 0) as exporter:
        stop = threading.Event()
        stop.set()
        exporter.watch(stop)
        for name, probe in pod.container.items():
            if name.endswith("Probe"):
                assert probe["httpGet"]["port"] == "metrics"
                found[name] = status(exporter.port, probe["httpGet"]["path"])
        assert status(exporter.port, "/no-such-path") == 404
    assert found == expected


def status(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@every_pod
def test_no_probe_is_the_end_of_a_long_start(pod: Pod) -> None:
    """Half an hour for the start; only the start-up probe waits for it."""
    probe = pod.container.get("startupProbe")
    if pod.role == "worker":
        assert probe is None
        return
    assert probe is not None
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 1800
    assert probe["httpGet"]["path"] == "/startupz"
    if pod.role == "single":
        deployment = of_kind(pod.example, "Deployment")[0]
        assert deployment["spec"]["progressDeadlineSeconds"] > 1800


# --- against each other ---


@every_example
def test_the_service_leads_to_the_api_of_the_pods_that_have_one(example: str) -> None:
    """In a group: to the leader alone."""
    (service,) = of_kind(example, "Service")
    chosen = [
        pod
        for pod in pods()
        if pod.example == example and service["spec"]["selector"].items() <= pod.labels.items()
    ]
    assert [pod.role for pod in chosen] in (["single"], ["leader"])
    (port,) = service["spec"]["ports"]
    assert chosen[0].ports[port["targetPort"]] == port["port"]


def test_the_service_of_the_group_has_not_the_groups_own_name() -> None:
    """The controller makes a headless service of that name, which the leader's address needs."""
    (service,) = of_kind("leaderworkerset", "Service")
    (group,) = of_kind("leaderworkerset", "LeaderWorkerSet")
    assert service["metadata"]["name"] != group["metadata"]["name"]


@every_example
def test_the_deployments_selector_fits_its_pods(example: str) -> None:
    """Kubernetes refuses it otherwise."""
    for deployment in of_kind(example, "Deployment"):
        wanted = deployment["spec"]["selector"]["matchLabels"]
        assert wanted.items() <= deployment["spec"]["template"]["metadata"]["labels"].items()


@every_pod
def test_a_pod_names_claims_and_secrets_that_are_there(pod: Pod) -> None:
    """By the names that kustomize gave them: a new key makes new pods."""
    names = {(m["kind"], m["metadata"]["name"]) for m in rendered(pod.example)}
    for volume in pod.spec["volumes"]:
        if "secret" in volume:
            assert ("Secret", volume["secret"]["secretName"]) in names
            assert re.search(r"-[a-z0-9]{10}$", volume["secret"]["secretName"])
        if "persistentVolumeClaim" in volume:
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names


def test_the_parallel_sizes_use_every_gpu_of_the_group(tmp_path: Path) -> None:
    """vLLM refuses a number of ranks that the machines do not have, after a minute of imports."""
    (group,) = of_kind("leaderworkerset", "LeaderWorkerSet")
    size = group["spec"]["leaderWorkerTemplate"]["size"]
    for pod in pods():
        if pod.example == "leaderworkerset":
            _, plan = plan_of(pod, tmp_path)
            assert plan.tensor_parallel_size == gpus(pod)
            assert plan.options.parallel.pipeline == size


def test_leader_and_worker_differ_only_in_what_serves() -> None:
    """One start on two machines: other settings in one of them would end in a hang."""
    leader, worker = (p for p in pods() if p.example == "leaderworkerset")
    assert worker.arguments == (
        "--nnodes=2",
        "--node-rank=1",
        "--master-addr=tensorserve-group-0.tensorserve",
        "--api-server-count=0",
    )
    assert leader.arguments == ("--nnodes=2", "--node-rank=0", worker.arguments[2])
    assert leader.environment == worker.environment
    for field in ("image", "resources", "securityContext", "volumeMounts", "livenessProbe"):
        assert leader.container[field] == worker.container[field]
    same = {k: v for k, v in leader.spec.items() if k != "containers"}
    assert same == {k: v for k, v in worker.spec.items() if k != "containers"}


# --- the network ---


@pytest.mark.parametrize("example", ["base", "overlays/cpu"])
def test_the_network_policy_allows_only_what_a_pod_needs(example: str) -> None:
    """It selects the pod, names its ports, and leads to no place that hands out credentials."""
    (policy,) = of_kind(example, "NetworkPolicy")
    (pod,) = (pod for pod in pods() if pod.example == example)
    spec = policy["spec"]
    assert spec["podSelector"]["matchLabels"].items() <= pod.labels.items()
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    clients, prometheus = spec["ingress"]
    assert clients == {"from": [{"podSelector": {}}], "ports": [{"port": "api"}]}
    assert all("namespaceSelector" in peer for peer in prometheus["from"])
    named = {port["port"] for rule in spec["ingress"] for port in rule["ports"]}
    assert named == {"api", "metrics"} == set(pod.ports)
    dns, model = spec["egress"]
    assert {port["port"] for port in dns["ports"]} == {53}
    assert {port["port"] for port in model["ports"]} == {443, 80}
    left_out = [net for peer in model["to"] for net in peer["ipBlock"]["except"]]
    assert sorted(left_out) == sorted(map(str, METADATA))


# --- metrics ---


def scraped(example: str, pod: Pod, name: str) -> list[dict[str, str]]:
    """The labels of each target that the example's PodMonitor makes of `pod`, called `name`."""
    (monitor,) = of_kind(example, "PodMonitor")
    assert set(monitor["spec"]) == {"selector", "podMetricsEndpoints"}
    if not monitor["spec"]["selector"]["matchLabels"].items() <= pod.labels.items():
        return []
    found = []
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert set(endpoint) == {"port", "path", "interval", "scrapeTimeout", "relabelings"}
        if endpoint["port"] not in pod.ports:
            continue
        # As the operator begins: https://github.com/prometheus-operator, generatePodMonitorConfig.
        labels = {
            "__address__": f"10.0.0.7:{pod.ports[endpoint['port']]}",
            "__meta_kubernetes_namespace": "models",
            "__meta_kubernetes_pod_name": name,
            "namespace": "models",
            "container": "tensorserve",
            "pod": name,
            "job": f"models/{monitor['metadata']['name']}",
            "endpoint": endpoint["port"],
        }
        for label, value in pod.labels.items():
            labels[f"__meta_kubernetes_pod_label_{re.sub(r'[^A-Za-z0-9_]', '_', label)}"] = value
        for step in endpoint["relabelings"]:
            relabel(labels, step)
        found.append({k: v for k, v in labels.items() if not k.startswith("__")})
    return found


def relabel(labels: dict[str, str], step: dict[str, Any]) -> None:
    """The part of Prometheus' relabeling that is used here."""
    if step.get("action") == "labeldrop":
        for label in [k for k in labels if re.fullmatch(step["regex"], k)]:
            del labels[label]
        return
    assert set(step) <= {"sourceLabels", "separator", "targetLabel", "replacement"}
    joined = step.get("separator", ";").join(labels[k] for k in step.get("sourceLabels", []))
    labels[step["targetLabel"]] = step.get("replacement", joined)


@every_pod
def test_metrics_have_the_jobs_that_alerts_and_dashboard_ask_for(pod: Pod) -> None:
    """And one `instance` for both."""
    config = yaml.safe_load((ROOT / "config" / "prometheus" / "prometheus.yml").read_text())
    jobs = {job["job_name"] for job in config["scrape_configs"]}
    targets = scraped(pod.example, pod, "pod-0")
    assert {t["job"] for t in targets} == (jobs if pod.role != "worker" else {"tensorserve"})
    assert len({t["instance"] for t in targets}) == 1


@every_example
def test_metrics_keep_their_labels_when_a_pod_is_replaced(example: str) -> None:
    """Else the history of an alert would begin anew with each start."""
    for pod in pods():
        if pod.example == example and pod.role == "single":
            assert scraped(example, pod, "tensorserve-5d-abc") == scraped(
                example, pod, "tensorserve-7f-xyz"
            )
    group = [p for p in pods() if p.example == example and p.role != "single"]
    instances = [
        scraped(example, pod, f"tensorserve-group-0{suffix}")[0]["instance"]
        for pod, suffix in zip(group, ("", "-1"), strict=False)
    ]
    assert len(set(instances)) == len(group)


def test_each_monitor_finds_the_pods_of_its_own_example() -> None:
    """Base and group may run in one namespace."""
    for pod in pods():
        other = "base" if pod.example == "leaderworkerset" else "leaderworkerset"
        assert scraped(pod.example, pod, "pod-0")
        assert not scraped(other, pod, "pod-0")


def test_metrics_are_asked_as_often_as_the_alerts_expect() -> None:
    """The alerts' windows were chosen for this pace."""
    config: Manifest = yaml.safe_load(
        (ROOT / "config" / "prometheus" / "prometheus.yml").read_text()
    )
    for example in EXAMPLES:
        (monitor,) = of_kind(example, "PodMonitor")
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            assert endpoint["interval"] == config["global"]["scrape_interval"]
            assert endpoint["scrapeTimeout"] == config["global"]["scrape_timeout"]
            assert endpoint["path"] == "/metrics"


# --- what stands in the repository ---


def test_git_never_sees_a_key(tmp_path: Path) -> None:
    """With the files made as the page says, git finds nothing to add but ours."""
    folder = copy_with_secrets(tmp_path)
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True, timeout=30)
    listed = subprocess.run(
        ["git", "ls-files", "--others", "--exclude-standard", "secrets"],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert set(listed.stdout.split()) == {"secrets/.gitignore", "secrets/kustomization.yaml"}
    assert all((folder / "secrets" / name).exists() for name in SECRET_FILES)


def test_no_image_names_a_registry() -> None:
    """There is no published image; a name that looks like one would be somebody else's."""
    for pod in pods():
        assert re.fullmatch(r"tensorserve:[a-z]+", pod.container["image"])


def overlays_of_the_page() -> list[str]:
    """The commands that the page gives to write an overlay."""
    found = re.findall(
        r"^( *)(mkdir -p \S+\n *cat > \S+ <<'END'\n.*?\n)\1END$", PAGE.read_text(), re.M | re.S
    )
    return [textwrap.dedent(space + text + "END\n") for space, text in found]


@pytest.mark.parametrize("commands", overlays_of_the_page())
def test_an_overlay_of_the_page_can_be_rendered(tmp_path: Path, commands: str) -> None:
    """Copied and pasted, in a checkout."""
    (tmp_path / "deploy").mkdir()
    copy = copy_with_secrets(tmp_path / "deploy")
    there = set((copy / "overlays").iterdir())
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True)
    (folder,) = set((copy / "overlays").iterdir()) - there
    text = (folder / "kustomization.yaml").read_text()
    manifests = {m["kind"]: m for m in render(folder)}
    for kind, manifest in manifests.items():
        if kind not in CUSTOM:
            kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["PodMonitor"]["spec"]["selector"]["matchLabels"] == labels
    if "nameSuffix" in yaml.safe_load(text):
        assert labels["app.kubernetes.io/instance"] == manifests["Deployment"]["metadata"]["name"]
        assert manifests["Deployment"]["metadata"]["name"] != "tensorserve"
    else:
        (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "my-registry/tensorserve:0.1.0"
        assert len(container["env"]) == len(next(pods()).container["env"])


def test_the_page_names_files_that_are_there() -> None:
    """Or that it tells how to make."""
    text = PAGE.read_text()
    made = {*SECRET_FILES, "my-model", "second"}
    for name in set(re.findall(r"\b((?:deploy|docs|config)/[\w./-]+\w)", text)):
        assert (ROOT / name).exists() or made & {Path(name).name, Path(name).parent.name}, name
    assert len(overlays_of_the_page()) == 2
    for example in EXAMPLES:
        assert f"deploy/kubernetes/{example}" in text
    for name in SECRET_FILES:
        assert name in text
    assert (KUBERNETES / "secrets" / ".gitignore").exists()
