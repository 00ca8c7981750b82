"""Does a tensor have the SHA-256 that its header, or the manifest, gives?"""

from __future__ import annotations

from collections.abc import Mapping

from tensorserve.errors import CorruptError
from tensorserve.format import verify_hashes
from tensorserve.loading.damage_recovery import DamageRecovery
from tensorserve.loading.pending_tensor import PendingTensor


class DigestCheck:
    """Compares the digests of one load's tensors."""

    def __init__(self, recovery: DamageRecovery, digests: Mapping[int, bytes]) -> None:
        """`digests`: SHA-256 by the offset of a tensor's header, from a manifest; a tensor without
        one has to have it in its header.
        """
        self._recovery = recovery
        self._digests = digests

    def check(self, tensor: PendingTensor) -> None:
        """Compare a tensor that is whole in host memory; one that differs is read a second time.

        Raises CorruptError.
        """
        expected = self._digests.get(tensor.record.header_offset)
        assert tensor.header is not None
        try:
            verify_hashes(tensor.header, tensor.view, expected)
        except CorruptError:
            self._recovery.tensor_failed(tensor)
            verify_hashes(tensor.header, tensor.view, expected)
