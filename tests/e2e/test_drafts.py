"""A draft model with a directory of its own serves beside an encrypted bundle; and the same engine,
which only those reach who have a client certificate, becomes ready.

That the answers are stock vLLM's, and EAGLE, MTP and n-grams: tests/models/test_drafts.py.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from prometheus_client.parser import text_string_to_metric_families
from running import Tensorserve

from certificates import PrivateCA
from tensorserve.cli import main as tensorserve


@dataclass(frozen=True)
class Guarded:
    """An engine that wants client certificates, and what its callers have."""

    engine: Tensorserve
    draft: Path
    ca: Path
    certificate: Path

    def ask(
        self, path: str, body: dict[str, Any] | None = None, *, certificate: bool = True
    ) -> tuple[int, bytes]:
        """(status, body), over TLS."""
        context = ssl.create_default_context(cafile=str(self.ca))
        if certificate:
            context.load_cert_chain(self.certificate)
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.engine.port, context=context, timeout=300
        )
        try:
            data = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if data is None else "POST", path, data, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """A counter of vLLM's own metrics."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.ask("/metrics")[1].decode())
            for sample in family.samples
            if sample.name == name
        )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Iterator[Guarded]:
    """A tiny model with a draft, ready; --ssl-cert-reqs=2."""
    base = tmp_path_factory.mktemp("guarded")
    model = tiny_models.llama(base / "model", model_dir, torch.bfloat16, tied=False)
    draft = tiny_models.twin(base / "draft", model)
    bundle, key = base / "bundle", base / "key"
    assert tensorserve(["pack", str(model), str(bundle), "--encrypt", "--key-file", str(key)]) == 0
    speculative = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    ca = PrivateCA(base)
    certificate = ca.certificate()
    settings = {
        "TENSORSERVE_MODEL_URI": str(bundle),
        "TENSORSERVE_KEY_FILE": str(key),
        "TENSORSERVE_VLLM_SPECULATIVE_CONFIG": json.dumps(speculative),
        "TENSORSERVE_VLLM_SSL_CERTFILE": str(certificate),
        "TENSORSERVE_VLLM_SSL_KEYFILE": str(certificate),
        "TENSORSERVE_VLLM_SSL_CA_CERTS": str(ca.bundle),
        "TENSORSERVE_VLLM_SSL_CERT_REQS": "2",
    }
    with Tensorserve(base, settings) as engine:
        engine.wait_ready()
        yield Guarded(engine, draft, ca.bundle, certificate)


def test_an_engine_that_wants_client_certificates_becomes_ready(guarded: Guarded) -> None:
    """/health answers those who have one, and the exporter has none."""
    with pytest.raises((OSError, http.client.HTTPException)):
        guarded.ask("/health", certificate=False)
    assert guarded.ask("/health")[0] == 200
    assert guarded.engine.metric("tensorserve_ready") == 1


def test_a_draft_is_read_from_its_own_directory(guarded: Guarded) -> None:
    """It agrees with the model where it has its own weights, which the bundle's would not fill."""
    for prompt in ("The capital of France is", "1 2 3 4"):
        body = {"model": "model", "prompt": prompt, "max_tokens": 24}
        greedy = {"temperature": 0, "logprobs": 1, "seed": 0}
        status, answer = guarded.ask("/v1/completions", body | greedy)
        assert status == 200, answer
    drafted = guarded.metric("vllm:spec_decode_num_draft_tokens_total")
    accepted = guarded.metric("vllm:spec_decode_num_accepted_tokens_total")
    events = guarded.engine.events()
    assert guarded.engine.metric("tensorserve_load_progress_ratio", rank="0") == 1
    assert drafted > 0
    assert accepted > drafted * 0.8
    assert len([event for event in events if event["event"] == "load_plan"]) == 1
    begun = [e["phase"] for e in events if e["event"] == "phase" and e["state"] == "begin"]
    # The draft's own time is a load, after the model's.
    assert begun[-4:] == ["postprocess", "warmup", "load", "warmup"]
    checks = [event for event in events if event["event"] == "check"]
    assert ("draft", str(guarded.draft)) in [(check["name"], check["found"]) for check in checks]
