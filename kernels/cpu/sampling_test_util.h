// Shared by the tests of the samplers: requests that use everything, and the definition the slow
// way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels/cpu/sampling.h"

namespace wintserve::kernels::cpu {

inline std::vector<float> RandomLogits(size_t size, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

// A row and what is asked of it, with what the request's spans point at.
struct TestRequest {
  std::vector<float> logits;
  std::vector<int32_t> masked;
  std::vector<sampling::LogitBias> bias;
  std::vector<TokenOccurrence> occurrences;
  SampleRequest scalars;  // its spans are empty

  SampleRequest Request() const {
    SampleRequest request = scalars;
    request.masked_ids = masked;
    request.logit_bias = bias;
    request.occurrences = occurrences;
    return request;
  }
};

// The definition, the slow way: logits, weights and masses in float64.
inline int32_t ReferenceSample(const TestRequest& r) {
  const SampleRequest& request = r.scalars;
  std::vector<double> logits(r.logits.begin(), r.logits.end());
  const auto size = static_cast<int32_t>(logits.size());
  for (const auto [id, bias] : r.bias) {
    if (id < size) logits[id] += bias;
  }
  for (const auto [id, occurrence] : r.occurrences) {
    if (id >= size) continue;
    const sampling::Penalties& penalties = request.penalties;
    const uint32_t count = occurrence & 0x7fffffff;
    logits[id] *= logits[id] > 0 ? 1.0 / penalties.repetition : double{penalties.repetition};
    if (count > 0) logits[id] -= count * double{penalties.frequency} + penalties.presence;
  }
  std::vector<bool> is_masked(size, false);
  for (const int32_t id : r.masked) {
    if (id < size) is_masked[id] = true;
  }
  std::vector<int32_t> order;
  for (int32_t id = 0; id < size; ++id) {
    if (!is_masked[id]) order.push_back(id);
  }
  if (order.empty()) {
    order.resize(size);
    std::iota(order.begin(), order.end(), 0);
  }
  const bool cuts_k = request.top_k > 0 && request.top_k < std::ssize(order);
  const auto falling = [&](int32_t a, int32_t b) { return logits[a] > logits[b]; };
  const int32_t best = *std::min_element(order.begin(), order.end(), falling);
  if (request.temperature == 0) return best;
  if (cuts_k || request.top_p < 1 || request.min_p > 0) {
    std::stable_sort(order.begin(), order.end(), falling);
  }
  const auto weight = [&](int32_t id) {
    return std::exp((logits[id] - logits[best]) / request.temperature);
  };
  std::erase_if(order, [&](int32_t id) { return weight(id) < double{request.min_p}; });
  if (cuts_k && request.top_k < std::ssize(order)) order.resize(request.top_k);
  double total = 0;
  for (const int32_t id : order) total += weight(id);
  if (request.top_p < 1) {
    double mass = 0;
    size_t kept = 0;
    while (mass < (request.top_p - 0x1p-21) * total) mass += weight(order[kept++]);
    order.resize(kept);
    total = mass;
  }
  const double target = total * UniformDraw(request.seed, request.position, request.choice_index);
  double mass = 0;
  for (const int32_t id : order) {
    mass += weight(id);
    if (mass > target) return id;
  }
  return order.back();
}

// Logits, bias and penalties lie on a grid that float32 keeps exactly, so that float64 orders them
// alike: what differs is the rounding of weights alone.
inline TestRequest RandomTestRequest(size_t vocabulary, uint32_t index, std::mt19937* random) {
  const auto pick = [random](auto... values) {
    const std::common_type_t<decltype(values)...> list[] = {values...};
    return list[(*random)() % sizeof...(values)];
  };
  const auto size = static_cast<int32_t>(vocabulary);
  TestRequest r;
  const float spread = 0.1f * static_cast<float>(1 + (*random)() % 60);
  r.logits = RandomLogits(vocabulary, spread, static_cast<uint32_t>((*random)()));
  // The coarse grid makes many ties.
  const float grid = index % 5 == 0 ? 1.0f : 64.0f;
  for (float& logit : r.logits) logit = std::round(logit * grid) / grid;
  if (index % 3 == 0) {
    for (int32_t id = 0; id < size + 3; ++id) {
      if ((*random)() % 16 == 0) r.masked.push_back(id);
      if ((*random)() % 16 == 0) {
        r.bias.push_back({id, static_cast<float>((*random)() % 9) * 0.5f - 2.0f});
      }
      if ((*random)() % 4 == 0) {
        const auto count = static_cast<uint32_t>(1 + (*random)() % 4);
        r.occurrences.push_back({id, pick(0u, sampling::kInPrompt) + count});
      }
    }
  }
  const bool is_greedy = index % 16 == 0;
  r.scalars = {.temperature = is_greedy ? 0.0f : 0.3f + 0.1f * static_cast<float>((*random)() % 15),
               .top_p = pick(1.0f, 0.95f, 0.7f, 0.2f),
               .top_k = pick(0, 0, 1, 5, 50, size / 2),
               .seed = static_cast<int64_t>((*random)()),
               .position = index,
               .min_p = pick(0.0f, 0.0f, 0.011f, 0.13f),
               .penalties = {.repetition = pick(1.0f, 2.0f, 0.5f),
                             .presence = pick(0.0f, 0.5f, -1.0f),
                             .frequency = pick(0.0f, 0.25f, -0.5f)}};
  return r;
}

}  // namespace wintserve::kernels::cpu
