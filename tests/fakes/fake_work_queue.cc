#include "tests/fakes/fake_work_queue.h"

#include <utility>

namespace wintserve::testing_fakes {

void FakeWorkQueue::Push(ServerEvent event) {
  MutexLock lock(&mutex_);
  events_.push_back(std::move(event));
  changed_.NotifyAll();
}

void FakeWorkQueue::EndStream() {
  MutexLock lock(&mutex_);
  ended_ = true;
  changed_.NotifyAll();
}

absl::StatusOr<ServerEvent> FakeWorkQueue::Next() {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [this]() NO_THREAD_SAFETY_ANALYSIS { return ended_ || !events_.empty(); });
  if (events_.empty()) return absl::UnavailableError("the stream ended");
  ServerEvent event = std::move(events_.front());
  events_.pop_front();
  return event;
}

absl::Status FakeWorkQueue::SendReady(uint64_t /*group_epoch*/, uint64_t /*pool_epoch*/) {
  MutexLock lock(&mutex_);
  ++num_ready_;
  return absl::OkStatus();
}

absl::Status FakeWorkQueue::SendPoolDetached(uint64_t pool_epoch) {
  MutexLock lock(&mutex_);
  detached_.push_back(pool_epoch);
  changed_.NotifyAll();
  return absl::OkStatus();
}

absl::Status FakeWorkQueue::SendStepDone(const StepDone& done) {
  MutexLock lock(&mutex_);
  steps_.push_back(done);
  changed_.NotifyAll();
  return absl::OkStatus();
}

absl::Status FakeWorkQueue::SendHeartbeat(uint64_t step_started, uint64_t step_done,
                                          uint64_t resident_bytes) {
  MutexLock lock(&mutex_);
  beats_.push_back({step_started, step_done, resident_bytes});
  changed_.NotifyAll();
  return absl::OkStatus();
}

absl::Status FakeWorkQueue::SendAborted(uint64_t group_epoch) {
  MutexLock lock(&mutex_);
  aborted_.push_back(group_epoch);
  changed_.NotifyAll();
  return absl::OkStatus();
}

absl::Status FakeWorkQueue::SendFault(FaultKind kind, const std::string& text, bool kv_trusted) {
  MutexLock lock(&mutex_);
  faults_.push_back({kind, text, kv_trusted});
  return absl::OkStatus();
}

std::vector<StepDone> FakeWorkQueue::WaitForSteps(size_t count) {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return steps_.size() >= count; });
  return steps_;
}

std::vector<FakeWorkQueue::Beat> FakeWorkQueue::WaitForBeats(size_t count) {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return beats_.size() >= count; });
  return beats_;
}

std::vector<uint64_t> FakeWorkQueue::WaitForDetached(size_t count) {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return detached_.size() >= count; });
  return detached_;
}

std::vector<uint64_t> FakeWorkQueue::WaitForAborted(size_t count) {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return aborted_.size() >= count; });
  return aborted_;
}

int FakeWorkQueue::num_ready() {
  MutexLock lock(&mutex_);
  return num_ready_;
}

std::vector<FakeWorkQueue::Fault> FakeWorkQueue::faults() {
  MutexLock lock(&mutex_);
  return faults_;
}

}  // namespace wintserve::testing_fakes
