// What the encoders with error feedback do alike, whatever a format's codes are: which columns go
// through a tile together, which variant of a column is kept, when sweeps end, the sums of errors.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/cpu/thread_pool.h"
#include "tools/quantizer/calibrate/column_tile.h"
#include "tools/quantizer/calibrate/encoder_checks.h"
#include "tools/quantizer/calibrate/error_feedback.h"

namespace wintserve::quantizer::calibrate {

// What a thread needs for a tile of any format.
struct TileWorkspace {
  explicit TileWorkspace(int64_t k) : tile(k) {}

  ColumnTile tile;
  ColumnScales scales = {};
  // Which of its format's variants a strip has: a code map of WINT2, a first scale of the others.
  std::array<size_t, kTileStrips> variant = {};
  float group[kGroupRows * kTileColumns];
  float group_gradient[kGroupRows * kTileColumns];
};

// Columns that are swept together.
struct SweepTile {
  std::vector<int64_t> columns;  // at most num_strips * kStripColumns; -1: padding
  int num_strips = kTileStrips;
  std::array<size_t, kTileStrips> variant = {};
};

// Strips of a tile of n columns that are swept by so many threads: as many as read the hessian
// together while each thread has a tile. What becomes of a strip does not depend on it.
constexpr int SweepStrips(int64_t n, int num_threads) {
  return static_cast<int>(
      std::clamp<int64_t>(n / (kStripColumns * int64_t{num_threads}), 1, kTileStrips));
}

// Feedback and sweeps over all columns of a matrix, by the threads of a pool.
//
// Format holds the matrix that is made. It has
//   Workspace                     derived from TileWorkspace; one a thread
//   MakeWorkspace()               std::unique_ptr<Workspace>
//   SetFirstScales(workspace)     from the tile's weights and variants
//   EncodeTile(workspace)         feedback: the tile's codes; returns each column's error
//   LoadColumn(workspace, i)      codes and scale of the tile's column i, from the matrix; zeros
//                                 for padding
//   StoreColumn(workspace, i)     the same, to the matrix; never of padding
//   Decode(workspace, scales, decoded)  as DecodeFunction
//   Sweep(number, workspace)      descent over the codes of the tile's open strips, the number-th
//                                 from 0 on
// all of which threads call at once, for different columns.
template <typename Format>
class ColumnEncoder {
 public:
  // All must outlive this.
  ColumnEncoder(FloatMatrix target, const FeedbackFactor& factor, const FeedbackOptions& options,
                kernels::cpu::ThreadPool& pool, Format& format)
      : target_(target),
        factor_(factor),
        options_(options),
        pool_(pool),
        format_(format),
        workspaces_(pool.num_threads()) {}

  // Stores every column with that of the variants 0 … num_variants - 1 that has the least error.
  void RunFeedback(size_t num_variants) {
    const auto variants = static_cast<int64_t>(num_variants);
    // Every variant with the columns of an item, which are as few as fill a tile together.
    const int64_t item_strips = (kTileStrips + variants - 1) / variants;
    const int64_t item_columns = item_strips * kStripColumns;
    const int64_t num_items = (target_.n + item_columns - 1) / item_columns;
    std::vector<double> column_error(target_.n, std::numeric_limits<double>::infinity());
    pool_.Run(num_items, target_.k * target_.k * target_.n, [&](int64_t item, int thread) {
      for (int64_t begin = 0; begin < item_strips * variants; begin += kTileStrips) {
        const SweepTile tile = FeedbackTile(item * item_columns, item_strips, begin, variants);
        RunFeedbackTile(tile, WorkspaceOf(thread), column_error);
      }
    });
  }

  // Sweeps tiles that together have every column once. Sets result's errors and zero_error.
  void RunSweeps(const std::vector<SweepTile>& tiles, FeedbackResult& result) {
    const int num_steps = options_.num_sweeps + 1;
    std::vector<TileErrors> errors(tiles.size());
    for (TileErrors& of_tile : errors) of_tile.strips.resize(num_steps);
    pool_.Run(static_cast<int64_t>(tiles.size()), target_.k * target_.k * target_.n,
              [&](int64_t item, int thread) {
                SweepColumns(tiles[item], WorkspaceOf(thread), errors[item]);
              });
    // Strip by strip, in the same order whichever of them share a tile.
    const auto total = [&](const auto& strips_of) {
      double sum = 0;
      for (const TileErrors& of_tile : errors) {
        for (const double error : strips_of(of_tile)) sum += error;
      }
      return sum * factor_.unit();
    };
    for (int step = 0; step < num_steps; ++step) {
      result.errors.push_back(
          total([step](const TileErrors& of_tile) { return of_tile.strips[step]; }));
    }
    result.zero_error = total([](const TileErrors& of_tile) { return of_tile.zero; });
  }

 private:
  using Workspace = typename Format::Workspace;
  using StripSums = std::array<double, kTileStrips>;

  struct TileErrors {
    std::vector<StripSums> strips;  // [num_sweeps + 1]: before and after each sweep
    StripSums zero = {};            // if everything decoded to zero
  };

  static StripSums SumStrips(const ColumnSums& columns) {
    StripSums sums = {};
    for (int i = 0; i < kTileColumns; ++i) sums[i / kStripColumns] += columns[i];
    return sums;
  }

  Workspace& WorkspaceOf(int thread) {
    auto& workspace = workspaces_[thread];
    if (workspace == nullptr) workspace = format_.MakeWorkspace();
    return *workspace;
  }

  // Four strips from `begin` on of an item, whose strip i has variant i % variants of the columns
  // of i / variants. Padding after its last strip.
  SweepTile FeedbackTile(int64_t first_column, int64_t item_strips, int64_t begin,
                         int64_t variants) const {
    SweepTile tile = {.columns = std::vector<int64_t>(kTileColumns, -1)};
    for (int strip = 0; strip < kTileStrips; ++strip) {
      const int64_t i = begin + strip;
      tile.variant[strip] = static_cast<size_t>(i % variants);
      if (i / variants >= item_strips) continue;
      for (int lane = 0; lane < kStripColumns; ++lane) {
        const int64_t column = first_column + i / variants * kStripColumns + lane;
        if (column < target_.n) tile.columns[strip * kStripColumns + lane] = column;
      }
    }
    return tile;
  }

  void RunFeedbackTile(const SweepTile& tile, Workspace& workspace,
                       std::vector<double>& column_error) {
    workspace.variant = tile.variant;
    workspace.tile.is_open.fill(true);
    LoadWeights(target_, factor_, tile.columns, workspace.tile);
    format_.SetFirstScales(workspace);
    const ColumnSums error = format_.EncodeTile(workspace);
    for (int i = 0; i < kTileColumns; ++i) {
      const int64_t column = tile.columns[i];
      if (column < 0 || error[i] >= column_error[column]) continue;
      column_error[column] = error[i];
      format_.StoreColumn(workspace, i);
    }
  }

  void SweepColumns(const SweepTile& columns, Workspace& workspace, TileErrors& errors) {
    ColumnTile& tile = workspace.tile;
    workspace.variant = columns.variant;
    LoadWeights(target_, factor_, columns.columns, tile);
    for (int i = 0; i < kTileColumns; ++i) format_.LoadColumn(workspace, i);
    const auto decode = [&](const ColumnScales& scales, float* decoded) {
      format_.Decode(workspace, scales, decoded);
    };
    decode(workspace.scales, tile.decoded.data());
    const ColumnSums zero_errors = ZeroErrors(factor_, tile);
    errors.zero = SumStrips(zero_errors);
    StartGradient(factor_, tile);
    errors.strips[0] = SumStrips(Errors(tile));
    for (int sweep = 1; sweep <= options_.num_sweeps; ++sweep) {
      errors.strips[sweep] = errors.strips[sweep - 1];
      if (!OpenStrips(columns.num_strips, sweep, errors, tile)) continue;
      if (options_.refit_scale) {
        RefitScales(factor_, zero_errors, decode, workspace.scales, tile);
      }
      std::fill(std::begin(workspace.group), std::end(workspace.group), 0.0f);  // closed strips'
      format_.Sweep(sweep - 1, workspace);
      const StripSums after = SumStrips(Errors(tile));
      for (int strip = 0; strip < kTileStrips; ++strip) {
        if (tile.is_open[strip]) errors.strips[sweep][strip] = after[strip];
      }
    }
    for (int i = 0; i < kTileColumns; ++i) {
      if (tile.columns[i] >= 0) format_.StoreColumn(workspace, i);
    }
  }

  // Opens those of the tile's strips that this sweep goes over. Returns whether there are any.
  bool OpenStrips(int num_strips, int sweep, const TileErrors& errors, ColumnTile& tile) const {
    for (int strip = 0; strip < kTileStrips; ++strip) {
      tile.is_open[strip] =
          strip < num_strips &&
          (sweep == 1 || errors.strips[sweep - 1][strip] <
                             errors.strips[sweep - 2][strip] * (1 - options_.least_gain));
    }
    return std::find(tile.is_open.begin(), tile.is_open.end(), true) != tile.is_open.end();
  }

  const FloatMatrix target_;
  const FeedbackFactor& factor_;
  const FeedbackOptions& options_;
  kernels::cpu::ThreadPool& pool_;
  Format& format_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;  // one a thread
};

}  // namespace wintserve::quantizer::calibrate
