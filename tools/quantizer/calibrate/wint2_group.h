// WINT2 with error feedback, the inner loops: one group of 64 rows of 16 columns.
//
// Blocks are the rows of one byte; a block's error is measured after a change of basis A [4, 4], in
// which it is a plain sum of squares. So the best byte is the codeword c of least
//     ||z - S A c||^2,    z = A times the wanted weights,
// and A c is made once for all columns: a table.
#pragma once

#include <cstdint>
#include <vector>

#include "tools/quantizer/calibrate/column_tile.h"
#include "tools/quantizer/encode/code_map.h"

namespace wintserve::quantizer::calibrate {

inline constexpr int kGroupBlocks = kGroupRows / kWeightsOfByte;
inline constexpr int kTableSize = (kWeightsOfByte + 1) * kNumBytes;
inline constexpr int kLargestLocalScale = 15;

using BlockBasis = float[kWeightsOfByte][kWeightsOfByte];

// Of 16 blocks, one map: for each block A c [4][256], then half its square [256].
struct BlockTables {
  std::vector<float> values = std::vector<float>(kGroupBlocks * kTableSize);

  // basis [kGroupBlocks]
  void Fill(const Codebook& codebook, const BlockBasis* basis);
};

// Strip of columns. Arrays begin at its first column and, unless said otherwise, at the first row
// of a group; rows of `weights` and of float arrays below are kTileColumns apart.
struct Wint2Strip {
  const Codebook* codebook = nullptr;
  const float* weights = nullptr;      // [64, 16]
  const float* super_scale = nullptr;  // [16], positive
  int local_scale_radius = 0;
  int32_t* bytes = nullptr;        // [16 blocks][16]
  int32_t* local_scale = nullptr;  // [16]
};

// A lower triangular M [64, 64] with M^T M = H, for feedback over 64 rows.
struct GroupFactor {
  float factor[kGroupRows][kGroupRows];
  float inverse_diagonal[kGroupRows];  // 1 / M_ii
  BlockBasis basis[kGroupBlocks];      // M of each block

  // The group's rows of the whole matrix's M (feedback_factor.h).
  void Fill(const FeedbackFactor& whole, int64_t group);
  // Sets the rest from `factor`.
  void SetBlocks();
};

// Encodes the group after those before it: every local scale near the first guess, and 0, is tried
// with feedback inside the group; the one of least error is kept.
//   tables   of group.basis
//   bias     [64, 16]: sum over rows j before the group of M_ij e_j
// Writes bytes, local_scale, error [64, 16] = weights - decoded, and adds to cost [16] what the
// group adds to the error.
void FeedbackGroup(const GroupFactor& group, const BlockTables& tables, const Wint2Strip& strip,
                   const float* bias, float* error, double* cost);

// decoded [64, 16] of bytes and local_scale: the values of formats::DecodeToFloat.
void DecodeGroup(const Wint2Strip& strip, float* decoded);

}  // namespace wintserve::quantizer::calibrate
