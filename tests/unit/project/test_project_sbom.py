"""The lists of what is in the images (docs/sbom) name what the locks install."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_every_locked_package_is_listed_in_its_version(image: str) -> None:
    """A lock that changed wants `make sbom` on images built anew."""
    lock = (ROOT / f"docker/requirements-{image}.lock").read_text()
    locked = set(re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", lock, re.MULTILINE))
    assert len(locked) > 100
    sbom = json.loads((ROOT / f"docs/sbom/{image}.cdx.json").read_text())
    listed = {(_normal(part["name"]), part.get("version")) for part in sbom["components"]}
    missing = {
        (name, version) for name, version in locked if (_normal(name), version) not in listed
    }
    assert missing == set()


@pytest.mark.parametrize("image", ["cpu", "cuda"])
def test_debians_packages_are_listed(image: str) -> None:
    """The cipher's library among them."""
    sbom = json.loads((ROOT / f"docs/sbom/{image}.cdx.json").read_text())
    debian = {
        part["name"] for part in sbom["components"] if part.get("purl", "").startswith("pkg:deb/")
    }
    assert {"libsodium23", "python3.11", "g++"} <= debian


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
