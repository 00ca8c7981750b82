"""The loader inside vLLM: streams a .tensors file into the model, on CPU and on CUDA alike.

Together with `vllm_plugin` the only module that knows vLLM's internals (0.32.0).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from tensorserve.errors import ConfigurationError, CorruptError, TensorserveError
from tensorserve.format import FileIndex, TensorRecord
from tensorserve.layouts import is_vllm_layout, loadable, module_name
from tensorserve.loading import LoadOptions, LoadProgress, TensorStream, report_every
from tensorserve.loading.prefetch import PrefetchedSource
from tensorserve.loading.shared import SharedBlocks
from tensorserve.opening import OpenTensors, access_for, key_for, open_tensors
from tensorserve.prefetching import prefetch_budget
from tensorserve.settings import Settings
from tensorserve.sources import Source
from tensorserve.start import Start, receive_start
from tensorserve.telemetry import EventLog, events_path

PROGRESS_SECONDS = 0.25


class TensorserveLoader(BaseModelLoader):  # type: ignore[misc]
    """vLLM's load format `tensorizer`. One is made in each worker."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._start: Start = receive_start(os.environ)
        self._log = EventLog(events_path(self._start.settings.state_dir))
        self._rank = 0
        self._device = torch.device("cpu")
        self._progress = LoadProgress()

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to do: weights are streamed, never stored."""

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """The module with its weights, processed for this device's kernels."""
        self._rank = get_tensor_model_parallel_rank()
        self._phase("import", "end")
        self._phase("init", "begin")
        try:
            device = torch.device(self.load_config.device or vllm_config.device_config.device)
            self._device = device
            if device.type != "cpu" and self._in_vllm_layout():
                model = self._load_processed(vllm_config, model_config, prefix, device)
            else:
                model = super().load_model(vllm_config, model_config, prefix)
        except TensorserveError as error:
            # vLLM wraps what its workers raise; the log keeps the message and the exit code.
            self._log.emit(
                "failure", reason=error.reason, exit_code=error.exit_code, message=error.message
            )
            raise
        self._phase("postprocess", "end")
        self._phase("warmup", "begin")
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Fill `model` in place."""
        self._phase("init", "end")
        self._phase("load", "begin")
        with self._open() as opened:
            records = loadable(opened.index)
            self._log.emit(
                "load_plan",
                rank=self._rank,
                bytes=sum(r.length for r in records),
                tensors=len(records),
            )
            if is_vllm_layout(opened.index):
                targets = homes(model)
                tensors = self._stream(opened, records, lambda record: home(targets, record))
                copy_in_place(model, tensors)
            else:
                loaded = give(model, self._stream(opened, records))
                if model_config.quantization is None and loaded is not None:
                    # The stock loader's own check that no parameter was left as it was born.
                    try:
                        DefaultModelLoader.track_weights_loading(self, model, loaded)
                    except ValueError as error:
                        raise unfit(model, "what it needs is not in the file", error) from error
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self._log.emit("load_done", rank=self._rank)
        self._phase("load", "end")
        self._phase("postprocess", "begin")

    def _load_processed(
        self,
        vllm_config: VllmConfig,
        model_config: ModelConfig,
        prefix: str,
        device: torch.device,
    ) -> nn.Module:
        """vLLM's own layout on a GPU: the file holds parameters *after* post-processing.

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
        source = self._prefetched(opened.source) if to_load else opened.source
        try:
            yield replace(opened, source=source)
        finally:
            source.close()

    def _prefetched(self, source: Source) -> Source:
        """`source`, with what was fetched ahead of it; as it is, where that is gone or another."""
        path = self._start.prefetched
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
        limit = settings.host_memory_limit
        if self._start.prefetched is not None:
            limit -= prefetch_budget(settings)
        shard = self._start.shard(self._rank)
        options = LoadOptions(
            connections=settings.fetch_connections,
            ahead_bytes=limit,
            verify_hashes=settings.verify == "hashes",
            processors=self._start.processors,
            pinned=self._device.type == "cuda",
            headers_sha256=shard.headers_sha256 if whole(opened.index, records) else None,
        )
        stream = TensorStream(
            opened.source,
            records,
            encrypted=opened.index.encrypted,
            key=opened.key,
            options=options,
            progress=self._progress,
            place=place,
        )
        end = report_every(PROGRESS_SECONDS, self._report)
        try:
            with stream:
                for record, tensor in stream:
                    started = time.monotonic()
                    yield module_name(record), tensor
                    self._progress.stage("copy", record.length, time.monotonic() - started)
        finally:
            end()

    def _report(self) -> None:
        self._log.emit("load_progress", rank=self._rank, **self._progress.snapshot())

    def _phase(self, phase: str, state: str) -> None:
        if self._rank == 0:
            self._log.emit("phase", phase=phase, state=state)


def whole(index: FileIndex, records: list[TensorRecord]) -> bool:
    """Whether `records` are all tensors of the file."""
    return len(records) == len(index.tensors)


def give(model: nn.Module, tensors: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None:
    """Hand a checkpoint's tensors to vLLM's own weight loaders; gives what they say they loaded.

    Raises CorruptError, naming the tensor, where the model refuses one.
    """
    last = "the first"

    def watched() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal last
        for name, tensor in tensors:
            last = repr(name)
            yield name, tensor

    try:
        # Every vLLM model has it; torch's Module does not know.
        loaded: set[str] | None = model.load_weights(watched())  # type: ignore[operator]
    except (KeyError, ValueError, AssertionError) as error:
        raise unfit(model, f"it refused {last}", error) from error
    return loaded


def unfit(model: nn.Module, what: str, error: Exception) -> CorruptError:
    """The error for a checkpoint whose tensors are not those of the model in config.json."""
    return CorruptError(
        f"The file's tensors are not those of vLLM's {type(model).__name__}: {what} "
        f"({str(error)[:500]}).",
        hint="Do config.json and the .tensors file belong together? A file that was not made from "
        "a checkpoint may name its tensors otherwise: pack the checkpoint with `tensorserve pack`.",
    )


def homes(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a file in vLLM's layout may fill, by name: parameters and buffers.

    vLLM's writer stores buffers too that are in no state dict (tables of rotary embeddings).
    """
    return dict(model.named_buffers(remove_duplicate=False)) | model.state_dict(keep_vars=True)


def home(targets: dict[str, torch.Tensor], record: TensorRecord) -> torch.Tensor | None:
    """The parameter's own memory (uint8), where a tensor can be read straight into it."""
    target = targets.get(module_name(record))
    if (
        target is None
        or target.device.type != "cpu"
        or not target.is_contiguous()
        or str(target.dtype) != f"torch.{record.dtype}"
        or tuple(target.shape) != record.shape
    ):
        return None  # what does not fit is said where it is copied
    return target.data.view(-1).view(torch.uint8)


def copy_in_place(model: nn.Module, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Copy a file in vLLM's own layout over the model's parameters and buffers.

    Raises ConfigurationError where a name, shape or dtype does not fit, CorruptError where the
    file lacks a parameter.
    """
    targets = homes(model)
    filled: set[int] = set()
    with torch.no_grad():
        for name, tensor in tensors:
            target = targets.get(name)
            if target is None:
                raise ConfigurationError(
                    f"The file holds {name!r}, which this model does not have.",
                    hint="It was written in vLLM's own layout for another model, version, dtype, "
                    "quantization or parallel size. Pack the checkpoint with `tensorserve pack`.",
                )
            if target.shape != tensor.shape or target.dtype != tensor.dtype:
                raise ConfigurationError(
                    f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in the file and "
                    f"{tuple(target.shape)} {target.dtype} in this model.",
                    hint="A file in vLLM's own layout fits only the vLLM version, dtype, "
                    "quantization and parallel size (and CPU or GPU) that wrote it.",
                )
            if target.data_ptr() != tensor.data_ptr():
                target.data.copy_(tensor)
            filled.add(target.data_ptr())
    # Tied parameters share memory: one of their names is enough. Buffers are born with a value
    # (the scales of the KV cache with 1).
    left = [
        name
        for name, parameter in model.named_parameters()
        if parameter.numel() and parameter.data_ptr() not in filled
    ]
    if left:
        raise CorruptError(
            f"The file lacks {len(left)} of the model's parameters, for example {left[0]!r}.",
            hint="Was it written by another version of vLLM? Pack the checkpoint again.",
        )
