"""A14: an older chunk, or an older header with it, sealed with the same key, is slipped in."""

from __future__ import annotations

from pathlib import Path

import pytest
from sealed_versions import MIB, READERS, Version, file_key, load, make_version
from two_versions import TwoVersions

from tensorserve.errors import CorruptError

# A server that says it is one and the same object, and whose answers are bound to it.
CONSTANT = {"ETag": '"constant"'}


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, Version]:
    folder: Path = tmp_path_factory.mktemp("versions")
    return make_version(folder, 1), make_version(folder, 2)


@pytest.mark.parametrize("reader", READERS)
def test_an_older_header_with_its_chunk_is_not_mixed_in(
    versions: tuple[Version, Version], reader: str
) -> None:
    """Header and chunk 0 of t05 come from the older version the first time, all else is current.

    The older header opens the older chunk, and only the next chunk does not fit. The manifest and
    the ETag are right all the time.
    """
    old, new = versions
    record = new.record("t05")
    taken: dict[str, str] = {}
    with TwoVersions(old.data, new.data, CONSTANT) as server:
        server.old_at_first(record.header_offset, record.data_offset + 2 * MIB)
        load(server.uri, taken, key=file_key(), headers_sha256=new.headers_sha256, reader=reader)
    assert server.served_old == record.header_length + 2 * MIB
    assert taken == new.digests


@pytest.mark.parametrize("reader", READERS)
def test_an_older_header_is_refused_with_all_of_its_tensor(
    versions: tuple[Version, Version], reader: str
) -> None:
    """t05 is the older version's as a whole, and opens; the digest of all headers tells it."""
    old, new = versions
    record = new.record("t05")
    taken: dict[str, str] = {}
    with TwoVersions(old.data, new.data, CONSTANT) as server:
        server.old_at_first(record.header_offset, record.end)
        with pytest.raises(CorruptError, match="not those of the manifest") as caught:
            load(
                server.uri,
                taken,
                key=file_key(),
                headers_sha256=new.headers_sha256,
                connections=1,
                reader=reader,
            )
    assert caught.value.exit_code == 65
    assert server.served_old == record.end - record.header_offset
    assert len(taken) < len(new.digests)


@pytest.mark.parametrize("reader", READERS)
def test_an_older_chunk_alone_does_not_open(versions: tuple[Version, Version], reader: str) -> None:
    """It is read once more; what comes then is the current one."""
    old, new = versions
    record = new.record("t05")
    taken: dict[str, str] = {}
    with TwoVersions(old.data, new.data, CONSTANT) as server:
        server.old_at_first(record.data_offset + 2 * MIB, record.data_offset + 4 * MIB)
        load(server.uri, taken, key=file_key(), headers_sha256=new.headers_sha256, reader=reader)
    assert server.served_old == 2 * MIB
    assert taken == new.digests


def test_a_consumer_that_stops_early_is_an_error() -> None:
    """The digest of all headers is compared when the last tensor is taken: a model that asks for
    fewer would be served unchecked.
    """
    import torch
    from torch import nn

    from tensorserve.engine.parameters import give

    class TakesOne(nn.Module):
        def load_weights(self, weights: object) -> set[str]:
            return {next(iter(weights))[0]}  # type: ignore[call-overload]

    tensors = iter([("first", torch.zeros(1)), ("second", torch.zeros(1))])
    with pytest.raises(CorruptError, match=r"took no more after 'first'.*'second'"):
        give(TakesOne(), tensors)
