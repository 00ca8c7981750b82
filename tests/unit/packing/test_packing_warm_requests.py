"""The requests of `precompile`, to a server that answers as vLLM's API does."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tensorserve.errors import TensorserveError
from tensorserve.packing.warm_requests import Engine, powers_up_to, send_requests, tokens


class Api(ThreadingHTTPServer):
    """Answers requests whose path is in `known`; keeps what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.known = {"/v1/completions"}
        self.refused_sampling = ""
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def lengths(self) -> Counter[int]:
        """How often a prompt of so many tokens was asked."""
        return Counter(len(body.get("prompt") or body["input"]) for _, body in self.asked)


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        card = {"id": "model", "max_model_len": 100}
        self._answer(200, {"data": [card]})

    def do_POST(self) -> None:
        api = self.server
        assert isinstance(api, Api)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with api.lock:
            api.asked.append((self.path, body))
        refused = self.path not in api.known or (
            bool(api.refused_sampling) and api.refused_sampling in body
        )
        self._answer(400 if refused else 200, {})

    def _answer(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_prefills_and_decodes_of_all_sizes(api: Api) -> None:
    """Prefills up to the longest context, batches up to the most sequences."""
    sent = send_requests(Engine(api.base), 5)
    # 100 tokens, less those that are decoded and one.
    prefills = [1, 2, 4, 8, 16, 32, 64, 91]
    assert set(prefills) <= set(api.lengths)
    assert max(api.lengths) == 91
    # One that tells how the model is asked, seven samplings, batches of 1, 2, 4 and 5.
    assert len(api.asked) == 1 + len(prefills) + 7 + (1 + 2 + 4 + 5)
    assert sent.answered == len(api.asked) - 1
    assert str(sent) == f"{sent.answered} requests answered"


def test_no_prompt_is_found_in_the_prefix_cache(api: Api) -> None:
    """Each batch and each prefill is computed."""
    send_requests(Engine(api.base), 4)
    prompts = [tuple(body["prompt"]) for _, body in api.asked if len(body["prompt"]) >= 16]
    assert len({prompt[:16] for prompt in prompts}) == len(prompts)
    assert all(3 <= token < 256 for prompt in prompts for token in prompt)


def test_a_kind_that_the_model_has_not_is_counted(api: Api) -> None:
    api.refused_sampling = "structured_outputs"
    sent = send_requests(Engine(api.base), 1)
    assert sent.refused == 1
    assert str(sent).endswith("1 refused")


@pytest.mark.parametrize("path", ["/v1/embeddings", "/pooling", "/classify"])
def test_a_pooling_model_is_asked_in_its_own_way(api: Api, path: str) -> None:
    api.known = {path}
    send_requests(Engine(api.base), 1)
    assert [body["input"] for way, body in api.asked if way == path][1:]


def test_an_engine_that_refuses_everything(api: Api) -> None:
    """Then nothing was covered: no result is better than a poor one."""
    api.known = set()
    with pytest.raises(TensorserveError, match="refused all"):
        send_requests(Engine(api.base), 1)


def test_an_engine_that_has_ended(api: Api) -> None:
    base = api.base
    api.server_close()
    with pytest.raises(TensorserveError, match="does not answer"):
        send_requests(Engine(base, seconds=2), 1)


def test_sizes() -> None:
    """Powers of two, and the end itself."""
    assert list(powers_up_to(1)) == [1]
    assert list(powers_up_to(8)) == [1, 2, 4, 8]
    assert list(powers_up_to(9)) == [1, 2, 4, 8, 9]
    assert list(powers_up_to(0)) == []
    assert len(tokens(300, 1)) == 300
