// NCCL with an error on demand: stands in for libnccl.so.2 and hands every call that wintserve
// makes on to the library that WINTSERVE_TEST_NCCL names. After SIGUSR1 each communicator reports
// ncclRemoteError, as NCCL does when a link to another rank breaks, until it is aborted.
#include <dlfcn.h>
#include <nccl.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::atomic<bool> is_broken = false;

void OnSignal(int) { is_broken = true; }

void* Library() {
  static void* const library = [] {
    const char* const path = std::getenv("WINTSERVE_TEST_NCCL");
    void* const found = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (found == nullptr) {
      std::fprintf(stderr, "nccl_fault: WINTSERVE_TEST_NCCL names no NCCL: %s\n", dlerror());
      std::abort();
    }
    return found;
  }();
  return library;
}

template <typename Function>
Function* Real(Function* /*own*/, const char* name) {
  return reinterpret_cast<Function*>(dlsym(Library(), name));
}

__attribute__((constructor)) void Begin() {
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigaction(SIGUSR1, &action, nullptr);
}

}  // namespace

#define REAL(function) Real(&function, #function)

EXPORT ncclResult_t ncclGetVersion(int* version) { return REAL(ncclGetVersion)(version); }
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) { return REAL(ncclGetUniqueId)(id); }
EXPORT const char* ncclGetErrorString(ncclResult_t result) {
  return REAL(ncclGetErrorString)(result);
}
EXPORT const char* ncclGetLastError(ncclComm_t comm) { return REAL(ncclGetLastError)(comm); }
EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* comm, int num_ranks, ncclUniqueId id, int rank) {
  return REAL(ncclCommInitRank)(comm, num_ranks, id, rank);
}

EXPORT ncclResult_t ncclGroupStart() { return REAL(ncclGroupStart)(); }
EXPORT ncclResult_t ncclGroupEnd() { return REAL(ncclGroupEnd)(); }

EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
  is_broken = false;
  return REAL(ncclCommAbort)(comm);
}

EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  const ncclResult_t result = REAL(ncclCommGetAsyncError)(comm, error);
  if (result == ncclSuccess && is_broken) *error = ncclRemoteError;
  return result;
}

EXPORT ncclResult_t ncclAllReduce(const void* in, void* out, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  return REAL(ncclAllReduce)(in, out, count, type, op, comm, stream);
}
EXPORT ncclResult_t ncclAllGather(const void* in, void* out, size_t count, ncclDataType_t type,
                                  ncclComm_t comm, cudaStream_t stream) {
  return REAL(ncclAllGather)(in, out, count, type, comm, stream);
}
EXPORT ncclResult_t ncclBroadcast(const void* in, void* out, size_t count, ncclDataType_t type,
                                  int root, ncclComm_t comm, cudaStream_t stream) {
  return REAL(ncclBroadcast)(in, out, count, type, root, comm, stream);
}
