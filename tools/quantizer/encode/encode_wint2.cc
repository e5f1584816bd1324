#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/status_macros.h"
#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"
#include "tools/quantizer/encode/encode.h"
#include "tools/quantizer/encode/wint2_search.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;

constexpr int kLargestLocalScale = 15;
constexpr int kMaxRadius = 7;
static_assert(2 * kMaxRadius + 1 == kMaxScales);

// Room above the largest group, so that its local scale can still grow.
constexpr float kHeadroom = 1.1f;

// -32 * 15 * 2^119 is still finite in bf16.
constexpr int kLeastScaleExponent = -126;
constexpr int kLargestScaleExponent = 119;

template <typename T>
using PerColumn = std::array<T, kTileColumns>;

// What a tile's columns are encoded with, but for the bytes.
struct TileFit {
  PerColumn<int> map{};
  PerColumn<float> super_scale{};           // of the tile's own unit
  std::vector<PerColumn<int>> local_scale;  // [k / 64]
  PerColumn<double> error{};                // beyond that of zeros, half of it
};

// Up to kTileColumns columns of w, ready to be searched.
class Tile {
 public:
  explicit Tile(int64_t k) : x_(k * kTileColumns), num_groups_(k / kGroupRows) {}

  // Columns are scaled by powers of two to a largest magnitude in [1, 2), so that no product of the
  // search leaves float32. Columns beyond w.n are zeros.
  void Load(FloatMatrix w, int64_t first_column, formats::KOrder k_order) {
    num_columns_ = static_cast<int>(std::min<int64_t>(kTileColumns, w.n - first_column));
    PerColumn<float> largest{};
    for (int64_t row = 0; row < w.k; ++row) {
      for (int i = 0; i < num_columns_; ++i) {
        largest[i] = std::max(largest[i], std::abs(w.At(row, first_column + i)));
      }
    }
    exponents_.fill(0);
    for (int i = 0; i < num_columns_; ++i) {
      if (largest[i] > 0) exponents_[i] = std::ilogb(largest[i]);
    }
    for (int64_t stored = 0; stored < w.k; ++stored) {
      const int64_t group = stored / kGroupRows;
      const int in_group = static_cast<int>(stored % kGroupRows);
      const int64_t row = group * kGroupRows + formats::Wint2TrueRow(in_group, k_order);
      for (int i = 0; i < num_columns_; ++i) {
        x_[stored * kTileColumns + i] = std::ldexp(w.At(row, first_column + i), -exponents_[i]);
      }
    }
  }

  int num_columns() const { return num_columns_; }
  int64_t num_groups() const { return num_groups_; }
  int exponent(int column) const { return exponents_[column]; }
  const float* Group(int64_t group) const { return &x_[group * kGroupRows * kTileColumns]; }

 private:
  std::vector<float> x_;  // [k, kTileColumns], stored order
  int64_t num_groups_;
  int num_columns_ = 0;
  PerColumn<int> exponents_{};
};

class TileEncoder {
 public:
  TileEncoder(const std::vector<Codebook>& codebooks, const std::vector<float>& importance,
              const Wint2Options& options, int64_t k)
      : codebooks_(codebooks), importance_(importance), options_(options), tile_(k) {}

  void Encode(FloatMatrix w, int64_t first_column, HostMatrix* out) {
    tile_.Load(w, first_column, options_.k_order);
    TileFit best = FitMap(0);
    for (int map = 1; map < static_cast<int>(codebooks_.size()); ++map) {
      KeepBetter(FitMap(map), &best);
    }
    FindAllBytes(best);
    for (int i = 0; i < options_.num_refits; ++i) {
      if (!Refit(&best)) break;
      FindAllBytes(best);
    }
    Store(best, first_column, out);
  }

 private:
  GroupView View(int64_t group) const {
    return {tile_.Group(group),
            importance_.empty() ? nullptr : importance_.data() + group * kGroupRows};
  }

  float ClampSuperScale(float scale, int column) const {
    const int exponent = tile_.exponent(column);
    return std::clamp(formats::RoundToBfloat16(scale),
                      std::ldexp(1.0f, kLeastScaleExponent - exponent),
                      std::ldexp(1.0f, kLargestScaleExponent - exponent));
  }

  // The best fit with this map and super scales from the groups' root mean squares.
  TileFit FitMap(int map) const {
    const float scale_per_sigma = codebooks_[map].map().scale_per_sigma;
    std::vector<PerColumn<float>> wanted(tile_.num_groups());
    PerColumn<float> largest{};
    for (int64_t group = 0; group < tile_.num_groups(); ++group) {
      const float* x = tile_.Group(group);
      PerColumn<float> sum{};
      for (int row = 0; row < kGroupRows; ++row) {
        for (int i = 0; i < kTileColumns; ++i) {
          const float value = x[row * kTileColumns + i];
          sum[i] += value * value;
        }
      }
      for (int i = 0; i < kTileColumns; ++i) {
        wanted[group][i] = std::sqrt(sum[i] / kGroupRows) * scale_per_sigma;
        largest[i] = std::max(largest[i], wanted[group][i]);
      }
    }
    TileFit fit;
    fit.map.fill(map);
    for (int i = 0; i < kTileColumns; ++i) {
      fit.super_scale[i] = ClampSuperScale(largest[i] * kHeadroom / kLargestLocalScale, i);
    }
    fit.local_scale.resize(tile_.num_groups());
    for (int64_t group = 0; group < tile_.num_groups(); ++group) {
      for (int i = 0; i < kTileColumns; ++i) {
        const float guess = std::nearbyint(wanted[group][i] / fit.super_scale[i]);
        fit.local_scale[group][i] = static_cast<int>(std::clamp(guess, 1.0f, 15.0f));
      }
    }
    ChooseLocalScales(&fit);
    return fit;
  }

  // Replaces local scales by the best ones near them, or 0, and sums up the error.
  void ChooseLocalScales(TileFit* fit) const {
    fit->error.fill(0);
    for (int64_t group = 0; group < tile_.num_groups(); ++group) ChooseLocalScales(group, fit);
  }

  void ChooseLocalScales(int64_t group, TileFit* fit) const {
    const int radius = options_.local_scale_radius;
    const int num_scales = 2 * radius + 1;
    PerColumn<int>& guess = fit->local_scale[group];
    const auto candidate = [&](int s, int i) {
      return std::clamp(guess[i] + s - radius, 1, kLargestLocalScale);
    };
    std::array<float, kMaxScales * kTileColumns> scales;
    std::array<float, kMaxScales * kTileColumns> costs;
    for (int s = 0; s < num_scales; ++s) {
      for (int i = 0; i < kTileColumns; ++i) {
        scales[s * kTileColumns + i] =
            formats::RoundToBfloat16(static_cast<float>(candidate(s, i)) * fit->super_scale[i]);
      }
    }
    SumCosts(group, *fit, num_scales, scales.data(), costs.data());
    for (int i = 0; i < kTileColumns; ++i) {
      float least = 0;  // zeros
      int best = 0;
      for (int s = 0; s < num_scales; ++s) {
        const float error = scales[s * kTileColumns + i] * costs[s * kTileColumns + i];
        if (error < least) {
          least = error;
          best = candidate(s, i);
        }
      }
      guess[i] = best;
      fit->error[i] += least;
    }
  }

  // Columns of a tile may have different maps.
  void SumCosts(int64_t group, const TileFit& fit, int num_scales, const float* scales,
                float* costs) const {
    std::array<float, kMaxScales * kTileColumns> of_map;
    for (int map = 0; map < static_cast<int>(codebooks_.size()); ++map) {
      if (std::find(fit.map.begin(), fit.map.end(), map) == fit.map.end()) continue;
      SumLeastCosts(View(group), codebooks_[map], num_scales, scales, of_map.data());
      for (int s = 0; s < num_scales; ++s) {
        for (int i = 0; i < kTileColumns; ++i) {
          if (fit.map[i] == map) costs[s * kTileColumns + i] = of_map[s * kTileColumns + i];
        }
      }
    }
  }

  // Returns whether a column of `other` was better.
  bool KeepBetter(const TileFit& other, TileFit* best) const {
    bool any = false;
    for (int i = 0; i < tile_.num_columns(); ++i) {
      if (!(other.error[i] < best->error[i])) continue;
      any = true;
      best->map[i] = other.map[i];
      best->super_scale[i] = other.super_scale[i];
      best->error[i] = other.error[i];
      for (int64_t group = 0; group < tile_.num_groups(); ++group) {
        best->local_scale[group][i] = other.local_scale[group][i];
      }
    }
    return any;
  }

  void FindAllBytes(const TileFit& fit) {
    bytes_.resize(tile_.num_groups() * kTileColumns);
    for (int64_t group = 0; group < tile_.num_groups(); ++group) {
      for (int i = 0; i < tile_.num_columns(); ++i) {
        const float scale = formats::RoundToBfloat16(static_cast<float>(fit.local_scale[group][i]) *
                                                     fit.super_scale[i]);
        FindBytes(View(group), codebooks_[fit.map[i]], i, scale,
                  bytes_[group * kTileColumns + i].data());
      }
    }
  }

  // Least squares of x ~ super_scale * (local_scale * codeword).
  float FittedSuperScale(const TileFit& fit, int column) const {
    const Codebook& codebook = codebooks_[fit.map[column]];
    double product = 0;
    double norm = 0;
    for (int64_t group = 0; group < tile_.num_groups(); ++group) {
      const GroupView view = View(group);
      for (int row = 0; row < kGroupRows; ++row) {
        const uint8_t byte = bytes_[group * kTileColumns + column][row / kWeightsOfByte];
        const double value =
            fit.local_scale[group][column] * codebook.Value(byte, row % kWeightsOfByte);
        const double h = view.importance == nullptr ? 1.0 : view.importance[row];
        product += h * value * view.x[row * kTileColumns + column];
        norm += h * value * value;
      }
    }
    return norm > 0 ? static_cast<float>(product / norm) : fit.super_scale[column];
  }

  bool Refit(TileFit* best) const {
    TileFit fit = *best;
    bool any_changed = false;
    for (int i = 0; i < tile_.num_columns(); ++i) {
      fit.super_scale[i] = ClampSuperScale(FittedSuperScale(fit, i), i);
      any_changed |= fit.super_scale[i] != best->super_scale[i];
    }
    if (!any_changed) return false;
    ChooseLocalScales(&fit);
    return KeepBetter(fit, best);
  }

  void Store(const TileFit& fit, int64_t first_column, HostMatrix* out) const {
    for (int i = 0; i < tile_.num_columns(); ++i) {
      const int64_t column = first_column + i;
      const CodeMap& map = codebooks_[fit.map[i]].map();
      out->channel_scale[column] = std::ldexp(fit.super_scale[i], tile_.exponent(i));
      out->code_scale[column] = map.code_scale;
      out->code_zp[column] = map.code_zp;
      for (int64_t group = 0; group < tile_.num_groups(); ++group) {
        out->local_scale[group * out->n + column] = static_cast<uint8_t>(fit.local_scale[group][i]);
        for (int byte = 0; byte < kGroupBytes; ++byte) {
          out->codes_u8[(group * kGroupBytes + byte) * out->n + column] =
              bytes_[group * kTileColumns + i][byte];
        }
      }
    }
  }

  const std::vector<Codebook>& codebooks_;
  const std::vector<float>& importance_;  // [k], stored order, or empty
  const Wint2Options& options_;
  Tile tile_;
  std::vector<std::array<uint8_t, kGroupBytes>> bytes_;  // [k / 64, kTileColumns]
};

absl::Status CheckOptions(const Wint2Options& options) {
  if (options.maps.empty()) return absl::InvalidArgumentError("no code map to choose from");
  for (const CodeMap& map : options.maps) RETURN_IF_ERROR(CheckCodeMap(map));
  if (options.local_scale_radius < 0 || options.local_scale_radius > kMaxRadius) {
    return absl::InvalidArgumentError(fmt::format("local_scale_radius {} is not in 0 … {}",
                                                  options.local_scale_radius, kMaxRadius));
  }
  if (options.num_refits < 0) {
    return absl::InvalidArgumentError(fmt::format("num_refits {} is negative", options.num_refits));
  }
  return absl::OkStatus();
}

absl::Status CheckImportance(std::span<const float> importance, int64_t k) {
  if (importance.empty()) return absl::OkStatus();
  if (static_cast<int64_t>(importance.size()) != k) {
    return absl::InvalidArgumentError(
        fmt::format("importance of {} rows for a matrix of {}", importance.size(), k));
  }
  for (int64_t row = 0; row < k; ++row) {
    if (importance[row] >= 0 && std::isfinite(importance[row])) continue;
    return absl::InvalidArgumentError(
        fmt::format("the importance of row {} is {}; it must be finite and not negative", row,
                    importance[row]));
  }
  return absl::OkStatus();
}

// In stored order, the largest one in [1, 2), which no result depends on.
std::vector<float> StoredImportance(std::span<const float> importance, formats::KOrder k_order) {
  std::vector<float> stored(importance.size());
  if (importance.empty()) return stored;
  const float largest = *std::max_element(importance.begin(), importance.end());
  const int exponent = largest > 0 ? std::ilogb(largest) : 0;
  for (size_t i = 0; i < stored.size(); ++i) {
    const size_t first = i / kGroupRows * kGroupRows;
    const int row = formats::Wint2TrueRow(static_cast<int>(i - first), k_order);
    stored[i] = std::ldexp(importance[first + row], -exponent);
  }
  return stored;
}

}  // namespace

absl::StatusOr<HostMatrix> EncodeWint2(FloatMatrix w, std::span<const float> importance,
                                       const Wint2Options& options,
                                       kernels::cpu::ThreadPool& pool) {
  RETURN_IF_ERROR(CheckOptions(options));
  RETURN_IF_ERROR(CheckWeights(w, pool));
  RETURN_IF_ERROR(CheckImportance(importance, w.k));
  if (w.k % (2 * formats::kWint2GroupSize) != 0) {
    return absl::InvalidArgumentError(
        fmt::format("{} rows: wint2 needs a multiple of {}", w.k, 2 * formats::kWint2GroupSize));
  }
  const std::vector<Codebook> codebooks(options.maps.begin(), options.maps.end());
  const std::vector<float> stored_importance = StoredImportance(importance, options.k_order);
  HostMatrix out = formats::MakeHostMatrix(formats::WeightFormat::kWint2, w.k, w.n);
  out.k_order = options.k_order;
  std::vector<TileEncoder> encoders;
  encoders.reserve(pool.num_threads());
  for (int i = 0; i < pool.num_threads(); ++i) {
    encoders.emplace_back(codebooks, stored_importance, options, w.k);
  }
  const int64_t multiply_adds = w.k * w.n * kNumBytes;
  pool.Run((w.n + kTileColumns - 1) / kTileColumns, multiply_adds, [&](int64_t item, int thread) {
    encoders[thread].Encode(w, item * kTileColumns, &out);
  });
  return out;
}

}  // namespace wintserve::quantizer
