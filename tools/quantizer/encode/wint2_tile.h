// A few columns of a matrix on their way to WINT2.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/formats/matrix.h"
#include "tools/quantizer/encode/encode.h"
#include "tools/quantizer/encode/wint2_search.h"

namespace wintserve::quantizer {

template <typename T>
using PerColumn = std::array<T, kTileColumns>;

// Up to kTileColumns columns, ready to be searched: rows in stored order, each column scaled by a
// power of two to a largest magnitude in [1, 2), so that no product of the search leaves float32.
class Tile {
 public:
  explicit Tile(int64_t k)
      : weighted_(k * kTileColumns), rms_(k / kGroupRows), num_groups_(k / kGroupRows) {}

  // importance: [w.k] in stored order, or empty. Columns beyond w.n are zeros.
  void Load(FloatMatrix w, int64_t first_column, formats::KOrder k_order,
            const std::vector<float>& importance);

  int num_columns() const { return num_columns_; }
  int64_t num_groups() const { return num_groups_; }
  // The column's weights are the tile's times 2^exponent.
  int exponent(int column) const { return exponents_[column]; }
  // Root mean square of a group's weights, without importance.
  const PerColumn<float>& Rms(int64_t group) const { return rms_[group]; }
  // Importance times weight, [kGroupRows, kTileColumns].
  const float* Weighted(int64_t group) const {
    return &weighted_[group * kGroupRows * kTileColumns];
  }

 private:
  std::vector<float> weighted_;
  std::vector<PerColumn<float>> rms_;
  int64_t num_groups_;
  int num_columns_ = 0;
  PerColumn<int> exponents_{};
};

// What all tiles of a matrix share. Outlives its encoders.
struct Wint2Plan {
  std::vector<Codebook> codebooks;
  std::vector<NormTable> norms;   // of each codebook
  std::vector<float> importance;  // [k] in stored order, or empty
  formats::KOrder k_order = formats::KOrder::kMma64;
  int local_scale_radius = 0;
  int num_refits = 0;
};

// Encodes one tile after the other. Thread-compatible: a thread has one of its own.
class TileEncoder {
 public:
  TileEncoder(const Wint2Plan& plan, int64_t k) : plan_(plan), tile_(k), bytes_(k / kGroupRows) {}

  // Fills the columns from first_column on, kTileColumns or as many as there are.
  void Encode(FloatMatrix w, int64_t first_column, formats::HostMatrix* out);

 private:
  // What columns are encoded with, but for the bytes.
  struct Fit {
    PerColumn<int> map{};
    PerColumn<float> super_scale{};           // of the tile's weights
    std::vector<PerColumn<int>> local_scale;  // [k / kGroupRows]
    PerColumn<float> error{};                 // beyond that of zeros, half of it
  };
  // The same of one column.
  struct ColumnFit {
    float super_scale = 0;
    std::vector<int> local_scale;
    float error = 0;
  };

  SearchRows Rows(int64_t group, int map) const;
  // To bf16 and into the range that decodes to finite numbers.
  float RoundSuperScale(float scale, int column) const;
  // The best fit with this map and the super scales that the root mean squares suggest.
  Fit FitMap(int map) const;
  // Replaces a group's local scales by the best ones near them, or 0, and adds to the error.
  void ChooseLocalScales(int64_t group, int map, Fit* fit) const;
  void KeepBetter(const Fit& other, Fit* best) const;
  // Repeats what FitMap did with another super scale, for one column.
  ColumnFit FitColumn(const Fit& fit, int column, float super_scale) const;
  void FindColumnBytes(const Fit& fit, int column);
  // The super scale that suits the column's bytes best.
  float LeastSquaresScale(const Fit& fit, int column) const;
  void RefitColumn(int column, Fit* fit);
  void Store(const Fit& fit, int64_t first_column, formats::HostMatrix* out) const;

  const Wint2Plan& plan_;
  Tile tile_;
  std::vector<PerColumn<std::array<uint8_t, kGroupBytes>>> bytes_;  // [k / kGroupRows]
};

}  // namespace wintserve::quantizer
