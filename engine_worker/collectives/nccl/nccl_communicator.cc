#include "engine_worker/collectives/nccl/nccl_communicator.h"

#include <string>

#include "common/log.h"

namespace wintserve {

std::optional<ncclResult_t> NcclCommunicator::Init(int world_size, const ncclUniqueId& id,
                                                   int rank) {
  std::shared_lock<std::shared_mutex> in_nccl(calls_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (is_ending_.load()) return std::nullopt;
    is_starting_ = true;
  }
  // In a group of calls this makes the handle, with which End() can do something, and leaves the
  // rest, which waits for the peers, to the group's end.
  ncclComm_t made = nullptr;
  const ncclResult_t opened = nccl_->GroupStart();
  ncclResult_t result = nccl_->CommInitRank(&made, world_size, id, rank);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    comm_ = made;
    is_starting_ = false;
    changed_.notify_all();
  }
  if (opened != ncclSuccess) return opened;
  const ncclResult_t ended = nccl_->GroupEnd();
  return result == ncclSuccess ? ended : result;
}

void NcclCommunicator::End() {
  ncclComm_t comm = nullptr;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    is_ending_.store(true);
    changed_.wait(lock, [this] { return !is_starting_; });
    comm = comm_;
  }
  if (comm == nullptr) return;
  nccl_->GroupStart();
  ncclResult_t result = nccl_->CommAbort(comm);
  const std::unique_lock<std::shared_mutex> alone(calls_);
  const ncclResult_t ended = nccl_->GroupEnd();
  if (result == ncclSuccess) result = ended;
  if (result != ncclSuccess) {
    LOG_WARNING("the end of a rank group: NCCL: {}", nccl_->GetErrorString(result));
  }
  comm_ = nullptr;
}

}  // namespace wintserve
