"""Where API and metrics are to listen, and cannot."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight import check_port
from tensorserve.launch.preflight.listening import check_socket


def test_an_address_that_is_not_ours_is_said_as_such() -> None:
    """Not "in use": there is no such address here."""
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        check_port("API", "192.0.2.1", 8000)


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "\udcff"])
def test_what_is_no_host_name_is_said(host: str) -> None:
    """Not Python's UnicodeError."""
    with pytest.raises(ConfigurationError, match="cannot listen"):
        check_port("API", host, 8000)


def listening(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made


def test_a_unix_socket_can_be_bound(tmp_path: Path) -> None:
    """Nothing is left of the trial."""
    assert "can be bound" in check_socket(tmp_path / "s").found
    assert not list(tmp_path.iterdir())


def test_a_socket_that_somebody_left_is_removed(tmp_path: Path) -> None:
    """vLLM does not, and could not bind it in a container that is started again."""
    listening(tmp_path / "s").close()
    check_socket(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_socket_that_somebody_listens_on_is_in_use(tmp_path: Path) -> None:
    """It is left alone."""
    with listening(tmp_path / "s"), pytest.raises(ConfigurationError, match="listens on"):
        check_socket(tmp_path / "s")
    assert (tmp_path / "s").exists()


def test_a_file_in_the_place_of_a_socket_is_not_removed(tmp_path: Path) -> None:
    """It may be anything."""
    (tmp_path / "s").write_text("mine")
    with pytest.raises(ConfigurationError, match="something else"):
        check_socket(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "mine"


def test_a_socket_in_no_directory_says_what_to_do(tmp_path: Path) -> None:
    """The usual mistake: the volume is not mounted."""
    with pytest.raises(ConfigurationError, match="mount a volume"):
        check_socket(tmp_path / "no/s")
