"""The .tensors file format (tensorizer's), read with nothing taken on trust, and written.

``read_index`` gives what a file holds; ``parse_header`` how each tensor is sealed and hashed;
``open_chunk`` opens what is sealed. ``read_tensor`` does all three for one tensor.
``plan_file`` says how a new file will look, ``write_file`` writes it from front to back.
"""

from tensorserve.format.box import KEY_SIZE
from tensorserve.format.crypto import (
    TagMismatchError,
    derive_key,
    nonce_at,
    open_chunk,
    seal_chunk,
)
from tensorserve.format.dtypes import ITEM_SIZES
from tensorserve.format.header import (
    ChunkedCipher,
    FileKey,
    HashCheck,
    PasswordHash,
    TensorHeader,
    parse_header,
    require_digest,
    verify_hashes,
)
from tensorserve.format.index import read_index
from tensorserve.format.reader import open_tensor_chunk, read_header, read_tensor
from tensorserve.format.records import (
    KIND_BUFFER,
    KIND_PARAMETER,
    KIND_STATE_DICT,
    FileIndex,
    TensorRecord,
)
from tensorserve.format.strips import STRIP_ALIGNMENT, StripOpener, opens_strips
from tensorserve.format.writer import (
    CHUNK_BYTES,
    FilePlan,
    TensorSpec,
    WrittenDigests,
    fresh_password_hash,
    plan_file,
    write_file,
)

__all__ = [
    "CHUNK_BYTES",
    "ITEM_SIZES",
    "KEY_SIZE",
    "KIND_BUFFER",
    "KIND_PARAMETER",
    "KIND_STATE_DICT",
    "STRIP_ALIGNMENT",
    "ChunkedCipher",
    "FileIndex",
    "FileKey",
    "FilePlan",
    "HashCheck",
    "PasswordHash",
    "StripOpener",
    "TagMismatchError",
    "TensorHeader",
    "TensorRecord",
    "TensorSpec",
    "WrittenDigests",
    "derive_key",
    "fresh_password_hash",
    "nonce_at",
    "open_chunk",
    "open_tensor_chunk",
    "opens_strips",
    "parse_header",
    "plan_file",
    "read_header",
    "read_index",
    "read_tensor",
    "require_digest",
    "seal_chunk",
    "verify_hashes",
    "write_file",
]
