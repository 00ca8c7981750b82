"""With the root logger at DEBUG, no library below writes what lets somebody in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from s3server import S3Server

from rangeserver import RangeServer

PROGRAM = """
import logging, sys
from tensorserve.secret import Secret
from tensorserve.sources import Access, S3Access, list_names, open_source
by_name, url, endpoint, access_key, secret_key, token = sys.argv[1:]
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
if by_name:
    logging.getLogger(by_name).setLevel(logging.DEBUG)
open_source(url, Access()).close()
s3 = S3Access(endpoint_url=endpoint, region="us-east-1", access_key_id=Secret(access_key),
              secret_access_key=Secret(secret_key), session_token=Secret(token) if token else None)
try:
    print(list_names("s3://models/x", Access(s3=s3)))
    open_source("s3://models/x/y", Access(s3=s3))
except Exception as error:
    print(error)
logging.getLogger("mine").debug("said")
"""


def said(tmp_path: Path, s3: S3Server, by_name: str, token: str = "") -> str:
    (tmp_path / "m").write_bytes(b"x")
    with RangeServer(tmp_path) as server:
        url = f"{server.url}/m?X-Amz-Signature=canary-signature"
        keys = [s3.endpoint_url, s3.access_key, s3.secret_key, token]
        command = [sys.executable, "-c", PROGRAM, by_name, url, *keys]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("token", ["", "canary-token"])
def test_no_signature_and_no_token_is_logged(
    tmp_path: Path, s3: S3Server, bucket: str, token: str
) -> None:
    """The user wanted to see the own program's messages, which are there."""
    assert bucket == "models"
    text = said(tmp_path, s3, "", token)
    assert "DEBUG:mine:said" in text
    assert "canary" not in text
    assert "Signature" not in text
    assert s3.secret_key not in text


@pytest.mark.parametrize(
    ("name", "shown"), [("tensorserve.requests", "canary-signature"), ("botocore", "Signature")]
)
def test_who_asks_by_name_is_answered(
    tmp_path: Path, s3: S3Server, bucket: str, name: str, shown: str
) -> None:
    """For whoever looks for a fault in exactly that."""
    assert bucket == "models"
    assert shown in said(tmp_path, s3, name)
