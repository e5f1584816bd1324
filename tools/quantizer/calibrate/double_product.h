// The one product that solving for a target and factoring a hessian spend their time in.
#pragma once

#include <cstdint>

namespace wintserve::quantizer::calibrate {

inline constexpr int64_t kPanelColumns = 64;

// out -= x panel in float64, with x [num_rows, depth] of row stride x_stride, panel [depth,
// kPanelColumns] and out [num_rows, kPanelColumns] of row stride out_stride. Terms are subtracted
// in order of depth, each with one rounding, however many rows there are. Out overlaps neither.
void SubtractProduct(const double* x, int64_t x_stride, int64_t num_rows, int64_t depth,
                     const double* panel, double* out, int64_t out_stride);

}  // namespace wintserve::quantizer::calibrate
