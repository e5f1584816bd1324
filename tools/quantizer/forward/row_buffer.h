// Rows of activations that own their memory.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "common/status_macros.h"
#include "kernels/backend.h"
#include "kernels/operands.h"

namespace wintserve::quantizer {

// [rows, columns] float32 in a backend's memory, zero at first. Move-only; empty when default.
class RowBuffer {
 public:
  RowBuffer() = default;
  // RESOURCE_EXHAUSTED: no memory.
  static absl::StatusOr<RowBuffer> Allocate(kernels::Backend* backend, int64_t num_rows,
                                            int64_t columns) {
    RowBuffer rows;
    rows.stride_ = kernels::PaddedStride(columns);
    ASSIGN_OR_RETURN(rows.buffer_, backend->Allocate(num_rows * rows.stride_ *
                                                     static_cast<int64_t>(sizeof(float))));
    return rows;
  }

  bool is_empty() const { return buffer_ == nullptr; }
  kernels::Rows rows() const { return From(0); }
  // The rows from `first` on.
  kernels::Rows From(int64_t first) const {
    return {static_cast<float*>(buffer_->data()) + first * stride_, stride_};
  }

 private:
  int64_t stride_ = 0;
  std::unique_ptr<kernels::Buffer> buffer_;
};

}  // namespace wintserve::quantizer
