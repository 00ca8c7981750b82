"""How are requests on the metrics' port answered, beside any number of slow clients?

A small HTTP/1 server in one thread, with one request per connection. A connection costs a few
kilobytes and no thread, and ends at an absolute deadline. Where there are too many connections, the
oldest one of the address that holds most is closed. So a probe is always answered.
"""

from __future__ import annotations

import asyncio
import re
import resource
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

SECONDS = 10.0
"""A connection may last that long, from its first byte to its last."""
MOST_CONNECTIONS = 512
_HEADER_BYTES = 16 * 1024
_UNREAD_BYTES = 1024 * 1024
# With a line for each bad request, any client could fill the container's log.
_SECONDS_BETWEEN_COMPLAINTS = 10.0
_REQUEST_LINE = re.compile(r"([A-Za-z]{1,20}) (\S{1,2048}) HTTP/1\.[0-9]")
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Request:
    """A request; header names in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Response:
    """A response; `then` is called once it has been sent."""

    code: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    then: Callable[[], None] | None = None


class HttpServer:
    """Answers on `host`:`port` (0: any free one) between `start` and `close`.

    `answer` is called in the server's thread; an OSError of it is answered by 500. Raises OSError
    if it cannot listen there.
    """

    def __init__(self, host: str, port: int, answer: Callable[[Request], Response]) -> None:
        self._answer = answer
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(1024)
        except OSError:
            self._socket.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = max(8, min(MOST_CONNECTIONS, files // 2))
        self._open: dict[asyncio.StreamWriter, str] = {}
        """Connections and the addresses of their peers, oldest first."""
        self._complained = -_SECONDS_BETWEEN_COMPLAINTS
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="tensorserve-http", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """End every connection, and wait until that is done."""
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._connected, sock=self._socket, limit=_HEADER_BYTES, backlog=1024
        )
        async with server:
            await self._end.wait()
            for writer in self._open:
                writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._admit(writer)
        try:
            async with asyncio.timeout(SECONDS):
                await self._serve_one(reader, writer)
                writer.close()
                # The deadline includes the time until the client has read the last byte.
                await writer.wait_closed()
        except (OSError, EOFError, TimeoutError):
            pass  # the client has gone, or is too slow
        finally:
            self._open.pop(writer, None)
            writer.transport.abort()

    def _admit(self, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= self._most:
            (greediest, _), *_ = Counter(self._open.values()).most_common(1)
            oldest = next(each for each, peer in self._open.items() if peer == greediest)
            del self._open[oldest]
            oldest.transport.abort()
        address = writer.get_extra_info("peername")
        self._open[writer] = str(address[0]) if address else ""

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = _parsed(await reader.readuntil(b"\r\n\r\n"))
        except asyncio.LimitOverrunError:
            await self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, reader, writer)
            return
        if request is None:
            await self._refuse(HTTPStatus.BAD_REQUEST, reader, writer)
            return
        try:
            answer = self._answer(request)
        except OSError:
            # The thread that follows the log gets the same error and reports it.
            code = HTTPStatus.INTERNAL_SERVER_ERROR
            answer = Response(code, _TEXT, b"The event log cannot be read.\n")
        await self._send(answer, writer, body=request.method != "HEAD")
        if answer.then is not None:
            answer.then()
        if request.method not in {"GET", "HEAD"}:
            await _discard_rest(reader, writer)

    async def _refuse(
        self, code: HTTPStatus, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        now = time.monotonic()
        if now - self._complained >= _SECONDS_BETWEEN_COMPLAINTS:
            self._complained = now
            print(
                f"tensorserve: warning: {self._open.get(writer)} sent something other than an HTTP "
                f"request to port {self.port} (answered {code.value}).",
                file=sys.stderr,
                flush=True,
            )
        await self._send(Response(code, _TEXT, f"{code.phrase}.\n".encode()), writer)
        await _discard_rest(reader, writer)

    async def _send(
        self, answer: Response, writer: asyncio.StreamWriter, *, body: bool = True
    ) -> None:
        headers = {
            "Server": "tensorserve",
            "Content-Type": answer.content_type,
            "Content-Length": str(len(answer.body)),
            "Connection": "close",
            **answer.headers,
        }
        lines = [f"HTTP/1.1 {answer.code.value} {answer.code.phrase}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        writer.write(answer.body if body else b"")
        await writer.drain()


async def _discard_rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read what the peer still sends: closing a socket with unread bytes resets the connection,
    and the peer may lose the response."""
    writer.write_eof()
    left = _UNREAD_BYTES
    while left > 0 and (data := await reader.read(65536)):
        left -= len(data)


def _parsed(head: bytes) -> Request | None:
    """The request of a request line and header; None if it is malformed."""
    first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
    found = _REQUEST_LINE.fullmatch(first)
    if found is None:
        return None
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            return None
        headers[name.lower()] = value.strip()
    target = found[2].partition("?")[0].partition("#")[0]
    # RFC 9112, 3.2.2: a request to a proxy has the whole URL.
    path = re.sub(r"^https?://[^/]*", "", target, flags=re.IGNORECASE)
    return Request(found[1].upper(), path or "/", headers)
