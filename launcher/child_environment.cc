#include "launcher/child_environment.h"

#include <algorithm>

namespace wintserve {
namespace {

// GLIBC_TUNABLES is not among them: SpawnChild makes each child's own.
constexpr std::string_view kNames[] = {"PATH",           "HOME",    "USER",
                                       "LOGNAME",        "LANG",    "TZ",
                                       "TMPDIR",         "TERM",    "XDG_RUNTIME_DIR",
                                       "XDG_CACHE_HOME", "NO_COLOR"};

// Of the loader, the C library, the GPU's driver and libraries, gRPC, OpenMP, the sanitizers and
// coverage; and our own.
constexpr std::string_view kPrefixes[] = {
    "LC_",   "LD_",  "MALLOC_", "CUDA_", "CUDNN_", "CUBLAS", "NVIDIA_", "NCCL_", "UCX_",      "FI_",
    "GRPC_", "OMP_", "GOMP_",   "ASAN_", "LSAN_",  "TSAN_",  "UBSAN_",  "GCOV_", "WINTSERVE_"};

}  // namespace

bool IsForChildren(std::string_view name) {
  return std::ranges::find(kNames, name) != std::end(kNames) ||
         std::ranges::any_of(kPrefixes,
                             [name](std::string_view prefix) { return name.starts_with(prefix); });
}

}  // namespace wintserve
