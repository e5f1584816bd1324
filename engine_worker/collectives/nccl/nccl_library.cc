#include "engine_worker/collectives/nccl/nccl_library.h"

#include "common/status_macros.h"
#include "engine_worker/collectives/nccl/nccl_file.h"

namespace wintserve {
namespace {

template <typename Function>
absl::Status Find(const NcclFile& file, const char* name, Function* function) {
  ASSIGN_OR_RETURN(void* const address, file.Find(name));
  *function = reinterpret_cast<Function>(address);
  return absl::OkStatus();
}

absl::StatusOr<NcclLibrary> Load() {
  ASSIGN_OR_RETURN(const NcclFile file, NcclFile::Open());
  NcclLibrary nccl;
  RETURN_IF_ERROR(Find(file, "ncclGetVersion", &nccl.GetVersion));
  RETURN_IF_ERROR(Find(file, "ncclGetUniqueId", &nccl.GetUniqueId));
  RETURN_IF_ERROR(Find(file, "ncclCommInitRank", &nccl.CommInitRank));
  RETURN_IF_ERROR(Find(file, "ncclCommAbort", &nccl.CommAbort));
  RETURN_IF_ERROR(Find(file, "ncclCommGetAsyncError", &nccl.CommGetAsyncError));
  RETURN_IF_ERROR(Find(file, "ncclGroupStart", &nccl.GroupStart));
  RETURN_IF_ERROR(Find(file, "ncclGroupEnd", &nccl.GroupEnd));
  RETURN_IF_ERROR(Find(file, "ncclAllReduce", &nccl.AllReduce));
  RETURN_IF_ERROR(Find(file, "ncclAllGather", &nccl.AllGather));
  RETURN_IF_ERROR(Find(file, "ncclBroadcast", &nccl.Broadcast));
  RETURN_IF_ERROR(Find(file, "ncclGetErrorString", &nccl.GetErrorString));
  RETURN_IF_ERROR(Find(file, "ncclGetLastError", &nccl.GetLastError));
  return nccl;
}

}  // namespace

absl::StatusOr<const NcclLibrary*> LoadNccl() {
  static const auto* const loaded = new absl::StatusOr<NcclLibrary>(Load());
  if (!loaded->ok()) return loaded->status();
  return &**loaded;
}

}  // namespace wintserve
