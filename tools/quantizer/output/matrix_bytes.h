// A matrix or a vector as the bytes of its tensors.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/formats/matrix.h"
#include "tools/quantizer/output/tensor_plan.h"

namespace wintserve::quantizer {

// Takes the bytes of one tensor, which are valid during the call.
using TensorSink =
    absl::FunctionRef<absl::Status(const PlannedTensor& tensor, std::span<const uint8_t> bytes)>;

// Hands every tensor of the step to `sink`, in order; at most one of them is packed at a time.
// REQUIRES: the matrix has the step's shape and format (kPlain: kFloat32 where the tensor is, else
// kBfloat16).
absl::Status EmitMatrix(const PlannedStep& step, const formats::HostMatrix& matrix,
                        TensorSink sink);
// The same for a vector; rounded to the tensor's type.
absl::Status EmitVector(const PlannedStep& step, const std::vector<float>& values, TensorSink sink);

}  // namespace wintserve::quantizer
