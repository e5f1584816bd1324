// An engine worker without a model: speaks the real step protocol from a thread of its own.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/work_queue/client/work_queue_client.h"
#include "common/mapped_memory.h"
#include "common/mutex.h"
#include "engine_worker/runner/block_copier.h"
#include "engine_worker/runner/slot_table.h"
#include "kernels/backend.h"

namespace wintserve {

// The KV memory of one rank, which outlives the worker that maps it. Thread-safe.
class FakePoolMemory {
 public:
  struct Pool {
    MappedMemory blocks;     // int32 [num_blocks, kBlockTokens], each token + 1
    MappedMemory host_tier;  // int32 [num_host_slots, kBlockTokens]
  };

  // The memory of that pool, zeroed when it is asked for the first time.
  absl::StatusOr<std::shared_ptr<Pool>> Map(const AttachPool& attach) EXCLUDES(mutex_);

 private:
  Mutex mutex_;
  std::map<uint64_t, std::weak_ptr<Pool>> pools_ GUARDED_BY(mutex_);  // by epoch
  std::shared_ptr<Pool> last_ GUARDED_BY(mutex_);  // kept as the cache manager keeps it
};

struct FakeWorkerOptions {
  std::string target;
  std::string token;
  WorkerHello hello;
  // The token that follows a slot's history (prompt and sampled tokens). A stop id before the
  // slot's first_stop_position becomes the next id that is none.
  std::function<int32_t(const std::vector<int32_t>& history)> next_token;
  // Where the KV is; null: in memory of its own.
  std::shared_ptr<FakePoolMemory> memory = {};
  // Called before a plan is answered; it may wait. False: this plan is never answered.
  std::function<bool(const StepPlan& plan)> before_step = {};
  // What the forward pass of a step would take; the plans behind it wait as they do in a worker.
  std::chrono::microseconds step_delay{0};
  // The last word on an answer, to spoil it.
  std::function<void(StepDone* done)> spoil = {};
  // Called after a step was answered; it may wait, or send something behind the answer.
  std::function<void()> after_step = {};
  // False: the cache manager is gone when the pool is to be mapped, so that it never is.
  std::function<bool(const AttachPool& attach)> can_map = {};
  // Called before DetachPool is obeyed; it may wait.
  std::function<void()> before_detach = {};
  // Called before AbortGroup is obeyed; it may wait. False: it never is.
  std::function<bool()> before_abort = {};
  bool never_ready = false;
  bool never_detached = false;  // DetachPool is obeyed, but not answered
};

// A Hello that fits an engine of FakeWorker's defaults: 4 KiB blocks of 64 tokens, 1000 ids.
WorkerHello FakeHello(uint32_t rank, uint32_t world_size);

// Attaches, gets ready and executes plans until the server says Shutdown, the stream ends or
// Kill(). Leaves its group when it is told to, with empty slots and the pool still mapped, and
// joins the next one. Its KV blocks hold the tokens themselves, and a history is read back through
// the slot's block table: a wrong block, copy, chunk or cached prefix changes every later token. As
// strict as a real worker: whatever is wrong with a message, or a position that was never written
// in this pool, is sent as a Fault, and ends it.
class FakeWorker {
 public:
  explicit FakeWorker(FakeWorkerOptions options);
  ~FakeWorker();  // Kill()

  // Ends the stream as a dead process would: nothing writes to the KV memory once this has
  // returned, so the exit can be told.
  void Kill() EXCLUDES(death_mutex_);
  absl::Status SendFault(FaultKind kind, const std::string& text, bool kv_trusted = false);
  // As a heartbeat does.
  absl::Status SendProgress(uint64_t progress);
  // Waits for the thread. True: the server said Shutdown.
  bool WaitForShutdown();
  const WorkerHello& hello() const { return options_.hello; }
  int num_mappings() const { return num_mappings_; }  // of pools, so far

 private:
  struct Pool {
    std::shared_ptr<FakePoolMemory::Pool> memory;
    std::unique_ptr<BlockCopier> copier;
    SlotTable slots;
    std::vector<int32_t> last_tokens;  // by slot: the one that was sampled last
  };

  void Run();
  absl::Status Handle(const ServerEvent& event);
  absl::Status Attach(const AttachPool& attach);
  absl::Status Detach(const DetachPool& detach);
  absl::Status Abort(const AbortGroup& abort);
  absl::Status Execute(const ReceivedPlan& received);
  absl::Status CheckChain(const StepPlan& plan) const;
  absl::Status RunCopies(const StepPlan& plan) EXCLUDES(death_mutex_);
  // Writes the row's tokens to its blocks. Returns everything from position 0 to the row's end.
  absl::StatusOr<std::vector<int32_t>> RunRow(const PlanRow& row) EXCLUDES(death_mutex_);
  int32_t NextToken(const std::vector<int32_t>& history, const SamplingParams& sampling) const;

  FakeWorkerOptions options_;
  const std::unique_ptr<kernels::Backend> backend_;  // copies blocks
  std::unique_ptr<WorkQueueClient> client_;
  std::optional<ConfigureWorker> config_;
  std::optional<uint64_t> pool_epoch_;  // of the pool that it maps
  std::optional<Pool> pool_;            // none: it could not be mapped, or not in this group
  std::optional<uint64_t> last_step_;   // of this group
  uint64_t last_plan_hash_ = 0;
  std::atomic<int> num_mappings_ = 0;
  Mutex death_mutex_;  // held while the KV memory is read and written
  bool is_dead_ GUARDED_BY(death_mutex_) = false;
  bool shut_down_ = false;
  std::thread thread_;
};

}  // namespace wintserve
