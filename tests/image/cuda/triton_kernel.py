"""Compiles a kernel with Triton for each architecture; it asks no GPU, and has its own ptxas."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(pointer, count, block: tl.constexpr):
    places = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(pointer + places, mask=places < count)
    tl.store(pointer + places, 2 * values, mask=places < count)


for capability in (80, 90, 100, 120):
    source = ASTSource(
        double, {"pointer": "*fp32", "count": "i32", "block": "constexpr"}, {"block": 128}
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    print(capability, len(compiled.asm["cubin"]))
