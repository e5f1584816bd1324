// Graphs: a decode step that is captured gives what the same operators give when they are called,
// whatever the batch holds by then and however much of it is padding.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/backend_suite/suite_test_util.h"

namespace wintserve::kernels {
namespace {

constexpr AttentionShape kShape = {.num_heads = 4, .num_kv_heads = 2, .head_dim = 64};
constexpr int64_t kVocab = 256;
constexpr int kNumSlots = 9;
constexpr int64_t kBlocksPerSlot = 4;
constexpr int64_t kMaxTokens = 600;

struct Weights {
  explicit Weights(std::mt19937* rng)
      : table(formats::WeightFormat::kBfloat16, kVocab, kShape.qkv_columns(), MatrixUse::kEmbedding,
              rng),
        head(formats::WeightFormat::kBfloat16, int64_t{kShape.num_heads} * kShape.head_dim, kVocab,
             MatrixUse::kLinear, rng) {}
  TestMatrix table;
  TestMatrix head;
};

// The smallest decoder: a token's embedding is its q, k and v, attention's output its logits.
class Decoder {
 public:
  explicit Decoder(const Weights* weights)
      : weights_(weights),
        layer_bytes_(Must(TheBackend().KvLayerBytes(kShape))),
        pool_(Must(TheBackend().Allocate(pool_bytes()))),
        batch_(Must(TheBackend().CreateBatch({.max_tokens = kMaxTokens,
                                              .max_rows = kNumSlots,
                                              .max_blocks_per_row = kBlocksPerSlot,
                                              .num_slots = kNumSlots,
                                              .stop_ids = {3, 5},
                                              .counted_vocab_size = kVocab}))),
        qkv_(kMaxTokens, kShape.qkv_columns()),
        cos_sin_(kMaxTokens, kShape.head_dim),
        // Zeros, as in a model: rows of padding are never written.
        attended_(HostRows{kMaxTokens, int64_t{kShape.num_heads} * kShape.head_dim,
                           std::vector<float>(kMaxTokens * kShape.num_heads * kShape.head_dim)}),
        logits_(kNumSlots, kVocab),
        ids_(std::vector<int32_t>(kNumSlots, -7)) {
    const std::vector<uint8_t> poison(pool_bytes(), 0xFF);
    TheBackend().CopyFromHost(pool_->data(), poison.data(), pool_bytes());
  }

  DeviceBatch* batch() const { return batch_.get(); }

  absl::Status CallOperators() {
    const KvLayer kv = {pool_->data(), layer_bytes_, 0};
    TheBackend().Embed(weights_->table.packed(), *batch_, qkv_.rows());
    TheBackend().RopeAngles(*batch_, kShape.head_dim, 10000.0f, 1.0f, cos_sin_.rows());
    TheBackend().RopeAndAppendKv(kShape, *batch_, cos_sin_.rows(), qkv_.rows(), kv);
    TheBackend().Attention(kShape, *batch_, qkv_.rows(), kv, attended_.rows());
    // Every row of a prompt's chunk, to keep it simple: its last is the one that counts.
    if (batch_->num_tokens() == batch_->num_logit_rows()) {
      TheBackend().Linear(attended_.rows(), batch_->num_tokens(), weights_->head.packed(),
                          logits_.rows());
      TheBackend().Sample(logits_.rows(), kVocab, batch_.get(), ids_.data());
      TheBackend().KeepIds(ids_.data(), batch_.get());
    }
    return absl::OkStatus();
  }

  std::vector<int32_t> ids(size_t count) const {
    std::vector<int32_t> ids = ids_.ToHost();
    ids.resize(count);
    return ids;
  }
  std::vector<uint8_t> pool() const {
    std::vector<uint8_t> bytes(pool_bytes());
    CHECK(TheBackend().CopyToHost(bytes.data(), pool_->data(), pool_bytes()).ok());
    return bytes;
  }

 private:
  int64_t pool_bytes() const { return kNumSlots * kBlocksPerSlot * layer_bytes_; }

  const Weights* const weights_;
  const int64_t layer_bytes_;
  const std::unique_ptr<Buffer> pool_;
  const std::unique_ptr<DeviceBatch> batch_;
  const DeviceRows qkv_;
  const DeviceRows cos_sin_;
  const DeviceRows attended_;
  const DeviceRows logits_;
  const DeviceArray<int32_t> ids_;
};

class GraphsTest : public testing::Test {
 protected:
  GraphsTest() {
    for (int slot = 0; slot < kNumSlots; ++slot) {
      for (int32_t i = 0; i < kBlocksPerSlot; ++i) {
        tables_[slot].push_back(static_cast<int32_t>(kBlocksPerSlot) * slot + (i ^ 1));
      }
    }
  }

  BatchRow RowOf(int slot, int32_t length) const {
    const SampleParams params[] = {
        {.temperature = 0},
        {.temperature = 0.8f, .top_p = 0.9f, .seed = 7},
        {.temperature = 1.0f, .top_k = 20, .min_p = 0.01f, .mask_stop_ids = true, .seed = 8},
        {.temperature = 0, .penalties = {.repetition = 1.2f, .presence = 0.5f, .frequency = 0.7f}},
        {.temperature = 1.5f, .num_logit_biases = 2, .seed = 9}};
    BatchRow row = {.position = positions_[slot],
                    .length = length,
                    .block_table = tables_[slot],
                    .want_logits = true,
                    .slot = slot,
                    .sample = params[slot % std::size(params)]};
    row.sample.position = static_cast<uint32_t>(positions_[slot] + length);
    return row;
  }

  std::mt19937 rng_{std::random_device{}()};
  Weights weights_{&rng_};
  std::vector<int32_t> tables_[kNumSlots];
  int32_t positions_[kNumSlots] = {};
};

TEST_F(GraphsTest, ReplaysGiveTheBitsOfCallsForAnyBatchWithPaddingUpToTheirSize) {
  Decoder called(&weights_);
  Decoder replayed(&weights_);
  // Prompts, and what drawing has to know of a slot.
  for (int slot = 0; slot < kNumSlots; ++slot) {
    const auto length = static_cast<int32_t>(1 + rng_() % 140);
    Batch prompt;
    for (int32_t t = 0; t < length; ++t)
      prompt.tokens.push_back(static_cast<int32_t>(rng_() % kVocab));
    prompt.rows = {RowOf(slot, length)};
    const std::vector<sampling::LogitBias> biases = {{11, 4.0f}, {40, -3.0f}};
    for (Decoder* decoder : {&called, &replayed}) {
      TheBackend().StartSlot(slot, {.logit_biases = biases, .prompt_ids = prompt.tokens},
                             decoder->batch());
      TheBackend().SetBatch(prompt, decoder->batch());
      CHECK(decoder->CallOperators().ok());
    }
    positions_[slot] = length;
  }
  // Captured on nothing but padding, which knows nothing of the rows to come.
  std::vector<std::unique_ptr<Graph>> graphs;
  for (const int32_t size : {4, kNumSlots}) {
    TheBackend().SetBatch({.num_padding_rows = size}, replayed.batch());
    CHECK(replayed.CallOperators().ok());
    graphs.push_back(
        Must(TheBackend().Capture("'decoder'", [&] { return replayed.CallOperators(); })));
    EXPECT_EQ(graphs.back()->name(), "'decoder'");
    EXPECT_GE(graphs.back()->size_bytes(), 0);
  }
  EXPECT_EQ(replayed.pool(), called.pool()) << "padding has written a block";

  for (int step = 0; step < 60; ++step) {
    Batch decodes;
    for (int slot = 0; slot < kNumSlots; ++slot) {
      if (rng_() % 3 == 0) continue;  // a slot that pauses goes on with the id that it drew last
      decodes.tokens.push_back(TokenOfSlot(slot));
      decodes.rows.push_back(RowOf(slot, 1));
      ++positions_[slot];
    }
    const size_t num_rows = decodes.rows.size();
    if (num_rows == 0) continue;
    TheBackend().SetBatch(decodes, called.batch());
    ASSERT_TRUE(called.CallOperators().ok());
    const int32_t size = num_rows <= 4 ? 4 : kNumSlots;
    decodes.num_padding_rows = size - static_cast<int32_t>(num_rows);
    TheBackend().SetBatch(decodes, replayed.batch());
    ASSERT_TRUE(TheBackend().Launch(*graphs[size == 4 ? 0 : 1]).ok());
    ASSERT_EQ(replayed.ids(num_rows), called.ids(num_rows)) << "step " << step;
  }
  EXPECT_EQ(replayed.pool(), called.pool());
}

TEST_F(GraphsTest, LaunchesFollowEachOtherWithoutWaiting) {
  constexpr int kSteps = 50;
  Decoder called(&weights_);
  Decoder replayed(&weights_);
  const auto step = [&](Decoder* decoder) {
    Batch decode = {.tokens = {TokenOfSlot(1)}, .rows = {RowOf(1, 1)}, .num_padding_rows = 1};
    TheBackend().SetBatch(decode, decoder->batch());
  };
  step(&replayed);
  CHECK(replayed.CallOperators().ok());
  step(&called);
  CHECK(called.CallOperators().ok());
  const auto graph =
      Must(TheBackend().Capture("'decoder'", [&] { return replayed.CallOperators(); }));
  for (int i = 0; i < kSteps; ++i) {
    ++positions_[1];
    step(&replayed);
    ASSERT_TRUE(TheBackend().Launch(*graph).ok());
    step(&called);
    CHECK(called.CallOperators().ok());
  }
  EXPECT_EQ(replayed.ids(1), called.ids(1));
  EXPECT_EQ(replayed.pool(), called.pool());
}

// Operators share memory for what they have in between; more of it for a later one must not take
// it from a graph.
TEST(Graphs, LargerOperatorsThatFollowTakeNothingFromAGraph) {
  std::mt19937 rng(std::random_device{}());
  constexpr int64_t kRows = 3;
  const TestMatrix small(formats::WeightFormat::kWint8, 128, 64, MatrixUse::kLinear, &rng);
  const DeviceRows x(RandomRows(kRows, small.k(), &rng));
  const DeviceRows y(kRows, small.n());
  const auto call = [&] {
    TheBackend().Linear(x.rows(), kRows, small.packed(), y.rows());
    return absl::OkStatus();
  };
  CHECK(call().ok());
  const HostRows expected = y.ToHost();
  const auto graph = Must(TheBackend().Capture("'linear'", call));
  const TestMatrix large(formats::WeightFormat::kWint8, 4096, 64, MatrixUse::kLinear, &rng);
  const HostRows large_x = RandomRows(3000, large.k(), &rng);
  const DeviceRows large_y(large_x.rows, large.n());
  TheBackend().Linear(DeviceRows(large_x).rows(), large_x.rows, large.packed(), large_y.rows());
  // Whatever was given back is somebody else's now.
  std::vector<std::unique_ptr<DeviceArray<float>>> others;
  for (int i = 0; i < 64; ++i) {
    others.push_back(std::make_unique<DeviceArray<float>>(std::vector<float>(1 << 16, -3.0f)));
  }
  const DeviceRows fresh(RandomRows(kRows, small.n(), &rng));
  TheBackend().CopyRows(fresh.rows(), kRows, small.n(), y.rows());
  ASSERT_TRUE(TheBackend().Launch(*graph).ok());
  EXPECT_EQ(y.ToHost().values, expected.values);
  for (const auto& other : others) EXPECT_THAT(other->ToHost(), testing::Each(-3.0f));
}

TEST(Graphs, AnErrorBetweenTheOperatorsIsReturnedAndTheBackendGoesOn) {
  const auto fail = [] { return absl::UnavailableError("a peer is gone"); };
  const auto graph = TheBackend().Capture("'failing'", fail);
  const absl::Status status = graph.ok() ? TheBackend().Launch(**graph) : graph.status();
  EXPECT_EQ(status, absl::UnavailableError("a peer is gone"));
  const DeviceArray<float> numbers(std::vector<float>{1, 2, 3});
  EXPECT_THAT(numbers.ToHost(), testing::ElementsAre(1, 2, 3));
}

}  // namespace
}  // namespace wintserve::kernels
