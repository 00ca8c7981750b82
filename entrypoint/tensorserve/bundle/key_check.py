"""Does the key decrypt this .tensors file? Checked before the engine starts."""

from __future__ import annotations

from tensorserve.crypto.secretbox import TagMismatchError
from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format.header import FileKey
from tensorserve.format.read_tensor import open_tensor_chunk, read_header
from tensorserve.format.records import FileIndex, Source, TensorRecord

# Tensors that must all fail before the key is called wrong.
_MAX_TRIED_TENSORS = 3


def prove_key(source: Source, index: FileIndex, key: FileKey | None) -> None:
    """Opens the first chunk of the smallest encrypted tensor; returns if its tag is valid.

    Usually reads a few kilobytes. If the tag is not valid, two more tensors are tried: if all
    fail, the key is wrong (WrongKeyError, naming ``key.origin``), else the tensor is damaged
    (CorruptError, naming it).

    Raises ConfigurationError for an encrypted file without a key, and for a plain file with one:
    a plain file could have replaced an encrypted one. Raises CorruptError for an encrypted file
    without tensor data, since nothing in it can be authenticated.
    """
    if not index.encrypted:
        if key is not None:
            raise ConfigurationError(
                f"{source.name} is not encrypted, but a key is given (from {key.origin}).",
                hint="To serve plain weights, unset the key. "
                "Otherwise, the file may have been replaced: copy the bundle again.",
            )
        return
    if key is None:
        raise ConfigurationError(
            f"{source.name} is encrypted, but neither a key nor a passphrase is given.",
            hint="Set TENSORSERVE_KEY_FILE or TENSORSERVE_PASSPHRASE_FILE.",
        )
    sealed = sorted(
        (tensor for tensor in index.tensors if tensor.length), key=lambda tensor: tensor.length
    )
    if not sealed:
        raise CorruptError(
            f"{source.name} is marked as encrypted, but none of its tensors has data: there is "
            f"nothing that the key from {key.origin or 'the settings'} opens.",
            hint="The file may have been replaced. Copy or pack the bundle again.",
        )
    failures: list[TagMismatchError] = []
    for record in sealed[:_MAX_TRIED_TENSORS]:
        try:
            _open_first_chunk(source, record, index, key)
        except TagMismatchError as failure:
            failures.append(failure)
        else:
            break
    else:
        raise WrongKeyError(
            f"The key from {key.origin or 'the settings'} does not open {source.name}.",
            hint="It is the key of another file, or the passphrase is mistyped"
            + (" (or the file is damaged)." if len(failures) == 1 else "."),
        )
    if failures:
        # Another tensor opened, so the key is right and the first tensor is damaged.
        raise CorruptError(failures[0].message, hint=failures[0].hint)


def _open_first_chunk(source: Source, record: TensorRecord, index: FileIndex, key: FileKey) -> None:
    header = read_header(source, record, index)
    if header.chunks is None:
        raise CorruptError(f"{source.name}: tensor {record.name!r} is not sealed.")
    start, stop = header.chunks.chunk_bounds(0, record.length)
    box = bytearray(stop - start)
    with memoryview(box) as view:
        source.read_into(record.data_offset + start, view)
        open_tensor_chunk(header, key.for_header(header), 0, view, view)
