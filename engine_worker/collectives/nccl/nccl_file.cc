#include "engine_worker/collectives/nccl/nccl_file.h"

#include <dlfcn.h>
#include <fmt/format.h>

namespace wintserve {
namespace {

absl::Status Missing(const std::string& reason) {
  return absl::UnavailableError(
      fmt::format("tensor parallelism on GPUs needs NCCL 2: {}; install it, or put its directory "
                  "into LD_LIBRARY_PATH",
                  reason));
}

}  // namespace

absl::StatusOr<NcclFile> NcclFile::Open(const std::string& name) {
  void* const library = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const reason = ::dlerror();
    return Missing(reason == nullptr ? name : reason);
  }
  return NcclFile(name, library);
}

absl::StatusOr<void*> NcclFile::Find(const char* function) const {
  void* const address = ::dlsym(library_, function);
  if (address == nullptr) return Missing(fmt::format("{} has no {}", name_, function));
  return address;
}

}  // namespace wintserve
