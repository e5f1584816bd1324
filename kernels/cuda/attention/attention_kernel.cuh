// Causal attention over a paged KV cache, for decodes and for chunks of prompts.
//
// One kernel in two sizes. A block of one warp takes the few rows of a decode and one segment of
// keys at a time; a block of several warps takes a tile of a prompt's rows, shares every block of
// keys among its warps and walks over all segments. Either way a warp does to its 16 rows what
// tile_math.cuh says, so a row has the same bits wherever it is computed.
//
// Blocks are persistent: the grid is as large as the GPU, and the work is found from the device
// arrays, so a captured launch fits any batch.
//
// The kernel may begin while the one before it runs, which appends the chunks' own keys and rotates
// the queries: until WaitForPreviousKernel it finds its work and asks for older keys and values.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention/attention_params.h"
#include "kernels/cuda/attention/tile_math.cuh"
#include "kernels/cuda/device_ops.h"
#include "kernels/plan/attention_plan.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::cuda {

using plan::AttentionItem;
using plan::SequenceWork;

// How a block of kWarps warps uses its shared memory: a ring of tiles (K and V in turn), for the
// 8-bit cache shared by several warps also a widened K and a widened V, then the queries.
template <KvCacheKind kKind, int kHeadDim, int kWarps>
struct AttentionConfig {
  static constexpr int kThreads = kWarps * kLanes;
  static constexpr int kTileRows = kWarps * kWarpRows;
  static constexpr int kTileBytes = plan::KvTileBytes(kKind, kHeadDim);
  // Three large tiles a warp let four such blocks run beside each other.
  static constexpr int kStages = kWarps == 1 && kTileBytes >= 16 * 1024 ? 3 : 4;

  // One warp widens codes in registers; several would each do it again.
  static constexpr bool kWidens = kKind == KvCacheKind::kInt8 && kWarps > 1;
  static constexpr KvCacheKind kMathKind = kWidens ? KvCacheKind::kBfloat16 : kKind;
  static constexpr int kWideTileBytes =
      kWidens ? plan::KvTileBytes(KvCacheKind::kBfloat16, kHeadDim) : 0;

  static constexpr int kRingOffset = 2 * kWideTileBytes;
  static constexpr int kQueryOffset =
      (kRingOffset + kStages * kTileBytes + 255) / 256 * 256;  // aligned to its rows
  static constexpr int kSharedBytes = kQueryOffset + kWarps * QueryBytes(kHeadDim);
  // Sixteen bytes more would cost the fourth block: what they would hold stands in the ring, which
  // is empty by then.
  static constexpr int kFlagOffset = kRingOffset;
};

// Partials of a tile over one segment: for each warp and plane head_dim / 16 float4 of each lane,
// then maximum and sum of each lane.
constexpr int PlaneFloats(int head_dim) { return kLanes * (head_dim / 4 + 2); }
constexpr int PartialFloats(int head_dim, int num_warps) {
  return num_warps * 2 * PlaneFloats(head_dim);
}

// Finds a block's items in ascending order. Every warp does it for itself: lane l holds what
// sequence base + l amounts to, and how many items and partials there are up to its end.
class ItemFinder {
 public:
  WINTSERVE_DEVICE ItemFinder(const SequenceArrays& sequences, const plan::AttentionWork& work,
                              int lane)
      : sequences_(sequences), work_(work), lane_(lane) {
    Load();
  }

  // False when there are not so many items. Fills `item`, the index of its sequence and the number
  // of segments. `index` must not be below that of an earlier call.
  WINTSERVE_DEVICE bool Find(int64_t index, AttentionItem& item, int32_t& sequence,
                             int32_t& num_segments) {
    while (true) {
      const int32_t num_items = Shuffle(items_end_, kLanes - 1);
      if (index < first_item_ + num_items) break;
      if (base_ + kLanes >= sequences_.num_sequences) return false;
      first_item_ += num_items;
      first_partial_ = Shuffle(partials_end_, kLanes - 1);
      base_ += kLanes;
      Load();
    }
    const auto local = static_cast<int32_t>(index - first_item_);
    const uint32_t ends_after = Ballot(items_end_ > local);
    const int source = LowestBit(ends_after);
    SequenceWork found;
    found.tiles = Shuffle(sequence_work_.tiles, source);
    found.segments = Shuffle(sequence_work_.segments, source);
    found.wanted_partials = Shuffle(sequence_work_.wanted_partials, source);
    const bool is_split = Shuffle(is_split_ ? 1 : 0, source) != 0;
    const int32_t items_end = Shuffle(items_end_, source);
    const int32_t first_partial = Shuffle(partials_end_, source) - found.wanted_partials;
    const int32_t first_item = items_end - plan::NumItems(work_, found, is_split);
    item = plan::ItemOf(work_, found, is_split, first_partial, local - first_item);
    sequence = base_ + source;
    num_segments = found.segments;
    return true;
  }

 private:
  WINTSERVE_DEVICE static int LowestBit(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
  }

  WINTSERVE_DEVICE int32_t SumUpTo(int32_t value) const {
    WINTSERVE_UNROLL
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const int32_t before = ShuffleUp(value, distance);
      if (lane_ >= distance) value += before;
    }
    return value;
  }

  WINTSERVE_DEVICE void Load() {
    const int32_t sequence = base_ + lane_;
    sequence_work_ = SequenceWork{};
    if (sequence < sequences_.num_sequences) {
      sequence_work_ = plan::WorkOf(work_, LoadFresh(sequences_.position + sequence),
                                    LoadFresh(sequences_.length + sequence));
    }
    partials_end_ = first_partial_ + SumUpTo(sequence_work_.wanted_partials);
    is_split_ =
        plan::IsSplit(work_, sequence_work_, partials_end_ - sequence_work_.wanted_partials);
    items_end_ = SumUpTo(plan::NumItems(work_, sequence_work_, is_split_));
  }

  const SequenceArrays& sequences_;
  const plan::AttentionWork& work_;
  const int lane_;
  int32_t base_ = 0;
  int64_t first_item_ = 0;     // of sequence base_
  int32_t first_partial_ = 0;  // of sequence base_
  SequenceWork sequence_work_;
  bool is_split_ = false;
  int32_t items_end_ = 0;     // counted from first_item_
  int32_t partials_end_ = 0;  // counted from the launch's first
};

// One thread block at work.
template <KvCacheKind kKind, int kHeadDim, int kWarps>
class AttentionBlock {
 public:
  using Config = AttentionConfig<kKind, kHeadDim, kWarps>;
  using Rows = RowSums<kHeadDim>;

  WINTSERVE_DEVICE explicit AttentionBlock(const AttentionParams& params)
      : p_(params),
        thread_(ThreadIndex()),
        lane_(thread_ % kLanes),
        warp_(thread_ / kLanes),
        shared_(SharedBase()) {}

  WINTSERVE_DEVICE void Run() {
    ItemFinder finder(p_.sequences, p_.work, lane_);
    AttentionItem item;
    int32_t sequence;
    int32_t num_segments;
    int32_t round = 0;
    WINTSERVE_NO_UNROLL
    for (; finder.Find(plan::ItemOfTurn(round, BlockIndex(), NumBlocks()), item, sequence,
                       num_segments);
         ++round) {
      const int32_t old_blocks = Place(item, sequence);
      SyncBlock();  // nobody reads shared memory for the last item any more
      StartCopies(round == 0, old_blocks);
      LoadQueries();
      ComputeSegments(item);
      if (item.first_partial >= 0 &&
          IsLastToArrive(item.first_partial, plan::TileItems(p_.work, num_segments))) {
        MergePartials(item.first_partial, num_segments);
      }
    }
    if (round == 0) BeginAfterPreviousKernel();
  }

 private:
  // Where the item lies: its rows, its keys, and this warp's share of the rows. Returns how many
  // blocks of the sequence the kernel before this one has not written to.
  WINTSERVE_DEVICE int32_t Place(const AttentionItem& item, int32_t sequence) {
    const int32_t position = LoadFresh(p_.sequences.position + sequence);
    const int32_t length = LoadFresh(p_.sequences.length + sequence);
    const int32_t group = p_.work.group;
    const int32_t num_rows = length * group;
    first_token_ = LoadFresh(p_.sequences.first_token + sequence);
    block_table_ = p_.sequences.block_tables + sequence * p_.sequences.block_table_stride;
    first_head_ = item.kv_head * group;
    key_tile_ =
        p_.kv.pool + p_.kv.layer_offset_bytes +
        plan::KvTileOffset(kKind, p_.work.num_kv_heads, kHeadDim, plan::KvPart::kKey, item.kv_head);

    const int32_t tile_begin = item.tile * Config::kTileRows;
    const int32_t tile_end = min(num_rows, tile_begin + Config::kTileRows);
    key_end_ = position + (tile_end - 1) / group + 1;
    block_begin_ = plan::SegmentBegin(item.segment_begin) / kKvTileTokens;
    block_end_ = min(plan::SegmentBegin(item.segment_end) / kKvTileTokens,
                     (key_end_ + kKvTileTokens - 1) / kKvTileTokens);
    num_tiles_ = 2 * max(0, block_end_ - block_begin_);

    row_begin_ = tile_begin + warp_ * kWarpRows;
    num_rows_ = max(0, min(kWarpRows, tile_end - row_begin_));
    const auto position_of = [&](int32_t row) { return position + min(row, num_rows - 1) / group; };
    first_position_ = position_of(row_begin_);
    last_position_ = position_of(row_begin_ + kWarpRows - 1);
    row_position_[0] = position_of(row_begin_ + lane_ / 4);
    row_position_[1] = position_of(row_begin_ + lane_ / 4 + 8);
    return position / kKvTileTokens;
  }

  // --- Tiles of keys and values: number 2b is K of the item's block b, 2b + 1 its V. ---

  WINTSERVE_DEVICE uint32_t RingSlot(int32_t tile) const {
    return shared_ + Config::kRingOffset + (tile % Config::kStages) * Config::kTileBytes;
  }

  // is_first: before the block's first item only old blocks may be read, and afterwards everything
  // be read and written.
  WINTSERVE_DEVICE void StartCopies(bool is_first, int32_t old_blocks) {
    LoadBlockIds(block_begin_);  // of the batch, hence older than the kernel before this one
    WINTSERVE_UNROLL
    for (int tile = 0; tile < Config::kStages - 1; ++tile) {
      if (is_first && block_begin_ + tile / 2 >= old_blocks) {
        BeginAfterPreviousKernel();
        is_first = false;
      }
      CopyTile(tile);
    }
    if (is_first) BeginAfterPreviousKernel();
  }

  WINTSERVE_DEVICE void LoadBlockIds(int32_t first) {
    block_ids_begin_ = first;
    block_id_ = first + lane_ < block_end_ ? LoadFresh(block_table_ + first + lane_) : 0;
  }

  // Every thread takes part in every group of copies, an empty one behind the last tile.
  WINTSERVE_DEVICE void CopyTile(int32_t tile) {
    if (tile < num_tiles_) {
      const int32_t block = block_begin_ + tile / 2;
      if (block >= block_ids_begin_ + kLanes) LoadBlockIds(block);
      const int64_t block_id = Shuffle(block_id_, block - block_ids_begin_);
      const unsigned char* from = key_tile_ + block_id * p_.kv.block_stride_bytes;
      if (tile % 2 != 0) from += p_.work.num_kv_heads * Config::kTileBytes;
      // Memory behind the last key may hold anything, and 0 * NaN is no 0.
      const int32_t num_tokens = min(kKvTileTokens, key_end_ - block * kKvTileTokens);
      CopyRows(from, num_tokens, RingSlot(tile));
    }
    CommitCopies();
  }

  WINTSERVE_DEVICE void CopyRows(const unsigned char* from, int32_t num_tokens, uint32_t to) const {
    constexpr int kRowBytes = plan::KvRowBytes(kKind, kHeadDim);
    constexpr int kDataBytes = kKvTileTokens * kRowBytes;
    constexpr int kBytesAtOnce = 16 * Config::kThreads;
    static_assert(kDataBytes % kBytesAtOnce == 0 && kBytesAtOnce % kRowBytes == 0);
    from += 16 * thread_;
    to += 16 * thread_;
    if (num_tokens == kKvTileTokens) {
      WINTSERVE_UNROLL
      for (int begin = 0; begin < kDataBytes; begin += kBytesAtOnce) {
        CopyToShared(to + begin, from + begin);
      }
    } else {
      const int row = 16 * thread_ / kRowBytes;
      WINTSERVE_UNROLL
      for (int begin = 0; begin < kDataBytes; begin += kBytesAtOnce) {
        CopyToShared(to + begin, from + begin, row + begin / kRowBytes < num_tokens ? 16 : 0);
      }
    }
    if (kKind == KvCacheKind::kInt8 && thread_ < kKvTileTokens / 8) {
      CopyToShared(to + kDataBytes, from + kDataBytes,
                   max(0, min(16, 2 * (num_tokens - 8 * thread_))));
    }
  }

  // Waits for a tile, starts the copy of one that takes the place of the tile before it, and says
  // where the product finds it.
  WINTSERVE_DEVICE uint32_t NextTile(int32_t tile) {
    WaitForCopies<Config::kStages - 2>();
    SyncBlock();
    CopyTile(tile + Config::kStages - 1);
    if constexpr (!Config::kWidens) {
      return RingSlot(tile);
    } else {
      const uint32_t wide = shared_ + (tile % 2) * Config::kWideTileBytes;
      WidenTile(RingSlot(tile), wide);
      SyncBlock();
      return wide;
    }
  }

  WINTSERVE_DEVICE void WidenTile(uint32_t codes, uint32_t wide) const {
    constexpr int kRowBytes = plan::KvRowBytes(kKind, kHeadDim);
    constexpr int kChunks = kKvTileTokens * kRowBytes / 16;
    WINTSERVE_UNROLL
    for (int begin = 0; begin < kChunks; begin += Config::kThreads) {
      const int index = begin + thread_;
      if (kChunks % Config::kThreads != 0 && index >= kChunks) break;
      const int token = index / (kRowBytes / 16);
      const int chunk = index % (kRowBytes / 16);
      const uint4 four = LoadShared4(codes + plan::KvChunkOffset(kRowBytes, token, chunk));
      const uint2 a = WidenCodes(four.x);
      const uint2 b = WidenCodes(four.y);
      const uint2 c = WidenCodes(four.z);
      const uint2 d = WidenCodes(four.w);
      const uint32_t row = wide + plan::KvRowOffset(2 * kRowBytes, token);
      StoreShared(row ^ (2 * chunk * 16), uint4{a.x, b.x, c.x, d.x});
      StoreShared(row ^ ((2 * chunk + 1) * 16), uint4{a.y, b.y, c.y, d.y});
    }
  }

  // --- Queries ---

  WINTSERVE_DEVICE uint32_t Queries() const {
    return shared_ + Config::kQueryOffset + warp_ * QueryBytes(kHeadDim);
  }

  // This warp's rows, scaled, as limbs; rows that there are not are zeros.
  WINTSERVE_DEVICE void LoadQueries() const {
    constexpr int kLanesPerRow = kHeadDim / 4;
    constexpr int kRowsAtOnce = kLanes / kLanesPerRow;
    const int32_t group = p_.work.group;
    const int dim = 4 * (lane_ % kLanesPerRow);
    int32_t token = (row_begin_ + lane_ / kLanesPerRow) / group;
    int32_t head = (row_begin_ + lane_ / kLanesPerRow) % group;
    WINTSERVE_UNROLL
    for (int begin = 0; begin < kWarpRows; begin += kRowsAtOnce) {
      const int row = begin + lane_ / kLanesPerRow;
      float4 q = {0.0f, 0.0f, 0.0f, 0.0f};
      if (row < num_rows_) {
        const float* from =
            p_.qkv + (first_token_ + token) * p_.qkv_stride + (first_head_ + head) * kHeadDim + dim;
        q = *reinterpret_cast<const float4*>(from);
      }
      StoreQuery(row, dim, q);
      WINTSERVE_UNROLL
      for (int i = 0; i < kRowsAtOnce; ++i) {
        ++head;
        if (head == group) {
          head = 0;
          ++token;
        }
      }
    }
  }

  WINTSERVE_DEVICE void StoreQuery(int row, int dim, float4 q) const {
    float rest[4] = {Multiply(q.x, p_.query_scale), Multiply(q.y, p_.query_scale),
                     Multiply(q.z, p_.query_scale), Multiply(q.w, p_.query_scale)};
    if (kKind == KvCacheKind::kInt8) {  // the order of WidenCodes
      const float second = rest[1];
      rest[1] = rest[2];
      rest[2] = second;
    }
    const uint32_t row_address = Queries() + plan::KvRowOffset(2 * kHeadDim, row);
    WINTSERVE_UNROLL
    for (int limb = 0; limb < kQueryLimbs; ++limb) {
      const uint32_t address = row_address + limb * QueryLimbBytes(kHeadDim);
      const uint2 pairs = {PackBfloat16(rest[0], rest[1]), PackBfloat16(rest[2], rest[3])};
      if (kKind == KvCacheKind::kBfloat16) {
        StoreShared((address ^ (dim / 8 * 16)) + dim % 8 * 2, pairs);
      } else {
        const int chunk = dim / 16 * 2;
        const int word = dim % 16 / 4;
        StoreShared((address ^ (chunk * 16)) + 4 * word, pairs.x);
        StoreShared((address ^ ((chunk + 1) * 16)) + 4 * word, pairs.y);
      }
      rest[0] = Subtract(rest[0], LowBfloat16(pairs.x));
      rest[1] = Subtract(rest[1], HighBfloat16(pairs.x));
      rest[2] = Subtract(rest[2], LowBfloat16(pairs.y));
      rest[3] = Subtract(rest[3], HighBfloat16(pairs.y));
    }
  }

  // --- Sums ---

  // Blocks begin … end - 1 of one segment. All warps go along; a warp whose rows lie before a
  // block, or that has none, leaves it out.
  WINTSERVE_DEVICE void ComputeSegment(int32_t begin, int32_t end, Rows& rows) {
    rows.Clear();
    WINTSERVE_NO_UNROLL
    for (int32_t block = begin; block < end; ++block) {
      const int32_t first_key = block * kKvTileTokens;
      const bool sees_block = num_rows_ > 0 && first_key <= last_position_;
      const int32_t tile = 2 * (block - block_begin_);
      ScoreTile scores;

      const uint32_t keys = NextTile(tile);
      if (sees_block) {
        MultiplyKeys<Config::kMathKind, kHeadDim>(Queries(), keys, lane_, scores);
        if (kKind == KvCacheKind::kInt8) MultiplyScales(Scales(tile), lane_, scores);
        if (first_key + kKvTileTokens - 1 > first_position_) {
          MaskScores(first_key, row_position_, lane_, scores);
        }
        SoftmaxStep(scores, rows);
      }

      const uint32_t values = NextTile(tile + 1);
      if (sees_block) {
        if (kKind == KvCacheKind::kInt8) MultiplyScales(Scales(tile + 1), lane_, scores);
        MultiplyValues<Config::kMathKind, kHeadDim>(scores, values, lane_, rows);
      }
    }
    FinishSums(rows);
  }

  WINTSERVE_DEVICE uint32_t Scales(int32_t tile) const {
    return RingSlot(tile) + plan::KvScaleOffset(kHeadDim, 0);
  }

  // Whole rows are merged here; of a row that is cut, the item's segments go to memory.
  WINTSERVE_DEVICE void ComputeSegments(const AttentionItem& item) {
    Rows total;
    total.Clear();
    int32_t begin = block_begin_;
    int32_t segment = item.segment_begin;
    Rows rows;
    WINTSERVE_NO_UNROLL
    do {
      const int32_t end = min(block_end_, plan::SegmentBegin(segment + 1) / kKvTileTokens);
      ComputeSegment(begin, end, rows);
      if (item.first_partial >= 0) {
        StorePartial(item.first_partial + segment, rows);
      } else {
        WINTSERVE_UNROLL
        for (int plane = 0; plane < 2; ++plane) {
          MergeRow(rows.values[plane], rows.maximum[plane], rows.sum[plane], total.values[plane],
                   total.maximum[plane], total.sum[plane]);
        }
      }
      begin = end;
      ++segment;
      // Of items that are cut only those of one segment, or with all rows of a sequence, exist: the
      // last of those rows sees every segment.
    } while (begin < block_end_);
    if (item.first_partial >= 0) return;
    WINTSERVE_UNROLL
    for (int plane = 0; plane < 2; ++plane) {
      WriteRow(plane, total.values[plane], total.sum[plane]);
    }
  }

  // --- Partials ---

  WINTSERVE_DEVICE float* PartialPlane(int32_t partial, int plane) const {
    return p_.partials + int64_t{partial} * PartialFloats(kHeadDim, kWarps) +
           (warp_ * 2 + plane) * PlaneFloats(kHeadDim);
  }
  WINTSERVE_DEVICE bool HasPlane(int plane) const { return num_rows_ > 8 * plane; }

  WINTSERVE_DEVICE void StorePartial(int32_t partial, const Rows& rows) const {
    WINTSERVE_UNROLL
    for (int plane = 0; plane < 2; ++plane) {
      if (!HasPlane(plane)) continue;
      float* to = PartialPlane(partial, plane);
      WINTSERVE_UNROLL
      for (int i = 0; i < Rows::kNumbers / 4; ++i) {
        const float* v = &rows.values[plane][4 * i];
        reinterpret_cast<float4*>(to)[i * kLanes + lane_] = float4{v[0], v[1], v[2], v[3]};
      }
      reinterpret_cast<float2*>(to + kLanes * Rows::kNumbers)[lane_] =
          float2{rows.maximum[plane], rows.sum[plane]};
    }
  }

  // Counts this block among the tile's; true in the one that came last, which sees what all wrote.
  WINTSERVE_DEVICE bool IsLastToArrive(int32_t first_partial, int32_t tile_items) {
    FenceDevice();
    SyncBlock();
    if (thread_ == 0) {
      int32_t* arrivals = p_.arrivals + first_partial;
      const bool is_last = FetchAndAdd(arrivals, 1) == tile_items - 1;
      if (is_last) *arrivals = 0;  // for the next launch
      StoreShared(shared_ + Config::kFlagOffset, is_last ? 1u : 0u);
    }
    SyncBlock();
    const bool is_last = LoadShared(shared_ + Config::kFlagOffset) != 0;
    if (is_last) FenceDevice();
    return is_last;
  }

  WINTSERVE_DEVICE void MergePartials(int32_t first_partial, int32_t num_segments) const {
    WINTSERVE_NO_UNROLL
    for (int plane = 0; plane < 2; ++plane) {
      if (HasPlane(plane)) MergePlane(first_partial, num_segments, plane);
    }
  }

  WINTSERVE_DEVICE void MergePlane(int32_t first_partial, int32_t num_segments, int plane) const {
    constexpr int kAtOnce = 4;  // partials under way from memory
    float total[Rows::kNumbers];
    WINTSERVE_UNROLL
    for (int i = 0; i < Rows::kNumbers; ++i) total[i] = 0.0f;
    float total_maximum = -INFINITY;
    float total_sum = 0.0f;
    WINTSERVE_NO_UNROLL
    for (int32_t segment = 0; segment < num_segments; segment += kAtOnce) {
      float values[kAtOnce][Rows::kNumbers];
      float2 stats[kAtOnce];
      WINTSERVE_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        // Behind the last one stands the last one again, as an empty sum.
        const bool exists = segment + j < num_segments;
        const float* from = PartialPlane(first_partial + min(segment + j, num_segments - 1), plane);
        WINTSERVE_UNROLL
        for (int i = 0; i < Rows::kNumbers / 4; ++i) {
          const float4 v = LoadFromL2(reinterpret_cast<const float4*>(from) + i * kLanes + lane_);
          values[j][4 * i] = v.x;
          values[j][4 * i + 1] = v.y;
          values[j][4 * i + 2] = v.z;
          values[j][4 * i + 3] = v.w;
        }
        stats[j] =
            LoadFromL2(reinterpret_cast<const float2*>(from + kLanes * Rows::kNumbers) + lane_);
        if (!exists) stats[j] = float2{-INFINITY, 0.0f};
      }
      WINTSERVE_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        MergeRow(values[j], stats[j].x, stats[j].y, total, total_maximum, total_sum);
      }
    }
    WriteRow(plane, total, total_sum);
  }

  // --- Results ---

  WINTSERVE_DEVICE void WriteRow(int plane, const float (&values)[Rows::kNumbers],
                                 float sum) const {
    const int row = lane_ / 4 + 8 * plane;
    if (row >= num_rows_) return;
    const int32_t r = row_begin_ + row;
    float* to = p_.out + (first_token_ + r / p_.work.group) * p_.out_stride +
                (first_head_ + r % p_.work.group) * kHeadDim;
    const float inverse = Divide(1.0f, sum);
    const int t = lane_ % 4;
    WINTSERVE_UNROLL
    for (int i = 0; i < Rows::kNumbers; i += kKind == KvCacheKind::kBfloat16 ? 2 : 4) {
      float* dims = to + OutputDim<kKind>(i, t);
      if constexpr (kKind == KvCacheKind::kBfloat16) {
        *reinterpret_cast<float2*>(dims) =
            float2{Multiply(values[i], inverse), Multiply(values[i + 1], inverse)};
      } else {
        // The numbers of two column blocks alternate.
        *reinterpret_cast<float4*>(dims) =
            float4{Multiply(values[i], inverse), Multiply(values[i + 2], inverse),
                   Multiply(values[i + 1], inverse), Multiply(values[i + 3], inverse)};
      }
    }
  }

  const AttentionParams& p_;
  const int thread_;
  const int lane_;
  const int warp_;
  const uint32_t shared_;

  // Of the item.
  int64_t first_token_ = 0;
  int32_t first_head_ = 0;
  const int32_t* block_table_ = nullptr;
  const unsigned char* key_tile_ = nullptr;  // of block 0 of the pool
  int32_t key_end_ = 0;                      // keys that its last row sees
  int32_t old_blocks_ = 0;                   // so many blocks are as the launch before left them
  int32_t block_begin_ = 0;
  int32_t block_end_ = 0;
  int32_t num_tiles_ = 0;
  // Lane l holds the id of block block_ids_begin_ + l.
  int32_t block_ids_begin_ = 0;
  int32_t block_id_ = 0;

  // Of the warp.
  int32_t row_begin_ = 0;
  int32_t num_rows_ = 0;
  int32_t first_position_ = 0;
  int32_t last_position_ = 0;
  int32_t row_position_[2] = {};  // of the lane's two rows
};

template <KvCacheKind kKind, int kHeadDim, int kWarps>
WINTSERVE_KERNEL(kWarps* kLanes)
AttentionKernel(WINTSERVE_PARAMS AttentionParams params) {
  AttentionBlock<kKind, kHeadDim, kWarps>(params).Run();
}

}  // namespace wintserve::kernels::cuda
