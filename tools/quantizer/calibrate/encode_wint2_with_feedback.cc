#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <random>

#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/calibrate/column_encoder.h"
#include "tools/quantizer/calibrate/encoder_checks.h"
#include "tools/quantizer/calibrate/error_feedback.h"
#include "tools/quantizer/calibrate/wint2_group.h"
#include "tools/quantizer/calibrate/wint2_sweep.h"

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

// The tables are of one group or set at a time, one for each map.
struct Wint2Workspace : TileWorkspace {
  Wint2Workspace(int64_t k, size_t num_maps) : TileWorkspace(k), tables(num_maps) {
    for (int strip = 0; strip < kTileStrips; ++strip) codes.emplace_back(k);
  }
  std::vector<SetTables> tables;
  std::vector<StripCodes> codes;  // [kTileStrips]
  GroupFactor factor;
};

// The Format of a ColumnEncoder whose variants are the code maps.
class Wint2FeedbackEncoder {
 public:
  using Workspace = Wint2Workspace;

  Wint2FeedbackEncoder(FloatMatrix target, const FeedbackFactor& factor,
                       const FeedbackOptions& options, kernels::cpu::ThreadPool& pool)
      : target_(target),
        factor_(factor),
        options_(options),
        pool_(pool),
        num_groups_(target.k / kGroupRows),
        column_map_(target.n) {
    result_.matrix = MakeHostMatrix(WeightFormat::kWint2, target.k, target.n);
    for (const CodeMap& map : options.maps) codebooks_.emplace_back(map);
    result_.matrix.k_order = factor.options().k_order;
  }

  absl::StatusOr<FeedbackResult> Encode() {
    ColumnEncoder<Wint2FeedbackEncoder> columns(target_, factor_, options_, pool_, *this);
    if (factor_.is_identity()) {
      RETURN_IF_ERROR(RoundToNearest());
    } else {
      columns.RunFeedback(codebooks_.size());
    }
    MakeSets();
    columns.RunSweeps(SweepTiles(), result_);
    return std::move(result_);
  }

 private:
  friend class ColumnEncoder<Wint2FeedbackEncoder>;

  std::unique_ptr<Workspace> MakeWorkspace() const {
    return std::make_unique<Workspace>(target_.k, codebooks_.size());
  }

  Wint2Strip StripOf(Workspace& workspace, int strip, int64_t group) const {
    const int column = strip * kStripColumns;
    StripCodes& codes = workspace.codes[strip];
    return {.codebook = &codebooks_[workspace.variant[strip]],
            .weights = workspace.tile.weights.data() + group * kGroupRows * kTileColumns + column,
            .super_scale = workspace.scales.data() + column,
            .local_scale_radius = options_.local_scale_radius,
            .bytes = codes.bytes.data() + group * kGroupBlocks * kStripColumns,
            .local_scale = codes.local_scale.data() + group * kStripColumns};
  }

  // Calls fill(map) for every map that an open strip of the tile has.
  template <typename Fill>
  void ForEachMap(const Workspace& workspace, const Fill& fill) const {
    for (size_t map = 0; map < codebooks_.size(); ++map) {
      bool is_used = false;
      for (int strip = 0; strip < kTileStrips; ++strip) {
        is_used |= workspace.tile.is_open[strip] && workspace.variant[strip] == map;
      }
      if (is_used) fill(map);
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
      const CodeMap& map = codebooks_[workspace.variant[column / kStripColumns]].map();
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
      ForEachMap(workspace, [&](size_t map) {
        workspace.tables[map].feedback.Fill(codebooks_[map], workspace.factor.basis);
      });
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        FeedbackGroup(workspace.factor, workspace.tables[workspace.variant[strip]].feedback,
                      StripOf(workspace, strip, group), workspace.group + column,
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
    const size_t map = workspace.variant[i / kStripColumns];
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
  std::vector<SweepTile> SweepTiles() const {
    std::vector<SweepTile> tiles;
    const int tile_strips = SweepStrips(target_.n, pool_.num_threads());
    for (size_t map = 0; map < codebooks_.size(); ++map) {
      int lane = kStripColumns;  // columns of the last strip
      for (int64_t column = 0; column < target_.n; ++column) {
        if (column_map_[column] != map) continue;
        if (lane == kStripColumns) {
          if (tiles.empty() || tiles.back().num_strips == tile_strips) {
            tiles.push_back({.columns = std::vector<int64_t>(tile_strips * kStripColumns, -1),
                             .num_strips = 0});
          }
          tiles.back().variant[tiles.back().num_strips++] = map;
          lane = 0;
        }
        SweepTile& tile = tiles.back();
        tile.columns[(tile.num_strips - 1) * kStripColumns + lane++] = column;
      }
    }
    return tiles;
  }

  void FillSets(const std::vector<int32_t>& blocks, std::vector<BlockSet>& sets) const {
    sets.resize(num_groups_);
    pool_.Run(num_groups_, num_groups_ * kGroupRows * kGroupRows * kGroupRows,
              [&](int64_t item, int) {
                std::array<int32_t, kGroupBlocks> part;
                std::copy_n(blocks.begin() + item * kGroupBlocks, kGroupBlocks, part.begin());
                sets[item].Fill(factor_, part);
              });
  }

  // The groups, and sets of four quarters of groups, drawn anew for each search. A quarter is 16
  // rows, a cache line of H.
  void MakeSets() {
    constexpr int kQuarter = kGroupBlocks / 4;
    std::vector<int32_t> blocks(target_.k / kWeightsOfByte);
    std::iota(blocks.begin(), blocks.end(), 0);
    FillSets(blocks, groups_);
    std::vector<int32_t> quarters(blocks.size() / kQuarter);
    std::iota(quarters.begin(), quarters.end(), 0);
    // The same draw for every matrix: it decides nothing but which bytes are searched together.
    std::mt19937 rng(1);
    for (int i = 0; i < options_.num_sweeps * options_.num_mixed_searches; ++i) {
      // Not std::shuffle, which differs from library to library.
      for (size_t last = quarters.size() - 1; last > 0; --last) {
        std::swap(quarters[last], quarters[rng() % (last + 1)]);
      }
      for (size_t block = 0; block < blocks.size(); ++block) {
        blocks[block] = quarters[block / kQuarter] * kQuarter + static_cast<int>(block % kQuarter);
      }
      FillSets(blocks, mixed_sets_.emplace_back());
    }
  }

  void Sweep(int number, Workspace& workspace) const {
    SweepSets(groups_, workspace);
    for (int i = 0; i < options_.num_mixed_searches; ++i) {
      SweepSets(mixed_sets_[number * options_.num_mixed_searches + i], workspace);
    }
  }

  void SweepSets(const std::vector<BlockSet>& sets, Workspace& workspace) const {
    ColumnTile& tile = workspace.tile;
    LazyGradient gradient(factor_, tile);
    for (const BlockSet& set : sets) {
      ForEachMap(workspace, [&](size_t map) {
        workspace.tables[map].feedback.Fill(codebooks_[map], set.factor.basis);
        workspace.tables[map].descent.Fill(codebooks_[map], set.basis);
      });
      gradient.Get(set.rows(), workspace.group_gradient);
      bool any_changed = false;
      for (int strip = 0; strip < kTileStrips; ++strip) {
        const int column = strip * kStripColumns;
        if (!tile.is_open[strip]) continue;
        any_changed |= SweepSet(set, workspace.tables[workspace.variant[strip]],
                                StripOf(workspace, strip, 0), workspace.group_gradient + column,
                                tile.decoded.data() + column, workspace.group + column);
      }
      if (any_changed) gradient.Add(set.rows(), workspace.group);
    }
    gradient.Flush();
  }

  const FloatMatrix target_;
  const FeedbackFactor& factor_;
  const FeedbackOptions& options_;
  kernels::cpu::ThreadPool& pool_;
  const int64_t num_groups_;
  std::vector<Codebook> codebooks_;
  std::vector<size_t> column_map_;  // [n]
  std::vector<BlockSet> groups_;
  std::vector<std::vector<BlockSet>> mixed_sets_;  // [num_sweeps * num_mixed_searches]
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
  if (options.num_mixed_searches < 0) {
    return absl::InvalidArgumentError(fmt::format(
        "error feedback: num_mixed_searches is {}, must be 0 or more", options.num_mixed_searches));
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
