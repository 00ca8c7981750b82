"""How an engine of the matrix is asked: for each way, answers that two engines are compared by."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
import wave
import zlib
from collections.abc import Callable
from typing import Any

from running import Running, request

PROMPTS = ["The capital of France is", "1 2 3 4"]
TEXTS = ["A cat sits on the mat.", "A kitten lies on a rug.", "Interest rates rose in March."]
_GREEDY = {"model": "model", "max_tokens": 16, "temperature": 0, "seed": 0}


class Refused(Exception):
    """The engine did not answer a request; what it said instead."""

    def __init__(self, words: str, status: int = 400) -> None:
        super().__init__(words)
        self.told = 400 <= status < 500
        """Whether these are the reason: of a fault of its own only its log says more."""


def completions(engine: Running) -> list[Any]:
    """Greedy texts, log-probabilities of their tokens and of the next best."""
    return [_choice(engine, prompt) for prompt in PROMPTS]


def adapted(engine: Running) -> list[Any]:
    """`completions` of the model, and of the adapter `tuned`."""
    return completions(engine) + [_choice(engine, p, model="tuned") for p in PROMPTS]


def chat(engine: Running) -> list[Any]:
    """A greedy answer in a conversation, with log-probabilities."""
    return [_conversation(engine, "Who are you?")]


def picture(engine: Running) -> list[Any]:
    """Greedy answers about two pictures, and about none."""
    found = []
    for shade in (40, 200):
        url = "data:image/png;base64," + base64.b64encode(png(shade)).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        found.append(_conversation(engine, [image, {"type": "text", "text": "What is it?"}]))
    if found[0] == found[1]:
        raise Refused("Both pictures have one answer: it does not look at them.")
    return [*found, _conversation(engine, "Who are you?")]


def embeddings(engine: Running) -> list[Any]:
    """Vectors, asked for one by one: batches would change the last bits."""
    return [
        _post(engine, "/v1/embeddings", {"model": "model", "input": text})["data"][0]["embedding"]
        for text in TEXTS
    ]


def scores(engine: Running) -> list[Any]:
    """How well each text fits the first, by /score and by /rerank."""
    found: list[Any] = []
    for text in TEXTS[1:]:
        pair = {"model": "model", "text_1": TEXTS[0], "text_2": text}
        found.append([entry["score"] for entry in _post(engine, "/score", pair)["data"]])
    for text in TEXTS[1:]:
        pair = {"model": "model", "query": TEXTS[0], "documents": [text]}
        found.append([e["relevance_score"] for e in _post(engine, "/rerank", pair)["results"]])
    return found


def classes(engine: Running) -> list[Any]:
    """Probabilities of a text's classes."""
    return [
        _post(engine, "/classify", {"model": "model", "input": text})["data"][0]["probs"]
        for text in TEXTS
    ]


def token_classes(engine: Running) -> list[Any]:
    """Of each token its classes."""
    return [
        _post(engine, "/pooling", {"model": "model", "input": text})["data"][0]["data"]
        for text in TEXTS
    ]


def transcription(engine: Running) -> list[Any]:
    """What is said in a second of a tone."""
    sound, mark = io.BytesIO(), "part-of-this-form"
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        tone = (int(9000 * math.sin(place / 6)) for place in range(16000))
        file.writeframes(b"".join(struct.pack("<h", value) for value in tone))
    part = f'--{mark}\r\nContent-Disposition: form-data; name="model"\r\n\r\nmodel\r\n--{mark}\r\n'
    part += 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
    body = part.encode() + sound.getvalue() + f"\r\n--{mark}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    address = f"http://127.0.0.1:{engine.port}/v1/audio/transcriptions"
    status, answer = request(address, body, kind)
    if status != 200:
        raise Refused(f"{status} {answer.decode()}", status)
    return [status, json.loads(answer)["text"]]


ASKS: dict[str, Callable[[Running], list[Any]]] = {
    "completions": completions,
    "completions with and without adapter": adapted,
    "chat": chat,
    "chat with pictures": picture,
    "embeddings": embeddings,
    "score and rerank": scores,
    "classify": classes,
    "token classes": token_classes,
    "transcription": transcription,
}


def png(shade: int) -> bytes:
    """A picture of 56 × 56 dots: a gradient from `shade`."""
    rows = b"".join(
        b"\0" + b"".join(bytes((shade, (4 * x) & 255, (4 * y) & 255)) for x in range(56))
        for y in range(56)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 56, 56, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def _choice(engine: Running, prompt: str, **more: Any) -> Any:
    body = _GREEDY | {"prompt": prompt, "logprobs": 3} | more
    choice = _post(engine, "/v1/completions", body)["choices"][0]
    said = choice["logprobs"]
    return [choice["text"], said["token_logprobs"], said["top_logprobs"]]


def _conversation(engine: Running, content: Any) -> Any:
    body = _GREEDY | {"messages": [{"role": "user", "content": content}]}
    body |= {"logprobs": True, "top_logprobs": 3}
    answer = _post(engine, "/v1/chat/completions", body)
    choice = answer["choices"][0]
    said = [[token["token"], token["logprob"]] for token in choice["logprobs"]["content"]]
    return [choice["message"]["content"], said, answer["usage"]["prompt_tokens"]]


def _post(engine: Running, path: str, body: dict[str, Any]) -> Any:
    status, answer = engine.post(path, body)
    if status != 200:
        raise Refused(f"{path}: {status} {answer}", status)
    return answer
