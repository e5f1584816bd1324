#include "kernels/cuda/shared_memory.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "common/log.h"
#include "common/mapped_memory.h"
#include "common/status_macros.h"
#include "kernels/cuda/cuda_check.h"
#include "kernels/cuda/cuda_status.h"

namespace wintserve::kernels::cuda {
namespace {

// Of the driver, which the runtime has loaded; the runtime has no such calls.
struct DriverFunctions {
  decltype(&cuMemImportFromShareableHandle) import_handle = nullptr;
  decltype(&cuMemAddressReserve) reserve = nullptr;
  decltype(&cuMemAddressFree) free_addresses = nullptr;
  decltype(&cuMemMap) map = nullptr;
  decltype(&cuMemUnmap) unmap = nullptr;
  decltype(&cuMemSetAccess) set_access = nullptr;
  decltype(&cuMemRelease) release = nullptr;
  decltype(&cuGetErrorName) error_name = nullptr;
};

template <typename Function>
absl::Status Find(const char* name, Function* function) {
  constexpr unsigned kSince = 10020;  // CUDA 10.2, where all of them are from
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  void* entry = nullptr;
  RETURN_IF_ERROR(ToStatus(
      cudaGetDriverEntryPointByVersion(name, &entry, kSince, cudaEnableDefault, &found), name));
  if (found != cudaDriverEntryPointSuccess || entry == nullptr) {
    return absl::InternalError(fmt::format("the NVIDIA driver has no {}", name));
  }
  *function = reinterpret_cast<Function>(entry);
  return absl::OkStatus();
}

absl::StatusOr<DriverFunctions> FindDriverFunctions() {
  DriverFunctions found;
  RETURN_IF_ERROR(Find("cuMemImportFromShareableHandle", &found.import_handle));
  RETURN_IF_ERROR(Find("cuMemAddressReserve", &found.reserve));
  RETURN_IF_ERROR(Find("cuMemAddressFree", &found.free_addresses));
  RETURN_IF_ERROR(Find("cuMemMap", &found.map));
  RETURN_IF_ERROR(Find("cuMemUnmap", &found.unmap));
  RETURN_IF_ERROR(Find("cuMemSetAccess", &found.set_access));
  RETURN_IF_ERROR(Find("cuMemRelease", &found.release));
  RETURN_IF_ERROR(Find("cuGetErrorName", &found.error_name));
  return found;
}

class GpuMapping final : public Buffer {
 public:
  static absl::StatusOr<std::unique_ptr<Buffer>> Create(const SharedMemory& shared) {
    ASSIGN_OR_RETURN(const DriverFunctions driver, FindDriverFunctions());
    auto mapping = std::unique_ptr<GpuMapping>(new GpuMapping(driver));
    RETURN_IF_ERROR(mapping->Map(shared));
    return mapping;
  }

  ~GpuMapping() override {
    // Nothing that still runs may find its memory gone. After a fault every call fails, and the
    // fault has been reported.
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
      LOG_WARNING("before memory is unmapped: {}", ErrorText(error));
    }
    if (mapped_bytes_ > 0) Warn("cuMemUnmap", cu_.unmap(address_, mapped_bytes_));
    if (reserved_bytes_ > 0)
      Warn("cuMemAddressFree", cu_.free_addresses(address_, reserved_bytes_));
  }

  void* data() const override { return reinterpret_cast<void*>(address_); }
  int64_t size_bytes() const override { return size_bytes_; }

 private:
  explicit GpuMapping(const DriverFunctions& driver) : cu_(driver) {}

  absl::Status Map(const SharedMemory& shared) {
    size_t total_bytes = 0;
    for (const SharedMemory::Part& part : shared.parts) total_bytes += part.size_bytes;
    if (shared.size_bytes <= 0 || total_bytes < static_cast<size_t>(shared.size_bytes)) {
      return absl::InvalidArgumentError(
          fmt::format("{} bytes of GPU memory are said to be {}", total_bytes, shared.size_bytes));
    }
    size_bytes_ = shared.size_bytes;
    RETURN_IF_ERROR(Check("cuMemAddressReserve", total_bytes,
                          cu_.reserve(&address_, total_bytes, /*alignment=*/0, /*addr=*/0,
                                      /*flags=*/0)));
    reserved_bytes_ = total_bytes;
    for (const SharedMemory::Part& part : shared.parts) RETURN_IF_ERROR(MapPart(part));

    int device = 0;
    CUDA_CALL(cudaGetDevice, &device);
    CUmemAccessDesc access = {};
    access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    return Check("cuMemSetAccess", mapped_bytes_,
                 cu_.set_access(address_, mapped_bytes_, &access, /*count=*/1));
  }

  absl::Status MapPart(const SharedMemory::Part& part) {
    CUmemGenericAllocationHandle handle = 0;
    // The descriptor itself is what the call takes in place of a pointer.
    void* const fd = reinterpret_cast<void*>(static_cast<intptr_t>(part.fd.get()));
    RETURN_IF_ERROR(
        Check("cuMemImportFromShareableHandle", part.size_bytes,
              cu_.import_handle(&handle, fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)));
    const CUresult mapped =
        cu_.map(address_ + mapped_bytes_, part.size_bytes, /*offset=*/0, handle, /*flags=*/0);
    Warn("cuMemRelease", cu_.release(handle));  // the mapping keeps the memory
    RETURN_IF_ERROR(Check("cuMemMap", part.size_bytes, mapped));
    mapped_bytes_ += part.size_bytes;
    return absl::OkStatus();
  }

  std::string NameOf(CUresult result) const {
    const char* name = nullptr;
    if (cu_.error_name(result, &name) != CUDA_SUCCESS || name == nullptr)
      name = "error without name";
    return fmt::format("{} ({})", name, static_cast<int>(result));
  }

  absl::Status Check(const char* call, size_t size_bytes, CUresult result) const {
    if (result == CUDA_SUCCESS) return absl::OkStatus();
    return absl::InternalError(
        fmt::format("mapping the GPU memory of another process: {} of {} "
                    "bytes: {}",
                    call, size_bytes, NameOf(result)));
  }

  void Warn(const char* call, CUresult result) const {
    if (result != CUDA_SUCCESS) LOG_WARNING("{}: {}", call, NameOf(result));
  }

  const DriverFunctions cu_;
  CUdeviceptr address_ = 0;
  size_t reserved_bytes_ = 0;
  size_t mapped_bytes_ = 0;  // from address_ on
  int64_t size_bytes_ = 0;
};

class LockedHostMemory final : public Buffer {
 public:
  explicit LockedHostMemory(MappedMemory memory) : memory_(std::move(memory)) {}
  ~LockedHostMemory() override {
    if (!locked_) return;
    if (const cudaError_t error = cudaDeviceSynchronize(); error != cudaSuccess) {
      LOG_WARNING("before host memory is unlocked: {}", ErrorText(error));
    }
    if (const cudaError_t error = cudaHostUnregister(memory_.data()); error != cudaSuccess) {
      LOG_WARNING("cudaHostUnregister: {}", ErrorText(error));
    }
  }

  absl::Status Lock() {
    const absl::Status status =
        ToStatus(cudaHostRegister(memory_.data(), memory_.size_bytes(), cudaHostRegisterPortable),
                 fmt::format("locking {} bytes of host memory", memory_.size_bytes()));
    locked_ = status.ok();
    return status.ok() ? status : absl::ResourceExhaustedError(status.message());
  }

  void* data() const override { return memory_.data(); }
  int64_t size_bytes() const override { return memory_.size_bytes(); }

 private:
  const MappedMemory memory_;
  bool locked_ = false;
};

// Takes memory for every page, which locking would do on one thread.
absl::Status Populate(const MappedMemory& memory, ParallelFor parallel_for) {
  constexpr int64_t kChunkBytes = int64_t{64} << 20;
  auto* const data = static_cast<char*>(memory.data());
  const int64_t num_chunks = (memory.size_bytes() + kChunkBytes - 1) / kChunkBytes;
  std::atomic<int> error = 0;
  parallel_for(num_chunks, [&](int64_t chunk) {
    const int64_t offset = chunk * kChunkBytes;
    const int64_t bytes = std::min(kChunkBytes, memory.size_bytes() - offset);
    if (error == 0 && ::madvise(data + offset, bytes, MADV_POPULATE_WRITE) != 0) error = errno;
  });
  // A kernel before 5.14 does not know the advice.
  if (error == 0 || error == EINVAL) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      fmt::format("taking {} bytes of host memory: {}", memory.size_bytes(), std::strerror(error)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Buffer>> MapGpuMemory(SharedMemory shared) {
  if (shared.kind != SharedMemory::Kind::kGpu) {
    return absl::InvalidArgumentError("memory of the host cannot stand for a GPU's");
  }
  return GpuMapping::Create(shared);
}

absl::StatusOr<std::unique_ptr<Buffer>> MapAndLockHostMemory(SharedMemory shared,
                                                             ParallelFor parallel_for) {
  ASSIGN_OR_RETURN(MappedMemory memory, MappedMemory::FromParts(std::move(shared)));
  RETURN_IF_ERROR(Populate(memory, parallel_for));
  auto locked = std::make_unique<LockedHostMemory>(std::move(memory));
  RETURN_IF_ERROR(locked->Lock());
  return locked;
}

}  // namespace wintserve::kernels::cuda
