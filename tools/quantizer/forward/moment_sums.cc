#include "tools/quantizer/forward/moment_sums.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <utility>

#include "common/check.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/cpu/work_split.h"
#include "kernels/formats/matrix.h"

namespace wintserve::quantizer {
namespace {

using kernels::ConstRows;
using kernels::cpu::CeilDiv;
using kernels::cpu::kTileColumns;
using kernels::cpu::PackedMatrix;
using kernels::cpu::ThreadPool;

// A product's k comes in fours.
constexpr int64_t kRowMultiple = 4;
// Rows of a product that one item of work takes: of their inputs and outputs the second-level cache
// holds what a panel needs.
constexpr int64_t kItemRows = 128;

// to[c, r] = from[r, c] * scale(r)
template <typename Scale>
void Transpose(ConstRows from, int64_t num_rows, int64_t num_columns, const Scale& scale,
               int64_t stride, ThreadPool* pool, float* to) {
  constexpr int64_t kBlock = 32;
  pool->Run(CeilDiv(num_columns, kBlock), num_rows * num_columns, [&](int64_t item, int) {
    const int64_t begin = item * kBlock;
    const int64_t end = std::min(begin + kBlock, num_columns);
    for (int64_t first = 0; first < num_rows; first += kBlock) {
      const int64_t last = std::min(first + kBlock, num_rows);
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t r = first; r < last; ++r) to[c * stride + r] = from.row(r)[c] * scale(r);
      }
    }
  });
}

}  // namespace

MomentSums::MomentSums(int64_t k, int64_t num_outputs, ThreadPool* pool)
    : k_(k), num_outputs_(num_outputs), pool_(pool), moments_(MakeMoments(k, false)) {
  moments_.cross_output.resize(k * num_outputs);
}

void MomentSums::Add(ConstRows x_q, ConstRows x_f, ConstRows d, int64_t num_rows,
                     std::span<const float> weights) {
  CHECK(weights.empty() || std::ssize(weights) == num_rows, "weights={} num_rows={}",
        weights.size(), num_rows);
  CHECK((d.data == nullptr) == (num_outputs_ == 0));
  if (num_rows == 0) return;
  // Both factors take the square root, so that the product is as symmetric as the sum.
  const auto root = [&](int64_t r) { return weights.empty() ? 1.0f : std::sqrt(weights[r]); };
  const int64_t stride = CeilDiv(num_rows, kRowMultiple) * kRowMultiple;
  std::vector<float> left(k_ * stride);
  Transpose(x_q, num_rows, k_, root, stride, pool_, left.data());

  const auto right = [&](int64_t num_columns, const auto& row) {
    std::vector<float> values(stride * num_columns);
    pool_->Run(num_rows, num_rows * num_columns,
               [&](int64_t r, int) { row(r, root(r), values.data() + r * num_columns); });
    return values;
  };
  AddProduct(left, stride,
             right(k_,
                   [&](int64_t r, float scale, float* out) {
                     for (int64_t i = 0; i < k_; ++i) out[i] = x_q.row(r)[i] * scale;
                   }),
             k_, /*is_symmetric=*/true, &moments_.hessian);

  bool differs = false;
  for (int64_t r = 0; r < num_rows && !differs; ++r) {
    differs = std::memcmp(x_q.row(r), x_f.row(r), k_ * sizeof(float)) != 0;
  }
  if (differs) {
    moments_.cross.resize(k_ * k_);
    AddProduct(left, stride,
               right(k_,
                     [&](int64_t r, float scale, float* out) {
                       for (int64_t i = 0; i < k_; ++i) {
                         out[i] = (x_f.row(r)[i] - x_q.row(r)[i]) * scale;
                       }
                     }),
               k_, /*is_symmetric=*/false, &moments_.cross);
  }
  if (num_outputs_ > 0) {
    AddProduct(left, stride,
               right(num_outputs_,
                     [&](int64_t r, float scale, float* out) {
                       for (int64_t i = 0; i < num_outputs_; ++i) out[i] = d.row(r)[i] * scale;
                     }),
               num_outputs_, /*is_symmetric=*/false, &moments_.cross_output);
  }
  moments_.num_rows += num_rows;
  for (int64_t r = 0; r < num_rows; ++r) moments_.weight += weights.empty() ? 1 : weights[r];
}

Moments MomentSums::Finish() {
  float* const hessian = moments_.hessian.data();
  constexpr int64_t kBlock = 32;  // of rows and columns, as lines of the cache are shared
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

void MomentSums::AddProduct(const std::vector<float>& left, int64_t row_stride,
                            std::vector<float> right, int64_t num_columns, bool is_symmetric,
                            std::vector<float>* sum) {
  formats::HostMatrix host;
  host.format = formats::WeightFormat::kFloat32;
  host.k = row_stride;
  host.n = num_columns;
  host.values_f32 = std::move(right);
  const auto packed = PackedMatrix::Create(host, kernels::MatrixUse::kLinear,
                                           kernels::WeightRounding::kUnrounded, pool_);
  CHECK(packed.ok(), "{}", packed.status().ToString());
  host = {};

  struct Scratch {
    std::vector<float> panel = std::vector<float>(kernels::cpu::kPanelFloats);
    std::vector<float> out = std::vector<float>(kItemRows * kTileColumns);
  };
  std::vector<Scratch> scratch(pool_->num_threads());
  const int64_t num_tiles = (*packed)->num_tiles();
  const int64_t num_blocks = CeilDiv(k_, kItemRows);
  pool_->Run(num_tiles * num_blocks, row_stride * k_ * num_columns, [&](int64_t item, int thread) {
    const int64_t tile = item % num_tiles;
    const int64_t first = item / num_tiles * kItemRows;
    const int64_t last = std::min(first + kItemRows, k_);
    if (is_symmetric && tile * kTileColumns >= last) return;
    const float* rows[kItemRows];
    for (int64_t i = first; i < last; ++i) rows[i - first] = left.data() + i * row_stride;
    float* out = scratch[thread].out.data();
    kernels::cpu::MatmulTile(**packed, tile, rows, last - first, scratch[thread].panel.data(), out,
                             kTileColumns);
    const int64_t column = tile * kTileColumns;
    const int64_t count = std::min<int64_t>(kTileColumns, num_columns - column);
    for (int64_t i = first; i < last; ++i) {
      float* to = sum->data() + i * num_columns + column;
      for (int64_t c = 0; c < count; ++c) to[c] += out[(i - first) * kTileColumns + c];
    }
  });
}

}  // namespace wintserve::quantizer
