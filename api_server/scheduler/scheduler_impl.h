// Private to the scheduler: its state, and which file does what.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/scheduler/block_ledger.h"
#include "api_server/scheduler/scheduler.h"
#include "api_server/scheduler/sequence.h"
#include "api_server/scheduler/step_time_model.h"
#include "api_server/scheduler/waiting_queue.h"

namespace wintserve {

class Scheduler::Impl {
 public:
  explicit Impl(SchedulerConfig config);

  // See class Scheduler.
  absl::Status Submit(ScheduledRequest request, int64_t now_us);
  void Cancel(uint64_t request_id);
  void Cancel(const SequenceKey& key);
  void OnPeeked(uint64_t tag, const PeekResult& result);
  void OnMatched(uint64_t tag, MatchResult result);
  void OnLeased(uint64_t tag, std::vector<PoolBlock> blocks);
  void OnCommitted(uint64_t tag, const std::vector<CommittedBlock>& blocks);
  void OnCopyOut(std::vector<CopyOrder> copies);
  void OnAvailable(uint32_t num_blocks);
  void OnCacheLost();
  HeldBlocks OnCacheResumed();
  void OnPoolReplaced(int num_blocks);
  void OnGroupLost(bool kv_trusted);
  void SetIsolated(std::optional<uint64_t> request_id);
  std::optional<uint64_t> isolated() const { return isolated_; }
  std::vector<uint64_t> RequestsInFlight() const;
  void SetPaused(bool paused) { paused_ = paused; }
  absl::StatusOr<std::vector<SequenceToken>> OnStepDone(
      uint64_t step, const std::vector<SampledToken>& sampled, int64_t step_us, int64_t now_us,
      std::vector<PromptRowLogprobs> prompt_logprobs);
  SchedulerOutput Schedule(int64_t now_us);
  std::optional<int64_t> NextDeadlineUs() const;
  SchedulerStats stats() const;
  int num_plans_in_flight() const { return static_cast<int>(in_flight_.size()); }
  absl::Status CheckInvariants() const;

 private:
  struct PlannedRow {
    Sequence* sequence = nullptr;
    uint32_t slot = 0;
    int end = 0;  // position after its last token
    bool sample = false;
    int num_prompt_logprobs = 0;   // that it asks for
    int prompt_logprobs_from = 0;  // position of the first of them
  };
  struct PlannedCopy {
    CopyOrder order;
    Sequence* owner = nullptr;  // of a copy to the device
  };
  struct PlanInFlight {
    uint64_t step = 0;
    std::vector<PlannedRow> rows = {};
    std::vector<PlannedCopy> copies = {};  // none once the session is lost
    std::vector<Sequence*> restored = {};  // owners of the copies to the device
    StepWork work = {};
  };
  struct PlanDraft {
    StepPlan plan = {};
    PlanInFlight flight = {};
    int num_tokens = 0;                       // in rows
    int64_t num_bytes = 0;                    // at most, once serialized
    int prefill_tokens_left = 0;              // of its budget
    int num_partial = 0;                      // prompts that are left unfinished
    int num_long_partial = 0;                 // of them, longer than the threshold
    bool shares_prefill = false;              // more than one prompt could use it
    bool lacks_blocks = false;                // somebody sits out for want of a block
    const Sequence* starved_first = nullptr;  // the first in the queue, where nothing runs
  };

  // scheduler.cc: requests and results.
  absl::Status AdmitToQueue(const ScheduledRequest& request, int64_t now_us) const;
  int64_t TokensOfChoice(int prompt_len, bool bypass_cache_match, uint32_t choice) const;
  void End(Sequence* sequence);
  void Forget(Request* request);
  void GiveUpSlot(Sequence* sequence);
  void QueueAgainLater(Sequence* sequence);
  void UncountPreempted(const Sequence& sequence);
  void Requeue(Sequence* sequence);
  void RetireIfUnnamed(Sequence* sequence);
  void ExpireDeadlines(int64_t now_us);
  bool IsStop(const Sequence& sequence, int32_t token) const;
  absl::Status CheckResult(uint64_t step, const std::vector<SampledToken>& sampled) const;
  absl::Status CheckPromptLogprobs(const std::vector<PromptRowLogprobs>& told) const;
  static void TakePromptLogprobs(Sequence* sequence, PromptRowLogprobs told);
  void TakeToken(Sequence* sequence, const SampledToken& sampled,
                 std::vector<SequenceToken>* tokens);

  // caching.cc: matches, restores, commits, and the loss of the session.
  bool caching() const { return config_.prefix_caching && !ledger_.lost(); }
  bool NeedsMatch(const Sequence& sequence) const;
  void AskMatch(Sequence* sequence, std::vector<CacheCommand>* commands);
  void SetMatch(Sequence* sequence, MatchState state);
  void SetRestored(Sequence* sequence, bool restored, uint64_t known_tag);
  void RevokeMatch(Sequence* sequence);
  bool HasBlocksToCommit(const Sequence& sequence) const;
  void QueueCommit(Sequence* sequence);
  void SendCommits(std::vector<CacheCommand>* commands);
  void OutdateMatches(const Sequence& committer, int first_block, int num_blocks);
  bool MayStart(Sequence* sequence) const;
  bool HoldsUncertainBlocks(const Sequence& sequence) const;
  void Forget(Sequence* sequence);
  void CountWaitingTokensAgain();

  // admission.cc: who is next in line.
  enum class StartResult { kStarted, kPassedOver, kWaits };
  bool IsAlone() const { return running_.empty() && num_leaving_ == 0; }
  int ExpectedTokens(const Sequence& sequence) const;
  int FirstBlocks(const Sequence& sequence) const;
  int Watermark() const;
  bool FitsMemory(const Sequence& sequence, int num_reserved_blocks, bool is_first) const;
  void AskMatches(std::vector<CacheCommand>* commands);
  void DropMatch(Sequence* sequence);
  void Admit(PlanDraft* draft, SchedulerOutput* output);
  StartResult TryStart(Sequence* sequence, PlanDraft* draft, SchedulerOutput* output);
  void Start(Sequence* sequence, SchedulerOutput* output);

  // plan_builder.cc: what goes into the next plan.
  int BlocksFor(int num_tokens) const;
  static bool AwaitsCopies(const Sequence& sequence, const PlanDraft& draft);
  bool IsLong(const Sequence& sequence) const;
  void BuildPlan(SchedulerOutput* output);
  void AddCopies(PlanDraft* draft);
  void AddDecodes(PlanDraft* draft);
  int PrefillBudget(const PlanDraft& draft) const;
  void AddRunningPrefills(PlanDraft* draft);
  int ChunkOf(const Sequence& sequence, const PlanDraft& draft) const;
  int TokensWithBlocks(const Sequence& sequence) const;
  bool FitsMessage(const Sequence& sequence, int chunk, const PlanDraft& draft) const;
  void AddRow(Sequence* sequence, int chunk, PlanDraft* draft);
  static void AskForPromptLogprobs(const Sequence& sequence, PlanRow* row, PlannedRow* planned);
  bool NextStepIsPrefillOnly() const;
  const Sequence* NextWholePrompt() const;

  // group_loss.cc: the loss of the rank group, and requests that run alone.
  bool MayStartBesideIsolated(const Sequence& sequence) const;
  void DropPlansInFlight();
  void StartOverUnfilled(Sequence* sequence);
  std::vector<Sequence*> TakeFromSlots();
  bool ResumeInSlot(Sequence* sequence);
  void DistrustBlocks();

  // memory.cc: blocks for the next plans, and what happens when there are none.
  void RelieveMemory(const PlanDraft& draft);
  bool HoldsDuplicates(const Sequence& sequence) const;
  bool HasCopiesUnderWay() const;
  bool RevokePinsOfWaiting(const Sequence* keeps);
  void Preempt(Sequence* sequence);
  void RefillLease(std::vector<CacheCommand>* commands);

  // invariants.cc: for tests.
  absl::Status CheckSlots() const;
  absl::Status CheckBlocks() const;
  absl::Status CheckTenants() const;
  absl::Status CheckCounters() const;

  SchedulerConfig config_;
  StepTimeModel step_times_;
  BlockLedger ledger_;
  WaitingQueue waiting_;
  std::set<Sequence*, ByRank> matched_waiting_;  // with a match in hand, and maybe pins
  std::list<Sequence> sequences_;  // all that are not gone; the pointers elsewhere point into it
  std::map<uint64_t, std::shared_ptr<Request>> requests_;  // with a choice that has not ended
  std::unordered_map<std::string, Tenant> tenants_;
  std::set<std::pair<int64_t, SequenceKey>> deadlines_;
  std::vector<Sequence*> running_;  // by rank
  std::set<uint32_t> free_slots_;
  std::vector<uint32_t> slots_to_release_;  // in the next plan
  std::deque<PlanInFlight> in_flight_;
  std::vector<PlannedCopy> restores_;  // for the next plan
  std::deque<CopyOrder> copy_outs_;    // for the next plans
  std::vector<uint64_t> copies_done_;  // to be told
  std::vector<Sequence*> to_commit_;
  std::unordered_map<uint64_t, Sequence*> asked_;  // matches and commits, by tag
  std::unordered_map<uint64_t, uint64_t> peeked_;  // request ids, by tag
  std::vector<PeekCommand> peeks_;                 // to be sent
  std::vector<SequenceFailure> failed_;

  uint64_t next_tag_ = 1;
  uint64_t last_answered_tag_ = 0;
  uint64_t next_arrival_ = 1;
  uint64_t last_step_ = 0;       // planned
  uint64_t last_done_step_ = 0;  // acknowledged
  int num_leaving_ = 0;          // sequences whose blocks are on their way back
  int num_matching_ = 0;         // whose match is not answered
  int num_restoring_ = 0;        // with copies from the host that are not known to be done
  int num_preempted_ = 0;        // that are going to queue again
  int64_t num_preempted_tokens_ = 0;
  int candidate_blocks_ = 0;  // of those next in line
  bool last_step_was_prefill_only_ = false;
  bool paused_ = false;
  std::optional<uint64_t> isolated_;  // the only request whose sequences start
  SchedulerStats totals_;
};

}  // namespace wintserve
