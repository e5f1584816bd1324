// The inner loops of the WINT2 encoder: the best of 256 codewords for every four weights.
//
// With h the importance of each weight x, scale S and codeword c, the error that a byte adds beyond
// that of zeros is 2 S (S/2 sum h c^2 - sum h x c). The two sums do not depend on S. What the
// functions call a cost is the bracket.
#pragma once

#include <cstdint>

#include "tools/quantizer/encode/code_map.h"

namespace wintserve::quantizer {

inline constexpr int kTileColumns = 32;  // columns searched at once
inline constexpr int kGroupRows = 64;    // rows with one scale
inline constexpr int kGroupBytes = kGroupRows / kWeightsOfByte;
inline constexpr int kMaxScales = 15;

// 64 rows of a tile, in stored order.
struct GroupView {
  const float* x = nullptr;           // [kGroupRows, kTileColumns]
  const float* importance = nullptr;  // [kGroupRows], or null: all 1
};

// costs[s, column] = sum over the group's bytes of the least cost that a codeword has with scale
// scales[s, column].
//   scales, costs  [num_scales, kTileColumns], num_scales in 1 … kMaxScales
void SumLeastCosts(const GroupView& group, const Codebook& codebook, int num_scales,
                   const float* scales, float* costs);

// bytes[i] = the byte of least cost for four weights with this scale, the first one of several.
//   bytes  [kGroupBytes]; column in 0 … kTileColumns - 1
void FindBytes(const GroupView& group, const Codebook& codebook, int column, float scale,
               uint8_t* bytes);

}  // namespace wintserve::quantizer
