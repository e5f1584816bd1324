// Weight matrices in device memory, in the layouts of the CUDA kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/matmul/device_weights.h"
#include "kernels/plan/pack_weights.h"

namespace wintserve::kernels::cuda {

// The workspace of a product for the largest number of rows that was asked for. Working it out goes
// over all smaller numbers, so it is done when that number grows and not for every call.
// Threading: that of the backend.
class WorkspaceMemo {
 public:
  // bytes_of(num_rows): for calls with up to num_rows rows.
  template <typename Fn>
  int64_t Bytes(int64_t num_rows, const Fn& bytes_of) {
    if (num_rows > num_rows_) {
      num_rows_ = num_rows;
      bytes_ = bytes_of(num_rows);
    }
    return bytes_;
  }

 private:
  int64_t num_rows_ = 0;
  int64_t bytes_ = 0;
};

// Device memory for matrices, cut from slabs: the driver gives out whole pages of 2 MiB, of which
// the thousands of small expert matrices of a model would waste several GiB.
class WeightArena {
 public:
  // A part of a slab, which lives as long as its parts.
  struct Part {
    std::shared_ptr<const DeviceBuffer> slab;
    uint8_t* data = nullptr;
    int64_t size_bytes = 0;
  };

  // Aligned to kAlignment; not zeroed. RESOURCE_EXHAUSTED: no memory.
  absl::StatusOr<Part> Allocate(int64_t size_bytes);

 private:
  struct Slab {
    std::shared_ptr<const DeviceBuffer> memory;
    int64_t used_bytes = 0;
  };
  static constexpr int64_t kAlignment = 1024;
  // A slab is a sixteenth of all before it, within these bounds, so that the last one's unused part
  // is little. What is larger than the largest gets its own.
  static constexpr int64_t kMinSlabBytes = int64_t{32} << 20;
  static constexpr int64_t kMaxSlabBytes = int64_t{1} << 30;
  static constexpr size_t kMaxOpenSlabs = 8;

  absl::StatusOr<Part> AllocateOwn(int64_t size_bytes);

  std::vector<Slab> open_slabs_;  // that may have room for another matrix, the oldest first
  int64_t total_bytes_ = 0;       // of all slabs
};

class CudaMatrix final : public WeightMatrix {
 public:
  enum class Layout {
    kRows,    // [k, n] as in the file: embeddings in bfloat16 or float32, other weights in float32
    kPacked,  // plan::WeightLayout
  };

  // Packs on the threads of `pool` and returns when the weights are on the device.
  // INVALID_ARGUMENT, RESOURCE_EXHAUSTED: Backend::Pack. Adds to `errors` what a WINT2 matrix
  // loses.
  static absl::StatusOr<std::unique_ptr<CudaMatrix>> Create(const formats::HostMatrix& matrix,
                                                            MatrixUse use, WeightArena* arena,
                                                            cpu::ThreadPool* pool,
                                                            plan::CodeLineErrors* errors,
                                                            cudaStream_t stream);
  // Launches what makes it on the device. Errors: Backend::MakeDummy.
  static absl::StatusOr<std::unique_ptr<CudaMatrix>> MakeDummy(const formats::DummyMatrix& matrix,
                                                               MatrixUse use, WeightArena* arena,
                                                               cudaStream_t stream);

  int64_t k() const override { return k_; }
  int64_t n() const override { return n_; }
  int64_t size_bytes() const override { return memory_.size_bytes; }

  MatrixUse use() const { return use_; }
  formats::WeightFormat format() const { return format_; }
  Layout layout() const { return layout_; }
  const void* data() const { return memory_.data; }
  // REQUIRES: kPacked.
  const DeviceWeights& packed() const { return packed_; }
  // Of Linear or Route; of a gate-up matrix, of the whole MLP.
  WorkspaceMemo& workspace() const { return workspace_; }

 private:
  CudaMatrix() = default;
  absl::Status Upload(const void* host, int64_t size_bytes, WeightArena* arena,
                      cudaStream_t stream);

  MatrixUse use_ = MatrixUse::kLinear;
  formats::WeightFormat format_ = formats::WeightFormat::kFloat32;
  Layout layout_ = Layout::kRows;
  int64_t k_ = 0;
  int64_t n_ = 0;
  DeviceWeights packed_;
  WeightArena::Part memory_;
  mutable WorkspaceMemo workspace_;
};

inline const CudaMatrix& OnCuda(const WeightMatrix& matrix) {
  return static_cast<const CudaMatrix&>(matrix);
}

// REQUIRES: both matrices are packed.
inline DeviceMlp PackedMlp(const MlpWeights& mlp) {
  return {OnCuda(*mlp.gate_up).packed(), OnCuda(*mlp.down).packed()};
}

class CudaExperts final : public ExpertGroup {
 public:
  // INVALID_ARGUMENT: Backend::GroupExperts.
  static absl::StatusOr<std::unique_ptr<CudaExperts>> Create(std::span<const MlpWeights> experts);

  int num_experts() const override { return static_cast<int>(mlps_.size()); }
  std::span<const DeviceMlp* const> mlps() const { return pointers_; }
  WorkspaceMemo& workspace() const { return workspace_; }  // of MoeMlp

 private:
  CudaExperts() = default;

  std::vector<DeviceMlp> mlps_;
  std::vector<const DeviceMlp*> pointers_;  // to mlps_
  mutable WorkspaceMemo workspace_;
};

}  // namespace wintserve::kernels::cuda
