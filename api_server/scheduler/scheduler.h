// Continuous batching: which sequences get which tokens in the next step, and which KV blocks.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/scheduler/plan.h"
#include "cache_manager/core/cache_messages.h"

namespace wintserve {

struct SequenceKey {
  uint64_t request = 0;
  uint32_t choice = 0;
  auto operator<=>(const SequenceKey&) const = default;
};

struct SchedulerConfig {
  // Of the workers and the pool.
  int max_num_seqs = 16;             // slots of a worker
  int max_num_batched_tokens = 256;  // of a step; at least max_num_seqs
  int block_size_tokens = 64;
  int num_blocks = 0;                 // of the KV pool
  int vocab_size = 0;                 // ids at and above it are no tokens
  std::vector<int32_t> eos_ids = {};  // sampling one of them finishes a sequence
  // Number of the first plan; at least 1. Numbers count on from it by one a plan, over group losses
  // and pools too, and never start again. To the cache manager they name what was written when (see
  // CommitRequest::step), so a scheduler that takes over the pool of another one begins above all
  // numbers that the other one can have used.
  uint64_t first_step = 1;

  // Policy.
  int async_depth = 1;  // plans sent ahead of the one that runs; 0: strict
  bool chunked_prefill = true;
  bool prefix_caching = true;
  int max_partial_prefills = 2;          // prompts that are computed in pieces at the same time
  int max_long_partial_prefills = 1;     // of them, prompts longer than the threshold
  int long_prefill_token_threshold = 0;  // 0: max_long_partial_prefills does not apply
  int max_seqs_per_tenant = 0;           // running at once; 0: no cap
  int max_queue_requests = 0;            // waiting sequences; 0: no limit
  int64_t max_queue_tokens = 0;          // their prompt tokens that are not cached; 0: no limit
  // While sequences decode, prefill gets what lengthens a step to at most this multiple of a step
  // of decodes alone, as measured; never less than 1/8 of max_num_batched_tokens. 0: no such limit.
  double max_step_slowdown = 3;
  double restore_us_per_block = 0;  // cost of a copy, before one was measured
};

struct ScheduledRequest {
  uint64_t id = 0;                       // chosen by the caller, rising
  std::vector<int32_t> prompt_ids = {};  // not empty
  // choice_index and first_stop_position are filled in. num_prompt_top_logprobs is asked for once,
  // through the first choice, which then computes every token of the prompt itself.
  SamplingParams sampling = {};
  int num_choices = 1;
  int max_tokens = 0;  // at least 1
  int min_tokens = 0;  // no stop id is sampled before
  bool ignore_eos = false;
  std::vector<int32_t> stop_tokens = {};    // end it, too; also with ignore_eos
  int priority = 0;                         // lower comes first
  std::string tenant = {};                  // API key or user; empty: none
  std::string cache_salt = {};              // prompts share KV only under the same salt
  bool bypass_cache_match = false;          // every prompt token has to be computed
  std::optional<int64_t> deadline_us = {};  // on the caller's clock
  int64_t timeout_ms = 0;                   // what the deadline follows from, for messages
};

enum class SequenceEnd { kStop, kLength };

struct SequenceToken {
  SequenceKey sequence;
  int32_t token = 0;
  std::optional<SequenceEnd> end;  // this token was its last
  std::optional<PositionLogprobs> logprobs = {};
  // Of the prompt's tokens from the second on, where they are asked for: all of them, with the
  // first token of the first choice.
  std::vector<PositionLogprobs> prompt_logprobs = {};
};

// What the cache manager is asked; every tag is answered once, by the event of the same name,
// unless OnCacheLost comes first.
struct PeekCommand {
  uint64_t tag = 0;
  std::string salt;
  std::shared_ptr<const std::vector<int32_t>> tokens;
};
struct MatchCommand {
  uint64_t tag = 0;
  std::string salt;
  std::vector<int32_t> tokens;
  bool allow_restore = false;
};
struct LeaseCommand {
  uint64_t tag = 0;
  uint32_t count = 0;
};
struct CommitCommand {
  uint64_t tag = 0;
  CommitRequest request;
};
struct ReleaseCommand {
  std::vector<uint64_t> entries;
};
struct ReturnCommand {
  std::vector<PoolBlock> blocks;
};
struct CopyDoneCommand {
  std::vector<uint64_t> copy_ids;
  uint64_t step = 0;  // none of them ran in a later one
};
using CacheCommand = std::variant<PeekCommand, MatchCommand, LeaseCommand, CommitCommand,
                                  ReleaseCommand, ReturnCommand, CopyDoneCommand>;

// A sequence got its slot for the first time.
struct SequenceStart {
  SequenceKey sequence;
  int num_cached_tokens = 0;  // prompt tokens that it does not compute, over all tiers
};

// The sequence is gone. DEADLINE_EXCEEDED: its time is up. RESOURCE_EXHAUSTED: it cannot run.
struct SequenceFailure {
  SequenceKey sequence;
  absl::Status error;
};

// What the caller has to do, in this order.
struct SchedulerOutput {
  std::vector<CacheCommand> cache;  // send, in order
  std::optional<StepPlan> plan;     // epochs and previous_plan_hash are the sender's to fill in
  std::vector<SequenceStart> started;
  std::vector<SequenceFailure> failed;
};

struct SchedulerStats {
  int num_running = 0;  // sequences that own a slot
  int num_waiting = 0;
  int64_t num_waiting_tokens = 0;
  int num_matching = 0;
  int num_restoring = 0;
  int num_blocks_held = 0;          // leased or pinned, the local lease included
  int num_blocks_leased_ahead = 0;  // of them, not yet given to a sequence
  int num_blocks_available = 0;     // at the cache manager, as last told
  int num_plans_in_flight = 0;
  // Totals.
  uint64_t preemptions = 0;
  uint64_t overshoot_rows = 0;        // computed for a sequence that had ended
  uint64_t resumed_sequences = 0;     // went on from their KV after the rank group was lost
  uint64_t recomputed_sequences = 0;  // ran when it was lost, and are computed again
  uint64_t queried_tokens = 0;        // prompt tokens of first admissions
  uint64_t device_hit_tokens = 0;
  uint64_t host_hit_tokens = 0;
};

// What the session has to say after a reconnect.
struct HeldBlocks {
  std::vector<PinCount> pins;
  std::vector<PoolBlock> leased;
};

// A state machine (events, now) -> (plan, effects): no I/O, clock, threads or RPC.
// docs/SCHEDULER.md draws the life of a sequence.
//
// Threading:   thread-compatible; one thread calls it.
// Time:        now_us is any clock that does not go back; the same one for all calls.
// Order:       priority, then arrival; a tenant at its cap is passed over. A step holds all
// decodes,
//              then running prefills, then admissions, within max_num_batched_tokens; with chunked
//              prefill off, prompts run whole, and one that does not fit beside the decodes gets a
//              step of prefills alone, in turn with steps of decodes.
// Memory:      a sequence is admitted when its first chunk and a reserve for the running ones fit,
//              and grows block by block from a local lease that is refilled ahead of need. When no
//              block is to be had, pins of sequences that wait are given up, then the lowest class,
//              latest arrival is preempted: it gives up its slot and blocks, queues again once no
//              plan in flight names it, and is computed again from its tokens when all of them fit.
//              The first one that runs is preempted only when it is alone and holds content twice
//              (as duplicates of indexed blocks).
// Caching:     see cache_manager/core/prefix_cache.h. A full block is committed once the step that
//              filled it is done on every rank; never before.
// Prompt logprobs: what one step tells is kept, over preemption and the loss of a group or pool,
// and
//              not taken a second time when it is computed again. Until all is known the sequence
//              matches no prefix, since positions in the cache have no logits, and the other
//              choices wait.
// Choices:     sequences of their own. The others of a request wait until the first one's prompt is
//              computed and committed, and share its full blocks through the cache; without caching
//              each computes the prompt.
// Slots:       released by the plan of a sequence's last row where that is known ahead, else by the
//              next plan; initialised again no earlier than in the plan after that. All of them
//              are empty after OnGroupLost.
// Invariants:  at most 1 + async_depth plans are in flight. No plan names a block that its sequence
//              does not hold at that time. A block goes back, and a pin is released, once no plan
//              in flight names it.
class Scheduler {
 public:
  explicit Scheduler(SchedulerConfig config);
  ~Scheduler();

  // INVALID_ARGUMENT: the pool is too small for it even when empty. RESOURCE_EXHAUSTED: the queue
  // is full, or its wait is predicted to outlast its deadline; RetryAfterSeconds() of the status
  // says when to come again. Nothing has changed then.
  absl::Status Submit(ScheduledRequest request, int64_t now_us);

  // The sequence (or all of the request) gets no row in any later plan and reports no more tokens.
  // Unknown or finished ones are ignored.
  void Cancel(uint64_t request_id);
  void Cancel(const SequenceKey& key);

  // Answers of the cache manager. One whose sequence has gone gives back at once what it brought.
  void OnPeeked(uint64_t tag, const PeekResult& result);
  void OnMatched(uint64_t tag, MatchResult result);
  void OnLeased(uint64_t tag, std::vector<PoolBlock> blocks);
  void OnCommitted(uint64_t tag, const std::vector<CommittedBlock>& blocks);
  void OnCopyOut(std::vector<CopyOrder> copies);
  void OnAvailable(uint32_t num_blocks);

  // The session is gone. Commands that were not answered never will be: a Match counts as a miss,
  // commits are dropped; running sequences go on with the blocks that they hold and what is left of
  // the lease.
  void OnCacheLost();
  // The same pool is back: what it has to be told first (and then Fence). Then everything works as
  // before. Sequences whose last commit or restore was not confirmed do not know what the cache
  // manager holds of theirs: they give up their blocks and are computed again from their tokens.
  // REQUIRES: OnCacheLost came before; no plan in flight (see OnGroupLost).
  HeldBlocks OnCacheResumed();
  // A new, empty pool; slots are empty on every worker. All sequences are computed again from their
  // tokens; one that does not fit the pool any more fails. REQUIRES: no plan in flight.
  void OnPoolReplaced(int num_blocks);

  // The rank group is over: nothing that its ranks started writes to a block or a host slot any
  // more, and every slot on every rank is empty. To be called when that is so, not before, paused
  // or not, with plans in flight or without; also while the session is lost, and then before
  // OnCacheResumed and OnPoolReplaced, which need that no plan is in flight.
  //  - Plans in flight count as done without results; none of them may be reported to OnStepDone
  //    later. The next plan has the number after the last one's.
  //  - Sequences go back to their last reported token and to what was done on every rank. Each that
  //    runs is initialised anew by a SlotInit with its whole block table and its histories, and
  //    sends the token of its first row explicitly. These SlotInits are spread over plans of at
  //    most 4 MiB. A sequence whose last row was in flight runs again. It may have left its slot,
  //    or its tenant's place, to another one: then the last of them by rank queues again.
  //  - Blocks and pins that waited for plans in flight go back. Sequences that had been preempted
  //    queue again.
  //  - Copies of these plans may have run, in part or not at all. They are ordered again, ahead of
  //    all others and with the same ids: until CopyDone nobody else gets their blocks and slots,
  //    and what they read does not change. A sequence that runs on blocks of such a restore gets no
  //    row before the plan after the copies. While the session is lost they are given up as
  //    OnCacheLost says: a restore that was in flight is a miss, whoever runs on it starts over.
  // kv_trusted = false: what the last steps wrote may be wrong. Then nothing is committed of what
  // is held, and every sequence that holds blocks gives up all of them, those of commits, matches
  // and restores under way as soon as these are answered or done; all are computed again from their
  // tokens, as in OnPoolReplaced. The caller tells the cache manager (DistrustSteps) before any
  // command that Schedule returns afterwards; without a session, after Reconcile.
  void OnGroupLost(bool kv_trusted);

  // From the next plan on, only sequences of that request are started; others that run give up slot
  // and blocks and queue, as if preempted, and get tokens later. It overtakes everybody. Ends with
  // the request's last sequence, or with std::nullopt. A request that is not known isolates nobody.
  void SetIsolated(std::optional<uint64_t> request_id);
  std::optional<uint64_t> isolated() const;
  // Requests that plans in flight compute rows of, with those that have ended meanwhile; rising.
  std::vector<uint64_t> RequestsInFlight() const;

  // While paused no plan is made (events are taken as ever).
  void SetPaused(bool paused);

  // The oldest plan in flight is done on every rank; `sampled` and prompt_logprobs are rank 0's
  // result. step_us: how long it took. Tokens of cancelled sequences are left out. INTERNAL: the
  // result does not fit the plan.
  absl::StatusOr<std::vector<SequenceToken>> OnStepDone(
      uint64_t step, const std::vector<SampledToken>& sampled, int64_t step_us, int64_t now_us,
      std::vector<PromptRowLogprobs> prompt_logprobs = {});

  // To be called after any event, until it makes no plan; and at NextDeadlineUs().
  SchedulerOutput Schedule(int64_t now_us);

  // When a waiting or running sequence runs out of time, if nothing else happens.
  std::optional<int64_t> NextDeadlineUs() const;

  SchedulerStats stats() const;  // takes the same time whatever waits
  int num_plans_in_flight() const;
  // INTERNAL describes the first broken invariant; for tests, linear in everything.
  absl::Status CheckInvariants() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

// Of a RESOURCE_EXHAUSTED from Submit: whole seconds, 1 to 600.
int RetryAfterSeconds(const absl::Status& status);

}  // namespace wintserve
