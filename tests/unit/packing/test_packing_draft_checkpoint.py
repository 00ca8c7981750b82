"""A draft model on its way into a bundle, and what a start finds of it there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_samples import ACCESS, make_model
from tensorserve.bundle.draft import draft_in
from tensorserve.bundle.engine_fingerprint import VLLM, Fingerprint
from tensorserve.bundle.keys import parse_key
from tensorserve.bundle.layout import RANK_MARKER
from tensorserve.bundle.manifest import read_manifest
from tensorserve.bundle.verify import verify
from tensorserve.cli import main
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError
from tensorserve.format import TensorSpec, read_index, read_tensor
from tensorserve.launch.preflight import Weights, check_packed_draft, check_weights
from tensorserve.packing import pack as pack_module
from tensorserve.packing.draft_checkpoint import read_draft
from tensorserve.packing.pack import pack
from tensorserve.packing.sign import sign
from tensorserve.packing.tensor_source import Read, TensorsSource
from tensorserve.secret import Secret
from tensorserve.sources.local import LocalSource

KEY = Secret(bytes(range(32)), "the test")
MODEL_KEY = parse_key(KEY)
FILE = Path("draft/eagle3-tiny/model.tensors")


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    """A Hugging Face directory whose name says how it drafts."""
    content = {"fc.weight": torch.randn(16, 32), "norm.weight": torch.ones(16)}
    return make_model(tmp_path / "eagle3-tiny", content)


@pytest.fixture
def bundle(tmp_path: Path, draft: Path) -> Path:
    """A model, encrypted, with its draft."""
    made = tmp_path / "bundle"
    pack(make_model(tmp_path / "hf"), str(made), access=ACCESS, key=KEY, draft=read_draft(draft))
    return made


def found_in(bundle: Path) -> Weights:
    """What a start that asks for the draft finds out before vLLM is started."""
    environ = {"TENSORSERVE_MODEL_URI": str(bundle), "TENSORSERVE_KEY": KEY.reveal().hex()}
    settings = Settings.from_environment(environ)
    plan = make_plan(settings)
    weights = check_weights(settings, plan)
    return check_packed_draft(settings, plan, Path("/served"), weights)


def test_a_draft_comes_out_of_the_bundle_as_it_went_in(bundle: Path, draft: Path) -> None:
    """Bit for bit, sealed with the model's key, with its configuration and tokenizer."""
    manifest = read_manifest(str(bundle), ACCESS, MODEL_KEY)
    assert manifest is not None
    assert draft_in(manifest) == "eagle3-tiny"
    assert (bundle / FILE).with_name("tokenizer.json").is_file()
    source = LocalSource(bundle / FILE)
    index = read_index(source)
    wanted = load_file(draft / "model.safetensors")
    assert {record.name for record in index.tensors} == wanted.keys()
    digests = manifest.tensors_files[str(FILE)].digests
    assert index.encrypted
    assert digests
    for record, digest in zip(index.tensors, digests, strict=True):
        read = read_tensor(source, record, index, MODEL_KEY, verify=True, expected=digest)
        assert bytes(read) == wanted[record.name].numpy().tobytes()
    source.close()


def test_a_draft_is_verified_and_signed_with_its_model(bundle: Path) -> None:
    """Also where the manifest is lost; damage of it is damage of the bundle."""
    (bundle / "manifest.json").rename(bundle.parent / "manifest.json")
    sign(str(bundle), ACCESS, MODEL_KEY, wish="tags")
    signed = read_manifest(str(bundle), ACCESS, MODEL_KEY)
    assert draft_in(signed) == "eagle3-tiny"
    assert found_in(bundle).draft is not None
    source = LocalSource(bundle / FILE)
    at = read_index(source).tensors[0].data_offset
    source.close()
    data = bytearray((bundle / FILE).read_bytes())
    data[at] ^= 1
    (bundle / FILE).write_bytes(data)
    with pytest.raises(CorruptError, match="draft/eagle3-tiny/model"):
        verify(str(bundle), ACCESS, MODEL_KEY)


@pytest.mark.parametrize(
    ("directory", "name"),
    [("eagle3-tiny", "eagle3-tiny"), ("my draft (v2)", "my-draft-v2-"), ("__", "model")],
)
def test_a_drafts_name_is_kept_as_far_as_a_path_can_have_it(
    tmp_path: Path, directory: str, name: str
) -> None:
    """vLLM reads in it how the draft works."""
    made = make_model(tmp_path / "made")
    assert read_draft(made.rename(tmp_path / directory))[0] == name


def test_a_start_that_asks_for_it_finds_the_draft(bundle: Path) -> None:
    """Its bytes count, and its largest tensor; the manifest authenticates it."""
    weights = found_in(bundle)
    assert weights.draft is not None
    assert weights.draft.directory == "/served/draft/eagle3-tiny"
    assert weights.draft.shard.uri == str(bundle / FILE)
    assert weights.draft.shard.headers_sha256
    assert weights.draft_bytes == (16 * 32 + 16) * 4
    assert weights.verification == "manifest"
    assert weights.largest_bytes == 700 * 1024 * 4


def test_a_bundle_without_a_draft_says_how_to_pack_one(tmp_path: Path) -> None:
    pack(make_model(tmp_path / "hf"), str(tmp_path / "b"), access=ACCESS, key=KEY)
    with pytest.raises(ConfigurationError, match="none was packed") as raised:
        found_in(tmp_path / "b")
    assert "tensorserve pack SRC DEST --draft DIR" in str(raised.value.hint)


def test_a_manifest_has_one_draft_at_most(bundle: Path) -> None:
    """Nothing would say which one is meant."""
    manifest = read_manifest(str(bundle), ACCESS, MODEL_KEY)
    assert manifest is not None
    entry = manifest.tensors_files[str(FILE)]
    for other in ("draft/other/model.tensors", "draft/a/b/model.tensors"):
        two = replace(manifest, tensors_files={**manifest.tensors_files, other: entry})
        with pytest.raises(CorruptError, match="a bundle has at most one"):
            draft_in(two)


def test_a_draft_without_configuration_is_refused(bundle: Path) -> None:
    """vLLM would read none, and ask the hub."""
    manifest = read_manifest(str(bundle), ACCESS, MODEL_KEY)
    assert manifest is not None
    left = tuple(e for e in manifest.files if e.name != "draft/eagle3-tiny/config.json")
    document = replace(manifest, files=left).to_json(MODEL_KEY)
    (bundle / "manifest.json").write_bytes(document)
    with pytest.raises(CorruptError, match=r"has no config\.json"):
        found_in(bundle)


def test_pickled_weights_of_a_draft_are_refused_with_the_way_out(draft: Path) -> None:
    """As EAGLE's heads are published."""
    (draft / "model.safetensors").rename(draft / "pytorch_model.bin")
    with pytest.raises(ConfigurationError, match="pickles only") as raised:
        read_draft(draft)
    assert "save_file" in str(raised.value.hint)


def test_a_draft_that_needs_a_pickle_is_refused(draft: Path) -> None:
    """DFlash's mask: without it vLLM would draft otherwise."""
    (draft / "mask_embedding.pt").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="which a bundle never includes"):
        read_draft(draft)


def test_what_is_no_directory_is_no_draft(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="is not a directory"):
        read_draft(tmp_path / "none")


def test_what_only_drafts_is_not_packed_as_a_model(tmp_path: Path) -> None:
    """vLLM would serve the model that it drafts for, from the hub."""
    model = make_model(tmp_path / "hf")
    verifier = {"name_or_path": "org/model"}
    config = {"speculators_config": {"verifier": verifier}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="only a draft model, for org/model") as raised:
        pack(model, str(tmp_path / "b"), access=ACCESS)
    assert "--draft" in str(raised.value.hint)


def test_two_drafts_are_wrong_usage(
    tmp_path: Path, draft: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first would be left out in silence."""
    words = ["pack", str(draft), str(tmp_path / "b"), "--draft", str(draft), "--draft", str(draft)]
    assert main(words) == 64
    assert "--draft is given twice" in capsys.readouterr().err


def test_beside_ranks_of_vllms_layout_a_draft_stays_a_checkpoint(
    tmp_path: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file for all ranks, and no engine that it is made for."""
    fingerprint = Fingerprint("0.32.0", "cpu", "Llama", "float32", "none", 1, 1, False)
    specs = (TensorSpec("w", "uint8", (64,)), TensorSpec(RANK_MARKER, "uint8", (1,)))

    @contextmanager
    def reading() -> Iterator[Read]:
        yield lambda *_: None

    @contextmanager
    def engine(*_: object) -> Iterator[tuple[Fingerprint, list[TensorsSource]]]:
        yield fingerprint, [TensorsSource(specs, reading)]

    monkeypatch.setattr(pack_module, "engine_parameters", engine)
    made = tmp_path / "ranks"
    model = make_model(tmp_path / "hf")
    pack(model, str(made), access=ACCESS, key=KEY, draft=read_draft(draft), layout=VLLM)
    weights = found_in(made)
    assert weights.shards[0].fingerprint is not None
    assert weights.draft is not None
    assert weights.draft.shard.fingerprint is None
