"""Do the inputs that the fuzzer found worth keeping still end as they should?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "fuzz"
sys.path.append(str(FUZZ))
from index_target import AS_FILE, AS_REPAIRED_FILE, check  # noqa: E402

CORPUS = sorted((FUZZ / "corpus").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_an_input_is_read_or_refused(path: Path) -> None:
    """CorruptError or an index that keeps every promise and says the same to tensorizer."""
    check(path.read_bytes())


def test_the_corpus_holds_both_kinds_and_is_small() -> None:
    """Inputs that are accepted take the fuzzer deepest; git has to carry them all."""
    assert {check(path.read_bytes()) for path in CORPUS} == {"accepted", "refused"}
    assert sum(path.stat().st_size for path in CORPUS) < 200_000


def test_the_repair_lets_sound_files_through() -> None:
    """Most of them: it takes an index to end with its entries, and a padded one goes on."""
    sound = [data for path in CORPUS if check(data := path.read_bytes()) == "accepted"]
    files = [data[1:] for data in sound if data[0] % 4 == AS_FILE]
    ends = [check(bytes([AS_REPAIRED_FILE]) + data) for data in files]
    assert ends.count("accepted") > len(ends) // 2
