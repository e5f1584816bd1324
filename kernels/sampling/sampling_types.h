// The plain data of a request's sampling: for whoever hands it on without computing.
// kernels/sampling/definition.h says what it means.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels/plan/host_device.h"

namespace wintserve::kernels::sampling {

// Bounds of a request's numbers; a bias or penalty beyond them could make a NaN of a finite logit.
inline constexpr float kMaxAbsPenalty = 2.0f;      // presence, frequency
inline constexpr float kMaxAbsLogitBias = 100.0f;  // OpenAI's; or kBanned

// A bias that rules an id out for as long as there is another one.
inline constexpr float kBanned = -std::numeric_limits<float>::infinity();

inline constexpr int kMaxLogitBiases = 1024;  // of one request

// OpenAI's and FastDeploy's bound of top_logprobs.
inline constexpr int kMaxTopLogprobs = 20;

struct LogitBias {
  int32_t id = 0;
  float bias = 0;
};

// How often an id occurs in a sequence: kInPrompt, if it is in the prompt, plus the number of times
// that it was generated.
using Occurrence = uint32_t;
inline constexpr Occurrence kInPrompt = 0x80000000u;

struct Penalties {
  float repetition = 1.0f;  // > 0, finite
  float presence = 0.0f;    // at most kMaxAbsPenalty either way
  float frequency = 0.0f;

  WINTSERVE_HOST_DEVICE constexpr bool none() const {
    return repetition == 1.0f && presence == 0.0f && frequency == 0.0f;
  }
};

}  // namespace wintserve::kernels::sampling
