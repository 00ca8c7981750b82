"""Runs a command of ours in a process of its own, through a proxy, for its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from proxy import FaultProxy
from s3server import free_ports
from stored import BUCKET, KEY, Stored

PROGRAM = str(Path(sys.executable).with_name("tensorserve"))


def command(
    stored: Stored,
    proxy: FaultProxy | None,
    *words: str,
    wrap: tuple[str, ...] = (),
    **environ: str,
) -> tuple[int, str]:
    """(exit code, what it printed) with nothing but this environment; never a traceback."""
    port, metrics_port = free_ports(2)
    done = subprocess.run(
        [*wrap, PROGRAM, *words],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "AWS_ENDPOINT_URL_S3": proxy.url if proxy else stored.s3.endpoint_url,
            "AWS_ACCESS_KEY_ID": stored.s3.access_key,
            "AWS_SECRET_ACCESS_KEY": stored.s3.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "TENSORSERVE_MODEL_URI": f"s3://{BUCKET}/{stored.name.rpartition('/')[0]}",
            "TENSORSERVE_KEY": KEY.hex(),
            "TENSORSERVE_FETCH_DEADLINE": "3",
            "TENSORSERVE_HOST": "127.0.0.1",
            "TENSORSERVE_PORT": str(port),
            "TENSORSERVE_METRICS_HOST": "127.0.0.1",
            "TENSORSERVE_METRICS_PORT": str(metrics_port),
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    text = done.stdout + done.stderr
    assert "Traceback" not in text, text
    return done.returncode, text
