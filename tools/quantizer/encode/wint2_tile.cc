#include "tools/quantizer/encode/wint2_tile.h"

#include <algorithm>
#include <cmath>

#include "kernels/formats/bf16.h"
#include "kernels/formats/wint2.h"

namespace wintserve::quantizer {
namespace {

constexpr int kLargestLocalScale = 15;

// Room above the largest group, so that its local scale can still grow.
constexpr float kHeadroom = 1.1f;

// Subnormal numbers may be taken for zeros; and -32 * 15 * 2^119 is still finite in bf16.
constexpr int kLeastScaleExponent = -126;
constexpr int kLargestScaleExponent = 119;

float GroupScale(int local_scale, float super_scale) {
  return formats::RoundToBfloat16(static_cast<float>(local_scale) * super_scale);
}

// Local scales to try: `guess` and its neighbours, cut to what there is.
int Candidate(int guess, int index, int radius) {
  return std::clamp(guess + index - radius, 1, kLargestLocalScale);
}

}  // namespace

void Tile::Load(FloatMatrix w, int64_t first_column, formats::KOrder k_order,
                const std::vector<float>& importance) {
  num_columns_ = static_cast<int>(std::min<int64_t>(kTileColumns, w.n - first_column));
  PerColumn<float> largest{};
  for (int64_t row = 0; row < w.k; ++row) {
    for (int i = 0; i < num_columns_; ++i) {
      largest[i] = std::max(largest[i], std::abs(w.At(row, first_column + i)));
    }
  }
  exponents_.fill(0);
  PerColumn<double> unit{};  // float64 holds every power of two that this takes
  for (int i = 0; i < num_columns_; ++i) {
    if (largest[i] > 0) exponents_[i] = std::ilogb(largest[i]);
    unit[i] = std::ldexp(1.0, -exponents_[i]);
  }
  for (int64_t group = 0; group < num_groups_; ++group) {
    PerColumn<float> sum{};
    for (int stored = 0; stored < kGroupRows; ++stored) {
      const int64_t row = group * kGroupRows + formats::Wint2TrueRow(stored, k_order);
      const float h = importance.empty() ? 1.0f : importance[group * kGroupRows + stored];
      float* weighted = &weighted_[(group * kGroupRows + stored) * kTileColumns];
      for (int i = 0; i < num_columns_; ++i) {
        const auto x = static_cast<float>(w.At(row, first_column + i) * unit[i]);
        sum[i] += x * x;
        weighted[i] = h * x;
      }
      std::fill(weighted + num_columns_, weighted + kTileColumns, 0.0f);
    }
    for (int i = 0; i < kTileColumns; ++i) rms_[group][i] = std::sqrt(sum[i] / kGroupRows);
  }
}

void TileEncoder::Encode(FloatMatrix w, int64_t first_column, formats::HostMatrix* out) {
  tile_.Load(w, first_column, plan_.k_order, plan_.importance);
  Fit best = FitMap(0);
  for (int map = 1; map < static_cast<int>(plan_.codebooks.size()); ++map) {
    KeepBetter(FitMap(map), &best);
  }
  for (int column = 0; column < tile_.num_columns(); ++column) {
    FindColumnBytes(best, column);
    RefitColumn(column, &best);
  }
  Store(best, first_column, out);
}

SearchRows TileEncoder::Rows(int64_t group, int map) const {
  return {.weighted = tile_.Weighted(group),
          .codebook = &plan_.codebooks[map],
          .norms = &plan_.norms[map],
          .first_byte_row = group * kGroupBytes};
}

float TileEncoder::RoundSuperScale(float scale, int column) const {
  const int exponent = tile_.exponent(column);
  return std::clamp(formats::RoundToBfloat16(scale),
                    std::ldexp(1.0f, kLeastScaleExponent - exponent),
                    std::ldexp(1.0f, kLargestScaleExponent - exponent));
}

TileEncoder::Fit TileEncoder::FitMap(int map) const {
  const float scale_per_sigma = plan_.codebooks[map].map().scale_per_sigma;
  PerColumn<float> largest{};
  for (int64_t group = 0; group < tile_.num_groups(); ++group) {
    for (int i = 0; i < kTileColumns; ++i) {
      largest[i] = std::max(largest[i], tile_.Rms(group)[i] * scale_per_sigma);
    }
  }
  Fit fit;
  fit.map.fill(map);
  for (int i = 0; i < kTileColumns; ++i) {
    fit.super_scale[i] = RoundSuperScale(largest[i] * kHeadroom / kLargestLocalScale, i);
  }
  fit.local_scale.resize(tile_.num_groups());
  for (int64_t group = 0; group < tile_.num_groups(); ++group) {
    for (int i = 0; i < kTileColumns; ++i) {
      const float wanted = tile_.Rms(group)[i] * scale_per_sigma / fit.super_scale[i];
      fit.local_scale[group][i] =
          static_cast<int>(std::min(std::nearbyint(wanted), float{kLargestLocalScale}));
    }
    ChooseLocalScales(group, map, &fit);
  }
  return fit;
}

void TileEncoder::ChooseLocalScales(int64_t group, int map, Fit* fit) const {
  const int radius = plan_.local_scale_radius;
  const int num_scales = 2 * radius + 1;
  PerColumn<int>& local_scale = fit->local_scale[group];
  std::array<PerColumn<float>, kMaxScales> scales;
  std::array<PerColumn<float>, kMaxScales> costs;
  for (int i = 0; i < kTileColumns; ++i) {
    // Within reach of 1, at least.
    local_scale[i] = std::max(local_scale[i], 1);
    for (int s = 0; s < num_scales; ++s) {
      scales[s][i] = GroupScale(Candidate(local_scale[i], s, radius), fit->super_scale[i]);
    }
  }
  SumLeastCosts(Rows(group, map), num_scales, scales[0].data(), costs[0].data());
  for (int i = 0; i < kTileColumns; ++i) {
    float least = 0;  // zeros
    int best = 0;
    for (int s = 0; s < num_scales; ++s) {
      const float error = scales[s][i] * costs[s][i];
      if (error >= least) continue;
      least = error;
      best = Candidate(local_scale[i], s, radius);
    }
    local_scale[i] = best;
    fit->error[i] += least;
  }
}

void TileEncoder::KeepBetter(const Fit& other, Fit* best) const {
  for (int i = 0; i < tile_.num_columns(); ++i) {
    if (other.error[i] >= best->error[i]) continue;
    best->map[i] = other.map[i];
    best->super_scale[i] = other.super_scale[i];
    best->error[i] = other.error[i];
    for (int64_t group = 0; group < tile_.num_groups(); ++group) {
      best->local_scale[group][i] = other.local_scale[group][i];
    }
  }
}

TileEncoder::ColumnFit TileEncoder::FitColumn(const Fit& fit, int column, float super_scale) const {
  const int radius = plan_.local_scale_radius;
  const int num_scales = 2 * radius + 1;
  ColumnFit refit;
  refit.super_scale = super_scale;
  for (int64_t group = 0; group < tile_.num_groups(); ++group) {
    // The group's scale stays where it was: the super scale moves little.
    const int guess = std::max(fit.local_scale[group][column], 1);
    std::array<float, kMaxScales> scales;
    std::array<float, kMaxScales> costs;
    for (int s = 0; s < num_scales; ++s) {
      scales[s] = GroupScale(Candidate(guess, s, radius), super_scale);
    }
    SumLeastCostsOfColumn(Rows(group, fit.map[column]), column, num_scales, scales.data(),
                          costs.data());
    float least = 0;
    int best = 0;
    for (int s = 0; s < num_scales; ++s) {
      const float error = scales[s] * costs[s];
      if (error >= least) continue;
      least = error;
      best = Candidate(guess, s, radius);
    }
    refit.local_scale.push_back(best);
    refit.error += least;
  }
  return refit;
}

void TileEncoder::FindColumnBytes(const Fit& fit, int column) {
  for (int64_t group = 0; group < tile_.num_groups(); ++group) {
    const float scale = GroupScale(fit.local_scale[group][column], fit.super_scale[column]);
    FindBytes(Rows(group, fit.map[column]), column, scale, bytes_[group][column].data());
  }
}

float TileEncoder::LeastSquaresScale(const Fit& fit, int column) const {
  // Of h (x - scale * local_scale * codeword)^2.
  double product = 0;
  double norm = 0;
  for (int64_t group = 0; group < tile_.num_groups(); ++group) {
    const SearchRows rows = Rows(group, fit.map[column]);
    double group_product = 0;
    double group_norm = 0;
    for (int i = 0; i < kGroupBytes; ++i) {
      const uint8_t byte = bytes_[group][column][i];
      const float* weighted = rows.weighted + i * kWeightsOfByte * kTileColumns + column;
      for (int slot = 0; slot < kWeightsOfByte; ++slot) {
        group_product += weighted[slot * kTileColumns] * rows.codebook->Value(byte, slot);
      }
      group_norm += rows.norms->Row(rows.first_byte_row + i)[byte];
    }
    const double local_scale = fit.local_scale[group][column];
    product += local_scale * group_product;
    norm += local_scale * local_scale * group_norm;
  }
  return norm > 0 ? static_cast<float>(product / norm) : fit.super_scale[column];
}

void TileEncoder::RefitColumn(int column, Fit* fit) {
  for (int i = 0; i < plan_.num_refits; ++i) {
    const float super_scale = RoundSuperScale(LeastSquaresScale(*fit, column), column);
    if (super_scale == fit->super_scale[column]) return;
    const ColumnFit refit = FitColumn(*fit, column, super_scale);
    if (refit.error >= fit->error[column]) return;
    fit->super_scale[column] = refit.super_scale;
    fit->error[column] = refit.error;
    for (int64_t group = 0; group < tile_.num_groups(); ++group) {
      fit->local_scale[group][column] = refit.local_scale[group];
    }
    FindColumnBytes(*fit, column);
  }
}

void TileEncoder::Store(const Fit& fit, int64_t first_column, formats::HostMatrix* out) const {
  for (int i = 0; i < tile_.num_columns(); ++i) {
    const int64_t column = first_column + i;
    const CodeMap& map = plan_.codebooks[fit.map[i]].map();
    out->channel_scale[column] = std::ldexp(fit.super_scale[i], tile_.exponent(i));
    out->code_scale[column] = map.code_scale;
    out->code_zp[column] = map.code_zp;
  }
  for (int64_t group = 0; group < tile_.num_groups(); ++group) {
    for (int i = 0; i < tile_.num_columns(); ++i) {
      out->local_scale[group * out->n + first_column + i] =
          static_cast<uint8_t>(fit.local_scale[group][i]);
    }
    for (int byte = 0; byte < kGroupBytes; ++byte) {
      uint8_t* codes = &out->codes_u8[(group * kGroupBytes + byte) * out->n + first_column];
      for (int i = 0; i < tile_.num_columns(); ++i) codes[i] = bytes_[group][i][byte];
    }
  }
}

}  // namespace wintserve::quantizer
