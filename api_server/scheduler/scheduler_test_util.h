// For tests: the scheduler among a cache manager and workers in miniature, which check all that
// they are told.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "api_server/scheduler/scheduler.h"

namespace wintserve {

// The rules of cache_manager/core/prefix_cache.h, by linear search. A wrong request is a failure of
// the test.
class FakeCache {
 public:
  FakeCache(int num_blocks, int num_host_slots, int block_size);

  PeekResult Peek(const std::string& salt, const std::vector<int32_t>& tokens) const;
  MatchResult Match(const std::string& salt, const std::vector<int32_t>& tokens, bool restore);
  std::vector<PoolBlock> Lease(uint32_t count);
  std::vector<CommittedBlock> Commit(const CommitRequest& request);
  void Release(const std::vector<uint64_t>& entries);
  void Return(const std::vector<PoolBlock>& blocks);
  void CopyDone(uint64_t copy_id, uint64_t step);  // that ran it, or a later one
  std::vector<CopyOrder> TakeCopyOuts();
  void Reconcile(const HeldBlocks& held);
  void Fence();
  void Flush();  // nothing that is indexed matches any more
  // Of that, what was written or copied in `first_step` or later, is being copied, or lies below
  // such an entry.
  void DistrustSteps(uint64_t first_step);

  int num_available() const;
  int BlockOf(uint64_t entry) const { return entries_.at(entry).block; }
  int num_pins() const;
  int num_leased() const;

 private:
  enum class State { kFree, kLeased, kCommitted, kRestoring, kCopyingOut, kQuarantined };
  struct Block {
    State state = State::kFree;
    uint32_t generation = 0;
    uint64_t entry = 0;
  };
  struct Entry {
    uint64_t parent = 0;
    std::string salt;
    std::vector<int32_t> tokens;
    int block = -1;
    int host_slot = -1;
    uint32_t pins = 0;
    bool indexed = true;
    bool hit = false;
    uint64_t released_at = 0;
    uint64_t step = 0;  // the last one that wrote to one of its copies
  };

  std::vector<uint64_t> Chain(const std::string& salt, const std::vector<int32_t>& tokens) const;
  uint64_t Find(uint64_t parent, const std::string& salt, const std::vector<int32_t>& tokens) const;
  std::optional<int> TakeFree();
  std::optional<uint64_t> Evictable() const;
  void Free(int block);
  void Unindex(const std::vector<uint64_t>& entries);
  void DropIfUseless(uint64_t entry);
  PoolBlock Name(int block) const { return {block, blocks_[block].generation}; }

  const size_t block_size_;
  std::vector<Block> blocks_;
  std::vector<bool> host_used_;
  std::map<uint64_t, Entry> entries_;
  std::map<uint64_t, CopyOrder> copies_;
  uint64_t last_entry_ = 0;
  uint64_t last_copy_ = 0;
  uint64_t clock_ = 0;
};

// Token ids that a sequence gets, without any scheduler: the "model" chains a hash over the tokens,
// and samples from the hash, the seed and the choice.
inline constexpr int32_t kVocabSize = 1000;
inline constexpr int32_t kEos = 2;
uint64_t NextHash(uint64_t hash, int32_t token);
int32_t SampleFrom(uint64_t hash, const SamplingParams& sampling, int position);
std::vector<int32_t> ExpectedTokens(const ScheduledRequest& request, uint32_t choice);
// Of `token` after the tokens that the hash is of.
PositionLogprobs LogprobsAfter(uint64_t hash, int32_t token);
std::vector<PositionLogprobs> ExpectedPromptLogprobs(const ScheduledRequest& request,
                                                     uint32_t choice);

// Drives a scheduler. Answers and step results come when the test asks for them. K and V are real
// in miniature: a step reads what its blocks hold, so a block in the wrong hands gives wrong
// tokens.
class FakeWorld {
 public:
  explicit FakeWorld(SchedulerConfig config, int num_host_slots = 0);

  Scheduler& scheduler() { return *scheduler_; }
  FakeCache& cache() { return *cache_; }
  const SchedulerConfig& config() const { return config_; }

  absl::Status Submit(ScheduledRequest request);
  // Prompt ids 100, 101, … unless given; ignore_eos, seed = id.
  uint64_t Submit(int prompt_len, int max_tokens, int num_choices = 1);
  uint64_t SubmitPrompt(std::vector<int32_t> prompt, int max_tokens);
  void Cancel(uint64_t id);

  // One call of the scheduler; queues its commands and plan. False: it asked for nothing.
  bool Schedule();
  // Answers the oldest command; false: there is none.
  bool AnswerOne();
  // Schedules and answers until nothing but plans is left.
  void Settle();
  // The oldest plan in flight runs.
  std::vector<SequenceToken> FinishPlan() { return FinishPlan(default_step_us); }
  std::vector<SequenceToken> FinishPlan(int64_t step_us);
  // Settle, and FinishPlan, until nothing is left to do. Fails the test after too many steps.
  void RunToEnd(int max_steps = 20000);

  // The rank group is lost, and all slots with it. What plans in flight write is garbage now. With
  // a first_bad_step its KV is not trusted: what that step and later ones wrote is garbage, too,
  // and the cache manager learns of it after the commands under way, or in the next session.
  void LoseGroup(std::optional<uint64_t> first_bad_step = {});
  // `num_unanswered` of the commands under way have been carried out all the same.
  void LoseCache(int num_unanswered = 0);
  void ResumeCache();                // REQUIRES: no plan in flight
  void ReplacePool(int num_blocks);  // REQUIRES: no plan in flight
  // Nothing is held any more by anybody.
  void ExpectAllBlocksBack();
  // Every sequence that was not cancelled or failed has got exactly its tokens, and with the first
  // one what it asks to know of its prompt.
  void ExpectAllTokens();

  const std::deque<StepPlan>& plans() const { return plans_; }  // in flight
  const std::deque<CacheCommand>& commands() const { return commands_; }
  const std::vector<int32_t>& tokens(uint64_t id, uint32_t choice = 0) {
    return tokens_[{id, choice}];
  }
  const std::vector<PositionLogprobs>& prompt_logprobs(uint64_t id, uint32_t choice = 0) {
    return prompt_logprobs_[{id, choice}];
  }
  const std::map<SequenceKey, int>& started() const { return started_; }  // with cached tokens
  const std::map<SequenceKey, absl::Status>& failed() const { return failed_; }
  bool ended(SequenceKey key) const { return ends_.contains(key); }
  uint64_t last_step() const { return last_step_; }  // of a plan
  SequenceKey OwnerOf(uint32_t slot) const { return slots_[slot].owner; }

  int64_t now_us = 0;
  int64_t default_step_us = 1000;
  std::optional<int32_t> forced_token;  // is sampled everywhere

 private:
  struct Slot {
    bool in_use = false;
    SequenceKey owner;
    SamplingParams sampling;
    std::vector<int> table = {};
    int num_planned = 0;  // position of the next row
    int num_tokens = 0;   // with those that plans in flight sample
    std::optional<int32_t> token = {};
  };

  // What one position of a block holds.
  struct Cell {
    uint64_t hash = 0;
    uint64_t step = 0;  // that wrote it
  };
  using Memory = std::vector<std::vector<Cell>>;  // a cell per position

  void Check(const StepPlan& plan);
  void CheckIsolated(const StepPlan& plan, uint64_t request);
  void CheckStep(const CommitRequest& request) const;
  void ScribbleOn(const StepPlan& plan);
  void SpoilSince(uint64_t first_bad_step);
  void CheckDrops(const CacheCommand& command);
  void Drop(int block);
  int32_t RunRow(const PlanRow& row, uint64_t step, std::vector<PromptRowLogprobs>* prompts);

  SchedulerConfig config_;
  const int num_host_slots_;
  std::unique_ptr<FakeCache> cache_;
  std::unique_ptr<Scheduler> scheduler_;
  bool cache_lost_ = false;
  std::deque<CacheCommand> commands_;
  std::deque<StepPlan> plans_;
  std::deque<std::set<int>> named_;  // blocks, by plan in flight
  std::vector<Slot> slots_;          // as after the last plan sent
  std::vector<Slot> executed_;       // as after the last plan finished
  Memory device_, host_;
  uint64_t last_step_ = 0;
  struct Distrust {
    size_t num_commands_before = 0;
    uint64_t first_step = 0;
  };
  std::deque<Distrust> distrusts_;  // under way
  std::optional<uint64_t> distrust_in_next_session_;
  // What the session holds, by the answers given to the scheduler and by what it gave up.
  std::map<int, int> held_;            // blocks, how often
  std::map<uint64_t, int> pin_block_;  // of entries that were pinned
  std::map<uint64_t, ScheduledRequest> requests_;
  std::set<uint64_t> cancelled_;
  std::map<SequenceKey, std::vector<int32_t>> tokens_;
  std::map<SequenceKey, std::vector<PositionLogprobs>> prompt_logprobs_;
  std::map<SequenceKey, SequenceEnd> ends_;
  std::map<SequenceKey, int> started_;
  std::map<SequenceKey, absl::Status> failed_;
  uint64_t last_id_ = 0;
};

std::vector<int32_t> Prompt(int length, int first = 100);  // first, first + 1, …
std::vector<int> RowLengths(const StepPlan& plan);
// Settles, and returns the only plan in flight.
StepPlan NextPlan(FakeWorld* world);

// Leaves the 3 blocks of Prompt(13) on the host alone. REQUIRES: a new world, blocks of 4 tokens.
void FillHostTier(FakeWorld* world);

// Of the commands that are not answered.
template <typename Command>
int Count(const FakeWorld& world) {
  return static_cast<int>(
      std::count_if(world.commands().begin(), world.commands().end(),
                    [](const auto& command) { return std::holds_alternative<Command>(command); }));
}

}  // namespace wintserve
