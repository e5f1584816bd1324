#include "kernels/cpu/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/test_util.h"

namespace wintserve::kernels::cpu {
namespace {

// One sequence with random q, k and v, and a pool whose other blocks hold NaN.
class Sequence {
 public:
  Sequence(const AttentionShape& shape, int32_t length, std::mt19937* rng)
      : shape_(shape),
        length_(length),
        stride_(PaddedStride(shape.qkv_columns())),
        qkv_(RandomFloats(length * stride_, rng)),
        cos_sin_(length * shape.head_dim) {
    const int num_blocks = length / kKvBlockTokens + 3;
    block_stride_ = 2 * KvLayerFloats(shape);  // two layers
    pool_.assign(num_blocks * block_stride_, std::nanf(""));
    block_table_.resize(length / kKvBlockTokens + 1);
    std::iota(block_table_.begin(), block_table_.end(), 1);
    std::shuffle(block_table_.begin(), block_table_.end(), *rng);
    const auto backend = CreateCpuBackend({});
    backend->RopeAngles(*ChunkBatch(backend.get(), 0, length), shape.head_dim, 10000.0f, 1.0f,
                        {cos_sin_.data(), shape.head_dim});
  }

  KvLayer layer() {
    const int64_t stride_bytes = block_stride_ * static_cast<int64_t>(sizeof(float));
    return {pool_.data(), stride_bytes, stride_bytes / 2};
  }

  // Appends and attends in chunks of the given size; out [length, heads * head_dim].
  std::vector<float> Run(int threads, int32_t chunk_length) {
    const auto backend = CreateCpuBackend({.num_threads = threads});
    std::vector<float> qkv = qkv_;
    const int64_t columns = int64_t{shape_.num_heads} * shape_.head_dim;
    std::vector<float> out(length_ * columns);
    for (int32_t begin = 0; begin < length_; begin += chunk_length) {
      const int32_t count = std::min(chunk_length, length_ - begin);
      const auto batch = ChunkBatch(backend.get(), begin, count);
      const Rows rows = {qkv.data() + begin * stride_, stride_};
      backend->RopeAndAppendKv(shape_, *batch,
                               {cos_sin_.data() + begin * shape_.head_dim, shape_.head_dim}, rows,
                               layer());
      backend->Attention(shape_, *batch, rows, layer(), {out.data() + begin * columns, columns});
    }
    rotated_ = qkv;
    return out;
  }

  // Output of one head at one position, from the rotated q and k as the kernels left them.
  std::vector<Bounded> Reference(int32_t position, int head) const {
    const int dim = shape_.head_dim;
    const int kv_head = head / (shape_.num_heads / shape_.num_kv_heads);
    const float* q = &rotated_[position * stride_ + head * dim];
    std::vector<double> scores(position + 1);
    double score_error = 0;
    for (int32_t t = 0; t <= position; ++t) {
      const float* k = &rotated_[t * stride_ + (shape_.num_heads + kv_head) * dim];
      double magnitudes = 0;
      for (int i = 0; i < dim; ++i) {
        scores[t] += double{q[i]} * k[i] / std::sqrt(dim);
        magnitudes += std::fabs(double{q[i]} * k[i]) / std::sqrt(dim);
      }
      // dim + 1 roundings of the sum, three for the scale and its product.
      score_error = std::max(score_error, Gamma(dim + 4) * magnitudes);
    }
    const auto [lowest, highest] = std::minmax_element(scores.begin(), scores.end());
    // A weight is a product of exponentials, one a block: each errs by 2 eps, by a rounding of its
    // argument (at most the span of the scores) and by a product; the scores' own error counts
    // twice, in the key's and in the maximum's. Weights and their sum then add up over all keys.
    const double num_blocks = position / kKvBlockTokens + 1;
    const double exponent_error =
        2 * score_error + (num_blocks + 1) * kEpsilon * (*highest - *lowest + 2 * score_error);
    const double weight_relative =
        std::expm1(exponent_error) + Gamma(4 * (num_blocks + 1) + position + 2);
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - *highest);
    std::vector<Bounded> out(dim);
    for (int i = 0; i < dim; ++i) {
      double magnitudes = 0;
      for (int32_t t = 0; t <= position; ++t) {
        const double v =
            rotated_[t * stride_ + (shape_.num_heads + shape_.num_kv_heads + kv_head) * dim + i];
        const double weight = std::exp(scores[t] - *highest) / sum;
        out[i].value += weight * v;
        magnitudes += weight * std::fabs(v);
      }
      // Once for the numerator, once for the sum it is divided by, and the division.
      out[i].error = (2.02 * weight_relative + Gamma(2)) * magnitudes;
    }
    return out;
  }

 private:
  std::unique_ptr<DeviceBatch> ChunkBatch(Backend* backend, int32_t begin, int32_t count) const {
    return FilledBatch(
        backend, {.tokens = std::vector<int32_t>(count),
                  .rows = {{.position = begin, .length = count, .block_table = block_table_}}});
  }

  const AttentionShape shape_;
  const int32_t length_;
  const int64_t stride_;
  const std::vector<float> qkv_;
  std::vector<float> cos_sin_;
  std::vector<float> rotated_;
  std::vector<float> pool_;
  int64_t block_stride_ = 0;
  std::vector<int32_t> block_table_;
};

struct Case {
  std::string name;
  AttentionShape shape;
  int32_t length;
};

class AttentionTest : public testing::TestWithParam<Case> {};

TEST_P(AttentionTest, StaysWithinTheBoundOfSoftmaxAndSums) {
  std::mt19937 rng(1);
  const Case& c = GetParam();
  Sequence sequence(c.shape, c.length, &rng);
  ForEachTarget([&] {
    const auto out = sequence.Run(1, c.length);
    for (int32_t position = 0; position < c.length; position += 1 + position / 7) {
      for (int head = 0; head < c.shape.num_heads; ++head) {
        const auto expected = sequence.Reference(position, head);
        for (int i = 0; i < c.shape.head_dim; ++i) {
          ExpectWithin(expected[i],
                       out[(position * c.shape.num_heads + head) * c.shape.head_dim + i]);
        }
      }
    }
  });
}

TEST_P(AttentionTest, ChunksAndThreadsDoNotChangeBits) {
  std::mt19937 rng(2);
  const Case& c = GetParam();
  Sequence sequence(c.shape, c.length, &rng);
  ForEachTarget([&] {
    const auto whole = sequence.Run(1, c.length);
    for (const int32_t chunk : {1, 3, 17, 64, 65}) {
      EXPECT_TRUE(sequence.Run(1, chunk) == whole) << "chunks of " << chunk;
    }
    EXPECT_TRUE(sequence.Run(4, c.length) == whole);
  });
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionTest,
    testing::Values(Case{"OneToken", {4, 2, 64}, 1}, Case{"OneBlock", {4, 2, 64}, 64},
                    Case{"BlockAndOne", {4, 2, 64}, 65}, Case{"Long", {4, 2, 32}, 300},
                    Case{"WideHeads", {5, 1, 128}, 90}, Case{"NoGroups", {3, 3, 96}, 70}),
    [](const auto& info) { return info.param.name; });

TEST(Rope, RotatesAdjacentPairs) {
  std::mt19937 rng(3);
  constexpr int kDim = 32;
  const std::vector<float> head = RandomFloats(kDim, &rng);
  std::vector<float> cos_sin(kDim);
  for (int j = 0; j < kDim / 2; ++j) {
    cos_sin[j] = std::cos(static_cast<float>(j));
    cos_sin[kDim / 2 + j] = std::sin(static_cast<float>(j));
  }
  std::vector<float> rotated = head;
  RotatePairs(cos_sin.data(), kDim, rotated.data());
  for (int j = 0; j < kDim / 2; ++j) {
    const double c = cos_sin[j];
    const double s = cos_sin[kDim / 2 + j];
    const double even = head[2 * j];
    const double odd = head[2 * j + 1];
    // Two products and a sum: no term is rounded more than twice.
    const auto error = [](double a, double b) { return Gamma(2) * (std::fabs(a) + std::fabs(b)); };
    ExpectWithin({even * c - odd * s, error(even * c, odd * s)}, rotated[2 * j]);
    ExpectWithin({odd * c + even * s, error(odd * c, even * s)}, rotated[2 * j + 1]);
  }
}

}  // namespace
}  // namespace wintserve::kernels::cpu
