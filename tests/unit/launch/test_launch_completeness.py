"""`check` says that all is there only where vLLM would find it: tokenizer, code, settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tensorserve.bundle.remote_code import OWN_CONFIGURATIONS, knows_architecture, knows_model_type
from tensorserve.config.launch_plan import LaunchPlan, make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.launch.completeness import check_complete, check_files, what_a_start_misses
from tensorserve.launch.gpus import Gpu, Gpus
from tensorserve.launch.preflight import Checked, Weights

# A port that nobody listens on.
NOWHERE = "http://127.0.0.1:1/"
TRUST = {"TENSORSERVE_VLLM_TRUST_REMOTE_CODE": "true"}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
OWN = {"model_type": "own_llama", "architectures": ["LlamaForCausalLM"]}


def plan_for(directory: Path, **flags: str) -> LaunchPlan:
    return make_plan(Settings.from_environment({"TENSORSERVE_MODEL_URI": str(directory), **flags}))


def check(files: dict[str, object], directory: Path = Path("/bundle"), **flags: str) -> str:
    """What is found among `files`: {name: text, or what is written as JSON}."""
    content = {
        name: (value if isinstance(value, str) else json.dumps(value)).encode()
        for name, value in files.items()
    }
    return ", ".join(check_complete(content, content.__getitem__, plan_for(directory, **flags)))


# Tokenizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["tokenizer.json"],
        ["tokenizer.model"],
        ["tokenizer.model.v3"],
        ["spiece.model"],
        ["sentencepiece.bpe.model"],
        ["tiktoken.model"],
        ["qwen.tiktoken"],
        ["tekken.json"],
        ["vocab.txt"],
        ["vocab.json", "merges.txt"],
    ],
    ids=lambda names: " ".join(names),
)
def test_what_makes_a_tokenizer_is_found(names: list[str]) -> None:
    """Any of the forms that transformers and mistral-common read."""
    assert names[0] in check({"config.json": LLAMA, **dict.fromkeys(names, "")})


@pytest.mark.parametrize(
    "names",
    [[], ["tokenizer_config.json"], ["vocab.json"], ["merges.txt"], ["sub/tokenizer.json"]],
    ids=lambda names: " ".join(names) or "none",
)
def test_a_bundle_without_a_tokenizer_is_refused(names: list[str]) -> None:
    """A part of one is none: transformers would make a tokenizer that knows no words."""
    with pytest.raises(CorruptError, match="no tokenizer") as caught:
        check({"config.json": LLAMA, **{name: {} for name in names}})
    assert "TENSORSERVE_VLLM_SKIP_TOKENIZER_INIT" in str(caught.value)


def test_a_start_without_tokenizer_needs_none() -> None:
    """Where tokens come and go."""
    flag = {"TENSORSERVE_VLLM_SKIP_TOKENIZER_INIT": "true"}
    assert "as asked for" in check({"config.json": LLAMA}, **flag)


# Configuration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "params.json"])
@pytest.mark.parametrize("content", ["", "[]", "<html>", '\ufeff{"a": 1}'])
def test_a_configuration_that_is_none_is_refused(name: str, content: str) -> None:
    """By name, and by the check that stands before vLLM."""
    with pytest.raises(CorruptError, match=name):
        check({name: content, "tokenizer.json": {}})


def test_mistrals_configuration_is_one() -> None:
    """Its own layout has no config.json."""
    assert "params.json, tekken.json" in check({"params.json": {}, "tekken.json": {}})
    with pytest.raises(CorruptError, match=r"no config\.json"):
        check({"tokenizer.json": {}})


# Code ---------------------------------------------------------------------------------------------


def own(kind: str, name: str = "own.Class", file: str = "config.json") -> dict[str, object]:
    """A model whose `file` names code."""
    files: dict[str, object] = {"config.json": dict(OWN), "tokenizer.json": {}}
    files[file] = {**OWN, "auto_map": {kind: name}}
    return files


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("AutoConfig", "config.json"),
        ("AutoTokenizer", "tokenizer_config.json"),
        ("AutoProcessor", "processor_config.json"),
        ("AutoImageProcessor", "preprocessor_config.json"),
        ("AutoVideoProcessor", "video_preprocessor_config.json"),
    ],
)
def test_code_that_is_named_and_not_there_is_refused(kind: str, file: str) -> None:
    """With the flag that would run it; both the file that names it and the module are said."""
    files = own(kind, file=file)
    with pytest.raises(ConfigurationError, match=rf"{file} names own\.py") as caught:
        check(files, **TRUST)
    assert "pack --trust-remote-code" in str(caught.value)
    assert "code (own.py)" in check({**files, "own.py": ""}, **TRUST)


def test_what_the_code_imports_has_to_be_there() -> None:
    """As transformers looks for it: from any depth."""
    files = own("AutoConfig") | {"own.py": "from .a import b\n", "a.py": "import .c\n"}
    with pytest.raises(ConfigurationError, match=r"a\.py names c\.py"):
        check(files, **TRUST)
    assert "code" in check({**files, "c.py": "import torch\nfrom os import path"}, **TRUST)


def test_a_tokenizer_of_the_models_own_code_needs_no_known_file() -> None:
    """The code alone knows what it reads; of two classes transformers takes the fast one."""
    named = {"auto_map": {"AutoTokenizer": ["slow.Slow", "fast.Fast"]}}
    files = {"config.json": LLAMA, "tokenizer_config.json": named, "fast.py": "", "words.db": ""}
    assert "own code" in check(files, **TRUST)
    named["auto_map"]["AutoTokenizer"] = ["slow.Slow", None]  # type: ignore[list-item]
    with pytest.raises(ConfigurationError, match=r"slow\.py"):
        check(files, **TRUST)


def test_code_that_vllm_does_not_ask_for_may_be_missing() -> None:
    """The class of a model that it knows; the configuration where it has its own."""
    assert check(own("AutoModelForCausalLM") | {"own.py": ""}, **TRUST)
    files = own("AutoModelForCausalLM")
    assert check(files, **TRUST)
    files["config.json"]["architectures"] = ["NoSuchModel"]  # type: ignore[index]
    with pytest.raises(ConfigurationError, match=r"own\.py"):
        check(files, **TRUST)
    files = own("AutoConfig")
    files["config.json"]["model_type"] = "kimi_vl"  # type: ignore[index]
    assert check(files, **TRUST)


def test_another_models_code_is_not_fetched(tmp_path: Path) -> None:
    """Said, unless the hub's cache has it; what it is called in the cache stands in the test."""
    files = own("AutoConfig", "maker/code--own.Class")
    home = {"HF_HOME": str(tmp_path), **TRUST}
    with pytest.raises(ConfigurationError, match="another model, maker/code"):
        check(files, **home)
    cached = tmp_path / "hub" / "models--maker--code" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    (cached / "own.py").write_text("")
    assert check(files, **home)


def test_a_model_that_needs_its_code_is_refused_without_the_flag() -> None:
    """vLLM would end after a minute of imports; a model type that it knows needs none."""
    with pytest.raises(ConfigurationError, match="'own_llama'") as caught:
        check(own("AutoConfig"))
    assert "TENSORSERVE_VLLM_TRUST_REMOTE_CODE" in str(caught.value)
    assert check({**own("AutoConfig"), "config.json": {**LLAMA, "auto_map": {"AutoConfig": "o.C"}}})


def test_what_vllm_knows_is_read_from_what_is_installed() -> None:
    """By names that are there and one that is not."""
    assert knows_architecture("LlamaForCausalLM")
    assert not knows_architecture("NoSuchModel")
    assert knows_model_type("llama")
    assert knows_model_type("chatglm")
    assert not knows_model_type("own_llama")


def test_the_list_of_vllms_configurations_is_the_installed_ones() -> None:
    """Read as text, as the other two are."""
    import re
    from importlib.util import find_spec

    spec = find_spec("vllm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    text = Path(spec.submodule_search_locations[0], "transformers_utils", "config.py").read_text()
    table = text[text.index("_CONFIG_REGISTRY: ") :].partition("\n)\n")[0]
    names = re.findall(r'^\s+(?:\*\*\{"([\w-]+)": |(\w+)=)"\w+"', table, re.MULTILINE)
    assert {quoted or bare for quoted, bare in names} == OWN_CONFIGURATIONS


# Settings of modules ------------------------------------------------------------------------------

MODULES = [
    {"type": "sentence_transformers.models.Transformer", "path": ""},
    {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"},
]


def test_settings_that_a_module_names_have_to_be_there() -> None:
    """Without them vLLM pools in the architecture's own way: other vectors, and no error."""
    files = {"config.json": LLAMA, "tokenizer.json": {}, "modules.json": MODULES}
    with pytest.raises(CorruptError, match=r"1_Pooling/config\.json"):
        check(files)
    assert check({**files, "1_Pooling/config.json": {}})
    assert check(files, TENSORSERVE_VLLM_POOLER_CONFIG='{"pooling_type": "MEAN"}')


# Where the files are ------------------------------------------------------------------------------


def bundle(directory: Path, **files: str) -> Path:
    directory.mkdir()
    for name, text in {"config.json": json.dumps(LLAMA), "tokenizer.json": "{}", **files}.items():
        (directory / name).write_text(text)
    return directory


def checked(directory: Path) -> str:
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": str(directory)})
    (passed,) = check_files(settings, make_plan(settings), Checked(settings))
    return passed.found


def test_check_asks_the_source_for_every_file(tmp_path: Path) -> None:
    """What the start would fetch, and with one word what makes it whole."""
    assert checked(bundle(tmp_path / "b")) == "2 files, with config.json, tokenizer.json"
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(CorruptError, match="no tokenizer"):
        checked(tmp_path / "b")


def test_check_misses_a_file_of_the_manifest(tmp_path: Path) -> None:
    """Deleted from the bucket, or of another size: the start would find it out, `check` does."""
    from tensorserve.bundle.manifest import FileEntry, Manifest

    directory = bundle(tmp_path / "b")
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": str(directory)})
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    files = tuple(FileEntry(name, size, "0" * 64) for name, size in sizes.items())
    found = Checked(settings, Weights(manifest=Manifest(files, {}, None)))
    assert list(check_files(settings, make_plan(settings), found))
    (directory / "tokenizer.json").write_text("{ }")
    with pytest.raises(CorruptError, match="is 3 bytes"):
        list(check_files(settings, make_plan(settings), found))
    (directory / "tokenizer.json").unlink()
    with pytest.raises(TensorserveError, match="does not exist"):
        list(check_files(settings, make_plan(settings), found))


def test_check_says_which_kernels_a_start_would_take(tmp_path: Path) -> None:
    """On a GPU whose kernels vLLM downloads, without the server; as the start decides."""
    mixture = json.dumps({"model_type": "qwen3_moe", "num_experts": 8})
    directory = bundle(tmp_path / "b", **{"config.json": mixture})
    b200 = Gpus((Gpu("GPU 0 (NVIDIA B200)", major=10),), 1)
    settings = Settings.from_environment(
        {"TENSORSERVE_MODEL_URI": str(directory), "FLASHINFER_CUBINS_REPOSITORY": NOWHERE}
    )
    *_, passed = check_files(settings, make_plan(settings), Checked(settings, gpus=b200))
    assert passed.name == "kernels"
    assert "--moe-backend=triton" in passed.found


def test_pack_says_what_a_start_will_miss() -> None:
    """Sentences; with the code that was asked for and is not there, an error."""
    content = {
        "config.json": json.dumps({**OWN, "auto_map": {"AutoConfig": "a/b--own.C"}}).encode(),
        "tokenizer_config.json": json.dumps({"auto_map": {"AutoProcessor": "two.P"}}).encode(),
        "modules.json": json.dumps(MODULES).encode(),
    }
    said = "\n".join(what_a_start_misses(content, content.__getitem__, code=False))
    assert "there is no tokenizer" in said
    assert "1_Pooling/config.json, which is not there" in said
    assert "code of its own (two.py), which is left out" in said
    assert "own.py of another model, a/b" in said
    with pytest.raises(ConfigurationError, match=r"names two\.py"):
        what_a_start_misses(content, content.__getitem__, code=True)
