// What the products are measured against: a kernel that only reads, and the WINT2 product with
// FastDeploy's arithmetic in the same skeleton. Also random operands, made on the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/matmul/product_params.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::cuda {

// Reads size_bytes (a multiple of 16) once, with `num_blocks` blocks.
void LaunchRead(const void* data, int64_t size_bytes, int num_blocks, float* sink,
                cudaStream_t stream);

// One matrix of `layout` with random weights; never zeros. float_maps: the columns' code maps as
// floats (code_scale, code_zp + 0.5), as FastDeployWint2 takes them, instead of integer lines.
void LaunchFillWeights(const plan::WeightLayout& layout, uint32_t seed, bool float_maps,
                       uint8_t* weights, cudaStream_t stream);
void LaunchFillRows(float* rows, int64_t count, uint32_t seed, cudaStream_t stream);

// Prepared rows as bfloat16 patterns in place of binary16 ones.
void LaunchBfloat16Rows(PreparedRows rows, int64_t count, cudaStream_t stream);

// The plan's kernel with a codec that decodes as FastDeploy does: byte -> float -> fused
// multiply-add -> integer, three shifts, and each weight multiplied by its bfloat16 scale.
void LaunchFastDeployWint2(const plan::ProductPlan& plan, const ProductParams& params,
                           cudaStream_t stream);

}  // namespace wintserve::kernels::cuda
