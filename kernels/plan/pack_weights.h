// From the canonical host matrix to the bytes that the CUDA products read (weight_layout.h).
#pragma once

#include <cstdint>

#include "absl/status/statusor.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/formats/matrix.h"
#include "kernels/plan/weight_layout.h"

namespace wintserve::kernels::plan {

// WINT2 columns without an exact code line, and their bytes of 256 that are off (code_line.h).
struct CodeLineErrors {
  int64_t num_columns = 0;
  int64_t num_bytes = 0;
};

// INVALID_ARGUMENT: a shape or scale that the products cannot represent, or float32 weights; the
// message names the value and what is allowed.
absl::StatusOr<WeightLayout> LayOutWeights(const formats::HostMatrix& matrix, bool gate_up);

// Writes layout.size_bytes() bytes to `out`, every one of them, and returns what was inexact. The
// bytes do not depend on the number of threads. pool: null for the calling thread alone.
// REQUIRES: `layout` is LayOutWeights' for this matrix.
CodeLineErrors PackWeights(const formats::HostMatrix& matrix, const WeightLayout& layout,
                           uint8_t* out, cpu::ThreadPool* pool = nullptr);

}  // namespace wintserve::kernels::plan
