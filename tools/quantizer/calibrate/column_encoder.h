// What the encoders with error feedback do alike, whatever a format's codes are: which columns go
// through a tile together, which variant of a column is kept, when sweeps end, the sums of errors.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
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
  std::vector<int64_t> columns;  // at most kTileColumns; -1: padding
  std::array<size_t, kTileStrips> variant = {};
};

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
//   Sweep(number, workspace)      descent over the tile's codes, the number-th from 0 on
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
    std::vector<std::vector<double>> errors(tiles.size(), std::vector<double>(num_steps));
    std::vector<double> zero_errors(tiles.size());
    pool_.Run(static_cast<int64_t>(tiles.size()), target_.k * target_.k * target_.n,
              [&](int64_t item, int thread) {
                zero_errors[item] = SweepColumns(tiles[item], WorkspaceOf(thread), errors[item]);
              });
    for (int step = 0; step < num_steps; ++step) {
      double sum = 0;
      for (const auto& tile_errors : errors) sum += tile_errors[step];
      result.errors.push_back(sum * factor_.unit());
    }
    double zero_error = 0;
    for (const double error : zero_errors) zero_error += error;
    result.zero_error = zero_error * factor_.unit();
  }

 private:
  using Workspace = typename Format::Workspace;

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

  // Sets errors [num_sweeps + 1] to the sums over the tile's columns before and after each sweep.
  // Returns the sum of their errors if everything decoded to zero.
  double SweepColumns(const SweepTile& columns, Workspace& workspace, std::vector<double>& errors) {
    ColumnTile& tile = workspace.tile;
    workspace.variant = columns.variant;
    LoadWeights(target_, factor_, columns.columns, tile);
    for (int i = 0; i < kTileColumns; ++i) format_.LoadColumn(workspace, i);
    const auto decode = [&](const ColumnScales& scales, float* decoded) {
      format_.Decode(workspace, scales, decoded);
    };
    decode(workspace.scales, tile.decoded.data());
    const ColumnSums zero_errors = ZeroErrors(factor_, tile);
    StartGradient(factor_, tile);
    errors[0] = Total(Errors(tile));
    for (int sweep = 1; sweep <= options_.num_sweeps; ++sweep) {
      errors[sweep] = errors[sweep - 1];
      if (sweep > 1 && !(errors[sweep - 1] < errors[sweep - 2] * (1 - options_.least_gain))) {
        continue;
      }
      if (options_.refit_scale) {
        RefitScales(factor_, zero_errors, decode, workspace.scales, tile);
      }
      format_.Sweep(sweep - 1, workspace);
      errors[sweep] = Total(Errors(tile));
    }
    for (int i = 0; i < kTileColumns; ++i) {
      if (tile.columns[i] >= 0) format_.StoreColumn(workspace, i);
    }
    return Total(zero_errors);
  }

  const FloatMatrix target_;
  const FeedbackFactor& factor_;
  const FeedbackOptions& options_;
  kernels::cpu::ThreadPool& pool_;
  Format& format_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;  // one a thread
};

}  // namespace wintserve::quantizer::calibrate
