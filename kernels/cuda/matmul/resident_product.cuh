// The resident kernel: up to 8 tokens times WINT2 weights, at the speed of their decoding.
//
// A block has one warp a slice of k. A warp keeps its slice of the tokens' activations in registers
// and its weights stream past: for each tile of 16 columns the records of the slice and the
// columns' lines, through a ring of its own that runs on from tile to tile and from expert to
// expert. The warps' sums of a round of tiles meet in shared memory, in two buffers in turn. Some
// warps, others each time, add up the round before while all compute, so that no warp waits for
// another as long as none is a round behind.
//
// Tiles lie in order of expert, token tile, columns, and a block takes consecutive ones. A run is
// those of the same tokens.
//
// The kernel may begin while the one before it runs: until WaitForPreviousKernel it reads weights,
// first_token and source_row only, which are older.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/cuda/matmul/schedule.cuh"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {

// One warp's ring of weights. A stage holds the records of its slice of a tile, then the tile's
// ColumnInfos. All slices are copied as if they were kChunks long: behind a shorter one lies the
// next (the last is the longest).
template <int kChunks>
class ResidentRing {
 public:
  static constexpr int kRecordBytes = plan::ChunkBytes(formats::WeightFormat::kWint2);
  static constexpr int kStages = plan::ResidentStages(kChunks);
  static constexpr int kStageBytes = plan::ResidentStageBytes(kChunks);
  static constexpr int kColumns = kChunks * kRecordBytes;  // where they lie in a stage

  // chunk_begin: of the slice. The first of num_tiles tiles is `tile` of token tile `token_tile`.
  WINTSERVE_DEVICE ResidentRing(const ProductParams& p, const Schedule& schedule, int lane,
                                int chunk_begin, int token_tile, int tile, int num_tiles)
      : p_(p),
        schedule_(schedule),
        lane_(lane),
        offset_(static_cast<uint32_t>(p.records_offset) + chunk_begin * kRecordBytes + lane * 16),
        tail_offset_(lane < kTailCopies ? offset_ + kChunks * plan::kUnitBytes
                                        : (lane - kTailCopies) * 16),
        token_tile_(token_tile),
        tile_(tile),
        left_(num_tiles),
        expert_(ExpertOfTile(schedule, p.num_experts, token_tile)) {}

  // Starts the copies of the next tile, if there is one, to a stage. A group of copies a call.
  WINTSERVE_DEVICE void Issue(uint8_t* stage) {
    if (left_ > 0) {
      const uint8_t* weights = p_.experts.weights[expert_];
      const uint32_t tile_bytes = static_cast<uint32_t>(p_.chunks) * kRecordBytes;
      const uint32_t tail_bytes = lane_ < kTailCopies ? tile_bytes : kColumnCopies * 16;
      const auto tile = static_cast<uint32_t>(tile_);
      const uint8_t* records = weights + (offset_ + tile * tile_bytes);
      const uint8_t* tail = weights + (tail_offset_ + tile * tail_bytes);
      uint8_t* to = stage + lane_ * 16;
      WINTSERVE_UNROLL
      for (int i = 0; i < kChunks; ++i) {
        CopyToSharedIf(true, SharedAddressOf(to + i * plan::kUnitBytes),
                       records + i * plan::kUnitBytes);
      }
      CopyToSharedIf(lane_ < kTailCopies + kColumnCopies,
                     SharedAddressOf(to + kChunks * plan::kUnitBytes), tail);
      --left_;
      if (++tile_ == p_.tiles && left_ > 0) {
        tile_ = 0;
        ++token_tile_;
        expert_ = ExpertOfTile(schedule_, p_.num_experts, token_tile_);
      }
    }
    CommitCopies();
  }

 private:
  // Sixteen bytes each: what whole loads of a warp leave of the records, and the columns behind.
  static constexpr int kTailCopies = kChunks;
  static constexpr int kColumnCopies =
      plan::kTileColumns * static_cast<int>(sizeof(plan::ColumnInfo)) / 16;
  static_assert(kRecordBytes == plan::kUnitBytes + 16 && kTailCopies + kColumnCopies <= 32);

  const ProductParams& p_;
  const Schedule& schedule_;
  const int lane_;
  // The lane's, of tile 0. A matrix has less than 2^32 bytes.
  const uint32_t offset_;
  const uint32_t tail_offset_;
  int token_tile_;  // over all experts
  int tile_;
  int left_;
  int expert_;
};

// A slice of the activations of 8 tokens as B operands: [chunk][group][mma][register]. Beyond the
// last token stands the last again; the sums of such columns of the mma are not stored.
template <int kChunks>
struct ResidentTokens {
  uint32_t b[kChunks][plan::kGroupsPerChunk][4][2];
};

// row(token): of the prepared activations. Corrections go to shared memory as accumulators have
// them: [chunk][group][t] tokens 2t, 2t + 1, 2t, 2t + 1.
template <class Codec, int kChunks, class RowOf>
WINTSERVE_DEVICE void LoadTokens(const ProductParams& p, const RowOf& row, int lane,
                                 int chunk_begin, ResidentTokens<kChunks>* tokens,
                                 uint8_t* corrections) {
  const auto* values = reinterpret_cast<const uint8_t*>(p.x.values) +
                       (row(lane / 4) * p.chunks + chunk_begin) * (plan::kChunkRows * 2) +
                       lane % 4 * 16;
  WINTSERVE_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    WINTSERVE_UNROLL
    for (int quarter = 0; quarter < 4; ++quarter) {
      const uint4 words =
          LoadFresh(reinterpret_cast<const uint4*>(values + (4 * c + quarter) * 64));
      uint32_t(&b)[4][2] = tokens->b[c][quarter / 2];
      const int m = quarter % 2 * 2;
      b[m][0] = words.x;
      b[m][1] = words.y;
      b[m + 1][0] = words.z;
      b[m + 1][1] = words.w;
    }
  }
  if constexpr (Codec::kHasCorrections) {
    SyncWarp();  // all have read those of the run before
    if (lane < kChunks * 8) {
      const int t = lane % 4;
      const auto value = [&](int token) {
        return FloatToBits(
            LoadFresh(p.x.corrections[row(token) * p.chunks + chunk_begin + lane / 8].values +
                      lane / 4 % plan::kGroupsPerChunk));
      };
      const uint32_t even = value(2 * t);
      const uint32_t odd = value(2 * t + 1);
      StoreAligned(corrections + lane * 16, uint4{even, odd, even, odd});
    }
    SyncWarp();
  }
}

// Sums of the warp's slice, not yet scaled, for one tile. stage: as ResidentRing fills it.
// long_slice: it has kChunks chunks, else one less.
template <class Codec, int kChunks>
WINTSERVE_DEVICE void SumTile(const uint8_t* stage, int lane, bool long_slice,
                              const ResidentTokens<kChunks>& tokens, const uint8_t* corrections,
                              const typename Codec::Constants& constants, float (&total)[4]) {
  using Ring = ResidentRing<kChunks>;
  const int g = lane / 4;
  const uint8_t* infos = stage + Ring::kColumns + g * sizeof(plan::ColumnInfo);
  LaneColumns columns;
  WINTSERVE_UNROLL
  for (int upper = 0; upper < 2; ++upper) {
    const uint2 line = LoadAligned<uint2>(infos + upper * 8 * sizeof(plan::ColumnInfo));
    columns.multiplier[upper] = line.x;
    columns.offset[upper] = line.y;
  }
  WINTSERVE_UNROLL
  for (int c = 0; c < kChunks; ++c) {
    if (c > 0 && c + 1 == kChunks && !long_slice) break;
    const uint8_t* record = stage + c * Ring::kRecordBytes;
    const auto packed = Codec::LoadPacked(record + lane * 16);
    float scales[2][2];
    Codec::LoadLocalScales(record + plan::kUnitBytes + g * 2, constants, scales);
    WINTSERVE_UNROLL
    for (int group = 0; group < plan::kGroupsPerChunk; ++group) {
      float correction[4] = {};
      if constexpr (Codec::kHasCorrections) {
        const uint4 words = LoadAligned<uint4>(corrections + (2 * c + group) * 64 + lane % 4 * 16);
        correction[0] = BitsToFloat(words.x);
        correction[1] = BitsToFloat(words.y);
        correction[2] = BitsToFloat(words.z);
        correction[3] = BitsToFloat(words.w);
      }
      uint32_t a[4][4];
      Codec::Decode(packed, group, columns, scales[group], constants, a);
      Codec::Accumulate(a, tokens.b[c][group], correction, scales[group], total);
    }
  }
}

// A round's part of shared memory beside its sums.
struct ResidentRound {
  int tile;  // the first
  int num_tiles;
  int first_token;
  int num_tokens;
  float scales[plan::kBlockTokens];
};
static_assert(sizeof(ResidentRound) == plan::kResidentRoundBytes);

// One warp's share of a round: 16 rows of tokens `pair` and pair + 4 of its tile number i, over all
// slices in order. sums: [tile][slice][token][row], a token kSumStride floats
WINTSERVE_DEVICE void StoreRows(const ProductParams& p, const ResidentRound& round, int i, int pair,
                                const float* sums) {
  const int lane = ThreadIndex() % 32;
  const int row = lane % plan::kTileColumns;
  const int token = pair + lane / plan::kTileColumns * 4;
  const float* slice = sums + i * p.slices * plan::kTileSumFloats + token * plan::kSumStride + row;
  float sum = *slice;
  WINTSERVE_UNROLL_BY(4)
  for (int s = 1; s < p.slices; ++s) sum = Add(sum, slice[s * plan::kTileSumFloats]);
  sum *= round.scales[token];
  const bool stored = token < round.num_tokens;
  const int tile = round.tile + i;
  float* y = p.y + (round.first_token + token) * p.y_stride;
  if (p.epilogue == Epilogue::kStore) {
    const int column = tile * plan::kTileColumns + row;
    if (stored && column < p.columns) y[column] = sum;
  } else {
    constexpr int kHalf = plan::kTileColumns / 2;
    const float up = ShuffleXor(sum, kHalf);
    const int column = tile * kHalf + row;
    if (row < kHalf && stored && column < p.columns) y[column] = SwiGlu(sum, up);
  }
}

// Where things lie in shared memory.
template <int kChunks>
struct ResidentShared {
  using Ring = ResidentRing<kChunks>;
  static constexpr int kBufferFloats = plan::kResidentRoundTiles * plan::kTileSumFloats;

  WINTSERVE_DEVICE ResidentShared(const ProductParams& p, uint8_t* shared)
      : full(shared + plan::ScheduleBytes(p.num_experts)),
        empty(full + 16),
        rounds(full + 32),
        corrections(rounds + 2 * plan::kResidentRoundBytes),
        rings(corrections + p.slices * plan::ResidentCorrectionBytes(kChunks)),
        sums(reinterpret_cast<float*>(rings + p.slices * Ring::kStages * Ring::kStageBytes)) {}

  uint8_t* full;   // [2] barriers: all warps have left their sums of a round
  uint8_t* empty;  // [2] they have been read
  uint8_t* rounds;
  uint8_t* corrections;
  uint8_t* rings;
  float* sums;  // [2][tile][slice][token][row]
};

WINTSERVE_DEVICE void WaitFor(const uint8_t* barrier, uint32_t parity) {
  WaitAtBarrier(SharedAddressOf(barrier), parity);
}

// Adds up round number `index`: each warp its shares, the first of which is `share`.
template <int kChunks>
WINTSERVE_DEVICE void StoreRound(const ProductParams& p, const ResidentShared<kChunks>& shared,
                                 unsigned index, int share) {
  constexpr int kShares = 4 * plan::kResidentRoundTiles;
  if (share >= kShares) return;
  const unsigned buffer = index % 2;
  WaitFor(shared.full + 8 * buffer, index / 2 % 2);
  const auto& round =
      *reinterpret_cast<const ResidentRound*>(shared.rounds + buffer * plan::kResidentRoundBytes);
  const float* sums = shared.sums + buffer * p.slices * shared.kBufferFloats;
  for (; share < kShares; share += p.slices) {
    if (share / 4 < round.num_tiles && share % 4 < round.num_tokens) {
      StoreRows(p, round, share / 4, share % 4, sums);
    }
    SyncWarp();
    ArriveForWarp(ThreadIndex() % 32, SharedAddressOf(shared.empty + 8 * buffer));
  }
}

// shared: plan::SharedBytes; grid: any number of blocks of 32 * slices threads.
template <class Codec, int kChunks>
WINTSERVE_DEVICE void ResidentProduct(const ProductParams& p, uint8_t* shared_memory) {
  using Ring = ResidentRing<kChunks>;
  constexpr int kRound = plan::kResidentRoundTiles;
  const ResidentShared<kChunks> shared(p, shared_memory);
  if (ThreadIndex() == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      InitBarrier(SharedAddressOf(shared.full + 8 * buffer), p.slices * kWarpArrivals);
      InitBarrier(SharedAddressOf(shared.empty + 8 * buffer), 4 * kRound * kWarpArrivals);
    }
  }
  const Schedule schedule = BuildSchedule(p, plan::kBlockTokens, shared_memory);
  const auto thread = static_cast<unsigned>(ThreadIndex());
  const int lane = static_cast<int>(thread % 32);
  const int slice = static_cast<int>(thread / 32);
  const int64_t num_tiles = int64_t{schedule.num_token_tiles} * p.tiles;
  const auto begin = static_cast<int>(plan::FirstItemOfBlock(num_tiles, NumBlocks(), BlockIndex()));
  const auto end =
      static_cast<int>(plan::FirstItemOfBlock(num_tiles, NumBlocks(), BlockIndex() + 1));
  if (begin == end) {
    WaitForPreviousKernel();
    return;
  }
  const int chunk_begin = plan::SliceBegin(p.chunks, p.slices, slice);
  const bool long_slice = plan::SliceBegin(p.chunks, p.slices, slice + 1) - chunk_begin == kChunks;
  int token_tile = begin / p.tiles;
  int tile = begin - token_tile * p.tiles;

  uint8_t* ring_begin = shared.rings + slice * Ring::kStages * Ring::kStageBytes;
  uint8_t* corrections = shared.corrections + slice * plan::ResidentCorrectionBytes(kChunks);
  Ring ring(p, schedule, lane, chunk_begin, token_tile, tile, end - begin);
  WINTSERVE_UNROLL
  for (int i = 0; i < Ring::kStages - 1; ++i) ring.Issue(ring_begin + i * Ring::kStageBytes);
  WaitForPreviousKernel();
  LetNextKernelBegin();

  // 0, but the compiler cannot know.
  const auto constants = Codec::MakeConstants(static_cast<uint32_t>(schedule.first_tile[0]));
  // The warps take turns in adding up rounds: the first share of a warp.
  const int turn = 4 * kRound % p.slices;
  int share = slice;
  const auto next_share = [&] { return share < turn ? share + p.slices - turn : share - turn; };
  int stage = 0;
  unsigned index = 0;  // of the round
  for (int left = end - begin; left > 0;) {
    const int expert = ExpertOfTile(schedule, p.num_experts, token_tile);
    const int first_token = schedule.first_token[expert] +
                            (token_tile - schedule.first_tile[expert]) * plan::kBlockTokens;
    const int tokens_left = schedule.first_token[expert + 1] - first_token;
    const int num_tokens = tokens_left < plan::kBlockTokens ? tokens_left : plan::kBlockTokens;
    const auto row = [&](int token) -> int64_t {
      const int of_expert = first_token + (token < num_tokens ? token : num_tokens - 1);
      return p.source_row == nullptr ? of_expert : LoadFresh(p.source_row + of_expert);
    };
    ResidentTokens<kChunks> tokens;
    LoadTokens<Codec>(p, row, lane, chunk_begin, &tokens, corrections);
    float inverse_scale = 0;
    if (slice == 0 && lane < plan::kBlockTokens) {
      inverse_scale = LoadFresh(p.x.inverse_scale + row(lane));
    }

    int tiles_of_run = p.tiles - tile < left ? p.tiles - tile : left;
    left -= tiles_of_run;
    for (; tiles_of_run > 0; ++index) {
      const unsigned buffer = index % 2;
      const int round_tiles = tiles_of_run < kRound ? tiles_of_run : kRound;
      float* own = shared.sums + (buffer * kRound * p.slices + slice) * plan::kTileSumFloats +
                   lane % 4 * 2 * plan::kSumStride + lane / 4;
      for (int i = 0; i < round_tiles; ++i) {
        // The copies of this tile have landed, for all lanes; and all have read the tile before,
        // whose place is filled next.
        WaitForCopies<Ring::kStages - 2>();
        SyncWarp();
        ring.Issue(ring_begin + (stage == 0 ? Ring::kStages - 1 : stage - 1) * Ring::kStageBytes);
        const uint8_t* here = ring_begin + stage * Ring::kStageBytes;
        float total[4] = {};
        SumTile<Codec>(here, lane, long_slice, tokens, corrections, constants, total);
        stage = stage + 1 == Ring::kStages ? 0 : stage + 1;
        if (i == 0 && index >= 2) {
          WaitFor(shared.empty + 8 * buffer, (index / 2 % 2) ^ 1);
        }
        const uint8_t* scales = here + Ring::kColumns + lane / 4 * sizeof(plan::ColumnInfo) +
                                offsetof(plan::ColumnInfo, scale);
        const float low = LoadAligned<float>(scales);
        const float high = LoadAligned<float>(scales + 8 * sizeof(plan::ColumnInfo));
        own[0] = total[0] * low;
        own[plan::kSumStride] = total[1] * low;
        own[8] = total[2] * high;
        own[plan::kSumStride + 8] = total[3] * high;
        own += p.slices * plan::kTileSumFloats;
      }
      if (slice == 0 && lane < plan::kBlockTokens) {
        auto* round =
            reinterpret_cast<ResidentRound*>(shared.rounds + buffer * plan::kResidentRoundBytes);
        if (lane == 0) {
          round->tile = tile;
          round->num_tiles = round_tiles;
          round->first_token = first_token;
          round->num_tokens = num_tokens;
        }
        round->scales[lane] = inverse_scale;
      }
      SyncWarp();
      ArriveForWarp(lane, SharedAddressOf(shared.full + 8 * buffer));
      if (index > 0) {
        StoreRound<kChunks>(p, shared, index - 1, share);
        share = next_share();
      }
      tile += round_tiles;
      tiles_of_run -= round_tiles;
    }
    ++token_tile;
    tile = 0;
  }
  StoreRound<kChunks>(p, shared, index - 1, share);
}

}  // namespace wintserve::kernels::cuda
