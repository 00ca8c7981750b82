"""Which of FlashInfer's modules the image has compiled for a GPU, and whether they can be loaded.

FLASHINFER_CUDA_ARCH_LIST stands for a GPU. With the argument `page`, it compiles that module, as
FlashInfer does when one is first used.
"""

import sys
import time

from flashinfer.jit import comm, env, gemm, page, sampling

SPECS = {
    "sampling": sampling.gen_sampling_module,
    "trtllm_comm": comm.gen_trtllm_comm_module,
    "trtllm_mnnvl_comm": comm.gen_trtllm_mnnvl_comm_module,
    "fp8_blockscale_gemm_90": gemm.gen_fp8_blockscale_gemm_sm90_module,
}

if sys.argv[1:] == ["page"]:
    spec = page.gen_page_module()
    began = time.monotonic()
    spec.build(verbose=False)
    print("compiled", spec.jit_library_path.exists(), f"{time.monotonic() - began:.0f} s")
    raise SystemExit

for name, make in SPECS.items():
    if not env.get_aot_artifacts(name):
        print(name, "not there")
        continue
    loaded = make().try_load()
    print(name, "loaded" if loaded is not None else "cannot be loaded")
