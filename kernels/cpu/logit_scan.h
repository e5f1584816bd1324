// Passes over a row of logits that drawing and log-probabilities share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cpu {

// REQUIRES: none is NaN, at least one is not minus infinity.
float Maximum(std::span<const float> values);

// The largest logit. INVALID_ARGUMENT names the first one that is not finite, or says that there is
// none.
absl::StatusOr<float> FiniteMaximum(std::span<const float> logits);

// weights[id] = Weight(ScaledLogit(values[id], maximum, temperature), min_scaled_logit)
void FillWeights(std::span<const float> values, float maximum, float temperature,
                 float min_scaled_logit, std::span<float> weights);

// The sum of Mass(weight).
uint64_t TotalMass(std::span<const float> weights);

// `candidates` become the first `count` values in the order of sampling/definition.h, in that
// order. REQUIRES: count > 0; none is NaN.
void KeepFirst(std::span<const float> values, size_t count,
               std::vector<sampling::Candidate>* candidates);

// Calls visit(id) for ids with low <= values[id] < high, in rising order. visit may raise low. Most
// are out: a cheap look at many of them decides whether to look at each.
template <typename Visit>
void ForEachWithin(std::span<const float> values, const float& low, float high, Visit visit) {
  constexpr size_t kGlance = 64;
  for (size_t begin = 0; begin < values.size(); begin += kGlance) {
    const size_t end = begin + kGlance < values.size() ? begin + kGlance : values.size();
    const float low_now = low;
    int any = 0;
    for (size_t id = begin; id < end; ++id) {
      any |= static_cast<int>(values[id] >= low_now) & static_cast<int>(values[id] < high);
    }
    if (any == 0) continue;
    for (size_t id = begin; id < end; ++id) {
      if (values[id] >= low && values[id] < high) visit(id);
    }
  }
}

}  // namespace wintserve::kernels::cpu
