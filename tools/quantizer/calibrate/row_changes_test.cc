#include "tools/quantizer/calibrate/row_changes.h"

#include <gtest/gtest.h>

#include "tools/quantizer/calibrate/calibration_test_util.h"

namespace wintserve::quantizer::calibrate {
namespace {

constexpr int64_t kInputs = 192;

FeedbackFactor MakeFactor() {
  kernels::cpu::ThreadPool pool(1);
  std::mt19937 rng(1);
  const Moments moments = MomentsOf(CorrelatedInputs(300, kInputs, 1.0, rng));
  return *FeedbackFactor::Make(moments, {}, pool);
}

// Row `row` of H.
Eigen::Map<const Eigen::VectorXf> HessianRow(const FeedbackFactor& factor, int64_t row) {
  return {factor.hessian() + row * factor.hessian_stride(), kInputs};
}

// Changes of some rows, each in one strip alone or in all; its other columns stay.
FloatArray SomeChanges(std::mt19937& rng) {
  FloatArray delta = FloatArray::Zero(kInputs, kTileColumns);
  for (int64_t row = 0; row < kInputs; row += 3) {
    const int64_t strip = row % (kTileStrips + 1);
    if (strip == kTileStrips) {
      delta.row(row) = GaussianMatrix(1, kTileColumns, rng);
    } else {
      delta(row, strip * kStripColumns + row % kStripColumns) = GaussianMatrix(1, 1, rng)(0, 0);
    }
  }
  return delta;
}

TEST(RowChanges, AddTheHessianTimesTheChanges) {
  const FeedbackFactor factor = MakeFactor();
  std::mt19937 rng(2);
  const FloatArray delta = SomeChanges(rng);
  FloatArray product = GaussianMatrix(kInputs, kTileColumns, rng);
  const float start = product.cwiseAbs().maxCoeff();
  FloatArray wanted = product;
  for (int64_t row = 0; row < kInputs; ++row) wanted += HessianRow(factor, row) * delta.row(row);

  RowChanges changes;
  for (int64_t row = 0; row < kInputs; ++row) {
    changes.Add(static_cast<int32_t>(row), delta.row(row).data());
  }
  EXPECT_EQ(changes.num_rows(), kInputs / 3);
  for (int64_t first = 0; first < kInputs; first += kProductRows) {
    changes.AddProduct(factor, first, product.row(first).data());
  }
  // Each of at most kInputs / 3 terms and its sum are rounded: by 2^-24 of their magnitudes, in
  // both. H's largest entry is on its diagonal.
  float largest = 0;
  for (int64_t row = 0; row < kInputs; ++row) {
    largest = std::max(largest, HessianRow(factor, row)[row]);
  }
  const float magnitude = start + largest * delta.cwiseAbs().colwise().sum().maxCoeff();
  const float rounding = 2 * (kInputs / 3.0f + 1) * 0x1p-24f * magnitude;
  EXPECT_LE((product - wanted).cwiseAbs().maxCoeff(), rounding);
}

TEST(RowChanges, AreGoneOnceCleared) {
  const FeedbackFactor factor = MakeFactor();
  std::mt19937 rng(3);
  const FloatArray delta = SomeChanges(rng);
  RowChanges changes;
  changes.Add(0, delta.row(0).data());
  changes.Clear();
  EXPECT_EQ(changes.num_rows(), 0);
  FloatArray product = FloatArray::Ones(kProductRows, kTileColumns);
  changes.AddProduct(factor, 0, product.data());
  EXPECT_TRUE(product.isOnes(0));
}

TEST(RowChanges, TakeNoRowThatStays) {
  RowChanges changes;
  const FloatArray zeros = FloatArray::Zero(1, kTileColumns);
  changes.Add(5, zeros.data());
  EXPECT_EQ(changes.num_rows(), 0);
}

}  // namespace
}  // namespace wintserve::quantizer::calibrate
