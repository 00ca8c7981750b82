"""The cuda image, as far as a machine without a GPU can show: make test-image-cuda.

It needs the image (20 GB of disk while it is built), so it is not part of `make test-image`:
TEST_CUDA_IMAGE names it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from containers import needs_podman, podman, run
from s3server import free_ports

IMAGE = os.environ.get("TEST_CUDA_IMAGE", "")
pytestmark = [
    needs_podman,
    pytest.mark.skipif(not IMAGE, reason="make test-image-cuda: TEST_CUDA_IMAGE names no image"),
]
# What is run inside: nothing of it is in the image.
SCRIPTS = Path(__file__).with_name("cuda")
SITE = "/opt/tensorserve/lib/python3.11/site-packages"
# A folder with the stub under the driver's name, for what cannot be imported without a driver.
WITH_DRIVER = (
    "mkdir -p /tmp/driver && ln -sf $CUDA_HOME/lib64/stubs/libcuda.so /tmp/driver/libcuda.so.1 && "
    "export LD_LIBRARY_PATH=/tmp/driver && exec "
)
# An arbitrary user of group 0, of whom /etc/passwd does not know.
NOBODY = "--user=123456:0"
# An empty volume, gone with its container.
CACHE = "--volume=/var/lib/tensorserve/cache"


def shell(script: str, environ: dict[str, str] | None = None) -> str:
    """What a script prints in a hardened container; it has to end well."""
    done = run(
        "bash",
        "-ec",
        script,
        environ=environ,
        options=(NOBODY, CACHE, f"--volume={SCRIPTS}:/scripts:ro"),
        image=IMAGE,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_toolkit_is_of_one_release() -> None:
    """Compiler, assembler, linker, headers and libraries; nothing of another on the path."""
    said = shell(
        "cd $CUDA_HOME; for tool in nvcc ptxas nvlink fatbinary; do bin/$tool --version; done;"
        "grep -h 'define CUDART_VERSION' include/cuda_runtime_api.h;"
        "grep -h 'define CUDA_VERSION' include/cuda.h; type -a -p nvcc; ls -d /usr/local/cuda*"
    )

    assert re.findall(r"release (\d+\.\d+)", said) == ["13.0"] * 4
    assert re.findall(r"VERSION +(\d+)", said) == ["13000"] * 2
    assert said.splitlines()[-2:] == ["/usr/local/cuda/bin/nvcc", "/usr/local/cuda"]


@pytest.mark.parametrize("architecture", ["80", "90a", "100a", "120a"])
def test_a_program_is_compiled_and_linked_for_each_architecture(architecture: str) -> None:
    """With the driver's stub; the driver itself is asked for when the program runs."""
    said = shell(
        f"nvcc -arch=sm_{architecture} /scripts/program.cu --cudart shared -lcuda -o /tmp/program;"
        "ldd /tmp/program"
    )

    assert "libcuda.so.1 => not found" in said
    assert "libcudart.so.13" in said


def test_the_stub_is_never_found_in_place_of_the_driver() -> None:
    """No search path has its folder, and programs ask for another name, libcuda.so.1."""
    said = shell(
        'ldconfig -p | grep -c libcuda.so || true; echo "[$LD_LIBRARY_PATH]";'
        "find / -xdev -name 'libcuda.so*' 2>/dev/null || true;"
        "python -c \"import ctypes; ctypes.CDLL('libcuda.so.1')\" 2>&1 | tail -1"
    ).splitlines()

    assert said[:2] == ["0", "[]"]
    assert said[2:-1] == [f"{SITE}/nvidia/cu13/lib/stubs/libcuda.so"]
    assert said[-1].startswith("OSError: libcuda.so.1: cannot open shared object file")


@pytest.mark.parametrize("architecture", ["90", "100"])
def test_deep_gemms_kernels_are_compiled_as_its_jit_does(architecture: str) -> None:
    """For Hopper the very GEMM of block-FP8 models, for Blackwell what prepares their scales."""
    said = shell(
        f"nvcc /scripts/deep_gemm_sm{architecture}.cu --cubin --output-file /tmp/kernel.cubin"
        f" --include-path {SITE}/vllm/third_party/deep_gemm/include"
        f" --gpu-architecture=sm_{architecture}a -std=c++20 --use_fast_math --compiler-options=-O3"
        " --expt-relaxed-constexpr --expt-extended-lambda 2>/dev/null; stat -c %s /tmp/kernel.cubin"
    )

    assert int(said) > 10_000


@pytest.mark.parametrize("library", ["triton", "tilelang"])
def test_a_library_compiles_a_kernel_for_each_architecture(library: str) -> None:
    """Triton with its own assembler, TileLang with the image's nvcc."""
    said = shell(f"python /scripts/{library}_kernel.py").splitlines()

    assert [re.match(r"\d+", line)[0] for line in said] == ["80", "90", "100", "120"]


EVERYWHERE = {"sampling"}
TENSOR_PARALLEL = {"trtllm_mnnvl_comm"}


@pytest.mark.parametrize(
    ("gpu", "compiled"),
    [
        ("8.0", EVERYWHERE),
        ("8.9", EVERYWHERE),
        ("9.0", EVERYWHERE | TENSOR_PARALLEL),
        ("10.0", EVERYWHERE | TENSOR_PARALLEL),
        ("12.0", EVERYWHERE),
        ("12.1", EVERYWHERE),
        # Nothing: FlashInfer compiles it, instead of starting what cannot run there.
        ("10.3", set()),
    ],
)
def test_flashinfer_takes_the_kernels_that_the_image_brings(gpu: str, compiled: set[str]) -> None:
    """Those of the GPU's own architecture, and they can be loaded."""
    said = shell(
        WITH_DRIVER + "python /scripts/flashinfer_kernels.py",
        environ={"FLASHINFER_CUDA_ARCH_LIST": gpu},
    )

    states = dict(line.split(" ", 1) for line in said.splitlines())
    assert {name for name, state in states.items() if state == "loaded"} == compiled
    assert "cannot be loaded" not in states.values()


def test_flashinfer_compiles_what_the_image_does_not_bring() -> None:
    """As it does when a module is first used; on a read-only root, as a user that nobody knows."""
    said = shell(
        "python /scripts/flashinfer_kernels.py page", environ={"FLASHINFER_CUDA_ARCH_LIST": "9.0"}
    )

    assert said.startswith("compiled True")


def test_everything_that_vllm_imports_can_be_imported() -> None:
    """With the stub as the driver: it finds no GPU, and every symbol is there."""
    said = shell(WITH_DRIVER + "python /scripts/imports.py 2>&1").splitlines()

    done, of = re.fullmatch(r"(\d+) of (\d+) imported", said[-1]).groups()
    assert done == of, said[-12:]


def test_every_cache_can_be_written_by_an_arbitrary_user() -> None:
    """Each library's own idea of its place, with a read-only root and only the cache's volume."""
    said = shell("python /scripts/caches.py 2>/dev/null").splitlines()

    assert said[0] == "user tensorserve"
    assert re.fullmatch(r"\d\d places, 9 libraries", said[-1])


def test_the_build_left_nothing_in_the_cache() -> None:
    """What root had made there, another user could not write to."""
    assert shell("find /var/lib/tensorserve/cache -mindepth 1") == ""


def test_workers_can_be_bound_to_a_numa_node() -> None:
    """`--numa-bind` starts them through numactl."""
    assert shell("numactl --cpunodebind=0 echo bound") == "bound\n"


def test_torch_finds_the_toolkit() -> None:
    """Its extensions, and vLLM's question whether FlashInfer can compile."""
    said = shell(
        "python -c 'from torch.utils.cpp_extension import CUDA_HOME; print(CUDA_HOME);"
        "from vllm.utils.flashinfer import has_flashinfer; print(has_flashinfer())' 2>/dev/null"
    )

    assert said.split() == ["/usr/local/cuda", "True"]


@pytest.mark.parametrize("command", ["check", "up"])
def test_without_a_gpu_it_says_so_and_ends_with_78(command: str, bundle: Path) -> None:
    """`check`, and a start."""
    (port,) = free_ports(1)
    done = run(
        command,
        environ={
            "TENSORSERVE_MODEL_URI": "/models/model",
            "TENSORSERVE_KEY_FILE": "/models/key",
            "TENSORSERVE_METRICS_PORT": str(port),
        },
        options=(NOBODY, CACHE, f"--volume={bundle}:/models:ro"),
        image=IMAGE,
        timeout=300,
    )

    assert done.returncode == 78, done.stdout + done.stderr
    assert "No GPU is visible, and the installed vLLM is the CUDA build." in done.stderr
    assert "--gpus all" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_image_is_below_eleven_gigabytes() -> None:
    """All of it, unpacked."""
    size = int(podman("image", "inspect", "--format", "{{.Size}}", IMAGE).stdout)

    assert size < 11e9, f"{size / 1e9:.2f} GB"
