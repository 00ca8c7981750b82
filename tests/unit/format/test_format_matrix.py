"""Does every shape, layout, dtype, name and count of tensors come out as tensorizer reads it?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

from tensors_samples import (
    FixedKey,
    MemorySource,
    compact,
    encryption,
    tensor_bytes,
    tensorizer_reads,
    we_read,
    write,
)
from tensorserve.bundle.keys import parse_passphrase
from tensorserve.errors import CorruptError
from tensorserve.format import ITEM_SIZES, FileKey, TagMismatchError, read_header, read_index
from tensorserve.secret import Secret

SEALINGS = ("plain", "key", "passphrase")
Found = dict[str, tuple[str, tuple[int, ...], bytes]]


def _key(kind: str) -> FileKey | None:
    if kind == "passphrase":
        return parse_passphrase(Secret("correct horse battery staple"))
    return FixedKey() if kind == "key" else None


def _noise(count: int, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(dotted name, tensor) of what tensorizer makes of a file."""
    if isinstance(tree, torch.Tensor):
        yield prefix, tree
        return
    assert isinstance(tree, (Mapping, Sequence))
    pairs = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in pairs:
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _described(tensors: Any) -> Found:
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor_bytes(tensor) if not tensor.is_meta else b"",
        )
        for name, tensor in _leaves(tensors)
    }


def _all_three_agree(content: Any, kind: str) -> Found:
    """What was written, what tensorizer reads, what we read: the same."""
    data = write(content, encryption(kind))
    ours = {name: found[1:] for name, found in we_read(data, _key(kind)).items()}
    assert ours == _described(tensorizer_reads(data, kind))
    assert ours == _described(content)
    return ours


@pytest.mark.parametrize("kind", SEALINGS)
def test_every_dtype_that_torch_has_and_tensorizer_writes(kind: str) -> None:
    """A dtype that a later torch brings fails here, not at a user's."""
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    quantized = {name for name in names if name.startswith(("qint", "quint"))}

    content = {
        name: _noise(3 * ITEM_SIZES[name]).view(getattr(torch, name)).reshape(1, 3)
        for name in sorted(names - quantized - {"bool"})
    } | {"bool": _noise(9) % 2 == 0}

    assert _all_three_agree(content, kind).keys() == ITEM_SIZES.keys()
    for name in quantized:  # tensorizer does not write them either
        assert name not in ITEM_SIZES


@pytest.mark.parametrize("kind", SEALINGS)
def test_layouts_in_memory_do_not_matter(kind: str) -> None:
    """Transposed, strided, expanded, channels-last and offset views are stored row by row."""
    base = _noise(4 * 3 * 5 * 2).view(torch.int16).reshape(4, 3, 5)
    content = {
        "transposed": base.transpose(0, 2),
        "every_other": base[::2, :, ::2],
        "expanded": base[:1].expand(6, 3, 5),
        "channels_last": base.reshape(1, 4, 3, 5).contiguous(memory_format=torch.channels_last),
        # A clone: tensorizer seals contiguous data in place, while it copies the others from it.
        "tail": base.clone()[3],
        "bfloat16_transposed": base.view(torch.bfloat16).permute(2, 0, 1),
    }

    _all_three_agree(content, kind)


@pytest.mark.parametrize("kind", SEALINGS)
def test_shapes_of_every_number_of_dimensions(kind: str) -> None:
    """None, one, and as many as numpy (and so tensorizer) has."""
    content = {
        "none": torch.tensor(3.25),
        "none_opaque": torch.tensor(1.5, dtype=torch.float8_e4m3fn),
        "one": _noise(1),
        "many": _noise(2**6).reshape((2,) * 6 + (1,) * 58),
    }

    assert len(_all_three_agree(content, kind)["many"][1]) == 64


@pytest.mark.parametrize("kind", SEALINGS)
@pytest.mark.parametrize("chunk", [-1, 0, 1])
def test_data_around_the_ends_of_chunks(kind: str, chunk: int) -> None:
    """A chunk less a byte, a whole chunk, a byte more; likewise for three chunks."""
    size = 2 * 1024**2
    content = {"one": _noise(size + chunk), "three": _noise(3 * size + chunk), "small": _noise(3)}
    data = write(content, encryption(kind))
    source = MemorySource(data)
    index = read_index(source)

    assert _described(content) == {
        name: found[1:] for name, found in we_read(data, _key(kind)).items()
    }
    if kind != "plain":
        chunks = [read_header(source, record, index).chunks for record in index.tensors]
        more = chunk > 0
        assert [c.count for c in chunks if c is not None] == [1 + more, 3 + more, 1]


def test_empty_tensors() -> None:
    """Of no elements, in whichever dimension; tensorizer can write them in plain files only."""
    content = {
        "first": torch.empty(0),
        "middle": torch.empty((3, 0, 2), dtype=torch.float16),
        "between": _noise(5),
        "last": torch.empty((2**31, 0), dtype=torch.int64),
    }

    _all_three_agree(content, "plain")
    with pytest.raises(IndexError):
        write(content, encryption("key"))


def test_an_empty_tensor_of_an_opaque_dtype() -> None:
    """We read what tensorizer writes and cannot read itself (numpy knows no "<V2\\0torch…")."""
    data = write({"empty": torch.empty((0, 3), dtype=torch.bfloat16)})

    assert we_read(data)["empty"][1:] == ("bfloat16", (0, 3), b"")
    with pytest.raises(TypeError, match="not understood"):
        tensorizer_reads(data)


@pytest.mark.parametrize("kind", SEALINGS)
def test_meta_tensors_have_no_data_here_and_zeros_in_tensorizer(kind: str) -> None:
    """Whoever uses them has to decide; names, dtypes and shapes agree."""
    content = {
        "before": _noise(4),
        "meta": torch.empty((2, 3), dtype=torch.float16, device="meta"),
        "after": _noise(4),
    }
    data = write(content, encryption(kind))
    ours, theirs = we_read(data, _key(kind)), tensorizer_reads(data, kind)

    for name, tensor in content.items():
        assert ours[name][1:3] == _described(theirs)[name][:2]
        if tensor.is_meta:
            assert ours[name][3] == b""
            assert not theirs[name].any()


def test_a_meta_tensor_without_dimensions_is_taken_where_plain() -> None:
    """tensorizer writes one element of whatever memory it got, seldom with the right hash.

    It never seals it: in an encrypted file that is plain data where sealed data should be.
    """
    content = {"x": _noise(4), "m": torch.empty((), dtype=torch.int64, device="meta")}

    assert len(we_read(write(content), verify=False)["m"][3]) == 8
    with pytest.raises(CorruptError, match="tensor 'm': its data is not sealed"):
        we_read(write(content, encryption("key")), FixedKey())


NAMES = {
    "ascii": "model.layers.0.self_attn.q_proj.weight",
    "umlauts": "schlüssel.größe",
    "composed": "\u00e9",
    "decomposed": "e\u0301",
    "cjk": "層.重み",
    "beyond the first plane": "🤗.𝔴𝔢𝔦𝔤𝔥𝔱",
    "right to left": "משקל",
    "spaces": "  a b  ",
    "dots": "...",
    "slashes": "../../etc/passwd",
    "line breaks": "a\nb\r\n",
    "a NUL": "a\0b",
    "escape sequence": "\x1b[31mred",
    "a record separator inside": "a\x1e[1]",
    "braces and percent": "%s {0} ${HOME}",
    "longest": "n" * 65535,
    "longest not ASCII": "é" * 32767,
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("kind", ["plain", "key"])
def test_names_come_as_they_were_written(case: str, kind: str) -> None:
    """No normalisation, no trimming, nothing cut."""
    assert list(_all_three_agree({NAMES[case]: _noise(3)}, kind)) == [NAMES[case]]


def test_names_that_look_alike_are_different_tensors() -> None:
    """Unicode's two ways to write é, and lower from upper case."""
    content = {"\u00e9": _noise(1, 1), "e\u0301": _noise(1, 2), "E": _noise(1, 3), "e": _noise(1)}

    assert len(_all_three_agree(content, "plain")) == 4


@pytest.mark.parametrize("kind", SEALINGS)
def test_structures_of_dicts_lists_and_tuples(kind: str) -> None:
    """All that tensorizer flattens: mappings with text keys, sequences, at any depth."""
    content = {
        "list": [_noise(1, 1), [_noise(2, 2), {"deep": [_noise(3, 3)]}]],
        "tuple": (_noise(4, 4), _noise(5, 5)),
        "dict": {"a.b": {"c": _noise(6, 6)}, 'quo"te': _noise(7, 7), "ümlaut": _noise(8, 8)},
        "flat": _noise(9, 9),
    }

    assert list(_all_three_agree(content, kind)) == [
        *("list.0", "list.1.0", "list.1.1.deep.0", "tuple.0", "tuple.1"),
        *("dict.a.b.c", 'dict.quo"te', "dict.ümlaut", "flat"),
    ]


def test_two_places_of_one_dotted_name_are_refused() -> None:
    """tensorizer tells ["a"]["b"] from ["a.b"]; torch's names cannot, so we do not guess."""
    data = write({"a": {"b": _noise(1)}, "a.b": _noise(2)})

    assert len(tensorizer_reads(data)) == 2
    with pytest.raises(CorruptError, match=r"two tensors are called 'a\.b'"):
        we_read(data)


class _Tied(torch.nn.Module):
    """A shared parameter, buffers that are kept and not, an opaque scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.head = torch.nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("kept", _noise(5))
        self.register_buffer("passing", _noise(6), persistent=False)
        self.scale = torch.nn.Parameter(torch.tensor(0.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", SEALINGS)
def test_a_module_with_tied_weights(kind: str) -> None:
    """Each name has its own copy of shared data, in the file's order, as tensorizer reads it."""
    module = _Tied()
    before = {name: tensor_bytes(t) for name, t in module.state_dict().items()}
    data = write(module, encryption(kind))
    ours = we_read(data, _key(kind))

    assert {name: found[1:] for name, found in ours.items()} == _described(
        tensorizer_reads(data, kind)
    )
    assert ours["embed.weight"][1:] == ours["head.weight"][1:]
    assert {name.lstrip("."): found[3] for name, found in ours.items()} == before | {
        "passing": tensor_bytes(module.passing)
    }


@pytest.mark.parametrize("kind", SEALINGS)
def test_tensors_that_share_memory(kind: str) -> None:
    """The same tensor under two names; in plain files also views that overlap.

    In encrypted ones tensorizer seals in place and minds only equal addresses: overlapping views
    come out wrong there, now and then.
    """
    base = _noise(64)
    content = {"a": base, "b": base}
    if kind == "plain":
        content |= {"front": base[:40], "back": base[24:]}

    _all_three_agree(content, kind)


@pytest.mark.parametrize("kind", ["plain", "key"])
def test_two_thousand_small_tensors(kind: str) -> None:
    """Of three dtypes; read from a file with the reserve of the index cut away as well."""
    all_bytes = _noise(2000 * 8)
    dtypes = (torch.uint8, torch.bfloat16, torch.float32)
    content = {
        f"model.layers.{i // 20}.{i % 20}": all_bytes[8 * i : 8 * i + 8].view(dtypes[i % 3])
        for i in range(2000)
    }
    data = write(content, encryption(kind))
    ours = {name: found[1:] for name, found in we_read(compact(data), _key(kind)).items()}

    assert ours == _described(content)
    assert list(ours) == list(content)
    if kind == "plain":  # half a minute for tensorizer in an encrypted file
        assert ours == _described(tensorizer_reads(data, kind))


@pytest.mark.parametrize(("kind", "hashes"), [("plain", ["crc32", "sha256"]), ("key", ["sha256"])])
def test_the_hashes_are_those_that_tensorizer_chooses(kind: str, hashes: list[str]) -> None:
    """There is no option; a sealed tensor has no CRC, one without data has both in any file."""
    content = {"x": _noise(3), "meta": torch.empty(2, device="meta")}
    source = MemorySource(write(content, encryption(kind)))
    index = read_index(source)
    found = [[n for n, _ in read_header(source, r, index).hashes] for r in index.tensors]

    assert found == [hashes, ["crc32", "sha256"]]


def test_the_samples_are_sealed_as_they_say() -> None:
    """A wrong key opens none of it: the tests above do read ciphertext."""
    data = write({"x": _noise(40)}, encryption("key"))

    assert tensor_bytes(_noise(40)) not in data
    with pytest.raises(TagMismatchError):
        we_read(data, FixedKey(bytes(32)))
