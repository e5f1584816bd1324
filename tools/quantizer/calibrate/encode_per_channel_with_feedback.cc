#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/calibrate/channel_group.h"
#include "tools/quantizer/calibrate/encoder_checks.h"
#include "tools/quantizer/calibrate/error_feedback.h"

namespace wintserve::quantizer {
namespace {

using namespace calibrate;  // NOLINT(google-build-using-namespace): the inner parts of this room
using formats::WeightFormat;

constexpr int kNumWint4Scales = 2 * kTileStrips;  // tried for a column

struct Workspace {
  explicit Workspace(int64_t k) : tile(k), codes(kTileStrips) {
    for (auto& strip : codes) strip.resize(k * kStripColumns);
  }
  ColumnTile tile;
  std::vector<std::vector<int32_t>> codes;  // [kTileStrips][k, 16], in encoding order
  ColumnScales scales = {};
  GroupBlock block;
  float group[kGroupRows * kTileColumns];
};

class ChannelFeedbackEncoder {
 public:
  ChannelFeedbackEncoder(WeightFormat format, FloatMatrix target, const FeedbackFactor& factor,
                         const FeedbackOptions& options, kernels::cpu::ThreadPool& pool)
      : target_(target),
        factor_(factor),
        options_(options),
        pool_(pool),
        num_groups_(target.k / kGroupRows),
        largest_code_(format == WeightFormat::kWint4 ? 7.0f : 127.0f),
        workspaces_(pool.num_threads()),
        column_error_(target.n) {
    result_.matrix = MakeHostMatrix(format, target.k, target.n);
    scale_factors_ = {1.0f};
    if (format == WeightFormat::kWint8) return;  // fine enough not to cut off what is largest
    const auto smallest = static_cast<float>(options.smallest_scale_factor);
    for (int i = 1; i < kNumWint4Scales; ++i) {
      scale_factors_.push_back(1 - (1 - smallest) * static_cast<float>(i) / (kNumWint4Scales - 1));
    }
  }

  FeedbackResult Encode() {
    RunFeedback();
    RunSweeps();
    return std::move(result_);
  }

 private:
  Workspace& WorkspaceOf(int thread) {
    auto& workspace = workspaces_[thread];
    if (workspace == nullptr) workspace = std::make_unique<Workspace>(target_.k);
    return *workspace;
  }

  ChannelStrip StripOf(Workspace& workspace, int strip, int64_t group) const {
    return {.scale = workspace.scales.data() + strip * kStripColumns,
            .largest_code = largest_code_,
            .codes = workspace.codes[strip].data() + group * kGroupRows * kStripColumns};
  }

  ColumnSums EncodeTile(Workspace& workspace) const {
    ColumnSums cost = {};
    float* errors = workspace.tile.scratch.data();
    for (int64_t group = 0; group < num_groups_; ++group) {
      const int64_t first = group * kGroupRows;
      std::fill(std::begin(workspace.group), std::end(workspace.group), 0.0f);
      AddProduct(factor_.factor() + first * target_.k, target_.k, kGroupRows, first, errors,
                 workspace.group);
      workspace.block.Fill(factor_.factor(), target_.k, group);
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int64_t i = first * kTileColumns + strip * kStripColumns;
        FeedbackChannelGroup(workspace.block, StripOf(workspace, strip, group),
                             workspace.tile.weights.data() + i,
                             workspace.group + strip * kStripColumns, errors + i,
                             cost.data() + strip * kStripColumns);
      }
    }
    return cost;
  }

  // Every scale factor with the columns of an item, which are as few as fill a tile together.
  void RunFeedback() {
    const auto num_factors = static_cast<int64_t>(scale_factors_.size());
    const int64_t item_columns =
        (kTileStrips + num_factors - 1) / num_factors * int64_t{kStripColumns};
    const int64_t num_items = (target_.n + item_columns - 1) / item_columns;
    pool_.Run(num_items, target_.k * target_.k * target_.n, [&](int64_t item, int thread) {
      const int64_t first_column = item * item_columns;
      std::fill_n(column_error_.begin() + first_column,
                  std::min(item_columns, target_.n - first_column),
                  std::numeric_limits<double>::infinity());
      const int64_t num_strips = item_columns / kStripColumns * num_factors;
      for (int64_t begin = 0; begin < num_strips; begin += kTileStrips) {
        RunFeedbackTile(first_column, begin, WorkspaceOf(thread));
      }
    });
  }

  // Strips from `begin` on of an item: strip i has scale factor i % num_factors.
  void RunFeedbackTile(int64_t first_column, int64_t begin, Workspace& workspace) {
    const auto num_factors = static_cast<int64_t>(scale_factors_.size());
    std::vector<int64_t> columns(kTileColumns);
    std::array<float, kTileColumns> factors;
    for (int i = 0; i < kTileColumns; ++i) {
      const int64_t strip = begin + i / kStripColumns;
      const int64_t column = first_column + strip / num_factors * kStripColumns + i % kStripColumns;
      columns[i] = column < target_.n ? column : -1;
      factors[i] = scale_factors_[strip % num_factors];
    }
    LoadWeights(target_, factor_, columns, workspace.tile);
    SetFirstScales(factors, workspace);
    const ColumnSums cost = EncodeTile(workspace);
    for (int i = 0; i < kTileColumns; ++i) {
      const int64_t column = columns[i];
      if (column < 0 || cost[i] >= column_error_[column]) continue;
      column_error_[column] = cost[i];
      StoreColumn(workspace, i);
    }
  }

  void SetFirstScales(const std::array<float, kTileColumns>& factors, Workspace& workspace) const {
    std::array<float, kTileColumns> largest = {};
    const float* row = workspace.tile.weights.data();
    for (int64_t i = 0; i < target_.k; ++i, row += kTileColumns) {
      for (int column = 0; column < kTileColumns; ++column) {
        largest[column] = std::max(largest[column], std::abs(row[column]));
      }
    }
    for (int column = 0; column < kTileColumns; ++column) {
      const float scale = largest[column] / largest_code_ * factors[column];
      const float unit = workspace.tile.unit[column];
      workspace.scales[column] =
          scale < SmallestScale(unit)
              ? 0
              : formats::RoundToBfloat16(std::min(scale, LargestScale(unit)));
    }
  }

  void StoreColumn(const Workspace& workspace, int i) {
    const int64_t column = workspace.tile.columns[i];
    const std::vector<int32_t>& codes = workspace.codes[i / kStripColumns];
    for (int64_t row = 0; row < target_.k; ++row) {
      result_.matrix.codes_i8[factor_.true_row()[row] * target_.n + column] =
          static_cast<int8_t>(codes[row * kStripColumns + i % kStripColumns]);
    }
    result_.matrix.channel_scale[column] = workspace.scales[i] * workspace.tile.unit[i];
  }

  void LoadColumn(Workspace& workspace, int i) const {
    const int64_t column = workspace.tile.columns[i];
    std::vector<int32_t>& codes = workspace.codes[i / kStripColumns];
    for (int64_t row = 0; row < target_.k; ++row) {
      codes[row * kStripColumns + i % kStripColumns] =
          column < 0 ? 0 : result_.matrix.codes_i8[factor_.true_row()[row] * target_.n + column];
    }
    workspace.scales[i] =
        column < 0 ? 0 : result_.matrix.channel_scale[column] / workspace.tile.unit[i];
  }

  void Decode(Workspace& workspace, const ColumnScales& scales, float* decoded) const {
    for (int64_t group = 0; group < num_groups_; ++group) {
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        ChannelStrip view = StripOf(workspace, strip, group);
        view.scale = scales.data() + column;
        DecodeChannelGroup(view, decoded + group * kGroupRows * kTileColumns + column);
      }
    }
  }

  void RunSweeps() {
    const int64_t num_tiles = (target_.n + kTileColumns - 1) / kTileColumns;
    const int num_steps = options_.num_sweeps + 1;
    std::vector<std::vector<double>> errors(num_tiles, std::vector<double>(num_steps));
    std::vector<double> zero_errors(num_tiles);
    pool_.Run(num_tiles, target_.k * target_.k * target_.n, [&](int64_t item, int thread) {
      SweepColumns(item * kTileColumns, WorkspaceOf(thread), errors[item], zero_errors[item]);
    });
    for (int step = 0; step < num_steps; ++step) {
      double sum = 0;
      for (const auto& tile_errors : errors) sum += tile_errors[step];
      result_.errors.push_back(sum * factor_.unit());
    }
    result_.zero_error =
        std::accumulate(zero_errors.begin(), zero_errors.end(), 0.0) * factor_.unit();
  }

  void SweepColumns(int64_t first_column, Workspace& workspace, std::vector<double>& errors,
                    double& zero_error) {
    ColumnTile& tile = workspace.tile;
    std::vector<int64_t> columns(std::min<int64_t>(kTileColumns, target_.n - first_column));
    std::iota(columns.begin(), columns.end(), first_column);
    LoadWeights(target_, factor_, columns, tile);
    for (int i = 0; i < kTileColumns; ++i) LoadColumn(workspace, i);
    const auto decode = [&](const ColumnScales& scales, float* decoded) {
      Decode(workspace, scales, decoded);
    };
    decode(workspace.scales, tile.decoded.data());
    const ColumnSums zero_errors = ZeroErrors(factor_, tile);
    zero_error = Total(zero_errors);
    StartGradient(factor_, tile);
    errors[0] = Total(Errors(tile));
    for (int sweep = 1; sweep <= options_.num_sweeps; ++sweep) {
      errors[sweep] = errors[sweep - 1];
      if (sweep > 1 && !(errors[sweep - 1] < errors[sweep - 2] * (1 - options_.least_gain)))
        continue;
      if (options_.refit_scale) {
        RefitScales(factor_, zero_errors, decode, workspace.scales, tile);
      }
      Sweep(workspace);
      errors[sweep] = Total(Errors(tile));
    }
    for (int i = 0; i < kTileColumns; ++i) {
      if (tile.columns[i] >= 0) StoreColumn(workspace, i);
    }
  }

  void Sweep(Workspace& workspace) const {
    ColumnTile& tile = workspace.tile;
    for (int64_t group = 0; group < num_groups_; ++group) {
      workspace.block.Fill(factor_.hessian(), target_.k, group);
      bool any_changed = false;
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        const int64_t i = group * kGroupRows * kTileColumns + column;
        any_changed |= SweepChannelGroup(workspace.block, StripOf(workspace, strip, group),
                                         tile.gradient.data() + i, tile.decoded.data() + i,
                                         workspace.group + column);
      }
      if (any_changed) UpdateGradient(factor_, group, workspace.group, tile);
    }
  }

  const FloatMatrix target_;
  const FeedbackFactor& factor_;
  const FeedbackOptions& options_;
  kernels::cpu::ThreadPool& pool_;
  const int64_t num_groups_;
  const float largest_code_;
  std::vector<float> scale_factors_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;  // one a thread
  std::vector<double> column_error_;                    // [n], after the feedback
  FeedbackResult result_;
};

}  // namespace

absl::StatusOr<FeedbackResult> EncodePerChannelWithFeedback(WeightFormat format, FloatMatrix target,
                                                            const FeedbackFactor& factor,
                                                            const FeedbackOptions& options,
                                                            kernels::cpu::ThreadPool& pool) {
  CHECK(format == WeightFormat::kWint4 || format == WeightFormat::kWint8);
  CHECK(factor.options().format == format);
  RETURN_IF_ERROR(CheckTarget(target, kGroupRows, format == WeightFormat::kWint4 ? 4 : 2, factor,
                              options, pool));
  if (!(options.smallest_scale_factor > 0 && options.smallest_scale_factor <= 1)) {
    return absl::InvalidArgumentError(
        fmt::format("error feedback: smallest_scale_factor is {}, must be above 0 and at most 1",
                    options.smallest_scale_factor));
  }
  return ChannelFeedbackEncoder(format, target, factor, options, pool).Encode();
}

absl::StatusOr<FeedbackResult> EncodePerChannelWithFeedback(WeightFormat format, FloatMatrix target,
                                                            const Moments& moments,
                                                            const FeedbackOptions& options,
                                                            kernels::cpu::ThreadPool& pool) {
  ASSIGN_OR_RETURN(const FeedbackFactor factor,
                   FeedbackFactor::Make(moments,
                                        {.damping = options.damping,
                                         .format = format,
                                         .important_first = options.important_first},
                                        pool));
  return EncodePerChannelWithFeedback(format, target, factor, options, pool);
}

}  // namespace wintserve::quantizer
