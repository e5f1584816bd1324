#include "engine_worker/collectives/rank_group.h"

#include <utility>

#include "common/check.h"

namespace wintserve {
namespace {

absl::Status NotBound() {
  return absl::FailedPreconditionError("the rank has not joined a group yet");
}

}  // namespace

void RankGroup::BeginJoin() {
  MutexLock lock(&mutex_);
  is_aborted_ = false;
}

void RankGroup::SetJoinAbort(std::function<void()> abort) {
  MutexLock lock(&mutex_);
  if (is_aborted_) abort();
  join_abort_ = std::move(abort);
}

void RankGroup::Bind(std::unique_ptr<Collective> group) {
  CHECK(group->rank() == rank_ && group->world_size() == world_size_, "rank {} of {}, not {} of {}",
        group->rank(), group->world_size(), rank_, world_size_);
  MutexLock lock(&mutex_);
  group_ = std::move(group);
  join_abort_ = nullptr;
  if (is_aborted_) group_->Abort();
}

void RankGroup::Unbind() {
  std::unique_ptr<Collective> group;  // may take its time to go: not under the lock
  MutexLock lock(&mutex_);
  group = std::move(group_);
  join_abort_ = nullptr;
}

absl::Status RankGroup::AllReduceSum(float* data, int64_t count) {
  return group_ == nullptr ? NotBound() : group_->AllReduceSum(data, count);
}

absl::Status RankGroup::AllGather(const float* in, int64_t count, float* out) {
  return group_ == nullptr ? NotBound() : group_->AllGather(in, count, out);
}

absl::Status RankGroup::Broadcast(void* data, int64_t size_bytes) {
  return group_ == nullptr ? NotBound() : group_->Broadcast(data, size_bytes);
}

absl::Status RankGroup::DeviceStatus() {
  MutexLock lock(&mutex_);
  return group_ == nullptr ? absl::OkStatus() : group_->DeviceStatus();
}

void RankGroup::Abort() {
  MutexLock lock(&mutex_);
  is_aborted_ = true;
  if (join_abort_ != nullptr) join_abort_();
  if (group_ != nullptr) group_->Abort();
}

}  // namespace wintserve
