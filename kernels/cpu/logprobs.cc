#include "kernels/cpu/logprobs.h"

#include <algorithm>
#include <limits>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cpu/logit_scan.h"

namespace wintserve::kernels::cpu {
namespace {

int32_t RankOf(std::span<const float> logits, int32_t token_id) {
  const float logit = logits[token_id];
  int32_t num_larger = 0;
  for (const float other : logits) num_larger += other > logit ? 1 : 0;
  const auto num_equal_before = std::count(logits.begin(), logits.begin() + token_id, logit);
  return num_larger + static_cast<int32_t>(num_equal_before) + 1;
}

}  // namespace

absl::StatusOr<RowLogprobs> LogprobReader::Read(std::span<const float> logits, int32_t token_id,
                                                int num_top) {
  CHECK(num_top >= 0 && num_top <= sampling::kMaxTopLogprobs, "num_top={}", num_top);
  CHECK(logits.size() <= sampling::kMaxVocabulary, "{} logits", logits.size());
  ASSIGN_OR_RETURN(const float maximum, FiniteMaximum(logits));
  CHECK(token_id >= 0, "token {}", token_id);
  weights_.resize(logits.size());
  FillWeights(logits, maximum, /*temperature=*/1, sampling::kMinScaledLogit, weights_);
  const uint64_t total = TotalMass(weights_);
  const auto logprob_of = [&](int32_t id) {
    return sampling::LogProbability(logits[id], maximum, total);
  };
  RowLogprobs result = {.logprob = -std::numeric_limits<float>::infinity(),
                        .rank = static_cast<int32_t>(logits.size()) + 1};
  if (static_cast<size_t>(token_id) < logits.size()) {
    result = {.logprob = logprob_of(token_id), .rank = RankOf(logits, token_id)};
  }
  if (num_top == 0) return result;
  KeepFirst(logits, std::min<size_t>(num_top, logits.size()), &candidates_);
  for (const sampling::Candidate candidate : candidates_) {
    const int32_t id = sampling::IdOf(candidate);
    result.top.push_back({.id = id, .logprob = logprob_of(id)});
  }
  return result;
}

}  // namespace wintserve::kernels::cpu
