// Log-probabilities of a row of logits: step 2 of kernels/sampling/definition.h.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/sampling/definition.h"

namespace wintserve::kernels::cpu {

struct TokenLogprob {
  int32_t id = 0;
  float logprob = 0;
};

struct RowLogprobs {
  float logprob = 0;                   // of the token that was asked for
  int32_t rank = 0;                    // its place in the order of falling logits, from 1
  std::vector<TokenLogprob> top = {};  // in that order
};

// Owns scratch memory that grows to the largest vocabulary seen. Threading: thread-compatible.
class LogprobReader {
 public:
  // logits [vocabulary], as the model gave them. num_top, in 0 … sampling::kMaxTopLogprobs: how
  // many of the most probable ids; of a smaller vocabulary all. INVALID_ARGUMENT: a logit is NaN or
  // infinite, or there is none. REQUIRES: token_id >= 0.
  absl::StatusOr<RowLogprobs> Read(std::span<const float> logits, int32_t token_id, int num_top);

 private:
  std::vector<float> weights_;
  std::vector<sampling::Candidate> candidates_;
};

}  // namespace wintserve::kernels::cpu
