// The way of keys and values into the pool, and attention over it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>

#include "kernels/backend_suite/suite_test_util.h"

namespace wintserve::kernels {
namespace {

constexpr float kTheta = 10000.0f;

// Sequences with random q, k and v, of which every batch computes a part. The pool holds two
// layers, of which the second is used, and more blocks than needed; all of it begins as NaN.
class Sequences {
 public:
  Sequences(const AttentionShape& shape, const std::vector<int32_t>& lengths, std::mt19937* rng)
      : shape_(shape), lengths_(lengths), layer_bytes_(Must(TheBackend().KvLayerBytes(shape))) {
    int32_t num_blocks = 2;  // that nobody owns
    for (const int32_t length : lengths) {
      qkv_.push_back(RandomRows(length, shape.qkv_columns(), rng));
      std::vector<int32_t>& table = tables_.emplace_back((length - 1) / kKvBlockTokens + 1);
      std::iota(table.begin(), table.end(), num_blocks);
      num_blocks += static_cast<int32_t>(table.size());
    }
    // Blocks change owners at random, so that their order tells nothing.
    std::vector<int32_t> renamed(num_blocks);
    std::iota(renamed.begin(), renamed.end(), 0);
    std::shuffle(renamed.begin(), renamed.end(), *rng);
    for (auto& table : tables_) {
      for (int32_t& block : table) block = renamed[block];
    }
    const int64_t pool_bytes = num_blocks * 2 * layer_bytes_;
    pool_ = Must(TheBackend().Allocate(pool_bytes));
    const std::vector<uint8_t> poison(pool_bytes, 0xFF);
    TheBackend().CopyFromHost(pool_->data(), poison.data(), pool_bytes);
  }

  // Part of a sequence.
  struct Chunk {
    int sequence = 0;
    int32_t position = 0;
    int32_t length = 0;
  };

  // One batch of these chunks: the rows of their outputs, in order.
  HostRows Run(const std::vector<Chunk>& chunks) {
    Batch tokens;
    HostRows qkv = {0, shape_.qkv_columns(), {}};
    for (const Chunk& chunk : chunks) {
      tokens.tokens.resize(tokens.tokens.size() + chunk.length);
      tokens.rows.push_back({.position = chunk.position,
                             .length = chunk.length,
                             .block_table = tables_[chunk.sequence]});
      const HostRows& own = qkv_[chunk.sequence];
      qkv.values.insert(qkv.values.end(), own.row(chunk.position),
                        own.row(chunk.position + chunk.length));
      qkv.rows += chunk.length;
    }
    const auto batch = FilledBatch(tokens);
    const DeviceRows device_qkv(qkv);
    const DeviceRows cos_sin(qkv.rows, shape_.head_dim);
    const DeviceRows out(qkv.rows, int64_t{shape_.num_heads} * shape_.head_dim);
    const KvLayer kv = {pool_->data(), 2 * layer_bytes_, layer_bytes_};
    TheBackend().RopeAngles(*batch, shape_.head_dim, kTheta, 1.0f, cos_sin.rows());
    TheBackend().RopeAndAppendKv(shape_, *batch, cos_sin.rows(), device_qkv.rows(), kv);
    TheBackend().Attention(shape_, *batch, device_qkv.rows(), kv, out.rows());
    return out.ToHost();
  }

  // A head of q or k, rotated in float64 by float32 angles.
  std::vector<double> Rotated(int sequence, int32_t position, int64_t column) const {
    const float* head = qkv_[sequence].row(position) + column;
    std::vector<double> rotated(shape_.head_dim);
    for (int j = 0; j < shape_.head_dim / 2; ++j) {
      const auto frequency =
          static_cast<float>(std::pow(double{kTheta}, -2.0 * j / shape_.head_dim));
      const double angle = static_cast<float>(position) * frequency;
      const double even = head[2 * j];
      const double odd = head[2 * j + 1];
      rotated[2 * j] = even * std::cos(angle) - odd * std::sin(angle);
      rotated[2 * j + 1] = odd * std::cos(angle) + even * std::sin(angle);
    }
    return rotated;
  }

  std::vector<Bounded> Expected(int sequence, int32_t position, int head) const {
    const int dim = shape_.head_dim;
    const int kv_head = head / (shape_.num_heads / shape_.num_kv_heads);
    const std::vector<double> q = Rotated(sequence, position, int64_t{head} * dim);
    const double scale = 1 / std::sqrt(static_cast<double>(dim));
    std::vector<double> scores(position + 1);
    double score_error = 0;
    for (int32_t t = 0; t <= position; ++t) {
      const std::vector<double> k = Rotated(sequence, t, int64_t{shape_.num_heads + kv_head} * dim);
      double magnitudes = 0;
      for (int i = 0; i < dim; ++i) {
        scores[t] += q[i] * k[i] * scale;
        // A rotation adds two products, so its rounding is relative to both.
        const double q_size = std::hypot(q[i & ~1], q[i | 1]);
        const double k_size = std::hypot(k[i & ~1], k[i | 1]);
        magnitudes += q_size * k_size * scale;
      }
      // Rotations of q and k by rounded sines, k as the cache keeps it, the sum and its scale.
      const double relative = Errors().kv + 2 * (Errors().sine * 2 + Gamma(3)) + Gamma(dim + 4);
      score_error = std::max(score_error, 1.01 * relative * magnitudes);
    }
    const auto [lowest, highest] = std::minmax_element(scores.begin(), scores.end());
    // A weight is a product of exponentials, one a run of keys with a maximum of its own: each errs
    // by its function, by a rounding of its argument (at most the span of the scores) and by a
    // product; the scores' own error counts twice, in the key's and in the maximum's.
    const double num_runs = position / kKvBlockTokens + 1;
    const double span = *highest - *lowest + 2 * score_error;
    const double exponent_error = 2 * score_error + (num_runs + 1) * 2 * Errors().addition * span;
    const double weight_relative = std::expm1(exponent_error) + Errors().softmax_weight +
                                   Gamma(4 * (num_runs + 1) + position + 2);
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - *highest);
    std::vector<Bounded> out(dim);
    for (int i = 0; i < dim; ++i) {
      double magnitudes = 0;
      for (int32_t t = 0; t <= position; ++t) {
        const double v = qkv_[sequence].at(
            t, int64_t{shape_.num_heads + shape_.num_kv_heads + kv_head} * dim + i);
        const double weight = std::exp(scores[t] - *highest) / sum;
        out[i].value += weight * v;
        magnitudes += weight * std::fabs(v);
      }
      // Once for the numerator, once for the sum it is divided by, and the division; v as the cache
      // keeps it.
      out[i].error = (2.1 * weight_relative + Errors().kv + Gamma(2)) * magnitudes;
    }
    return out;
  }

  void ExpectOutput(const std::vector<Chunk>& chunks, const HostRows& out, int32_t step) const {
    int64_t first_row = 0;
    for (const Chunk& chunk : chunks) {
      for (int32_t t = 0; t < chunk.length; t += t + 1 < chunk.length ? step : 1) {
        for (int head = 0; head < shape_.num_heads; ++head) {
          SCOPED_TRACE(testing::Message() << "sequence " << chunk.sequence << " position "
                                          << chunk.position + t << " head " << head);
          const std::vector<Bounded> expected = Expected(chunk.sequence, chunk.position + t, head);
          for (int i = 0; i < shape_.head_dim; ++i) {
            ExpectWithin(expected[i], out.at(first_row + t, int64_t{head} * shape_.head_dim + i));
          }
        }
      }
      first_row += chunk.length;
    }
  }

 private:
  const AttentionShape shape_;
  const std::vector<int32_t> lengths_;
  const int64_t layer_bytes_;
  std::vector<HostRows> qkv_;
  std::vector<std::vector<int32_t>> tables_;
  std::unique_ptr<Buffer> pool_;
};

struct Case {
  std::string name;
  AttentionShape shape;
};

class AttentionTest : public testing::TestWithParam<Case> {};

TEST_P(AttentionTest, WholePromptsStayWithinTheBoundOfSoftmaxAndSums) {
  std::mt19937 rng(std::random_device{}());
  Sequences sequences(GetParam().shape, {1, 64, 65, 200}, &rng);
  const std::vector<Sequences::Chunk> chunks = {{3, 0, 200}, {0, 0, 1}, {2, 0, 65}, {1, 0, 64}};
  sequences.ExpectOutput(chunks, sequences.Run(chunks), 37);
}

TEST_P(AttentionTest, ChunksAndDecodesReadWhatWasWrittenBefore) {
  std::mt19937 rng(std::random_device{}());
  Sequences sequences(GetParam().shape, {300, 130, 70}, &rng);
  sequences.Run({{0, 0, 150}, {1, 0, 1}});
  sequences.Run({{1, 1, 128}, {2, 0, 69}, {0, 150, 149}});
  const std::vector<Sequences::Chunk> decodes = {{0, 299, 1}, {1, 129, 1}, {2, 69, 1}};
  sequences.ExpectOutput(decodes, sequences.Run(decodes), 1);
}

TEST_P(AttentionTest, ARowHasTheSameBitsHoweverItsSequenceIsCut) {
  std::mt19937 rng(std::random_device{}());
  Sequences sequences(GetParam().shape, {200, 90}, &rng);
  const HostRows whole = sequences.Run({{0, 0, 200}});
  for (const int32_t cut : {1, 63, 64, 65, 199}) {
    SCOPED_TRACE(cut);
    const HostRows head = sequences.Run({{0, 0, cut}, {1, 0, 90}});
    const HostRows tail = sequences.Run({{1, 89, 1}, {0, cut, 200 - cut}});
    EXPECT_TRUE(std::equal(head.row(0), head.row(cut), whole.row(0)));
    EXPECT_TRUE(std::equal(tail.row(1), tail.row(tail.rows), whole.row(cut)));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionTest,
                         // The demo model's, the 300B's (one of its KV heads) and the 21B's.
                         testing::Values(Case{"TwoGroups", {4, 2, 64}},
                                         Case{"EightHeadsAKvHead", {8, 1, 128}},
                                         Case{"FiveHeadsAKvHead", {10, 2, 128}},
                                         Case{"NoGroups", {3, 3, 64}}),
                         [](const auto& info) { return info.param.name; });

TEST(KvLayer, ShapesThatNoKernelServesAreRefusedByName) {
  const auto bytes = TheBackend().KvLayerBytes({4, 2, 50});
  EXPECT_EQ(bytes.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bytes.status().message()), testing::HasSubstr("head_dim 50"));
  const auto uneven = TheBackend().KvLayerBytes({5, 2, 64});
  EXPECT_EQ(uneven.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(uneven.status().message()), testing::HasSubstr("5 attention heads"));
}

}  // namespace
}  // namespace wintserve::kernels
