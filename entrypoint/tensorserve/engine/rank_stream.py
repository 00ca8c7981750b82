"""How does one rank read its file: with which memory, processors and connections, from where?

A rank of several on a machine takes its share of the host memory, runs its threads near its GPU,
and reads what one process has fetched for all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from vllm.distributed import get_tp_group
from vllm.distributed.parallel_state import in_the_same_node_as
from vllm.logger import init_logger

from tensorserve.bundle.layout import module_name
from tensorserve.bundle.tensors_file import OpenTensors, open_tensors
from tensorserve.config.access import access_for, key_for
from tensorserve.engine.checked_load import check_same_index, checked_as
from tensorserve.engine.load_sharing import gathered, why_alone
from tensorserve.format import TensorRecord
from tensorserve.launch.context import Shard, Start
from tensorserve.launch.memory_budget import limit_of, prefetch_budget
from tensorserve.launch.prefetch_process import fetch_for_ranks
from tensorserve.linux import run_on
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, report_every
from tensorserve.loading.agreement import Agreement, agree, offer_of
from tensorserve.loading.block_cache import BlockCache
from tensorserve.loading.buffer_pool import BufferPool
from tensorserve.loading.gpu_staging import GpuStaging
from tensorserve.loading.load_memory import shared_memory
from tensorserve.loading.numa import near
from tensorserve.loading.prefetch import PrefetchedSource
from tensorserve.loading.rank_group import RankGroup
from tensorserve.loading.reader_hint import load_failure
from tensorserve.loading.shared_stream import SharedStream
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.sources import Source
from tensorserve.telemetry import EventLog
from tensorserve.telemetry.names import Sharing, Stage

if TYPE_CHECKING:
    from tensorserve.loading.reference import ReferenceStream

Placement = Callable[[TensorRecord], torch.Tensor | None]
# A child of vLLM's own logger, the only one that vLLM configures.
logger = init_logger("vllm.tensorserve")


@dataclass(frozen=True)
class Rank:
    """Which rank reads, and where it runs."""

    device: torch.device
    number: int = 0
    """The tensor-parallel rank, which names its file where each rank has one."""
    ranks_here: int = 1
    """Ranks that load on this machine, those of replicas too."""
    numa_bound: bool = False
    """Whether the process is bound to processors that the user or vLLM chose (`--numa-bind`)."""
    takes_slices: bool = False
    """Whether its weight loaders take a part of most tensors."""


class RankStream:
    """Reads one file for one rank: `open` it, then iterate over `tensors`."""

    def __init__(
        self,
        start: Start,
        rank: Rank,
        *,
        draft: bool = False,
        log: EventLog | None = None,
        report: Callable[[LoadProgress], None] = lambda _: None,
    ) -> None:
        """`draft`: read the bundle's own draft model. `report`: called while tensors are read."""
        self._start = start
        self._rank = rank
        self._draft = draft
        self._log = log
        self._report = report
        self._progress = LoadProgress()
        self._shares = False
        """Whether some of the host memory is for blocks fetched ahead, or for all ranks."""
        self._agreement = Agreement(Sharing.LAYOUT)

    @property
    def shard(self) -> Shard:
        """The file that is read, as the checks before the start found it."""
        if self._draft:
            assert self._start.draft is not None
            return self._start.draft.shard
        return self._start.shard(self._rank.number)

    @property
    def stages(self) -> bool:
        """Whether tensors are copied to the GPU by us. tensorizer's reader does that itself."""
        return self._rank.device.type == "cuda" and self._start.settings.loader != "reference"

    @contextmanager
    def open(self, *, to_load: bool = True) -> Iterator[OpenTensors]:
        """The open file, its key proven, its index the one that was checked.

        `to_load`: with the blocks that were fetched ahead, or are fetched for all ranks. Raises
        CorruptError for another index, and the errors of the source and the key.
        """
        settings = self._start.settings
        shard = self.shard
        opened = open_tensors(
            shard.uri,
            access_for(settings),
            key_for(settings),
            observer=self._progress,
            version=shard.version,
        )
        source = opened.source
        try:
            # Also where only the layout is read: it decides what is done with the weights.
            check_same_index(shard, opened.index, source.name)
            source = self._prefetched(source) if to_load else source
            yield replace(opened, source=source)
        finally:
            source.close()

    def agree(self, opened: OpenTensors, records: list[TensorRecord]) -> Agreement:
        """How this rank loads `records`, a checkpoint's tensors: with the others, or alone.

        All tensor-parallel ranks call it, before `tensors`. Raises CorruptError where they found
        different files.
        """
        group, settings = get_tp_group(), self._start.settings
        alone = why_alone(settings.share_load, settings.loader, self._rank.device, group)
        if alone is None and len(self._start.shards) > 1 and not self._draft:
            alone = Sharing.LAYOUT
        if alone is not None:
            self._agreement = Agreement(alone)
        else:
            sliced = self.stages and self._rank.takes_slices
            offer = offer_of(
                opened.source,
                opened.index,
                self.shard.headers_sha256,
                records,
                most=DEFAULTS.shared_sliced_bytes if sliced else None,
            )
            number = group.rank_in_group
            self._agreement = agree(offer, opened.index, number, gathered(group))
        sharing = self._agreement.sharing
        if settings.share_load == "on" and sharing is not Sharing.SHARED:
            logger.info("TENSORSERVE_SHARE_LOAD=on: each rank opens all of it (%s)", sharing)
        return self._agreement

    def tensors(
        self, opened: OpenTensors, records: list[TensorRecord], place: Placement = lambda _: None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the module, tensor), in file order; `place` as in `TensorStream`.

        The time until the next one is taken counts as `copy`. Raises TensorserveError: an error of
        the device or of the loader becomes one.
        """
        loader = self._start.settings.loader
        options = LoadOptions(
            connections=self._start.settings.fetch_connections, processors=self._processors()
        )
        options = checked_as(options, self.shard, opened.index, records, opened.source.name)
        if self._shared:
            options = replace(options, left_out=self._agreement.left_out)
        with ExitStack() as held:
            staging = self._staging()
            if staging is not None:
                # The stream closes it too, but not where the stream cannot be made or entered.
                held.callback(staging.close)
            ring = staging.ring_bytes if staging is not None else 0
            options = replace(options, ahead_bytes=max(0, self._memory_limit() - ring))
            report = report_every(DEFAULTS.progress_seconds, lambda: self._report(self._progress))
            held.callback(report)
            try:
                with self._stream(opened, records, options, staging, place) as stream:
                    for record, tensor in stream:
                        started = time.monotonic()
                        yield module_name(record), tensor
                        self._progress.stage(Stage.COPY, record.length, time.monotonic() - started)
            # Not of what vLLM does with a tensor: that is raised outside of this generator. vLLM
            # would take a ValueError of ours for one of the model.
            except Exception as error:
                failure = load_failure(error, loader)
                if failure is error:
                    raise
                raise failure from error

    @contextmanager
    def _stream(
        self,
        opened: OpenTensors,
        records: list[TensorRecord],
        options: LoadOptions,
        staging: GpuStaging | None,
        place: Placement,
    ) -> Iterator[TensorStream | ReferenceStream | SharedStream]:
        """By our loader, alone or with other ranks, or by tensorizer's reader."""
        if self._shared:
            with self._shared_stream(opened, options, staging) as shared:
                yield shared
        else:
            with self._own_stream(opened, records, options, staging, place) as alone:
                yield alone

    def _own_stream(
        self,
        opened: OpenTensors,
        records: list[TensorRecord],
        options: LoadOptions,
        staging: GpuStaging | None,
        place: Placement,
    ) -> TensorStream | ReferenceStream:
        if self._start.settings.loader == "reference":
            # Not at import: tensorizer takes a second, and is not needed otherwise.
            from tensorserve.loading.reference import ReferenceStream

            logger.info("TENSORSERVE_LOADER=reference: tensorizer's own reader loads the weights")
            return ReferenceStream(
                opened.source,
                opened.index,
                records,
                key=opened.key,
                options=options,
                progress=self._progress,
                device=self._rank.device,
            )
        return TensorStream(
            opened.source,
            records,
            encrypted=opened.index.encrypted,
            key=opened.key,
            options=options,
            progress=self._progress,
            place=place,
            staging=staging,
            staged=self._is_staged,
            check_whole=not self._shared,
            # On a GPU the device's own budget bounds it.
            paced=self._shared and staging is None,
        )

    # With other ranks -----------------------------------------------------------------------------

    @property
    def _shared(self) -> bool:
        return self._agreement.sharing is Sharing.SHARED

    @contextmanager
    def _shared_stream(
        self, opened: OpenTensors, options: LoadOptions, staging: GpuStaging | None
    ) -> Iterator[SharedStream]:
        """This rank's part, and what the others send."""
        group = self._group()
        failed = True
        try:
            if staging is None:
                ahead, window, kept = shared_memory(options.ahead_bytes, group.size)
                memory = BufferPool(kept).take
                options = replace(options, ahead_bytes=ahead)
            else:
                window, memory = staging.ahead_bytes, staging.received
            records = self._agreement.opened((), group.rank)
            own = self._own_stream(opened, records, options, staging, lambda _: None)
            assert isinstance(own, TensorStream)
            shared = SharedStream(
                own,
                self._agreement.messages,
                group,
                opened.source,
                options,
                window=window,
                memory=memory,
            )
            with shared:
                yield shared
            failed = False
        finally:
            group.close(failed=failed)

    def _group(self) -> RankGroup:
        """Its threads are not bound as vLLM binds this one."""
        every, bound = get_tp_group(), os.sched_getaffinity(0)
        run_on(self._processors())
        try:
            return RankGroup(
                self._agreement.name, every.rank_in_group, every.world_size, self._rank.device
            )
        finally:
            run_on(bound)

    # Memory and processors ------------------------------------------------------------------------

    def _memory_limit(self) -> int:
        """Bytes of host memory for this rank's load, without what is fetched ahead."""
        limit = limit_of(self._start.settings)
        if self._shares:
            limit -= prefetch_budget(self._start.settings, self._rank.ranks_here)
        return limit // self._rank.ranks_here

    def _processors(self) -> frozenset[int]:
        """Those that the load's threads run on: on a GPU those of its NUMA node, else all."""
        if self._rank.device.type != "cuda":
            return self._start.processors  # vLLM binds its worker to one
        if self._rank.numa_bound:
            return frozenset(os.sched_getaffinity(0))
        return near(self._rank.device, self._start.processors)

    def _staging(self) -> GpuStaging | None:
        """The way to the GPU; None where tensors stay in host memory, or tensorizer reads."""
        if not self.stages:
            return None
        # At most half of the memory: the connections need some as well.
        limit = self._memory_limit() // 2
        return GpuStaging(
            self._rank.device,
            limit,
            processors=self._processors(),
            # The other half is for what the other ranks send.
            ahead_part=2 if self._shared else 1,
        )

    def _is_staged(self, record: TensorRecord) -> bool:
        """Whether a tensor is copied to the GPU as a whole.

        One of which the weight loader takes a slice, if it is large (the experts of a layer in one
        tensor, an embedding), would take the GPU's memory many times over.
        """
        most = DEFAULTS.shared_sliced_bytes if self._shared else DEFAULTS.sliced_bytes
        return not self._rank.takes_slices or record.length <= most

    # Blocks fetched ahead -------------------------------------------------------------------------

    def _prefetched(self, source: Source) -> Source:
        """`source` with the blocks that were fetched ahead, or are fetched for all ranks; `source`
        itself where there are none, or those of another file.
        """
        ahead = None if self._draft else self._start.prefetched
        path = ahead or self._fetched_for_ranks(source)
        self._shares = path is not None
        if path is None:
            return source
        try:
            cache = BlockCache(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except (OSError, ValueError):
            return source
        if not cache.fits(source):
            return source
        return PrefetchedSource(source, cache, self._rank.number, self._progress)

    def _fetched_for_ranks(self, source: Source) -> str | None:
        """The path of the memory into which the first tensor-parallel rank fetches for all.

        None where they do not read the same remote file on one machine. All ranks call it.
        """
        group = get_tp_group()
        own_files = len(self._start.shards) > 1 and not self._draft
        if not source.remote or own_files or group.world_size == 1:
            return None
        if not all(in_the_same_node_as(group.cpu_group)):
            return None
        path = None
        if group.rank_in_group == 0:
            settings, ranks_here = self._start.settings, self._rank.ranks_here
            groups = max(1, ranks_here // group.world_size)
            path = fetch_for_ranks(
                settings,
                self.shard,
                group.world_size,
                budget=prefetch_budget(settings, ranks_here) // groups,
                processors=self._start.processors,
                log=self._log,
            )
        shared: str = group.broadcast_object(path, src=0)
        return shared
