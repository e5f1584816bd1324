#include "kernels/cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cpu/logit_scan.h"
#include "kernels/sampling/check_params.h"

namespace wintserve::kernels::cpu {
namespace {

constexpr size_t kBlock = 256;  // ids whose mass is summed before it meets the running total
// The scaled logits of a band span ln 4: it is sorted only when the mass before it falls short.
constexpr float kBandWidth = 1.3862944f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// How many of the masked ids the logits have.
size_t CountMasked(std::span<const int32_t> masked_ids, size_t vocabulary) {
  int64_t previous = -1;
  size_t count = 0;
  for (const int32_t id : masked_ids) {
    CHECK(id > previous, "masked id {} after {}", id, previous);
    previous = id;
    count += static_cast<size_t>(id) < vocabulary ? 1 : 0;
  }
  return count;
}

}  // namespace

float UniformDraw(int64_t seed, uint32_t position, uint32_t choice_index) {
  return static_cast<float>(sampling::UniformBits(seed, position, choice_index)) * 0x1p-24f;
}

absl::StatusOr<int32_t> Sampler::Sample(std::span<const float> logits,
                                        const SampleRequest& request) {
  sampling::CheckParams(request);
  CHECK(logits.size() <= sampling::kMaxVocabulary, "{} logits", logits.size());
  ASSIGN_OR_RETURN(const float maximum, FiniteMaximum(logits));
  size_t num_masked = CountMasked(request.masked_ids, logits.size());
  if (num_masked == logits.size()) num_masked = 0;
  const bool has_penalties = !request.penalties.none() && !request.occurrences.empty();
  if (num_masked == 0 && request.logit_bias.empty() && !has_penalties) {
    return Draw(logits, maximum, logits.size(), request);
  }
  const std::span<const float> values = Process(logits, request, num_masked);
  return Draw(values, Maximum(values), logits.size() - num_masked, request);
}

std::span<const float> Sampler::Process(std::span<const float> logits, const SampleRequest& request,
                                        size_t num_masked) {
  const size_t vocabulary = logits.size();
  processed_.assign(logits.begin(), logits.end());
  const auto process = [&](int32_t id, float bias, sampling::Occurrence occurrence) {
    CHECK(id >= 0, "token {}", id);
    if (static_cast<size_t>(id) >= vocabulary) return;
    processed_[id] = sampling::ProcessedLogit(processed_[id], bias, occurrence, request.penalties);
  };
  // A biased id that occurs is processed twice, which is the same as once: no bias in its bounds
  // takes a finite logit out of float32's range. A banned id comes last.
  for (const auto [id, bias] : request.logit_bias) {
    if (bias == sampling::kBanned) continue;
    CHECK(std::fabs(bias) <= sampling::kMaxAbsLogitBias, "bias {} of token {}", bias, id);
    process(id, bias, 0);
  }
  if (!request.penalties.none()) {
    for (const auto [id, occurrence] : request.occurrences) process(id, 0, occurrence);
  }
  for (const auto [id, bias] : request.logit_bias) {
    if (bias == sampling::kBanned) process(id, bias, 0);
  }
  if (num_masked > 0) {
    for (const int32_t id : request.masked_ids) {
      if (static_cast<size_t>(id) < vocabulary) processed_[id] = -kInfinity;
    }
  }
  return processed_;
}

int32_t Sampler::Draw(std::span<const float> values, float maximum, size_t num_unmasked,
                      const SampleRequest& request) {
  if (request.temperature == 0) {
    return static_cast<int32_t>(std::find(values.begin(), values.end(), maximum) - values.begin());
  }
  const uint32_t uniform_bits =
      sampling::UniformBits(request.seed, request.position, request.choice_index);
  const auto top_k = static_cast<size_t>(request.top_k);
  if (top_k > 0 && top_k < num_unmasked) {
    return DrawFromTopK(values, maximum, request, uniform_bits);
  }
  weights_.resize(values.size());
  FillWeights(values, maximum, request.temperature, sampling::MinScaledLogit(request.min_p),
              weights_);
  if (request.top_p == 1 && request.min_p == 0) return DrawFromAll(uniform_bits);
  return DrawFromBands(values, maximum, request, uniform_bits);
}

int32_t Sampler::DrawFromAll(uint32_t uniform_bits) {
  masses_.clear();
  uint64_t total = 0;
  for (size_t begin = 0; begin < weights_.size(); begin += kBlock) {
    const size_t size = std::min(kBlock, weights_.size() - begin);
    masses_.push_back(TotalMass({weights_.data() + begin, size}));
    total += masses_.back();
  }
  const uint64_t target = sampling::TargetMass(uniform_bits, total);
  uint64_t running = 0;  // adds up to `total`, which is more than the target
  size_t block = 0;
  while (running + masses_[block] <= target) running += masses_[block++];
  size_t id = block * kBlock;
  while ((running += sampling::Mass(weights_[id])) <= target) ++id;
  return static_cast<int32_t>(id);
}

int32_t Sampler::DrawFromTopK(std::span<const float> values, float maximum,
                              const SampleRequest& request, uint32_t uniform_bits) {
  KeepFirst(values, static_cast<size_t>(request.top_k), &candidates_);
  const float min_scaled_logit = sampling::MinScaledLogit(request.min_p);
  running_masses_.clear();
  uint64_t running = 0;
  for (const sampling::Candidate candidate : candidates_) {
    const float scaled =
        sampling::ScaledLogit(values[sampling::IdOf(candidate)], maximum, request.temperature);
    running += sampling::Mass(sampling::Weight(scaled, min_scaled_logit));
    running_masses_.push_back(running);
  }
  uint64_t kept = running;
  if (request.top_p < 1) {
    kept = running_masses_[FirstWith(sampling::EnoughMass(request.top_p, running))];
  }
  const uint64_t target = sampling::TargetMass(uniform_bits, kept);
  return sampling::IdOf(candidates_[FirstWith(target + 1)]);
}

int32_t Sampler::DrawFromBands(std::span<const float> values, float maximum,
                               const SampleRequest& request, uint32_t uniform_bits) {
  candidates_.clear();
  running_masses_.clear();
  float high = kInfinity;
  int num_bands = 0;
  // All bands together have any mass that is asked for here.
  const auto append_until = [&](uint64_t mass) {
    while (running_masses_.empty() || running_masses_.back() < mass) {
      const float depth = kBandWidth * static_cast<float>(++num_bands);
      const float low =
          depth > -sampling::kMinScaledLogit ? -kInfinity : maximum - depth * request.temperature;
      AppendBand(values, low, high);
      high = low;
    }
  };
  uint64_t kept = TotalMass(weights_);
  if (request.top_p < 1) {
    const uint64_t enough = sampling::EnoughMass(request.top_p, kept);
    append_until(enough);
    kept = running_masses_[FirstWith(enough)];
  }
  const uint64_t target = sampling::TargetMass(uniform_bits, kept);
  append_until(target + 1);
  return sampling::IdOf(candidates_[FirstWith(target + 1)]);
}

size_t Sampler::FirstWith(uint64_t mass) const {
  return std::lower_bound(running_masses_.begin(), running_masses_.end(), mass) -
         running_masses_.begin();
}

void Sampler::AppendBand(std::span<const float> values, float low, float high) {
  const int64_t num_sorted = std::ssize(candidates_);
  ForEachWithin(values, low, high, [&](size_t id) {
    if (weights_[id] == 0) return;
    candidates_.push_back(
        sampling::CandidateOf(sampling::FallingKey(values[id]), static_cast<uint32_t>(id)));
  });
  std::sort(candidates_.begin() + num_sorted, candidates_.end());
  uint64_t running = running_masses_.empty() ? 0 : running_masses_.back();
  for (size_t i = num_sorted; i < candidates_.size(); ++i) {
    running += sampling::Mass(weights_[sampling::IdOf(candidates_[i])]);
    running_masses_.push_back(running);
  }
}

}  // namespace wintserve::kernels::cpu
