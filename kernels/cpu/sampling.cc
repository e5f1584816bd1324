#include "kernels/cpu/sampling.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cpu/philox.h"

namespace wintserve::kernels::cpu {
namespace {

constexpr int kLanes = 16;      // independent chains, so that the compiler vectorises a reduction
constexpr size_t kBlock = 256;  // ids whose mass is summed before it meets the running total
constexpr size_t kGlance = 64;  // ids looked at together before any is looked at alone
constexpr double kMassRounding = 0x1p-21;
constexpr float kBandFactor =
    0.25f;  // a band of weights is sorted only when the mass before falls short

// exp(x) for x <= 0 within 2 ulp; 0 below -87, where float32 would turn subnormal. Not std::exp:
// this one has the same bits everywhere and is vectorised.
inline float ExpOfNegative(float x) {
  constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the integer
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kRoundToInteger;
  const float n = shifted - kRoundToInteger;
  const float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts
  float series = 1.0f / 5040;
  series = series * r + 1.0f / 720;
  series = series * r + 1.0f / 120;
  series = series * r + 1.0f / 24;
  series = series * r + 1.0f / 6;
  series = series * r + 0.5f;
  series = series * r + 1.0f;
  series = series * r + 1.0f;
  const int32_t exponent =
      std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRoundToInteger);
  const float power = std::bit_cast<float>((exponent + 127) << 23);
  return x < -87.0f ? 0.0f : series * power;
}

// Dividing, not multiplying by 1 / temperature: that may be infinite, and 0 * infinity is no
// weight.
inline float Weight(float logit, float maximum, float temperature) {
  return ExpOfNegative((logit - maximum) / temperature);
}

// The largest logit. INVALID_ARGUMENT names the first one that is not finite.
absl::StatusOr<float> FiniteMaximum(std::span<const float> logits) {
  float maxima[kLanes];
  float traces[kLanes];  // x * 0 leaves a NaN behind for whatever is not finite
  std::fill_n(maxima, kLanes, -FLT_MAX);
  std::fill_n(traces, kLanes, 0.0f);
  const size_t whole = logits.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float x = logits[i + lane];
      maxima[lane] = x > maxima[lane] ? x : maxima[lane];
      traces[lane] += x * 0.0f;
    }
  }
  for (size_t i = whole; i < logits.size(); ++i) {
    maxima[0] = std::max(maxima[0], logits[i]);
    traces[0] += logits[i] * 0.0f;
  }
  float trace = 0;
  for (const float lane : traces) trace += lane;
  if (trace == 0.0f) return *std::max_element(maxima, maxima + kLanes);
  const auto bad =
      std::find_if(logits.begin(), logits.end(), [](float logit) { return !std::isfinite(logit); });
  return absl::InvalidArgumentError(
      fmt::format("the logit of token {} is {}", bad - logits.begin(), *bad));
}

double BlockMass(std::span<const float> weights) {
  double lanes[kLanes] = {};
  const size_t whole = weights.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += weights[i + lane];
  }
  for (size_t i = whole; i < weights.size(); ++i) lanes[0] += weights[i];
  double mass = 0;
  for (const double lane : lanes) mass += lane;
  return mass;
}

// Falling `value`, then rising id, as rising integers. -0 and 0 are equal values.
uint64_t Descending(float value, size_t id) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  const uint32_t ascending = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t{~ascending} << 32 | id;
}

int32_t IdOf(uint64_t candidate) { return static_cast<int32_t>(candidate & 0xffffffff); }

// REQUIRES: made of a value >= 0.
float ValueOf(uint64_t candidate) {
  return std::bit_cast<float>(~static_cast<uint32_t>(candidate >> 32) & 0x7fffffffu);
}

// Calls visit(id) for ids with low <= values[id] < high, in rising order. Most are out: a cheap
// look at many of them decides whether to look at each.
template <typename Visit>
void ForEachWithin(std::span<const float> values, const float& low, float high, Visit visit) {
  for (size_t begin = 0; begin < values.size(); begin += kGlance) {
    const size_t end = std::min(begin + kGlance, values.size());
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

}  // namespace

float UniformDraw(int64_t seed, uint32_t position, uint32_t choice_index) {
  const auto bits = static_cast<uint64_t>(seed);
  const PhiloxKey key = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  const uint32_t word = Philox4x32({position, choice_index, 0, 0}, key)[0];
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

absl::StatusOr<int32_t> Sampler::Sample(std::span<const float> logits,
                                        const SampleRequest& request) {
  CHECK(request.temperature >= 0, "temperature={}", request.temperature);
  CHECK(request.top_p > 0 && request.top_p <= 1, "top_p={}", request.top_p);
  CHECK(request.top_k >= 0, "top_k={}", request.top_k);
  if (logits.empty()) return absl::InvalidArgumentError("there are no logits to sample from");

  ASSIGN_OR_RETURN(const float maximum, FiniteMaximum(logits));
  if (request.masked_ids.empty()) return Draw(logits, maximum, request);
  DropMasked(logits, request.masked_ids);
  if (unmasked_.empty()) return Draw(logits, maximum, request);
  ASSIGN_OR_RETURN(const float unmasked_maximum, FiniteMaximum(unmasked_));
  int32_t id = Draw(unmasked_, unmasked_maximum, request);
  // Every masked id up to the drawn one moved it down by one.
  for (const int32_t masked : request.masked_ids) {
    if (masked <= id) ++id;
  }
  return id;
}

void Sampler::DropMasked(std::span<const float> logits, std::span<const int32_t> masked_ids) {
  unmasked_.clear();
  size_t begin = 0;
  for (const int32_t masked : masked_ids) {
    const auto end = static_cast<size_t>(masked);
    if (end >= logits.size()) break;
    CHECK(end >= begin, "masked ids are not in rising order");
    unmasked_.insert(unmasked_.end(), logits.begin() + begin, logits.begin() + end);
    begin = end + 1;
  }
  unmasked_.insert(unmasked_.end(), logits.begin() + begin, logits.end());
}

int32_t Sampler::Draw(std::span<const float> logits, float maximum, const SampleRequest& request) {
  if (request.temperature == 0) {
    return static_cast<int32_t>(std::find(logits.begin(), logits.end(), maximum) - logits.begin());
  }
  const float uniform = UniformDraw(request.seed, request.position, request.choice_index);
  const auto top_k = static_cast<size_t>(request.top_k);
  if (top_k > 0 && top_k < logits.size()) {
    KeepTopK(logits, top_k);
    RankByWeight(logits, maximum, request.temperature);
    return DrawFromCandidates(request.top_p, uniform);
  }
  const double total = FillWeights(logits, maximum, request.temperature);
  if (request.top_p == 1) return DrawFromAll(total, uniform);
  return DrawFromTopP(total, request.top_p, uniform);
}

double Sampler::FillWeights(std::span<const float> logits, float maximum, float temperature) {
  weights_.resize(logits.size());
  float* const weights = weights_.data();
  for (size_t id = 0; id < logits.size(); ++id) {
    weights[id] = Weight(logits[id], maximum, temperature);
  }
  block_masses_.clear();
  double total = 0;
  for (size_t begin = 0; begin < weights_.size(); begin += kBlock) {
    const size_t size = std::min(kBlock, weights_.size() - begin);
    block_masses_.push_back(BlockMass({weights_.data() + begin, size}));
    total += block_masses_.back();
  }
  return total;
}

int32_t Sampler::DrawFromAll(double total, float uniform) const {
  const double target = uniform * total;
  double mass = 0;  // adds up to `total`, which is more than the target
  size_t block = 0;
  while (mass + block_masses_[block] <= target) mass += block_masses_[block++];
  const size_t end = std::min((block + 1) * kBlock, weights_.size());
  size_t last_possible = block * kBlock;
  for (size_t id = block * kBlock; id < end; ++id) {
    if (weights_[id] == 0) continue;
    last_possible = id;
    mass += weights_[id];
    if (mass > target) break;
  }
  return static_cast<int32_t>(last_possible);
}

void Sampler::KeepTopK(std::span<const float> logits, size_t top_k) {
  const size_t capacity = top_k + std::max<size_t>(top_k, 256);
  candidates_.clear();
  float threshold = -std::numeric_limits<float>::infinity();
  const auto cut = [&] {
    if (candidates_.size() <= top_k) return;
    const auto last_kept = candidates_.begin() + static_cast<int64_t>(top_k) - 1;
    std::nth_element(candidates_.begin(), last_kept, candidates_.end());
    candidates_.resize(top_k);
    threshold = logits[IdOf(candidates_.back())];
  };
  ForEachWithin(logits, threshold, std::numeric_limits<float>::infinity(), [&](size_t id) {
    candidates_.push_back(Descending(logits[id], id));
    if (candidates_.size() == capacity) cut();
  });
  cut();
}

void Sampler::RankByWeight(std::span<const float> logits, float maximum, float temperature) {
  for (Candidate& candidate : candidates_) {
    const int32_t id = IdOf(candidate);
    candidate = Descending(Weight(logits[id], maximum, temperature), id);
  }
  std::sort(candidates_.begin(), candidates_.end());
}

int32_t Sampler::DrawFromCandidates(float top_p, float uniform) {
  double total = 0;
  for (const Candidate candidate : candidates_) total += ValueOf(candidate);
  double mass = total;
  size_t num_kept = candidates_.size();
  if (top_p < 1) {
    mass = 0;
    num_kept = 0;
    ExtendTopP((top_p - kMassRounding) * total, &num_kept, &mass);
  }
  return DrawFromFirst(num_kept, uniform * mass);
}

bool Sampler::ExtendTopP(double enough, size_t* num_kept, double* mass) const {
  while (*num_kept < candidates_.size()) {
    *mass += ValueOf(candidates_[(*num_kept)++]);
    if (*mass >= enough) return true;
  }
  return false;
}

int32_t Sampler::DrawFromTopP(double total, float top_p, float uniform) {
  const double enough = (top_p - kMassRounding) * total;
  candidates_.clear();
  size_t num_kept = 0;
  double mass = 0;
  float high = std::numeric_limits<float>::infinity();
  for (float low = kBandFactor; high > FLT_MIN; low *= kBandFactor) {
    AppendBand(std::max(low, FLT_MIN), high);
    if (ExtendTopP(enough, &num_kept, &mass)) break;
    high = std::max(low, FLT_MIN);
  }
  return DrawFromFirst(num_kept, uniform * mass);
}

void Sampler::AppendBand(float low, float high) {
  const int64_t num_sorted = std::ssize(candidates_);
  ForEachWithin(weights_, low, high,
                [&](size_t id) { candidates_.push_back(Descending(weights_[id], id)); });
  std::sort(candidates_.begin() + num_sorted, candidates_.end());
}

int32_t Sampler::DrawFromFirst(size_t num_kept, double target) const {
  double mass = 0;
  for (size_t i = 0; i + 1 < num_kept; ++i) {
    mass += ValueOf(candidates_[i]);
    if (mass > target) return IdOf(candidates_[i]);
  }
  return IdOf(candidates_[num_kept - 1]);
}

}  // namespace wintserve::kernels::cpu
