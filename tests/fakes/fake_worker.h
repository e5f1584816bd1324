// An engine worker without a model: speaks the real step protocol from a thread of its own.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "api_server/work_queue/client/work_queue_client.h"

namespace wintserve {

struct FakeWorkerOptions {
  std::string target;
  std::string token;
  WorkerHello hello;
  // The token that follows a slot's history (prompt and sampled tokens).
  std::function<int32_t(const std::vector<int32_t>& history)> next_token;
  // Called before a plan is answered; it may wait. False: this plan is never answered.
  std::function<bool(const StepPlan& plan)> before_step = {};
  // The last word on an answer, to spoil it.
  std::function<void(StepDone* done)> spoil = {};
  bool never_ready = false;
};

// A Hello that fits an engine of FakeWorker's defaults: 4 KiB blocks of 64 tokens, 1000 ids.
WorkerHello FakeHello(uint32_t rank, uint32_t world_size);

// Attaches, gets ready and executes plans until the server says Shutdown, the stream ends or
// Kill().
class FakeWorker {
 public:
  explicit FakeWorker(FakeWorkerOptions options);
  ~FakeWorker();  // Kill()

  // Ends the stream as a dead process would.
  void Kill();
  absl::Status SendFault(FaultKind kind, const std::string& text);
  // Waits for the thread. True: the server said Shutdown.
  bool WaitForShutdown();

 private:
  void Run();
  StepDone Execute(const ReceivedPlan& received);

  const FakeWorkerOptions options_;
  std::unique_ptr<WorkQueueClient> client_;
  std::vector<std::vector<int32_t>> history_;  // by slot
  uint64_t last_plan_hash_ = 0;
  bool shut_down_ = false;
  std::thread thread_;
};

}  // namespace wintserve
