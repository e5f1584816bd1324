// WINT2 sweeps, the inner loops: 16 bytes of 16 columns are searched again together while all
// others stay.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "tools/quantizer/calibrate/wint2_group.h"

namespace wintserve::quantizer::calibrate {

// 16 blocks: those of a group, in any order, or others.
struct BlockSet {
  std::array<int32_t, kGroupBlocks> blocks;
  bool is_group = false;                  // all blocks of one group
  float hessian[kGroupRows][kGroupRows];  // H of the set's rows
  GroupFactor factor;                     // of `hessian`
  // With L L^T the 4 x 4 part of a block: L^T, and L^-1.
  BlockBasis basis[kGroupBlocks];
  BlockBasis inverse[kGroupBlocks];

  void Fill(const FeedbackFactor& whole, const std::array<int32_t, kGroupBlocks>& blocks);
  // [64]: rows of the tile.
  std::span<const int32_t, kGroupRows> rows() const { return rows_; }

 private:
  std::array<int32_t, kGroupRows> rows_;
};

struct SetTables {
  BlockTables feedback;  // of set.factor.basis
  BlockTables descent;   // of set.basis
};

// Looks for bytes of less error for the set. Two ways: one pass of coordinate descent, each byte
// the codeword of least error while all else stays; and feedback inside the set, then such a pass.
// A group tries local scales near the present one, and 0, too. The state of least error is kept,
// the present one if none is better.
//   strip               of whole columns: arrays begin at the tile's first row
//   gradient            [64, 16] of the set's rows
//   decoded             [k, 16]
// Brings bytes, local_scale and decoded up to date, writes delta [64, 16] = old - new decoded of
// the set's rows. Returns whether anything changed.
bool SweepSet(const BlockSet& set, const SetTables& tables, const Wint2Strip& strip,
              const float* gradient, float* decoded, float* delta);

}  // namespace wintserve::quantizer::calibrate
