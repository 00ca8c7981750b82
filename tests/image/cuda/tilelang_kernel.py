"""Compiles a kernel with TileLang for each architecture, with the compiler that it finds."""

import tilelang.language as T
from tilelang import tvm
from tilelang.engine import lower


@T.prim_func
def double(values: T.Tensor((1024,), "float16"), result: T.Tensor((1024,), "float16")):
    with T.Kernel(8, threads=128) as block:
        part = T.alloc_fragment((128,), "float16")
        T.copy(values[block * 128], part)
        for i in T.Parallel(128):
            part[i] = part[i] * 2
        T.copy(part, result[block * 128])


for capability in ("80", "90a", "100a", "120a"):
    target = tvm.target.Target({"kind": "cuda", "arch": f"sm_{capability}"})
    with target:
        compiled = lower(double, target=target, enable_device_compile=True)
    print(capability, "__global__" in compiled.kernel_source)
