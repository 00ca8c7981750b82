"""What `tensorserve check` says of the store of adapters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model_signers import make_pair
from rangeserver import RangeServer
from tensorserve.cli import main as tensorserve
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight import check_adapters

KEY = "44" * 32


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two adapters of KEY, a plain one, and what is none."""
    adapter, key_file = tmp_path / "adapter", tmp_path / "key"
    adapter.mkdir()
    key_file.write_text(KEY)
    tensors = {"base_model.model.a.lora_A.weight": torch.ones(4, 8)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["a"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    store = tmp_path / "store"
    for name, options in (("sql", True), ("tone", True), ("plain", False)):
        words = ["pack-adapter", str(adapter), str(store / name)]
        words += ["--encrypt", "--key-file", str(key_file)] if options else []
        assert tensorserve(words) == 0
    (store / "notes.txt").write_text("x")
    (store / ".hidden").mkdir()
    (store / ".hidden" / "manifest.json").write_text("{}")
    return store


def settings(uri: str, **environ: str) -> Settings:
    given = {"TENSORSERVE_MODEL_URI": "/m", "TENSORSERVE_ADAPTERS_URI": uri}
    return Settings.from_environment(given | {"TENSORSERVE_KEY": KEY} | environ)


def test_those_that_would_be_refused_are_named(store: Path) -> None:
    """Before a client asks for them."""
    found = check_adapters(settings(str(store)))
    assert found is not None
    assert found[0].found == f"2 of 3 at {store}: plain, sql, tone"
    assert len(found[1]) == 1
    assert "adapter plain would be refused" in found[1][0]


def test_one_without_a_signature_is_named(store: Path, tmp_path: Path) -> None:
    """Where the model has to be signed."""
    pair = make_pair(tmp_path)
    words = ["sign", str(store / "tone"), "--sign-key", str(pair.private)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSERVE_KEY", KEY)
        assert tensorserve(words) == 0
    found = check_adapters(settings(str(store), TENSORSERVE_SIGNATURE_KEY_FILE=str(pair.public)))
    assert found is not None
    assert found[0].found.startswith("1 of 3")
    assert [warning.split()[1] for warning in found[1]] == ["plain", "sql"]
    assert all("is not signed" in warning for warning in found[1])


def test_a_wrong_key_is_noticed(store: Path) -> None:
    """It opens none of them."""
    found = check_adapters(settings(str(store), TENSORSERVE_ADAPTERS_KEY="55" * 32))
    assert found is not None
    assert found[0].found.startswith("0 of 3")
    assert "55" * 32 not in str(found)


def test_a_server_that_cannot_list_is_asked_for_allowed_names(store: Path) -> None:
    """Without any, it is only said."""
    with RangeServer(store) as server:
        found = check_adapters(settings(server.url, TENSORSERVE_ADAPTERS_ALLOW="sql,team-*"))
        assert found is not None
        assert found[0].found == f"1 of 1 at {server.url}: sql"
        found = check_adapters(settings(server.url))
        assert found is not None
        assert "cannot list" in found[0].found


def test_a_store_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A misspelt path, say."""
    with pytest.raises(ConfigurationError, match="TENSORSERVE_ADAPTERS_URI="):
        check_adapters(settings(str(tmp_path / "no-such")))


def test_without_the_variable_there_is_nothing_to_say() -> None:
    """As before."""
    assert check_adapters(Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m"})) is None
