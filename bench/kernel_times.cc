#include "bench/kernel_times.h"

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "common/status_macros.h"

namespace wintserve::bench {
namespace {

constexpr size_t kBufferBytes = size_t{8} << 20;

// The functions of libcupti that are used.
struct Cupti {
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityDisable) disable = nullptr;
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&cuptiActivityFlushAll) flush_all = nullptr;
  decltype(&cuptiActivityGetNextRecord) next_record = nullptr;
  decltype(&cuptiActivityGetNumDroppedRecords) num_dropped = nullptr;
  decltype(&cuptiGetTimestamp) timestamp = nullptr;
  decltype(&cuptiGetResultString) result_string = nullptr;
};

// What CUPTI's thread shares with the caller's.
struct Shared {
  Cupti cupti;
  std::mutex mutex;
  // Names are of the module that a kernel lies in, which stays.
  std::map<const char*, std::string> names;
  std::vector<KernelRun> runs;
  size_t num_dropped = 0;
};
Shared& TheShared() {
  static Shared* const shared = new Shared;  // CUPTI's thread may outlive main
  return *shared;
}

absl::Status ToStatus(CUptiResult result, const char* call) {
  if (result == CUPTI_SUCCESS) return absl::OkStatus();
  const char* text = nullptr;
  TheShared().cupti.result_string(result, &text);
  return absl::UnavailableError(
      fmt::format("kernel times: {}: {}", call, text == nullptr ? "unknown error" : text));
}

std::string NameOf(const char* mangled) {
  if (mangled == nullptr) return "unnamed";
  int status = 0;
  char* const demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = ShortKernelName(demangled == nullptr ? mangled : demangled);
  std::free(demangled);
  return name;
}

const char* CopyName(uint8_t kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
      return "copy to the device";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
      return "copy to the host";
    default:
      return "copy on the device";
  }
}

void AddRecord(const CUpti_Activity& record, Shared* shared) {
  switch (record.kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
      const auto& kernel = reinterpret_cast<const CUpti_ActivityKernel10&>(record);
      auto found = shared->names.find(kernel.name);
      if (found == shared->names.end()) {
        found = shared->names.emplace(kernel.name, NameOf(kernel.name)).first;
      }
      shared->runs.push_back({found->second, kernel.start, kernel.end});
      return;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto& copy = reinterpret_cast<const CUpti_ActivityMemcpy6&>(record);
      shared->runs.push_back({CopyName(copy.copyKind), copy.start, copy.end});
      return;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto& fill = reinterpret_cast<const CUpti_ActivityMemset4&>(record);
      shared->runs.push_back({"fill", fill.start, fill.end});
      return;
    }
    default:
      return;
  }
}

void BufferRequested(uint8_t** buffer, size_t* size_bytes, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *size_bytes = *buffer == nullptr ? 0 : kBufferBytes;
  *max_records = 0;  // as many as fit
}

void BufferCompleted(CUcontext context, uint32_t stream, uint8_t* buffer, size_t /*size_bytes*/,
                     size_t valid_bytes) {
  Shared& shared = TheShared();
  const std::lock_guard lock(shared.mutex);
  CUpti_Activity* record = nullptr;
  while (shared.cupti.next_record(buffer, valid_bytes, &record) == CUPTI_SUCCESS) {
    AddRecord(*record, &shared);
  }
  size_t dropped = 0;
  if (shared.cupti.num_dropped(context, stream, &dropped) == CUPTI_SUCCESS) {
    shared.num_dropped += dropped;
  }
  std::free(buffer);
}

absl::Status LoadCupti(Cupti* cupti) {
  const std::string name = fmt::format("libcupti.so.{}", CUDA_VERSION / 1000);
  void* const library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return absl::NotFoundError(fmt::format(
        "kernel times need {} of the CUDA toolkit on LD_LIBRARY_PATH: {}", name, dlerror()));
  }
  const char* missing = nullptr;
  const auto find = [&](auto* function, const char* symbol) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, symbol));
    if (*function == nullptr) missing = symbol;
  };
  find(&cupti->enable, "cuptiActivityEnable");
  find(&cupti->disable, "cuptiActivityDisable");
  find(&cupti->register_callbacks, "cuptiActivityRegisterCallbacks");
  find(&cupti->flush_all, "cuptiActivityFlushAll");
  find(&cupti->next_record, "cuptiActivityGetNextRecord");
  find(&cupti->num_dropped, "cuptiActivityGetNumDroppedRecords");
  find(&cupti->timestamp, "cuptiGetTimestamp");
  find(&cupti->result_string, "cuptiGetResultString");
  if (missing == nullptr) return absl::OkStatus();
  return absl::NotFoundError(fmt::format("kernel times: {} has no {}", name, missing));
}

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};

}  // namespace

absl::StatusOr<std::unique_ptr<KernelTimes>> KernelTimes::Create() {
  Cupti& cupti = TheShared().cupti;
  RETURN_IF_ERROR(LoadCupti(&cupti));
  RETURN_IF_ERROR(ToStatus(cupti.register_callbacks(BufferRequested, BufferCompleted),
                           "cuptiActivityRegisterCallbacks"));
  for (const CUpti_ActivityKind kind : kKinds) {
    RETURN_IF_ERROR(ToStatus(cupti.enable(kind), "cuptiActivityEnable"));
  }
  return std::unique_ptr<KernelTimes>(new KernelTimes);
}

KernelTimes::~KernelTimes() {
  for (const CUpti_ActivityKind kind : kKinds) {
    static_cast<void>(TheShared().cupti.disable(kind));
  }
}

absl::Status KernelTimes::Begin() {
  Shared& shared = TheShared();
  RETURN_IF_ERROR(ToStatus(shared.cupti.flush_all(0), "cuptiActivityFlushAll"));
  const std::lock_guard lock(shared.mutex);
  shared.runs.clear();
  shared.num_dropped = 0;
  return ToStatus(shared.cupti.timestamp(&begin_ns_), "cuptiGetTimestamp");
}

absl::StatusOr<std::vector<KernelRun>> KernelTimes::End() {
  Shared& shared = TheShared();
  RETURN_IF_ERROR(ToStatus(shared.cupti.flush_all(0), "cuptiActivityFlushAll"));
  const std::lock_guard lock(shared.mutex);
  if (shared.num_dropped > 0) {
    return absl::ResourceExhaustedError(
        fmt::format("kernel times: {} records were dropped", shared.num_dropped));
  }
  std::vector<KernelRun> runs = std::exchange(shared.runs, {});
  std::erase_if(runs, [&](const KernelRun& run) { return run.begin_ns < begin_ns_; });
  if (runs.empty()) {
    return absl::UnavailableError(
        "kernel times: nothing was recorded; does the driver let this user profile?");
  }
  std::stable_sort(runs.begin(), runs.end(),
                   [](const KernelRun& a, const KernelRun& b) { return a.begin_ns < b.begin_ns; });
  return runs;
}

}  // namespace wintserve::bench
