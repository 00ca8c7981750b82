"""The state directory: ours, private, writable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorserve.errors import ConfigurationError
from tensorserve.launch.preflight import prepare_state_dir


def test_a_state_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    """In a shared /tmp somebody else could have made it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is a link"):
        prepare_state_dir(tmp_path / "state")


def test_a_state_directory_is_made_private(tmp_path: Path) -> None:
    """0700, also where it existed with more."""
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    prepare_state_dir(state)
    assert state.stat().st_mode & 0o777 == 0o700


def test_a_state_directory_below_a_file_says_what_to_do(tmp_path: Path) -> None:
    """F10."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="TENSORSERVE_STATE_DIR"):
        prepare_state_dir(tmp_path / "file" / "state")
