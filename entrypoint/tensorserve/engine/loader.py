"""How does a model of vLLM get its weights? vLLM's load format `tensorizer`, on CPU and on CUDA.

Written for vLLM 0.32.0 (model_executor/model_loader/base_loader.py). How the file is read is in
rank_stream.py, what becomes of a tensor in parameters.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

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
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from tensorserve.bundle.engine_fingerprint import Fingerprint, check_fingerprint
from tensorserve.bundle.layout import RANK_MARKER, is_vllm_layout, loadable, module_name
from tensorserve.bundle.tensors_file import OpenTensors
from tensorserve.engine.api import handed_over_start, own_start, settings_environment
from tensorserve.engine.compile_key import leave_out_of_key
from tensorserve.engine.filled import refuse_unfilled
from tensorserve.engine.memory_writes import Watch
from tensorserve.engine.other_models import (
    asked_draft,
    beside_the_checkpoint,
    is_a_draft,
    is_packed,
    is_the_bundles,
    load_other,
    ranks_config,
    served_config,
)
from tensorserve.engine.parameters import (
    copy_in_place,
    give,
    home,
    homes,
    populate_soon,
    untie,
)
from tensorserve.engine.rank_filter import dropped_here
from tensorserve.engine.rank_stream import Rank, RankStream
from tensorserve.engine.same_bundle import same_for_all
from tensorserve.engine.vllm_fingerprint import engine_fingerprint
from tensorserve.engine.worker_errors import report_errors
from tensorserve.errors import ConfigurationError, OtherRankError, TensorserveError
from tensorserve.format import TensorRecord
from tensorserve.launch.context import Start
from tensorserve.linux import hide_memory, no_core_files
from tensorserve.loading import LoadProgress
from tensorserve.loading.agreement import Agreement
from tensorserve.loading.reader_hint import load_failure
from tensorserve.loading.tuning import DEFAULTS
from tensorserve.telemetry import Edge, EventLog, Phase, events_path
from tensorserve.telemetry.names import Sharing
from tensorserve.telemetry.schema import (
    Event,
    LoadDone,
    LoadPlanned,
    LoadProgressed,
    PhaseChanged,
    StartFailed,
)


class TensorserveLoader(BaseModelLoader):  # type: ignore[misc]
    """vLLM's load format `tensorizer`. One is made in each worker."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        no_core_files()  # of `LLM()` as well, which no command of ours has started
        extra = load_config.model_loader_extra_config
        self._started = handed_over_start(extra)
        self._options = {} if self._started else settings_environment(extra)
        # Without `tensorserve serve` there is no reader of the log.
        self._log = (
            EventLog(events_path(self._started.settings.state_dir)) if self._started else None
        )
        if self._started:
            leave_out_of_key(self._started.plan.model_dir)
        self._number = 0
        """Of this process among all that load, for the event log."""
        self._moves_experts = False
        """Whether experts move between ranks while serving (EPLB)."""
        self._device = torch.device("cpu")
        self._reading: RankStream | None = None
        self._watch = Watch()

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: weights are streamed, never stored."""

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """The module with its weights, processed for this device's kernels.

        vLLM also asks for models that are not the bundle's: they come from their own directories.
        """
        every = ranks_config(vllm_config, model_config)
        parallel = vllm_config.parallel_config
        ranks = get_tensor_model_parallel_world_size()
        self._device = torch.device(self.load_config.device or vllm_config.device_config.device)
        rank = Rank(
            self._device,
            number=get_tensor_model_parallel_rank(),
            ranks_here=every.local_world_size * max(1, every.data_parallel_size_local),
            numa_bound=every.numa_bind,
            takes_slices=ranks > 1 or parallel.enable_expert_parallel,
        )
        self._moves_experts = parallel.enable_eplb
        if self._started is None:
            served = served_config(vllm_config)
            # A draft may be built in one pipeline stage alone.
            groups = [get_tp_group()] + ([] if is_a_draft(model_config) else [get_pp_group()])
            self._started = same_for_all(
                lambda: own_start(
                    self._options,
                    ranks,
                    served.model,
                    remote_code=served.trust_remote_code,
                    draft=asked_draft(vllm_config),
                ),
                [group.cpu_group for group in groups],
            )
        self._number = rank.number + ranks * (
            get_pp_group().rank_in_group + get_pp_group().world_size * every.data_parallel_index
        )
        packed_draft = is_packed(model_config, self._start.draft)
        own = packed_draft or is_the_bundles(
            vllm_config, model_config, self._start.settings.model_uri
        )
        if not own:
            # After the model itself, so its time counts for the phases that it takes place in.
            self._phase(Phase.LOAD, Edge.BEGIN)
            other = load_other(self.load_config, vllm_config, model_config, prefix)
            self._phase(Phase.WARMUP, Edge.BEGIN)
            return other
        self._phase(Phase.IMPORT, Edge.END)
        self._phase(Phase.INIT, Edge.BEGIN)
        self._reading = RankStream(
            self._start, rank, draft=packed_draft, log=self._log, report=self._report
        )
        shard = self._reading.shard
        try:
            # vLLM itself unties only the model of its whole configuration: not EAGLE's heads.
            if shard.has_head and not (
                packed_draft and model_config is not vllm_config.model_config
            ):
                untie(model_config)
            packed = shard.fingerprint
            if is_a_draft(model_config):
                model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            elif packed is not None:
                here = engine_fingerprint(vllm_config, model_config)
                check_fingerprint(Fingerprint.from_json(packed), here.to_json())
                # Taken before post-processing: the ordinary order, straight into the parameters.
                model = super().load_model(vllm_config, model_config, prefix)
            elif self._device.type != "cpu" and self._in_vllm_layout():
                model = self._load_processed(vllm_config, model_config, prefix)
            else:
                model = super().load_model(vllm_config, model_config, prefix)
        except TensorserveError as error:
            # vLLM wraps what its workers raise; the log keeps the message and the exit code. The
            # rank whose error another rank's is tells of it itself.
            if not isinstance(error, OtherRankError):
                self._emit(StartFailed.by(error))
            raise
        self._phase(Phase.POSTPROCESS, Edge.END)
        self._phase(Phase.WARMUP, Edge.BEGIN)
        if self._log is not None:
            report_errors(self._log, self._number)
        hide_from_others(rank)
        return model

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """As vLLM's own; notes which parameters get no value."""
        self._watch = Watch()
        with self._watch.birth():
            model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill `model` in place."""
        if not any(True for _ in model.parameters()):
            return  # vLLM's extract_hidden_states: a cache, and nothing to fill
        self._phase(Phase.INIT, Edge.END)
        self._phase(Phase.LOAD, Edge.BEGIN)
        populate_soon(model, self._start.processors)
        reading = self._rank_stream
        with self._device_errors(), reading.open() as opened:
            packed = reading.shard.fingerprint is not None
            as_vllm_has_it = packed or is_vllm_layout(opened.index)
            if is_a_draft(model_config) and as_vllm_has_it:
                raise ConfigurationError(
                    f"The bundle is in vLLM's own layout, without {type(model).__name__}, which "
                    "drafts for its model.",
                    hint="Pack the checkpoint without --layout vllm: such a bundle holds all of "
                    "it.",
                )
            # All that `pack` took from a rank, also what vLLM computes where a checkpoint has it.
            records = list(opened.index.tensors) if packed else loadable(opened.index)
            if not as_vllm_has_it:
                dropped = dropped_here(model, balanced=self._moves_experts)
                records = [r for r in records if not _worth(r) or not dropped(module_name(r))]
            self._plan(opened, records, whole=not as_vllm_has_it)
            if as_vllm_has_it:
                targets = homes(model)
                here = self._device if reading.stages else torch.device("cpu")
                tensors = reading.tensors(
                    opened, records, lambda record: home(targets, record, here)
                )
                parameters = ((n, t) for n, t in tensors if n != RANK_MARKER)
                copy_in_place(model, parameters, once=packed)
            else:
                tensors = reading.tensors(opened, records)
                beside = beside_the_checkpoint(self.load_config, model)
                draft = is_a_draft(model_config)
                fill(self._watch, model, chain(tensors, beside), draft=draft)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        self._emit(LoadDone(self._number))
        self._phase(Phase.LOAD, Edge.END)
        self._phase(Phase.POSTPROCESS, Edge.BEGIN)

    def _plan(self, opened: OpenTensors, records: list[TensorRecord], *, whole: bool) -> None:
        """Agree with the other ranks how `records` are loaded, and say so.

        `whole`: each rank gets whole tensors of a checkpoint, of which it takes what it needs.
        """
        reading = self._rank_stream
        agreement = reading.agree(opened, records) if whole else Agreement(Sharing.LAYOUT)
        own = agreement.opened(records, get_tensor_model_parallel_rank())
        self._emit(
            LoadPlanned(
                rank=self._number,
                bytes=sum(r.length for r in records),
                tensors=len(records),
                loader=self._start.settings.loader,
                transport=opened.source.transport,
                sharing=agreement.sharing,
                opens=sum(r.length for r in own),
            )
        )

    def _load_processed(
        self,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
        prefix: str,
    ) -> nn.Module:
        """For a file that vLLM's own serializer wrote on a GPU: it holds parameters *after*
        post-processing, so the empty module is post-processed first, then filled.

        On a CPU post-processing repacks weights into memory that no file can hold: there the file
        holds parameters before it, and the ordinary order is right. Not run on a GPU yet.
        """
        with set_default_torch_dtype(model_config.dtype), self._device:
            model = self.create_model(vllm_config, model_config, prefix)
        with set_default_torch_dtype(model_config.dtype):
            process_weights_after_loading(model, model_config, self._device)
            self.load_weights(model, model_config)
        ready: nn.Module = model.eval()
        return ready

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """A device reports an error at any later call, also at one of the model's own."""
        try:
            yield
        except torch.AcceleratorError as error:
            raise load_failure(error, self._start.settings.loader) from error

    def _in_vllm_layout(self) -> bool:
        with self._rank_stream.open(to_load=False) as opened:
            return is_vllm_layout(opened.index)

    def _report(self, progress: LoadProgress) -> None:
        self._emit(LoadProgressed(self._number, progress.snapshot()))

    @property
    def _rank_stream(self) -> RankStream:
        if self._reading is None:  # vLLM's weight cache calls load_weights() alone
            self._reading = RankStream(
                self._start, Rank(self._device), log=self._log, report=self._report
            )
        return self._reading

    @property
    def _start(self) -> Start:
        assert self._started is not None
        return self._started

    def _emit(self, event: Event) -> None:
        if self._log is not None:
            self._log.emit(event)

    def _phase(self, phase: Phase, edge: Edge) -> None:
        if self._number == 0:
            self._emit(PhaseChanged(phase, edge))


def hide_from_others(rank: Rank) -> None:
    """Let no other process read this one's memory, where it is the only rank on the machine.

    Of several ranks, replicas too, one opens what another has fetched, and torch hands memory on by
    pidfd_getfd: there, core files are off, and no more.
    """
    if rank.ranks_here == 1:
        hide_memory()


def _worth(record: TensorRecord) -> bool:
    """Whether a tensor is worth leaving out: small ones are read with their neighbours."""
    return record.length > DEFAULTS.small_bytes


def fill(
    watch: Watch,
    model: nn.Module,
    tensors: Iterator[tuple[str, torch.Tensor]],
    *,
    draft: bool = False,
) -> None:
    """Fill `model`, which `watch` has seen made, from a whole checkpoint.

    Raises CorruptError where the two do not fit, or where a parameter is left without a value.
    """
    # A model of others' (remote code, a plugin) may write in ways that vLLM's own do not.
    with watch.load(model, every_operation=not type(model).__module__.startswith("vllm.")):
        reported = give(model, tensors)
    refuse_unfilled(watch, model, reported, draft=draft)
