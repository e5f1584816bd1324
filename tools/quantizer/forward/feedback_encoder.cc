#include "tools/quantizer/forward/feedback_encoder.h"

#include <algorithm>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/formats/bf16.h"
#include "tools/quantizer/encode/encode.h"

namespace wintserve::quantizer {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;

HostMatrix ToBfloat16(const LargeVector& values, int64_t k, int64_t n,
                      kernels::cpu::ThreadPool* pool) {
  HostMatrix matrix = formats::MakeHostMatrix(WeightFormat::kBfloat16, k, n);
  pool->Run(k, k * n, [&](int64_t row, int) {
    const float* const from = values.data() + row * n;
    std::transform(from, from + n, matrix.values_bf16.begin() + row * n, formats::FloatToBfloat16);
  });
  return matrix;
}

HostMatrix ToFloat32(const LargeVector& values, int64_t k, int64_t n) {
  HostMatrix matrix;
  matrix.format = WeightFormat::kFloat32;
  matrix.k = k;
  matrix.n = n;
  matrix.values_f32.assign(values.begin(), values.end());
  return matrix;
}

// The weights of a matrix that is not quantised.
LargeVector Widen(const HostMatrix& matrix, kernels::cpu::ThreadPool* pool) {
  CHECK(matrix.format == WeightFormat::kFloat32 || matrix.format == WeightFormat::kBfloat16);
  LargeVector weights(matrix.k * matrix.n);
  pool->Run(matrix.k, matrix.k * matrix.n, [&](int64_t row, int) {
    const int64_t first = row * matrix.n;
    float* const to = weights.data() + first;
    if (matrix.format == WeightFormat::kFloat32) {
      std::copy_n(matrix.values_f32.begin() + first, matrix.n, to);
    } else {
      std::transform(matrix.values_bf16.begin() + first,
                     matrix.values_bf16.begin() + first + matrix.n, to, formats::Bfloat16ToFloat);
    }
  });
  return weights;
}

// Of a matrix that is stored unquantised.
WeightFormat PlainFormat(const MatrixRef& ref) {
  return ref.role == MatrixRole::kRouter ? WeightFormat::kFloat32 : WeightFormat::kBfloat16;
}

}  // namespace

MomentNeeds FeedbackEncoder::Needs(const MatrixRef& ref, StoredFormat format, int64_t num_inputs,
                                   bool models_differ) const {
  if (ref.role == MatrixRole::kEmbedding || ref.role == MatrixRole::kHead) return {};
  if (num_inputs > options_.max_inputs) return {};
  const bool repairs = options_.repair_residual && AddsToResidual(ref.role);
  if (format != StoredFormat::kPlain) {
    return {.hessian = true,
            .cross = options_.asymmetric && models_differ,
            .cross_output = repairs && models_differ};
  }
  const bool resolves = models_differ && (ref.role == MatrixRole::kRouter ? options_.resolve_router
                                                                          : options_.resolve_plain);
  return {.hessian = resolves, .cross = resolves, .cross_output = resolves && repairs};
}

absl::StatusOr<HostMatrix> FeedbackEncoder::Encode(const MatrixRef& ref, StoredFormat format,
                                                   const HostMatrix& source,
                                                   const Moments* moments) {
  const int64_t k = source.k;
  const int64_t n = source.n;
  if (format == StoredFormat::kPlain && moments == nullptr && source.format == PlainFormat(ref)) {
    return source;
  }
  LargeVector target = Widen(source, pool_);
  if (moments != nullptr && (!moments->cross.empty() || !moments->cross_output.empty())) {
    ASSIGN_OR_RETURN(target, SolveTarget({target.data(), k, n}, *moments, options_.target, *pool_));
  }
  if (format == StoredFormat::kPlain) {
    return PlainFormat(ref) == WeightFormat::kFloat32 ? ToFloat32(target, k, n)
                                                      : ToBfloat16(target, k, n, pool_);
  }

  const FloatMatrix weights = {target.data(), k, n};
  const WeightFormat quantized = *QuantizedFormat(format);
  const FeedbackOptions& feedback = options_.feedback;
  if (moments == nullptr) {
    if (quantized != WeightFormat::kWint2) return EncodePerChannel(quantized, weights, *pool_);
    return EncodeWint2(weights, {}, {.maps = feedback.maps, .k_order = feedback.k_order}, *pool_);
  }
  absl::StatusOr<FeedbackResult> result =
      quantized == WeightFormat::kWint2
          ? EncodeWint2WithFeedback(weights, *moments, feedback, *pool_)
          : EncodePerChannelWithFeedback(quantized, weights, *moments, feedback, *pool_);
  RETURN_IF_ERROR(result.status());
  return std::move(result->matrix);
}

}  // namespace wintserve::quantizer
