// A rank's place in its group, before and after the group exists.
#pragma once

#include <functional>
#include <memory>

#include "common/mutex.h"
#include "engine_worker/collectives/collective.h"

namespace wintserve {

// The model takes a collective when it is loaded, but which incarnation of the group it works in is
// known only once all ranks have reported what they loaded. This stands for the incarnation to
// come.
//
// A group that is aborted and left can be followed by another: BeginJoin(), Bind(), Unbind() and
// again.
//
// Threading: as Collective; BeginJoin(), Bind() and Unbind() from the thread of the operations.
// Errors:    those of the bound collective; FAILED_PRECONDITION before there is one.
class RankGroup : public Collective {
 public:
  RankGroup(int rank, int world_size) : rank_(rank), world_size_(world_size) {}

  // An incarnation is to be joined: an Abort() from now on is meant for it.
  void BeginJoin() EXCLUDES(mutex_);
  // What ends the wait for the other ranks of that incarnation, from any thread. Abort() calls it,
  // or this does when that has been called already. Dropped by Bind() and Unbind().
  void SetJoinAbort(std::function<void()> abort) EXCLUDES(mutex_);
  // A group that was aborted while it was joined is aborted at once. REQUIRES: the same rank and
  // world size.
  void Bind(std::unique_ptr<Collective> group) EXCLUDES(mutex_);
  // Leaves the incarnation. What its operations used may go after this.
  void Unbind() EXCLUDES(mutex_);

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  absl::Status AllReduceSum(float* data, int64_t count) override;
  absl::Status AllGather(const float* in, int64_t count, float* out) override;
  absl::Status Broadcast(void* data, int64_t size_bytes) override;
  absl::Status DeviceStatus() override EXCLUDES(mutex_);
  void Abort() override EXCLUDES(mutex_);

 private:
  const int rank_;
  const int world_size_;
  Mutex mutex_;  // between Bind() and other threads; operations are on Bind()'s
  std::unique_ptr<Collective> group_;
  std::function<void()> join_abort_ GUARDED_BY(mutex_);
  bool is_aborted_ GUARDED_BY(mutex_) = false;  // since BeginJoin()
};

}  // namespace wintserve
