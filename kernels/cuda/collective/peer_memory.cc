#include "kernels/cuda/collective/peer_memory.h"

#include <fmt/format.h>

#include <atomic>
#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"

namespace wintserve::kernels::cuda {
namespace {

uint64_t ProcessIdentity() {
  static const uint64_t identity = [] {
    std::random_device random;
    return uint64_t{random()} << 32 | random();
  }();
  return identity;
}

// The current device may write to `device`'s memory from now on.
absl::Status EnableAccess(int device) {
  int current = 0;
  CUDA_CALL(cudaGetDevice, &current);
  if (device == current) return absl::OkStatus();
  int can_access = 0;
  RETURN_IF_ERROR(ToStatus(cudaDeviceCanAccessPeer(&can_access, current, device),
                           fmt::format("asking about device {}", device)));
  if (can_access == 0) {
    return absl::UnavailableError(
        fmt::format("device {} cannot reach the memory of device {}", current, device));
  }
  const cudaError_t enabled = cudaDeviceEnablePeerAccess(device, 0);
  if (enabled == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();
    return absl::OkStatus();
  }
  return ToStatus(enabled, fmt::format("reaching the memory of device {}", device));
}

}  // namespace

absl::StatusOr<std::unique_ptr<PeerMemory>> PeerMemory::Create(int rank, int world_size) {
  CHECK(world_size >= 2 && world_size <= kMaxPeerRanks && rank >= 0 && rank < world_size,
        "rank {} of {}", rank, world_size);
  std::unique_ptr<PeerMemory> peers(new PeerMemory());
  const int64_t size_bytes = PeerMemoryBytes(world_size);
  ASSIGN_OR_RETURN(peers->memory_, DeviceBuffer::Allocate(size_bytes));
  ASSIGN_OR_RETURN(peers->abort_word_, PinnedBuffer::Allocate(sizeof(uint32_t)));
  *peers->abort_word_.data<uint32_t>() = 0;
  CUDA_CALL(cudaMemset, peers->memory_.data(), 0, static_cast<size_t>(size_bytes));
  // Before another rank's first flag comes.
  RETURN_IF_ERROR(ToStatus(cudaDeviceSynchronize(), "clearing shared memory"));

  int device = 0;
  CUDA_CALL(cudaGetDevice, &device);
  PeerHandle& handle = peers->handle_;
  handle.process = ProcessIdentity();
  handle.address = reinterpret_cast<uint64_t>(peers->memory_.data());
  handle.size_bytes = size_bytes;
  CUDA_CALL(cudaDeviceGetPCIBusId, handle.device, static_cast<int>(sizeof(handle.device)), device);
  RETURN_IF_ERROR(ToStatus(cudaIpcGetMemHandle(&handle.memory, peers->memory_.data()),
                           "sharing memory with other processes"));
  peers->group_ = {
      .rank = rank, .world_size = world_size, .abort_word = peers->abort_word_.data<uint32_t>()};
  PreparePeerExchange();
  return peers;
}

PeerMemory::~PeerMemory() {
  for (void* mapping : mappings_) {
    const cudaError_t error = cudaIpcCloseMemHandle(mapping);
    if (error != cudaSuccess) LOG_WARNING("cudaIpcCloseMemHandle: {}", ErrorText(error));
  }
}

absl::Status PeerMemory::Open(std::span<const PeerHandle> handles) {
  CHECK(static_cast<int>(handles.size()) == group_.world_size, "{} handles", handles.size());
  for (int rank = 0; rank < group_.world_size; ++rank) {
    const absl::Status opened = OpenOne(rank, handles[rank]);
    if (!opened.ok()) {
      return absl::Status(opened.code(), fmt::format("the memory of rank {}: {}", rank,
                                                     std::string(opened.message())));
    }
  }
  return absl::OkStatus();
}

absl::Status PeerMemory::OpenOne(int rank, const PeerHandle& handle) {
  if (rank == group_.rank) {
    group_.memory[rank] = memory_.data<unsigned char>();
    return absl::OkStatus();
  }
  if (handle.size_bytes != memory_.size_bytes()) {
    return absl::InvalidArgumentError(
        fmt::format("it has {} bytes, this rank's {}", handle.size_bytes, memory_.size_bytes()));
  }
  const std::string name(handle.device, ::strnlen(handle.device, sizeof(handle.device)));
  int device = 0;
  RETURN_IF_ERROR(ToStatus(cudaDeviceGetByPCIBusId(&device, name.c_str()),
                           fmt::format("looking for the device at {}", name)));
  RETURN_IF_ERROR(EnableAccess(device));
  if (handle.process == ProcessIdentity()) {
    group_.memory[rank] = reinterpret_cast<unsigned char*>(handle.address);
    return absl::OkStatus();
  }
  void* mapping = nullptr;
  RETURN_IF_ERROR(ToStatus(
      cudaIpcOpenMemHandle(&mapping, handle.memory, cudaIpcMemLazyEnablePeerAccess), "mapping it"));
  mappings_.push_back(mapping);
  group_.memory[rank] = static_cast<unsigned char*>(mapping);
  return absl::OkStatus();
}

void PeerMemory::Abort() {
  std::atomic_ref<uint32_t>(*abort_word_.data<uint32_t>()).store(1, std::memory_order_release);
}

}  // namespace wintserve::kernels::cuda
