"""Does this key open this file? Asked before the engine spends its start-up on it."""

from __future__ import annotations

from tensorserve.errors import ConfigurationError, CorruptError, WrongKeyError
from tensorserve.format.crypto import TagMismatchError
from tensorserve.format.header import FileKey
from tensorserve.format.reader import open_tensor_chunk, read_header
from tensorserve.format.records import FileIndex, Source, TensorRecord

_WITNESSES = 3


def prove_key(source: Source, index: FileIndex, key: FileKey | None) -> None:
    """Opens the first chunk of the smallest sealed tensor; returns if it opens.

    A few kilobytes are read as a rule. If it does not open, two more tensors tell a wrong key
    (WrongKeyError, naming ``key.origin``) from damage (CorruptError, naming the tensor).
    ConfigurationError if the file is encrypted and no key is given, or the other way round:
    a plain file in the place of an encrypted one was not vouched for by anybody. Nor was one that
    says that it is encrypted and in which nothing is sealed: anybody can write that (CorruptError).
    """
    if not index.encrypted:
        if key is not None:
            raise ConfigurationError(
                f"{source.name} is not encrypted, but a key is given (from {key.origin}).",
                hint="If plain weights are meant, unset the key. "
                "If not, somebody may have replaced the file.",
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
            f"{source.name} says that it is encrypted, but none of its tensors has data: there is "
            f"nothing that the key from {key.origin or 'the settings'} opens.",
            hint="Somebody may have replaced the file. Copy or pack the bundle again.",
        )
    failures: list[TagMismatchError] = []
    for record in sealed[:_WITNESSES]:
        try:
            _open_first_chunk(source, record, index, key)
        except TagMismatchError as failure:
            failures.append(failure)
        else:
            break
    else:
        raise WrongKeyError(
            f"The key from {key.origin or 'the settings'} does not open {source.name}.",
            hint="It is another file's key, or a passphrase with a slip in it"
            + (" (or the file is damaged)." if len(failures) == 1 else "."),
        )
    if failures:
        # Another tensor opened: the key is right, and what failed first is damaged.
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
