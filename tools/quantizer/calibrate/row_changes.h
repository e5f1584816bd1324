// What changes of some rows of a tile do to the gradient of all others.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "tools/quantizer/calibrate/column_tile.h"

namespace wintserve::quantizer::calibrate {

// Rows of a product with H take their share of it 16 at a time: a cache line of H.
inline constexpr int64_t kProductRows = 16;

// Changes of rows of a tile. A strip keeps those rows alone in which one of its columns changes:
// after the first sweep a quarter of them.
class RowChanges {
 public:
  // delta [kTileColumns]: row `row` of an array of the tile. Rows come once between calls of Clear.
  void Add(int32_t row, const float* delta);
  void Clear();
  // In which any column changes.
  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }

  // out[i, :] += sum over the changes, as they came, of H[row, first + i] * delta, for
  // i < kProductRows: the rows from `first` on of H times the changes, as H is symmetric.
  // out [kProductRows, kTileColumns]. REQUIRES: first is a multiple of kProductRows.
  void AddProduct(const FeedbackFactor& factor, int64_t first, float* out) const;
  // Asks for what AddProduct reads of H.
  void Prefetch(const FeedbackFactor& factor, int64_t first) const;

 private:
  struct Strip {
    std::vector<int32_t> rows;
    std::vector<float> deltas;  // [rows.size(), kStripColumns]
  };
  std::vector<int32_t> rows_;
  std::array<Strip, kTileStrips> strips_;
};

}  // namespace wintserve::quantizer::calibrate
