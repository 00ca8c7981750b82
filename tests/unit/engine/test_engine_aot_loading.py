"""vLLM's CPU build can load what it has compiled; where upstream is right, nothing is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

METHOD = "finalize_loading"


@pytest.fixture
def loaded() -> Iterator[Any]:
    """torch's class, as it is without the adaptation."""
    # Its import adds the method where another test has had vLLM call our plugin.
    from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable
    from vllm.compilation import decorators

    def forget() -> None:
        own = vars(BundledAOTAutogradSerializableCallable).get(METHOD)
        if own is not None and own.__module__.startswith("tensorserve"):
            delattr(BundledAOTAutogradSerializableCallable, METHOD)
        load = decorators._try_load_aot_compiled_fn
        decorators._try_load_aot_compiled_fn = getattr(load, "__wrapped__", load)

    forget()
    yield BundledAOTAutogradSerializableCallable
    forget()


def test_vllm_calls_a_method_that_torch_lacks(loaded: Any) -> None:
    """While this holds, the adaptation is needed; else aot_loading.py can go."""
    from vllm.compilation import decorators

    source = inspect.getsource(decorators._try_load_aot_compiled_fn)

    assert "loaded_fn._artifacts.compiled_fn.finalize_loading(model.vllm_config)" in source
    assert not hasattr(loaded, METHOD)


def test_the_method_is_added(loaded: Any) -> None:
    """It does nothing: torch has loaded everything."""
    from tensorserve.engine.aot_loading import load_compiled_models

    load_compiled_models()

    assert getattr(object.__new__(loaded), METHOD)(None) is None


def test_a_method_of_torch_stays(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a later version."""
    from tensorserve.engine.aot_loading import load_compiled_models

    monkeypatch.setattr(loaded, METHOD, print, raising=False)
    load_compiled_models()

    assert getattr(loaded, METHOD) is print


@pytest.mark.parametrize("function", [None, lambda: None])
def test_nothing_is_added_that_nobody_calls(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, function: Any
) -> None:
    """Where vLLM's function is gone, or does not call the method."""
    from vllm.compilation import decorators

    from tensorserve.engine.aot_loading import load_compiled_models

    monkeypatch.setattr(decorators, "_try_load_aot_compiled_fn", function)
    load_compiled_models()

    assert not hasattr(loaded, METHOD)


@pytest.mark.usefixtures("loaded")
def test_the_compiler_is_left_out_while_vllm_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after, torch does what it does."""
    from torch._inductor import codecache, config
    from vllm.compilation import decorators

    from tensorserve.engine.aot_loading import load_compiled_models

    def state() -> tuple[object, bool | None]:
        return codecache._precompile_header, config.cpp.vec_isa_ok

    def load(model: object, path: object) -> object:
        return model, path, state()

    before = state()
    monkeypatch.setattr(decorators, "_try_load_aot_compiled_fn", load)
    load_compiled_models()
    load_compiled_models()
    model, path, meanwhile = decorators._try_load_aot_compiled_fn(1, 2)

    assert (model, path) == (1, 2)
    assert meanwhile[0] is not before[0]
    assert meanwhile[1] is True
    assert state() == before


def test_a_compiled_kernel_is_found_without_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left out is not in the library's name. Stock torch runs the compiler all the same.

    Where the library is missing, it is compiled.
    """
    from torch._inductor import codecache, cpu_vec_isa
    from torch._inductor.cpp_builder import CppBuilder

    from tensorserve.engine.aot_loading import compiled_already

    source = """
        #include <torch/csrc/inductor/cpp_prefix.h>
        extern "C" void kernel(const float* a, float* b) {
            at::vec::Vectorized<float>::loadu(a).store(b);
        }
    """
    built: list[CppBuilder] = []
    stock = CppBuilder.build

    def build(self: CppBuilder) -> None:
        built.append(self)
        stock(self)

    headers = codecache._precompile_header

    def builds() -> int:
        """How often the compiler runs in a process that has not had the kernel yet."""
        codecache.CppPythonBindingsCodeCache.cache.clear()
        headers.cache_clear()
        cpu_vec_isa.valid_vec_isa_list.cache_clear()
        built.clear()
        codecache.CppPythonBindingsCodeCache.load_pybinding(["const float*", "float*"], source)
        return len(built)

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CppBuilder, "build", build)
    with compiled_already():
        assert builds()
    assert builds()
    with compiled_already():
        assert not builds()
