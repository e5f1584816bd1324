// The inner loops of the WINT2 encoder with error feedback: one group of 64 rows of 16 columns.
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

// Of one group, one map: for each block A c [4][256], then half its square [256].
struct BlockTables {
  std::vector<float> values = std::vector<float>(kGroupBlocks * kTableSize);

  // basis [kGroupBlocks][4][4]
  void Fill(const Codebook& codebook, const float* basis);
};

// What feedback and sweeps are given alike. Arrays over columns begin at the strip's first column;
// rows of `weights` and of the arrays below are kTileColumns apart.
struct Wint2Strip {
  const Codebook* codebook = nullptr;
  const BlockTables* tables = nullptr;
  const float* weights = nullptr;      // [64, 16]
  const float* super_scale = nullptr;  // [16], at least kSmallestScale
  int local_scale_radius = 0;
  int32_t* bytes = nullptr;        // [16 blocks][16]
  int32_t* local_scale = nullptr;  // [16]
};

// Rows of M of a group (feedback_factor.h).
struct GroupFactor {
  float factor[kGroupRows][kGroupRows];                       // the group's diagonal block
  float inverse_diagonal[kGroupRows];                         // 1 / M_ii
  float basis[kGroupBlocks][kWeightsOfByte][kWeightsOfByte];  // M of each block
  void Fill(const FeedbackFactor& whole, int64_t group);
};

// Encodes the group after those before it: every local scale near the first guess, and 0, is tried
// with feedback inside the group; the one of least error is kept.
//   tables   of group.basis
//   bias     [64, 16]: sum over rows j before the group of M_ij e_j
// Writes bytes, local_scale, error [64, 16] = weights - decoded, and adds to cost [16] what the
// group adds to the error.
void FeedbackGroup(const GroupFactor& group, const Wint2Strip& strip, const float* bias,
                   float* error, double* cost);

// A group's part of H.
struct GroupHessian {
  float hessian[kGroupRows][kGroupRows];
  // With L L^T the block's 4 x 4 part: L^T, and L^-1.
  float basis[kGroupBlocks][kWeightsOfByte][kWeightsOfByte];
  float inverse[kGroupBlocks][kWeightsOfByte][kWeightsOfByte];
  void Fill(const FeedbackFactor& whole, int64_t group);
};

// Coordinate descent over the group's bytes and its local scale: each byte gets the codeword of
// least error while all else stays, with the present local scale and those near it and 0; the local
// scale whose bytes end with the least error is kept, the present state if none is better.
//   tables    of group.basis
//   gradient  [64, 16]
// Brings bytes, local_scale and decoded [64, 16] up to date, writes delta [64, 16] = old - new
// decoded. Returns whether anything changed.
bool SweepGroup(const GroupHessian& group, const Wint2Strip& strip, const float* gradient,
                float* decoded, float* delta);

// decoded [64, 16] of bytes and local_scale: the values of formats::DecodeToFloat.
void DecodeGroup(const Wint2Strip& strip, float* decoded);

}  // namespace wintserve::quantizer::calibrate
