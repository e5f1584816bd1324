// The API server's side of a worker's stream, in the same process.
#pragma once

#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "api_server/work_queue/client/work_queue_client.h"
#include "common/mutex.h"

namespace wintserve::testing_fakes {

// Threading: thread-safe.
class FakeWorkQueue : public WorkQueueClient {
 public:
  struct Fault {
    FaultKind kind;
    std::string text;
    bool kv_trusted;
  };

  void Push(ServerEvent event);
  // The stream ends after what was pushed.
  void EndStream();

  absl::StatusOr<ServerEvent> Next() override;
  void SetInterrupt(std::function<void(uint64_t group_epoch)> interrupt) override;
  absl::Status SendReady(uint64_t group_epoch, uint64_t pool_epoch) override;
  absl::Status SendPoolDetached(uint64_t pool_epoch) override;
  absl::Status SendStepDone(const StepDone& done) override;
  absl::Status SendHeartbeat(const HeartbeatMessage& beat) override;
  absl::Status SendAborted(uint64_t group_epoch) override;
  absl::Status SendFault(FaultKind kind, const std::string& text, bool kv_trusted) override;
  void Close() override;

  // Wait until the worker has sent that many.
  std::vector<StepDone> WaitForSteps(size_t count);
  std::vector<HeartbeatMessage> WaitForBeats(size_t count);

  std::vector<uint64_t> WaitForDetached(size_t count);  // pool epochs
  std::vector<uint64_t> WaitForAborted(size_t count);   // group epochs

  void WaitForReady(int count);

  int num_ready();
  size_t num_steps();
  size_t num_aborted();
  std::vector<Fault> faults();

 private:
  Mutex interrupt_mutex_;  // before mutex_
  std::function<void(uint64_t)> interrupt_ GUARDED_BY(interrupt_mutex_);

  Mutex mutex_;
  CondVar changed_;
  std::deque<ServerEvent> events_ GUARDED_BY(mutex_);
  bool ended_ GUARDED_BY(mutex_) = false;
  int num_ready_ GUARDED_BY(mutex_) = 0;
  std::vector<uint64_t> detached_ GUARDED_BY(mutex_);
  std::vector<uint64_t> aborted_ GUARDED_BY(mutex_);
  std::vector<StepDone> steps_ GUARDED_BY(mutex_);
  std::vector<HeartbeatMessage> beats_ GUARDED_BY(mutex_);
  std::vector<Fault> faults_ GUARDED_BY(mutex_);
};

}  // namespace wintserve::testing_fakes
