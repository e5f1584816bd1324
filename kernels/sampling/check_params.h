// The bounds of a request's numbers, checked on the host: a device cannot say what is wrong.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/check.h"
#include "kernels/sampling/sampling_types.h"

namespace wintserve::kernels::sampling {

// Params: temperature, top_p, top_k, min_p and penalties, as definition.h has them. What is out of
// bounds is our bug (CHECK): requests are checked where they come in. NaN is out of bounds, too.
template <typename Params>
void CheckParams(const Params& params) {
  CHECK(params.temperature >= 0 && std::isfinite(params.temperature), "temperature={}",
        params.temperature);
  CHECK(params.top_p > 0 && params.top_p <= 1, "top_p={}", params.top_p);
  CHECK(params.top_k >= 0, "top_k={}", params.top_k);
  CHECK(params.min_p >= 0 && params.min_p <= 1, "min_p={}", params.min_p);
  const Penalties& penalties = params.penalties;
  CHECK(penalties.repetition > 0 && std::isfinite(penalties.repetition), "repetition={}",
        penalties.repetition);
  CHECK(std::fabs(penalties.presence) <= kMaxAbsPenalty, "presence={}", penalties.presence);
  CHECK(std::fabs(penalties.frequency) <= kMaxAbsPenalty, "frequency={}", penalties.frequency);
}

}  // namespace wintserve::kernels::sampling
