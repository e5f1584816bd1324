// The tile kernel: 16, 32 or 64 tokens at a time, each weight decoded once for all of them.
//
// A block of 8 warps takes an item: the tokens and 16 tiles of columns, two a warp. All warps read
// the same activations, which pass through shared memory beside the weights, a chunk of k a stage.
// Slices of k are summed one after another and added in order, or (split_sums) a block sums one
// slice only.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/cuda/matmul/schedule.cuh"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {

// Copies the stages of one item. Every thread copies part of each stage: records of 16 tiles,
// activations, corrections.
template <class Codec, int kBlocks>
class TileLoader {
 public:
  static constexpr int kTiles = 2;  // a warp's
  static constexpr int kUnits = plan::UnitsPerChunk(Codec::kFormat);
  static constexpr int kRecordBytes = plan::ChunkBytes(Codec::kFormat);
  static constexpr int kTokens = kBlocks * plan::kBlockTokens;
  static constexpr int kStageBytes = plan::TileStageBytes(Codec::kFormat, kBlocks);
  static constexpr int kActivations = plan::kTileKernelTiles * kRecordBytes;
  static constexpr int kCorrections = kActivations + plan::TileStageActivations(kBlocks);
  static_assert(kCorrections + plan::TileStageCorrections(Codec::kFormat, kBlocks) == kStageBytes);
  // A thread copies one float: [group][block][t][4].
  static constexpr int kCorrectionFloats = plan::kGroupsPerChunk * kTokens * 2;
  static_assert(kCorrectionFloats <= plan::kProductThreads);

  // first, last: tokens of the item's tile and of its expert, over all experts.
  WINTSERVE_DEVICE TileLoader(const ProductParams& p, const uint8_t* weights, int tile, int first,
                              int last, int chunk)
      : chunks_(p.chunks), lane_(ThreadIndex() % 32), warp_(ThreadIndex() / 32) {
    weights_ =
        weights + p.records_offset + (int64_t{tile} * p.chunks + chunk) * kRecordBytes + lane_ * 16;
    const auto row = [&](int token) {
      return SourceRow(p, first + token < last ? first + token : last);
    };
    // A warp copies the activations of the same 8 tokens in each stage.
    const int block = warp_ % kBlocks;
    copies_block_ = first + block / 2 * 2 * plan::kBlockTokens <= last;
    values_ =
        reinterpret_cast<const uint8_t*>(p.x.values) +
        (row(block * plan::kBlockTokens + lane_ / 4) * p.chunks + chunk) * plan::kChunkRows * 2 +
        lane_ % 4 * 16;
    const int thread = ThreadIndex();
    const int place = thread % (kTokens * 2);
    const int token = place / 16 * plan::kBlockTokens + place / 4 % 4 * 2 + place % 2;
    corrections_ = p.x.corrections[row(token) * p.chunks + chunk].values +
                   thread / (kTokens * 2) % plan::kGroupsPerChunk;
  }

  // Starts the copies of the next chunk, without closing their group.
  WINTSERVE_DEVICE void Issue(uint8_t* stage) {
    WINTSERVE_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      uint8_t* to = stage + (warp_ * kTiles + tile) * kRecordBytes;
      const uint8_t* from = weights_ + int64_t{tile} * chunks_ * kRecordBytes;
      WINTSERVE_UNROLL
      for (int unit = 0; unit < kUnits; ++unit) {
        CopyToShared(SharedAddressOf(to + unit * plan::kUnitBytes + lane_ * 16),
                     from + unit * plan::kUnitBytes);
      }
      if constexpr (Codec::kHasLocalScales) {
        // from is lane 0's.
        if (lane_ == 0) {
          CopyToShared(SharedAddressOf(to + kUnits * plan::kUnitBytes),
                       from + kUnits * plan::kUnitBytes);
        }
      }
    }
    weights_ += kRecordBytes;
    if (copies_block_) {
      WINTSERVE_UNROLL
      for (int i = 0; i < kBlocks / 2; ++i) {
        // 2 * group + pair; with it the 8 tokens' 512 bytes are what a warp loads as B operand.
        const int quarter = warp_ / kBlocks + i * (plan::kProductWarps / kBlocks);
        CopyToShared(
            SharedAddressOf(stage + kActivations +
                            (quarter * kBlocks + warp_ % kBlocks) * plan::kUnitBytes + lane_ * 16),
            values_ + quarter * 64);
      }
    }
    values_ += plan::kChunkRows * 2;
    if constexpr (Codec::kHasCorrections) {
      const int thread = warp_ * 32 + lane_;
      if (thread < kCorrectionFloats) {
        CopyWordToShared(SharedAddressOf(stage + kCorrections + thread * 4), corrections_);
      }
      corrections_ += sizeof(ChunkCorrections) / sizeof(float);
    }
  }

 private:
  const int chunks_;
  const int lane_;
  const int warp_;
  bool copies_block_;
  const uint8_t* weights_;
  const uint8_t* values_;
  const float* corrections_;
};

// Adds one group of a stage to the sums of the warp's two tiles, for the first num_blocks blocks
// of 8 tokens (rounded up to two).
template <class Codec, int kBlocks>
WINTSERVE_DEVICE void AddTileGroup(const uint8_t* stage, const typename Codec::Packed (&packed)[2],
                                   int group, const LaneColumns (&columns)[2],
                                   const float (&scales)[2][2][2],
                                   const typename Codec::Constants& constants, int num_blocks,
                                   float (&total)[2][kBlocks][4]) {
  using Loader = TileLoader<Codec, kBlocks>;
  const int lane = ThreadIndex() % 32;
  uint32_t a[2][4][4];
  WINTSERVE_UNROLL
  for (int tile = 0; tile < 2; ++tile) {
    Codec::Decode(packed[tile], group, columns[tile], scales[tile][group], constants, a[tile]);
  }
  WINTSERVE_UNROLL
  for (int two = 0; two < kBlocks; two += 2) {
    if (two >= num_blocks) break;
    WINTSERVE_UNROLL
    for (int block = two; block < two + 2; ++block) {
      uint32_t b[4][2];
      WINTSERVE_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        const uint4 words = LoadAligned<uint4>(
            stage + Loader::kActivations +
            ((2 * group + pair) * kBlocks + block) * plan::kUnitBytes + lane * 16);
        b[2 * pair][0] = words.x;
        b[2 * pair][1] = words.y;
        b[2 * pair + 1][0] = words.z;
        b[2 * pair + 1][1] = words.w;
      }
      float correction[4] = {};
      if constexpr (Codec::kHasCorrections) {
        const uint4 words =
            LoadAligned<uint4>(stage + Loader::kCorrections +
                               ((group * kBlocks + block) * 4 + lane % 4) * 4 * sizeof(float));
        correction[0] = BitsToFloat(words.x);
        correction[1] = BitsToFloat(words.y);
        correction[2] = BitsToFloat(words.z);
        correction[3] = BitsToFloat(words.w);
      }
      WINTSERVE_UNROLL
      for (int tile = 0; tile < 2; ++tile) {
        Codec::Accumulate(a[tile], b, correction, scales[tile][group], total[tile][block]);
      }
    }
  }
}

// Stores the sums of the warp's two tiles. first, last: as in TileLoader.
template <int kBlocks>
WINTSERVE_DEVICE void StoreTileSums(const ProductParams& p, int first_tile, int first, int last,
                                    int slice, const float (&sums)[2][kBlocks][4]) {
  const int g = ThreadIndex() % 32 / 4;
  const int t = ThreadIndex() % 4;
  WINTSERVE_UNROLL
  for (int block = 0; block < kBlocks; ++block) {
    WINTSERVE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int token = first + block * plan::kBlockTokens + 2 * t + j;
      if (token > last) continue;
      const float inverse_scale =
          p.split_sums != nullptr ? 1.0f : p.x.inverse_scale[SourceRow(p, token)];
      WINTSERVE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int tile = first_tile + i;
        const float low = sums[i][block][j] * inverse_scale;
        const float high = sums[i][block][2 + j] * inverse_scale;
        if (p.split_sums != nullptr) {
          float* to =
              p.split_sums +
              ((int64_t{slice} * p.num_tokens + token) * p.tiles + tile) * plan::kTileColumns + g;
          to[0] = low;
          to[8] = high;
        } else if (p.epilogue == Epilogue::kSwiGlu) {
          const int column = tile * (plan::kTileColumns / 2) + g;
          if (column < p.columns) p.y[token * p.y_stride + column] = SwiGlu(low, high);
        } else {
          const int column = tile * plan::kTileColumns + g;
          float* to = p.y + token * p.y_stride + column;
          if (column < p.columns) to[0] = low;
          if (column + 8 < p.columns) to[8] = high;
        }
      }
    }
  }
}

// shared: plan::SharedBytes; grid: any number of blocks of kProductThreads.
template <class Codec, int kBlocks>
WINTSERVE_DEVICE void TileProduct(const ProductParams& p, uint8_t* shared) {
  using Loader = TileLoader<Codec, kBlocks>;
  constexpr int kStages = plan::TileStages(Codec::kFormat);
  const Schedule schedule = BuildSchedule(p, Loader::kTokens, shared);
  uint8_t* stages = shared + plan::ScheduleBytes(p.num_experts);
  const int lane = ThreadIndex() % 32;
  const int warp = ThreadIndex() / 32;
  const int num_row_blocks = plan::DivideUp(p.tiles, plan::kTileKernelTiles);
  const auto constants = Codec::MakeConstants(0);
  const int items_of_slice = schedule.num_token_tiles * num_row_blocks;
  const bool split = p.split_sums != nullptr;
  const int num_items = split ? items_of_slice * p.slices : items_of_slice;

  int expert = 0;
  for (int index = BlockIndex(); index < num_items; index += NumBlocks()) {
    const int first_slice = split ? index / items_of_slice : 0;
    const int end_slice = split ? first_slice + 1 : p.slices;
    if (split) expert = 0;  // the next slice begins with the first item again
    const Item item = schedule.Locate(index - (split ? first_slice * items_of_slice : 0),
                                      num_row_blocks, &expert);
    const int first = schedule.first_token[item.expert] + item.token_tile * Loader::kTokens;
    const int last = schedule.first_token[item.expert + 1] - 1;
    const int num_blocks = plan::DivideUp(last + 1 - first, plan::kBlockTokens);
    const int own_tile = item.row_block * plan::kTileKernelTiles + warp * 2;
    const int tile = ClampTile(p, own_tile, 2);
    const uint8_t* weights = p.experts.weights[item.expert];
    const int chunk_begin = plan::SliceBegin(p.chunks, p.slices, first_slice);
    const int chunk_end = plan::SliceBegin(p.chunks, p.slices, end_slice);

    Loader loader(p, weights, tile, first, last, chunk_begin);
    SyncBlock();  // the stages of the item before have been read
    WINTSERVE_UNROLL
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (chunk_begin + stage < chunk_end) loader.Issue(stages + stage * Loader::kStageBytes);
      CommitCopies();
    }
    LaneColumns columns[2];
    WINTSERVE_UNROLL
    for (int i = 0; i < 2; ++i) {
      columns[i] = LoadLaneColumns(
          weights + (int64_t{tile} + i) * plan::kTileColumns * sizeof(plan::ColumnInfo), lane / 4);
    }

    float total[2][kBlocks][4] = {};
    float sums[2][kBlocks][4] = {};
    int slice = first_slice;
    int slice_end = plan::SliceBegin(p.chunks, p.slices, slice + 1);
    int stage = 0;
    for (int chunk = chunk_begin; chunk < chunk_end; ++chunk) {
      // The copies of this chunk have landed, for all threads; and all have read the chunk before,
      // whose place is filled next.
      WaitForCopies<kStages - 2>();
      SyncBlock();
      const int fill_stage = stage == 0 ? kStages - 1 : stage - 1;
      if (chunk + kStages - 1 < chunk_end) loader.Issue(stages + fill_stage * Loader::kStageBytes);
      CommitCopies();
      const uint8_t* here = stages + stage * Loader::kStageBytes;
      typename Codec::Packed packed[2];
      float scales[2][2][2] = {};
      WINTSERVE_UNROLL
      for (int i = 0; i < 2; ++i) {
        const uint8_t* record = here + (warp * 2 + i) * Loader::kRecordBytes;
        packed[i] = Codec::LoadPacked(record + lane * 16);
        if constexpr (Codec::kHasLocalScales) {
          Codec::LoadLocalScales(record + Loader::kUnits * plan::kUnitBytes + lane / 4 * 2,
                                 constants, scales[i]);
        }
      }
      AddTileGroup<Codec, kBlocks>(here, packed, 0, columns, scales, constants, num_blocks, total);
      AddTileGroup<Codec, kBlocks>(here, packed, 1, columns, scales, constants, num_blocks, total);
      stage = stage + 1 == kStages ? 0 : stage + 1;

      if (chunk + 1 == slice_end) {
        WINTSERVE_UNROLL
        for (int i = 0; i < 2; ++i) {
          WINTSERVE_UNROLL
          for (int block = 0; block < kBlocks; ++block) {
            WINTSERVE_UNROLL
            for (int c = 0; c < 4; ++c) {
              const float scaled = total[i][block][c] * columns[i].scale[c / 2];
              sums[i][block][c] = slice == first_slice ? scaled : Add(sums[i][block][c], scaled);
              total[i][block][c] = 0;
            }
          }
        }
        ++slice;
        slice_end = plan::SliceBegin(p.chunks, p.slices, slice + 1);
      }
    }
    if (own_tile < p.tiles) {
      StoreTileSums<kBlocks>(p, tile, first, last, first_slice, sums);
    }
  }
}

// y of a product whose slices lie in split_sums. Block: 256 columns of one token.
WINTSERVE_DEVICE void AddSlices(const ProductParams& p) {
  const int column_blocks = plan::DivideUp(p.columns, kRowThreads);
  const int token = BlockIndex() / column_blocks;
  const int column = BlockIndex() % column_blocks * kRowThreads + ThreadIndex();
  if (column >= p.columns) return;
  const auto add_slices = [&](int tile, int row) {
    const float* slice =
        p.split_sums + (int64_t{token} * p.tiles + tile) * plan::kTileColumns + row;
    float sum = *slice;
    for (int s = 1; s < p.slices; ++s) {
      sum = Add(sum, slice[int64_t{s} * p.num_tokens * p.tiles * plan::kTileColumns]);
    }
    return sum * p.x.inverse_scale[SourceRow(p, token)];
  };
  float* y = p.y + token * p.y_stride + column;
  if (p.epilogue == Epilogue::kStore) {
    *y = add_slices(column / plan::kTileColumns, column % plan::kTileColumns);
  } else {
    constexpr int kHalf = plan::kTileColumns / 2;
    *y = SwiGlu(add_slices(column / kHalf, column % kHalf),
                add_slices(column / kHalf, column % kHalf + kHalf));
  }
}

}  // namespace wintserve::kernels::cuda
