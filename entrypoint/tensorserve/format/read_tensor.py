"""How is one tensor read as a whole: header, data, decryption, digests?"""

from __future__ import annotations

from tensorserve.crypto.secretbox import TagMismatchError, open_chunk
from tensorserve.errors import ConfigurationError
from tensorserve.format.byte_reader import DAMAGED_HINT
from tensorserve.format.header import FileKey, TensorHeader, parse_header, verify_hashes
from tensorserve.format.records import FileIndex, Source, TensorRecord


def read_header(source: Source, record: TensorRecord, index: FileIndex) -> TensorHeader:
    """Reads and parses the header of ``record``. Raises parse_header's and the source's errors."""
    data = source.read(record.header_offset, record.header_length)
    return parse_header(record, data, encrypted=index.encrypted, source_name=source.name)


def open_tensor_chunk(
    header: TensorHeader, key: bytes, chunk: int, ciphertext: memoryview, out: memoryview
) -> None:
    """Decrypts chunk ``chunk`` of a tensor from ``ciphertext`` into ``out``, of the same length.

    Raises TagMismatchError, naming source, tensor and chunk, and ValueError for a plain tensor.
    """
    if header.chunks is None:
        raise ValueError(f"tensor {header.record.name!r} is not sealed")
    nonce, tag = header.chunks.chunk_nonce(chunk), header.chunks.chunk_tag(chunk)
    try:
        open_chunk(key, nonce, tag, ciphertext, out)
    except TagMismatchError:
        start = (
            header.record.data_offset + header.chunks.chunk_bounds(chunk, header.record.length)[0]
        )
        raise TagMismatchError(
            f"{header.source_name}: chunk {chunk} of tensor {header.record.name!r} (offset "
            f"{start}) fails authentication: the key is another file's, or the bytes changed.",
            hint=DAMAGED_HINT,
        ) from None


def read_tensor(
    source: Source,
    record: TensorRecord,
    index: FileIndex,
    key: FileKey | None,
    *,
    verify: bool = True,
    expected: bytes | None = None,
) -> bytearray:
    """The plaintext of ``record``: ``record.length`` bytes (none for a meta tensor).

    Every chunk is authenticated. With ``verify``, the header's hashes are compared too, and
    ``expected``, the manifest's SHA-256, if given; there must be at least one SHA-256. Needs memory
    for one tensor. Raises CorruptError (also TagMismatchError, WrongKeyError) for damage,
    ConfigurationError if a key is needed and not given, and the source's errors.
    """
    header = read_header(source, record, index)
    data = bytearray(record.length)
    with memoryview(data) as view:
        source.read_into(record.data_offset, view)
        if header.chunks is not None:
            if key is None:
                raise ConfigurationError(
                    f"{source.name} is encrypted and no key is given.",
                    hint="Set TENSORSERVE_KEY_FILE or TENSORSERVE_PASSPHRASE_FILE.",
                )
            secret = key.for_header(header)
            for chunk in range(header.chunks.count):
                start, stop = header.chunks.chunk_bounds(chunk, record.length)
                with view[start:stop] as box:
                    open_tensor_chunk(header, secret, chunk, box, box)
        if verify:
            verify_hashes(header, view, expected)
    return data
