#include "kernels/cpu/row_ops.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/row_ops.cc"
#include "hwy/foreach_target.h"
// After foreach_target.
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace wintserve::kernels::cpu {
namespace HWY_NAMESPACE {

void AddRmsNormRowImpl(float* x, const float* delta, int64_t columns, const float* gain,
                       float epsilon, float* out) {
  const D d;
  const int64_t vector_end = columns / kLanes * kLanes;
  if (delta != nullptr) {
    for (int64_t c = 0; c < vector_end; c += kLanes) {
      hn::StoreU(hn::Add(hn::LoadU(d, x + c), hn::LoadU(d, delta + c)), d, x + c);
    }
    for (int64_t c = vector_end; c < columns; ++c) x[c] += delta[c];
  }
  V squares = hn::Zero(d);
  for (int64_t c = 0; c < vector_end; c += kLanes) {
    const V value = hn::LoadU(d, x + c);
    squares = hn::MulAdd(value, value, squares);
  }
  float sum = hn::GetLane(hn::SumOfLanes(d, squares));
  for (int64_t c = vector_end; c < columns; ++c) sum += x[c] * x[c];

  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(columns) + epsilon);
  const V factor_v = hn::Set(d, factor);
  for (int64_t c = 0; c < vector_end; c += kLanes) {
    const V normalized = hn::Mul(hn::LoadU(d, x + c), factor_v);
    hn::StoreU(hn::Mul(normalized, hn::LoadU(d, gain + c)), d, out + c);
  }
  for (int64_t c = vector_end; c < columns; ++c) out[c] = x[c] * factor * gain[c];
}

void AccumulateScaledImpl(float weight, const float* x, int64_t count, float* y) {
  const D d;
  const V weight_v = hn::Set(d, weight);
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes) {
    hn::StoreU(hn::MulAdd(weight_v, hn::LoadU(d, x + c), hn::LoadU(d, y + c)), d, y + c);
  }
  for (; c < count; ++c) y[c] += weight * x[c];
}

}  // namespace HWY_NAMESPACE
}  // namespace wintserve::kernels::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace wintserve::kernels::cpu {

HWY_EXPORT(AddRmsNormRowImpl);
HWY_EXPORT(AccumulateScaledImpl);

void AddRmsNormRow(float* x, const float* delta, int64_t columns, const float* gain, float epsilon,
                   float* out) {
  HWY_DYNAMIC_DISPATCH(AddRmsNormRowImpl)(x, delta, columns, gain, epsilon, out);
}

void AccumulateScaled(float weight, const float* x, int64_t count, float* y) {
  HWY_DYNAMIC_DISPATCH(AccumulateScaledImpl)(weight, x, count, y);
}

void RopeAnglesRow(int32_t position, int head_dim, const float* frequencies,
                   float compression_ratio, float* cos_sin) {
  const int half = head_dim / 2;
  const float scaled_position = static_cast<float>(position) / compression_ratio;
  for (int j = 0; j < half; ++j) {
    const float angle = scaled_position * frequencies[j];
    cos_sin[j] = std::cos(angle);
    cos_sin[half + j] = std::sin(angle);
  }
}

void RouteRow(const float* logits, const float* bias, const RouterShape& shape,
              float* probabilities, int32_t* expert_ids, float* expert_weights) {
  const int num_experts = shape.num_experts;
  const float maximum = *std::max_element(logits, logits + num_experts);
  float sum = 0;
  for (int e = 0; e < num_experts; ++e) {
    probabilities[e] = std::exp(logits[e] - maximum);
    sum += probabilities[e];
  }
  for (int e = 0; e < num_experts; ++e) probabilities[e] /= sum;

  float chosen_sum = 0;
  for (int slot = 0; slot < shape.top_k; ++slot) {
    int best = -1;
    float best_score = 0;
    for (int e = 0; e < num_experts; ++e) {
      if (std::find(expert_ids, expert_ids + slot, e) != expert_ids + slot) continue;
      // A plain addition: a bias near 40 has a spacing of 4e-6, and near-ties depend on it.
      const float score = bias == nullptr ? probabilities[e] : probabilities[e] + bias[e];
      if (best < 0 || score > best_score) {
        best = e;
        best_score = score;
      }
    }
    expert_ids[slot] = best;
    chosen_sum += probabilities[best];
  }
  const float divisor = std::max(chosen_sum, shape.norm_min);
  for (int slot = 0; slot < shape.top_k; ++slot) {
    expert_weights[slot] = probabilities[expert_ids[slot]] / divisor;
  }
}

}  // namespace wintserve::kernels::cpu
#endif
