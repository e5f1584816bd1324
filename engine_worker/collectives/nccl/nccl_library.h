// NCCL's functions, out of the library that is on the machine: only groups of several GPUs need it,
// so no program links to it.
#pragma once

#include <nccl.h>

#include "absl/status/statusor.h"

namespace wintserve {

struct NcclLibrary {
  decltype(&ncclGetVersion) GetVersion = nullptr;
  decltype(&ncclGetUniqueId) GetUniqueId = nullptr;
  decltype(&ncclCommInitRank) CommInitRank = nullptr;
  decltype(&ncclCommAbort) CommAbort = nullptr;
  decltype(&ncclCommGetAsyncError) CommGetAsyncError = nullptr;
  decltype(&ncclGroupStart) GroupStart = nullptr;
  decltype(&ncclGroupEnd) GroupEnd = nullptr;
  decltype(&ncclAllReduce) AllReduce = nullptr;
  decltype(&ncclAllGather) AllGather = nullptr;
  decltype(&ncclBroadcast) Broadcast = nullptr;
  decltype(&ncclGetErrorString) GetErrorString = nullptr;
  decltype(&ncclGetLastError) GetLastError = nullptr;
};

// Loads the library once a process. UNAVAILABLE: it is not there or lacks a function; the message
// says which, and what to do. Thread-safe.
absl::StatusOr<const NcclLibrary*> LoadNccl();

}  // namespace wintserve
