"""What does a .tensors file (tensorizer's format) say, and how is one written?

Reading: ``read_index`` gives the tensors of a file, ``parse_header`` the hashes and the cipher's
parameters of one tensor, ``open_chunk`` decrypts a chunk; ``read_tensor`` does all three. Every
field of a file is checked before use. Writing: ``plan_file`` computes the layout of a new file,
``write_file`` writes it sequentially.
"""

from tensorserve.crypto.backends import KEY_SIZE
from tensorserve.crypto.incremental import STRIP_ALIGNMENT, StripOpener, opens_strips
from tensorserve.crypto.secretbox import (
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
    fixed_fields,
    parse_header,
    require_digest,
    verify_hashes,
)
from tensorserve.format.index import read_index
from tensorserve.format.read_tensor import open_tensor_chunk, read_header, read_tensor
from tensorserve.format.records import (
    KIND_BUFFER,
    KIND_PARAMETER,
    KIND_STATE_DICT,
    FileIndex,
    TensorRecord,
)
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
    "fixed_fields",
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
