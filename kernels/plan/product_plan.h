// How a weight product is cut into work: slices of k by shape alone, tiles of tokens and grids by
// the sizes that the host knows. Pure arithmetic, shared by launches and kernels.
//
// A product computes, for the tokens of each expert (a linear layer is one expert),
//     y [tokens, columns] = x [tokens, k] * W_expert [k, columns].
// Four kernels do this:
//   resident  up to 8 tokens at a time, WINT2; the warps of a block take slices of k of the same
//             columns and keep their activations in registers
//   cached    up to 8 tokens at a time, WINT2; the same with slices too long for registers, so that
//             the activations of all of k lie in shared memory
//   stream    up to 8 tokens at a time; the same with activations in memory
//   tile      8 to 64 tokens at a time; the warps of a block take different columns and share the
//             tokens' activations
// Every output is the sum, in slice order, of the sums of its slices, each in the order of k, in
// all kernels and for any tile of tokens, so a row has the same bits in any batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/formats/matrix.h"
#include "kernels/plan/host_device.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::plan {

inline constexpr int kProductWarps = 8;
inline constexpr int kProductThreads = 32 * kProductWarps;
inline constexpr int kBlockTokens = 8;                      // columns of an mma
inline constexpr int kTileKernelTiles = 2 * kProductWarps;  // tiles of a block of the tile kernel
inline constexpr int kMaxExperts = 128;
// Rows that one pass of a larger batch takes, so that workspaces stay bounded.
inline constexpr int64_t kMaxPassRows = 4096;
// What a block may use on every architecture from sm_80 on, and on Hopper.
inline constexpr int64_t kMaxSharedBytes = 163 * 1024;
inline constexpr int64_t kMaxHopperSharedBytes = 227 * 1024;

template <typename T>
WINTSERVE_HOST_DEVICE constexpr T DivideUp(T a, T b) {
  return (a + b - 1) / b;
}

// The resident kernel: 64 of a thread's 128 registers hold the activations of 4 chunks, and a
// multiprocessor holds 16 warps of such threads.
inline constexpr int kResidentChunks = 4;
inline constexpr int kResidentWarps = 16;

// Where it serves small batches: a short k makes many small items, which its launches overlap and
// its rounds even out. It can do more, but on an H200 the cached kernel is faster from k = 3584 on.
constexpr bool IsResident(formats::WeightFormat format, int64_t chunks) {
  return format == formats::WeightFormat::kWint2 && chunks <= 20;
}

// Its slices: of up to 4 chunks, so that they differ little in length and blocks of one warp a
// slice fill a multiprocessor; the longest where this is equal. REQUIRES: chunks <=
// kResidentChunks * kResidentWarps.
constexpr int ResidentSlices(int64_t chunks) {
  int best = kResidentWarps;
  int64_t best_warps = 0;  // busy at a time, times 2^20
  for (int64_t longest = kResidentChunks; longest >= 1; --longest) {
    const auto slices = static_cast<int>(DivideUp(chunks, longest));
    if (slices > kResidentWarps) break;
    const int64_t warps = kResidentWarps / slices * slices;
    const int64_t busy = (warps << 20) * chunks / (slices * DivideUp(chunks, int64_t{slices}));
    if (busy > best_warps) {
      best = slices;
      best_warps = busy;
    }
  }
  return best;
}

// The stream kernel's: as many of 8, 4, 2 as leave each at least 4 chunks and differ little in
// length.
constexpr int StreamSlices(int64_t chunks) {
  for (int slices = kProductWarps; slices > 1; slices /= 2) {
    const int64_t longest = DivideUp(chunks, int64_t{slices});
    if (chunks >= 4 * slices && 15 * longest * slices <= 16 * chunks) return slices;
  }
  return 1;
}

// Slices of k in every kernel.
constexpr int NumSlices(formats::WeightFormat format, int64_t chunks) {
  return IsResident(format, chunks) ? ResidentSlices(chunks) : StreamSlices(chunks);
}

WINTSERVE_HOST_DEVICE constexpr int SliceBegin(int chunks, int slices, int slice) {
  return chunks * slice / slices;
}

// The token tile and the block of columns of an expert's item `index`, of num_token_tiles *
// num_row_blocks. Token tiles go first in bands of kBandTiles, so that a band's activations stay in
// the L2 cache while all weights pass by.
struct ItemPlace {
  int token_tile = 0;
  int row_block = 0;
};
inline constexpr int kBandTiles = 16;

WINTSERVE_HOST_DEVICE constexpr ItemPlace PlaceOfItem(int index, int num_token_tiles,
                                                      int num_row_blocks) {
  const int band = index / (kBandTiles * num_row_blocks);
  const int first_tile = band * kBandTiles;
  const int left = num_token_tiles - first_tile;
  const int tiles = left < kBandTiles ? left : kBandTiles;
  const int in_band = index - first_tile * num_row_blocks;
  return {first_tile + in_band % tiles, in_band / tiles};
}

// First item of a block when num_items lie in order on num_blocks blocks: the first blocks take one
// more than the last, so that two blocks of a multiprocessor, whose indices usually differ by the
// number of multiprocessors, take at most one item more than those of any other.
WINTSERVE_HOST_DEVICE constexpr int64_t FirstItemOfBlock(int64_t num_items, int num_blocks,
                                                         int block) {
  const int64_t each = num_items / num_blocks;
  const int64_t left = num_items % num_blocks;
  return block * each + (block < left ? block : left);
}

struct ProductShape {
  formats::WeightFormat format = formats::WeightFormat::kWint2;
  int64_t chunks = 0;
  int64_t tiles = 0;
  int num_experts = 1;
  int64_t num_tokens = 0;      // over all experts
  int64_t max_per_expert = 0;  // tokens that one expert can get
};

enum class ProductKernel { kResident, kCached, kStream, kTile };

struct ProductPlan {
  ProductKernel kernel = ProductKernel::kStream;
  int token_blocks = 1;       // of 8 tokens: 2, 4 or 8 (tile), else 1
  int tiles_per_warp = 1;     // resident: 1; cached, tile: 2; stream: 1 or 2
  int slices = 1;             // NumSlices
  int slice_chunks = 1;       // of the longest slice
  bool split_slices = false;  // tile: a block computes one slice, and another kernel adds them up
  int grid_blocks = 0;
  int row_chunks = 0;  // stream: of its only row, which each block prepares for itself; 0: none
  bool overlaps_previous = true;  // LaunchShape::overlaps_previous

  // Of the cached kernel:
  int groups = 1;                  // of a block, of one warp a slice
  int chunks = 0;                  // of all slices
  int stage_chunks = 1;            // of a stage of a warp's ring: 1 or 2
  int token_slots = kBlockTokens;  // whose activations shared memory has room for

  constexpr int token_tile() const { return token_blocks * kBlockTokens; }
  constexpr int block_threads() const {
    return kernel == ProductKernel::kResident ? 32 * slices
           : kernel == ProductKernel::kCached ? 32 * slices * groups
                                              : kProductThreads;
  }
};

// Whether the stream kernel exists with two tiles a warp: reading the activations half as often
// pays where decoding, not memory, is the limit.
constexpr bool StreamsTwoTiles(formats::WeightFormat format) {
  return format == formats::WeightFormat::kWint2;
}

// Ring stages of the kernels: about 40 KiB of weights in flight a block of the stream kernel, and
// what shared memory holds in the tile kernel.
WINTSERVE_HOST_DEVICE constexpr int StreamStages(formats::WeightFormat format, int tiles_per_warp) {
  const int units = UnitsPerChunk(format) * tiles_per_warp;
  return units == 1 ? 8 : units == 2 ? 5 : units == 4 ? 3 : 2;
}
WINTSERVE_HOST_DEVICE constexpr int TileStages(formats::WeightFormat format) {
  return format == formats::WeightFormat::kWint2   ? 4
         : format == formats::WeightFormat::kWint4 ? 3
         : format == formats::WeightFormat::kWint8 ? 3
                                                   : 2;
}

// Shared memory of both kernels begins with the schedule: for each expert its first token and its
// first token tile, and their ends.
WINTSERVE_HOST_DEVICE constexpr int ScheduleBytes(int num_experts) {
  return DivideUp(2 * (num_experts + 1) * 4, 16) * 16;
}

// Floats of a warp's sums of a tile as they pass through shared memory, [token][row]: 20 a token
// keep the 8 rows and 4 tokens that a warp writes at once in different banks.
inline constexpr int kSumStride = 20;
inline constexpr int kTileSumFloats = kBlockTokens * kSumStride;

WINTSERVE_HOST_DEVICE constexpr int StreamSumsBytes(int tiles_per_warp) {
  return kProductWarps * tiles_per_warp * kTileSumFloats * 4;
}

// A row that the blocks of the stream kernel prepare for themselves: a launch less for one token,
// as long as two blocks of a multiprocessor have room for it. Its scale, its chunks' corrections,
// its values; what makes it has PreparedRows.
inline constexpr int64_t kMaxStreamRowChunks = 64;
inline constexpr int kRowReductionBytes = 32 * 4;
WINTSERVE_HOST_DEVICE constexpr int StreamRowBytes(int chunks) {
  return chunks == 0 ? 0 : kRowReductionBytes + 16 + chunks * (16 + kChunkRows * 2);
}

// The resident kernel. A stage of a warp's ring: the records of its slice of a tile, then the
// tile's ColumnInfos. A round: tiles whose sums meet in shared memory at once.
inline constexpr int kResidentRoundTiles = 2;
WINTSERVE_HOST_DEVICE constexpr int ResidentStages(int slice_chunks) {
  return slice_chunks >= 3 ? 3 : slice_chunks == 2 ? 4 : 6;
}
WINTSERVE_HOST_DEVICE constexpr int ResidentStageBytes(int slice_chunks) {
  return slice_chunks * ChunkBytes(formats::WeightFormat::kWint2) +
         kTileColumns * static_cast<int>(sizeof(ColumnInfo));
}
// Barriers, what is known of two rounds (ResidentRound), their sums, and the warps' corrections.
inline constexpr int kResidentBarrierBytes = 2 * 2 * 8;
inline constexpr int kResidentRoundBytes = 16 + kBlockTokens * 4;
WINTSERVE_HOST_DEVICE constexpr int ResidentCorrectionBytes(int slice_chunks) {
  return slice_chunks * kGroupsPerChunk * 4 * 16;
}

// The cached kernel's behind the schedule: a run's tokens (rows and scales), the groups' barriers,
// activations and corrections as operands of an mma, the warps' rings, and their sums of two steps.
inline constexpr int kCachedWarps = 16;  // of 128 registers a thread: all of a multiprocessor
inline constexpr int kCachedTiles = 2;   // a warp's at once
inline constexpr int kCachedStages = 3;
inline constexpr int kCachedTokensBytes = kBlockTokens * 8;
inline constexpr int kCachedBarrierBytes = 2 * 2 * 8;
// 64 bytes more than a multiple of 128, so that 8 lanes of two tokens read from all banks.
WINTSERVE_HOST_DEVICE constexpr int CachedTokenBytes(int chunks) {
  return chunks * kChunkRows * 2 + 64;
}
inline constexpr int kCachedCorrectionBytes = kGroupsPerChunk * 4 * 16;  // of a chunk

// One stage of the tile kernel: weights, then activations, then corrections as the accumulators of
// an mma want them: four floats for every two tokens, each twice.
WINTSERVE_HOST_DEVICE constexpr int TileStageActivations(int token_blocks) {
  return token_blocks * kBlockTokens * kChunkRows * 2;
}
WINTSERVE_HOST_DEVICE constexpr int TileStageCorrections(formats::WeightFormat format,
                                                         int token_blocks) {
  return format == formats::WeightFormat::kBfloat16
             ? 0
             : token_blocks * kBlockTokens * kGroupsPerChunk * 2 * 4;
}
WINTSERVE_HOST_DEVICE constexpr int TileStageBytes(formats::WeightFormat format, int token_blocks) {
  return kTileKernelTiles * ChunkBytes(format) + TileStageActivations(token_blocks) +
         TileStageCorrections(format, token_blocks);
}

constexpr int64_t SharedBytes(const ProductPlan& plan, formats::WeightFormat format,
                              int num_experts) {
  if (plan.kernel == ProductKernel::kResident) {
    const int of_warp = ResidentStages(plan.slice_chunks) * ResidentStageBytes(plan.slice_chunks) +
                        ResidentCorrectionBytes(plan.slice_chunks) +
                        2 * kResidentRoundTiles * kTileSumFloats * 4;
    return ScheduleBytes(num_experts) + kResidentBarrierBytes + 2 * kResidentRoundBytes +
           plan.slices * of_warp;
  }
  if (plan.kernel == ProductKernel::kCached) {
    const int of_warp = kCachedTiles * (kCachedStages * plan.stage_chunks * ChunkBytes(format) +
                                        2 * kTileSumFloats * 4);
    return ScheduleBytes(num_experts) + kCachedTokensBytes + plan.groups * kCachedBarrierBytes +
           plan.token_slots * CachedTokenBytes(plan.chunks) + plan.chunks * kCachedCorrectionBytes +
           plan.groups * plan.slices * of_warp;
  }
  if (plan.kernel == ProductKernel::kTile) {
    return ScheduleBytes(num_experts) +
           int64_t{TileStages(format)} * TileStageBytes(format, plan.token_blocks);
  }
  return ScheduleBytes(num_experts) +
         int64_t{kProductWarps} * StreamStages(format, plan.tiles_per_warp) * plan.tiles_per_warp *
             ChunkBytes(format) +
         2 * StreamSumsBytes(plan.tiles_per_warp) + StreamRowBytes(plan.row_chunks);
}

// Blocks of 256 threads that a multiprocessor holds at once (the launch bounds of the stream and
// the tile kernel).
WINTSERVE_HOST_DEVICE constexpr int BlocksPerMultiprocessor(ProductKernel kernel, int token_blocks,
                                                            formats::WeightFormat format) {
  if (kernel == ProductKernel::kStream) return 2;
  return token_blocks <= 2 && UnitsPerChunk(format) <= 2 ? 2 : 1;
}

// Token tiles of all experts together, at most.
constexpr int64_t MaxTokenTiles(const ProductShape& shape, int token_tile) {
  const int64_t experts = std::min<int64_t>(shape.num_experts, shape.num_tokens);
  return std::min(shape.num_tokens / token_tile + experts,
                  experts * DivideUp(shape.max_per_expert, int64_t{token_tile}));
}

// Columns, in tiles, that a block takes at once.
constexpr int64_t TilesPerBlock(const ProductPlan& plan) {
  return plan.kernel == ProductKernel::kTile ? kTileKernelTiles
                                             : kProductWarps / plan.slices * plan.tiles_per_warp;
}

constexpr ProductPlan ResidentPlan(const ProductShape& shape, int num_multiprocessors) {
  ProductPlan plan;
  plan.kernel = ProductKernel::kResident;
  plan.slices = ResidentSlices(shape.chunks);
  plan.slice_chunks = static_cast<int>(DivideUp(shape.chunks, int64_t{plan.slices}));
  const int64_t resident = int64_t{num_multiprocessors} * (kResidentWarps / plan.slices);
  plan.grid_blocks =
      static_cast<int>(std::min(MaxTokenTiles(shape, kBlockTokens) * shape.tiles, resident));
  return plan;
}

constexpr ProductPlan CachedPlan(const ProductShape& shape, int num_multiprocessors,
                                 int stage_chunks) {
  ProductPlan plan;
  plan.kernel = ProductKernel::kCached;
  plan.tiles_per_warp = kCachedTiles;
  plan.slices = NumSlices(shape.format, shape.chunks);
  plan.slice_chunks = static_cast<int>(DivideUp(shape.chunks, int64_t{plan.slices}));
  plan.groups = kCachedWarps / plan.slices;
  plan.chunks = static_cast<int>(shape.chunks);
  plan.stage_chunks = stage_chunks;
  plan.token_slots = static_cast<int>(std::min<int64_t>(shape.max_per_expert, kBlockTokens));
  plan.grid_blocks = static_cast<int>(
      std::min<int64_t>(MaxTokenTiles(shape, kBlockTokens) * shape.tiles, num_multiprocessors));
  return plan;
}

// The cached plan with the longest stages that fit max_shared_bytes; `otherwise` if none does, or
// where the resident kernel serves.
constexpr ProductPlan CachedPlanOr(const ProductShape& shape, int num_multiprocessors,
                                   int64_t max_shared_bytes, const ProductPlan& otherwise) {
  if (shape.format != formats::WeightFormat::kWint2 || IsResident(shape.format, shape.chunks)) {
    return otherwise;
  }
  for (const int stage_chunks : {2, 1}) {
    const ProductPlan plan = CachedPlan(shape, num_multiprocessors, stage_chunks);
    if (SharedBytes(plan, shape.format, shape.num_experts) <= max_shared_bytes) return plan;
  }
  return otherwise;
}

// Fills slices and grid of a plan whose other fields are chosen. Where IsResident, a stream plan
// becomes a resident one.
constexpr ProductPlan FinishPlan(const ProductShape& shape, int num_multiprocessors,
                                 ProductPlan plan) {
  if (plan.kernel == ProductKernel::kStream && IsResident(shape.format, shape.chunks)) {
    return ResidentPlan(shape, num_multiprocessors);
  }
  plan.slices = NumSlices(shape.format, shape.chunks);
  plan.slice_chunks = static_cast<int>(DivideUp(shape.chunks, int64_t{plan.slices}));
  const int64_t row_blocks = DivideUp(shape.tiles, TilesPerBlock(plan));
  const int64_t items =
      MaxTokenTiles(shape, plan.token_tile()) * row_blocks * (plan.split_slices ? plan.slices : 1);
  const int64_t resident = int64_t{num_multiprocessors} *
                           BlocksPerMultiprocessor(plan.kernel, plan.token_blocks, shape.format);
  plan.grid_blocks = static_cast<int>(std::min(items, resident));
  return plan;
}

// The plan for a device whose blocks may use max_shared_bytes. REQUIRES: num_tokens > 0.
constexpr ProductPlan PlanProductWithin(int64_t max_shared_bytes, const ProductShape& shape,
                                        int num_multiprocessors) {
  ProductPlan plan;
  const int64_t mean = DivideUp(shape.num_tokens, int64_t{shape.num_experts});
  // Beyond a mean of 4, too many experts would get a second tile of 8 tokens and be decoded twice.
  if (shape.max_per_expert <= kBlockTokens || (shape.num_experts > 1 && mean <= 4)) {
    // In a small product two tiles a warp would leave blocks idle at the end.
    ProductPlan two = plan;
    two.tiles_per_warp = 2;
    two.slices = StreamSlices(shape.chunks);
    const int64_t items = std::min<int64_t>(shape.num_experts, shape.num_tokens) *
                          DivideUp(shape.tiles, TilesPerBlock(two));
    if (StreamsTwoTiles(shape.format) && items >= 3 * num_multiprocessors) {
      plan.tiles_per_warp = 2;
    }
    return CachedPlanOr(shape, num_multiprocessors, max_shared_bytes,
                        FinishPlan(shape, num_multiprocessors, plan));
  }
  plan.kernel = ProductKernel::kTile;
  plan.tiles_per_warp = 2;
  // Twice the mean covers nearly every expert under even routing, but up to a mean of 16 tiles of
  // 16 are faster even where many experts get two; one expert gets all.
  const int64_t wanted = shape.num_experts == 1 ? shape.num_tokens : mean <= 16 ? mean : 2 * mean;
  plan.token_blocks = wanted <= 16 ? 2 : wanted <= 32 ? 4 : 8;
  const int64_t items =
      MaxTokenTiles(shape, plan.token_tile()) * DivideUp(shape.tiles, int64_t{kTileKernelTiles});
  // Too few blocks for the machine: slices go to blocks of their own.
  plan.split_slices = shape.num_experts == 1 && NumSlices(shape.format, shape.chunks) > 1 &&
                      3 * items <= 2 * num_multiprocessors;
  return FinishPlan(shape, num_multiprocessors, plan);
}

// On every architecture, and with what Hopper has besides.
constexpr ProductPlan PlanProduct(const ProductShape& shape, int num_multiprocessors) {
  return PlanProductWithin(kMaxSharedBytes, shape, num_multiprocessors);
}
constexpr ProductPlan PlanHopperProduct(const ProductShape& shape, int num_multiprocessors) {
  return PlanProductWithin(kMaxHopperSharedBytes, shape, num_multiprocessors);
}

// float32 values of the slices' sums that a split product leaves in its workspace.
constexpr int64_t SplitSumFloats(const ProductShape& shape, const ProductPlan& plan) {
  return plan.split_slices ? plan.slices * shape.num_tokens * shape.tiles * kTileColumns : 0;
}

}  // namespace wintserve::kernels::plan
