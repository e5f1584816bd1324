// The Hopper kernel of a weight product: its tiles, its shared memory, and when it is chosen.
//
// A block has two warpgroups that multiply and one that copies. A warpgroup computes one or two
// blocks of 64 columns (rows of a wgmma's A operand, which comes from registers) for the tokens of
// a tile. Every output is summed in the order of the other kernels (product_plan.h), so that it has
// the same bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "kernels/formats/matrix.h"
#include "kernels/plan/host_device.h"
#include "kernels/plan/product_plan.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::plan {

inline constexpr int kWgmmaRows = 64;      // of the A operand: columns of the output
inline constexpr int kWgmmaConsumers = 2;  // warpgroups that multiply
inline constexpr int kWarpgroupThreads = 128;
inline constexpr int kWgmmaThreads = (kWgmmaConsumers + 1) * kWarpgroupThreads;
// What a block may use on sm_90.
inline constexpr int64_t kWgmmaSharedBytes = 227 * 1024;

inline constexpr int kSmallTokens = 32;
inline constexpr int kNarrowTokens = 64;
inline constexpr int kWideTokens = 128;

struct WgmmaTile {
  int tokens = 0;
  int row_blocks = 0;  // of 64 columns, a warpgroup: 1 or 2
  int blocks = 1;      // that a multiprocessor holds at once

  WINTSERVE_HOST_DEVICE constexpr int tiles() const {  // of 16 columns a block
    return kWgmmaConsumers * row_blocks * kWgmmaRows / kTileColumns;
  }
};

// WINT2 keeps a second set of sums (those of a group, before their scale), so it has registers for
// half as many columns.
WINTSERVE_HOST_DEVICE constexpr WgmmaTile WgmmaTileOf(formats::WeightFormat format, int tokens) {
  if (tokens <= kSmallTokens) return {tokens, 1, 2};
  if (tokens == kNarrowTokens) return {tokens, 2, 1};
  return format == formats::WeightFormat::kWint2 ? WgmmaTile{tokens, 1, 1}
                                                 : WgmmaTile{tokens, 2, 1};
}

// The wide tile of BF16 leaves no shared memory for more than two stages.
constexpr bool HasWideWgmma(formats::WeightFormat format) {
  return format != formats::WeightFormat::kBfloat16;
}
// Tiles of few tokens are for experts.
constexpr bool HasSmallWgmma(formats::WeightFormat format) {
  return format == formats::WeightFormat::kWint2;
}

// Groups of 64 k of a stage. A lane's word of WINT2 holds both groups of a chunk.
WINTSERVE_HOST_DEVICE constexpr int WgmmaStageGroups(formats::WeightFormat format) {
  return format == formats::WeightFormat::kWint2 ? kGroupsPerChunk : 1;
}

// Where the formats with local scales begin the sum of each group with its correction, a wgmma does
// it, whose B operand is a region in the swizzle: a stage has two of the eight pieces of a row.
WINTSERVE_HOST_DEVICE constexpr bool WgmmaBeginsGroups(formats::WeightFormat format) {
  return format == formats::WeightFormat::kWint2;
}
inline constexpr int kMostWgmmaStages = 4;

// Shared memory, by offsets; the activations of all stages come first.
struct WgmmaShared {
  int stages = 0;
  int activation_bytes = 0;  // of a stage
  int weight_bytes = 0;      // of a tile and stage
  int correction_bytes = 0;  // of a stage, or of all if WgmmaBeginsGroups
  int corrections = 0;
  int weights = 0;
  int sums = 0;      // of the slices before, [row block][4 accumulators][thread]
  int barriers = 0;  // full and empty of each stage, then the warpgroups' turns
  int schedule = 0;

  WINTSERVE_HOST_DEVICE constexpr int64_t SizeBytes(int num_experts) const {
    return schedule + ScheduleBytes(num_experts);
  }
};

WINTSERVE_HOST_DEVICE constexpr WgmmaShared WgmmaSharedOf(formats::WeightFormat format,
                                                          int tokens) {
  const WgmmaTile tile = WgmmaTileOf(format, tokens);
  const int groups = WgmmaStageGroups(format);
  const bool swizzled_corrections = WgmmaBeginsGroups(format);
  WgmmaShared shared;
  shared.activation_bytes = groups * tokens * kGroupRows * 2;
  shared.weight_bytes = ChunkBytes(format) * groups / kGroupsPerChunk;
  shared.correction_bytes = swizzled_corrections ? tokens * 128 : groups * tokens * 4;
  const int sum_bytes = tile.tiles() * kTileColumns * tokens * 4;
  const int barrier_bytes = (2 * kMostWgmmaStages + kWgmmaConsumers) * 8;
  // A block takes 1 KiB more than it asks for.
  const int bytes = static_cast<int>((kWgmmaSharedBytes + 1024) / tile.blocks - 1024);
  const int left = bytes - sum_bytes - barrier_bytes - ScheduleBytes(kMaxExperts) -
                   (swizzled_corrections ? shared.correction_bytes : 0);
  const int stage_bytes = shared.activation_bytes + tile.tiles() * shared.weight_bytes +
                          (swizzled_corrections ? 0 : shared.correction_bytes);
  const int most = left / stage_bytes;
  shared.stages = most < kMostWgmmaStages ? most : kMostWgmmaStages;
  shared.corrections = shared.stages * shared.activation_bytes;
  shared.weights =
      shared.corrections + (swizzled_corrections ? 1 : shared.stages) * shared.correction_bytes;
  shared.sums = shared.weights + shared.stages * tile.tiles() * shared.weight_bytes;
  shared.barriers = shared.sums + sum_bytes;
  shared.schedule = shared.barriers + barrier_bytes;
  return shared;
}

// --- The B operand in shared memory ---
//
// A row of a group's activations is 128 bytes: eight pieces of 16 bytes, of which wgmma m reads
// pieces 2m and 2m + 1. Piece 2m + b holds, for t = 0 … 3, the pair of halves at the position
// (pair, t, select, b) with m = 2 * pair + select: the k that A register 2b + upper of lane 4g + t
// multiplies. Prepared activations in the order kWgmma lie so.
enum class OperandOrder { kMma, kWgmma };

// Where a 16-byte piece of a token lies in the 128-byte swizzle: in its row of 128 bytes, pieces
// are exchanged by the row's number, so that the eight rows of a piece lie in different banks.
WINTSERVE_HOST_DEVICE constexpr int SwizzledOffset(int token, int piece) {
  return token * 128 + ((piece ^ (token & 7)) << 4);
}

// Matrix descriptor of a K-major operand in that swizzle, at a shared address that is a multiple of
// 1024: rows come in blocks of 8, 1024 bytes apart. wgmma m adds m * kDescriptorStep.
WINTSERVE_HOST_DEVICE constexpr uint64_t WgmmaDescriptor(uint32_t shared_address) {
  return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
inline constexpr uint64_t kDescriptorStep = 32 >> 4;

// A correction is 2^14 * low half + 2^3 * high half of its word (product_params.h). In the operand
// that begins the groups of a stage, the word of group `group` is the first of piece 2 * stage +
// group, so that A registers 2 * group and 2 * group + 1 of lanes 4g meet it.
WINTSERVE_HOST_DEVICE constexpr int CorrectionOffset(int token, int stage, int group) {
  return SwizzledOffset(token, 2 * stage + group);
}
inline constexpr uint32_t kCorrectionFactors = 0x48007400;  // binary16 of 2^14 (low) and 2^3

// --- Choice ---

struct WgmmaPlan {
  int tokens = kNarrowTokens;
  int slices = 1;             // NumSlices
  bool split_slices = false;  // as in ProductPlan
  int grid_blocks = 0;
};

// Fills slices and grid of a plan whose other fields are chosen.
constexpr WgmmaPlan FinishWgmmaPlan(const ProductShape& shape, int num_multiprocessors,
                                    WgmmaPlan plan) {
  plan.slices = NumSlices(shape.format, shape.chunks);
  const int64_t row_blocks =
      DivideUp(shape.tiles, int64_t{WgmmaTileOf(shape.format, plan.tokens).tiles()});
  const int64_t items =
      MaxTokenTiles(shape, plan.tokens) * row_blocks * (plan.split_slices ? plan.slices : 1);
  plan.grid_blocks = static_cast<int>(std::min<int64_t>(
      items, num_multiprocessors * WgmmaTileOf(shape.format, plan.tokens).blocks));
  return plan;
}

// Nothing where another kernel is better. REQUIRES: num_tokens > 0.
constexpr std::optional<WgmmaPlan> PlanWgmmaProduct(const ProductShape& shape,
                                                    int num_multiprocessors) {
  const int64_t mean = DivideUp(shape.num_tokens, int64_t{shape.num_experts});
  // Measured on an H200: below these, tiles of 16 or 32 tokens on mma.sync are faster. Experts get
  // more and fewer tokens than the mean.
  constexpr int64_t kLeastTokens = 33;
  constexpr int64_t kLeastSmallMean = 14;
  constexpr int64_t kLeastMean = 25;
  const bool has_small = HasSmallWgmma(shape.format) && !IsResident(shape.format, shape.chunks);
  if (shape.max_per_expert < kLeastTokens ||
      (shape.num_experts > 1 && mean < (has_small ? kLeastSmallMean : kLeastMean))) {
    return std::nullopt;
  }
  // The last tile of an expert is partly empty.
  constexpr int64_t kLeastWideMean = 193;
  const bool wide =
      shape.num_experts > 1 ? mean >= kLeastWideMean : shape.num_tokens > kNarrowTokens;
  WgmmaPlan plan;
  plan.tokens = shape.num_experts > 1 && mean < kLeastMean ? kSmallTokens
                : wide && HasWideWgmma(shape.format)       ? kWideTokens
                                                           : kNarrowTokens;
  const int64_t items =
      MaxTokenTiles(shape, plan.tokens) *
      DivideUp(shape.tiles, int64_t{WgmmaTileOf(shape.format, plan.tokens).tiles()});
  plan.split_slices = shape.num_experts == 1 && NumSlices(shape.format, shape.chunks) > 1 &&
                      3 * items <= 2 * num_multiprocessors;
  return FinishWgmmaPlan(shape, num_multiprocessors, plan);
}

using WgmmaPlanner = std::optional<WgmmaPlan> (*)(const ProductShape&, int num_multiprocessors);

constexpr int64_t SplitSumFloats(const ProductShape& shape, const WgmmaPlan& plan) {
  return plan.split_slices ? plan.slices * shape.num_tokens * shape.tiles * kTileColumns : 0;
}

}  // namespace wintserve::kernels::plan
