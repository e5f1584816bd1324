// Executes plans: keeps the slots, builds batches for the model, samples, and shares the ids.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "engine_worker/collectives/collective.h"
#include "engine_worker/model/model.h"
#include "engine_worker/runner/block_copier.h"
#include "engine_worker/runner/pending_step.h"
#include "engine_worker/runner/slot_table.h"
#include "engine_worker/runner/step_graphs.h"
#include "kernels/backend.h"

namespace wintserve {

// A place in a group's chain of plans: the plan that a rank executed last. 0, 0: none yet, and the
// first may be of any step, because steps count on over groups.
struct PlanChain {
  uint64_t step = 0;
  uint64_t plan_hash = 0;
};

struct StepRunnerConfig {
  uint64_t group_epoch = 0;
  uint64_t pool_epoch = 0;
  uint32_t num_blocks = 0;
  uint32_t num_host_slots = 0;
  uint32_t block_size_tokens = 64;
  uint32_t max_slots = 0;
  uint32_t max_tokens = 0;  // of one plan
  uint32_t max_sequence_tokens = 0;
  uint32_t sampled_vocab_size = 0;     // ids at and above are never sampled
  std::vector<int32_t> stop_ids = {};  // not sampled before a slot's first_stop_position
  // WarmUp captures decode steps, and those run as graphs. The same on every rank.
  bool use_graphs = false;
  // Where the first plan goes on. The chain is the group's: steps are counted and plans chained
  // over a replacement of the pool, which only empties the slots.
  PlanChain chain = {};
};

// One rank's executor of one group_epoch on one pool. Every rank applies the same plans in the same
// order; rank 0 samples, the others get the ids from it.
//
// What a plan asks for runs in this order: copies, slot_init, block_append, rows, slot_release; but
// copies run beside rows, of which only those that use a block that comes from the host tier, in
// this plan or one before, wait for it. A step is done when its copies are, too.
//
// A plan may hold more tokens than the model takes at once: it then runs as several forward passes,
// which gives the same bits where the model is deterministic. So does a pass of decodes that runs
// as a graph, with padding rows up to the graph's size (StepGraphs).
//
// Log-probabilities of prompt tokens are read after the pass of their row, from the logits of at
// most Model::max_logit_rows() tokens at a time.
//
// Sampled ids stay on the device as the next plan's input, so plans may begin one after the other
// while the device is still at work on the first.
//
// Ownership: borrows model, collective, pool and host tier; a PendingStep must not outlive the
// model. Threading: one thread, but for PendingStep::Wait. Errors:    INVALID_ARGUMENT,
// FAILED_PRECONDITION: the plan breaks a rule (another epoch, a gap in
//            the chain of plans, a slot, block, position or token out of place); found before the
//            model runs, and alike on every rank. UNAVAILABLE: a peer is gone. Others come from the
//            model. After any error the runner is of no use.
class StepRunner {
 public:
  // kv_pool [num_blocks, block bytes]: device memory of the model's backend. host_tier
  // [num_host_slots, block bytes]: mapped host memory; null when there are no host slots.
  // INVALID_ARGUMENT: the model cannot serve this configuration; names the number.
  // RESOURCE_EXHAUSTED: no memory for the batch.
  static absl::StatusOr<std::unique_ptr<StepRunner>> Create(const StepRunnerConfig& config,
                                                            Model* model, Collective* collective,
                                                            void* kv_pool, void* host_tier);

  // One small forward pass, on all ranks together, so that the first request does not pay for what
  // happens once. Then, with use_graphs, CaptureGraphs. Before the first plan only. The pool stays
  // as it is, since it may hold what sequences of an earlier group have computed.
  // RESOURCE_EXHAUSTED: no memory for a block beside the pool. Other errors: those of Begin.
  absl::Status WarmUp();

  // Makes the graphs anew; on all ranks together. Overwrites what slot 0 has sampled last, so
  // before the first plan or when every slot is free. Errors: those of WarmUp, and of
  // kernels::Backend::Capture.
  absl::Status CaptureGraphs();
  // Steps run without graphs until CaptureGraphs. To be called before the end of whatever the
  // graphs have captured: a communicator that is aborted and joined again, the pool.
  void ClearGraphs() { graphs_.Clear(); }
  const StepGraphs& graphs() const { return graphs_; }

  // Checks the plan and calls the operators that it asks for. plan_hash: of the plan's bytes as
  // received.
  absl::StatusOr<std::unique_ptr<PendingStep>> Begin(const StepPlan& plan, uint64_t plan_hash);
  // Begin and Wait.
  absl::StatusOr<StepDone> Apply(const StepPlan& plan, uint64_t plan_hash);

  // For the runner of the next pool.
  const PlanChain& chain() const { return chain_; }

 private:
  StepRunner(const StepRunnerConfig& config, Model* model, Collective* collective, void* kv_pool);

  absl::Status AllocateMemory(void* host_tier);
  absl::Status CheckChain(const StepPlan& plan) const;
  absl::Status RunRows(const StepPlan& plan);
  // Tokens of the pass at work whose followers' log-probabilities are asked for.
  struct PromptTokens {
    uint32_t slot = 0;
    uint32_t position = 0;              // of the first follower
    int64_t first_token = 0;            // place in the batch
    std::vector<int32_t> targets = {};  // the followers
  };
  // What drawing for a slot has to know of its sequence; rank 0 draws.
  void StartSlots(const StepPlan& plan);
  void AddToBatch(const PlanRow& row, uint32_t offset, uint32_t length);
  void AddPromptTokens(const PlanRow& row, uint32_t offset, uint32_t length);
  bool BatchIsFull() const;
  // kv_pool: the pool, or what stands for it in a warm-up.
  absl::Status RunBatch(void* kv_pool);
  // The operators of a pass over device_batch_: from its tokens to ids that every rank has and
  // keeps. `logits`: of rank 0, until the next pass; for log-probabilities.
  absl::Status ComputeIds(void* kv_pool, int32_t* ids, kernels::ConstRows* logits);
  // Of the pass that was called last.
  absl::Status ReadPromptLogprobs(const PromptTokens& tokens);
  const StepGraphs::Entry* GraphForBatch() const;
  absl::Status WarmUpRows(int64_t num_rows, const kernels::Buffer& block);
  kernels::SampleParams SampleParamsOf(const PlanRow& row) const;
  bool samples() const { return collective_->rank() == 0; }

  const StepRunnerConfig config_;  // stop_ids in rising order, each once
  Model* const model_;
  kernels::Backend* const backend_;
  Collective* const collective_;
  void* const kv_pool_;

  std::unique_ptr<BlockCopier> copier_;
  SlotTable slots_;
  PlanChain chain_;

  // Of the pass at work; a member for its memory.
  kernels::Batch batch_;
  int64_t batch_logit_rows_ = 0;
  bool batch_wants_logprobs_ = false;
  std::vector<PromptTokens> batch_prompt_tokens_;
  std::unique_ptr<kernels::DeviceBatch> device_batch_;

  // Of the step at work.
  std::vector<PendingStep::Sampled> sampled_;
  const StepResultLayout result_layout_;
  std::unique_ptr<kernels::Buffer> device_results_;  // of result_layout_, of `sampled_`
  int64_t num_device_ids_ = 0;
  bool wants_logprobs_ = false;
  std::shared_ptr<ResultBuffers> result_buffers_;
  std::vector<PendingStep::PromptPiece> prompt_pieces_;
  const StepResultLayout prompt_layout_;
  std::unique_ptr<kernels::Buffer> device_prompt_results_;  // of prompt_layout_, of one piece
  std::shared_ptr<ResultBuffers> prompt_buffers_;

  StepGraphs graphs_;  // last: they work on the others
};

}  // namespace wintserve
