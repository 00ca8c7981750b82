"""A failed load names the other reader where the reader may be to blame, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from tensorserve.errors import (
    ConfigurationError,
    CorruptError,
    PermissionDeniedError,
    SourceUnavailableError,
    TensorserveError,
    WrongKeyError,
)
from tensorserve.format import TagMismatchError
from tensorserve.loading.reader_hint import load_failure
from tensorserve.sources import NotFoundError, ReplacedError

NAMED = "TENSORSERVE_LOADER=reference"


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (CorruptError("the headers are not those of the manifest", hint="Pack it again."), 65),
        (TagMismatchError("chunk 3 fails authentication"), 65),
        (TensorserveError("a mistake of ours"), 70),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), 70),
        (torch.OutOfMemoryError("CUDA out of memory"), 70),
        (RuntimeError("the load has ended"), 70),
        (AssertionError(), 70),
        (KeyError("weight"), 70),
        (ValueError("memoryview assignment: lvalue and rvalue have different structures"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_may_be_the_readers_fault_names_the_other_one(
    error: Exception, exit_code: int
) -> None:
    """With the cause still in the message, and the hint that it had."""
    hint = getattr(error, "hint", None) or ""
    failure = load_failure(error, "auto")
    assert failure.exit_code == exit_code
    assert str(error.args[0] if error.args else "AssertionError") in failure.message
    assert NAMED in str(failure)
    assert hint in str(failure)
    assert isinstance(error, TensorserveError) == (failure is error)


@pytest.mark.parametrize(
    "error",
    [
        WrongKeyError("the key does not open it", hint="It is another file's key."),
        PermissionDeniedError("no credentials"),
        SourceUnavailableError("503"),
        ConfigurationError("no memory for the passphrase"),
        NotFoundError("it does not exist"),
        ReplacedError("it was replaced while it was read"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_both_readers_would_say_does_not(error: TensorserveError) -> None:
    """Another reader of the same bytes, with the same key, would mislead."""
    before = str(error)
    assert load_failure(error, "auto") is error
    assert str(error) == before


def test_the_reference_reader_does_not_name_itself() -> None:
    """A file that both refuse is damaged."""
    assert NAMED not in str(load_failure(CorruptError("damaged"), "reference"))
    assert NAMED not in str(load_failure(RuntimeError("CUDA error"), "reference"))


def test_it_is_named_once_however_often_it_is_raised() -> None:
    """A device's error passes two places."""
    failure = load_failure(RuntimeError("CUDA error"), "auto")
    assert str(load_failure(failure, "auto")).count(NAMED) == 1
