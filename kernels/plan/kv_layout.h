// Where a key or a value lies in a block of the KV pool on a GPU, as byte offsets.
//
// A block holds kKvBlockTokens tokens of one rank: [layer][K, V][kv_head] tiles. A tile is
// [token][head_dim] in 16-byte chunks, and for the 8-bit cache [token] scales (IEEE half) behind
// them, so that a block is self-contained and a tile is one contiguous copy. Within a token's row
// chunk c stands at place c ^ swizzle(token): the eight rows that a matrix load reads at once then
// lie in different banks of shared memory although the tile was copied byte for byte.
#pragma once

#include <cstdint>

#include "kernels/plan/host_device.h"

namespace wintserve::kernels::plan {

// Tokens of one block, the same as kernels::kKvBlockTokens; keys of one step of the kernel.
inline constexpr int kKvTileTokens = 64;
inline constexpr int kKvChunkBytes = 16;

enum class KvCacheKind {
  kBfloat16,
  kInt8,  // value = code * scale; one scale for K and one for V of every token and KV head
};

enum class KvPart { kKey, kValue };

// Names the order of a block's bytes; part of the KV layout digest.
constexpr const char* KvLayoutName(KvCacheKind kind) {
  return kind == KvCacheKind::kBfloat16
             ? "bfloat16 [layer][K,V][kv_head][64][head_dim] chunks^token"
             : "int8 [layer][K,V][kv_head]{[64][head_dim] chunks^token, [64] half scales}";
}

// head_dim is 64 or 128.
WINTSERVE_HOST_DEVICE constexpr int KvRowBytes(KvCacheKind kind, int head_dim) {
  return kind == KvCacheKind::kBfloat16 ? 2 * head_dim : head_dim;
}

// One head's K or V of one layer in one block; a multiple of 128.
WINTSERVE_HOST_DEVICE constexpr int KvTileBytes(KvCacheKind kind, int head_dim) {
  constexpr int kScaleBytes = 2;
  const int scales = kind == KvCacheKind::kInt8 ? kKvTileTokens * kScaleBytes : 0;
  return kKvTileTokens * KvRowBytes(kind, head_dim) + scales;
}

// One layer in one block.
WINTSERVE_HOST_DEVICE constexpr int64_t KvLayerBytes(KvCacheKind kind, int num_kv_heads,
                                                     int head_dim) {
  return int64_t{2} * num_kv_heads * KvTileBytes(kind, head_dim);  // 2: K and V
}

WINTSERVE_HOST_DEVICE constexpr int64_t KvBlockBytes(KvCacheKind kind, int num_layers,
                                                     int num_kv_heads, int head_dim) {
  return num_layers * KvLayerBytes(kind, num_kv_heads, head_dim);
}
static_assert(KvBlockBytes(KvCacheKind::kBfloat16, 28, 4, 128) == 7 << 19);  // 3.5 MiB

// From the start of a layer in a block to a tile.
WINTSERVE_HOST_DEVICE constexpr int64_t KvTileOffset(KvCacheKind kind, int num_kv_heads,
                                                     int head_dim, KvPart part, int kv_head) {
  const int tile = (part == KvPart::kKey ? 0 : num_kv_heads) + kv_head;
  return int64_t{tile} * KvTileBytes(kind, head_dim);
}

// What a chunk's number is xored with. Rows of 64 bytes share a line of all banks in pairs, so
// there two neighbours have the same.
WINTSERVE_HOST_DEVICE constexpr int KvSwizzle(int row_bytes, int token) {
  return row_bytes == 64 ? (token >> 1) & 3 : token & 7;
}

// From the start of a tile to a row's chunk 0. Chunk c lies at this offset ^ (c * kKvChunkBytes):
// row_bytes is a power of two and tiles are aligned to it.
WINTSERVE_HOST_DEVICE constexpr int KvRowOffset(int row_bytes, int token) {
  return token * row_bytes + KvSwizzle(row_bytes, token) * kKvChunkBytes;
}

WINTSERVE_HOST_DEVICE constexpr int KvChunkOffset(int row_bytes, int token, int chunk) {
  return KvRowOffset(row_bytes, token) ^ (chunk * kKvChunkBytes);
}

// From the start of a tile to one number.
WINTSERVE_HOST_DEVICE constexpr int KvElementOffset(KvCacheKind kind, int head_dim, int token,
                                                    int dim) {
  const int row_bytes = KvRowBytes(kind, head_dim);
  const int byte = dim * (kind == KvCacheKind::kBfloat16 ? 2 : 1);
  return KvChunkOffset(row_bytes, token, byte / kKvChunkBytes) + byte % kKvChunkBytes;
}

// From the start of a tile of the 8-bit cache to a token's scale.
WINTSERVE_HOST_DEVICE constexpr int KvScaleOffset(int head_dim, int token) {
  return kKvTileTokens * KvRowBytes(KvCacheKind::kInt8, head_dim) + 2 * token;
}

}  // namespace wintserve::kernels::plan
