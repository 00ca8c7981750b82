// One kernel with what nvcc needs headers, libraries and the driver's stub for.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>
#include <cuda/std/array>

__global__ void sum(const __nv_bfloat16* values, float* result) {
    using Reduce = cub::BlockReduce<float, 128>;
    __shared__ typename Reduce::TempStorage storage;
    cuda::std::array<float, 1> mine{__bfloat162float(values[threadIdx.x])};
    float total = Reduce(storage).Sum(mine[0]);
    if (threadIdx.x == 0) *result = total;
}

int main() {
    int driver = 0;
    sum<<<1, 128>>>(nullptr, nullptr);
    return cuDriverGetVersion(&driver) != CUDA_SUCCESS;
}
