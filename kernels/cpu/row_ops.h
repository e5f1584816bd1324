// Operators on one token's row. Free functions; no allocation, no threads.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace wintserve::kernels::cpu {

// x[:] += delta[:] unless delta is null; out[:] = x[:] / sqrt(mean(x^2) + epsilon) * gain[:].
void AddRmsNormRow(float* x, const float* delta, int64_t columns, const float* gain, float epsilon,
                   float* out);

// y[:] += weight * x[:]
void AccumulateScaled(float weight, const float* x, int64_t count, float* y);

// cos_sin [head_dim]: the cosines, then the sines, of position / compression_ratio times
// frequencies [head_dim / 2].
void RopeAnglesRow(int32_t position, int head_dim, const float* frequencies,
                   float compression_ratio, float* cos_sin);

// Chooses experts from logits [num_experts]; see Backend::Route. probabilities [num_experts] is
// scratch.
void RouteRow(const float* logits, const float* bias, const RouterShape& shape,
              float* probabilities, int32_t* expert_ids, float* expert_weights);

}  // namespace wintserve::kernels::cpu
