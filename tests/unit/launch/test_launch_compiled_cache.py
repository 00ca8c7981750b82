"""Compiled code from the bundle on its way into the engine's caches."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sealed_caches import sealed_files
from tensorserve.bundle.compiled import name_of
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.manifest import Manifest, read_manifest
from tensorserve.config.compile_caches import CACHES, MOVED
from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError, PermissionDeniedError
from tensorserve.launch import compiled_cache
from tensorserve.launch.compiled_cache import bring_compiled, compiled_root
from tensorserve.packing.pack import pack
from tensorserve.secret import Secret
from tensorserve.sources import Access, ForbiddenError
from tensorserve.telemetry.schema import CompiledCacheKnown

KEY = GivenKey(bytes(range(32)), "the test")
KEY_TEXT = KEY.reveal().hex()
CODE = {"vllm/torch_compile_cache/key/x.py": b"code", "triton/k/y.so": b"machine code"}


@dataclass
class Machine:
    """An empty machine, and a bundle that it serves."""

    directory: Path
    bundle: Path
    environ: dict[str, str]
    events: list[CompiledCacheKnown] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def bring(self, **environ: str) -> LaunchPlan:
        """The plan of an engine that starts here."""
        settings = Settings.from_environment(self.environ | environ)
        manifest = read_manifest(str(self.bundle), Access(), self.key(settings))
        plan = make_plan(settings)
        return bring_compiled(
            settings, plan, manifest, None, self.events.append, self.warnings.append
        )

    @staticmethod
    def key(settings: Settings) -> GivenKey | None:
        return None if settings.key is None else GivenKey(settings.key.reveal(), "the test")

    @property
    def root(self) -> Path:
        return self.directory / "cache/tensorserve-compiled"

    def fingerprint(self, **environ: str) -> str:
        self.bring(**environ)
        assert self.events[-1].result == "absent"
        return self.events[-1].fingerprint

    def sealed(self) -> Path:
        """What the job would put into the bundle; the place where it is unpacked."""
        fingerprint = self.fingerprint()
        target = self.bundle / name_of(fingerprint)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(
            sealed_files(CODE, self.directory / "made", fingerprint=fingerprint, key=KEY)
        )
        return self.root / fingerprint[:32]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    model = tmp_path / "hf"
    model.mkdir()
    save_file({"norm.weight": torch.ones(16)}, model / "model.safetensors")
    (model / "config.json").write_text("{}")
    bundle = tmp_path / "bundle"
    pack(model, str(bundle), access=Access(), key=Secret(KEY.reveal(), "the test"))
    environ = {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_STATE_DIR": str(tmp_path / "state"),
        "TENSORSERVE_KEY": KEY_TEXT,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    return Machine(tmp_path, bundle, environ)


def files_below(place: Path) -> dict[str, bytes]:
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def test_it_is_brought_and_the_engine_is_shown_it(machine: Machine) -> None:
    """All cache variables point at it, with what the job wrote and when it wrote it."""
    place = machine.sealed()
    moment = (machine.directory / "made/triton/k/y.so").stat().st_mtime_ns
    environment = dict(machine.bring().environment)
    assert files_below(place) == CODE
    assert (place / "triton/k/y.so").stat().st_mtime_ns == moment
    assert place.stat().st_mode & 0o777 == 0o700
    moved = {c.variable: str(place / c.subfolder) for c in CACHES if c.variable in MOVED}
    assert moved.items() <= environment.items()
    assert environment["NUMBA_CACHE_DIR"] == str(machine.directory / "cache/numba")
    folder = str(place / "vllm")
    assert machine.events[-1] == CompiledCacheKnown("brought", place_name(machine), folder, 1)
    assert [path.name for path in machine.root.iterdir()] == [place.name]


def place_name(machine: Machine) -> str:
    (path,) = (machine.bundle / "compiled").iterdir()
    return path.name.removesuffix(".sealed")


def test_what_an_earlier_start_left_stays(machine: Machine) -> None:
    """A volume: with what the engine has added since."""
    place = machine.sealed()
    machine.bring()
    (place / "triton/k/y.so").write_bytes(b"newer")
    (place / "added").write_bytes(b"more")
    shutil.rmtree(machine.bundle / "compiled")
    machine.bring()
    assert machine.events[-1].result == "kept"
    assert files_below(place) == CODE | {"triton/k/y.so": b"newer", "added": b"more"}


def test_two_starts_at_once_leave_one_whole(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second finds that the first was faster, and changes nothing."""
    place = machine.sealed()
    unpack = compiled_cache.unpack_files

    def overtaken(*arguments: object) -> None:
        unpack(*arguments)  # type: ignore[arg-type]
        place.mkdir()
        (place / "of the first").write_bytes(b"x")

    monkeypatch.setattr(compiled_cache, "unpack_files", overtaken)
    machine.bring()
    assert machine.events[-1].result == "kept"
    assert files_below(place) == {"of the first": b"x"}
    assert [path.name for path in machine.root.iterdir()] == [place.name]


def test_absent_leaves_the_plan_as_it_was(machine: Machine) -> None:
    """The engine compiles into the caches that it has today."""
    plan = machine.bring()
    assert plan == make_plan(Settings.from_environment(machine.environ))
    assert [event.result for event in machine.events] == ["absent"]
    with pytest.raises(ConfigurationError, match=r"required.*is missing") as caught:
        machine.bring(TENSORSERVE_COMPILED="required")
    assert caught.value.exit_code == 78
    assert "tensorserve precompile" in str(caught.value)


def test_off_asks_for_nothing(machine: Machine) -> None:
    machine.sealed()
    before = len(machine.events)
    machine.bring(TENSORSERVE_COMPILED="off")
    assert len(machine.events) == before
    assert not machine.root.exists()


def test_damage_ends_the_start_and_leaves_nothing(machine: Machine) -> None:
    """In `auto` too: a changed file is no missing one."""
    machine.sealed()
    path = machine.bundle / name_of(place_name(machine))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CorruptError) as caught:
        machine.bring()
    assert caught.value.exit_code == 65
    assert list(machine.root.iterdir()) == []


def test_a_server_that_hides_what_is_missing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """403 counts as absent, but not for who demands it."""

    def hidden(*_: object) -> None:
        raise ForbiddenError("403")

    monkeypatch.setattr(compiled_cache.sources, "open_source", hidden)
    settings = Settings.from_environment(machine.environ)
    plan = make_plan(settings)
    manifest = read(machine)
    found = bring_compiled(settings, plan, manifest, None, machine.events.append, print)
    assert (found, machine.events[-1].result) == (plan, "absent")
    required = Settings.from_environment(machine.environ | {"TENSORSERVE_COMPILED": "required"})
    with pytest.raises(PermissionDeniedError):
        bring_compiled(required, plan, manifest, None, machine.events.append, print)


def read(machine: Machine) -> Manifest:
    manifest = read_manifest_of(machine)
    assert manifest is not None
    return manifest


def read_manifest_of(machine: Machine) -> Manifest | None:
    from tensorserve.bundle.manifest import parse_manifest

    return parse_manifest((machine.bundle / "manifest.json").read_bytes(), "the manifest", KEY)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda root, _: root.parent.write_text("a file"),
        lambda root, place: (root.mkdir(parents=True), place.symlink_to("/tmp")),
        lambda root, place: (root.mkdir(parents=True), place.write_text("a file")),
        lambda root, _: (root.parent.mkdir(), root.symlink_to(root.parent.parent)),
    ],
    ids=["the root is a file", "a link", "a file", "the root is a link"],
)
def test_without_a_place_the_engine_compiles(
    machine: Machine, spoil: Callable[[Path, Path], object]
) -> None:
    """A start that went well yesterday does not end for a full or strange cache."""
    place = machine.sealed()
    spoil(machine.root, place)
    plan = machine.bring()
    assert dict(plan.environment)["VLLM_CACHE_ROOT"] == str(machine.directory / "cache/vllm")
    assert machine.events[-1].result == "no_place"
    assert "not used" in machine.warnings[-1]
    with pytest.raises(ConfigurationError):
        machine.bring(TENSORSERVE_COMPILED="required")


def test_a_full_disk_is_no_place(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.sealed()
    usage = shutil.disk_usage(machine.directory)._replace(free=1)
    monkeypatch.setattr(compiled_cache.shutil, "disk_usage", lambda _: usage)
    machine.bring()
    assert machine.events[-1].result == "no_place"
    assert "bytes free" in machine.warnings[-1]
    assert list(machine.root.iterdir()) == []


def test_another_users_directory_is_no_place(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a volume of several users, one could plant code for another."""
    machine.sealed()
    machine.bring()
    user = os.getuid()
    monkeypatch.setattr(compiled_cache.os, "getuid", lambda: user + 1)
    machine.bring()
    assert machine.events[-1].result == "no_place"


def test_the_job_gets_an_empty_place(machine: Machine) -> None:
    """The one where a server will unpack; never one that is in use."""
    fingerprint = machine.fingerprint()
    plan = machine.bring(TENSORSERVE_COMPILED="compiling")
    place = machine.root / fingerprint[:32]
    assert machine.events[-1] == CompiledCacheKnown(
        "compiling", fingerprint, str(place / "vllm"), 0
    )
    assert dict(plan.environment)["TRITON_CACHE_DIR"] == str(place / "triton")
    assert list(place.iterdir()) == []
    with pytest.raises(ConfigurationError, match="is there"):
        machine.bring(TENSORSERVE_COMPILED="compiling")


def test_where_caches_are() -> None:
    """One place for all starts; none without an absolute path."""
    assert compiled_root({"XDG_CACHE_HOME": "/c", "HOME": "/h"}) == Path("/c/tensorserve-compiled")
    assert compiled_root({"HOME": "/h"}) == Path("/h/.cache/tensorserve-compiled")
    assert compiled_root({"HOME": "h"}) is None
    assert compiled_root({}) is None


def test_required_without_a_place_or_manifest(machine: Machine) -> None:
    """Each says what is missing."""
    wish = {"TENSORSERVE_COMPILED": "required"}
    environ = {n: v for n, v in machine.environ.items() if n != "XDG_CACHE_HOME"} | wish
    settings = Settings.from_environment(environ)
    manifest = read(machine)
    plan = make_plan(settings)
    with pytest.raises(ConfigurationError, match="no place"):
        bring_compiled(settings, plan, manifest, None, machine.events.append, print)
    for one in (None, read_without_key(machine)):
        with pytest.raises(ConfigurationError, match="no authenticated"):
            bring_compiled(settings, plan, one, None, machine.events.append, print)


def read_without_key(machine: Machine) -> Manifest:
    from tensorserve.bundle.manifest import parse_manifest

    return parse_manifest((machine.bundle / "manifest.json").read_bytes(), "the manifest")
