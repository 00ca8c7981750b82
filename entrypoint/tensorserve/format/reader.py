"""How is one tensor read whole, the simple way: header, data, decrypted and checked?"""

from __future__ import annotations

from tensorserve.errors import ConfigurationError
from tensorserve.format.bounded import DAMAGED_HINT
from tensorserve.format.crypto import TagMismatchError, open_chunk
from tensorserve.format.header import FileKey, TensorHeader, parse_header, verify_hashes
from tensorserve.format.records import FileIndex, Source, TensorRecord


def read_header(source: Source, record: TensorRecord, index: FileIndex) -> TensorHeader:
    """Reads and parses the header of ``record``. Raises CorruptError as parse_header does."""
    data = source.read(record.header_offset, record.header_length)
    return parse_header(record, data, encrypted=index.encrypted, source_name=source.name)


def open_tensor_chunk(
    header: TensorHeader, key: bytes, chunk: int, ciphertext: memoryview, out: memoryview
) -> None:
    """Opens chunk ``chunk`` of a tensor; TagMismatchError says which of which tensor failed."""
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
    """The plaintext of ``record``, of ``record.length`` bytes (none for a meta tensor).

    Every chunk is authenticated. With ``verify``, the hashes of header and plaintext are checked
    too, and ``expected``, a SHA-256 from elsewhere: one of them has to be there. Raises
    CorruptError (TagMismatchError, WrongKeyError) for what does not fit, and ConfigurationError if
    a key is needed and not given. One tensor of memory is used.
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
