// The stream kernel: up to 8 tokens times weights that are read once, at the speed of memory or of
// their decoding.
//
// A block of 8 warps takes an item: 8 tokens of an expert and kTiles * 8 / slices tiles of columns.
// The warps of a tile each sum one slice of k and meet in shared memory once an item. Every warp
// copies its weights through a ring of its own that runs on into the next item, so that memory
// never waits for a barrier. Activations are read from memory each time and lie in the L1 cache:
// at k = 8192 the 8 tokens fill 128 KiB of it.
//
// Items lie in order of expert, token tile, block of columns, and a block takes consecutive ones.
//
// The kernel may begin while the one before it runs, and fills its rings in that time.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/cuda/matmul/row_kernels.cuh"
#include "kernels/cuda/matmul/schedule.cuh"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {

// A place in the order of items. For all lanes of a warp: finding an expert takes them all.
struct StreamCursor {
  int expert = 0;
  int token_tile = 0;  // of the expert
  int row_block = 0;

  static WINTSERVE_DEVICE StreamCursor At(const Schedule& schedule, int num_experts,
                                          int num_row_blocks, int item) {
    const int tile = item / num_row_blocks;
    StreamCursor cursor;
    cursor.row_block = item - tile * num_row_blocks;
    cursor.expert = ExpertOfTile(schedule, num_experts, tile);
    cursor.token_tile = tile - schedule.first_tile[cursor.expert];
    return cursor;
  }
  // REQUIRES: there is a next item.
  WINTSERVE_DEVICE void Advance(const Schedule& schedule, int num_experts, int num_row_blocks) {
    if (++row_block < num_row_blocks) return;
    row_block = 0;
    const int tile = schedule.first_tile[expert] + ++token_tile;
    if (tile < schedule.first_tile[expert + 1]) return;
    expert = ExpertOfTile(schedule, num_experts, tile);
    token_tile = 0;
  }
};

// What is the same for all items of a warp.
struct StreamWarp {
  int lane;
  int row_warp;  // which tiles of the item
  int row_warps;
  int chunk_begin;  // its slice
  int chunk_end;
  int num_row_blocks;
};

// First of the warp's tiles of an item.
template <int kTiles>
WINTSERVE_DEVICE int TileOfWarp(const ProductParams& p, const StreamWarp& warp,
                                const StreamCursor& item) {
  return ClampTile(p, (item.row_block * warp.row_warps + warp.row_warp) * kTiles, kTiles);
}

// One warp's ring of weights: a stage holds a record of each tile.
template <class Codec, int kTiles>
class WeightRing {
 public:
  static constexpr int kUnits = plan::UnitsPerChunk(Codec::kFormat);
  static constexpr int kRecordBytes = plan::ChunkBytes(Codec::kFormat);
  static constexpr int kStages = plan::StreamStages(Codec::kFormat, kTiles);
  static constexpr int kStageBytes = kTiles * kRecordBytes;

  WINTSERVE_DEVICE WeightRing(const ProductParams& p, const Schedule& schedule,
                              const StreamWarp& warp, const StreamCursor& first, int num_items)
      : p_(p), schedule_(schedule), warp_(warp), item_(first), items_left_(num_items) {
    OpenItem();
  }

  // Starts the copies of the next chunk, if there is one, to a stage (+ 16 * lane). A group of
  // copies a call.
  WINTSERVE_DEVICE void Issue(uint8_t* lane_stage) {
    const bool active = chunks_left_ > 0;
    const int64_t tile_bytes = int64_t{p_.chunks} * kRecordBytes;
    WINTSERVE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      WINTSERVE_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        CopyToSharedIf(active,
                       SharedAddressOf(lane_stage + tile * kRecordBytes + unit * plan::kUnitBytes),
                       from_ + tile * tile_bytes + unit * plan::kUnitBytes);
      }
    }
    if constexpr (Codec::kHasLocalScales) {
      WINTSERVE_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        // Behind the units, from where lane 0 counts.
        constexpr int kScales = kUnits * plan::kUnitBytes;
        CopyToSharedIf(active && warp_.lane == 0,
                       SharedAddressOf(lane_stage + tile * kRecordBytes + kScales),
                       from_ + tile * tile_bytes + kScales);
      }
    }
    from_ += kRecordBytes;
    // Below zero once all items are done.
    if (--chunks_left_ == 0 && --items_left_ > 0) {
      item_.Advance(schedule_, p_.num_experts, warp_.num_row_blocks);
      OpenItem();
    }
    CommitCopies();
  }

 private:
  WINTSERVE_DEVICE void OpenItem() {
    chunks_left_ = warp_.chunk_end - warp_.chunk_begin;
    const int64_t record =
        int64_t{TileOfWarp<kTiles>(p_, warp_, item_)} * p_.chunks + warp_.chunk_begin;
    from_ = p_.experts.weights[item_.expert] + p_.records_offset + record * kRecordBytes +
            warp_.lane * 16;
  }

  const ProductParams& p_;
  const Schedule& schedule_;
  const StreamWarp& warp_;
  StreamCursor item_;
  int items_left_;  // this one and those behind it
  int chunks_left_ = 0;
  const uint8_t* from_ = nullptr;  // the lane's first unit of the next chunk
};

// What a lane reads of its tokens. Beyond the expert's last token it reads the last one again; the
// sums of such columns of the mma are not stored.
struct StreamTokens {
  const uint8_t* values;                // token g, the lane's t
  const ChunkCorrections* corrections;  // token g
  float inverse_scale;                  // of the token that the thread stores
};

WINTSERVE_DEVICE int StoredToken(const ProductParams& p, int thread) {
  return p.epilogue == Epilogue::kStore ? (thread >> 4) & 7 : (thread >> 3) & 7;
}

WINTSERVE_DEVICE StreamTokens LocateTokens(const ProductParams& p, const Schedule& schedule,
                                           const StreamCursor& item, int thread) {
  const int lane = thread % 32;
  const int first = schedule.first_token[item.expert] + item.token_tile * plan::kBlockTokens;
  const int last = schedule.first_token[item.expert + 1] - 1;
  const auto row = [&](int token) {
    return SourceRow(p, first + token < last ? first + token : last);
  };
  StreamTokens tokens;
  const int64_t chunk = row(lane / 4) * p.chunks;
  tokens.values =
      reinterpret_cast<const uint8_t*>(p.x.values) + chunk * plan::kChunkRows * 2 + lane % 4 * 16;
  tokens.corrections = p.x.corrections + chunk;
  tokens.inverse_scale = p.x.inverse_scale[row(StoredToken(p, thread))];
  return tokens;
}

// Prepares the only row of the product in shared memory of plan::StreamRowBytes, for all threads of
// a block.
WINTSERVE_DEVICE StreamTokens PrepareOwnRow(const ProductParams& p, int lane, uint8_t* shared) {
  static_assert(plan::kRowReductionBytes == kPrepareSharedBytes);
  auto* scale = reinterpret_cast<float*>(shared + plan::kRowReductionBytes);
  auto* corrections = reinterpret_cast<ChunkCorrections*>(shared + plan::kRowReductionBytes + 16);
  auto* values = reinterpret_cast<uint16_t*>(corrections + p.chunks);
  PrepareParams row = p.row;
  row.threads = plan::kProductThreads;
  row.out = {values, scale, corrections};
  PrepareRow(row, /*row=*/0, shared);
  SyncBlock();
  return {reinterpret_cast<const uint8_t*>(values) + lane % 4 * 16, corrections, *scale};
}

// The lane's part of the B operand of a group: two 16-byte loads.
WINTSERVE_DEVICE void LoadOperandB(const uint8_t* values, int group, uint32_t (&b)[4][2]) {
  WINTSERVE_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const uint4 words =
        LoadFreshAnywhere(reinterpret_cast<const uint4*>(values + (2 * group + pair) * 64));
    b[2 * pair][0] = words.x;
    b[2 * pair][1] = words.y;
    b[2 * pair + 1][0] = words.z;
    b[2 * pair + 1][1] = words.w;
  }
}

// A group's corrections of tokens 2t and 2t + 1, as all rows of an accumulator have them: one mma
// whose A operand holds 2^14 and 2^3 at two k, and 0 at the others. The lanes of a token have all
// loaded its word (`halves`, of both groups: b = 0 belongs to the first, b = 1 to the second), but
// only that of lane t = 0 meets an A that is not 0.
WINTSERVE_DEVICE void SpreadCorrection(const uint32_t (&halves)[2], int group, int lane,
                                       float (&correction)[4]) {
  constexpr uint32_t kFactors = 0x48007400;  // binary16 of 2^14 (low) and 2^3
  const uint32_t factors = lane % 4 == 0 ? kFactors : 0;
  const uint32_t a[4] = {group == 0 ? factors : 0, group == 0 ? factors : 0,
                         group == 0 ? 0 : factors, group == 0 ? 0 : factors};
  const float zero[4] = {};
  MatrixMultiplyAddHalves(a, halves, zero, correction);
}

// Adds one group of a chunk to the sums of the warp's tiles.
template <class Codec, int kTiles>
WINTSERVE_DEVICE void AddStreamGroup(const typename Codec::Packed (&packed)[kTiles], int group,
                                     const LaneColumns (&columns)[kTiles],
                                     const float (&scales)[kTiles][2][2],
                                     const typename Codec::Constants& constants,
                                     const uint32_t (&b)[4][2], const float (&correction)[4],
                                     float (&total)[kTiles][4]) {
  WINTSERVE_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    uint32_t a[4][4];
    Codec::Decode(packed[tile], group, columns[tile], scales[tile][group], constants, a);
    Codec::Accumulate(a, b, correction, scales[tile][group], total[tile]);
  }
}

// Adds the slices of the block's tiles in order and stores what belongs to a token and a column.
// sums: [warp][tile][token][row], a token kSumStride floats
template <int kTiles>
WINTSERVE_DEVICE void StoreStreamSums(const ProductParams& p, const Schedule& schedule,
                                      const StreamCursor& item, int row_warps, const float* sums,
                                      float inverse_scale) {
  const int thread = ThreadIndex();
  const bool store = p.epilogue == Epilogue::kStore;
  const int token = StoredToken(p, thread);
  const int in_expert = item.token_tile * plan::kBlockTokens + token;
  const int first = schedule.first_token[item.expert];
  if (in_expert >= schedule.first_token[item.expert + 1] - first) return;
  const int rows = store ? plan::kTileColumns : plan::kTileColumns / 2;
  const int row = thread & (rows - 1);
  int tile = thread / (store ? plan::kTileColumns * plan::kBlockTokens
                             : plan::kTileColumns / 2 * plan::kBlockTokens);
  if (tile >= row_warps * kTiles) return;
  const auto add_slices = [&](int tile_row) {
    const float* slice =
        sums + (tile / kTiles * p.slices * kTiles + tile % kTiles) * plan::kTileSumFloats +
        token * plan::kSumStride + tile_row;
    float sum = *slice;
    for (int s = 1; s < p.slices; ++s) {
      sum = Add(sum, slice[s * kTiles * plan::kTileSumFloats]);
    }
    return sum * inverse_scale;
  };
  float* y = p.y + (first + in_expert) * p.y_stride;
  do {
    const int column = (item.row_block * row_warps * kTiles + tile) * rows + row;
    if (column < p.columns) {
      y[column] = store ? add_slices(row) : SwiGlu(add_slices(row), add_slices(row + rows));
    }
    tile += store ? plan::kProductThreads / (plan::kTileColumns * plan::kBlockTokens)
                  : plan::kProductThreads / (plan::kTileColumns / 2 * plan::kBlockTokens);
  } while (tile < row_warps * kTiles);
}

// shared: plan::SharedBytes; grid: any number of blocks of kProductThreads.
template <class Codec, int kTiles>
WINTSERVE_DEVICE void StreamProduct(const ProductParams& p, uint8_t* shared) {
  using Ring = WeightRing<Codec, kTiles>;
  const Schedule schedule = BuildSchedule(p, plan::kBlockTokens, shared);
  const int thread = ThreadIndex();
  const int warp_index = thread / 32;
  const int slice = warp_index % p.slices;
  const int row_warps = plan::kProductWarps / p.slices;
  const StreamWarp warp = {thread % 32,
                           warp_index / p.slices,
                           row_warps,
                           plan::SliceBegin(p.chunks, p.slices, slice),
                           plan::SliceBegin(p.chunks, p.slices, slice + 1),
                           plan::DivideUp(p.tiles, row_warps * kTiles)};
  const int64_t num_items = int64_t{schedule.num_token_tiles} * warp.num_row_blocks;
  const auto item_begin =
      static_cast<int>(plan::FirstItemOfBlock(num_items, NumBlocks(), BlockIndex()));
  const auto item_end =
      static_cast<int>(plan::FirstItemOfBlock(num_items, NumBlocks(), BlockIndex() + 1));
  if (item_begin == item_end) {
    WaitForPreviousKernel();
    return;
  }

  uint8_t* rings = shared + plan::ScheduleBytes(p.num_experts);
  auto* sums =
      reinterpret_cast<float*>(rings + plan::kProductWarps * Ring::kStages * Ring::kStageBytes);
  // Stages as the lane sees them, as offsets: its 16 bytes of the first unit. From there to its
  // rows' scales.
  const int ring_begin = plan::ScheduleBytes(p.num_experts) +
                         warp_index * Ring::kStages * Ring::kStageBytes + warp.lane * 16;
  const int ring_end = ring_begin + Ring::kStages * Ring::kStageBytes;
  const int to_scales = Ring::kUnits * plan::kUnitBytes + warp.lane / 4 * 2 - warp.lane * 16;
  StreamCursor item = StreamCursor::At(schedule, p.num_experts, warp.num_row_blocks, item_begin);
  Ring ring(p, schedule, warp, item, item_end - item_begin);
  WINTSERVE_UNROLL
  for (int i = 0; i < Ring::kStages - 1; ++i) {
    ring.Issue(shared + ring_begin + i * Ring::kStageBytes);
  }
  int stage = ring_begin;
  int previous_stage = ring_end - Ring::kStageBytes;

  const auto load_columns = [&](const StreamCursor& of, LaneColumns(&columns)[kTiles]) {
    const uint8_t* infos = p.experts.weights[of.expert] + int64_t{TileOfWarp<kTiles>(p, warp, of)} *
                                                              plan::kTileColumns *
                                                              sizeof(plan::ColumnInfo);
    WINTSERVE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      columns[i] =
          LoadLaneColumns(infos + i * plan::kTileColumns * sizeof(plan::ColumnInfo), warp.lane / 4);
    }
  };
  // 0, but the compiler cannot know.
  const auto constants = Codec::MakeConstants(static_cast<uint32_t>(schedule.first_tile[0]));
  LaneColumns columns[kTiles];
  load_columns(item, columns);
  // Up to here weights and the schedule.
  BeginAfterPreviousKernel();
  StreamTokens tokens =
      p.prepares_row
          ? PrepareOwnRow(p, warp.lane,
                          reinterpret_cast<uint8_t*>(sums) + 2 * plan::StreamSumsBytes(kTiles))
          : LocateTokens(p, schedule, item, thread);

  for (int index = item_begin; index < item_end; ++index) {
    // The next item's columns come from memory while this one is computed.
    StreamCursor next_item = item;
    LaneColumns next_columns[kTiles];
    if (index + 1 < item_end) {
      next_item.Advance(schedule, p.num_experts, warp.num_row_blocks);
    }
    load_columns(next_item, next_columns);

    float total[kTiles][4] = {};
    uint32_t b_first[4][2];
    uint32_t b_second[4][2];
    uint32_t halves[2] = {};  // corrections of both groups
    const auto load_first = [&](int chunk) {
      LoadOperandB(tokens.values + int64_t{chunk} * (plan::kChunkRows * 2), 0, b_first);
      if constexpr (Codec::kHasCorrections) {
        const uint2 words =
            LoadFreshAnywhere(reinterpret_cast<const uint2*>(tokens.corrections + chunk));
        halves[0] = words.x;
        halves[1] = words.y;
      }
    };
    load_first(warp.chunk_begin);
    for (int chunk = warp.chunk_begin; chunk < warp.chunk_end; ++chunk) {
      // The copies of this chunk have landed, for all lanes; and all have read the chunk before,
      // whose place is filled next.
      WaitForCopies<Ring::kStages - 2>();
      SyncWarp();
      ring.Issue(shared + previous_stage);
      LoadOperandB(tokens.values + int64_t{chunk} * (plan::kChunkRows * 2), 1, b_second);
      typename Codec::Packed packed[kTiles];
      float scales[kTiles][2][2] = {};
      WINTSERVE_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        const uint8_t* record = shared + stage + i * Ring::kRecordBytes;
        packed[i] = Codec::LoadPacked(record);
        if constexpr (Codec::kHasLocalScales) {
          Codec::LoadLocalScales(record + to_scales, constants, scales[i]);
        }
      }
      float corrections[2][4] = {};
      if constexpr (Codec::kHasCorrections) {
        SpreadCorrection(halves, 0, warp.lane, corrections[0]);
        SpreadCorrection(halves, 1, warp.lane, corrections[1]);
      }
      AddStreamGroup<Codec, kTiles>(packed, 0, columns, scales, constants, b_first, corrections[0],
                                    total);
      if (chunk + 1 < warp.chunk_end) load_first(chunk + 1);
      AddStreamGroup<Codec, kTiles>(packed, 1, columns, scales, constants, b_second, corrections[1],
                                    total);
      previous_stage = stage;
      stage = stage + Ring::kStageBytes == ring_end ? ring_begin : stage + Ring::kStageBytes;
    }

    // Two buffers of sums in turn: the one that is written now was read before the last barrier.
    float* item_sums = sums + (index & 1) * plan::kProductWarps * kTiles * plan::kTileSumFloats;
    WINTSERVE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      float* own = item_sums + (warp_index * kTiles + i) * plan::kTileSumFloats +
                   warp.lane % 4 * 2 * plan::kSumStride + warp.lane / 4;
      own[0] = total[i][0] * columns[i].scale[0];
      own[plan::kSumStride] = total[i][1] * columns[i].scale[0];
      own[8] = total[i][2] * columns[i].scale[1];
      own[plan::kSumStride + 8] = total[i][3] * columns[i].scale[1];
    }
    SyncBlock();
    StoreStreamSums<kTiles>(p, schedule, item, row_warps, item_sums, tokens.inverse_scale);

    if (next_item.expert != item.expert || next_item.token_tile != item.token_tile) {
      tokens = LocateTokens(p, schedule, next_item, thread);
    }
    item = next_item;
    WINTSERVE_UNROLL
    for (int i = 0; i < kTiles; ++i) columns[i] = next_columns[i];
  }
}

}  // namespace wintserve::kernels::cuda
