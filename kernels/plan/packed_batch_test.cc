#include "kernels/plan/packed_batch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "kernels/sampling/definition.h"

namespace wintserve::kernels::plan {
namespace {

using testing::ElementsAre;

constexpr int32_t kPoison = -77;

// What a device would hold, as vectors.
struct Unpacked {
  explicit Unpacked(const BatchLimits& limits)
      : tokens(limits.max_tokens, kPoison),
        positions(limits.max_tokens, kPoison),
        token_rows(limits.max_tokens, kPoison),
        route_as(limits.max_tokens, kPoison),
        first_tokens(limits.max_rows, kPoison),
        row_positions(limits.max_rows, kPoison),
        lengths(limits.max_rows, kPoison),
        block_tables(limits.max_rows * limits.max_blocks_per_row, kPoison),
        logit_tokens(limits.max_rows, kPoison),
        logit_slots(limits.max_rows, kPoison),
        samples(limits.max_rows),
        min_scaled_logits(limits.max_rows),
        slot_ids(limits.num_slots) {
    arrays = {.tokens = tokens.data(),
              .positions = positions.data(),
              .token_rows = token_rows.data(),
              .route_as = route_as.data(),
              .row_first_tokens = first_tokens.data(),
              .row_positions = row_positions.data(),
              .row_lengths = lengths.data(),
              .block_tables = block_tables.data(),
              .block_table_stride = limits.max_blocks_per_row,
              .logit_tokens = logit_tokens.data(),
              .logit_slots = logit_slots.data(),
              .slot_ids = slot_ids.data()};
  }

  void Unpack(const Batch& batch, int32_t num_threads) {
    const PackedBatchShape shape = ShapeOf(batch);
    const auto words = std::make_unique<PackedLogitRow[]>(shape.num_words() / 4);
    auto* const packed = reinterpret_cast<int32_t*>(words.get());
    PackBatch(batch, packed);
    for (int32_t row = 0; row < shape.num_rows; ++row) {
      for (int32_t thread = 0; thread < num_threads; ++thread) {
        UnpackRow(packed, shape, arrays, row, thread, num_threads);
      }
    }
    for (int32_t i = 0; i < shape.num_logit_rows; ++i) {
      const PackedLogitRow row = UnpackLogitRow(packed, shape, arrays, i);
      samples[i] = row.sample;
      min_scaled_logits[i] = row.min_scaled_logit;
    }
    for (int32_t i = 0; i < shape.num_padding_rows; ++i) {
      const PackedLogitRow row = UnpackPaddingRow(shape, arrays, i);
      samples[shape.num_logit_rows + i] = row.sample;
      min_scaled_logits[shape.num_logit_rows + i] = row.min_scaled_logit;
    }
  }

  std::vector<int32_t> tokens, positions, token_rows, route_as;
  std::vector<int32_t> first_tokens, row_positions, lengths, block_tables;
  std::vector<int32_t> logit_tokens, logit_slots;
  std::vector<SampleParams> samples;
  std::vector<float> min_scaled_logits;
  std::vector<int32_t> slot_ids;
  BatchArrays arrays;
};

TEST(PackedBatch, PutsEveryTokenRowAndBlockInItsPlace) {
  Unpacked device({.max_tokens = 5, .max_rows = 3, .max_blocks_per_row = 3, .num_slots = 8});
  device.slot_ids[6] = 41;
  const std::vector<int32_t> first = {9, 7, 5, 3};  // a table may be longer than the row needs
  const std::vector<int32_t> second = {8, 6, 4};
  device.Unpack(
      {.tokens = {11, 12, 13, TokenOfSlot(6)},
       .rows =
           {{.position = 62, .length = 3, .block_table = first},
            {.position = 191,
             .length = 1,
             .block_table = second,
             .want_logits = true,
             .slot = 6,
             .sample = {.temperature = 0.5f,
                        .top_p = 0.25f,
                        .top_k = 3,
                        .min_p = 0.5f,
                        .penalties = {.repetition = 1.5f, .presence = -1.0f, .frequency = 0.75f},
                        .num_logit_biases = 4,
                        .num_top_logprobs = 5,
                        .mask_stop_ids = true,
                        .seed = -5,
                        .position = 192,
                        .choice_index = 2}}}},
      /*num_threads=*/2);
  EXPECT_THAT(device.tokens, ElementsAre(11, 12, 13, 41, kPoison));
  EXPECT_THAT(device.positions, ElementsAre(62, 63, 64, 191, kPoison));
  EXPECT_THAT(device.token_rows, ElementsAre(0, 0, 0, 1, kPoison));
  EXPECT_THAT(device.route_as, ElementsAre(0, 1, 2, 3, kPoison));
  EXPECT_THAT(device.first_tokens, ElementsAre(0, 3, kPoison));
  EXPECT_THAT(device.row_positions, ElementsAre(62, 191, kPoison));
  EXPECT_THAT(device.lengths, ElementsAre(3, 1, kPoison));
  EXPECT_THAT(device.block_tables, ElementsAre(9, 7, kPoison, 8, 6, 4, kPoison, kPoison, kPoison));
  EXPECT_THAT(device.logit_tokens, ElementsAre(3, kPoison, kPoison));
  EXPECT_THAT(device.logit_slots, ElementsAre(6, kPoison, kPoison));
  const SampleParams& sample = device.samples[0];
  EXPECT_EQ(sample.temperature, 0.5f);
  EXPECT_EQ(sample.top_p, 0.25f);
  EXPECT_EQ(sample.top_k, 3);
  EXPECT_EQ(sample.min_p, 0.5f);
  EXPECT_EQ(device.min_scaled_logits[0], sampling::MinScaledLogit(0.5f));
  EXPECT_EQ(sample.penalties.repetition, 1.5f);
  EXPECT_EQ(sample.penalties.presence, -1.0f);
  EXPECT_EQ(sample.penalties.frequency, 0.75f);
  EXPECT_EQ(sample.num_logit_biases, 4);
  EXPECT_EQ(sample.num_top_logprobs, 5);
  EXPECT_TRUE(sample.mask_stop_ids);
  EXPECT_EQ(sample.seed, -5);
  EXPECT_EQ(sample.position, 192u);
  EXPECT_EQ(sample.choice_index, 2u);
}

TEST(PackedBatch, PaddingRowsAreBehindTheOthersAndOfNoSequence) {
  Unpacked device({.max_tokens = 5, .max_rows = 5, .max_blocks_per_row = 1, .num_slots = 8});
  const std::vector<int32_t> blocks = {3};
  device.Unpack(
      {.tokens = {11, 12},
       .rows =
           {{.position = 5, .length = 1, .block_table = blocks},
            {.position = 6, .length = 1, .block_table = blocks, .want_logits = true, .slot = 4}},
       .num_padding_rows = 2},
      /*num_threads=*/2);
  EXPECT_THAT(device.tokens, ElementsAre(11, 12, 0, 0, kPoison));
  EXPECT_THAT(device.positions, ElementsAre(5, 6, 0, 0, kPoison));
  EXPECT_THAT(device.token_rows, ElementsAre(0, 1, -1, -1, kPoison));
  EXPECT_THAT(device.route_as, ElementsAre(0, 1, 0, 0, kPoison));
  EXPECT_THAT(device.first_tokens, ElementsAre(0, 1, 2, 3, kPoison));
  EXPECT_THAT(device.row_positions, ElementsAre(5, 6, 0, 0, kPoison));
  EXPECT_THAT(device.lengths, ElementsAre(1, 1, 0, 0, kPoison));
  EXPECT_THAT(device.block_tables, ElementsAre(3, 3, kPoison, kPoison, kPoison));
  EXPECT_THAT(device.logit_tokens, ElementsAre(1, 2, 3, kPoison, kPoison));
  EXPECT_THAT(device.logit_slots, ElementsAre(4, -1, -1, kPoison, kPoison));
  EXPECT_TRUE(device.samples[1].penalties.none());
  EXPECT_EQ(device.samples[1].num_top_logprobs, -1);
}

TEST(PackedBatch, AnyNumberOfThreadsUnpacksTheSame) {
  const BatchLimits limits = {
      .max_tokens = 400, .max_rows = 9, .max_blocks_per_row = 6, .num_slots = 9};
  std::mt19937 rng(1);
  for (int round = 0; round < 20; ++round) {
    Batch batch;
    std::vector<std::vector<int32_t>> tables(1 + rng() % limits.max_rows);
    for (size_t r = 0; r < tables.size(); ++r) {
      const auto length = static_cast<int32_t>(1 + rng() % 40);
      const auto position = static_cast<int32_t>(rng() % 340);
      for (int i = 0; i < 6; ++i) tables[r].push_back(static_cast<int32_t>(rng() % 1000));
      for (int i = 0; i < length; ++i) {
        batch.tokens.push_back(static_cast<int32_t>(rng() % 1009) - 9);
      }
      batch.rows.push_back({.position = position,
                            .length = length,
                            .block_table = tables[r],
                            .want_logits = rng() % 2 == 0,
                            .slot = static_cast<int32_t>(r)});
    }
    CheckBatch(batch, limits);
    Unpacked one(limits);
    Unpacked many(limits);
    for (int32_t s = 0; s < limits.num_slots; ++s) one.slot_ids[s] = many.slot_ids[s] = 2000 + s;
    one.Unpack(batch, 1);
    many.Unpack(batch, 32);
    EXPECT_EQ(one.tokens, many.tokens);
    EXPECT_EQ(one.positions, many.positions);
    EXPECT_EQ(one.token_rows, many.token_rows);
    EXPECT_EQ(one.block_tables, many.block_tables);
    EXPECT_EQ(one.logit_tokens, many.logit_tokens);
    for (size_t t = 0; t < batch.tokens.size(); ++t) {
      const int32_t id = batch.tokens[t];
      EXPECT_EQ(one.tokens[t], id < 0 ? 2000 + TokenOfSlot(id) : id);
    }
  }
}

TEST(PackedBatch, TheLargestShapeHasRoomForWhateverFitsTheLimits) {
  const BatchLimits limits = {
      .max_tokens = 7, .max_rows = 3, .max_blocks_per_row = 2, .num_slots = 3};
  const std::vector<int32_t> table = {1, 2};
  Batch batch = {.tokens = std::vector<int32_t>(7)};
  for (int32_t r = 0; r < 3; ++r) {
    batch.rows.push_back({.position = 126 - r,
                          .length = r == 0 ? 1 : 3,
                          .block_table = table,
                          .want_logits = true,
                          .slot = r});
  }
  batch.rows[1].position = batch.rows[2].position = 120;
  CheckBatch(batch, limits);
  EXPECT_EQ(ShapeOf(batch).num_words(), LargestShape(limits).num_words());
}

}  // namespace
}  // namespace wintserve::kernels::plan
