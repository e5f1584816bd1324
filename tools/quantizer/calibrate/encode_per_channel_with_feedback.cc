#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/calibrate/channel_group.h"
#include "tools/quantizer/calibrate/column_encoder.h"
#include "tools/quantizer/calibrate/encoder_checks.h"
#include "tools/quantizer/calibrate/error_feedback.h"

namespace wintserve::quantizer {
namespace {

using namespace calibrate;  // NOLINT(google-build-using-namespace): the inner parts of this room
using formats::WeightFormat;

constexpr int kNumWint4Scales = 2 * kTileStrips;  // tried for a column

struct ChannelWorkspace : TileWorkspace {
  explicit ChannelWorkspace(int64_t k) : TileWorkspace(k), codes(kTileStrips) {
    for (auto& strip : codes) strip.resize(k * kStripColumns);
  }
  std::vector<std::vector<int32_t>> codes;  // [kTileStrips][k, 16], in encoding order
  GroupBlock block;
};

// The Format of a ColumnEncoder whose variants are the scales that a column starts from.
class ChannelFeedbackEncoder {
 public:
  using Workspace = ChannelWorkspace;

  ChannelFeedbackEncoder(WeightFormat format, FloatMatrix target, const FeedbackFactor& factor,
                         const FeedbackOptions& options, kernels::cpu::ThreadPool& pool)
      : target_(target),
        factor_(factor),
        options_(options),
        pool_(pool),
        num_groups_(target.k / kGroupRows),
        largest_code_(format == WeightFormat::kWint4 ? 7.0f : 127.0f) {
    result_.matrix = MakeHostMatrix(format, target.k, target.n);
    scale_factors_ = {1.0f};
    if (format == WeightFormat::kWint8) return;  // fine enough not to cut off what is largest
    const auto smallest = static_cast<float>(options.smallest_scale_factor);
    for (int i = 1; i < kNumWint4Scales; ++i) {
      scale_factors_.push_back(1 - (1 - smallest) * static_cast<float>(i) / (kNumWint4Scales - 1));
    }
  }

  FeedbackResult Encode() {
    ColumnEncoder<ChannelFeedbackEncoder> columns(target_, factor_, options_, pool_, *this);
    columns.RunFeedback(scale_factors_.size());
    columns.RunSweeps(SweepTiles(), result_);
    return std::move(result_);
  }

 private:
  friend class ColumnEncoder<ChannelFeedbackEncoder>;

  std::unique_ptr<Workspace> MakeWorkspace() const {
    return std::make_unique<Workspace>(target_.k);
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

  void SetFirstScales(Workspace& workspace) const {
    std::array<float, kTileColumns> largest = {};
    const float* row = workspace.tile.weights.data();
    for (int64_t i = 0; i < target_.k; ++i, row += kTileColumns) {
      for (int column = 0; column < kTileColumns; ++column) {
        largest[column] = std::max(largest[column], std::abs(row[column]));
      }
    }
    for (int column = 0; column < kTileColumns; ++column) {
      const float factor = scale_factors_[workspace.variant[column / kStripColumns]];
      const float scale = largest[column] / largest_code_ * factor;
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

  std::vector<SweepTile> SweepTiles() const {
    std::vector<SweepTile> tiles;
    const int num_strips = SweepStrips(target_.n, pool_.num_threads());
    const int64_t tile_columns = num_strips * int64_t{kStripColumns};
    for (int64_t first = 0; first < target_.n; first += tile_columns) {
      SweepTile& tile = tiles.emplace_back();
      tile.num_strips = num_strips;
      tile.columns.resize(std::min(tile_columns, target_.n - first));
      std::iota(tile.columns.begin(), tile.columns.end(), first);
    }
    return tiles;
  }

  void Sweep(int /*number*/, Workspace& workspace) const {
    ColumnTile& tile = workspace.tile;
    LazyGradient gradient(factor_, tile);
    for (int64_t group = 0; group < num_groups_; ++group) {
      workspace.block.Fill(factor_.hessian(), factor_.hessian_stride(), group);
      std::array<int32_t, kGroupRows> rows;
      std::iota(rows.begin(), rows.end(), static_cast<int32_t>(group * kGroupRows));
      gradient.Get(rows, workspace.group_gradient);
      bool any_changed = false;
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        if (!tile.is_open[strip]) continue;
        any_changed |= SweepChannelGroup(
            workspace.block, StripOf(workspace, strip, group), workspace.group_gradient + column,
            tile.decoded.data() + group * kGroupRows * kTileColumns + column,
            workspace.group + column);
      }
      if (any_changed) gradient.Add(rows, workspace.group);
    }
    gradient.Flush();
  }

  const FloatMatrix target_;
  const FeedbackFactor& factor_;
  const FeedbackOptions& options_;
  kernels::cpu::ThreadPool& pool_;
  const int64_t num_groups_;
  const float largest_code_;
  std::vector<float> scale_factors_;
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
