"""How does vLLM's CPU build get large tensors in huge pages?

A page of 4 KiB costs a page fault, and a start touches the weights, their packed copy and the KV
cache for the first time: some 4 GiB for a model of 1.5 GB, a quarter of its start in a virtual
machine (docs/measurements.md). torch can ask the kernel for pages of 2 MiB (madvise,
MADV_HUGEPAGE) for tensors of at least that size (c10/core/impl/alloc_cpu.cpp, torch 2.13). It has
an effect where /sys/kernel/mm/transparent_hugepage/enabled says `madvise`, the default of most
distributions.
"""

from __future__ import annotations

from collections.abc import Mapping

VARIABLE = "THP_MEM_ALLOC_ENABLE"


def huge_pages(environ: Mapping[str, str]) -> dict[str, str]:
    """What is added to `environ`; nothing where the user has set the variable."""
    return {} if VARIABLE in environ else {VARIABLE: "1"}
