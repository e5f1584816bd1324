// The inner loops of the WINT2 encoder: the best of 256 codewords for every four weights.
//
// With h the importance of each weight x, scale S and codeword c, the error that a byte adds beyond
// that of zeros is 2 S (S/2 sum h c^2 - sum h x c). The two sums do not depend on S. What the
// functions call a cost is the bracket. Both functions do the same arithmetic, whichever way their
// lanes lie, so that a cost found by one is found again by the other.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tools/quantizer/encode/code_map.h"

namespace wintserve::quantizer {

inline constexpr int kTileColumns = 32;  // columns that lie side by side for the search
inline constexpr int kGroupRows = 64;    // rows with one local scale
inline constexpr int kGroupBytes = kGroupRows / kWeightsOfByte;
inline constexpr int kMaxScales = 15;

// sum h c^2 of every codeword, for all byte rows of a matrix: what its columns share. Immutable;
// 256 bytes a row of the matrix, or 1 KiB in all without importance.
class NormTable {
 public:
  // importance  [k] in stored order, k a multiple of kWeightsOfByte, or empty: all 1
  NormTable(const Codebook& codebook, std::span<const float> importance);

  // [256], by byte
  const float* Row(int64_t byte_row) const { return &norms_[byte_row * stride_]; }

 private:
  int64_t stride_;
  std::vector<float> norms_;
};

// Four rows of weights, or as many such as a function takes, with what they are encoded by.
struct SearchRows {
  const float* weighted = nullptr;  // h x: [rows, kTileColumns], stored order
  const Codebook* codebook = nullptr;
  const NormTable* norms = nullptr;
  int64_t first_byte_row = 0;  // of the matrix, for norms
};

// costs[s, column] = sum over the bytes of a 64-group of the least cost that a codeword has with
// scale scales[s, column].
//   scales, costs  [num_scales, kTileColumns], num_scales in 1 … kMaxScales
void SumLeastCosts(const SearchRows& group, int num_scales, const float* scales, float* costs);

// The same of one column alone.
//   scales, costs  [num_scales]
void SumLeastCostsOfColumn(const SearchRows& group, int column, int num_scales, const float* scales,
                           float* costs);

// bytes[i] = the byte of least cost for four weights with this scale, the first one of several.
//   bytes  [kGroupBytes]
void FindBytes(const SearchRows& group, int column, float scale, uint8_t* bytes);

}  // namespace wintserve::quantizer
