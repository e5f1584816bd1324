// Continuous batching: which sequences get which tokens in the next step.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "api_server/scheduler/sequence.h"

namespace wintserve {

struct SchedulerConfig {
  int max_num_seqs = 16;             // slots of a worker
  int max_num_batched_tokens = 256;  // rows of a step; at least max_num_seqs
  int block_size_tokens = 64;
  int num_blocks = 0;                 // of the KV pool
  int vocab_size = 0;                 // ids at and above it are no tokens
  std::vector<int32_t> eos_ids = {};  // sampling one of them finishes a sequence
};

struct ScheduledRequest {
  uint64_t id = 0;                       // chosen by the caller, rising
  std::vector<int32_t> prompt_ids = {};  // not empty
  SamplingParams sampling = {};          // choice_index is filled in
  int num_choices = 1;
  int max_tokens = 0;  // at least 1
};

enum class SequenceEnd { kStop, kLength };

struct SequenceToken {
  SequenceKey sequence;
  int32_t token = 0;
  std::optional<SequenceEnd> end;  // this token was its last
};

struct BlockLeaseRequest {
  uint64_t tag = 0;
  uint32_t count = 0;  // all or nothing
};

// What the caller has to do, in this order: return blocks, ask for a lease, send the plan.
struct SchedulerOutput {
  std::vector<LeasedBlock> return_blocks;
  std::optional<BlockLeaseRequest> lease;
  std::optional<StepPlan> plan;      // epochs and previous_plan_hash are the sender's to fill in
  std::vector<SequenceKey> started;  // sequences whose prompt is in this plan
  std::vector<SequenceKey> failed;   // can never get their blocks; they are gone
};

struct SchedulerStats {
  int num_running = 0;  // sequences that own a slot
  int num_waiting = 0;
  int num_blocks_held = 0;
};

// A state machine (events) -> (plan, effects): no I/O, clock, threads or RPC.
// Threading:  thread-compatible; one thread calls it.
// Policy:     FCFS. A sequence is admitted with a free slot and with all the blocks that it can
// ever need,
//             so a running sequence never waits for memory. The head of the queue is never
//             overtaken. A step runs all decodes, then whole prompts within the row budget. A
//             prompt that does not fit beside the decodes gets a step of prefills alone; such steps
//             alternate with decode steps, so neither side starves. The choices of a request are
//             sequences of their own; each computes the prompt.
// Invariants: one plan is in flight at most. A block belongs to one sequence from lease to return,
// and is
//             returned once no plan in flight mentions it. A slot is reused once the plan that
//             releases it is done.
class Scheduler {
 public:
  explicit Scheduler(const SchedulerConfig& config);

  // INVALID_ARGUMENT: the pool is too small for it even when empty; nothing has changed.
  absl::Status Submit(ScheduledRequest request);

  // The sequence (or all of the request) gets no row in any later plan and reports no more tokens.
  // Unknown or finished ones are ignored.
  void Cancel(uint64_t request_id);
  void Cancel(const SequenceKey& key);

  // The answer to a lease request; no blocks: fewer than asked for are free.
  void OnBlocksLeased(uint64_t tag, std::vector<LeasedBlock> blocks);

  // The plan in flight is done on every rank; `sampled` is rank 0's result. Tokens of cancelled
  // sequences are left out. INTERNAL: the result does not fit the plan.
  absl::StatusOr<std::vector<SequenceToken>> OnStepDone(uint64_t step,
                                                        const std::vector<SampledToken>& sampled);

  // To be called after any event.
  SchedulerOutput Schedule();

  SchedulerStats stats() const;
  bool plan_in_flight() const { return in_flight_.has_value(); }

 private:
  struct InFlight {
    uint64_t step = 0;
    std::vector<Sequence*> rows;  // one per row, in row order; every row samples
    std::vector<uint32_t> slot_release;
  };
  struct Lease {
    uint64_t tag = 0;
    bool blocks_returned_since = false;  // a refusal is out of date
  };

  int BlocksNeeded(int num_tokens) const;
  bool Finish(Sequence* sequence);
  void Retire(Sequence* sequence);
  void ReturnBlocks(std::vector<LeasedBlock> blocks);
  void RequestLease(SchedulerOutput* output);
  bool NextStepIsPrefillOnly() const;
  void AddDecodes(StepPlan* plan);
  void AddPrefills(int budget, StepPlan* plan, std::vector<SequenceKey>* started);

  const SchedulerConfig config_;
  std::map<SequenceKey, Sequence> sequences_;  // node-stable: the queues below point into it
  std::deque<Sequence*> waiting_;
  std::deque<Sequence*> prefills_;  // admitted, prompt not planned yet
  std::vector<Sequence*> decodes_;  // in order of admission
  std::set<uint32_t> free_slots_;
  std::vector<uint32_t> slots_to_release_;     // in the next plan
  std::vector<LeasedBlock> blocks_to_return_;  // with the next output
  std::vector<SequenceKey> failed_;
  std::optional<Lease> lease_;  // asked for, not answered yet
  bool lease_refused_ = false;  // ask again when blocks have been returned
  uint64_t next_lease_tag_ = 1;
  int num_blocks_held_ = 0;
  std::optional<InFlight> in_flight_;
  uint64_t last_step_ = 0;
  bool last_step_was_prefill_only_ = false;
};

}  // namespace wintserve
