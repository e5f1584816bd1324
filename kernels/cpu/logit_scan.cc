#include "kernels/cpu/logit_scan.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>
#include <limits>

#include "absl/status/status.h"

namespace wintserve::kernels::cpu {
namespace {

constexpr int kLanes = 16;  // independent chains, so that the compiler vectorises a reduction

}  // namespace

float Maximum(std::span<const float> values) {
  float maxima[kLanes];
  std::fill_n(maxima, kLanes, -FLT_MAX);
  const size_t whole = values.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float x = values[i + lane];
      maxima[lane] = x > maxima[lane] ? x : maxima[lane];
    }
  }
  for (size_t i = whole; i < values.size(); ++i) maxima[0] = std::max(maxima[0], values[i]);
  return *std::max_element(maxima, maxima + kLanes);
}

absl::StatusOr<float> FiniteMaximum(std::span<const float> logits) {
  if (logits.empty()) return absl::InvalidArgumentError("there are no logits to sample from");
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

void FillWeights(std::span<const float> values, float maximum, float temperature,
                 float min_scaled_logit, std::span<float> weights) {
  float* const out = weights.data();
  for (size_t id = 0; id < values.size(); ++id) {
    out[id] =
        sampling::Weight(sampling::ScaledLogit(values[id], maximum, temperature), min_scaled_logit);
  }
}

uint64_t TotalMass(std::span<const float> weights) {
  // What sampling::Mass subtracts from every weight is subtracted once.
  const auto magic_mass = [](float weight) {
    return std::bit_cast<uint64_t>(weight + sampling::kMassMagic);
  };
  uint64_t lanes[kLanes] = {};
  const size_t whole = weights.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += magic_mass(weights[i + lane]);
  }
  for (size_t i = whole; i < weights.size(); ++i) lanes[0] += magic_mass(weights[i]);
  uint64_t mass = 0;
  for (const uint64_t lane : lanes) mass += lane;
  return mass - weights.size() * sampling::kMassMagicBits;
}

void KeepFirst(std::span<const float> values, size_t count,
               std::vector<sampling::Candidate>* candidates) {
  const size_t capacity = count + std::max<size_t>(count, 256);
  candidates->clear();
  float threshold = -std::numeric_limits<float>::infinity();
  const auto cut = [&] {
    if (candidates->size() <= count) return;
    const auto last_kept = candidates->begin() + static_cast<int64_t>(count) - 1;
    std::nth_element(candidates->begin(), last_kept, candidates->end());
    candidates->resize(count);
    threshold = values[sampling::IdOf(candidates->back())];
  };
  ForEachWithin(values, threshold, std::numeric_limits<float>::infinity(), [&](size_t id) {
    candidates->push_back(
        sampling::CandidateOf(sampling::FallingKey(values[id]), static_cast<uint32_t>(id)));
    if (candidates->size() == capacity) cut();
  });
  cut();
  std::sort(candidates->begin(), candidates->end());
}

}  // namespace wintserve::kernels::cpu
