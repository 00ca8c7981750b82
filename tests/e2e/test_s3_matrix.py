"""One S3 client: what holds for listing holds for reading and writing, row by row.

Each row is a way to reach a real S3 server (SeaweedFS), set as a user sets it: by variables and
the AWS configuration. The three go through the same code as `pack`, `verify` and the loader.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import s3server
from s3server import S3Server

from certificates import PrivateCA
from fronts import Front, Seen
from tensorserve.config.access import access_for
from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.errors import ConfigurationError, PermissionDeniedError, TensorserveError
from tensorserve.launch.context import Start, publish_start
from tensorserve.packing.destination import open_destination, replace_file
from tensorserve.sources import Access, list_names, open_source, s3_client

# Two parts of an upload, so that every kind of request of a writer is made.
DATA = os.urandom(17 * 1024**2)
SMALL = b"{}"
DOMAIN = "store.internal"
BUCKET = "matrix"
_IS_SETTING = re.compile(r"AWS_|S3_|TENSORSERVE_|SSL_CERT_|.*_CA_BUNDLE$|.*_proxy$", re.IGNORECASE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """SeaweedFS that knows buckets by host name too, and lets in who has no credentials."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3server, "OPTIONS", (*s3server.OPTIONS, f"-s3.domainName={DOMAIN}"))
        patch.setattr(s3server, "write_identities", _with_anonymous)
        with S3Server(tmp_path_factory.mktemp("s3")) as running:
            running.make_bucket(BUCKET)
            yield running


def _with_anonymous(path: Path, access_key: str, secret_key: str) -> None:
    path.write_text(
        '{"identities": ['
        '{"name": "demo", "credentials": '
        f'[{{"accessKey": "{access_key}", "secretKey": "{secret_key}"}}],'
        '"actions": ["Admin", "Read", "List", "Tagging", "Write"]},'
        '{"name": "anonymous", "actions": ["Read", "List", "Write"]}]}'
    )


@dataclass
class Way:
    """How the store is reached in one row."""

    server: S3Server
    directory: Path
    variables: dict[str, str] = field(default_factory=dict)
    fronts: list[Front] = field(default_factory=list)

    @property
    def keys(self) -> dict[str, str]:
        """The user's credentials."""
        return {
            "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
            "AWS_REGION": "us-east-1",
        }

    def front(self, front: Front) -> Front:
        """Start one more; it is stopped with the row."""
        front.__enter__()
        self.fronts.append(front)
        return front

    def configuration(self, text: str) -> str:
        """A file for AWS_CONFIG_FILE."""
        (self.directory / "aws-config").write_text(text)
        return str(self.directory / "aws-config")


@pytest.fixture
def way(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    """Nothing of this machine's settings is found."""
    for name in list(os.environ):
        if _IS_SETTING.match(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(s3_client.account_for, "_accounts", {})
    made = Way(server, tmp_path)
    yield made
    for front in made.fronts:
        front.__exit__(None, None, None)


def access_of(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Access:
    """As a command has it."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = {"TENSORSERVE_MODEL_URI": "/", "TENSORSERVE_FETCH_DEADLINE": "10"}
    return access_for(Settings.from_environment({**settings, **os.environ}))


def write(uri: str, access: Access) -> None:
    """Large and small, as `pack` does."""
    destination = open_destination(uri, access, overwrite=True, needed=len(DATA))
    for name, data in (("model.tensors", DATA), ("sub/ä +%.json", SMALL)):
        with destination.create(name, len(data)) as out:
            out.write(data)
    destination.commit()


def read(uri: str, access: Access) -> None:
    """The head and a range."""
    source = open_source(f"{uri}/model.tensors", access)
    assert source.read(0, 1000) == DATA[:1000]
    assert source.read(5_000_001, 70_000) == DATA[5_000_001:5_070_001]
    source.close()
    small = open_source(f"{uri}/sub/ä +%.json", access)
    assert small.read(0, 2) == SMALL
    small.close()


def path_style(way: Way) -> None:
    """The server itself."""
    way.variables = way.keys | {"AWS_ENDPOINT_URL_S3": way.server.endpoint_url}


def profile_endpoint(way: Way) -> None:
    """endpoint_url of a services section; credentials and region of the profile as well."""
    text = (
        "[profile serving]\nservices = own\nregion = us-east-1\n"
        f"aws_access_key_id = {way.server.access_key}\n"
        f"aws_secret_access_key = {way.server.secret_key}\n"
        f"[services own]\ns3 =\n  endpoint_url = {way.server.endpoint_url}\n"
    )
    way.variables = {"AWS_PROFILE": "serving", "AWS_CONFIG_FILE": way.configuration(text)}


def refuse_path_style(seen: Seen) -> tuple[int, str, str] | None:
    """As stores do that know buckets by host name alone."""
    if seen.host.endswith(f".{DOMAIN}"):
        return None
    return 403, "PathStyleRequestNotAllowed", "Use virtual-hosted style."


def virtual_store(way: Way) -> dict[str, str]:
    """Only its proxy knows the names of its buckets."""
    proxy = way.front(Front(way.server.port, refuse=refuse_path_style))
    return way.keys | {"AWS_ENDPOINT_URL_S3": f"http://{DOMAIN}", "HTTP_PROXY": proxy.url}


def virtual_by_variable(way: Way) -> None:
    """TENSORSERVE_S3_ADDRESSING_STYLE."""
    way.variables = virtual_store(way) | {"TENSORSERVE_S3_ADDRESSING_STYLE": "virtual"}


def virtual_by_configuration(way: Way) -> None:
    """`s3 = addressing_style` of the AWS configuration."""
    text = "[default]\ns3 =\n  addressing_style = virtual\n"
    way.variables = virtual_store(way) | {"AWS_CONFIG_FILE": way.configuration(text)}


def rewriting_front(way: Way) -> None:
    """A front that changes the headers that fronts do change."""

    def change(headers: dict[str, str]) -> dict[str, str]:
        changed = {n: v for n, v in headers.items() if not n.lower().startswith("amz-sdk")}
        return changed | {
            "Accept-Encoding": "gzip, br",
            "User-Agent": "a front",
            "Via": "1.1 front",
            "X-Forwarded-For": "192.0.2.1",
        }

    front = way.front(Front(way.server.port, change=change))
    way.variables = way.keys | {"AWS_ENDPOINT_URL_S3": front.url}


def chunked_name(way: Way) -> None:
    """A store that gives an upload's transfer for the object's encoding."""
    front = way.front(Front(way.server.port, name="aws-chunked"))
    way.variables = way.keys | {"AWS_ENDPOINT_URL_S3": front.url}


def gzip_name(way: Way) -> None:
    """A store that gives back the name that an upload came with."""
    front = way.front(Front(way.server.port, name="gzip"))
    way.variables = way.keys | {"AWS_ENDPOINT_URL_S3": front.url}


def proxy_with_password(way: Way) -> None:
    """HTTP_PROXY with a user, in small letters."""
    proxy = way.front(Front(way.server.port, password="u:p@ss"))
    way.variables = way.keys | {
        "AWS_ENDPOINT_URL_S3": f"http://{DOMAIN}",
        "http_proxy": f"http://u:p%40ss@127.0.0.1:{proxy.port}",
    }


def tunnel(way: Way) -> None:
    """HTTPS_PROXY, and a private CA behind it."""
    ca = PrivateCA(way.directory)
    front = way.front(Front(way.server.port, tls=ca.context()))
    proxy = way.front(Front(0, tunnel=front.port))
    way.variables = way.keys | {
        "AWS_ENDPOINT_URL_S3": f"https://127.0.0.1:{front.port}",
        "HTTPS_PROXY": proxy.url,
        "AWS_CA_BUNDLE": str(ca.bundle),
    }


def tls_by_ssl_cert_file(way: Way) -> None:
    """A private CA in SSL_CERT_FILE."""
    ca = PrivateCA(way.directory)
    front = way.front(Front(way.server.port, tls=ca.context()))
    way.variables = way.keys | {
        "AWS_ENDPOINT_URL_S3": front.url,
        "SSL_CERT_FILE": str(ca.bundle),
    }


def no_proxy(way: Way) -> None:
    """NO_PROXY names the server's address: the proxy, which leads nowhere, is not asked."""
    way.variables = way.keys | {
        "AWS_ENDPOINT_URL_S3": way.server.endpoint_url,
        "HTTP_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "example.org,127.0.0.1",
    }


def unsigned(way: Way) -> None:
    """TENSORSERVE_S3_UNSIGNED: no credentials, and nothing of a signature."""

    def refuse(seen: Seen) -> tuple[int, str, str] | None:
        signed = {n.lower() for n in seen.headers} & {"authorization", "x-amz-date"}
        return (400, "InvalidRequest", "signed") if signed else None

    front = way.front(Front(way.server.port, refuse=refuse))
    way.variables = {
        "AWS_ENDPOINT_URL_S3": front.url,
        "AWS_REGION": "us-east-1",
        "TENSORSERVE_S3_UNSIGNED": "true",
    }


def refuse_who_does_not_pay(seen: Seen) -> tuple[int, str, str] | None:
    """A requester-pays bucket."""
    headers = {name.lower(): value for name, value in seen.headers.items()}
    if headers.get("x-amz-request-payer") == "requester":
        return None
    return 403, "AccessDenied", "Access Denied. Request payer is required (x-amz-request-payer)"


def requester_pays(way: Way) -> None:
    """TENSORSERVE_S3_REQUEST_PAYER, on every request."""
    front = way.front(Front(way.server.port, refuse=refuse_who_does_not_pay))
    way.variables = way.keys | {
        "AWS_ENDPOINT_URL_S3": front.url,
        "TENSORSERVE_S3_REQUEST_PAYER": "requester",
    }


ROWS = (
    path_style,
    profile_endpoint,
    virtual_by_variable,
    virtual_by_configuration,
    rewriting_front,
    chunked_name,
    gzip_name,
    proxy_with_password,
    tunnel,
    tls_by_ssl_cert_file,
    no_proxy,
    unsigned,
    requester_pays,
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.__name__)
def test_a_store_is_written_listed_and_read(
    row: Callable[[Way], None], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same settings, the same client."""
    row(way)
    access = access_of(way.variables, monkeypatch)
    uri = f"s3://{BUCKET}/{row.__name__}/v1"
    write(uri, access)
    assert list_names(uri, access) == {"model.tensors": len(DATA), "sub/ä +%.json": len(SMALL)}
    read(uri, access)
    for front in way.fronts:
        assert front.seen


ENGINE = """
import os, sys
from tensorserve.config.access import access_for
from tensorserve.config.variables import HANDOFF_VARIABLE
from tensorserve.sources import open_source
from tensorserve.launch.context import receive_start

settings = receive_start(os.environ[HANDOFF_VARIABLE]).settings
print(open_source(settings.model_uri + "/sub/ä +%.json", access_for(settings)).read(0, 2))
"""


@pytest.mark.parametrize(
    "row",
    [profile_endpoint, virtual_by_configuration, proxy_with_password, unsigned],
    ids=lambda row: row.__name__,
)
def test_a_process_of_the_engine_has_the_same_client(
    row: Callable[[Way], None], way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has an allow-list of the environment, and the rest in memory."""
    row(way)
    access = access_of(way.variables, monkeypatch)
    uri = f"s3://{BUCKET}/{row.__name__}/engine"
    replace_file(uri, "sub/ä +%.json", SMALL, access)
    environ = {**os.environ, "TENSORSERVE_MODEL_URI": uri}
    settings = Settings.from_environment(environ)
    environment = dict(make_plan(settings).environment)
    environment[HANDOFF_VARIABLE] = publish_start(Start(settings, make_plan(settings)))
    for front in way.fronts:
        front.seen.clear()
    found = subprocess.run(
        [sys.executable, "-c", ENGINE], env=environment, capture_output=True, text=True, check=False
    )
    assert found.stdout == f"{SMALL!r}\n", found.stderr
    for front in way.fronts:
        assert front.seen


REFUSALS = (
    (refuse_path_style, ConfigurationError, "TENSORSERVE_S3_ADDRESSING_STYLE=virtual"),
    (refuse_who_does_not_pay, PermissionDeniedError, "TENSORSERVE_S3_REQUEST_PAYER=requester"),
    (
        lambda _: (403, "AccessDenied", "not authorized to perform: kms:Decrypt on the resource"),
        PermissionDeniedError,
        "kms:Decrypt",
    ),
)


@pytest.mark.parametrize("action", [write, read, list_names], ids=lambda act: act.__name__)
@pytest.mark.parametrize(("refuse", "kind", "said"), REFUSALS, ids=["virtual", "payer", "kms"])
def test_a_refusal_says_the_same_to_all_three(
    refuse: Callable[[Seen], tuple[int, str, str] | None],
    kind: type[TensorserveError],
    said: str,
    action: Callable[[str, Access], object],
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And names the setting that mends it."""
    front = way.front(Front(way.server.port, refuse=refuse))
    access = access_of(way.keys | {"AWS_ENDPOINT_URL_S3": front.url}, monkeypatch)
    with pytest.raises(kind, match=said):
        action(f"s3://{BUCKET}/refused", access)


@pytest.mark.parametrize("action", [write, read, list_names], ids=lambda act: act.__name__)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_wants_a_password_is_named(
    scheme: str,
    action: Callable[[str, Access], object],
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the one that was given, and at once."""
    proxy = way.front(Front(way.server.port, password="u:right"))
    variables = {
        "AWS_ENDPOINT_URL_S3": f"{scheme}://{DOMAIN}",
        f"{scheme.upper()}_PROXY": f"http://u:canary@127.0.0.1:{proxy.port}",
    }
    access = access_of(way.keys | variables, monkeypatch)
    with pytest.raises(PermissionDeniedError, match="407") as caught:
        action(f"s3://{BUCKET}/refused", access)
    assert "canary" not in str(caught.value)
    assert len(proxy.seen) == 1 or scheme == "https"
