// The Hopper kernel: weights are decoded into the registers of a wgmma's A operand, tokens are its
// B operand in shared memory (plan/wgmma_plan.h).
//
// A block is persistent: one warpgroup copies the stages of its items through a ring, weights by
// bulk copies and the gathered activations piece by piece into the swizzle; two warpgroups
// multiply. They start the products of a group of k in turns, so that the tensor cores work for one
// while the other decodes, corrects and scales.
//
// Shared memory passes between them by barriers of two phases. A place of the ring is written when
// all warps that multiply have arrived at its `empty` barrier, which each does when its wgmma and
// loads from the place have ended; it is read when all copies into it have arrived at its `full`
// barrier: the bulk copies by their bytes, each thread that copies when its own have landed and
// been published to the proxy of wgmma. (compute-sanitizer's racecheck does not follow these
// barriers where one lane arrives for its warp: tests/gpu/README.md.)
//
// Sums are formed as in the other kernels: group by group from the correction on (WINT2, then one
// multiply-add with the local scale), or in one accumulator with the corrections added between
// groups; slices of k one after another.
#pragma once

#include <cstdint>

#include "kernels/cuda/device_ops.h"
#include "kernels/cuda/matmul/codecs.cuh"
#include "kernels/cuda/matmul/product_params.h"
#include "kernels/cuda/matmul/schedule.cuh"
#include "kernels/cuda/wgmma_ops.h"
#include "kernels/plan/wgmma_plan.h"

namespace wintserve::kernels::cuda {

// The ring of stages: both sides count them alike.
struct WgmmaRing {
  int stage = 0;
  uint32_t parity = 0;

  template <int kStages>
  WINTSERVE_DEVICE void Advance() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct WgmmaItem {
  int expert = 0;  // the one of the item before when the next is located
  int first_slice;
  int end_slice;
  int first;  // tokens of the item's tile and last of its expert, over all experts
  int last;
  int tile;  // the block's first
};

template <class Codec, int kTokens>
class WgmmaProduct {
 public:
  WINTSERVE_DEVICE WgmmaProduct(const ProductParams& p, uint8_t* shared)
      : p_(p), shared_(shared), address_(SharedAddressOf(shared)) {}

  WINTSERVE_DEVICE void Run() {
    if (static_cast<uint32_t>(ThreadIndex()) == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        InitBarrier(full(stage), kBulkWarps + plan::kWarpgroupThreads);
        InitBarrier(empty(stage), kConsumerWarps * kWarpArrivals);
      }
      for (int i = 0; i < plan::kWgmmaConsumers; ++i) {
        InitBarrier(turn(i), plan::kWarpgroupThreads / 32 * kWarpArrivals);
      }
      PublishBarriers();
    }
    if constexpr (kPromotes) {
      // Of the corrections' operand only two words in eight are ever copied.
      for (int i = ThreadIndex() * 16; i < kShared.correction_bytes;
           i += plan::kWgmmaThreads * 16) {
        StoreAligned(shared_ + kShared.corrections + i, uint4{0, 0, 0, 0});
      }
      FenceForWgmma();
    }
    BuildSchedule(p_, kTokens, shared_ + kShared.schedule);
    SyncBlock();
    // The block has kProducerRegisters + 2 * kConsumerRegisters for every three threads of
    // different warpgroups.
    if (static_cast<uint32_t>(ThreadIndex()) >= kConsumerThreads) {
      GiveRegisters<kProducerRegisters>();
      Produce();
    } else {
      TakeRegisters<kConsumerRegisters>();
      Consume();
    }
  }

 private:
  static constexpr plan::WgmmaTile kTile = plan::WgmmaTileOf(Codec::kFormat, kTokens);
  static constexpr plan::WgmmaShared kShared = plan::WgmmaSharedOf(Codec::kFormat, kTokens);
  static constexpr int kStages = kShared.stages;
  static_assert(kStages >= 2);
  static constexpr int kTiles = kTile.tiles();
  static constexpr int kGroups = plan::WgmmaStageGroups(Codec::kFormat);
  static constexpr int kStagesPerChunk = plan::kGroupsPerChunk / kGroups;
  static constexpr int kRowBlocks = kTile.row_blocks;
  static constexpr bool kPromotes = plan::WgmmaBeginsGroups(Codec::kFormat);
  static_assert(kPromotes == Codec::kHasLocalScales);
  static constexpr bool kAddsCorrections = Codec::kHasCorrections && !kPromotes;
  static constexpr int kConsumerThreads = plan::kWgmmaConsumers * plan::kWarpgroupThreads;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kProducerRegisters = kTile.blocks == 2 ? 32 : 56;
  static constexpr int kConsumerRegisters = kTile.blocks == 2 ? 104 : 224;
  // The warpgroups start the products of a group in turns, so that the tensor cores work for one
  // while the other decodes, corrects and scales.
  static constexpr bool kTakesTurns = kPromotes && kTile.blocks == 1;
  // A warpgroup with one row block decodes the next group while it multiplies.
  static constexpr bool kDecodesAhead = kRowBlocks == 1;
  static_assert(!kDecodesAhead || kGroups == 2);  // operand a[group] needs to know the group

  WINTSERVE_DEVICE uint32_t full(int stage) const {
    return address_ + kShared.barriers + stage * 16;
  }
  WINTSERVE_DEVICE uint32_t empty(int stage) const { return full(stage) + 8; }
  WINTSERVE_DEVICE uint32_t turn(int warpgroup) const { return full(kStages) + warpgroup * 8; }

  // The schedule and all that follows from it is read again where it is needed: registers are
  // scarcer than time between items.
  WINTSERVE_DEVICE Schedule ScheduleOf() const {
    const auto* first_token = reinterpret_cast<const int32_t*>(shared_ + kShared.schedule);
    const int32_t* first_tile = first_token + p_.num_experts + 1;
    return {first_token, first_tile, first_tile[p_.num_experts]};
  }
  WINTSERVE_DEVICE int NumItems() const {
    const int items = ScheduleOf().num_token_tiles * plan::DivideUp(p_.tiles, kTiles);
    return p_.split_sums != nullptr ? items * p_.slices : items;
  }
  // expert: of the block's item before.
  WINTSERVE_DEVICE WgmmaItem Locate(int index, int expert) const {
    const Schedule schedule = ScheduleOf();
    const int num_row_blocks = plan::DivideUp(p_.tiles, kTiles);
    WgmmaItem item;
    item.expert = expert;
    item.first_slice = 0;
    item.end_slice = p_.slices;
    if (p_.split_sums != nullptr) {
      const int items_of_slice = schedule.num_token_tiles * num_row_blocks;
      item.first_slice = index / items_of_slice;
      item.end_slice = item.first_slice + 1;
      index -= item.first_slice * items_of_slice;
      item.expert = 0;  // the next slice begins with the first item again
    }
    const Item place = schedule.Locate(index, num_row_blocks, &item.expert);
    item.first = schedule.first_token[place.expert] + place.token_tile * kTokens;
    item.last = schedule.first_token[place.expert + 1] - 1;
    item.tile = place.row_block * kTiles;
    return item;
  }
  // First stage of a slice.
  WINTSERVE_DEVICE int SliceStage(int slice) const {
    return plan::SliceBegin(p_.chunks, p_.slices, slice) * kStagesPerChunk;
  }

  // --- The warpgroup that copies ---

  static constexpr int kPieceRows = plan::kWarpgroupThreads / 8;  // tokens that it copies at once
  static constexpr int kCopies = kTokens / kPieceRows;
  // Bulk copies leave a warp one by one, so each warp starts some.
  static constexpr int kBulkWarps = plan::kWarpgroupThreads / 32;
  static constexpr int kWarpTiles = kTiles / kBulkWarps;

  // A thread's sources of an item.
  struct Sources {
    uint32_t rows[kCopies];  // bytes from the first of the activations
    const uint8_t* corrections;
    const uint8_t* record;
    int num_tokens;
  };

  // The tile of the item whose weights a thread copies, if it is one of the first of its warp.
  WINTSERVE_DEVICE static int BulkTile(int thread) {
    return thread / 32 * kWarpTiles + thread % 32 % kWarpTiles;
  }

  WINTSERVE_DEVICE Sources SourcesOf(const WgmmaItem& item, int thread) const {
    Sources sources;
    const auto row = [&](int token) {
      return SourceRow(p_, item.first + token < item.last ? item.first + token : item.last);
    };
    WINTSERVE_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      sources.rows[i] = static_cast<uint32_t>(row(i * kPieceRows + thread / 8)) *
                            static_cast<uint32_t>(p_.chunks * plan::kChunkRows * 2) +
                        thread % 8 * 16;
    }
    if constexpr (Codec::kHasCorrections) {
      const ChunkCorrections* corrections = p_.x.corrections + row(thread) * p_.chunks;
      sources.corrections = kPromotes ? reinterpret_cast<const uint8_t*>(corrections->halves)
                                      : reinterpret_cast<const uint8_t*>(corrections->values);
    }
    sources.num_tokens = item.last + 1 - item.first;
    const int tile = item.tile + BulkTile(thread);
    sources.record = p_.experts.weights[item.expert] + p_.records_offset +
                     int64_t{tile < p_.tiles ? tile : p_.tiles - 1} * p_.chunks *
                         plan::ChunkBytes(Codec::kFormat);
    return sources;
  }

  WINTSERVE_DEVICE void CopyStage(const Sources& sources, int stage, int place, int thread) const {
    if (thread % 32 == 0) ArriveAndExpect(full(place), kWarpTiles * kShared.weight_bytes);
    SyncWarp();
    if (thread % 32 < kWarpTiles) {
      CopyBulk(
          address_ + kShared.weights + (place * kTiles + BulkTile(thread)) * kShared.weight_bytes,
          sources.record + int64_t{stage} * kShared.weight_bytes, kShared.weight_bytes,
          full(place));
    }
    const auto* values = reinterpret_cast<const uint8_t*>(p_.x.values) +
                         int64_t{stage} * (kGroups * plan::kGroupRows * 2);
    uint8_t* activations =
        shared_ + place * kShared.activation_bytes + plan::SwizzledOffset(thread / 8, thread % 8);
    WINTSERVE_UNROLL
    for (int i = 0; i < kCopies; ++i) {
      // Of tokens that are not there nobody reads the sums.
      if (i > 0 && i * kPieceRows >= sources.num_tokens) break;
      const uint8_t* from = values + sources.rows[i];
      WINTSERVE_UNROLL
      for (int group = 0; group < kGroups; ++group) {
        // kPieceRows rows on, the swizzle is the same.
        CopyToShared(SharedAddressOf(activations + group * kTokens * 128 + i * kPieceRows * 128),
                     from + group * 128);
      }
    }
    if constexpr (Codec::kHasCorrections) {
      if (thread < kTokens) {
        WINTSERVE_UNROLL
        for (int group = 0; group < kGroups; ++group) {
          const int of_row = stage * kGroups + group;
          uint8_t* to =
              shared_ + kShared.corrections +
              (kPromotes ? plan::CorrectionOffset(thread, place, group)
                         : place * kShared.correction_bytes + (group * kTokens + thread) * 4);
          CopyWordToShared(SharedAddressOf(to), sources.corrections +
                                                    of_row / plan::kGroupsPerChunk *
                                                        static_cast<int>(sizeof(ChunkCorrections)) +
                                                    of_row % plan::kGroupsPerChunk * 4);
        }
      }
    }
    CommitCopies();
  }

  // Says that the copies into `landing` have landed, once all but the last kPending stages' have.
  template <int kPending>
  WINTSERVE_DEVICE void Announce(int landing) const {
    WaitForCopies<kPending>();
    FenceForWgmma();
    ArriveAtBarrier(full(landing));
  }

  WINTSERVE_DEVICE void Produce() const {
    const int thread = ThreadIndex() - kConsumerThreads;
    WgmmaRing ring;
    int landing = -1;  // place of the stage before, if it has not been announced
    int expert = 0;
    for (int index = BlockIndex(); index < NumItems(); index += NumBlocks()) {
      const WgmmaItem item = Locate(index, expert);
      expert = item.expert;
      const Sources sources = SourcesOf(item, thread);
      const int end = SliceStage(item.end_slice);
      for (int stage = SliceStage(item.first_slice); stage < end; ++stage) {
        if (!IsPhaseOver(empty(ring.stage), ring.parity ^ 1)) {
          if (landing >= 0) Announce<0>(landing);
          landing = -1;
          SpinAtBarrier(empty(ring.stage), ring.parity ^ 1);
        }
        CopyStage(sources, stage, ring.stage, thread);
        if (landing >= 0) Announce<1>(landing);
        landing = ring.stage;
        ring.template Advance<kStages>();
      }
    }
    if (landing >= 0) Announce<0>(landing);
  }

  // --- The warpgroups that multiply ---

  // Accumulators of the row blocks, for kTokens / 2 * 4 outputs of a warp's lanes each.
  template <int kN>
  struct Sums {
    float group[kRowBlocks][kN / 2];  // accumulators of wgmma
    float total[kPromotes ? kRowBlocks : 1][kPromotes ? kN / 2 : 1];
  };
  // Operands of a row block or (kDecodesAhead) of a group, and what they need.
  struct Operands {
    uint32_t a[2][4][4];
    typename Codec::Packed packed[kRowBlocks];
    float scales[kRowBlocks][2][2];
  };

  WINTSERVE_DEVICE const uint8_t* StageWeights(int stage, int row_block) const {
    const int tile = (group_ * kRowBlocks + row_block) * 4 + warp_;
    return shared_ + kShared.weights + (stage * kTiles + tile) * kShared.weight_bytes;
  }

  // Decodes a group of a stage into operand `to`; with the first group, reads the stage's words.
  WINTSERVE_DEVICE void DecodeGroup(int stage, int group, int row_block, int to,
                                    Operands* operands) const {
    if (group == 0) {
      const uint8_t* record = StageWeights(stage, row_block);
      operands->packed[row_block] = Codec::LoadPacked(record + lane_ * 16);
      if constexpr (Codec::kHasLocalScales) {
        Codec::LoadLocalScales(
            record + plan::UnitsPerChunk(Codec::kFormat) * plan::kUnitBytes + lane_ / 4 * 2,
            constants_, operands->scales[row_block]);
      }
    }
    Codec::Decode(operands->packed[row_block], group, columns_[row_block],
                  operands->scales[row_block][group], constants_, operands->a[to]);
  }

  // Adds the corrections of a stage's group to the sums of both row blocks.
  template <int kN>
  WINTSERVE_DEVICE void AddCorrections(int stage, Sums<kN>* sums) const {
    static_assert(kGroups == 1 && kRowBlocks == 2);
    const uint8_t* corrections =
        shared_ + kShared.corrections + stage * kShared.correction_bytes + lane_ % 4 * 2 * 4;
    WINTSERVE_UNROLL
    for (int block = 0; block < kN / 8; ++block) {
      const uint2 words = LoadAligned<uint2>(corrections + block * 32);
      WINTSERVE_UNROLL
      for (int i = 0; i < 8; ++i) {
        float& sum = sums->group[i / 4][4 * block + i % 4];
        sum = Add(sum, BitsToFloat(i % 2 == 0 ? words.x : words.y));
      }
    }
  }

  // Starts the products of a group for a row block.
  template <int kRegisters>
  WINTSERVE_DEVICE void Start(int stage, int group, const uint32_t (&a)[4][4],
                              float (&sums)[kRegisters]) const {
    HoldRegisters(sums);
    FenceWgmma();
    if constexpr (kPromotes) {
      const uint32_t factors = lane_ % 4 == 0 ? plan::kCorrectionFactors : 0;
      const uint32_t first = group == 0 ? factors : 0;
      const uint32_t second = group == 0 ? 0 : factors;
      WgmmaMultiply<false>(
          sums, {first, first, second, second},
          plan::WgmmaDescriptor(address_ + kShared.corrections) + stage * plan::kDescriptorStep);
    }
    const uint64_t b =
        plan::WgmmaDescriptor(address_ + stage * kShared.activation_bytes + group * kTokens * 128);
    WINTSERVE_UNROLL
    for (int m = 0; m < 4; ++m) WgmmaMultiply<true>(sums, a[m], b + m * plan::kDescriptorStep);
    CommitWgmma();
  }

  // After the wait for a row block's products.
  template <int kN>
  WINTSERVE_DEVICE void Finish(int row_block, const float (&scale)[2], Sums<kN>* sums) const {
    HoldRegisters(sums->group[row_block]);
    if constexpr (kPromotes) {
      WINTSERVE_UNROLL
      for (int i = 0; i < kN / 2; ++i) {
        sums->total[row_block][i] =
            MultiplyAdd(scale[i / 2 % 2], sums->group[row_block][i], sums->total[row_block][i]);
      }
    }
  }

  template <int kN>
  WINTSERVE_DEVICE static void Clear(Sums<kN>* sums) {
    WINTSERVE_UNROLL
    for (int row_block = 0; row_block < kRowBlocks; ++row_block) {
      WINTSERVE_UNROLL
      for (int i = 0; i < kN / 2; ++i) {
        sums->group[row_block][i] = 0;
        if constexpr (kPromotes) sums->total[row_block][i] = 0;
      }
    }
  }

  WINTSERVE_DEVICE void WaitFull(const WgmmaRing& place) const {
    SpinAtBarrier(full(place.stage), place.parity);
  }
  WINTSERVE_DEVICE void Release(int stage) const {
    SyncWarp();
    ArriveForWarp(lane_, empty(stage));
  }

  // The warp's tile of a row block; beyond the last tile it computes that one again, for nobody.
  WINTSERVE_DEVICE int OwnTile(const WgmmaItem& item, int row_block) const {
    return item.tile + (group_ * kRowBlocks + row_block) * 4 + warp_;
  }
  WINTSERVE_DEVICE const uint8_t* ColumnsOf(const WgmmaItem& item, int tile) const {
    return p_.experts.weights[item.expert] + int64_t{tile < p_.tiles ? tile : p_.tiles - 1} *
                                                 plan::kTileColumns * sizeof(plan::ColumnInfo);
  }

  WINTSERVE_DEVICE void Consume() {
    const int thread = ThreadIndex();
    lane_ = thread % 32;
    warp_ = thread % plan::kWarpgroupThreads / 32;
    group_ = thread / plan::kWarpgroupThreads;
    WgmmaRing ring;
    turn_parity_ = group_ == 0 ? 1 : 0;  // the first warpgroup begins
    int expert = 0;
    for (int index = BlockIndex(); index < NumItems(); index += NumBlocks()) {
      const WgmmaItem item = Locate(index, expert);
      expert = item.expert;
      ConsumeItemOf(item, &ring);
    }
  }

  // Products of no more tokens than the item's take less time.
  WINTSERVE_DEVICE void ConsumeItemOf(const WgmmaItem& item, WgmmaRing* ring) {
    [[maybe_unused]] const int tokens = item.last + 1 - item.first;
    if constexpr (kTokens == plan::kWideTokens) {
      if (tokens <= plan::kNarrowTokens / 2)
        return ConsumeItem<plan::kNarrowTokens / 2>(item, ring);
      if (tokens <= plan::kNarrowTokens) return ConsumeItem<plan::kNarrowTokens>(item, ring);
    }
    ConsumeItem<kTokens>(item, ring);
  }

  WINTSERVE_DEVICE void LoadColumns(const WgmmaItem& item) {
    WINTSERVE_UNROLL
    for (int i = 0; i < kRowBlocks; ++i) {
      columns_[i] = LoadLaneColumns(ColumnsOf(item, OwnTile(item, i)), lane_ / 4);
    }
  }

  // The ends of slices of formats that scale the sums of groups are seen to when the products of
  // the next group have been started.
  template <int kN>
  WINTSERVE_DEVICE void ConsumeItem(const WgmmaItem& item, WgmmaRing* ring) {
    LoadColumns(item);
    Sums<kN> sums;
    Operands operands;
    Clear(&sums);
    const int end = SliceStage(item.end_slice);
    WaitFull(*ring);
    WINTSERVE_UNROLL
    for (int i = 0; i < kRowBlocks; ++i) DecodeGroup(ring->stage, 0, i, i, &operands);
    int stage = SliceStage(item.first_slice);
    for (int slice = item.first_slice; stage < end; ++slice) {
      const int slice_end = SliceStage(slice + 1);
      bool ended = kPromotes && slice > item.first_slice;
      do {
        const int here = ring->stage;
        ring->template Advance<kStages>();
        AddStage(here, *ring, stage + 1 < end, ended ? slice - 1 : -1, &operands, &sums);
        Release(here);
        ended = false;
      } while (++stage < slice_end);
      if (!kPromotes) EndSlice(slice, &sums);
    }
    if (kPromotes) EndSlice(item.end_slice - 1, &sums);
    StoreItem<kN>(item);
  }

  // The products of a stage. Its first operands have been decoded, and at the end those of the next
  // stage are. ended_slice: with the stage before, or -1.
  template <int kN>
  WINTSERVE_DEVICE void AddStage(int stage, const WgmmaRing& next, bool has_next, int ended_slice,
                                 Operands* operands, Sums<kN>* sums) {
    if constexpr (kAddsCorrections) AddCorrections(stage, sums);
    WINTSERVE_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if constexpr (kTakesTurns) {
        SpinAtBarrier(turn(group_), turn_parity_);
        turn_parity_ ^= 1;
      }
      WINTSERVE_UNROLL
      for (int i = 0; i < kRowBlocks; ++i) {
        Start(stage, group, operands->a[kDecodesAhead ? group : i], sums->group[i]);
      }
      if constexpr (kTakesTurns) {
        ArriveForWarp(lane_, turn(1 - group_));
      }
      if (kPromotes && group == 0 && ended_slice >= 0) EndSlice(ended_slice, sums);
      if constexpr (kDecodesAhead) {
        const float scale[2] = {operands->scales[0][group][0], operands->scales[0][group][1]};
        DecodeNext(stage, group, 0, next, has_next, operands);
        WaitWgmma<0>();
        Finish(0, scale, sums);
      } else {
        WaitWgmma<1>();
        Finish(0, operands->scales[0][group], sums);
        DecodeNext(stage, group, 0, next, has_next, operands);
        WaitWgmma<0>();
        Finish(1, operands->scales[1][group], sums);
        DecodeNext(stage, group, 1, next, has_next, operands);
      }
    }
  }

  // Decodes what a row block multiplies in the group behind `group`.
  WINTSERVE_DEVICE void DecodeNext(int stage, int group, int row_block, const WgmmaRing& next,
                                   bool has_next, Operands* operands) const {
    const int next_group = (group + 1) % kGroups;
    const int to = kDecodesAhead ? next_group : row_block;
    if (next_group > 0) {
      DecodeGroup(stage, next_group, row_block, to, operands);
    } else if (has_next) {
      if (row_block == 0) WaitFull(next);
      DecodeGroup(next.stage, 0, row_block, to, operands);
    }
  }

  // --- Ends ---

  // A thread's sums of the slices before.
  WINTSERVE_DEVICE float4* SumsBefore(int row_block) const {
    return reinterpret_cast<float4*>(shared_ + kShared.sums) +
           row_block * (kTokens / 8) * kConsumerThreads + ThreadIndex();
  }

  // A slice's sums join those before it in shared memory.
  template <int kN>
  WINTSERVE_DEVICE void EndSlice(int slice, Sums<kN>* sums) const {
    const bool is_first = p_.split_sums != nullptr || slice == 0;
    WINTSERVE_UNROLL
    for (int row_block = 0; row_block < kRowBlocks; ++row_block) {
      const float(&scale)[2] = columns_[row_block].scale;
      float* values = kPromotes ? sums->total[kPromotes ? row_block : 0] : sums->group[row_block];
      float4* before = SumsBefore(row_block);
      WINTSERVE_UNROLL
      for (int block = 0; block < kN / 8; ++block) {
        float4 sum = {values[4 * block] * scale[0], values[4 * block + 1] * scale[0],
                      values[4 * block + 2] * scale[1], values[4 * block + 3] * scale[1]};
        if (!is_first) {
          const float4 old = before[block * kConsumerThreads];
          sum = {Add(old.x, sum.x), Add(old.y, sum.y), Add(old.z, sum.z), Add(old.w, sum.w)};
        }
        before[block * kConsumerThreads] = sum;
        WINTSERVE_UNROLL
        for (int i = 0; i < 4; ++i) values[4 * block + i] = 0;
      }
    }
  }

  template <int kN>
  WINTSERVE_DEVICE void StoreItem(const WgmmaItem& item) const {
    WINTSERVE_UNROLL
    for (int row_block = 0; row_block < kRowBlocks; ++row_block) {
      const int tile = OwnTile(item, row_block);
      if (tile >= p_.tiles) return;
      const float4* sums = SumsBefore(row_block);
      WINTSERVE_UNROLL_BY(4)
      for (int block = 0; block < kN / 8; ++block) {
        const float4 sum = sums[block * kConsumerThreads];
        Store(item, tile, block * 8, {sum.x, sum.y, sum.z, sum.w});
      }
    }
  }

  // Sums of a lane's two tokens and two rows, of 8 tokens from `token_block` of the item on.
  WINTSERVE_DEVICE void Store(const WgmmaItem& item, int tile, int token_block,
                              const float (&sums)[4]) const {
    const int g = lane_ / 4;
    WINTSERVE_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int token = item.first + token_block + lane_ % 4 * 2 + j;
      if (token > item.last) return;
      if (p_.split_sums != nullptr) {
        float* to = p_.split_sums +
                    ((int64_t{item.first_slice} * p_.num_tokens + token) * p_.tiles + tile) *
                        plan::kTileColumns +
                    g;
        to[0] = sums[j];
        to[8] = sums[2 + j];
        continue;
      }
      const float inverse_scale = p_.x.inverse_scale[SourceRow(p_, token)];
      const float low = sums[j] * inverse_scale;
      const float high = sums[2 + j] * inverse_scale;
      if (p_.epilogue == Epilogue::kSwiGlu) {
        const int column = tile * (plan::kTileColumns / 2) + g;
        if (column < p_.columns) p_.y[token * p_.y_stride + column] = SwiGlu(low, high);
      } else {
        const int column = tile * plan::kTileColumns + g;
        float* to = p_.y + token * p_.y_stride + column;
        if (column < p_.columns) to[0] = low;
        if (column + 8 < p_.columns) to[8] = high;
      }
    }
  }

  const ProductParams& p_;
  uint8_t* const shared_;
  const uint32_t address_;
  int lane_ = 0;
  int warp_ = 0;   // of the warpgroup
  int group_ = 0;  // warpgroup
  uint32_t turn_parity_ = 0;
  const typename Codec::Constants constants_ = Codec::MakeConstants(0);
  LaneColumns columns_[kRowBlocks];
};

}  // namespace wintserve::kernels::cuda
