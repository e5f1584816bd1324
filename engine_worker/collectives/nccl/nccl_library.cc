#include "engine_worker/collectives/nccl/nccl_library.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <string>

#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr char kFileName[] = "libnccl.so.2";

absl::Status Missing(const std::string& reason) {
  return absl::UnavailableError(
      fmt::format("tensor parallelism on GPUs needs NCCL 2: {}; install it, or put its directory "
                  "into LD_LIBRARY_PATH",
                  reason));
}

template <typename Function>
absl::Status Find(void* library, const char* name, Function* function) {
  *function = reinterpret_cast<Function>(::dlsym(library, name));
  return *function == nullptr ? Missing(fmt::format("{} has no {}", kFileName, name))
                              : absl::OkStatus();
}

absl::StatusOr<NcclLibrary> Load() {
  void* const library = ::dlopen(kFileName, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* reason = ::dlerror();
    return Missing(reason == nullptr ? kFileName : reason);
  }
  NcclLibrary nccl;
  RETURN_IF_ERROR(Find(library, "ncclGetVersion", &nccl.GetVersion));
  RETURN_IF_ERROR(Find(library, "ncclGetUniqueId", &nccl.GetUniqueId));
  RETURN_IF_ERROR(Find(library, "ncclCommInitRank", &nccl.CommInitRank));
  RETURN_IF_ERROR(Find(library, "ncclCommAbort", &nccl.CommAbort));
  RETURN_IF_ERROR(Find(library, "ncclCommGetAsyncError", &nccl.CommGetAsyncError));
  RETURN_IF_ERROR(Find(library, "ncclAllReduce", &nccl.AllReduce));
  RETURN_IF_ERROR(Find(library, "ncclAllGather", &nccl.AllGather));
  RETURN_IF_ERROR(Find(library, "ncclBroadcast", &nccl.Broadcast));
  RETURN_IF_ERROR(Find(library, "ncclGetErrorString", &nccl.GetErrorString));
  RETURN_IF_ERROR(Find(library, "ncclGetLastError", &nccl.GetLastError));
  return nccl;
}

}  // namespace

absl::StatusOr<const NcclLibrary*> LoadNccl() {
  static const auto* const loaded = new absl::StatusOr<NcclLibrary>(Load());
  if (!loaded->ok()) return loaded->status();
  return &**loaded;
}

}  // namespace wintserve
