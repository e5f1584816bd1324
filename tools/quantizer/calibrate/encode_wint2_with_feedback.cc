#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/calibrate/column_tile.h"
#include "tools/quantizer/calibrate/encoder_checks.h"
#include "tools/quantizer/calibrate/error_feedback.h"
#include "tools/quantizer/calibrate/wint2_group.h"

namespace wintserve::quantizer {
namespace {

using namespace calibrate;  // NOLINT(google-build-using-namespace): the inner parts of this room
using formats::HostMatrix;
using formats::WeightFormat;

// A column's largest first guess of a local scale: room for groups that feedback makes larger.
constexpr float kFirstLargestScale = 15 / 1.1f;

// Bytes and local scales of a strip, in encoding order.
struct StripCodes {
  explicit StripCodes(int64_t k)
      : bytes(k / kWeightsOfByte * kStripColumns), local_scale(k / kGroupRows * kStripColumns) {}
  std::vector<int32_t> bytes;        // [k / 4, 16]
  std::vector<int32_t> local_scale;  // [k / 64, 16]
};

// What a thread needs. The tables are of one group at a time, one for each map.
struct Workspace {
  Workspace(int64_t k, size_t num_maps) : tile(k), tables(num_maps) {
    for (int strip = 0; strip < kTileStrips; ++strip) codes.emplace_back(k);
  }
  ColumnTile tile;
  std::vector<BlockTables> tables;
  std::vector<StripCodes> codes;  // [kTileStrips]
  ColumnScales scales = {};
  std::array<size_t, kTileStrips> map = {};
  GroupFactor factor;
  GroupHessian hessian;
  float group[kGroupRows * kTileColumns];
};

class Wint2FeedbackEncoder {
 public:
  Wint2FeedbackEncoder(FloatMatrix target, const FeedbackFactor& factor,
                       const FeedbackOptions& options, kernels::cpu::ThreadPool& pool)
      : target_(target),
        factor_(factor),
        options_(options),
        pool_(pool),
        num_groups_(target.k / kGroupRows),
        workspaces_(pool.num_threads()),
        column_map_(target.n),
        column_error_(target.n) {
    result_.matrix = MakeHostMatrix(WeightFormat::kWint2, target.k, target.n);
    for (const CodeMap& map : options.maps) codebooks_.emplace_back(map);
    result_.matrix.k_order = factor.options().k_order;
  }

  absl::StatusOr<FeedbackResult> Encode() {
    if (factor_.is_identity()) {
      RETURN_IF_ERROR(RoundToNearest());
    } else {
      RunFeedback();
    }
    RunSweeps();
    return std::move(result_);
  }

 private:
  Workspace& WorkspaceOf(int thread) {
    auto& workspace = workspaces_[thread];
    if (workspace == nullptr) {
      workspace = std::make_unique<Workspace>(target_.k, codebooks_.size());
    }
    return *workspace;
  }

  Wint2Strip StripOf(Workspace& workspace, int strip, int64_t group) const {
    const int column = strip * kStripColumns;
    StripCodes& codes = workspace.codes[strip];
    return {.codebook = &codebooks_[workspace.map[strip]],
            .tables = &workspace.tables[workspace.map[strip]],
            .weights = workspace.tile.weights.data() + group * kGroupRows * kTileColumns + column,
            .super_scale = workspace.scales.data() + column,
            .local_scale_radius = options_.local_scale_radius,
            .bytes = codes.bytes.data() + group * kGroupBlocks * kStripColumns,
            .local_scale = codes.local_scale.data() + group * kStripColumns};
  }

  // Tables of every map that a strip of the tile has.
  void FillTables(Workspace& workspace, const float* basis) const {
    for (size_t map = 0; map < codebooks_.size(); ++map) {
      const auto used = std::find(workspace.map.begin(), workspace.map.end(), map);
      if (used != workspace.map.end()) workspace.tables[map].Fill(codebooks_[map], basis);
    }
  }

  // The super scale with which the group with the largest weights gets nearly the largest local
  // scale.
  void SetFirstScales(Workspace& workspace) const {
    std::array<float, kTileColumns> largest = {};
    for (int64_t group = 0; group < num_groups_; ++group) {
      std::array<float, kTileColumns> power = {};
      const float* row = workspace.tile.weights.data() + group * kGroupRows * kTileColumns;
      for (int i = 0; i < kGroupRows; ++i, row += kTileColumns) {
        for (int column = 0; column < kTileColumns; ++column) {
          power[column] += row[column] * row[column] / kGroupRows;
        }
      }
      for (int column = 0; column < kTileColumns; ++column) {
        largest[column] = std::max(largest[column], power[column]);
      }
    }
    for (int column = 0; column < kTileColumns; ++column) {
      const CodeMap& map = codebooks_[workspace.map[column / kStripColumns]].map();
      const float scale = std::sqrt(largest[column]) * map.scale_per_sigma / kFirstLargestScale;
      const float unit = workspace.tile.unit[column];
      workspace.scales[column] =
          formats::RoundToBfloat16(std::clamp(scale, SmallestScale(unit), LargestScale(unit)));
    }
  }

  // Feedback over a tile whose weights, maps and scales are set: its codes, and each column's
  // error.
  ColumnSums EncodeTile(Workspace& workspace) const {
    ColumnSums cost = {};
    float* errors = workspace.tile.scratch.data();
    for (int64_t group = 0; group < num_groups_; ++group) {
      const int64_t first = group * kGroupRows;
      std::fill(std::begin(workspace.group), std::end(workspace.group), 0.0f);
      AddProduct(factor_.factor() + first * target_.k, target_.k, kGroupRows, first, errors,
                 workspace.group);
      workspace.factor.Fill(factor_, group);
      FillTables(workspace, &workspace.factor.basis[0][0][0]);
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        FeedbackGroup(workspace.factor, StripOf(workspace, strip, group), workspace.group + column,
                      errors + first * kTileColumns + column, cost.data() + column);
      }
    }
    return cost;
  }

  // Where no row makes up for another one.
  absl::Status RoundToNearest() {
    ASSIGN_OR_RETURN(result_.matrix,
                     EncodeWint2(target_, {},
                                 {.maps = options_.maps,
                                  .k_order = factor_.options().k_order,
                                  .local_scale_radius = options_.local_scale_radius},
                                 pool_));
    for (int64_t column = 0; column < target_.n; ++column) {
      const auto is_map = [&](const Codebook& codebook) {
        return codebook.map().code_scale == result_.matrix.code_scale[column] &&
               codebook.map().code_zp == result_.matrix.code_zp[column];
      };
      column_map_[column] =
          std::find_if(codebooks_.begin(), codebooks_.end(), is_map) - codebooks_.begin();
    }
    return absl::OkStatus();
  }

  // Every map with the columns of an item, which are as few as fill a tile together.
  void RunFeedback() {
    const auto num_maps = static_cast<int64_t>(codebooks_.size());
    const int64_t item_columns = (kTileStrips + num_maps - 1) / num_maps * int64_t{kStripColumns};
    const int64_t num_items = (target_.n + item_columns - 1) / item_columns;
    pool_.Run(num_items, target_.k * target_.k * target_.n, [&](int64_t item, int thread) {
      Workspace& workspace = WorkspaceOf(thread);
      std::fill_n(column_error_.begin() + item * item_columns,
                  std::min(item_columns, target_.n - item * item_columns),
                  std::numeric_limits<double>::infinity());
      const int64_t num_strips = item_columns / kStripColumns * num_maps;
      for (int64_t begin = 0; begin < num_strips; begin += kTileStrips) {
        RunFeedbackTile(item * item_columns, begin,
                        std::min<int64_t>(begin + kTileStrips, num_strips), workspace);
      }
    });
  }

  // Strips [begin, end) of an item: strip i has map i % num_maps.
  void RunFeedbackTile(int64_t first_column, int64_t begin, int64_t end, Workspace& workspace) {
    const auto num_maps = static_cast<int64_t>(codebooks_.size());
    std::vector<int64_t> columns(kTileColumns, -1);
    for (int64_t i = begin; i < end; ++i) {
      workspace.map[i - begin] = static_cast<size_t>(i % num_maps);
      for (int column = 0; column < kStripColumns; ++column) {
        const int64_t wanted = first_column + i / num_maps * kStripColumns + column;
        if (wanted < target_.n) columns[(i - begin) * kStripColumns + column] = wanted;
      }
    }
    LoadWeights(target_, factor_, columns, workspace.tile);
    SetFirstScales(workspace);
    const ColumnSums cost = EncodeTile(workspace);
    for (int i = 0; i < kTileColumns; ++i) {
      const int64_t column = columns[i];
      if (column < 0 || cost[i] >= column_error_[column]) continue;
      column_error_[column] = cost[i];
      StoreColumn(workspace, i);
    }
  }

  void StoreColumn(const Workspace& workspace, int i) {
    HostMatrix& matrix = result_.matrix;
    const int64_t n = matrix.n;
    const int64_t column = workspace.tile.columns[i];
    const StripCodes& codes = workspace.codes[i / kStripColumns];
    const int lane = i % kStripColumns;
    for (int64_t block = 0; block < matrix.k / kWeightsOfByte; ++block) {
      const int64_t row = factor_.stored_row()[block * kWeightsOfByte] / kWeightsOfByte;
      matrix.codes_u8[row * n + column] =
          static_cast<uint8_t>(codes.bytes[block * kStripColumns + lane]);
    }
    for (int64_t group = 0; group < num_groups_; ++group) {
      const int64_t row = factor_.stored_row()[group * kGroupRows] / kGroupRows;
      matrix.local_scale[row * n + column] =
          static_cast<uint8_t>(codes.local_scale[group * kStripColumns + lane]);
    }
    const size_t map = workspace.map[i / kStripColumns];
    column_map_[column] = map;
    matrix.channel_scale[column] = workspace.scales[i] * workspace.tile.unit[i];
    matrix.code_scale[column] = codebooks_[map].map().code_scale;
    matrix.code_zp[column] = codebooks_[map].map().code_zp;
  }

  void LoadColumn(Workspace& workspace, int i) const {
    const HostMatrix& matrix = result_.matrix;
    const int64_t column = workspace.tile.columns[i];
    StripCodes& codes = workspace.codes[i / kStripColumns];
    const int lane = i % kStripColumns;
    for (int64_t block = 0; block < matrix.k / kWeightsOfByte; ++block) {
      const int64_t row = factor_.stored_row()[block * kWeightsOfByte] / kWeightsOfByte;
      codes.bytes[block * kStripColumns + lane] =
          column < 0 ? 0 : matrix.codes_u8[row * matrix.n + column];
    }
    for (int64_t group = 0; group < num_groups_; ++group) {
      const int64_t row = factor_.stored_row()[group * kGroupRows] / kGroupRows;
      codes.local_scale[group * kStripColumns + lane] =
          column < 0 ? 0 : matrix.local_scale[row * matrix.n + column];
    }
    workspace.scales[i] = column < 0 ? 1.0f : matrix.channel_scale[column] / workspace.tile.unit[i];
  }

  void Decode(Workspace& workspace, const ColumnScales& scales, float* decoded) const {
    for (int64_t group = 0; group < num_groups_; ++group) {
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        Wint2Strip view = StripOf(workspace, strip, group);
        view.super_scale = scales.data() + column;
        DecodeGroup(view, decoded + group * kGroupRows * kTileColumns + column);
      }
    }
  }

  // Columns in tiles whose strips have one map each.
  struct SweepTile {
    std::vector<int64_t> columns;  // [kTileColumns], -1: padding
    std::array<size_t, kTileStrips> map = {};
  };

  std::vector<SweepTile> SweepTiles() const {
    std::vector<SweepTile> tiles;
    int num_strips = kTileStrips;  // of the last tile
    for (size_t map = 0; map < codebooks_.size(); ++map) {
      int lane = kStripColumns;  // columns of the last strip
      for (int64_t column = 0; column < target_.n; ++column) {
        if (column_map_[column] != map) continue;
        if (lane == kStripColumns) {
          if (num_strips == kTileStrips) {
            tiles.push_back({.columns = std::vector<int64_t>(kTileColumns, -1)});
            num_strips = 0;
          }
          tiles.back().map[num_strips++] = map;
          lane = 0;
        }
        tiles.back().columns[(num_strips - 1) * kStripColumns + lane++] = column;
      }
    }
    return tiles;
  }

  void RunSweeps() {
    const std::vector<SweepTile> tiles = SweepTiles();
    const int num_steps = options_.num_sweeps + 1;
    std::vector<std::vector<double>> errors(tiles.size(), std::vector<double>(num_steps));
    std::vector<double> zero_errors(tiles.size());
    pool_.Run(static_cast<int64_t>(tiles.size()), target_.k * target_.k * target_.n,
              [&](int64_t item, int thread) {
                SweepColumns(tiles[item], WorkspaceOf(thread), errors[item], zero_errors[item]);
              });
    for (int step = 0; step < num_steps; ++step) {
      double sum = 0;
      for (const auto& tile_errors : errors) sum += tile_errors[step];
      result_.errors.push_back(sum * factor_.unit());
    }
    result_.zero_error =
        std::accumulate(zero_errors.begin(), zero_errors.end(), 0.0) * factor_.unit();
  }

  void SweepColumns(const SweepTile& columns, Workspace& workspace, std::vector<double>& errors,
                    double& zero_error) {
    ColumnTile& tile = workspace.tile;
    workspace.map = columns.map;
    LoadWeights(target_, factor_, columns.columns, tile);
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
      workspace.hessian.Fill(factor_, group);
      FillTables(workspace, &workspace.hessian.basis[0][0][0]);
      bool any_changed = false;
      const int64_t first = group * kGroupRows * kTileColumns;
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        any_changed |= SweepGroup(workspace.hessian, StripOf(workspace, strip, group),
                                  tile.gradient.data() + first + column,
                                  tile.decoded.data() + first + column, workspace.group + column);
      }
      if (any_changed) UpdateGradient(factor_, group, workspace.group, tile);
    }
  }

  const FloatMatrix target_;
  const FeedbackFactor& factor_;
  const FeedbackOptions& options_;
  kernels::cpu::ThreadPool& pool_;
  const int64_t num_groups_;
  std::vector<Codebook> codebooks_;
  std::vector<std::unique_ptr<Workspace>> workspaces_;  // one a thread
  std::vector<size_t> column_map_;                      // [n]
  std::vector<double> column_error_;                    // [n], after the feedback
  FeedbackResult result_;
};

absl::Status CheckWint2Options(const FeedbackOptions& options) {
  if (options.maps.empty()) {
    return absl::InvalidArgumentError("error feedback: no code map is given, one is needed");
  }
  for (const CodeMap& map : options.maps) RETURN_IF_ERROR(CheckCodeMap(map));
  if (options.local_scale_radius < 0 || options.local_scale_radius > 7) {
    return absl::InvalidArgumentError(fmt::format(
        "error feedback: local_scale_radius is {}, must be 0 to 7", options.local_scale_radius));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<FeedbackResult> EncodeWint2WithFeedback(FloatMatrix target,
                                                       const FeedbackFactor& factor,
                                                       const FeedbackOptions& options,
                                                       kernels::cpu::ThreadPool& pool) {
  CHECK(factor.options().format == WeightFormat::kWint2);
  RETURN_IF_ERROR(CheckTarget(target, /*row_multiple=*/2 * kGroupRows, /*column_multiple=*/1,
                              factor, options, pool));
  RETURN_IF_ERROR(CheckWint2Options(options));
  return Wint2FeedbackEncoder(target, factor, options, pool).Encode();
}

absl::StatusOr<FeedbackResult> EncodeWint2WithFeedback(FloatMatrix target, const Moments& moments,
                                                       const FeedbackOptions& options,
                                                       kernels::cpu::ThreadPool& pool) {
  ASSIGN_OR_RETURN(const FeedbackFactor factor,
                   FeedbackFactor::Make(moments,
                                        {.damping = options.damping,
                                         .format = WeightFormat::kWint2,
                                         .k_order = options.k_order,
                                         .important_first = options.important_first},
                                        pool));
  return EncodeWint2WithFeedback(target, factor, options, pool);
}

}  // namespace wintserve::quantizer
