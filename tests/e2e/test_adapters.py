"""LoRA adapters that are found in a bucket while a real engine serves the model.

One engine answers all questions; the tests ask them in order. What stands between it and the S3
server can hold an answer back.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from running import STOCK_PROMPTS, Tensorserve, session_processes
from s3server import S3Server
from safetensors.torch import load_file, save_file

from fronts import Front, Seen
from lora_adapter import make_adapter
from model_signers import Pair, make_pair
from s3_clients import s3_client
from tensorserve.cli import main as tensorserve

PROMPTS = STOCK_PROMPTS[:2]
BUCKET = "adapters19"
FILES = ("model.sig", "manifest.json", "adapter_config.json", "adapter_model.tensors")
TTL = 3
# A starved machine: what is waited for takes part of a second.
SECONDS = 120.0


@dataclass
class Served:
    """The engine, and what it is asked with."""

    engine: Tensorserve
    front: Front
    s3: S3Server
    model: Path
    bundle: Path
    key_file: Path
    owner: Pair
    work: Path
    opened: threading.Event = field(default_factory=threading.Event)
    """Set: what the store says of the adapter `slow` is passed on."""

    def pack(self, name: str, adapter: Path, *options: str, signed: bool = True) -> None:
        """As a user would, with the key of the model, and the signature that is asked for."""
        if signed:
            options += ("--sign-key", str(self.owner.private))
        with pytest.MonkeyPatch.context() as patch:
            for variable, value in self.s3.environment.items():
                patch.setenv(variable, value)
            patch.setenv("TENSORSERVE_KEY_FILE", str(self.key_file))
            words = ["pack-adapter", str(adapter), f"s3://{BUCKET}/adapters/{name}", "--encrypt"]
            assert tensorserve([*words, "--model", str(self.bundle), *options]) == 0

    def ask(self, model: str, prompt: str = PROMPTS[0]) -> tuple[int, Any]:
        """(status, text or the error's message)."""
        body = {"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 0, "seed": 0}
        status, answer = self.engine.post("/v1/completions", body)
        if status == 200:
            return status, answer["choices"][0]["text"]
        return status, answer["error"]["message"]

    def sure_of(self, model: str) -> float:
        """The log-probabilities of the first tokens, summed over some prompts: of each its own.

        Not those of the prompt: with LoRA, vLLM's CPU build ends at them (0.32.0).
        """
        answers = []
        for prompt in STOCK_PROMPTS:
            body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
            status, answer = self.engine.post("/v1/completions", body | {"logprobs": 1})
            assert status == 200, answer
            answers += answer["choices"][0]["logprobs"]["token_logprobs"]
        return sum(answers)

    def asked_for(self, name: str) -> int:
        """Requests for the adapter's files that have reached the store."""
        return sum(f"/{name}/" in seen.target for seen in self.front.seen)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, s3: S3Server
) -> Iterator[Served]:
    """The model from a disk, its adapters from the bucket."""
    work = tmp_path_factory.mktemp("adapters")
    bundle, key_file = work / "bundle", work / "key"
    owner = make_pair(work)
    words = ["pack", str(model_dir), str(bundle), "--encrypt", "--key-file", str(key_file)]
    assert tensorserve([*words, "--sign-key", str(owner.private)]) == 0
    s3.make_bucket(BUCKET)
    opened = threading.Event()

    def hold_back(seen: Seen) -> None:
        if "/slow/" in seen.target:
            opened.wait(SECONDS)

    with Front(s3.port, refuse=hold_back) as front:
        environ = s3.environment | {
            "AWS_ENDPOINT_URL_S3": front.url,
            "TENSORSERVE_MODEL_URI": str(bundle),
            "TENSORSERVE_KEY_FILE": str(key_file),
            "TENSORSERVE_SIGNATURE_KEY_FILE": str(owner.public),
            "TENSORSERVE_ADAPTERS_URI": f"s3://{BUCKET}/adapters",
            "TENSORSERVE_ADAPTERS_ALLOW": "sql,tone.*,slow,b*n,other,renamed,*signed,strange,gone",
            "TENSORSERVE_ADAPTERS_TTL": str(TTL),
            # Two adapters take all slots: engine/cpu_lora.py.
            "TENSORSERVE_VLLM_MAX_LORAS": "2",
        }
        engine = Tensorserve(work, environ)
        found = Served(engine, front, s3, model_dir, bundle, key_file, owner, work, opened)
        for number, name in enumerate(("sql", "tone.v2", "slow")):
            found.pack(
                name, make_adapter(work / name, model_dir, rank=8 * (number + 1), seed=number)
            )
        with engine:
            engine.wait_ready()
            yield found
            opened.set()


def test_the_model_answers_as_stock_vllm_does(
    served: Served, stock_answers: dict[str, tuple[str, list[float]]]
) -> None:
    """With LoRA switched on, and before an adapter was asked for."""
    answers = served.engine.completions("model", PROMPTS)
    assert [text for text, _ in answers] == [stock_answers[prompt][0] for prompt in PROMPTS]
    assert "adds --enable-lora --max-lora-rank=32 --max-cpu-loras=16" in served.engine.text
    assert not served.front.seen


def test_two_adapters_answer_under_concurrent_requests(served: Served) -> None:
    """Each as itself. Not by text: on a CPU, stock vLLM's differs with the batch as well."""
    names = ["model", "sql", "tone.v2"]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(served.sure_of, names * 4))
    alone = {name: served.sure_of(name) for name in names}
    apart = min(abs(alone[one] - alone[other]) for one in names for other in names if one != other)
    assert apart > 0.3, f"an adapter changes nothing: {alone}"
    for name, found in zip(names * 4, together, strict=True):
        assert abs(found - alone[name]) < apart / 3, (name, found, alone)
    status, body = served.engine.get("/v1/models")
    assert status == 200
    listed = {model["id"]: model["parent"] for model in json.loads(body)["data"]}
    assert listed == {"model": None, "sql": "model", "tone.v2": "model"}
    for name in ("sql", "tone.v2"):
        assert served.asked_for(name) >= 4, "signature, manifest, configuration, weights"


def test_names_that_leave_the_prefix_never_reach_the_store(served: Served) -> None:
    """Nor names that are not allowed; vLLM's own answer for what does not exist."""
    before = len(served.front.seen)
    names = [
        "../sql",
        "/sql",
        "sql/../sql",
        "..%2fsql",
        "%2e%2e",
        "sql\0",
        ".",
        "a" * 5000,
        "other2",
    ]
    for name in names:
        status, message = served.ask(name)
        assert status == 404, (name, message)
        assert "does not exist" in message
    names_seen = [seen for seen in served.front.seen[before:] if "/sql/" not in seen.target
                  and "/tone.v2/" not in seen.target]  # fmt: skip
    assert names_seen == []


def test_what_cannot_be_served_is_refused_with_a_reason(served: Served) -> None:
    """Damaged, of another model, under another's name, signed by nobody."""
    served.pack("broken", served.work / "sql", "--overwrite")
    client = s3_client(served.s3)
    key = "adapters/broken/adapter_model.tensors"
    data = bytearray(client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[-100] ^= 1
    client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    status, message = served.ask("broken")
    assert (status, "damaged, or not authentic" in message) == (400, True), message

    other = served.work / "other-model"
    other.mkdir()
    config = json.loads((served.model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 128}))
    served.pack("other", make_adapter(served.work / "other", other))
    status, message = served.ask("other")
    assert (status, "does not fit the model" in message) == (400, True), message

    for file in FILES:
        source = {"Bucket": BUCKET, "Key": f"adapters/sql/{file}"}
        client.copy_object(Bucket=BUCKET, Key=f"adapters/renamed/{file}", CopySource=source)
    status, message = served.ask("renamed")
    assert (status, "damaged, or not authentic" in message) == (400, True), message
    served.engine.wait_for(lambda: "is the adapter sql" in served.engine.text, SECONDS)

    served.pack("unsigned", served.work / "sql", signed=False)
    status, message = served.ask("unsigned")
    assert (status, "not authentic" in message) == (400, True), message
    served.engine.wait_for(lambda: "is not signed" in served.engine.text, SECONDS)


def test_one_that_vllm_itself_refuses_does_no_harm(served: Served) -> None:
    """Its modules have names of another format, of which only vLLM can tell."""
    adapter = make_adapter(served.work / "strange", served.model)
    file = adapter / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "wq").replace("v_proj", "wv"): tensor
               for name, tensor in load_file(file).items()}, file)  # fmt: skip
    served.pack("strange", adapter)
    for _ in range(5):
        status, message = served.ask("strange")
        assert (status, "could not be loaded" in message) == (400, True), message
    assert served.ask("sql")[0] == 200


def test_others_are_answered_while_a_slow_adapter_loads(served: Served) -> None:
    """The store says nothing of it until the others have been answered."""
    before = served.ask("model")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(served.ask, "slow") for _ in "12"]
        served.engine.wait_for(lambda: served.asked_for("slow"), SECONDS)
        assert served.ask("model") == before
        assert served.ask("sql")[0] == 200
        served.opened.set()
        # On a starved machine the store was silent for longer than a client waits.
        assert {one.result(SECONDS)[0] for one in waiting} <= {200, 503}
    served.engine.wait_for(lambda: served.ask("slow")[0] == 200, SECONDS)
    assert served.ask("slow") != before


def test_a_changed_adapter_is_loaded_anew(served: Served) -> None:
    """After the time to live; the answers are those of the new weights."""
    served.pack("gone", make_adapter(served.work / "gone1", served.model, seed=11))
    status, first = served.ask("gone")
    assert status == 200
    served.pack("gone", make_adapter(served.work / "gone2", served.model, seed=12), "--overwrite")
    served.engine.wait_for(lambda: served.ask("gone") not in {(200, first)}, SECONDS)
    status, second = served.ask("gone")
    assert status == 200
    assert second != first


def test_an_adapter_that_was_removed_ends(served: Served) -> None:
    """vLLM answers as for any model that does not exist, and lists it no longer."""
    assert served.ask("gone")[0] == 200
    client = s3_client(served.s3)
    for file in FILES:
        client.delete_object(Bucket=BUCKET, Key=f"adapters/gone/{file}")
    served.engine.wait_for(lambda: served.ask("gone")[0] == 404, SECONDS)
    _, body = served.engine.get("/v1/models")
    assert "gone" not in {model["id"] for model in json.loads(body)["data"]}
    found = served.engine.state_dir / "found-adapters"
    served.engine.wait_for(lambda: not list(found.glob("*-gone")), SECONDS)
    assert served.ask("sql")[0] == 200
    assert "could not be freed" not in served.engine.text


def test_routes_that_load_any_directory_are_closed(served: Served) -> None:
    """They come with vLLM's resolvers."""
    body = {"lora_name": "x", "lora_path": str(served.work / "sql")}
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters"):
        status, answer = served.engine.post(path, body)
        assert (status, answer) == (404, {"detail": "Not Found"}), path


def test_nothing_decrypted_is_in_a_file_nor_the_key_in_a_process(served: Served) -> None:
    """Configurations are; weights are links into memory."""
    state = served.engine.state_dir
    files = [p for p in (state / "found-adapters").rglob("*") if not p.is_dir()]
    plain = {path.name for path in files if not path.is_symlink()}
    assert plain <= {"adapter_config.json"}
    key = served.key_file.read_bytes()
    assert served.engine.process is not None
    for pid in session_processes(served.engine.process.pid):
        for what in ("environ", "cmdline"):
            assert key not in Path(f"/proc/{pid}/{what}").read_bytes()
            assert key.hex().encode() not in Path(f"/proc/{pid}/{what}").read_bytes()


def test_the_metrics_have_counted_all_of_it(served: Served) -> None:
    """They come within a minute."""
    engine = served.engine

    def counted() -> bool:
        failures = {
            reason: engine.metric("tensorserve_adapter_failures_total", reason=reason) or 0
            for reason in (
                "name",
                "not_allowed",
                "corrupt",
                "signature",
                "other_model",
                "not_found",
            )
        }
        return all(failures.values()) and bool(
            engine.metric("tensorserve_adapter_ends_total", reason="removed")
        )

    engine.wait_for(counted, SECONDS)
    assert (engine.metric("tensorserve_adapter_loads_total") or 0) >= 5
    assert engine.metric("tensorserve_adapter_load_seconds_total")
    assert engine.metric("tensorserve_adapter_hits_total")
    assert engine.metric("tensorserve_adapter_ends_total", reason="changed")


def test_it_stops_in_time(served: Served) -> None:
    """No thread that waits for the store keeps the process."""
    assert served.engine.stop(seconds=SECONDS) == 143, served.engine.text[-3000:]
    assert not (served.engine.state_dir / "found-adapters").exists() or not list(
        (served.engine.state_dir / "found-adapters").iterdir()
    )
