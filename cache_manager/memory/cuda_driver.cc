#include "cache_manager/memory/cuda_driver.h"

#include <cuda.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <fmt/format.h>

#include <string>

#include "common/status_macros.h"

namespace wintserve {
namespace {

struct LibraryCloser {
  void operator()(void* library) const { ::dlclose(library); }
};
using Library = std::unique_ptr<void, LibraryCloser>;

// Under the names that the header's macros give them.
struct Functions {
  decltype(&cuInit) init = nullptr;
  decltype(&cuDriverGetVersion) driver_get_version = nullptr;
  decltype(&cuGetErrorName) get_error_name = nullptr;
  decltype(&cuGetErrorString) get_error_string = nullptr;
  decltype(&cuDeviceGet) device_get = nullptr;
  decltype(&cuDeviceGetCount) device_get_count = nullptr;
  decltype(&cuDeviceGetName) device_get_name = nullptr;
  decltype(&cuDeviceTotalMem) device_total_mem = nullptr;
  decltype(&cuDeviceGetAttribute) device_get_attribute = nullptr;
  decltype(&cuMemGetAllocationGranularity) mem_get_allocation_granularity = nullptr;
  decltype(&cuMemCreate) mem_create = nullptr;
  decltype(&cuMemRelease) mem_release = nullptr;
  decltype(&cuMemExportToShareableHandle) mem_export_to_shareable_handle = nullptr;
};

template <typename Function>
absl::Status Find(void* library, const char* library_name, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(::dlsym(library, name));
  if (*function != nullptr) return absl::OkStatus();
  return absl::UnavailableError(
      fmt::format("the NVIDIA driver's {} has no {}: update the driver", library_name, name));
}

absl::StatusOr<Functions> FindFunctions(void* library, const char* name) {
  Functions found;
  RETURN_IF_ERROR(Find(library, name, "cuInit", &found.init));
  RETURN_IF_ERROR(Find(library, name, "cuDriverGetVersion", &found.driver_get_version));
  RETURN_IF_ERROR(Find(library, name, "cuGetErrorName", &found.get_error_name));
  RETURN_IF_ERROR(Find(library, name, "cuGetErrorString", &found.get_error_string));
  RETURN_IF_ERROR(Find(library, name, "cuDeviceGet", &found.device_get));
  RETURN_IF_ERROR(Find(library, name, "cuDeviceGetCount", &found.device_get_count));
  RETURN_IF_ERROR(Find(library, name, "cuDeviceGetName", &found.device_get_name));
  RETURN_IF_ERROR(Find(library, name, "cuDeviceTotalMem_v2", &found.device_total_mem));
  RETURN_IF_ERROR(Find(library, name, "cuDeviceGetAttribute", &found.device_get_attribute));
  RETURN_IF_ERROR(
      Find(library, name, "cuMemGetAllocationGranularity", &found.mem_get_allocation_granularity));
  RETURN_IF_ERROR(Find(library, name, "cuMemCreate", &found.mem_create));
  RETURN_IF_ERROR(Find(library, name, "cuMemRelease", &found.mem_release));
  RETURN_IF_ERROR(
      Find(library, name, "cuMemExportToShareableHandle", &found.mem_export_to_shareable_handle));
  return found;
}

class CudaDriver final : public GpuDriver {
 public:
  explicit CudaDriver(const Functions& functions) : cu_(functions) {}

  absl::Status Init() {
    RETURN_IF_ERROR(
        ToStatus(absl::StatusCode::kUnavailable, "the NVIDIA driver does not start", cu_.init(0)));
    return ToStatus(absl::StatusCode::kUnavailable, "asking the NVIDIA driver for its version",
                    cu_.driver_get_version(&version_));
  }

  absl::StatusOr<GpuTraits> Query(int ordinal) override {
    const auto ask = [&](const char* what, CUresult result) {
      return ToStatus(absl::StatusCode::kUnavailable,
                      fmt::format("asking GPU {} for its {}", ordinal, what), result);
    };
    int num_devices = 0;
    RETURN_IF_ERROR(ask("number", cu_.device_get_count(&num_devices)));
    if (ordinal < 0 || ordinal >= num_devices) {
      return absl::UnavailableError(
          fmt::format("no GPU {}: {} visible to this process", ordinal,
                      num_devices == 0 ? "none is" : fmt::format("0 … {} are", num_devices - 1)));
    }
    CUdevice device = 0;
    char name[256] = {};
    size_t total_bytes = 0;
    int has_virtual_memory = 0;
    int exports_fds = 0;
    RETURN_IF_ERROR(ask("handle", cu_.device_get(&device, ordinal)));
    RETURN_IF_ERROR(ask("name", cu_.device_get_name(name, sizeof(name) - 1, device)));
    RETURN_IF_ERROR(ask("memory", cu_.device_total_mem(&total_bytes, device)));
    RETURN_IF_ERROR(ask(
        "virtual memory",
        cu_.device_get_attribute(&has_virtual_memory,
                                 CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, device)));
    RETURN_IF_ERROR(ask(
        "file descriptors",
        cu_.device_get_attribute(&exports_fds,
                                 CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                                 device)));
    size_t granularity_bytes = 0;
    if (has_virtual_memory != 0 && exports_fds != 0) {
      const CUmemAllocationProp properties = PropertiesOf(device);
      RETURN_IF_ERROR(ask(
          "granularity", cu_.mem_get_allocation_granularity(&granularity_bytes, &properties,
                                                            CU_MEM_ALLOC_GRANULARITY_RECOMMENDED)));
    }
    return GpuTraits{.name = name,
                     .driver = fmt::format("CUDA {}.{}", version_ / 1000, version_ % 1000 / 10),
                     .total_bytes = static_cast<int64_t>(total_bytes),
                     .has_virtual_memory = has_virtual_memory != 0,
                     .exports_fds = exports_fds != 0,
                     .granularity_bytes = static_cast<int64_t>(granularity_bytes)};
  }

  absl::StatusOr<UniqueFd> Allocate(int ordinal, int64_t size_bytes) override {
    CUdevice device = 0;
    RETURN_IF_ERROR(ToStatus(absl::StatusCode::kInternal, fmt::format("asking for GPU {}", ordinal),
                             cu_.device_get(&device, ordinal)));
    const CUmemAllocationProp properties = PropertiesOf(device);
    CUmemGenericAllocationHandle handle = 0;
    const CUresult created =
        cu_.mem_create(&handle, static_cast<size_t>(size_bytes), &properties, /*flags=*/0);
    RETURN_IF_ERROR(ToStatus(created == CUDA_ERROR_OUT_OF_MEMORY
                                 ? absl::StatusCode::kResourceExhausted
                                 : absl::StatusCode::kInternal,
                             fmt::format("cuMemCreate of {} bytes", size_bytes), created));
    int fd = -1;
    const CUresult exported = cu_.mem_export_to_shareable_handle(
        &fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, /*flags=*/0);
    cu_.mem_release(handle);  // from here on the descriptor is what keeps the memory
    RETURN_IF_ERROR(
        ToStatus(absl::StatusCode::kInternal, "cuMemExportToShareableHandle", exported));
    ::fcntl(fd, F_SETFD, FD_CLOEXEC);  // whoever inherits it would keep the memory
    return UniqueFd(fd);
  }

 private:
  static CUmemAllocationProp PropertiesOf(CUdevice device) {
    CUmemAllocationProp properties = {};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    return properties;
  }

  absl::Status ToStatus(absl::StatusCode code, const std::string& what, CUresult result) const {
    if (result == CUDA_SUCCESS) return absl::OkStatus();
    const char* name = nullptr;
    const char* text = nullptr;
    if (cu_.get_error_name(result, &name) != CUDA_SUCCESS || name == nullptr) name = "no name";
    if (cu_.get_error_string(result, &text) != CUDA_SUCCESS || text == nullptr) text = "no text";
    return absl::Status(
        code, fmt::format("{}: error {}, {} ({})", what, static_cast<int>(result), name, text));
  }

  const Functions cu_;
  int version_ = 0;  // 1000 * major + 10 * minor
};

}  // namespace

absl::StatusOr<std::unique_ptr<GpuDriver>> LoadCudaDriver(const char* library_name) {
  // Not before it is used, and its symbols for nobody else: as if this process did not know CUDA.
  Library library(::dlopen(library_name, RTLD_LAZY | RTLD_LOCAL));
  if (library == nullptr) {
    const char* const why = ::dlerror();
    return absl::UnavailableError(
        fmt::format("--device cuda needs the NVIDIA driver, which is not on this machine: {}",
                    why == nullptr ? library_name : why));
  }
  ASSIGN_OR_RETURN(const Functions functions, FindFunctions(library.get(), library_name));
  library.release();  // stays until the process ends: the driver may start threads of its own
  auto driver = std::make_unique<CudaDriver>(functions);
  RETURN_IF_ERROR(driver->Init());
  return driver;
}

}  // namespace wintserve
