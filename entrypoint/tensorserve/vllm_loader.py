"""The loader inside vLLM: streams a .tensors file into the model, on CPU and on CUDA alike.

Together with the other `vllm_*` modules the only one that knows vLLM's internals (0.32.0).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.distributed.parallel_state import in_the_same_node_as
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from tensorserve.checked_load import check_same_index, checked_as
from tensorserve.errors import ConfigurationError, TensorserveError
from tensorserve.fingerprint import Fingerprint, check_fingerprint
from tensorserve.format import TensorRecord
from tensorserve.host_memory import SLICED_BYTES, limit_of
from tensorserve.layouts import RANK_MARKER, is_vllm_layout, loadable, module_name
from tensorserve.linux import hide_memory, no_core_files
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, report_every
from tensorserve.loading.numa import near
from tensorserve.loading.other_reader import load_failure
from tensorserve.loading.prefetch import PrefetchedSource
from tensorserve.loading.schedule import SMALL_BYTES
from tensorserve.loading.shared import SharedBlocks
from tensorserve.loading.staging import Staging
from tensorserve.opening import OpenTensors, access_for, key_for, open_tensors
from tensorserve.prefetching import fetch_for_ranks, prefetch_budget
from tensorserve.settings import Settings
from tensorserve.sources import Source
from tensorserve.standalone import handed_over_start, own_start, settings_environment
from tensorserve.start import Start
from tensorserve.telemetry import EventLog, events_path
from tensorserve.vllm_fingerprint import engine_fingerprint
from tensorserve.vllm_model import (
    copy_in_place,
    give,
    home,
    homes,
    populate_soon,
    unfit,
    untie,
)
from tensorserve.vllm_other_models import (
    beside_the_checkpoint,
    is_a_draft,
    is_the_bundles,
    load_other,
    served_config,
)
from tensorserve.vllm_ranks import dropped_here

if TYPE_CHECKING:
    from tensorserve.loading.reference import ReferenceStream

PROGRESS_SECONDS = 0.25
# Below vLLM's own logger, which alone it configures.
logger = init_logger("vllm.tensorserve")


class TensorserveLoader(BaseModelLoader):  # type: ignore[misc]
    """vLLM's load format `tensorizer`. One is made in each worker."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        no_core_files()  # of `LLM()` as well, which no command of ours has started
        extra = load_config.model_loader_extra_config
        self._started = handed_over_start(extra, os.environ)
        self._options = {} if self._started else settings_environment(extra, os.environ)
        # Without `tensorserve serve` nobody reads a log.
        self._log = (
            EventLog(events_path(self._started.settings.state_dir)) if self._started else None
        )
        self._rank = 0
        self._number = 0
        """Of this process among all that load, for the event log; `_rank` is that of its file."""
        self._balanced = False
        self._takes_slices = False
        """Whether this rank's weight loaders take a part of most tensors."""
        self._ranks_here = 1
        self._numa_bound = False
        self._shares = False
        self._device = torch.device("cpu")
        self._progress = LoadProgress()

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: weights are streamed, never stored."""

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """The module with its weights, processed for this device's kernels.

        vLLM also asks for models that are not the bundle's: those come from their own directories.
        """
        self._rank = get_tensor_model_parallel_rank()
        parallel = vllm_config.parallel_config
        self._ranks_here = parallel.local_world_size * max(1, parallel.data_parallel_size_local)
        self._numa_bound = parallel.numa_bind
        ranks = get_tensor_model_parallel_world_size()
        self._balanced = parallel.enable_eplb
        self._takes_slices = ranks > 1 or parallel.enable_expert_parallel
        if self._started is None:
            served = served_config(vllm_config)
            self._started = own_start(
                self._options, ranks, served.model, remote_code=served.trust_remote_code
            )
        self._number = self._rank + ranks * (
            get_pp_group().rank_in_group + get_pp_group().world_size * parallel.data_parallel_index
        )
        if not is_the_bundles(vllm_config, model_config, self._start.settings.model_uri):
            # After the model itself: the phases take up the time where it is spent.
            self._phase("load", "begin")
            other = load_other(self.load_config, vllm_config, model_config, prefix)
            self._phase("warmup", "begin")
            return other
        self._phase("import", "end")
        self._phase("init", "begin")
        try:
            device = torch.device(self.load_config.device or vllm_config.device_config.device)
            self._device = device
            if self._start.shard(self._rank).has_head:
                untie(model_config)
            packed = self._start.shard(self._rank).fingerprint
            if is_a_draft(model_config):
                model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            elif packed is not None:
                here = engine_fingerprint(vllm_config, model_config)
                check_fingerprint(Fingerprint.from_json(packed), here.to_json())
                # Taken before post-processing: the ordinary order, straight into the parameters.
                model = super().load_model(vllm_config, model_config, prefix)
            elif device.type != "cpu" and self._in_vllm_layout():
                model = self._load_processed(vllm_config, model_config, prefix, device)
            else:
                model = super().load_model(vllm_config, model_config, prefix)
        except TensorserveError as error:
            # vLLM wraps what its workers raise; the log keeps the message and the exit code.
            self._emit(
                "failure", reason=error.reason, exit_code=error.exit_code, message=error.message
            )
            raise
        self._phase("postprocess", "end")
        self._phase("warmup", "begin")
        self._hide_memory()
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill `model` in place."""
        if not any(True for _ in model.parameters()):
            return  # vLLM's extract_hidden_states: a cache, and nothing to fill
        self._phase("init", "end")
        self._phase("load", "begin")
        populate_soon(model, self._start.processors)
        with self._device_errors(), self._open() as opened:
            packed = self._start.shard(self._rank).fingerprint is not None
            as_vllm_has_it = packed or is_vllm_layout(opened.index)
            if is_a_draft(model_config) and as_vllm_has_it:
                raise ConfigurationError(
                    f"The bundle is in vLLM's own layout, without {type(model).__name__}, which "
                    "drafts for its model.",
                    hint="Pack the checkpoint without --layout vllm: such a bundle holds all of "
                    "it.",
                )
            # All of what `pack` took from a rank, even what is computed where a checkpoint has it.
            records = list(opened.index.tensors) if packed else loadable(opened.index)
            if not as_vllm_has_it:
                dropped = dropped_here(model, balanced=self._balanced)
                records = [r for r in records if not _worth(r) or not dropped(module_name(r))]
            self._emit(
                "load_plan",
                rank=self._number,
                bytes=sum(r.length for r in records),
                tensors=len(records),
                loader=self._start.settings.loader,
            )
            if as_vllm_has_it:
                targets = homes(model)
                here = self._device if self._stages else torch.device("cpu")
                tensors = self._stream(opened, records, lambda record: home(targets, record, here))
                parameters = ((n, t) for n, t in tensors if n != RANK_MARKER)
                copy_in_place(model, parameters, once=packed)
            else:
                tensors = self._stream(opened, records)
                beside = beside_the_checkpoint(self.load_config, model)
                fill(self, model, model_config, chain(tensors, beside))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        self._emit("load_done", rank=self._number)
        self._phase("load", "end")
        self._phase("postprocess", "begin")

    def _hide_memory(self) -> None:
        """Let no other process look into this one, where no other rank has to.

        Of several ranks on a machine, replicas too, one opens what another has fetched, and torch
        hands memory on by pidfd_getfd: there the limit on core files is all.
        """
        if self._ranks_here == 1:
            hide_memory()

    def _load_processed(
        self,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
        prefix: str,
        device: torch.device,
    ) -> nn.Module:
        """What vLLM's own path wrote on a GPU: the file holds parameters *after* post-processing.

        So the empty module is brought into that form first, then filled. (On CPU post-processing
        repacks weights into memory that no file can hold; there the file must be in the form
        before it, and the ordinary order is right.) Not run on a GPU yet.
        """
        with set_default_torch_dtype(model_config.dtype), device:
            model = self.create_model(vllm_config, model_config, prefix)
        with set_default_torch_dtype(model_config.dtype):
            process_weights_after_loading(model, model_config, device)
            self.load_weights(model, model_config)
        ready: nn.Module = model.eval()
        return ready

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """A device says what went wrong at any later call, the model's own included."""
        try:
            yield
        except torch.AcceleratorError as error:
            raise load_failure(error, self._start.settings.loader) from error

    @contextmanager
    def _open(self, *, to_load: bool = True) -> Iterator[OpenTensors]:
        settings = self._start.settings
        shard = self._start.shard(self._rank)
        opened = open_tensors(
            shard.uri,
            access_for(settings),
            key_for(settings),
            observer=self._progress,
            version=shard.version,
        )
        source = opened.source
        try:
            # Also where nothing but the layout is asked for: it decides what happens to weights.
            check_same_index(shard, opened.index, opened.source.name)
            source = self._prefetched(source) if to_load else source
            yield replace(opened, source=source)
        finally:
            source.close()

    def _prefetched(self, source: Source) -> Source:
        """`source`, with what was fetched ahead of it, or is for all ranks of the machine; as it is
        where that is gone or another.
        """
        path = self._start.prefetched or self._shared_by_ranks(source)
        self._shares = path is not None
        if path is None:
            return source
        try:
            shared = SharedBlocks(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except (OSError, ValueError):
            return source
        return (
            PrefetchedSource(source, shared, self._rank, self._progress)
            if shared.fits(source)
            else source
        )

    def _shared_by_ranks(self, source: Source) -> str | None:
        """Where the tensor-parallel ranks, which all read this file, find what one of them fetches.

        None where there is nothing to share. All ranks call it.
        """
        group = get_tp_group()
        if not source.remote or len(self._start.shards) > 1 or group.world_size == 1:
            return None
        if not all(in_the_same_node_as(group.cpu_group)):
            return None
        path = None
        if group.rank_in_group == 0:
            start = self._start
            groups = max(1, self._ranks_here // group.world_size)
            path = fetch_for_ranks(
                start.settings,
                start.shard(0),
                group.world_size,
                budget=prefetch_budget(start.settings, self._ranks_here) // groups,
                processors=start.processors,
                log=self._log,
            )
        shared: str = group.broadcast_object(path, src=0)
        return shared

    def _in_vllm_layout(self) -> bool:
        with self._open(to_load=False) as opened:
            return is_vllm_layout(opened.index)

    def _stream(
        self,
        opened: OpenTensors,
        records: list[TensorRecord],
        place: Callable[[TensorRecord], torch.Tensor | None] = lambda _: None,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) for vLLM, with progress in the event log. `copy` is vLLM's time."""
        settings: Settings = self._start.settings
        shard = self._start.shard(self._rank)
        options = LoadOptions(connections=settings.fetch_connections, processors=self._processors())
        options = checked_as(options, shard, opened.index, records, opened.source.name)
        with ExitStack() as held:
            staging = self._staging()
            if staging is not None:
                # The stream does so too, but not one that could not be made or begun.
                held.callback(staging.close)
            ring = staging.ring_bytes if staging is not None else 0
            options = replace(options, ahead_bytes=max(0, self._memory_limit() - ring))
            held.callback(report_every(PROGRESS_SECONDS, self._report))
            try:
                with self._reader(opened, records, options, staging, place) as stream:
                    for record, tensor in stream:
                        started = time.monotonic()
                        yield module_name(record), tensor
                        self._progress.stage("copy", record.length, time.monotonic() - started)
            # What vLLM raises does not come here; a ValueError of ours it would take for the
            # model's.
            except Exception as error:
                failure = load_failure(error, settings.loader)
                if failure is error:
                    raise
                raise failure from error

    def _reader(
        self,
        opened: OpenTensors,
        records: list[TensorRecord],
        options: LoadOptions,
        staging: Staging | None,
        place: Callable[[TensorRecord], torch.Tensor | None],
    ) -> TensorStream | ReferenceStream:
        """Who makes tensors of what is read (TENSORSERVE_LOADER)."""
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
                device=self._device,
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
        )

    def _memory_limit(self) -> int:
        """Bytes of host memory that this rank's load may take beside what is fetched ahead."""
        limit = limit_of(self._start.settings)
        if self._shares:
            limit -= prefetch_budget(self._start.settings, self._ranks_here)
        return limit // self._ranks_here

    def _processors(self) -> frozenset[int]:
        """On which the load's threads run: all of the container's, on a GPU those near it."""
        if self._device.type != "cuda":
            return self._start.processors  # vLLM binds its worker to one
        if self._numa_bound:
            return frozenset(os.sched_getaffinity(0))  # to those that the user or vLLM chose
        return near(self._device, self._start.processors)

    @property
    def _stages(self) -> bool:
        return self._device.type == "cuda" and self._start.settings.loader != "reference"

    def _staging(self) -> Staging | None:
        """The way to a GPU; None where tensors stay in host memory, and for tensorizer's reader,
        which has its own.
        """
        if not self._stages:
            return None
        # At most half of it: the threads need memory as well.
        limit = self._memory_limit() // 2
        return Staging(self._device, limit, processors=self._processors())

    def _is_staged(self, record: TensorRecord) -> bool:
        """Whether a tensor goes to the GPU as a whole.

        Where the weight loader takes a slice of it, a large one (the experts of a layer in one
        tensor, an embedding) would take the GPU's memory many times over.
        """
        return not self._takes_slices or record.length <= SLICED_BYTES

    def _report(self) -> None:
        self._emit("load_progress", rank=self._number, **self._progress.snapshot())

    @property
    def _start(self) -> Start:
        assert self._started is not None
        return self._started

    def _emit(self, event: str, **fields: object) -> None:
        if self._log is not None:
            self._log.emit(event, **fields)

    def _phase(self, phase: str, state: str) -> None:
        if self._number == 0:
            self._emit("phase", phase=phase, state=state)


def _worth(record: TensorRecord) -> bool:
    """Whether a tensor is worth leaving out: small ones come along with their neighbours."""
    return record.length > SMALL_BYTES


def fill(
    loader: BaseModelLoader,
    model: nn.Module,
    model_config: ModelConfig,
    tensors: Iterator[tuple[str, torch.Tensor]],
) -> None:
    """Fill `model` from a whole checkpoint. Raises CorruptError where the two do not fit."""
    loaded = give(model, tensors)
    if model_config.quantization is None and loaded is not None:
        # The stock loader's own check that no parameter was left as it was born.
        try:
            DefaultModelLoader.track_weights_loading(loader, model, loaded)
        except ValueError as error:
            raise unfit(model, "what it needs is not in the file", error) from error
