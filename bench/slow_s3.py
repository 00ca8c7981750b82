"""nginx on 127.0.0.1: in front of an S3 server it makes a link like S3's; alone it serves files.

A connection gets so many bytes a second and no more (S3: some 90 MB/s, and a wide link is filled
by many of them), and each answer waits before its first byte, as S3's do.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from bench.directories import CACHE  # first: finds the demo's modules

from s3server import free_ports  # isort: skip

_MODULES = Path("/usr/lib/nginx/modules")
_LUA = _MODULES / "ngx_http_lua_module.so"
_PACKAGES = ("nginx", "libnginx-mod-http-lua")
_READY_SECONDS = 10.0
# Small buffers: nginx sends a buffer at once and then waits until the rate allows the next, so they
# are the grain of the rate. No temporary files: they would make a fast disk of a slow link.
_CONFIGURATION = """
daemon off;
{user}
worker_processes 2;
pid {directory}/nginx.pid;
error_log stderr warn;
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    keepalive_requests 100000;
    sendfile on;
    tcp_nopush on;
    {servers}
}}
"""
_FILES = """
    server {{ listen 127.0.0.1:{port}{tls}; root "{root}"; }}
"""
_TLS = ' ssl; ssl_certificate "{file}"; ssl_certificate_key "{file}"'
_FRONT = """
    upstream s3 {{ server {upstream}; keepalive 128; }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            access_by_lua_block {{ ngx.sleep({delay}) }}
            limit_rate {rate};
            proxy_pass http://s3;
            proxy_http_version 1.1;
            # The signature covers the Host that the client asked for.
            proxy_set_header Host $http_host;
            proxy_set_header Connection "";
            proxy_buffering on;
            proxy_buffer_size 16k;
            proxy_buffers 8 {grain};
            proxy_busy_buffers_size {busy};
            proxy_max_temp_file_size 0;
            client_max_body_size 0;
        }}
    }}
"""


class Nginx:
    """`with Nginx(...) as server:`; it is stopped at the end, whatever happens."""

    def __init__(self, servers: str, port: int, scheme: str = "http") -> None:
        self._servers = servers
        self._scheme = scheme
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._directory = CACHE / f"nginx-{port}"

    @property
    def url(self) -> str:
        """http(s)://127.0.0.1:port"""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def __enter__(self) -> Nginx:
        program = ensure_nginx()
        self._directory.mkdir(parents=True, exist_ok=True)
        configuration = self._directory / "nginx.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                # Workers would be www-data otherwise, which may not read this directory.
                user="user root;" if os.geteuid() == 0 else "",
                directory=self._directory,
                modules=_MODULES,
                servers=self._servers,
            )
        )
        words = [program, "-e", "stderr", "-p", str(self._directory), "-c", str(configuration)]
        self._log = self._directory / "nginx.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop it and wait until it is gone. May be called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(5.0)
            except ProcessLookupError:
                process.wait()
            except subprocess.TimeoutExpired:
                continue
            break
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        sys.exit(f"nginx did not start:\n{self._log.read_text(errors='replace')[-2000:]}")


def slow_front(upstream: str, *, rate: int, delay: float) -> Nginx:
    """In front of the S3 server at `upstream` (host:port): `rate` bytes a second for each
    connection, `delay` seconds before each answer."""
    (port,) = free_ports(1)
    grain = 64 * 1024
    servers = _FRONT.format(
        port=port, upstream=upstream, delay=delay, rate=rate, grain=grain, busy=2 * grain
    )
    return Nginx(servers, port)


def file_server(root: Path, certificate: Path | None = None) -> Nginx:
    """The files below `root`, as fast as it goes; over TLS with a `certificate` (and its key)."""
    (port,) = free_ports(1)
    tls = _TLS.format(file=certificate) if certificate else ""
    servers = _FILES.format(port=port, root=root, tls=tls)
    return Nginx(servers, port, "https" if certificate else "http")


def ensure_nginx() -> str:
    """The program's path. Installs it with apt-get as root if it is missing; else exits with 78."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
    program = shutil.which("nginx", path=path)
    if program and _LUA.exists():
        return program
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"Please install as root: apt-get install {' '.join(_PACKAGES)}", file=sys.stderr)
        sys.exit(78)
    print(f"Installing {' and '.join(_PACKAGES)} with apt-get ...", file=sys.stderr, flush=True)
    # Debian starts a server when it installs one; this file is how one says no.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    words = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *_PACKAGES]
    try:
        subprocess.run(["apt-get", "update", "-qq"], check=True, stdout=sys.stderr)
        subprocess.run(
            words,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )
    finally:
        if ours:
            policy.unlink()
    found = shutil.which("nginx", path=path)
    assert found, "apt-get installed no nginx"
    return found
