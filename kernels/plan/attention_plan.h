// How attention over a paged KV cache is cut into work: pure arithmetic, the same on host and
// device.
//
// Segments make the result of a row independent of the batch. The keys of a sequence are cut at
// fixed positions; every segment is summed on its own with its own maximum, and a row's result is
// the segments merged in ascending order. Who sums a segment, one warp for one query token or a
// block for a tile of a prompt, and where it is merged, in registers or through memory, does not
// change a bit.
//
// Rows: the query heads of one KV head over the tokens of a chunk, row r = token r / group,
// head r % group of the KV head's heads. A tile is a run of tile_rows rows.
#pragma once

#include <array>
#include <cstdint>

#include "kernels/plan/host_device.h"
#include "kernels/plan/kv_layout.h"

namespace wintserve::kernels::plan {

// Segments of kMinSegmentTokens give a short sequence enough of them to fill a GPU; further on they
// grow to an eighth of the keys before them, so that a long one has not too many to merge.
inline constexpr int32_t kMinSegmentTokens = 128;
inline constexpr int32_t kMaxSegmentTokens = 1024;
inline constexpr int32_t kSegmentGrowth = 8;

// The length doubles where kSegmentGrowth segments of the doubled length lie before.
WINTSERVE_HOST_DEVICE constexpr int32_t SegmentOf(int32_t key) {
  int32_t length = kMinSegmentTokens;
  int32_t begin = 0;
  int32_t index = 0;
  while (length < kMaxSegmentTokens && key >= 2 * kSegmentGrowth * length) {
    const int32_t end = 2 * kSegmentGrowth * length;
    index += (end - begin) / length;
    begin = end;
    length *= 2;
  }
  return index + (key - begin) / length;
}

WINTSERVE_HOST_DEVICE constexpr int32_t SegmentBegin(int32_t segment) {
  int32_t length = kMinSegmentTokens;
  int32_t begin = 0;
  int32_t index = 0;
  while (length < kMaxSegmentTokens) {
    const int32_t end = 2 * kSegmentGrowth * length;
    const int32_t count = (end - begin) / length;
    if (segment < index + count) break;
    index += count;
    begin = end;
    length *= 2;
  }
  return begin + (segment - index) * length;
}

WINTSERVE_HOST_DEVICE constexpr int32_t NumSegments(int32_t num_keys) {
  return num_keys == 0 ? 0 : SegmentOf(num_keys - 1) + 1;
}
static_assert(NumSegments(1024) == 8 && NumSegments(8192) == 32 && NumSegments(32768) == 56);

// What queries are multiplied by, so that weights are powers of 2: log2(e) / sqrt(head_dim).
constexpr float QueryScale(int head_dim) {  // 64 or 128
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kSqrt2 = 1.4142135623730951;
  return static_cast<float>(head_dim == 64 ? kLog2E / 8 : kLog2E / (8 * kSqrt2));
}

// Thread blocks come in these sizes; a warp has kAttentionWarpRows rows of a tile.
inline constexpr std::array<int, 3> kAttentionWarps = {1, 4, 8};
inline constexpr int kAttentionWarpRows = 16;

// The size for chunks: the largest block loads a key for the most rows, but only a long prompt has
// enough of them to go round twice.
constexpr int PickTileWarps(int32_t num_tokens, int num_heads, int num_multiprocessors) {
  const int64_t rows = int64_t{num_tokens} * num_heads;
  return rows >= int64_t{2} * num_multiprocessors * 8 * kAttentionWarpRows ? 8 : 4;
}

// One launch works on the sequences that have min_rows … max_rows rows.
struct AttentionWork {
  int32_t group = 0;  // query heads of a KV head
  int32_t num_kv_heads = 0;
  int32_t tile_rows = 0;
  int32_t min_rows = 0;
  int32_t max_rows = 0;
  // A sequence of at most this many rows is cut at its segments, whose sums pass through memory:
  // more rows are work enough for a GPU without.
  int32_t max_split_rows = 0;
  // Of a tile that is cut, segments that a block takes at a time: the more, the less often it
  // begins anew.
  int32_t item_segments = 1;
  int32_t max_partials = 0;  // sums of one tile over one segment that the memory holds
};

// Of the sequences that are too many rows for one warp, those that are cut at their segments: a few
// tokens behind a long prefix.
inline constexpr int32_t kMaxSplitTileRows = 256;

struct AttentionLaunch {
  int num_warps = 0;
  AttentionWork work;  // but for max_partials
};

// Segments of an item for decodes. Items of kFullItemSegments from as many sequences as fill the
// machine's slots (blocks that run at a time) waste little; fewer sequences are cut finer, so that
// there are still about as many items as slots where the segments suffice.
inline constexpr int32_t kFullItemSegments = 8;
constexpr int32_t PickItemSegments(int64_t num_tiles, int num_slots) {
  int32_t segments = kFullItemSegments;
  // A sixteenth of the slots may stay empty.
  while (segments > 1 && 17 * kFullItemSegments * num_tiles < int64_t{16} * segments * num_slots) {
    segments /= 2;
  }
  return segments;
}

// The launches for a batch of at most num_tokens tokens in sequences of at most max_length: one for
// those whose rows one warp has place for, and one for the others where there may be any.
struct AttentionLaunches {
  std::array<AttentionLaunch, 2> launches;
  int count = 0;
};
// decode_slots: blocks of one warp that run at a time.
constexpr AttentionLaunches PlanAttention(int32_t num_sequences, int32_t num_tokens,
                                          int32_t max_length, int num_heads, int num_kv_heads,
                                          int num_multiprocessors, int decode_slots) {
  AttentionLaunches plan;
  const int32_t group = num_heads / num_kv_heads;
  plan.launches[0] = {.num_warps = 1,
                      .work = {.group = group,
                               .num_kv_heads = num_kv_heads,
                               .tile_rows = kAttentionWarpRows,
                               .min_rows = 1,
                               .max_rows = kAttentionWarpRows,
                               .max_split_rows = kAttentionWarpRows,
                               .item_segments = PickItemSegments(
                                   int64_t{num_sequences} * num_kv_heads, decode_slots)}};
  plan.count = 1;
  const int32_t max_rows = max_length * group;
  if (max_rows <= kAttentionWarpRows) return plan;
  const int num_warps = PickTileWarps(num_tokens, num_heads, num_multiprocessors);
  plan.launches[1] = {.num_warps = num_warps,
                      .work = {.group = group,
                               .num_kv_heads = num_kv_heads,
                               .tile_rows = num_warps * kAttentionWarpRows,
                               .min_rows = kAttentionWarpRows + 1,
                               .max_rows = max_rows,
                               .max_split_rows = kMaxSplitTileRows}};
  plan.count = 2;
  return plan;
}

// What one sequence amounts to in a launch.
struct SequenceWork {
  int32_t tiles = 0;  // 0: nothing
  int32_t segments = 0;
  int32_t wanted_partials = 0;  // 0: not to be cut
};

// Of a tile that is cut.
WINTSERVE_HOST_DEVICE constexpr int32_t TileItems(const AttentionWork& work, int32_t segments) {
  return (segments + work.item_segments - 1) / work.item_segments;
}

WINTSERVE_HOST_DEVICE constexpr SequenceWork WorkOf(const AttentionWork& work, int32_t position,
                                                    int32_t length) {
  SequenceWork sequence;
  const int64_t rows = int64_t{length} * work.group;
  if (length <= 0 || rows < work.min_rows || rows > work.max_rows) return sequence;
  sequence.tiles = static_cast<int32_t>((rows + work.tile_rows - 1) / work.tile_rows);
  sequence.segments = NumSegments(position + length);
  if (rows <= work.max_split_rows && sequence.segments > work.item_segments) {
    sequence.wanted_partials = work.num_kv_heads * sequence.tiles * sequence.segments;
  }
  return sequence;
}

// Sequences take memory for partials in their order; one that finds too little left is not cut.
WINTSERVE_HOST_DEVICE constexpr bool IsSplit(const AttentionWork& work,
                                             const SequenceWork& sequence, int32_t first_partial) {
  return sequence.wanted_partials > 0 &&
         first_partial <= work.max_partials - sequence.wanted_partials;
}

WINTSERVE_HOST_DEVICE constexpr int32_t NumItems(const AttentionWork& work,
                                                 const SequenceWork& sequence, bool is_split) {
  return work.num_kv_heads * sequence.tiles * (is_split ? TileItems(work, sequence.segments) : 1);
}

// What one thread block does at a time: a tile's rows of one KV head over some segments.
struct AttentionItem {
  int32_t kv_head = 0;
  int32_t tile = 0;
  int32_t segment_begin = 0;
  int32_t segment_end = 0;
  // Of the tile's partials, one a segment and in their order, the first; -1: the item has all
  // segments and writes the result itself.
  int32_t first_partial = -1;
};

// Item `index` of a sequence whose partials begin at first_partial. Neighbours are of about equal
// size. Later tiles of a prompt see more keys, so they come first and the short ones fill the end.
WINTSERVE_HOST_DEVICE constexpr AttentionItem ItemOf(const AttentionWork& work,
                                                     const SequenceWork& sequence, bool is_split,
                                                     int32_t first_partial, int32_t index) {
  AttentionItem item;
  const int32_t tile_items = is_split ? TileItems(work, sequence.segments) : 1;
  const int32_t tile_index = index / tile_items;
  item.kv_head = tile_index % work.num_kv_heads;
  item.tile = sequence.tiles - 1 - tile_index / work.num_kv_heads;
  if (is_split) {
    item.segment_begin = index % tile_items * work.item_segments;
    const int32_t end = item.segment_begin + work.item_segments;
    item.segment_end = end < sequence.segments ? end : sequence.segments;
    item.first_partial = first_partial + tile_index * sequence.segments;
  } else {
    item.segment_end = sequence.segments;
  }
  return item;
}

// The item that block `block` of num_blocks takes in its round-th turn: to and fro, so that no
// block always gets the largest of a turn. Grows with `round`.
WINTSERVE_HOST_DEVICE constexpr int64_t ItemOfTurn(int32_t round, int32_t block,
                                                   int32_t num_blocks) {
  return int64_t{round} * num_blocks + (round % 2 == 0 ? block : num_blocks - 1 - block);
}

}  // namespace wintserve::kernels::plan
