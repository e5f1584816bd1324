// Drawing ids and their log-probabilities: what the CPU's sampler says, on every backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <vector>

#include "kernels/backend_suite/suite_test_util.h"
#include "kernels/cpu/logprobs.h"
#include "kernels/cpu/sampling.h"
#include "kernels/cpu/token_counts.h"

namespace wintserve::kernels {
namespace {

using testing::Each;
using testing::ElementsAre;
using testing::ElementsAreArray;

class SampleTest : public testing::Test {
 protected:
  static constexpr int64_t kVocab = 1000;
  static constexpr int64_t kRealVocab = 900;  // ids at and above are never drawn

  // The ids that the rows draw from logits [rows, kVocab].
  std::vector<int32_t> Draw(const HostRows& logits, const std::vector<SampleParams>& params,
                            const std::vector<int32_t>& stop_ids) {
    const auto batch = EmptyBatch(static_cast<int32_t>(params.size()), stop_ids);
    return DrawFrom(batch.get(), logits, params);
  }

  static std::unique_ptr<DeviceBatch> EmptyBatch(int32_t num_slots,
                                                 const std::vector<int32_t>& stop_ids = {}) {
    return Must(TheBackend().CreateBatch({.max_tokens = num_slots,
                                          .max_rows = num_slots,
                                          .max_blocks_per_row = 10,
                                          .num_slots = num_slots,
                                          .stop_ids = stop_ids,
                                          .counted_vocab_size = kRealVocab}));
  }

  // Row i is of slot SlotOf(i).
  static int32_t SlotOf(size_t i, size_t num_rows) {
    return static_cast<int32_t>(num_rows - 1 - i);
  }

  static std::vector<int32_t> DrawFrom(DeviceBatch* batch, const HostRows& logits,
                                       const std::vector<SampleParams>& params) {
    const std::vector<int32_t> block = {0};
    Batch tokens;
    for (size_t i = 0; i < params.size(); ++i) {
      tokens.tokens.push_back(0);
      tokens.rows.push_back({.position = 0,
                             .length = 1,
                             .block_table = block,
                             .want_logits = true,
                             .slot = SlotOf(i, params.size()),
                             .sample = params[i]});
    }
    TheBackend().SetBatch(tokens, batch);
    const DeviceArray<int32_t> ids(std::vector<int32_t>(params.size(), -999));
    TheBackend().Sample(DeviceRows(logits).rows(), kRealVocab, batch, ids.data());
    return ids.ToHost();
  }
};

TEST_F(SampleTest, DrawsWhatTheReferenceSamplerDraws) {
  std::mt19937 rng(std::random_device{}());
  constexpr int kRows = 40;
  HostRows logits = RandomRows(kRows, kVocab, &rng, 3.0f);
  for (int64_t r = 0; r < kRows; ++r) {  // beyond the real vocabulary anything may stand
    for (int64_t c = kRealVocab; c < kVocab; ++c) logits.row(r)[c] = c % 2 == 0 ? NAN : 1e30f;
  }
  const std::vector<int32_t> stop_ids = {2, 17, 899};
  const float temperatures[] = {0.0f, 0.6f, 1.0f, 3.0f};
  const float top_ps[] = {1.0f, 0.9f, 0.3f};
  const int32_t top_ks[] = {0, 1, 20};
  std::vector<SampleParams> params;
  for (int i = 0; i < kRows; ++i) {
    params.push_back({.temperature = temperatures[i % 4],
                      .top_p = top_ps[i / 4 % 3],
                      .top_k = top_ks[i / 12 % 3],
                      .mask_stop_ids = i % 5 == 0,
                      .seed = static_cast<int64_t>(rng()) * (i % 2 == 0 ? 1 : -1),
                      .position = static_cast<uint32_t>(rng()),
                      .choice_index = static_cast<uint32_t>(i % 3)});
    // What must not be drawn is what would be.
    if (params.back().mask_stop_ids) logits.row(i)[17] = 20.0f;
  }
  std::vector<int32_t> expected;
  cpu::Sampler sampler;
  for (int i = 0; i < kRows; ++i) {
    cpu::SampleRequest request = {.temperature = params[i].temperature,
                                  .top_p = params[i].top_p,
                                  .top_k = params[i].top_k,
                                  .seed = params[i].seed,
                                  .position = params[i].position,
                                  .choice_index = params[i].choice_index};
    if (params[i].mask_stop_ids) request.masked_ids = stop_ids;
    expected.push_back(Must(sampler.Sample({logits.row(i), kRealVocab}, request)));
    EXPECT_FALSE(params[i].mask_stop_ids && expected.back() == 17);
  }
  EXPECT_THAT(Draw(logits, params, stop_ids), ElementsAreArray(expected));
}

TEST_F(SampleTest, ALogitThatIsNotFiniteIsNamedInPlaceOfTheId) {
  std::mt19937 rng(std::random_device{}());
  HostRows logits = RandomRows(4, kVocab, &rng);
  logits.row(1)[899] = NAN;
  logits.row(2)[0] = INFINITY;
  logits.row(2)[5] = NAN;
  logits.row(3)[7] = -INFINITY;
  const std::vector<SampleParams> params = {
      {.temperature = 0}, {.temperature = 0}, {}, {.top_p = 0.5f}};
  const std::vector<int32_t> ids = Draw(logits, params, {});
  EXPECT_GE(ids[0], 0);
  EXPECT_EQ(ids[1], -900);
  EXPECT_EQ(ids[2], -1);
  EXPECT_EQ(ids[3], -8);
}

// A sequence as the reference sees it.
struct History {
  std::vector<sampling::LogitBias> logit_biases = {};
  std::vector<int32_t> prompt = {};
  std::vector<int32_t> generated = {};

  SlotSampling sampling() const { return {logit_biases, prompt, generated}; }

  int32_t Draw(std::span<const float> logits, const SampleParams& params) const {
    cpu::TokenCounts counts;
    counts.AddPrompt(prompt);
    for (const int32_t id : generated) counts.AddGenerated(id);
    cpu::Sampler sampler;
    cpu::SampleRequest request = {.temperature = params.temperature,
                                  .top_p = params.top_p,
                                  .top_k = params.top_k,
                                  .seed = params.seed,
                                  .position = params.position,
                                  .choice_index = params.choice_index,
                                  .min_p = params.min_p,
                                  .penalties = params.penalties,
                                  .occurrences = counts.occurrences()};
    if (params.num_logit_biases > 0) request.logit_bias = logit_biases;
    return Must(sampler.Sample(logits, request));
  }
};

// Few ids, so that they come again.
std::vector<int32_t> RandomIds(size_t count, int32_t below, std::mt19937* rng) {
  std::vector<int32_t> ids(count);
  for (int32_t& id : ids) id = static_cast<int32_t>((*rng)() % below);
  return ids;
}

std::vector<sampling::LogitBias> RandomBiases(int32_t below, std::mt19937* rng) {
  std::map<int32_t, float> biases;
  while (biases.size() < 1 + (*rng)() % 30) {
    const float bias = static_cast<float>((*rng)() % 2001) / 10.0f - 100.0f;
    biases[static_cast<int32_t>((*rng)() % below)] = (*rng)() % 4 == 0 ? sampling::kBanned : bias;
  }
  std::vector<sampling::LogitBias> list;
  for (const auto& [id, bias] : biases) list.push_back({id, bias});
  return list;
}

TEST_F(SampleTest, PenaltiesAndBiasesFollowTheSequenceOfASlotFromStepToStep) {
  std::mt19937 rng(std::random_device{}());
  constexpr size_t kRows = 12;
  constexpr int32_t kIds = kRealVocab + 20;  // a prompt may hold ids that are not sampled
  const auto batch = EmptyBatch(kRows);
  std::vector<History> histories(kRows);
  std::vector<SampleParams> params(kRows);
  const auto start = [&](size_t i) {
    History& history = histories[i];
    history = {.prompt = RandomIds(rng() % 300, kIds, &rng),
               .generated = RandomIds(rng() % 300, kIds, &rng)};
    if (i % 3 != 0) history.logit_biases = RandomBiases(kIds, &rng);
    params[i] = {.temperature = i % 4 == 0 ? 0.0f : 0.9f,
                 .top_p = i % 5 == 0 ? 0.8f : 1.0f,
                 .top_k = i % 6 == 0 ? 40 : 0,
                 .min_p = i % 2 == 0 ? 0.0f : 0.1f,
                 .num_logit_biases = static_cast<int32_t>(history.logit_biases.size()),
                 .seed = static_cast<int64_t>(rng())};
    if (i % 4 != 3) params[i].penalties = {1.5f, -0.5f, 0.7f};
    TheBackend().StartSlot(SlotOf(i, kRows), history.sampling(), batch.get());
  };
  for (size_t i = 0; i < kRows; ++i) start(i);
  for (int step = 0; step < 12; ++step) {
    SCOPED_TRACE(step);
    // A slot gets another sequence while the others go on.
    if (step > 3) start(rng() % kRows);
    const HostRows logits = RandomRows(kRows, kVocab, &rng, 2.0f);
    std::vector<int32_t> expected;
    for (size_t i = 0; i < kRows; ++i) {
      params[i].position = static_cast<uint32_t>(step);
      const std::span row(logits.row(static_cast<int64_t>(i)), kRealVocab);
      expected.push_back(histories[i].Draw(row, params[i]));
      histories[i].generated.push_back(expected.back());
    }
    ASSERT_THAT(DrawFrom(batch.get(), logits, params), ElementsAreArray(expected));
  }
}

TEST_F(SampleTest, ABannedIdIsNotDrawnAndAForcedOneIs) {
  std::mt19937 rng(std::random_device{}());
  HostRows logits = RandomRows(3, kVocab, &rng);
  for (int64_t r = 0; r < 3; ++r) logits.row(r)[5] = 50.0f;
  const auto batch = EmptyBatch(3);
  const std::vector<sampling::LogitBias> banned = {{5, sampling::kBanned}};
  const std::vector<sampling::LogitBias> forced = {{3, -100.0f}, {7, 100.0f}};
  TheBackend().StartSlot(SlotOf(1, 3), {.logit_biases = banned}, batch.get());
  TheBackend().StartSlot(SlotOf(2, 3), {.logit_biases = forced}, batch.get());
  const std::vector<int32_t> ids = DrawFrom(
      batch.get(), logits, {{.temperature = 2}, {.num_logit_biases = 1}, {.num_logit_biases = 2}});
  EXPECT_EQ(ids[0], 5);
  EXPECT_NE(ids[1], 5);
  EXPECT_EQ(ids[2], 7);
}

TEST_F(SampleTest, ASlotThatIsStartedForgetsTheSequenceBefore) {
  HostRows logits = {1, kVocab, std::vector<float>(kVocab, 0.0f)};
  logits.row(0)[5] = 1.0f;
  logits.row(0)[6] = 0.5f;
  const std::vector<SampleParams> params = {{.temperature = 0, .penalties = {.presence = 2.0f}}};
  const auto batch = EmptyBatch(1);
  TheBackend().StartSlot(0, {}, batch.get());
  EXPECT_THAT(DrawFrom(batch.get(), logits, params), ElementsAre(5));
  EXPECT_THAT(DrawFrom(batch.get(), logits, params), ElementsAre(6));
  TheBackend().StartSlot(0, {}, batch.get());
  EXPECT_THAT(DrawFrom(batch.get(), logits, params), ElementsAre(5));
}

TEST_F(SampleTest, ManySlotsThatStartAtOnceKeepEachItsOwnIds) {
  constexpr size_t kRows = 40;  // more than a backend keeps on the way
  const HostRows logits = {kRows, kVocab, std::vector<float>(kRows * kVocab, 0.0f)};
  const auto batch = EmptyBatch(kRows);
  std::vector<SampleParams> params(kRows, {.temperature = 0, .penalties = {.presence = 1.0f}});
  std::vector<int32_t> expected;
  for (size_t i = 0; i < kRows; ++i) {
    std::vector<int32_t> generated(i);  // 0 … i - 1: the first id without a penalty is i
    for (size_t j = 0; j < i; ++j) generated[j] = static_cast<int32_t>(j);
    TheBackend().StartSlot(SlotOf(i, kRows), {.generated_ids = generated}, batch.get());
    generated.assign(i, 899);  // it is not looked at any more
    expected.push_back(static_cast<int32_t>(i));
  }
  EXPECT_THAT(DrawFrom(batch.get(), logits, params), ElementsAreArray(expected));
}

TEST_F(SampleTest, LogprobsAreThoseOfTheLogitsAsTheyWereForRowsThatAskForThem) {
  std::mt19937 rng(std::random_device{}());
  constexpr int64_t kRows = 6;
  constexpr int kTop = sampling::kMaxTopLogprobs;
  constexpr float kUntouched = -7.0f;
  HostRows logits = RandomRows(kRows, kVocab, &rng, 3.0f);
  logits.row(4)[17] = NAN;
  const std::vector<int> num_tops = {-1, 0, 1, 20, 3, 5};
  const std::vector<sampling::LogitBias> biases = {{11, 100.0f}};
  const auto batch = EmptyBatch(kRows);
  std::vector<SampleParams> params(kRows);
  for (int64_t i = 0; i < kRows; ++i) {
    TheBackend().StartSlot(SlotOf(i, kRows), {.logit_biases = biases}, batch.get());
    params[i] = {.num_logit_biases = 1, .num_top_logprobs = num_tops[i]};
  }
  const std::vector<int32_t> ids = DrawFrom(batch.get(), logits, params);
  const DeviceArray<int32_t> device_ids(ids);
  const DeviceArray<float> logprobs(std::vector<float>(kRows, kUntouched));
  const DeviceArray<int32_t> ranks(std::vector<int32_t>(kRows, -7));
  const DeviceArray<int32_t> top_ids(std::vector<int32_t>(kRows * kTop, -7));
  const DeviceArray<float> top_logprobs(std::vector<float>(kRows * kTop, kUntouched));
  TheBackend().Logprobs(DeviceRows(logits).rows(), kRealVocab, *batch, device_ids.data(),
                        {logprobs.data(), ranks.data(), top_ids.data(), top_logprobs.data()});
  cpu::LogprobReader reader;
  for (int64_t i = 0; i < kRows; ++i) {
    SCOPED_TRACE(i);
    const std::vector<int32_t> all_top = top_ids.ToHost();
    const std::vector<float> all_top_logprobs = top_logprobs.ToHost();
    const std::span row_top(all_top.data() + i * kTop, kTop);
    const std::span row_top_logprobs(all_top_logprobs.data() + i * kTop, kTop);
    const auto num_top = static_cast<size_t>(std::max(num_tops[i], 0));
    EXPECT_THAT(row_top.subspan(num_top), Each(-7));
    EXPECT_THAT(row_top_logprobs.subspan(num_top), Each(kUntouched));
    if (num_tops[i] < 0) {
      EXPECT_EQ(logprobs.ToHost()[i], kUntouched);
      EXPECT_EQ(ranks.ToHost()[i], -7);
    } else if (ids[i] < 0) {
      EXPECT_TRUE(std::isnan(logprobs.ToHost()[i]));
      EXPECT_EQ(ranks.ToHost()[i], 0);
      EXPECT_THAT(row_top.first(num_top), Each(-1));
    } else {
      const cpu::RowLogprobs expected =
          Must(reader.Read({logits.row(i), kRealVocab}, ids[i], num_tops[i]));
      // The last bit of a logarithm may differ between devices.
      const auto near = [](float x) { return testing::FloatNear(x, std::fabs(x) * 0x1p-22f); };
      EXPECT_THAT(logprobs.ToHost()[i], near(expected.logprob));
      EXPECT_EQ(ranks.ToHost()[i], expected.rank);
      for (size_t j = 0; j < num_top; ++j) {
        EXPECT_EQ(row_top[j], expected.top[j].id);
        EXPECT_THAT(row_top_logprobs[j], near(expected.top[j].logprob));
      }
    }
  }
  EXPECT_EQ(ids[4], -18);
}

TEST_F(SampleTest, LogprobsOfIdsAreThoseOfTheirRows) {
  std::mt19937 rng(std::random_device{}());
  constexpr int64_t kRows = 70;
  constexpr int kTop = sampling::kMaxTopLogprobs;
  HostRows logits = RandomRows(kRows, kVocab, &rng, 3.0f);
  std::vector<int32_t> ids(kRows);
  for (int64_t r = 0; r < kRows; ++r) {
    ids[r] = static_cast<int32_t>(rng() % kRealVocab);
    for (int64_t c = kRealVocab; c < kVocab; ++c) logits.row(r)[c] = c % 2 == 0 ? NAN : 1e30f;
  }
  ids[7] = kRealVocab + 1;  // of the model's vocabulary, but never sampled
  logits.row(20)[5] = INFINITY;
  const DeviceRows device_logits(logits);
  const DeviceArray<int32_t> device_ids(ids);
  for (const int num_top : {0, 1, kTop}) {
    SCOPED_TRACE(num_top);
    const DeviceArray<float> logprobs(std::vector<float>(kRows, -7.0f));
    const DeviceArray<int32_t> ranks(std::vector<int32_t>(kRows, -7));
    const DeviceArray<int32_t> top_ids(std::vector<int32_t>(kRows * kTop, -7));
    const DeviceArray<float> top_logprobs(std::vector<float>(kRows * kTop, -7.0f));
    TheBackend().LogprobsOfIds(
        device_logits.rows(), kRows, kRealVocab, device_ids.data(), num_top,
        {logprobs.data(), ranks.data(), top_ids.data(), top_logprobs.data()});
    const std::vector<int32_t> all_top = top_ids.ToHost();
    const std::vector<float> all_top_logprobs = top_logprobs.ToHost();
    cpu::LogprobReader reader;
    // The last bit of a logarithm may differ between devices.
    const auto near = [](float x) { return testing::FloatNear(x, std::fabs(x) * 0x1p-22f); };
    for (int64_t r = 0; r < kRows; ++r) {
      SCOPED_TRACE(r);
      const std::span row_top(all_top.data() + r * kTop, kTop);
      EXPECT_THAT(row_top.subspan(num_top), Each(-7));
      if (r == 20) {
        EXPECT_TRUE(std::isnan(logprobs.ToHost()[r]));
        EXPECT_EQ(ranks.ToHost()[r], 0);
        EXPECT_THAT(row_top.first(num_top), Each(-1));
        continue;
      }
      const cpu::RowLogprobs expected =
          Must(reader.Read({logits.row(r), kRealVocab}, ids[r], num_top));
      EXPECT_EQ(ranks.ToHost()[r], expected.rank);
      if (r == 7) {
        EXPECT_EQ(logprobs.ToHost()[r], -INFINITY);
      } else {
        EXPECT_THAT(logprobs.ToHost()[r], near(expected.logprob));
      }
      for (int j = 0; j < num_top; ++j) {
        EXPECT_EQ(row_top[j], expected.top[j].id);
        EXPECT_THAT(all_top_logprobs[r * kTop + j], near(expected.top[j].logprob));
      }
    }
  }
}

}  // namespace
}  // namespace wintserve::kernels
