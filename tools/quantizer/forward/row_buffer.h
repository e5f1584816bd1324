// Rows of activations that own their memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <new>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "fmt/format.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/operands.h"
#include "tools/quantizer/calibrate/large_array.h"

namespace wintserve::quantizer {

// [rows, columns] float32 in memory that the CPU backend takes. Undefined at first, so that the
// threads that compute the rows are the first to touch them. Move-only; empty when default.
class RowBuffer {
 public:
  RowBuffer() = default;
  // RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<RowBuffer> Allocate(int64_t num_rows, int64_t columns) {
    RowBuffer rows;
    rows.num_rows_ = num_rows;
    rows.stride_ = kernels::PaddedStride(columns);
    try {
      // Not even an expert without tokens has an empty one.
      rows.values_ = calibrate::LargeArray(std::max<int64_t>(1, num_rows * rows.stride_));
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError(
          fmt::format("no memory for {} rows of {} values", num_rows, columns));
    }
    return rows;
  }

  void FillWithZeros(kernels::cpu::ThreadPool* pool) {
    pool->Run(num_rows_, num_rows_ * stride_,
              [&](int64_t r, int) { std::fill_n(From(r).data, stride_, 0.0f); });
  }

  bool is_empty() const { return values_.data() == nullptr; }
  kernels::Rows rows() const { return From(0); }
  // The rows from `first` on.
  kernels::Rows From(int64_t first) const {
    return {const_cast<float*>(values_.data()) + first * stride_, stride_};
  }

 private:
  int64_t num_rows_ = 0;
  int64_t stride_ = 0;
  calibrate::LargeArray values_;
};

}  // namespace wintserve::quantizer
