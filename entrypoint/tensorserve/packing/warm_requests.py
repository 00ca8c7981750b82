"""Which requests make a running engine compile what it compiles lazily?

When it warms up, vLLM 0.32.0 compiles the model for all shapes at once (dynamic shapes). On GPUs it
also captures its graphs and tunes kernels. What is left is compiled by the first request that needs
it, for a new size of the batch or kind of sampling: kernels of Triton and of FlashInfer's and
DeepGEMM's JIT, and small functions under torch.compile, such as the ranks of log-probabilities
(vllm/v1/sample/ops/logprobs.py). So the requests are prefills of all powers of two up to the
longest context, decodes of all powers of two up to --max-num-seqs, and one for each kind of
sampling.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tensorserve.errors import TensorserveError

_DECODED = 8
_LONGEST = 32768  # tokens of one prefill; longer ones come in chunks of --max-num-batched-tokens
_SECONDS = 1800.0
_DEFAULT_SEQS = 256
_SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0, "logprobs": 1},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "seed": 1},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0, "min_tokens": 4, "logit_bias": {"1": 1}},
    {"temperature": 0, "structured_outputs": {"regex": "[a-z]{4}"}},
)


@dataclass(frozen=True)
class Sent:
    """What was asked of the engine."""

    answered: int
    refused: int
    """Answered with an error: a kind of request that this model has not."""

    def __str__(self) -> str:
        said = f"{self.answered} requests answered"
        return said if not self.refused else f"{said}, {self.refused} refused"


def powers_up_to(most: int) -> Iterator[int]:
    """1, 2, 4, …, and `most` itself."""
    power = 1
    while power < most:
        yield power
        power *= 2
    if most > 0:
        yield most


def tokens(count: int, salt: int) -> list[int]:
    """A prompt of `count` token ids below 256, unlike others: no prefix is found in the cache."""
    return [(salt * 31 + place * 7 + place * place) % 251 + 3 for place in range(count)]


class Engine:
    """A running vLLM at `base` (http://host:port)."""

    def __init__(self, base: str, seconds: float = _SECONDS) -> None:
        self._base = base
        self._seconds = seconds
        # A proxy of the environment is not asked for this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """(status, answer). Raises TensorserveError if there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._base + path, data, {"Content-Type": "application/json"}
        )
        try:
            with self._opener.open(request, timeout=self._seconds) as response:
                return response.status, json.loads(response.read())
        except urllib.error.HTTPError as error:
            return error.code, None
        except (OSError, ValueError) as error:
            raise TensorserveError(
                f"The engine does not answer {path}: {error}.", hint="Its output says why."
            ) from error


def send_requests(engine: Engine, most_seqs: int | None) -> Sent:
    """Sends the requests, and says how many were answered.

    `most_seqs`: --max-num-seqs; None: vLLM's default. Raises TensorserveError if the engine ends.
    """
    status, models = engine.ask("/v1/models")
    if status != 200:
        raise TensorserveError(f"The engine answers /v1/models with {status}.")
    served = models["data"][0]
    ask = _question(engine, str(served["id"]))
    longest = min(int(served.get("max_model_len") or 2048) - _DECODED - 1, _LONGEST)
    statuses = [ask(tokens(n, n), _SAMPLINGS[0]) for n in powers_up_to(max(1, longest))]
    short = max(1, min(16, longest))
    statuses += [ask(tokens(short, 1000 + n), s) for n, s in enumerate(_SAMPLINGS)]
    most = most_seqs or _DEFAULT_SEQS
    with ThreadPoolExecutor(most, thread_name_prefix="tensorserve-warm") as pool:
        for batch in powers_up_to(most):
            prompts = (tokens(short, 2000 + batch * 1000 + n) for n in range(batch))
            statuses += pool.map(lambda prompt: ask(prompt, _SAMPLINGS[0]), prompts)
    answered = sum(status == 200 for status in statuses)
    if not answered:
        raise TensorserveError(
            f"The engine refused all {len(statuses)} requests (status {statuses[0]}).",
            hint="Please report it, with the model and the flags.",
        )
    return Sent(answered, len(statuses) - answered)


def _question(engine: Engine, model: str) -> Callable[[list[int], dict[str, Any]], int]:
    """How this model is asked: for a completion, else for what a pooling model gives."""

    def complete(prompt: list[int], sampling: dict[str, Any]) -> int:
        body = {"model": model, "prompt": prompt, "max_tokens": _DECODED} | sampling
        return engine.ask("/v1/completions", body)[0]

    def pool(path: str) -> Callable[[list[int], dict[str, Any]], int]:
        return lambda prompt, _: engine.ask(path, {"model": model, "input": prompt})[0]

    ways = [complete, *map(pool, ("/v1/embeddings", "/pooling", "/classify"))]
    first = tokens(4, 0)
    return next((way for way in ways if way(first, {}) == 200), complete)
