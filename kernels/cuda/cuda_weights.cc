#include "kernels/cuda/cuda_weights.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string_view>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/dummy/dummy_weights.h"
#include "kernels/cuda/rows/float_product.h"
#include "kernels/plan/dummy_weights.h"
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

// Whether the matrix, of a file or a dummy, stays in rows.
template <typename Matrix>
absl::StatusOr<bool> StaysInRows(const Matrix& matrix, MatrixUse use) {
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
                                                               MatrixUse use, WeightArena* arena,
                                                               cpu::ThreadPool* pool,
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
        is_float32
            ? packed->Upload(matrix.values_f32.data(),
                             std::ssize(matrix.values_f32) * sizeof(float), arena, stream)
            : packed->Upload(matrix.values_bf16.data(),
                             std::ssize(matrix.values_bf16) * sizeof(uint16_t), arena, stream));
    return packed;
  }
  ASSIGN_OR_RETURN(const plan::WeightLayout layout,
                   plan::LayOutWeights(matrix, use == MatrixUse::kGateUp));
  const auto bytes = std::make_unique_for_overwrite<uint8_t[]>(layout.size_bytes());
  const plan::CodeLineErrors own = plan::PackWeights(matrix, layout, bytes.get(), pool);
  errors->num_columns += own.num_columns;
  errors->num_bytes += own.num_bytes;
  packed->layout_ = Layout::kPacked;
  RETURN_IF_ERROR(packed->Upload(bytes.get(), layout.size_bytes(), arena, stream));
  packed->packed_ = {layout, packed->memory_.data};
  return packed;
}

absl::StatusOr<std::unique_ptr<CudaMatrix>> CudaMatrix::MakeDummy(
    const formats::DummyMatrix& matrix, MatrixUse use, WeightArena* arena, cudaStream_t stream) {
  auto made = std::unique_ptr<CudaMatrix>(new CudaMatrix);
  made->use_ = use;
  made->format_ = matrix.format;
  made->k_ = matrix.k;
  made->n_ = matrix.n;
  ASSIGN_OR_RETURN(const bool stays, StaysInRows(matrix, use));
  if (stays) {
    const auto element_bytes = static_cast<int64_t>(
        matrix.format == WeightFormat::kFloat32 ? sizeof(float) : sizeof(uint16_t));
    ASSIGN_OR_RETURN(made->memory_, arena->Allocate(matrix.k * matrix.n * element_bytes));
    LaunchDummyRows(matrix, made->memory_.data, stream);
    return made;
  }
  const plan::WeightLayout layout = plan::LayOutDummyWeights(matrix, use == MatrixUse::kGateUp);
  ASSIGN_OR_RETURN(made->memory_, arena->Allocate(layout.size_bytes()));
  made->layout_ = Layout::kPacked;
  made->packed_ = {layout, made->memory_.data};
  LaunchDummyWeights(matrix, layout, made->memory_.data, stream);
  return made;
}

absl::StatusOr<WeightArena::Part> WeightArena::AllocateOwn(int64_t size_bytes) {
  ASSIGN_OR_RETURN(DeviceBuffer buffer, DeviceBuffer::Allocate(size_bytes));
  auto* data = buffer.data<uint8_t>();
  return Part{std::make_shared<const DeviceBuffer>(std::move(buffer)), data, size_bytes};
}

absl::StatusOr<WeightArena::Part> WeightArena::Allocate(int64_t size_bytes) {
  if (size_bytes > kMaxSlabBytes) return AllocateOwn(size_bytes);
  const auto has_room = [&](const Slab& slab) {
    return slab.used_bytes + size_bytes <= slab.memory->size_bytes();
  };
  auto slab = std::find_if(open_slabs_.begin(), open_slabs_.end(), has_room);
  if (slab == open_slabs_.end()) {
    const int64_t slab_bytes =
        std::max(size_bytes, std::clamp(total_bytes_ / 16, kMinSlabBytes, kMaxSlabBytes));
    ASSIGN_OR_RETURN(DeviceBuffer memory, DeviceBuffer::Allocate(slab_bytes));
    if (open_slabs_.size() == kMaxOpenSlabs) open_slabs_.erase(open_slabs_.begin());
    open_slabs_.push_back({std::make_shared<const DeviceBuffer>(std::move(memory))});
    total_bytes_ += slab_bytes;
    slab = open_slabs_.end() - 1;
  }
  const Part part = {slab->memory, slab->memory->data<uint8_t>() + slab->used_bytes, size_bytes};
  slab->used_bytes += (size_bytes + kAlignment - 1) / kAlignment * kAlignment;
  return part;
}

absl::Status CudaMatrix::Upload(const void* host, int64_t size_bytes, WeightArena* arena,
                                cudaStream_t stream) {
  ASSIGN_OR_RETURN(memory_, arena->Allocate(size_bytes));
  // On the stream of the operators, which does not wait for copies elsewhere.
  RETURN_IF_ERROR(ToStatus(cudaMemcpyAsync(memory_.data, host, static_cast<size_t>(size_bytes),
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
