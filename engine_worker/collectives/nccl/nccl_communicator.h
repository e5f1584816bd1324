// A communicator of NCCL's that another thread can end at any moment.
#pragma once

#include <nccl.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <shared_mutex>

#include "engine_worker/collectives/nccl/nccl_library.h"

namespace wintserve {

// A blocking communicator: one that does not block starts a thread for every operation, and has to
// be asked whether that is done before the next.
//
// The end has two parts. First all that waits in NCCL with it is made to leave, on the device and
// in the thread that is inside Init() or Call(), whatever became of the peers. When that thread is
// out, the communicator is taken apart. NCCL does both in one function, but in a group of calls it
// does the second at the group's end.
//
// Threading: Init() on one thread; Call() and End() on any.
class NcclCommunicator {
 public:
  explicit NcclCommunicator(const NcclLibrary* nccl) : nccl_(nccl) {}
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;

  // Waits for the other ranks. Once. Empty: it was ended before.
  std::optional<ncclResult_t> Init(int world_size, const ncclUniqueId& id, int rank);

  // Of call(ncclComm_t). Empty, without waiting: it has been ended, or is being.
  template <typename Function>
  std::optional<ncclResult_t> Call(const Function& call) {
    // Not to be waited for: End() may itself wait for this thread to destroy graphs.
    std::shared_lock<std::shared_mutex> lock(calls_, std::try_to_lock);
    if (!lock.owns_lock() || is_ending_.load() || comm_ == nullptr) return std::nullopt;
    return call(comm_);
  }

  // Returns when it is taken apart; by then graphs that captured it have been destroyed on another
  // thread. Once.
  void End();

 private:
  const NcclLibrary* const nccl_;
  // Shared by whoever calls NCCL, alone for taking it apart.
  std::shared_mutex calls_;
  ncclComm_t comm_ = nullptr;  // written under mutex_ by a holder of calls_
  std::atomic<bool> is_ending_ = false;

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_starting_ = false;  // under mutex_: a handle is about to be there
};

}  // namespace wintserve
