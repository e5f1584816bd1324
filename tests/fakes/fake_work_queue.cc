#include "tests/fakes/fake_work_queue.h"

#include <utility>

namespace wintserve::testing_fakes {

void FakeWorkQueue::Push(ServerEvent event) {
  MutexLock interrupt_lock(&interrupt_mutex_);
  const auto* abort = std::get_if<AbortGroup>(&event);
  if (abort != nullptr && interrupt_ != nullptr) interrupt_(abort->group_epoch);
  MutexLock lock(&mutex_);
  events_.push_back(std::move(event));
  changed_.NotifyAll();
}

void FakeWorkQueue::EndStream() {
  MutexLock interrupt_lock(&interrupt_mutex_);
  if (interrupt_ != nullptr) interrupt_(0);
  Close();
}

// Without a call on the closing thread, which the real one does not make either.
void FakeWorkQueue::Close() {
  MutexLock lock(&mutex_);
  ended_ = true;
  changed_.NotifyAll();
}

void FakeWorkQueue::SetInterrupt(std::function<void(uint64_t group_epoch)> interrupt) {
  MutexLock interrupt_lock(&interrupt_mutex_);
  interrupt_ = std::move(interrupt);
  if (interrupt_ == nullptr) return;
  std::vector<uint64_t> group_epochs;
  {
    MutexLock lock(&mutex_);
    for (const ServerEvent& event : events_) {
      if (const auto* abort = std::get_if<AbortGroup>(&event)) {
        group_epochs.push_back(abort->group_epoch);
      }
    }
    if (ended_) group_epochs.push_back(0);
  }
  for (const uint64_t group_epoch : group_epochs) interrupt_(group_epoch);
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
  changed_.NotifyAll();
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

absl::Status FakeWorkQueue::SendHeartbeat(const HeartbeatMessage& beat) {
  MutexLock lock(&mutex_);
  beats_.push_back(beat);
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

std::vector<HeartbeatMessage> FakeWorkQueue::WaitForBeats(size_t count) {
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

void FakeWorkQueue::WaitForReady(int count) {
  MutexLock lock(&mutex_);
  changed_.Wait(&mutex_, [&]() NO_THREAD_SAFETY_ANALYSIS { return num_ready_ >= count; });
}

size_t FakeWorkQueue::num_steps() {
  MutexLock lock(&mutex_);
  return steps_.size();
}

size_t FakeWorkQueue::num_aborted() {
  MutexLock lock(&mutex_);
  return aborted_.size();
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
