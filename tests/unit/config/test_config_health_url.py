"""How readiness is probed, for each flag of `vllm serve` that decides it."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

from tensorserve.config.launch_plan import make_plan
from tensorserve.config.settings import Settings
from tensorserve.errors import ConfigurationError
from tensorserve.telemetry.probe import socket_of, split_health_url


def url(*arguments: str, **variables: str) -> str:
    environ = {f"TENSORSERVE_{name}": value for name, value in variables.items()}
    settings = Settings.from_environment({"TENSORSERVE_MODEL_URI": "/m", **environ})
    return make_plan(settings, arguments).health_url


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "http://127.0.0.1:8000/health"),
        ({"HOST": "::"}, "http://[::1]:8000/health"),
        ({"HOST": "[::]"}, "http://[::1]:8000/health"),
        ({"HOST": "fd00::7"}, "http://[fd00::7]:8000/health"),
        ({"HOST": "10.1.2.3", "PORT": "9001"}, "http://10.1.2.3:9001/health"),
        ({"HOST": "engine.internal"}, "http://engine.internal:8000/health"),
        ({"VLLM_SSL_CERTFILE": "/c"}, "https://127.0.0.1:8000/health"),
        ({"VLLM_SSL_CERTFILE": "/c", "VLLM_SSL_CERT_REQS": "1"}, "https://127.0.0.1:8000/health"),
        ({"VLLM_SSL_CERTFILE": "/c", "VLLM_SSL_CERT_REQS": "2"}, "tls://127.0.0.1:8000/health"),
        ({"VLLM_SSL_CERT_REQS": "2"}, "http://127.0.0.1:8000/health"),
        ({"VLLM_UDS": "/run/a b.sock"}, "http+unix://%2Frun%2Fa%20b.sock/health"),
        ({"VLLM_UDS": "/s", "HOST": "10.1.2.3"}, "http+unix://%2Fs/health"),
        ({"VLLM_UDS": "/s", "VLLM_SSL_CERTFILE": "/c"}, "https+unix://%2Fs/health"),
        (
            {"VLLM_UDS": "/s", "VLLM_SSL_CERTFILE": "/c", "VLLM_SSL_CERT_REQS": "2"},
            "tls+unix://%2Fs/health",
        ),
        ({"VLLM_GRPC": "true"}, "tcp://127.0.0.1:8000/health"),
        (
            {"VLLM_DATA_PARALLEL_MULTI_PORT_EXTERNAL_LB": "true", "VLLM_DATA_PARALLEL_SIZE": "2"},
            "http://127.0.0.1:9256/health",
        ),
        (
            {
                "VLLM_DATA_PARALLEL_MULTI_PORT_EXTERNAL_LB": "true",
                "VLLM_DATA_PARALLEL_SUPERVISOR_PORT": "9300",
                "VLLM_SSL_CERTFILE": "/c",
            },
            "https://127.0.0.1:9300/health",
        ),
        ({"VLLM_DATA_PARALLEL_MULTI_PORT_EXTERNAL_LB": "false"}, "http://127.0.0.1:8000/health"),
        ({"VLLM_ROOT_PATH": "/api"}, "http://127.0.0.1:8000/health"),
        ({"VLLM_API_KEY": "k"}, "http://127.0.0.1:8000/health"),
        ({"VLLM_API_SERVER_COUNT": "2"}, "http://127.0.0.1:8000/health"),
    ],
)
def test_the_probe_follows_the_flags(variables: dict[str, str], expected: str) -> None:
    """Where vLLM listens, and what it speaks there."""
    assert url(**variables) == expected


def test_a_further_machine_without_an_api_is_no_mistake() -> None:
    """deploy/kubernetes/leaderworkerset starts its workers so."""
    assert url("--api-server-count=0") == "http://127.0.0.1:8000/health"


def test_flags_behind_the_dashes_decide_too() -> None:
    """They win over variables, in both spellings."""
    assert url("--uds", "/b", VLLM_UDS="/a") == "http+unix://%2Fb/health"
    words = ("--ssl_certfile=/c", "--ssl-cert-reqs", "2")
    assert url(*words) == "tls://127.0.0.1:8000/health"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"VLLM_UDS": "run/api.sock"}, "not an absolute path"),
        ({"VLLM_UDS": "/" + "a" * 107}, "108 bytes"),
        ({"VLLM_SSL_KEYFILE": "/k"}, "without --ssl-certfile"),
        ({"VLLM_API_SERVER_COUNT": "-1"}, "no number of servers"),
        (
            {
                "VLLM_DATA_PARALLEL_MULTI_PORT_EXTERNAL_LB": "true",
                "VLLM_DATA_PARALLEL_SUPERVISOR_PORT": "70000",
            },
            "is no port",
        ),
    ],
)
def test_what_could_never_be_ready_is_refused(variables: dict[str, str], said: str) -> None:
    """By `plan`, with the reason."""
    with pytest.raises(ConfigurationError, match=said):
        url(**variables)


def test_a_server_that_outlives_its_engine_needs_more_than_tls() -> None:
    """It would be ready for ever; with /health it is not."""
    environ = {
        "TENSORSERVE_MODEL_URI": "/m",
        "TENSORSERVE_VLLM_SSL_CERTFILE": "/c",
        "TENSORSERVE_VLLM_SSL_CERT_REQS": "2",
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "1",
    }
    with pytest.raises(ConfigurationError, match="ready for ever"):
        make_plan(Settings.from_environment(environ))
    make_plan(Settings.from_environment(environ | {"TENSORSERVE_VLLM_SSL_CERT_REQS": "1"}))


def test_an_engine_without_a_server_is_refused() -> None:
    """--headless serves nothing that could be asked."""
    with pytest.raises(ConfigurationError, match="cannot be set"):
        url(VLLM_HEADLESS="true")


def test_a_probes_address_is_read_as_it_was_written() -> None:
    """By the exporter, from the event log."""
    assert split_health_url("tls://[::1]:8000/health") == ("tls", "::1", 8000)
    there = url(VLLM_UDS="/run/a%2Fb c.sock")
    assert split_health_url(there) == ("http", "/run/a%2Fb c.sock", None)
    assert socket_of(there) == Path("/run/a%2Fb c.sock")
    assert socket_of(url()) is None


# Flags of the front end that were looked at in vLLM 0.32.0.
DECIDE = """host port grpc_port data_parallel_supervisor_port uds ssl_keyfile ssl_certfile
    ssl_cert_reqs""".split()
# The same /health, whatever they say: routers, logging, answers of other routes, CORS (which is for
# browsers), the server certificate's chain, and headers, of which a probe has two.
LEAVE = """dp_supervisor_probe_interval_s dp_supervisor_probe_timeout_s
    dp_supervisor_probe_failure_threshold uvicorn_log_level disable_uvicorn_access_log
    disable_access_log_for_endpoints allow_credentials allowed_origins allowed_methods
    allowed_headers api_key ssl_ca_certs enable_ssl_refresh ssl_ciphers root_path middleware
    enable_request_id_headers disable_fastapi_docs h11_max_incomplete_event_size
    h11_max_header_count enable_offline_docs enable_flash_late_interaction""".split()


def test_every_flag_of_vllms_server_was_looked_at() -> None:
    """A new version's new flag may put /health elsewhere."""
    (vllm,) = importlib.util.find_spec("vllm").submodule_search_locations  # type: ignore
    source = Path(vllm, "entrypoints/launchers/cli_args.py").read_text()
    (front_end,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "FrontendArgs"
    )
    names = {n.target.id for n in front_end.body if isinstance(n, ast.AnnAssign)}  # type: ignore
    assert names == {*DECIDE, *LEAVE}
