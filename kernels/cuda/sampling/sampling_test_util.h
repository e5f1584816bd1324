// Shared by the tests of sampling on a GPU and on an emulated one: rows of logits and requests of
// every kind, and what a launch for them reads and writes.
#pragma once

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/cpu/sampling.h"
#include "kernels/cpu/sampling_test_util.h"
#include "kernels/cuda/sampling/sampling_args.h"

namespace wintserve::kernels::cuda {

inline std::string Describe(const cpu::TestRequest& r) {
  const cpu::SampleRequest& s = r.scalars;
  return fmt::format(
      "vocabulary {} temperature {} top_p {} top_k {} min_p {} seed {} position {} penalties {} {} "
      "{} biased {} occurring {} masked {}",
      r.logits.size(), s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.position,
      s.penalties.repetition, s.penalties.presence, s.penalties.frequency, r.bias.size(),
      r.occurrences.size(), r.masked.size());
}

inline void ExpectCpuIds(const std::vector<cpu::TestRequest>& requests,
                         const std::vector<int32_t>& ids) {
  cpu::Sampler sampler;
  for (size_t i = 0; i < requests.size(); ++i) {
    const auto expected = sampler.Sample(requests[i].logits, requests[i].Request());
    ASSERT_TRUE(expected.ok()) << expected.status();
    EXPECT_EQ(ids[i], *expected) << "row " << i << ": " << Describe(requests[i]);
  }
}

// Rows of every shape of distribution that takes its own path: flat, peaked, full of ties, so wide
// that most has no mass, at the edges of float32.
inline std::vector<float> LogitsOfKind(int kind, int size, std::mt19937* random) {
  const auto seed = static_cast<uint32_t>((*random)());
  std::vector<float> logits = cpu::RandomLogits(size, 3, seed);
  switch (kind % 12) {
    case 0:
      break;
    case 1:
      logits = cpu::RandomLogits(size, 0.01f, seed);
      break;
    case 2:
      logits = cpu::RandomLogits(size, 40, seed);
      break;
    case 3:
      std::fill(logits.begin(), logits.end(), -1.25f);
      break;
    case 4:
      for (float& logit : logits) logit = std::round(logit);
      break;
    case 5:
      logits[seed % size] = 60;
      break;
    case 6:  // two logits alone
      for (float& logit : logits) logit = logit > 0 ? 0.5f : -0.5f;
      break;
    case 7:
      for (int i = 0; i < size; ++i) logits[i] = -1e-3f * static_cast<float>(i);
      break;
    case 8:  // both zeros, and what is next to them
      for (float& logit : logits) {
        const float values[] = {0.0f, -0.0f, 0x1p-149f, -0x1p-149f, 0x1p-126f};
        logit = values[(*random)() % 5];
      }
      break;
    case 9:
      for (float& logit : logits) logit *= FLT_MAX / 40;
      break;
    case 10:  // many neighbours in float32
      for (float& logit : logits) logit = 20 + static_cast<float>((*random)() % 64) * 0x1p-19f;
      break;
    default:  // a plateau of more ids than a block sorts, and a tail
      for (float& logit : logits) logit = std::min(logit, 1.0f);
      break;
  }
  return logits;
}

inline cpu::SampleRequest RandomScalars(int size, uint32_t position, std::mt19937* random) {
  const auto pick = [random](auto... values) {
    const std::common_type_t<decltype(values)...> list[] = {values...};
    return list[(*random)() % sizeof...(values)];
  };
  return {.temperature = pick(1.0f, 1.0f, 0.7f, 0.3f, 2.0f, 0.0f, 1e-3f, 1e-38f, 50.0f, 1e30f),
          .top_p = pick(1.0f, 1.0f, 0.95f, 0.8f, 0.3f, 1e-6f, 0x1.fffffep-1f),
          .top_k = pick(0, 0, 1, 2, 50, 1024, 1025, 5000, size - 1, size, size + 1),
          .seed = static_cast<int64_t>(uint64_t{(*random)()} << 32 | (*random)()),
          .position = position,
          .choice_index = static_cast<uint32_t>((*random)() % 3),
          .min_p = pick(0.0f, 0.0f, 0.0f, 0.05f, 0.5f, 1.0f, 1e-9f)};
}

// A vocabulary of one id may ask for top_k 0 by size - 1.
inline std::vector<cpu::TestRequest> RandomRequests(int num_rows, int size, std::mt19937* random) {
  std::vector<cpu::TestRequest> requests(num_rows);
  std::vector<int32_t> masked;
  for (int32_t id = 0; id < size + 2; ++id) {
    if ((*random)() % 8 == 0) masked.push_back(id);
  }
  for (int i = 0; i < num_rows; ++i) {
    cpu::TestRequest& r = requests[i];
    r.logits = LogitsOfKind(i, size, random);
    r.scalars = RandomScalars(size, static_cast<uint32_t>((*random)()), random);
    if ((*random)() % 3 == 0) r.masked = masked;
    if ((*random)() % 3 == 0) {
      for (int32_t id = 0; id < size + 2; ++id) {
        if ((*random)() % 64 != 0) continue;
        const float bias = static_cast<float>((*random)() % 2000) * 0.1f - 100;
        r.bias.push_back({id, (*random)() % 4 == 0 ? sampling::kBanned : bias});
      }
    }
    if ((*random)() % 3 == 0) {
      r.scalars.penalties = {.repetition = 0.5f + 0.1f * static_cast<float>((*random)() % 15),
                             .presence = 0.1f * static_cast<float>((*random)() % 40) - 2,
                             .frequency = 0.1f * static_cast<float>((*random)() % 40) - 2};
      for (int32_t id = 0; id < size; ++id) {
        if ((*random)() % 16 != 0) continue;
        const uint32_t count = (*random)() % 3;
        const bool in_prompt = count == 0 || (*random)() % 2 == 0;
        r.occurrences.push_back({id, (in_prompt ? sampling::kInPrompt : 0) + count});
      }
    }
  }
  return requests;
}

// What a launch reads and writes, for rows of one vocabulary. Slots are not in the order of rows,
// some are unused.
// Array: of elements T, made from a size or a vector, with data(), Set(vector) and Get().
template <template <typename> typename Array>
class TestRows {
 public:
  // padding: floats between one row of logits and the next. Every request with masked ids has the
  // same ones: those of the launch.
  explicit TestRows(const std::vector<cpu::TestRequest>& requests, int padding = 0)
      : num_rows_(static_cast<int>(requests.size())),
        vocabulary_(static_cast<int>(requests[0].logits.size())),
        logits_stride_(vocabulary_ + padding),
        counts_stride_((vocabulary_ + 3) / 4 * 4),
        logits_(num_rows_ * logits_stride_),
        rows_(num_rows_),
        counts_(num_slots() * counts_stride_),
        ids_(num_rows_),
        last_ids_(num_slots()) {
    std::vector<float> logits(num_rows_ * logits_stride_, std::numeric_limits<float>::quiet_NaN());
    std::vector<sampling::Occurrence> counts(num_slots() * counts_stride_, 0);
    size_t max_bias = 0;
    for (const cpu::TestRequest& r : requests) max_bias = std::max(max_bias, r.bias.size());
    std::vector<sampling::LogitBias> bias(num_slots() * max_bias);
    std::vector<int32_t> stop_ids;
    for (int i = 0; i < num_rows_; ++i) {
      const cpu::TestRequest& r = requests[i];
      std::copy(r.logits.begin(), r.logits.end(), logits.begin() + i * logits_stride_);
      for (const auto [id, occurrence] : r.occurrences) {
        if (id < vocabulary_) counts[SlotOf(i) * counts_stride_ + id] = occurrence;
      }
      std::copy(r.bias.begin(), r.bias.end(), bias.begin() + SlotOf(i) * max_bias);
      if (!r.masked.empty()) stop_ids = r.masked;
      host_rows_.push_back(RowOf(i, r));
    }
    logits_.Set(logits);
    counts_.Set(counts);
    rows_.Set(host_rows_);
    bias_stride_ = static_cast<int64_t>(max_bias);
    bias_ = Array<sampling::LogitBias>(bias);
    num_stop_ids_ = static_cast<int>(stop_ids.size());
    stop_ids_ = Array<int32_t>(stop_ids);
  }

  int num_slots() const { return num_rows_ + 5; }
  int SlotOf(int row) const { return num_slots() - 2 - row; }

  SamplingArgs args() const {
    return {.logits = logits_.data(),
            .logits_stride = logits_stride_,
            .num_rows = num_rows_,
            .vocabulary = vocabulary_,
            .rows = rows_.data(),
            .stop_ids = stop_ids_.data(),
            .num_stop_ids = num_stop_ids_,
            .logit_bias = bias_.data(),
            .logit_bias_stride = bias_stride_,
            .token_counts = counts_.data(),
            .token_counts_stride = counts_stride_,
            .ids = ids_.data(),
            .last_ids = last_ids_.data()};
  }

  std::vector<SamplingRow>& host_rows() { return host_rows_; }
  void UploadRows() { rows_.Set(host_rows_); }
  Array<float>& logits() { return logits_; }
  Array<sampling::Occurrence>& counts() { return counts_; }
  Array<int32_t>& ids() { return ids_; }
  Array<int32_t>& last_ids() { return last_ids_; }

 private:
  SamplingRow RowOf(int row, const cpu::TestRequest& r) const {
    return {.slot = SlotOf(row),
            .temperature = r.scalars.temperature,
            .top_p = r.scalars.top_p,
            .top_k = r.scalars.top_k,
            .min_p = r.scalars.min_p,
            .min_scaled_logit = sampling::MinScaledLogit(r.scalars.min_p),
            .penalties = r.scalars.penalties,
            .num_logit_bias = static_cast<int32_t>(r.bias.size()),
            .masks_stop_ids = r.masked.empty() ? 0 : 1,
            .position = r.scalars.position,
            .choice_index = r.scalars.choice_index,
            .seed = r.scalars.seed};
  }

  const int num_rows_;
  const int vocabulary_;
  const int64_t logits_stride_;
  const int64_t counts_stride_;
  std::vector<SamplingRow> host_rows_;
  Array<float> logits_;
  Array<SamplingRow> rows_;
  Array<sampling::Occurrence> counts_;
  Array<int32_t> ids_;
  Array<int32_t> last_ids_;
  int64_t bias_stride_ = 0;
  int num_stop_ids_ = 0;
  Array<sampling::LogitBias> bias_{0};
  Array<int32_t> stop_ids_{0};
};

}  // namespace wintserve::kernels::cuda
