#include "tools/quantizer/forward/moment_sums.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "kernels/cpu/work_split.h"
#include "tools/quantizer/calibrate/column_tile.h"

namespace wintserve::quantizer {
namespace {

using calibrate::kTileColumns;
using kernels::ConstRows;
using kernels::cpu::CeilDiv;

// Rows of a product that one item of work takes at most: of their inputs and outputs the
// second-level cache holds what a panel needs.
constexpr int64_t kItemRows = 128;
constexpr int64_t kBlock = 32;  // of a transposition

}  // namespace

MomentSums::MomentSums(int64_t k, int64_t num_outputs, kernels::cpu::ThreadPool* pool)
    : k_(k), num_outputs_(num_outputs), pool_(pool) {
  CHECK(k > 0, "k={}", k);
  moments_.k = k;
  SetZeros(k_, &moments_.hessian);
  if (num_outputs > 0) SetZeros(num_outputs, &moments_.cross_output);
}

void MomentSums::Add(ConstRows x_q, ConstRows x_f, ConstRows d, int64_t num_rows,
                     std::span<const float> weights) {
  CHECK(weights.empty() || std::ssize(weights) == num_rows, "weights={} num_rows={}",
        weights.size(), num_rows);
  CHECK((d.data == nullptr) == (num_outputs_ == 0));
  if (num_rows == 0) return;
  num_rows_ = num_rows;
  // Both factors take the square root, so that the product is as symmetric as the sum.
  roots_.resize(num_rows);
  for (int64_t r = 0; r < num_rows; ++r) {
    roots_[r] = weights.empty() ? 1.0f : std::sqrt(weights[r]);
  }
  SetLeft(x_q);
  SetRight(k_, [&](int64_t r, int64_t column, int64_t count, float* out) {
    const float* x = x_q.row(r) + column;
    for (int64_t i = 0; i < count; ++i) out[i] = x[i] * roots_[r];
  });
  AddProduct(k_, Wanted::kLowerHalf, &moments_.hessian);

  if (FindDifferences(x_q, x_f)) {
    if (moments_.cross.empty()) SetZeros(k_, &moments_.cross);
    SetRight(k_, [&](int64_t r, int64_t column, int64_t count, float* out) {
      const float* f = x_f.row(r) + column;
      const float* q = x_q.row(r) + column;
      for (int64_t i = 0; i < count; ++i) out[i] = (f[i] - q[i]) * roots_[r];
    });
    AddProduct(k_, Wanted::kPartsThatDiffer, &moments_.cross);
  }
  if (num_outputs_ > 0) {
    SetRight(num_outputs_, [&](int64_t r, int64_t column, int64_t count, float* out) {
      const float* wanted = d.row(r) + column;
      for (int64_t i = 0; i < count; ++i) out[i] = wanted[i] * roots_[r];
    });
    AddProduct(num_outputs_, Wanted::kAll, &moments_.cross_output);
  }
  moments_.num_rows += num_rows;
  for (int64_t r = 0; r < num_rows; ++r) moments_.weight += weights.empty() ? 1 : weights[r];
}

Moments MomentSums::Finish() {
  float* const hessian = moments_.hessian.data();
  // Of rows and columns, as lines of the cache are shared.
  pool_->Run(CeilDiv(k_, kBlock), k_ * k_, [&](int64_t item, int) {
    const int64_t begin = item * kBlock;
    const int64_t end = std::min(begin + kBlock, k_);
    for (int64_t first = begin; first < k_; first += kBlock) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t last = std::min(first + kBlock, k_);
        for (int64_t i = std::max(first, j + 1); i < last; ++i) {
          hessian[j * k_ + i] = hessian[i * k_ + j];
        }
      }
    }
  });
  return std::move(moments_);
}

void MomentSums::SetZeros(int64_t num_columns, LargeVector* sum) {
  sum->resize(k_ * num_columns);
  pool_->Run(k_, k_ * num_columns, [&](int64_t i, int) {
    std::fill_n(sum->data() + i * num_columns, num_columns, 0.0f);
  });
}

int64_t MomentSums::PartRows(int64_t part) const {
  return std::min(kPartRows, num_rows_ - part * kPartRows);
}

void MomentSums::SetLeft(ConstRows x_q) {
  Reserve(k_ * num_rows_, &left_);
  const int64_t num_blocks = CeilDiv(k_, kBlock);
  pool_->Run(num_parts() * num_blocks, num_rows_ * k_, [&](int64_t item, int) {
    const int64_t part = item / num_blocks;
    const int64_t first_row = part * kPartRows;
    const int64_t num_rows = PartRows(part);
    const int64_t begin = item % num_blocks * kBlock;
    const int64_t end = std::min(begin + kBlock, k_);
    float* const to = left_.values.data() + first_row * k_;
    for (int64_t first = 0; first < num_rows; first += kBlock) {
      const int64_t last = std::min(first + kBlock, num_rows);
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t r = first; r < last; ++r) {
          to[c * num_rows + r] = x_q.row(first_row + r)[c] * roots_[first_row + r];
        }
      }
    }
  });
}

template <typename Row>
void MomentSums::SetRight(int64_t num_columns, const Row& row) {
  constexpr int64_t kItemOfRows = 64;
  const int64_t num_tiles = CeilDiv(num_columns, kTileColumns);
  Reserve(num_rows_ * num_tiles * kTileColumns, &right_);
  pool_->Run(CeilDiv(num_rows_, kItemOfRows), num_rows_ * num_columns, [&](int64_t item, int) {
    const int64_t end = std::min((item + 1) * kItemOfRows, num_rows_);
    for (int64_t r = item * kItemOfRows; r < end; ++r) {
      for (int64_t tile = 0; tile < num_tiles; ++tile) {
        const int64_t column = tile * kTileColumns;
        const int64_t count = std::min<int64_t>(kTileColumns, num_columns - column);
        float* const out = right_.values.data() + (tile * num_rows_ + r) * kTileColumns;
        row(r, column, count, out);
        std::fill(out + count, out + kTileColumns, 0.0f);
      }
    }
  });
}

bool MomentSums::FindDifferences(ConstRows x_q, ConstRows x_f) {
  differs_.assign(num_rows_, false);
  if (x_q.data == x_f.data && x_q.stride == x_f.stride) return false;
  pool_->Run(num_rows_, num_rows_ * k_, [&](int64_t r, int) {
    differs_[r] = std::memcmp(x_q.row(r), x_f.row(r), k_ * sizeof(float)) != 0;
  });
  return std::find(differs_.begin(), differs_.end(), true) != differs_.end();
}

bool MomentSums::PartDiffers(int64_t part) const {
  const auto first = differs_.begin() + part * kPartRows;
  return std::find(first, first + PartRows(part), true) != first + PartRows(part);
}

void MomentSums::AddProduct(int64_t num_columns, Wanted wanted, LargeVector* sum) {
  using Out = std::array<float, kItemRows * kTileColumns>;
  std::vector<Out> outs(pool_->num_threads());
  const int64_t num_tiles = CeilDiv(num_columns, kTileColumns);
  const int64_t item_rows =
      kernels::cpu::PickItemRows(num_tiles, k_, pool_->num_threads(), kItemRows);
  const int64_t num_blocks = CeilDiv(k_, item_rows);
  pool_->Run(num_tiles * num_blocks, num_rows_ * k_ * num_columns, [&](int64_t item, int thread) {
    const int64_t tile = item % num_tiles;
    const int64_t column = tile * kTileColumns;
    const int64_t first = item / num_tiles * item_rows;
    const int64_t last = std::min(first + item_rows, k_);
    if (wanted == Wanted::kLowerHalf && column >= last) return;
    const int64_t count = std::min<int64_t>(kTileColumns, num_columns - column);
    Out& out = outs[thread];
    for (int64_t part = 0; part < num_parts(); ++part) {
      if (wanted == Wanted::kPartsThatDiffer && !PartDiffers(part)) continue;
      const int64_t first_row = part * kPartRows;
      const int64_t num_rows = PartRows(part);
      out.fill(0);
      calibrate::AddProduct(
          left_.values.data() + first_row * k_ + first * num_rows, num_rows, last - first, num_rows,
          right_.values.data() + (tile * num_rows_ + first_row) * kTileColumns, out.data());
      for (int64_t i = first; i < last; ++i) {
        float* to = sum->data() + i * num_columns + column;
        for (int64_t c = 0; c < count; ++c) to[c] += out[(i - first) * kTileColumns + c];
      }
    }
  });
}

void MomentSums::Reserve(int64_t size, Operand* operand) {
  if (operand->size >= size) return;
  operand->values = {};  // before there are two
  operand->values = calibrate::LargeArray(size);
  operand->size = size;
}

}  // namespace wintserve::quantizer
