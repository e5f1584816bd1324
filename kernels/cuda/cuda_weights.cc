#include "kernels/cuda/cuda_weights.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <memory>
#include <string_view>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/rows/float_product.h"
#include "kernels/plan/product_plan.h"

namespace wintserve::kernels::cuda {
namespace {

using formats::HostMatrix;
using formats::WeightFormat;

std::string_view UseName(MatrixUse use) {
  switch (use) {
    case MatrixUse::kLinear:
      return "linear";
    case MatrixUse::kGateUp:
      return "gate-up";
    case MatrixUse::kRouter:
      return "router";
    case MatrixUse::kEmbedding:
      return "embedding";
  }
  CHECK(false, "use={}", static_cast<int>(use));
}

// Whether the matrix stays as it is in the file.
absl::StatusOr<bool> StaysInRows(const HostMatrix& matrix, MatrixUse use) {
  const bool is_float32 = matrix.format == WeightFormat::kFloat32;
  if (use == MatrixUse::kEmbedding) {
    if (is_float32 || matrix.format == WeightFormat::kBfloat16) return true;
    return absl::InvalidArgumentError(
        "the embedding is quantised; allowed are bfloat16 and float32");
  }
  if (use == MatrixUse::kRouter) {
    if (!is_float32) return absl::InvalidArgumentError("the router is not float32");
    if (matrix.n <= kMaxRoutedExperts) return true;
    return absl::InvalidArgumentError(fmt::format(
        "{} experts are not supported on cuda; at most {}", matrix.n, kMaxRoutedExperts));
  }
  if (matrix.k <= 0 || matrix.n <= 0 || (use == MatrixUse::kGateUp && matrix.n % 2 != 0)) {
    return absl::InvalidArgumentError(
        fmt::format("a {} matrix of {} x {} has no columns", UseName(use), matrix.k, matrix.n));
  }
  return is_float32;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaMatrix>> CudaMatrix::Create(const HostMatrix& matrix,
                                                               MatrixUse use, cpu::ThreadPool* pool,
                                                               plan::CodeLineErrors* errors,
                                                               cudaStream_t stream) {
  auto packed = std::unique_ptr<CudaMatrix>(new CudaMatrix);
  packed->use_ = use;
  packed->format_ = matrix.format;
  packed->k_ = matrix.k;
  packed->n_ = matrix.n;
  ASSIGN_OR_RETURN(const bool stays, StaysInRows(matrix, use));
  if (stays) {
    const bool is_float32 = matrix.format == WeightFormat::kFloat32;
    RETURN_IF_ERROR(
        is_float32 ? packed->Upload(matrix.values_f32.data(),
                                    std::ssize(matrix.values_f32) * sizeof(float), stream)
                   : packed->Upload(matrix.values_bf16.data(),
                                    std::ssize(matrix.values_bf16) * sizeof(uint16_t), stream));
    return packed;
  }
  ASSIGN_OR_RETURN(const plan::WeightLayout layout,
                   plan::LayOutWeights(matrix, use == MatrixUse::kGateUp));
  const auto bytes = std::make_unique_for_overwrite<uint8_t[]>(layout.size_bytes());
  const plan::CodeLineErrors own = plan::PackWeights(matrix, layout, bytes.get(), pool);
  errors->num_columns += own.num_columns;
  errors->num_bytes += own.num_bytes;
  packed->layout_ = Layout::kPacked;
  RETURN_IF_ERROR(packed->Upload(bytes.get(), layout.size_bytes(), stream));
  packed->packed_ = {layout, packed->memory_.data<uint8_t>()};
  return packed;
}

absl::Status CudaMatrix::Upload(const void* host, int64_t size_bytes, cudaStream_t stream) {
  ASSIGN_OR_RETURN(memory_, DeviceBuffer::Allocate(size_bytes));
  // On the stream of the operators, which does not wait for copies elsewhere.
  RETURN_IF_ERROR(ToStatus(cudaMemcpyAsync(memory_.data(), host, static_cast<size_t>(size_bytes),
                                           cudaMemcpyHostToDevice, stream),
                           "copying weights"));
  return ToStatus(cudaStreamSynchronize(stream), "copying weights");
}

absl::StatusOr<std::unique_ptr<CudaExperts>> CudaExperts::Create(
    std::span<const MlpWeights> experts) {
  if (experts.empty() || experts.size() > plan::kMaxExperts) {
    return absl::InvalidArgumentError(fmt::format(
        "{} experts are not supported on cuda; 1 to {} are", experts.size(), plan::kMaxExperts));
  }
  const auto same = [](const WeightMatrix* a, const WeightMatrix* b) {
    const CudaMatrix& left = OnCuda(*a);
    const CudaMatrix& right = OnCuda(*b);
    return left.format() == right.format() && left.k() == right.k() && left.n() == right.n() &&
           left.packed().layout.k_order == right.packed().layout.k_order;
  };
  auto group = std::unique_ptr<CudaExperts>(new CudaExperts);
  for (size_t e = 0; e < experts.size(); ++e) {
    if (OnCuda(*experts[e].gate_up).layout() != CudaMatrix::Layout::kPacked ||
        OnCuda(*experts[e].down).layout() != CudaMatrix::Layout::kPacked) {
      return absl::InvalidArgumentError(fmt::format(
          "expert {} is float32, which is not supported on cuda; bfloat16 and WINT8, 4, 2 are", e));
    }
    if (!same(experts[e].gate_up, experts[0].gate_up) || !same(experts[e].down, experts[0].down)) {
      return absl::InvalidArgumentError(
          fmt::format("expert {} has another shape or format than expert 0", e));
    }
    group->mlps_.push_back(PackedMlp(experts[e]));
  }
  for (const DeviceMlp& mlp : group->mlps_) group->pointers_.push_back(&mlp);
  return group;
}

}  // namespace wintserve::kernels::cuda
