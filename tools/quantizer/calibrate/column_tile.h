// 64 columns of a matrix while error feedback or sweeps go over them, and what both kinds of
// formats do with them alike.
//
// Arrays of a tile are [k, kTileColumns], row-major, rows in the encoding order of a
// FeedbackFactor. H and M below are its hessian() and factor(). Every column is computed alone, so
// nothing depends on which columns share a tile, except when sweeps end.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "tools/quantizer/calibrate/feedback_factor.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer::calibrate {

inline constexpr int kStripColumns = 16;  // columns that a kernel takes at once
inline constexpr int kTileStrips = 4;
inline constexpr int kTileColumns = kTileStrips * kStripColumns;
inline constexpr int kGroupRows = 64;

// Scales of columns: never subnormal, and no decoded value (at most 32 * 15 times a scale) is
// infinite.
inline constexpr float kSmallestScale = 0x1p-126f;
inline constexpr float kLargestScale = 0x1p119f;

// The same for a column that is divided by `unit`.
constexpr float SmallestScale(float unit) {
  return unit < 1 ? kSmallestScale / unit : kSmallestScale;
}
constexpr float LargestScale(float unit) { return unit > 1 ? kLargestScale / unit : kLargestScale; }

using ColumnSums = std::array<double, kTileColumns>;
using ColumnScales = std::array<float, kTileColumns>;

struct ColumnTile {
  explicit ColumnTile(int64_t k);

  int64_t k;
  std::array<int64_t, kTileColumns> columns;  // of the matrix; -1: padding
  // Strips whose codes and scales may change.
  std::array<bool, kTileStrips> is_open = {};
  // Power of two that weights, decoded values, scales and gradient of the column are divided by, so
  // that no square overflows or vanishes. Errors are those of the matrix itself.
  ColumnScales unit;
  std::vector<float> weights;       // the target's; zeros for padding
  std::vector<float> decoded;       // what the codes stand for
  std::vector<float> gradient;      // H (weights - decoded)
  std::vector<float> old_gradient;  // of RefitScales
  std::vector<float> scratch;       // of the functions below
};

// Sets columns, unit and weights. At most kTileColumns columns, the rest is padding.
void LoadWeights(FloatMatrix target, const FeedbackFactor& factor, std::span<const int64_t> columns,
                 ColumnTile& tile);

// out += x panel, with x [num_rows, depth] of row stride x_stride, panel [depth, kTileColumns] and
// out [num_rows, kTileColumns].
void AddProduct(const float* x, int64_t x_stride, int64_t num_rows, int64_t depth,
                const float* panel, float* out);

// ||M w||^2 = w^T H w of each column: its error if everything decoded to zero. Uses scratch.
ColumnSums ZeroErrors(const FeedbackFactor& factor, ColumnTile& tile);

// Sets gradient. Uses scratch.
void StartGradient(const FeedbackFactor& factor, ColumnTile& tile);

// e^T H e of each column, from gradient.
ColumnSums Errors(const ColumnTile& tile);

class RowChanges;

// Keeps a tile's gradient while codes change, 64 rows at a time. What a change does to all other
// rows is added for about 256 rows together, as each time all of the gradient passes through the
// caches.
class LazyGradient {
 public:
  // Both must outlive this, and the tile's gradient is incomplete until Flush.
  LazyGradient(const FeedbackFactor& factor, ColumnTile& tile);
  ~LazyGradient();

  using Rows = std::span<const int32_t, kGroupRows>;
  // gradient [kGroupRows, kTileColumns] of these rows as all changes so far make it. REQUIRES: as
  // in Add, rows come in runs of 16 side by side, each of which begins at a multiple of 16.
  void Get(Rows rows, float* gradient);
  // delta [kGroupRows, kTileColumns] = old - new decoded of these rows.
  void Add(Rows rows, const float* delta);
  void Flush();

 private:
  const FeedbackFactor& factor_;
  ColumnTile& tile_;
  std::unique_ptr<RowChanges> pending_;
};

// Writes the decoded values that the tile's codes have with these scales.
using DecodeFunction = absl::FunctionRef<void(const ColumnScales& scales, float* decoded)>;

// Moves the scale of every column of an open strip to the bf16 value nearest to that of least error
// while the codes stay, where this lowers the error, and brings decoded and gradient up to date.
// Uses scratch.
//   zero_errors  of ZeroErrors
void RefitScales(const FeedbackFactor& factor, const ColumnSums& zero_errors, DecodeFunction decode,
                 ColumnScales& scales, ColumnTile& tile);

}  // namespace wintserve::quantizer::calibrate
