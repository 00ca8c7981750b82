"""Imports every package that vLLM imports on CUDA, and the extensions that need no driver."""

import importlib

NAMES = """
torch torchvision torchaudio triton triton.profiler tokenspeed_triton tokenspeed_mla flashinfer
flashinfer.comm flashinfer.gemm flashinfer.fused_moe flashinfer.sampling flashinfer.mla
flashinfer.jit tilelang tvm_ffi humming quack cutlass cutlass.cute cudnn cuda.bindings.driver
cuda.bindings.runtime cuda.core cuda.tile nccl nccl.core numba xgrammar llguidance outlines_core
lmformatenforcer fastsafetensors instanttensor cv2 z3 torch_c_dlpack_ext pynvml vllm
vllm._C_stable_libtorch vllm._moe_C_stable_libtorch vllm.vllm_flash_attn
vllm.third_party.deep_gemm vllm.third_party.fmha_sm100 vllm.third_party.tml_fa4
vllm.third_party.triton_kernels vllm.third_party.flashmla vllm.v1.attention.backends.flashinfer
vllm.v1.sample.ops.topk_topp_sampler vllm.distributed.device_communicators.flashinfer_all_reduce
vllm.model_executor.kernels.linear vllm.model_executor.layers.fused_moe
vllm.v1.worker.gpu_worker
""".split()

failed = {}
for name in NAMES:
    try:
        importlib.import_module(name)
    except BaseException as error:  # noqa: BLE001  # whatever it is, the others are to be tried as well
        failed[name] = f"{type(error).__name__}: {error}"
for name, why in failed.items():
    print(f"{name}: {why}")
print(f"{len(NAMES) - len(failed)} of {len(NAMES)} imported")
