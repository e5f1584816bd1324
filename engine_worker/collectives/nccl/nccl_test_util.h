// GPU ranks of tests.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine_worker/collectives/collective_suite_test_util.h"
#include "engine_worker/collectives/nccl/nccl_collective.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/handles.h"

namespace wintserve {

using kernels::cuda::DeviceBuffer;
using kernels::cuda::PinnedBuffer;
using kernels::cuda::Stream;

inline constexpr int64_t kMaxTestBytes = int64_t{40} << 20;

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

inline std::string ReasonToSkip(int num_gpus) {
  const int found = kernels::cuda::NumVisibleDevices();
  if (found < num_gpus) return fmt::format("needs {} GPUs, {} here", num_gpus, found);
  const absl::Status nccl = CheckNccl();
  return nccl.ok() ? "" : std::string(nccl.message());
}

// A rank on the GPU of its number.
class CudaRank final : public TestRank {
 public:
  CudaRank(const std::shared_ptr<MappedMemory>& memory, int rank, int world_size,
           int64_t max_peer_bytes) {
    Must(kernels::cuda::UseDevice(rank));
    stream_ = Must(kernels::cuda::CreateStream());
    in_ = Must(DeviceBuffer::Allocate(kMaxTestBytes));
    out_ = Must(DeviceBuffer::Allocate(kMaxTestBytes * world_size));
    host_ = Must(PinnedBuffer::Allocate(kMaxTestBytes * world_size));
    auto control = Must(ShmCollective::Create(memory, {.group_epoch = 7,
                                                       .rank = rank,
                                                       .world_size = world_size,
                                                       .slot_bytes = kNcclControlSlotBytes}));
    collective_ = Must(NcclCollective::Create(
        std::move(control), {.stream = stream_.get(), .max_peer_bytes = max_peer_bytes}));
    CHECK(collective_->uses_peer_memory() == (max_peer_bytes != 0), "peer memory");
  }

  NcclCollective& collective() override { return *collective_; }
  cudaStream_t stream() const { return stream_.get(); }
  float* data() const { return in_.data<float>(); }

  absl::Status AllReduceSum(std::vector<float>* data) override {
    const int64_t size_bytes = std::ssize(*data) * static_cast<int64_t>(sizeof(float));
    Upload(data->data(), size_bytes);
    const absl::Status status = collective_->AllReduceSum(in_.data<float>(), std::ssize(*data));
    return status.ok() ? Download(in_.data(), size_bytes, data->data()) : status;
  }
  absl::Status AllGather(const std::vector<float>& in, std::vector<float>* out) override {
    Upload(in.data(), std::ssize(in) * static_cast<int64_t>(sizeof(float)));
    const absl::Status status =
        collective_->AllGather(in_.data<float>(), std::ssize(in), out_.data<float>());
    if (!status.ok()) return status;
    return Download(out_.data(), std::ssize(*out) * static_cast<int64_t>(sizeof(float)),
                    out->data());
  }
  absl::Status Broadcast(std::string* data) override {
    Upload(data->data(), std::ssize(*data));
    const absl::Status status = collective_->Broadcast(in_.data(), std::ssize(*data));
    return status.ok() ? Download(in_.data(), std::ssize(*data), data->data()) : status;
  }

  // Waits for what was put on the stream.
  absl::Status Finish() {
    const absl::Status status =
        kernels::cuda::ToStatus(cudaStreamSynchronize(stream_.get()), "waiting");
    return status.ok() ? collective_->DeviceStatus() : status;
  }

  void Upload(const void* from, int64_t size_bytes) const {
    if (size_bytes == 0) return;
    std::memcpy(host_.data(), from, size_bytes);
    CUDA_CALL(cudaMemcpyAsync, in_.data(), host_.data(), static_cast<size_t>(size_bytes),
              cudaMemcpyHostToDevice, stream_.get());
  }
  absl::Status Download(const void* from, int64_t size_bytes, void* to) {
    if (size_bytes > 0) {
      CUDA_CALL(cudaMemcpyAsync, host_.data(), from, static_cast<size_t>(size_bytes),
                cudaMemcpyDeviceToHost, stream_.get());
    }
    const absl::Status status = Finish();
    if (status.ok()) std::memcpy(to, host_.data(), size_bytes);
    return status;
  }

 private:
  Stream stream_;
  DeviceBuffer in_;
  DeviceBuffer out_;
  PinnedBuffer host_;
  std::unique_ptr<NcclCollective> collective_;  // last: it leaves before its memory goes
};

inline CollectiveKind Gpus(const std::string& name, int world_size, int64_t max_peer_bytes) {
  return {.name = fmt::format("{}Of{}", name, world_size),
          .world_size = world_size,
          .slot_bytes = kNcclControlSlotBytes,
          .counts = {0, 1, 2, 3, 63, 1000, 4096, 8191, 65536, 262144, 524288, 524289, 1000003,
                     2 << 20, (2 << 20) + 4, 10 << 20},
          .num_operations = 40,
          .num_groups = 2,
          .join =
              [max_peer_bytes](const std::shared_ptr<MappedMemory>& memory, int rank, int ranks) {
                return std::make_unique<CudaRank>(memory, rank, ranks, max_peer_bytes);
              },
          .reason_to_skip = [world_size] { return ReasonToSkip(world_size); }};
}

}  // namespace wintserve
