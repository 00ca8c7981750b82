"""How does vLLM's CPU build load the compiled models that it has written?

vLLM 0.32.0, compilation/decorators.py:315 (`_try_load_aot_compiled_fn`), calls `finalize_loading`
of what it has loaded. That is a method of vLLM's own VllmSerializableFunction, which only the mode
VLLM_COMPILE makes. The CPU build compiles in the mode DYNAMO_TRACE_ONCE (platforms/cpu.py:366):
what is loaded then is torch's BundledAOTAutogradSerializableCallable, which lacks the method. vLLM
reports "Compiling model again due to a load failure" and compiles at every start. There is nothing
to finalize: torch has loaded all of it. So the class gets a method that does nothing.

The processor's features must be in the key then: compile_key.py. Can be removed when vLLM asks
whether there is such a method, or torch has one: then this does nothing already.

What is loaded is compiled, and torch runs the compiler all the same, for some seconds
(torch/_inductor/codecache.py:3756, CppCodeCache.load_async, torch 2.13): it precompiles the headers
before it looks whether the library is there, and tries each vector width of the processor
(cpu_vec_isa.py). So both are left out while vLLM loads. The library's name comes from its source
and the compiler's flags, which stay as they are. A library that is missing is compiled with the
headers as they are, and where the compiler fails, vLLM compiles the model again.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_METHOD = "finalize_loading"
_LOAD = "_try_load_aot_compiled_fn"
_PRECOMPILE = "_precompile_header"


def load_compiled_models() -> None:
    """Gives torch's class the method that vLLM calls, where it has none and vLLM calls it; and lets
    vLLM load on a CPU without running the compiler.

    Call it when vllm.compilation.decorators is imported. May be called more than once.
    """
    from torch._dynamo import aot_compile_types
    from vllm.compilation import decorators

    load = getattr(decorators, _LOAD, None)
    if hasattr(load, "__wrapped__"):
        return
    called = getattr(getattr(load, "__code__", None), "co_names", ())
    loaded: Any = getattr(aot_compile_types, "BundledAOTAutogradSerializableCallable", None)
    if _METHOD in called and loaded is not None and not hasattr(loaded, _METHOD):
        setattr(loaded, _METHOD, _nothing_to_finalize)
    if load is not None:
        setattr(decorators, _LOAD, _without_compiler(load))


def _without_compiler(load: Any) -> Any:
    """vLLM's function `load`, which runs no compiler for what is compiled."""

    @functools.wraps(load)
    def loading(*arguments: Any, **named: Any) -> Any:
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return load(*arguments, **named)
        with compiled_already():
            return load(*arguments, **named)

    return loading


@contextmanager
def compiled_already() -> Iterator[None]:
    """While it lasts, torch precompiles no headers and tries no vector width; in all threads."""
    from torch._inductor import codecache, config

    stock: Any = getattr(codecache, _PRECOMPILE, None)
    if stock is not None:
        setattr(codecache, _PRECOMPILE, _as_it_is)
    try:
        with config.patch({"cpp.vec_isa_ok": True}):
            yield
    finally:
        if stock is not None:
            setattr(codecache, _PRECOMPILE, stock)


def _as_it_is(header: str, *_: Any, **__: Any) -> str:
    """What `-include` shall name, in the place of a precompiled `header`."""
    return header


def _nothing_to_finalize(self: Any, vllm_config: Any) -> None:
    """See VllmSerializableFunction.finalize_loading."""
