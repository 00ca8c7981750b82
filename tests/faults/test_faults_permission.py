"""F5 and F15: credentials that run out in the middle of a load, and clocks that differ."""

from __future__ import annotations

import datetime
import json
import secrets
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError
from commands import command
from loading import Load, load
from proxy import Asked, FaultProxy
from s3server import S3Server
from stored import BUCKET, MIB, POLICY, Stored

from s3_clients import s3_client
from tensorserve.errors import PermissionDeniedError
from tensorserve.sources import Access, S3Access, s3_errors
from waiting import wait_for

EXPIRED = {"code": 400, "body": b"<Error><Code>ExpiredToken</Code><Message>x</Message></Error>"}
DENIED = {"code": 403, "body": b"<Error><Code>AccessDenied</Code><Message>x</Message></Error>"}


def refused(stored: Stored, access: Access) -> PermissionDeniedError:
    """The load ends with exit code 77, and gave out nothing that is wrong."""
    partial = Load()
    with pytest.raises(PermissionDeniedError) as caught:
        load(stored.uri, access, stored.key, partial)
    assert caught.value.exit_code == 77
    assert partial.digests.items() < stored.digests.items()
    assert partial.retries.keys() <= {"expired"}
    return caught.value


# F5 -----------------------------------------------------------------------------------------------


class Tenant:
    """A user of the real S3 server whose keys are exchanged while it reads, as a rotation does."""

    def __init__(self, s3: S3Server, directory: Path, provider: str) -> None:
        self._s3 = s3
        self._provider = provider
        self._file = directory / ("credentials" if provider == "file" else "credentials.json")
        self.keys: list[str] = []
        if provider == "process":
            (directory / "config").write_text(
                f"[default]\nregion = us-east-1\ncredential_process = cat {self._file}\n"
            )
        self.rotate(["Read", "List"])

    def rotate(self, actions: list[str]) -> None:
        """New keys for the client first, then on the server, where the old ones end."""
        key, secret = f"tenant-{secrets.token_hex(6)}", secrets.token_hex(16)
        if self._provider == "file":
            text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        else:
            given = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret}
            text = json.dumps(given | {"Expiration": "2099-01-01T00:00:00Z"})
        self._file.write_text(text)
        self.keys.append(key)
        configuration = self._s3.directory / "identities.json"
        content = json.loads(configuration.read_text())
        kept = [i for i in content["identities"] if i["name"] != "tenant"]
        tenant = {
            "name": "tenant",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": actions,
        }
        configuration.write_text(json.dumps({"identities": [*kept, tenant]}))
        process = self._s3._process
        assert process is not None
        process.send_signal(signal.SIGHUP)
        probe = s3_client(self._s3, key=key, secret=secret)

        def known() -> bool:
            try:
                probe.list_objects_v2(Bucket=BUCKET, MaxKeys=1)
            except ClientError as error:
                return error.response["Error"]["Code"] == "AccessDenied" and not actions
            return bool(actions)

        wait_for(known)

    def access(self, proxy: FaultProxy) -> Access:
        """Without keys: botocore's chain finds them. `region` keeps accounts of tests apart."""
        region = f"test-{secrets.token_hex(4)}"
        policy = replace(POLICY, stall_timeout=5, deadline=20)
        return Access(s3=S3Access(endpoint_url=proxy.url, region=region), policy=policy)


def key_of(asked: Asked) -> str:
    """The access key that a request was signed with."""
    return asked.headers["Authorization"].partition("Credential=")[2].partition("/")[0]


@pytest.mark.parametrize("provider", ["file", "process"])
def test_f5_keys_that_are_exchanged_in_the_middle_are_renewed(
    stored: Stored, proxy: FaultProxy, tmp_path: Path, provider: str
) -> None:
    """F5: the real server refuses the old ones; signed again, bound to the same version."""
    tenant = Tenant(stored.s3, tmp_path, provider)
    proxy.add("none", beyond=8 * MIB, hook=lambda _: tenant.rotate(["Read", "List"]))
    done = load(stored.uri, tenant.access(proxy), stored.key)
    assert done.digests == stored.digests
    assert proxy.fired == {"none": 1}
    assert done.retries.keys() == {"expired"}
    assert {key_of(r) for r in proxy.requests} == set(tenant.keys)
    assert len({r.headers["If-Match"] for r in proxy.requests if r.first}) == 1


def test_f5_keys_that_are_taken_away_in_the_middle_end_the_load(
    stored: Stored, proxy: FaultProxy, tmp_path: Path
) -> None:
    """F5: new keys are refused by the real server too: exit code 77 after one renewal."""
    tenant = Tenant(stored.s3, tmp_path, "process")
    proxy.add("none", beyond=8 * MIB, hook=lambda _: tenant.rotate([]))
    error = refused(stored, tenant.access(proxy))
    assert "AccessDenied" in str(error)
    assert proxy.fired == {"none": 1}
    assert {key_of(r) for r in proxy.requests} == set(tenant.keys)
    assert not [key for key in tenant.keys if key in str(error)]


@pytest.mark.parametrize("answer", [EXPIRED, DENIED], ids=["expired", "denied"])
def test_f5_given_keys_cannot_be_renewed(
    stored: Stored, proxy: FaultProxy, answer: dict[str, object]
) -> None:
    """F5: exit code 77, with what S3 said."""
    proxy.add("status", times=0, beyond=8 * MIB, **answer)
    error = refused(stored, stored.access(proxy.url))
    assert "expired" in str(error) or "AccessDenied" in str(error)
    assert stored.s3.secret_key not in str(error)
    assert proxy.fired["status"] >= 1


def test_f5_a_presigned_url_that_runs_out_ends_the_load(stored: Stored) -> None:
    """F5: the real server refuses it: nothing can be signed again here, exit code 77."""
    url = s3_client(stored.s3).generate_presigned_url(
        "get_object", {"Bucket": "models", "Key": stored.name}, ExpiresIn=3
    )
    signed_at = time.monotonic()
    # The host is part of the signature: the proxy is an upstream for it, not its name.
    with FaultProxy(stored.s3.endpoint_url) as gate:
        held: list[Asked] = []

        def hold(asked: Asked) -> None:
            held.append(asked)
            gate.stopping.wait(max(0.0, signed_at + 4.2 - time.monotonic()))

        gate.add("none", times=0, beyond=8 * MIB, hook=hold)
        there = url.replace(f":{stored.s3.port}/", f":{gate.port}/")
        gate.host = f"127.0.0.1:{stored.s3.port}"
        partial = Load()
        # Longer than the proxy holds a request.
        access = Access(policy=replace(POLICY, stall_timeout=8, deadline=20))
        with pytest.raises(PermissionDeniedError, match="presigned") as caught:
            load(there, access, stored.key, partial)
    assert caught.value.exit_code == 77
    assert held
    assert partial.digests.items() < stored.digests.items()
    assert "Signature" not in str(caught.value)


# F15 ----------------------------------------------------------------------------------------------


def test_f15_a_real_server_refuses_a_wrong_clock(
    stored: Stored, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F15: signed two hours ahead; the verdict and the time are SeaweedFS's own. Exit code 77."""
    import botocore.auth

    ahead = datetime.timedelta(hours=2)
    honest = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *a: honest(*a) + ahead)
    clock = SimpleNamespace(time=lambda: time.time() + ahead.total_seconds())
    monkeypatch.setattr(s3_errors, "time", clock)
    error = refused(stored, stored.access(proxy.url))
    assert "the clocks differ by 7" in str(error)
    assert "this machine is ahead" in str(error)
    assert "NTP" in str(error)
    assert len(proxy.requests) == 1


def test_f15_a_clock_that_drifts_off_in_the_middle(stored: Stored, proxy: FaultProxy) -> None:
    """F15: the server says so of a range; an hour behind, by its own Date."""
    body = b"<Error><Code>RequestTimeTooSkewed</Code></Error>"
    date = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)).strftime(
        "%a, %d %b %Y %H:%M:%S GMT"
    )
    proxy.add("status", times=0, code=403, body=body, headers={"Date": date}, beyond=8 * MIB)
    error = refused(stored, stored.access(proxy.url))
    assert "the clocks differ by 3" in str(error)
    assert "this machine is behind" in str(error)
    assert proxy.fired["status"] >= 1


def test_f15_a_wrong_clock_ends_the_commands_with_77(
    stored: Stored, proxy: FaultProxy, tmp_path: Path
) -> None:
    """F15: before anything is started."""
    body = b"<Error><Code>RequestTimeTooSkewed</Code></Error>"
    date = {"Date": "Mon, 01 Jan 2001 00:00:00 GMT"}
    proxy.add("status", times=0, code=403, body=body, headers=date, beyond=0)
    code, text = command(stored, proxy, "check", TENSORSERVE_STATE_DIR=str(tmp_path / "state"))
    assert code == 77, text
    assert "the clocks differ by" in text
    assert "this machine is ahead" in text
    assert proxy.fired["status"] >= 1
