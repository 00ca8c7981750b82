"""F6–F9: objects that are replaced, damaged or cut off, and keys that do not open them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from commands import command
from loading import Load, load
from proxy import Asked, FaultProxy
from stored import ATTEMPTS, BUCKET, MIB, OTHER_KEY, POLICY, Stored, plain_bundle

from rangeserver import RangeServer
from tensorserve.bundle.keys import GivenKey
from tensorserve.bundle.tensors_file import open_tensors
from tensorserve.errors import CorruptError, WrongKeyError
from tensorserve.format import read_index
from tensorserve.sources import Access, NotFoundError
from tensorserve.sources.local import LocalSource


def corrupt(stored: Stored, proxy: FaultProxy, *, connections: int = 4) -> CorruptError:
    """The load ends with exit code 65, and gave out nothing but what was packed."""
    partial = Load()
    access = stored.access(proxy.url)
    with pytest.raises(CorruptError) as caught:
        load(stored.uri, access, stored.key, partial, connections=connections)
    assert caught.value.exit_code == 65
    assert partial.digests.items() < stored.digests.items()
    return caught.value


# F6 -----------------------------------------------------------------------------------------------


def test_f6_an_object_replaced_in_the_middle_is_fatal(
    stored: Stored, other: Stored, proxy: FaultProxy
) -> None:
    """F6: truly uploaded anew, same size, names and key: only its version tells them apart."""
    mine = stored.copy("f6-replaced")
    assert len(other.data) == len(stored.data)
    proxy.add("none", beyond=8 * MIB, hook=lambda _: mine.put(other.data))
    assert "was replaced" in str(corrupt(mine, proxy))
    assert proxy.fired == {"none": 1}
    # And from now on it is the other one, whole.
    after = load(mine.uri, mine.access(proxy.url), mine.key)
    assert after.digests == other.digests != stored.digests


def test_f6_replaced_while_a_range_is_on_its_way(
    stored: Stored, other: Stored, proxy: FaultProxy
) -> None:
    """F6 upon F1: what is left of a broken range is not taken from another object."""
    mine = stored.copy("f6-broken")
    proxy.add(
        "reset", after=300_000, at=stored.inside("embed"), hook=lambda _: mine.put(other.data)
    )
    # With more, another one reads the rest while the upload takes its time: all of the old object.
    assert "was replaced" in str(corrupt(mine, proxy, connections=1))
    assert proxy.fired == {"reset": 1}


@pytest.mark.parametrize("what", ["longer", "shorter", "deleted"])
def test_f6_another_size_or_nothing_is_fatal_too(
    stored: Stored, proxy: FaultProxy, what: str
) -> None:
    """F6: an upload of something else, or a clean-up that came too early."""
    mine = stored.copy(f"f6-{what}")

    def change(_: Asked) -> None:
        if what == "deleted":
            mine.client().delete_object(Bucket=BUCKET, Key=mine.name)
        else:
            mine.put(stored.data + b"x" if what == "longer" else stored.data[: 9 * MIB])

    proxy.add("none", beyond=10 * MIB, hook=change)
    error = corrupt(mine, proxy)
    assert isinstance(error, NotFoundError) == (what == "deleted")
    assert proxy.fired == {"none": 1}


def test_f6_replaced_between_the_check_and_the_load(
    stored: Stored, other: Stored, proxy: FaultProxy
) -> None:
    """F6: the worker finds another version than the one that was checked."""
    mine = stored.copy("f6-checked")
    access = mine.access(proxy.url)
    checked = open_tensors(mine.uri, access, mine.key)
    checked.source.close()
    mine.put(other.data)
    with pytest.raises(CorruptError, match="since this start checked it") as caught:
        load(mine.uri, access, mine.key, version=checked.source.version)
    assert caught.value.exit_code == 65


# F7 -----------------------------------------------------------------------------------------------


def test_f7_a_wrong_key_ends_it_at_the_first_chunk(stored: Stored, proxy: FaultProxy) -> None:
    """F7: a few small reads; the message names where the key came from, never the key."""
    partial = Load()
    wrong = GivenKey(OTHER_KEY, "TENSORSERVE_KEY_FILE=/run/secrets/model")
    with pytest.raises(WrongKeyError, match="/run/secrets/model") as caught:
        load(stored.uri, stored.access(proxy.url), wrong, partial)
    assert caught.value.exit_code == 65
    assert not partial.digests
    assert not partial.retries
    asked = [r for r in proxy.requests if r.first]
    assert sum(r.last - r.first + 1 for r in asked) < 8 * MIB
    assert OTHER_KEY.hex() not in str(caught.value)


# F8 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed", "head", "layers.0.weight", "layers.3.norm"])
def test_f8_a_bit_flipped_on_the_wire_costs_one_more_read(
    stored: Stored, proxy: FaultProxy, name: str
) -> None:
    """F8: in a tensor of many chunks, of some, and in a small one.

    One connection: with more, another may take over what the flip hits, and nobody see it.
    """
    proxy.add("flip", at=stored.inside(name))
    done = load(stored.uri, stored.access(proxy.url), stored.key, connections=1)
    assert done.digests == stored.digests
    assert proxy.fired == {"flip": 1}
    assert done.retries == {"corrupt": 1}


def test_f8_bits_flipped_in_many_places(stored: Stored, proxy: FaultProxy) -> None:
    """F8: a bad network card, with broken connections on top."""
    # A request meets one fault, and has 8 MiB at the most.
    embed = next(r for r in stored.index.tensors if r.name == "embed")
    places = [embed.data_offset + 3 * MIB, embed.data_offset + 12 * MIB]
    for place in places:
        proxy.add("flip", at=place)
    proxy.add("reset", after=200_000, times=2)
    done = load(stored.uri, stored.access(proxy.url), stored.key, connections=1)
    assert done.digests == stored.digests
    assert proxy.fired == {"flip": len(places), "reset": 2}
    assert done.retries["corrupt"] == len(places)


@pytest.mark.parametrize("name", ["embed", "layers.3.norm"])
def test_f8_a_bit_flipped_at_rest_ends_the_load(
    stored: Stored, proxy: FaultProxy, name: str
) -> None:
    """F8: the real object is damaged; it is read once more, then exit code 65 with the tensor."""
    place = stored.inside(name)
    data = bytearray(stored.data)
    data[place] ^= 1
    mine = stored.copy("f8-at-rest", bytes(data))
    partial = Load()
    with pytest.raises(CorruptError, match=name) as caught:
        load(mine.uri, mine.access(proxy.url), mine.key, partial)
    assert caught.value.exit_code == 65
    assert partial.retries == {"corrupt": 1}
    assert partial.digests.items() < stored.digests.items()
    assert name not in partial.digests


def test_f8_a_bit_that_flips_at_each_read_ends_the_load(stored: Stored, proxy: FaultProxy) -> None:
    """F8: one re-fetch, not twelve."""
    proxy.add("flip", times=0, at=stored.inside("embed"))
    assert "embed" in str(corrupt(stored, proxy))
    assert proxy.fired["flip"] == 2


def test_f8_hashes_protect_a_plain_file_where_asked_for(stored: Stored, tmp_path: Path) -> None:
    """F8: there is no tag; with TENSORSERVE_VERIFY=hashes it is not given out, exit code 65."""
    bundle = plain_bundle(tmp_path)
    opened = LocalSource(bundle / "model.tensors")
    embed = next(r for r in read_index(opened).tensors if r.name == "embed")
    opened.close()
    with RangeServer(bundle) as server, FaultProxy(server.url) as proxy:
        uri, access = f"{proxy.url}/model.tensors", Access(policy=POLICY)
        proxy.add("flip", at=embed.data_offset + 5 * MIB)
        done = load(uri, access, None, verify_hashes=True)
        assert done.digests == stored.digests
        assert (done.retries, proxy.fired) == ({"corrupt": 1}, {"flip": 1})
        proxy.add("flip", at=embed.data_offset + 5 * MIB, times=0)
        partial = Load()
        with pytest.raises(CorruptError, match="embed") as caught:
            load(uri, access, None, partial, verify_hashes=True)
    assert caught.value.exit_code == 65
    assert partial.digests.items() < stored.digests.items()
    assert proxy.fired["flip"] == 3


def header_byte(stored: Stored) -> int:
    """A byte of the large tensor's header, where its hashes and tags stand."""
    record = next(r for r in stored.index.tensors if r.name == "embed")
    return record.header_offset + record.header_length // 2


def test_f8_a_header_bit_flipped_at_rest_ends_the_load(stored: Stored, proxy: FaultProxy) -> None:
    """F8: exit code 65."""
    data = bytearray(stored.data)
    data[header_byte(stored)] ^= 1
    corrupt(stored.copy("f8-header", bytes(data)), proxy)


@pytest.mark.parametrize("place", [3, 40, 300, 700])
def test_f8_a_file_head_bit_flipped_at_rest_is_never_used(
    stored: Stored, proxy: FaultProxy, place: int
) -> None:
    """F8: magic, header, index: noticed before a tensor is given out, exit code 65."""
    data = bytearray(stored.data)
    data[place] ^= 1
    mine = stored.copy("f8-index", bytes(data))
    partial = Load()
    with pytest.raises(CorruptError) as caught:
        load(mine.uri, mine.access(proxy.url), mine.key, partial)
    assert caught.value.exit_code == 65


def test_f8_a_header_bit_flipped_on_the_wire_is_read_again(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F8: as in its data."""
    proxy.add("flip", at=header_byte(stored))
    done = load(stored.uri, stored.access(proxy.url), stored.key)
    assert done.digests == stored.digests
    assert proxy.fired == {"flip": 1}


def test_f8_a_bit_flipped_on_the_wire_in_the_index_is_read_again(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F8: as in a tensor's data."""
    proxy.add("none", at=300)  # the first look, of which only size and version are used
    proxy.add("flip", at=300)
    done = load(stored.uri, stored.access(proxy.url), stored.key)
    assert done.digests == stored.digests
    assert proxy.fired["flip"] == 1


def test_f8_a_bit_flipped_as_the_key_is_proven_is_read_again(
    stored: Stored, proxy: FaultProxy
) -> None:
    """F8: the key's witness is a tensor like others; it is neither a wrong key nor damage."""
    smallest = min(stored.index.tensors, key=lambda r: (r.length, r.data_offset))
    proxy.add("flip", at=smallest.data_offset)
    done = load(stored.uri, stored.access(proxy.url), stored.key)
    assert done.digests == stored.digests
    assert proxy.fired == {"flip": 1}


def test_f8_a_damaged_object_ends_the_commands_with_65(stored: Stored, proxy: FaultProxy) -> None:
    """F8: `tensorserve verify` reads all of it and names what is damaged."""
    data = bytearray(stored.data)
    data[stored.inside("head")] ^= 1
    mine = stored.copy("f8-verify", bytes(data))
    code, text = command(mine, proxy, "verify", f"s3://{BUCKET}/f8-verify")
    assert code == 65, text
    assert "head" in text


# F9 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [15 * MIB, 500, 10, 0])
def test_f9_a_truncated_object_is_found_before_any_tensor(
    stored: Stored, proxy: FaultProxy, left: int
) -> None:
    """F9: an upload that broke off, wherever it did."""
    mine = replace(stored.copy("f9-truncated"), data=stored.data[:left])
    mine.put(mine.data)
    partial = Load()
    with pytest.raises(CorruptError) as caught:
        load(mine.uri, mine.access(proxy.url), mine.key, partial)
    assert caught.value.exit_code == 65
    assert not partial.digests
    assert sum(r.last - r.first + 1 for r in proxy.requests) < 2 * MIB


def test_f9_a_missing_shard_is_found_before_anything_is_started(
    stored: Stored, proxy: FaultProxy, tmp_path: Path
) -> None:
    """F9: two ranks, one file; `tensorserve check` ends with exit code 65 and the name."""
    prefix = "f9-shards"
    put = stored.client().put_object
    put(Bucket=BUCKET, Key=f"{prefix}/model-rank-000.tensors", Body=stored.data)
    put(Bucket=BUCKET, Key=f"{prefix}/config.json", Body=b"{}")
    code, text = command(
        stored,
        proxy,
        "check",
        TENSORSERVE_MODEL_URI=f"s3://{BUCKET}/{prefix}",
        TENSORSERVE_VLLM_TENSOR_PARALLEL_SIZE="2",
        TENSORSERVE_STATE_DIR=str(tmp_path / "state"),
    )
    assert code == 65, text
    assert "model-rank-001.tensors does not exist" in text
    missing = [r for r in proxy.requests if r.path.endswith("001.tensors")]
    assert missing
    assert len(missing) < ATTEMPTS, "a missing file is not tried again"
