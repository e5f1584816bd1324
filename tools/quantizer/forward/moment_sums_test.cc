#include "tools/quantizer/forward/moment_sums.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace wintserve::quantizer {
namespace {

using kernels::ConstRows;
using kernels::cpu::ThreadPool;

struct Block {
  int64_t num_rows = 0;
  std::vector<float> x_q, x_f, d, weights;
};

// k and the number of outputs are no multiples of a tile, rows none of four.
constexpr int64_t kInputs = 75;
constexpr int64_t kOutputs = 41;

std::vector<float> Random(int64_t count, std::mt19937* rng) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(*rng);
  return values;
}

std::vector<Block> MakeBlocks(bool models_differ) {
  std::mt19937 rng(7);
  std::vector<Block> blocks;
  for (const int64_t num_rows : {1, 130, 7, 258}) {
    Block block{num_rows, Random(num_rows * kInputs, &rng), Random(num_rows * kInputs, &rng),
                Random(num_rows * kOutputs, &rng), Random(num_rows, &rng)};
    if (!models_differ) block.x_f = block.x_q;
    for (float& weight : block.weights) weight *= weight;
    blocks.push_back(std::move(block));
  }
  return blocks;
}

Moments Sum(const std::vector<Block>& blocks, int num_threads, bool has_weights = true) {
  ThreadPool pool(num_threads);
  MomentSums sums(kInputs, kOutputs, &pool);
  for (const Block& block : blocks) {
    sums.Add({block.x_q.data(), kInputs}, {block.x_f.data(), kInputs}, {block.d.data(), kOutputs},
             block.num_rows, has_weights ? std::span(block.weights) : std::span<const float>());
  }
  return sums.Finish();
}

// Of entry (i, j): the sum over rows of weight x_q[i] y[j], and of its magnitudes.
template <typename Right>
void ExpectSum(const std::vector<Block>& blocks, int64_t num_columns, const Right& right,
               const LargeVector& found) {
  ASSERT_EQ(std::ssize(found), kInputs * num_columns);
  int64_t num_rows = 0;
  for (const Block& block : blocks) num_rows += block.num_rows;
  // Rounded: root, its product with either factor, a difference; and each addition, in a block or
  // of a block.
  const double bound = (static_cast<double>(num_rows + std::ssize(blocks)) + 6) * 0x1p-24;
  for (int64_t i = 0; i < kInputs; ++i) {
    for (int64_t j = 0; j < num_columns; ++j) {
      double sum = 0;
      double magnitude = 0;
      for (const Block& block : blocks) {
        for (int64_t r = 0; r < block.num_rows; ++r) {
          const double term =
              double{block.weights[r]} * block.x_q[r * kInputs + i] * right(block, r, j);
          sum += term;
          magnitude += std::abs(term);
        }
      }
      ASSERT_NEAR(found[i * num_columns + j], sum, bound * magnitude) << i << " " << j;
    }
  }
}

TEST(MomentSums, AreTheProductsOfWeightedRows) {
  const std::vector<Block> blocks = MakeBlocks(true);
  const Moments moments = Sum(blocks, 3);
  ExpectSum(
      blocks, kInputs,
      [](const Block& b, int64_t r, int64_t j) { return double{b.x_q[r * kInputs + j]}; },
      moments.hessian);
  ExpectSum(
      blocks, kInputs,
      [](const Block& b, int64_t r, int64_t j) {
        return double{b.x_f[r * kInputs + j]} - b.x_q[r * kInputs + j];
      },
      moments.cross);
  ExpectSum(
      blocks, kOutputs,
      [](const Block& b, int64_t r, int64_t j) { return double{b.d[r * kOutputs + j]}; },
      moments.cross_output);
  EXPECT_EQ(moments.num_rows, 1 + 130 + 7 + 258);
  double weight = 0;
  for (const Block& block : blocks) {
    for (const float w : block.weights) weight += w;
  }
  EXPECT_DOUBLE_EQ(moments.weight, weight);
  ThreadPool pool(2);
  EXPECT_TRUE(CheckMoments(moments, pool).ok());
}

TEST(MomentSums, TheHessianIsSymmetricToTheBit) {
  const Moments moments = Sum(MakeBlocks(true), 2);
  for (int64_t i = 0; i < kInputs; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      ASSERT_EQ(moments.hessian[i * kInputs + j], moments.hessian[j * kInputs + i]);
    }
  }
}

TEST(MomentSums, EqualInputsHaveNoCross) {
  EXPECT_TRUE(Sum(MakeBlocks(false), 2).cross.empty());
  // One value in the last block.
  std::vector<Block> blocks = MakeBlocks(false);
  blocks.back().x_f.back() += 1;
  const LargeVector cross = Sum(blocks, 2).cross;
  ASSERT_FALSE(cross.empty());
  for (int64_t i = 0; i < kInputs; ++i) {
    EXPECT_EQ(cross[i * kInputs], 0);
    EXPECT_NE(cross[i * kInputs + kInputs - 1], 0);
  }
}

// Rows of one call, and the same in calls of kPartRows each.
TEST(MomentSums, ManyRowsAtOnceGiveTheBitsOfTheirParts) {
  std::mt19937 rng(11);
  constexpr int64_t kRows = 2 * MomentSums::kPartRows + 333;
  Block whole{kRows, Random(kRows * kInputs, &rng), Random(kRows * kInputs, &rng),
              Random(kRows * kOutputs, &rng), Random(kRows, &rng)};
  for (float& weight : whole.weights) weight *= weight;
  // A part in which the models are alike adds nothing to the cross.
  const int64_t part_values = MomentSums::kPartRows * kInputs;
  std::copy_n(whole.x_q.begin() + part_values, part_values, whole.x_f.begin() + part_values);
  std::vector<Block> parts;
  for (int64_t first = 0; first < kRows; first += MomentSums::kPartRows) {
    const int64_t last = std::min(first + MomentSums::kPartRows, kRows);
    const auto rows = [&](const std::vector<float>& values, int64_t columns) {
      return std::vector<float>(values.begin() + first * columns, values.begin() + last * columns);
    };
    parts.push_back({last - first, rows(whole.x_q, kInputs), rows(whole.x_f, kInputs),
                     rows(whole.d, kOutputs), rows(whole.weights, 1)});
  }
  const Moments at_once = Sum({whole}, 3);
  const Moments in_parts = Sum(parts, 1);
  EXPECT_EQ(at_once.hessian, in_parts.hessian);
  EXPECT_EQ(at_once.cross, in_parts.cross);
  EXPECT_EQ(at_once.cross_output, in_parts.cross_output);
  EXPECT_EQ(at_once.weight, in_parts.weight);
}

TEST(MomentSums, WithoutWeightsEveryRowCountsOnce) {
  std::vector<Block> blocks = MakeBlocks(true);
  const Moments unweighted = Sum(blocks, 2, /*has_weights=*/false);
  for (Block& block : blocks) std::fill(block.weights.begin(), block.weights.end(), 1.0f);
  const Moments ones = Sum(blocks, 2);
  EXPECT_EQ(unweighted.hessian, ones.hessian);
  EXPECT_EQ(unweighted.cross, ones.cross);
  EXPECT_EQ(unweighted.weight, ones.weight);
}

TEST(MomentSums, DoNotDependOnTheNumberOfThreads) {
  const std::vector<Block> blocks = MakeBlocks(true);
  const Moments one = Sum(blocks, 1);
  const Moments four = Sum(blocks, 4);
  EXPECT_EQ(one.hessian, four.hessian);
  EXPECT_EQ(one.cross, four.cross);
  EXPECT_EQ(one.cross_output, four.cross_output);
}

}  // namespace
}  // namespace wintserve::quantizer
