// The cached kernel: up to 8 tokens times WINT2 weights of a long k, at the speed of their
// decoding.
//
// A block has a multiprocessor to itself. The activations of 8 tokens lie in its shared memory,
// ordered as B operands, for all its warps. The warps form groups of one warp a slice of k. A group
// takes kTiles tiles of 16 columns at a time, a step: each of its warps sums its slice of k, so
// that what it reads of the activations serves all tiles of the step. Weights come through a ring
// of the warp's own that runs on from step to step and from expert to expert. The warps' sums of a
// step meet in shared memory, in two buffers in turn; they are added up a step later, by all warps
// of the group, so that none waits for another as long as none is a step behind.
//
// Tiles lie in order of expert, token tile, columns, and a block takes consecutive ones. A run is
// those of the same tokens; the block's groups take the tiles in turn.
//
// The kernel may begin while the one before it runs: until WaitForPreviousKernel it reads weights,
// first_token and source_row only, which are older.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/cuda/matmul/schedule.cuh"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {

// What a warp is.
struct CachedWarp {
  int lane;
  int group;
  int groups;
  int slice;
  int chunk_begin;  // its slice
  int chunks;
};

// The tiles of one step: `count` of them, of token tile `token_tile` over all experts.
template <int kTiles>
struct CachedStep {
  int token_tile;
  int tile[kTiles];
  int count;
};

// The steps of a group in order.
template <int kTiles>
class CachedSteps {
 public:
  // The block has tiles first … end - 1 in the order of all.
  WINTSERVE_DEVICE CachedSteps(const ProductParams& p, const CachedWarp& warp, int first, int end)
      : tiles_(p.tiles), groups_(warp.groups), end_(end), next_(first + warp.group) {
    OpenRun();
  }

  WINTSERVE_DEVICE bool done() const { return next_ >= end_; }
  WINTSERVE_DEVICE int token_tile() const { return token_tile_; }

  // REQUIRES: not done. Tiles that the step lacks repeat its first.
  WINTSERVE_DEVICE CachedStep<kTiles> Take() {
    CachedStep<kTiles> step;
    step.token_tile = token_tile_;
    step.count = 0;
    WINTSERVE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      const bool present = i == 0 || next_ < run_end_;
      step.tile[i] = present ? next_ - token_tile_ * tiles_ : step.tile[0];
      step.count += present ? 1 : 0;
      next_ += present ? groups_ : 0;
    }
    if (next_ >= run_end_) OpenRun();
    return step;
  }

 private:
  WINTSERVE_DEVICE void OpenRun() {
    if (next_ >= end_) return;
    token_tile_ = next_ / tiles_;
    run_end_ = (token_tile_ + 1) * tiles_;
    if (run_end_ > end_) run_end_ = end_;
  }

  const int tiles_;
  const int groups_;
  const int end_;
  int next_;
  int run_end_ = 0;
  int token_tile_ = 0;
};

// One warp's ring of weights. A stage holds, of each tile of the step, kStageChunks (1 or 2)
// records or the last one of the warp's slice.
template <int kTiles, int kStageChunks>
class CachedRing {
 public:
  static constexpr int kRecordBytes = plan::ChunkBytes(formats::WeightFormat::kWint2);
  static constexpr int kStages = plan::kCachedStages;
  static constexpr int kTileBytes = kStageChunks * kRecordBytes;  // in a stage
  static constexpr int kStageBytes = kTiles * kTileBytes;
  static_assert(kStageChunks <= 2 && kRecordBytes == plan::kUnitBytes + 16);

  WINTSERVE_DEVICE CachedRing(const ProductParams& p, const Schedule& schedule,
                              const CachedWarp& warp, const CachedSteps<kTiles>& steps)
      : p_(p), schedule_(schedule), warp_(warp), steps_(steps) {
    OpenStep();
  }

  // Starts the copies of the next stage, if there is one, to a stage (+ 16 * lane). A group of
  // copies a call.
  WINTSERVE_DEVICE void Issue(uint8_t* lane_stage) {
    if (chunks_left_ > 0) {
      const uint32_t to = SharedAddressOf(lane_stage);
      const bool two = kStageChunks == 2 && chunks_left_ > 1;
      WINTSERVE_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        // 33 times 16 bytes a record.
        CopyToShared(to + i * kTileBytes, from_[i]);
        CopyToSharedIf(two || warp_.lane == 0, to + i * kTileBytes + plan::kUnitBytes,
                       from_[i] + plan::kUnitBytes);
        if constexpr (kStageChunks == 2) {
          CopyToSharedIf(two && warp_.lane < 2, to + i * kTileBytes + 2 * plan::kUnitBytes,
                         from_[i] + 2 * plan::kUnitBytes);
        }
        from_[i] += kTileBytes;
      }
      chunks_left_ -= kStageChunks;
      if (chunks_left_ <= 0) OpenStep();
    }
    CommitCopies();
  }

 private:
  WINTSERVE_DEVICE void OpenStep() {
    chunks_left_ = 0;
    if (steps_.done()) return;
    const CachedStep<kTiles> step = steps_.Take();
    if (step.token_tile != token_tile_) {
      token_tile_ = step.token_tile;
      weights_ = p_.experts.weights[ExpertOfTile(schedule_, p_.num_experts, token_tile_)];
    }
    chunks_left_ = warp_.chunks;
    WINTSERVE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      // A matrix has less than 2^32 bytes.
      const auto tile = static_cast<uint32_t>(step.tile[i]);
      PrefetchToL2(weights_ + (tile * kInfosBytes + warp_.lane / 16 * 128));
      from_[i] =
          weights_ + (static_cast<uint32_t>(p_.records_offset) +
                      (tile * p_.chunks + warp_.chunk_begin) * kRecordBytes + warp_.lane * 16);
    }
  }

  static constexpr uint32_t kInfosBytes =
      plan::kTileColumns * sizeof(plan::ColumnInfo);  // a tile's

  const ProductParams& p_;
  const Schedule& schedule_;
  const CachedWarp& warp_;
  CachedSteps<kTiles> steps_;
  int token_tile_ = -1;
  const uint8_t* weights_ = nullptr;  // of its expert
  int chunks_left_ = 0;
  const uint8_t* from_[kTiles];  // the lane's of the next chunk
};

// Where things lie in shared memory.
template <int kTiles, int kStageChunks>
struct CachedShared {
  WINTSERVE_DEVICE CachedShared(const ProductParams& p, const CachedWarp& warp, uint8_t* shared) {
    const int warps = warp.groups * p.slices;
    tokens = shared + plan::ScheduleBytes(p.num_experts);
    uint8_t* barriers = tokens + plan::kCachedTokensBytes;
    full = barriers + warp.group * plan::kCachedBarrierBytes;
    empty = full + 2 * 8;
    activations = barriers + warp.groups * plan::kCachedBarrierBytes;
    corrections = activations + p.token_slots * plan::CachedTokenBytes(p.chunks);
    uint8_t* rings = corrections + p.chunks * plan::kCachedCorrectionBytes;
    using Ring = CachedRing<kTiles, kStageChunks>;
    constexpr int kRingBytes = Ring::kStages * Ring::kStageBytes;
    ring = static_cast<int>(rings - shared) + (warp.group * p.slices + warp.slice) * kRingBytes;
    sums = reinterpret_cast<float*>(rings + warps * kRingBytes) +
           warp.group * 2 * p.slices * kTiles * plan::kTileSumFloats;
  }

  uint8_t* tokens;       // [8] rows of the run's tokens, int32; [8] their inverse scales
  uint8_t* full;         // the group's [2] barriers: all its warps have left their sums of a step
  uint8_t* empty;        // [2] they have been read
  uint8_t* activations;  // [token][chunk][group][pair][t][8 positions] binary16
  uint8_t* corrections;  // [chunk][group][t] float32 of tokens 2t, 2t + 1, 2t, 2t + 1
  int ring;              // the warp's, from where shared memory begins
  float* sums;           // the group's [2][slice][tile][token][row], a token kSumStride floats
};

// A run: the tokens of one token tile.
struct CachedRun {
  int token_tile;
  int first_token;
  int num_tokens;
};

WINTSERVE_DEVICE CachedRun LocateRun(const ProductParams& p, const Schedule& schedule,
                                     int token_tile) {
  const int expert = ExpertOfTile(schedule, p.num_experts, token_tile);
  const int first = schedule.first_token[expert] +
                    (token_tile - schedule.first_tile[expert]) * plan::kBlockTokens;
  const int left = schedule.first_token[expert + 1] - first;
  return {token_tile, first, left < plan::kBlockTokens ? left : plan::kBlockTokens};
}

// For all threads of the block, with barriers: the rows of a run's tokens.
WINTSERVE_DEVICE void LocateCachedTokens(const ProductParams& p, const CachedRun& run,
                                         uint8_t* tokens) {
  const int thread = ThreadIndex();
  if (thread < run.num_tokens) {
    const int token = run.first_token + thread;
    const int row = p.source_row == nullptr ? token : LoadFresh(p.source_row + token);
    StoreAligned(tokens + thread * 4, row);
  }
  SyncBlock();
}

// Copies a run's tokens to shared memory, for all threads of the block. Of tokens beyond the last
// nothing is written.
template <class Shared>
WINTSERVE_DEVICE void LoadCachedTokens(const ProductParams& p, const CachedRun& run,
                                       int num_threads, const Shared& shared) {
  const int thread = ThreadIndex();
  const int units = p.chunks * (plan::kChunkRows * 2 / 16);  // 16 bytes each, of a token
  const auto row = [&](int token) {
    return int64_t{LoadAligned<int32_t>(shared.tokens + token * 4)};
  };
  for (int token = 0; token < run.num_tokens; ++token) {
    const auto* values =
        reinterpret_cast<const uint8_t*>(p.x.values) + row(token) * (int64_t{units} * 16);
    const uint32_t to =
        SharedAddressOf(shared.activations + token * plan::CachedTokenBytes(p.chunks));
    for (int unit = thread; unit < units; unit += num_threads) {
      CopyToShared(to + unit * 16, values + int64_t{unit} * 16);
    }
  }
  CommitCopies();
  for (int i = thread; i < p.chunks * 8; i += num_threads) {
    const int chunk = i / 8;
    const int group = i / 4 % plan::kGroupsPerChunk;
    const auto value = [&](int token) {
      if (token >= run.num_tokens) return 0u;
      return FloatToBits(LoadFresh(p.x.corrections[row(token) * p.chunks + chunk].values + group));
    };
    const uint32_t even = value(i % 4 * 2);
    const uint32_t odd = value(i % 4 * 2 + 1);
    StoreAligned(shared.corrections + i * 16, uint4{even, odd, even, odd});
  }
  if (thread < run.num_tokens) {
    StoreAligned(shared.tokens + (plan::kBlockTokens + thread) * 4,
                 LoadFresh(p.x.inverse_scale + row(thread)));
  }
  WaitForCopies<0>();
  SyncBlock();
}

WINTSERVE_DEVICE void LoadCachedOperandB(const uint8_t* activations, int group,
                                         uint32_t (&b)[4][2]) {
  WINTSERVE_UNROLL
  for (int pair = 0; pair < 2; ++pair) {
    const uint4 words = LoadAligned<uint4>(activations + (2 * group + pair) * 64);
    b[2 * pair][0] = words.x;
    b[2 * pair][1] = words.y;
    b[2 * pair + 1][0] = words.z;
    b[2 * pair + 1][1] = words.w;
  }
}

// What a warp reads of a chunk, as its lane sees it.
struct CachedPlaces {
  const uint8_t* stage;        // the lane's 16 bytes of the first tile's unit
  const uint8_t* activations;  // token g, t
  const uint8_t* corrections;  // t
};

// Adds a chunk to the sums of kCount tiles, whose records lie kTileBytes apart.
template <class Codec, int kCount, int kTileBytes>
WINTSERVE_DEVICE void AddCachedChunk(const CachedPlaces& from, int to_scales,
                                     const LaneColumns (&columns)[kCount],
                                     const typename Codec::Constants& constants,
                                     float (&total)[kCount][4]) {
  typename Codec::Packed packed[kCount];
  float scales[kCount][2][2];
  WINTSERVE_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const uint8_t* record = from.stage + i * kTileBytes;
    packed[i] = Codec::LoadPacked(record);
    Codec::LoadLocalScales(record + to_scales, constants, scales[i]);
  }
  WINTSERVE_UNROLL
  for (int group = 0; group < plan::kGroupsPerChunk; ++group) {
    uint32_t b[4][2];
    LoadCachedOperandB(from.activations, group, b);
    float correction[4] = {};
    if constexpr (Codec::kHasCorrections) {
      const uint4 words = LoadAligned<uint4>(from.corrections + group * 64);
      correction[0] = BitsToFloat(words.x);
      correction[1] = BitsToFloat(words.y);
      correction[2] = BitsToFloat(words.z);
      correction[3] = BitsToFloat(words.w);
    }
    WINTSERVE_UNROLL
    for (int i = 0; i < kCount; ++i) {
      uint32_t a[4][4];
      Codec::Decode(packed[i], group, columns[i], scales[i][group], constants, a);
      Codec::Accumulate(a, b, correction, scales[i][group], total[i]);
    }
  }
}

// One warp's share of a step: 16 rows of tokens `pair` and pair + 4 of one tile, over all slices in
// order. sums: the tile's of slice 0, slices `stride` floats apart
template <int kTiles>
WINTSERVE_DEVICE void StoreCachedRows(const ProductParams& p, const CachedRun& run, int tile,
                                      int pair, const float* sums, const uint8_t* scales) {
  constexpr int kStride = kTiles * plan::kTileSumFloats;
  const int lane = ThreadIndex() % 32;
  const int row = lane % plan::kTileColumns;
  const int token = pair + lane / plan::kTileColumns * 4;
  const float* slice = sums + token * plan::kSumStride + row;
  float sum = *slice;
  WINTSERVE_UNROLL_BY(4)
  for (int s = 1; s < p.slices; ++s) sum = Add(sum, slice[s * kStride]);
  const bool stored = token < run.num_tokens;
  sum *= stored ? LoadAligned<float>(scales + token * 4) : 0.0f;
  float* y = p.y + (run.first_token + token) * p.y_stride;
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

// The same, from a shuffle: the compiler cannot make such values again before each use, as it would
// to have fewer registers in use.
template <class Constants>
WINTSERVE_DEVICE Constants KeepInRegisters(const Constants& constants) {
  constexpr int kWords = sizeof(Constants) / 4;
  int32_t words[kWords];
  memcpy(words, &constants, sizeof(words));
  WINTSERVE_UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = Shuffle(words[i], 0);
  Constants kept;
  memcpy(&kept, words, sizeof(words));
  return kept;
}

// All that a warp does. kTiles and kStageChunks: 1 or 2 each.
template <class Codec, int kTiles, int kStageChunks>
class CachedWorker {
 public:
  using Ring = CachedRing<kTiles, kStageChunks>;
  using Shared = CachedShared<kTiles, kStageChunks>;
  using Step = CachedStep<kTiles>;
  static constexpr int kChunkBytes = plan::kChunkRows * 2;  // of a token

  WINTSERVE_DEVICE CachedWorker(const ProductParams& p, const Schedule& schedule,
                                const CachedWarp& warp, const Shared& shared,
                                const CachedSteps<kTiles>& steps, uint8_t* shared_memory)
      : p_(p),
        schedule_(schedule),
        warp_(warp),
        shared_(shared),
        shared_memory_(shared_memory),
        ring_(p, schedule, warp, steps),
        constants_(KeepInRegisters(Codec::MakeConstants(0))),
        stage_(shared.ring + warp.lane * 16),
        previous_stage_(stage_ + (Ring::kStages - 1) * Ring::kStageBytes),
        share_(warp.slice) {
    WINTSERVE_UNROLL
    for (int i = 0; i < Ring::kStages - 1; ++i)
      ring_.Issue(shared_memory_ + stage_ + i * Ring::kStageBytes);
  }

  // REQUIRES: the run's tokens lie in shared memory.
  WINTSERVE_DEVICE void AddSteps(const CachedRun& run, CachedSteps<kTiles>* steps) {
    const int t = warp_.lane % 4;
    const int g = warp_.lane / 4;
    // Beyond the last token stands the last again; the sums of such columns are not stored.
    const int token = g < run.num_tokens ? g : run.num_tokens - 1;
    const uint8_t* activations = shared_.activations + token * plan::CachedTokenBytes(p_.chunks) +
                                 warp_.chunk_begin * kChunkBytes + t * 16;
    const uint8_t* corrections =
        shared_.corrections + warp_.chunk_begin * plan::kCachedCorrectionBytes + t * 16;
    const uint8_t* weights =
        p_.experts.weights[ExpertOfTile(schedule_, p_.num_experts, run.token_tile)];
    const auto load_columns = [&](const Step& of, LaneColumns(&columns)[kTiles]) {
      WINTSERVE_UNROLL
      for (int i = 0; i < kTiles; ++i) {
        columns[i] = LoadLaneColumns(weights + static_cast<uint32_t>(of.tile[i]) *
                                                   (plan::kTileColumns * sizeof(plan::ColumnInfo)),
                                     g);
      }
    };
    Step previous = {};
    Step step = TakeOfRun(run, steps);
    LaneColumns columns[kTiles];
    load_columns(step, columns);
    while (step.count > 0) {
      float total[kTiles][4] = {};
      CachedPlaces from = {nullptr, activations, corrections};
      if (step.count == kTiles) {
        AddStep(from, columns, &total);
      } else if constexpr (kTiles > 1) {
        LaneColumns first[1] = {columns[0]};
        float first_total[1][4] = {};
        AddStep(from, first, &first_total);
        WINTSERVE_UNROLL
        for (int i = 0; i < 4; ++i) total[0][i] = first_total[0][i];
      }
      // The next step's columns come from memory while this one's sums are stored.
      const Step next = TakeOfRun(run, steps);
      LaneColumns next_columns[kTiles];
      load_columns(next, next_columns);
      StoreSums(columns, total);
      if (previous.count > 0) StoreStep(run, previous, index_ - 1);
      ++index_;
      previous = step;
      step = next;
      WINTSERVE_UNROLL
      for (int i = 0; i < kTiles; ++i) columns[i] = next_columns[i];
    }
    if (previous.count > 0) StoreStep(run, previous, index_ - 1);
  }

 private:
  // A step of no tiles if the run has no more.
  WINTSERVE_DEVICE static Step TakeOfRun(const CachedRun& run, CachedSteps<kTiles>* steps) {
    if (steps->done() || steps->token_tile() != run.token_tile) return {};
    return steps->Take();
  }

  template <int kCount>
  WINTSERVE_DEVICE void AddStep(CachedPlaces from, const LaneColumns (&columns)[kCount],
                                float (*total)[kCount][4]) {
    const int to_scales = plan::kUnitBytes + warp_.lane / 4 * 2 - warp_.lane * 16;
    const int ring_end = shared_.ring + warp_.lane * 16 + Ring::kStages * Ring::kStageBytes;
    WINTSERVE_NO_UNROLL
    for (int left = warp_.chunks; left > 0; left -= kStageChunks) {
      // The copies of this stage have landed, for all lanes; and all have read the stage before,
      // which is filled next.
      WaitForCopies<Ring::kStages - 2>();
      SyncWarp();
      ring_.Issue(shared_memory_ + previous_stage_);
      from.stage = shared_memory_ + stage_;
      previous_stage_ = stage_;
      stage_ += Ring::kStageBytes;
      if (stage_ == ring_end) stage_ -= Ring::kStages * Ring::kStageBytes;
      AddCachedChunk<Codec, kCount, Ring::kTileBytes>(from, to_scales, columns, constants_, *total);
      from.activations += kChunkBytes;
      from.corrections += plan::kCachedCorrectionBytes;
      if (kStageChunks == 1 || left == 1) continue;
      from.stage += Ring::kRecordBytes;
      AddCachedChunk<Codec, kCount, Ring::kTileBytes>(from, to_scales, columns, constants_, *total);
      from.activations += kChunkBytes;
      from.corrections += plan::kCachedCorrectionBytes;
    }
  }

  // Leaves the sums of step number index_.
  WINTSERVE_DEVICE void StoreSums(const LaneColumns (&columns)[kTiles],
                                  const float (&total)[kTiles][4]) {
    const unsigned buffer = index_ % 2;
    if (index_ >= 2) {
      WaitAtBarrier(SharedAddressOf(shared_.empty + 8 * buffer), (index_ / 2 % 2) ^ 1);
    }
    float* own = SumsOf(buffer) + warp_.slice * (kTiles * plan::kTileSumFloats) +
                 warp_.lane % 4 * 2 * plan::kSumStride + warp_.lane / 4;
    WINTSERVE_UNROLL
    for (int i = 0; i < kTiles; ++i) {
      own[0] = total[i][0] * columns[i].scale[0];
      own[plan::kSumStride] = total[i][1] * columns[i].scale[0];
      own[8] = total[i][2] * columns[i].scale[1];
      own[plan::kSumStride + 8] = total[i][3] * columns[i].scale[1];
      own += plan::kTileSumFloats;
    }
    SyncWarp();
    ArriveForWarp(warp_.lane, SharedAddressOf(shared_.full + 8 * buffer));
  }

  // Adds up the warp's shares of step number `index`. The warps take turns in what has tokens.
  WINTSERVE_DEVICE void StoreStep(const CachedRun& run, const Step& step, unsigned index) {
    const unsigned buffer = index % 2;
    const int of_tile = run.num_tokens < 4 ? run.num_tokens : 4;
    const int shares = step.count * of_tile;
    if (share_ < shares) {
      WaitAtBarrier(SharedAddressOf(shared_.full + 8 * buffer), index / 2 % 2);
      const float* sums = SumsOf(buffer);
      for (; share_ < shares; share_ += p_.slices) {
        const bool second = kTiles > 1 && share_ >= of_tile;
        StoreCachedRows<kTiles>(p_, run, second ? step.tile[kTiles - 1] : step.tile[0],
                                second ? share_ - of_tile : share_,
                                sums + (second ? plan::kTileSumFloats : 0),
                                shared_.tokens + plan::kBlockTokens * 4);
      }
      SyncWarp();
    }
    share_ -= shares;
    ArriveForWarp(warp_.lane, SharedAddressOf(shared_.empty + 8 * buffer));
  }

  WINTSERVE_DEVICE float* SumsOf(unsigned buffer) const {
    return shared_.sums + buffer * p_.slices * (kTiles * plan::kTileSumFloats);
  }

  const ProductParams& p_;
  const Schedule& schedule_;
  const CachedWarp& warp_;
  const Shared& shared_;
  uint8_t* const shared_memory_;
  Ring ring_;
  const typename Codec::Constants constants_;
  int stage_;           // the lane's, that is read next
  int previous_stage_;  // that was read last
  int share_;           // the warp's first of the next step that is added up
  unsigned index_ = 0;  // of the group's step
};

// shared: plan::SharedBytes; grid: any number of blocks of 32 * slices * `groups` threads.
template <class Codec, int kStageChunks>
WINTSERVE_DEVICE void CachedProduct(const ProductParams& p, uint8_t* shared_memory) {
  constexpr int kTiles = plan::kCachedTiles;
  const int warp_index = ThreadIndex() / 32;
  const int groups = p.groups;
  const int slice = warp_index % p.slices;
  const int chunk_begin = plan::SliceBegin(p.chunks, p.slices, slice);
  const CachedWarp warp = {ThreadIndex() % 32,
                           warp_index / p.slices,
                           groups,
                           slice,
                           chunk_begin,
                           plan::SliceBegin(p.chunks, p.slices, slice + 1) - chunk_begin};
  const CachedShared<kTiles, kStageChunks> shared(p, warp, shared_memory);
  if (warp.slice == 0 && warp.lane == 0) {
    for (int buffer = 0; buffer < 2; ++buffer) {
      InitBarrier(SharedAddressOf(shared.full + 8 * buffer), p.slices * kWarpArrivals);
      InitBarrier(SharedAddressOf(shared.empty + 8 * buffer), p.slices * kWarpArrivals);
    }
  }
  const Schedule schedule = BuildSchedule(p, plan::kBlockTokens, shared_memory);
  const int64_t num_tiles = int64_t{schedule.num_token_tiles} * p.tiles;
  const auto begin = static_cast<int>(plan::FirstItemOfBlock(num_tiles, NumBlocks(), BlockIndex()));
  const auto end =
      static_cast<int>(plan::FirstItemOfBlock(num_tiles, NumBlocks(), BlockIndex() + 1));
  if (begin == end) {
    WaitForPreviousKernel();
    return;
  }
  CachedSteps<kTiles> steps(p, warp, begin, end);
  CachedWorker<Codec, kTiles, kStageChunks> worker(p, schedule, warp, shared, steps, shared_memory);
  for (int token_tile = begin / p.tiles; token_tile * p.tiles < end; ++token_tile) {
    const CachedRun run = LocateRun(p, schedule, token_tile);
    LocateCachedTokens(p, run, shared.tokens);
    if (token_tile * p.tiles <= begin) {
      WaitForPreviousKernel();
      LetNextKernelBegin();
    }
    LoadCachedTokens(p, run, 32 * groups * p.slices, shared);
    worker.AddSteps(run, &steps);
  }
}

}  // namespace wintserve::kernels::cuda
