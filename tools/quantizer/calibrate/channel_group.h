// The inner loops of the WINT4 and WINT8 encoder with error feedback: one group of 64 rows of 16
// columns. A row is rounded at a time. Arrays as in wint2_group.h.
#pragma once

#include <cstdint>

#include "tools/quantizer/calibrate/column_tile.h"

namespace wintserve::quantizer::calibrate {

struct ChannelStrip {
  const float* scale = nullptr;  // [16]; 0: every code is 0
  float largest_code = 0;        // 7 or 127
  int32_t* codes = nullptr;      // [64, 16], rows kStripColumns apart
};

// A square block on the diagonal of M or H.
struct GroupBlock {
  float values[kGroupRows][kGroupRows];
  float inverse_diagonal[kGroupRows];
  // matrix: its rows lie `stride` apart.
  void Fill(const float* matrix, int64_t stride, int64_t group);
};

// Encodes the group after those before it.
//   factor   of M
//   weights  [64, 16]; bias [64, 16]: sum over rows j before the group of M_ij e_j
// Writes codes and error [64, 16], adds to cost [16] what the group adds to the error.
void FeedbackChannelGroup(const GroupBlock& factor, const ChannelStrip& strip, const float* weights,
                          const float* bias, float* error, double* cost);

// Coordinate descent over the group's codes.
//   hessian  of H; gradient [64, 16]
// Brings codes and decoded [64, 16] up to date, writes delta [64, 16] = old - new decoded. Returns
// whether anything changed.
bool SweepChannelGroup(const GroupBlock& hessian, const ChannelStrip& strip, const float* gradient,
                       float* decoded, float* delta);

// decoded [64, 16]: the values of formats::DecodeToFloat.
void DecodeChannelGroup(const ChannelStrip& strip, float* decoded);

}  // namespace wintserve::quantizer::calibrate
