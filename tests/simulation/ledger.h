// Who holds which KV block, kept independently of scheduler and cache manager from what passes
// between them, and checked against every plan: I3, I4 and I5.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "api_server/scheduler/scheduler.h"
#include "tests/simulation/cache_process.h"
#include "tests/simulation/config.h"
#include "tests/simulation/reference.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {

class Ledger {
 public:
  Ledger(const SimulationConfig& config, const References* references, Report* report);

  // What the scheduler wants sent. `has_session`: as the scheduler was told.
  void OnCommand(const CacheCommand& command, bool has_session);
  // Before the scheduler gets it.
  void OnReply(const CacheReply& reply);
  void OnSessionLost();
  void OnSessionResumed(const HeldBlocks& held);
  void OnPoolReplaced(int num_blocks);
  // Nobody holds anything any more, but plans in flight may run on.
  void OnServerLost();

  void OnPlan(const StepPlan& plan);
  void OnPlanDone(uint64_t step);
  // Every rank of the group is fenced.
  void OnGroupLost(bool kv_trusted);

  // Nobody holds anything but the scheduler, which has `num_leased_ahead` blocks in stock.
  void CheckQuiescent(int num_leased_ahead) const;

  // The command that `matched` answers.
  const MatchCommand* FindMatch(uint64_t tag) const;

 private:
  struct Block {
    uint32_t generation = 0;
    bool leased = false;      // to the session; a committing block still is
    bool committing = false;  // its Commit has not been answered
    // Its Commit was not answered before the session broke, so it may be an entry's by now: others
    // can match it, and it is committed again.
    bool uncertain = false;
    uint64_t entry = 0;  // pinned under it; 0: not pinned
    // Of a leased block: whom a plan gave it to, and how much of it is written on every rank.
    const ReferenceSequence* owner = nullptr;
    size_t index = 0;  // in the owner's block table
    size_t acknowledged_tokens = 0;
  };

  struct Entry {
    std::optional<int32_t> block;  // unknown: it has only been a duplicate so far
    int pins = 0;
    std::string salt;
    size_t depth = 0;      // blocks from the root up to it
    uint64_t history = 0;  // of its chain
  };

  struct Slot {
    const ReferenceSequence* sequence = nullptr;
    std::vector<PoolBlock> table;
  };

  struct Copy {
    CopyOrder order;
    uint64_t step = 0;  // of the plan that holds it; 0: none yet
    bool done = false;
    bool is_reported = false;  // by a CopyDone, which is not answered
    bool cancelled = false;    // by a Reconcile
  };

  struct Written {
    PoolBlock block;
    size_t num_tokens = 0;  // of the block, from its first
  };

  struct InFlight {
    uint64_t step = 0;
    std::set<std::pair<int32_t, SequenceKey>> rows;  // block, in whose table
    std::set<int32_t> copies;                        // blocks
    std::vector<Written> written;
  };

  void OnCommit(const CommitCommand& command);
  void OnRelease(const ReleaseCommand& command);
  void OnReturn(const ReturnCommand& command);
  void OnCopyDone(const CopyDoneCommand& command);
  void OnMatched(const Matched& matched);
  void OnLeased(const Leased& leased);
  void OnCommitted(const Committed& committed);
  void AddCopy(const CopyOrder& order);
  void Pin(const PinnedBlock& pinned, const Entry& content);
  Entry* CheckContent(uint64_t entry, const Entry& content);

  void PlanCopy(const BlockCopy& copy, InFlight* flight);
  void GiveBlocks(uint32_t slot, const std::vector<BlockId>& blocks);
  void CheckRow(const PlanRow& row, InFlight* flight);
  void CheckHeld(const Slot& slot, size_t index, size_t end_position) const;
  void CheckPinCounts(const InFlight& flight) const;
  void ReleaseSlot(uint32_t slot);

  // Sequences whose table names the block in a plan that is not acknowledged.
  size_t NumReaders(int32_t block) const;
  bool IsInFlight(int32_t block) const;
  bool IsValid(const PoolBlock& block) const;

  const size_t block_size_;
  const References& references_;
  Report& report_;

  std::vector<Block> blocks_;
  std::map<uint64_t, Entry> entries_;
  std::map<uint64_t, Copy> copies_;
  std::map<uint64_t, MatchCommand> matches_;  // unanswered
  std::map<uint64_t, CommitCommand> commits_;
  std::set<uint64_t> leases_;
  std::map<uint32_t, Slot> slots_;
  std::deque<InFlight> in_flight_;
};

}  // namespace wintserve::simulation
