// A simulated worker: executes plans in order, checks each of them as strictly as a real one does,
// and checks what a real one cannot: that the KV memory it reads holds the right sequence.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "api_server/scheduler/plan.h"
#include "tests/simulation/config.h"
#include "tests/simulation/reference.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {

struct RankResult {
  std::vector<SampledToken> sampled;
  std::vector<PromptRowLogprobs> prompt_logprobs;
  uint64_t sampled_digest = 0;
  uint64_t plan_digest = 0;  // of all plans of the group so far
};

// One rank's part of a KV pool, and of its host tier. It is the cache manager's, and so outlives
// the processes that map it.
class RankMemory {
 public:
  // K and V of one token. `history` stands for its content, which depends on all tokens up to it.
  struct Cell {
    uint32_t position = 0;
    int32_t token = -1;
    uint64_t history = 0;
    uint64_t step = 0;  // that wrote it last
  };
  using Block = std::vector<Cell>;

  // Holds garbage.
  RankMemory(const SimulationConfig& config, uint64_t pool_epoch, int num_blocks);

  // What that step and later ones wrote was wrong.
  void SpoilSince(uint64_t first_step);

  std::vector<Block> blocks;
  std::vector<Block> host_slots;
};

// Everything that a worker process would lose by dying is in here, so a new object is a new
// process.
class SimulatedRank {
 public:
  SimulatedRank(const SimulationConfig& config, int rank, const References* references,
                Report* report);

  // Maps a pool: no slot is in use. `memory` outlives its use.
  void AttachPool(uint64_t pool_epoch, RankMemory* memory);
  // A new rank group: no slot is in use, the first plan may have any number.
  void JoinGroup();

  // The whole plan at once. What is wrong with it goes to the report.
  RankResult Execute(const StepPlan& plan);
  // Wrong content to wherever the plan writes.
  void Scribble(const StepPlan& plan);
  std::optional<uint64_t> last_executed() const { return last_executed_; }  // of any group

 private:
  using Cell = RankMemory::Cell;
  using Block = RankMemory::Block;

  struct Slot {
    bool in_use = false;
    const ReferenceSequence* sequence = nullptr;
    SamplingParams sampling;
    std::vector<int32_t> table;
    std::optional<uint32_t> next_position;  // unknown until the first row
    std::optional<int32_t> last_token;      // sampled, not yet computed
    // Tokens that penalties count: with the slot's first ones, then what is sampled.
    size_t num_counted = 0;
  };

  void RunCopy(const BlockCopy& copy, uint64_t step);
  void Init(const SlotInit& init);
  void InitCounts(const SlotInit& init, Slot* slot);
  void Append(uint32_t slot, const std::vector<BlockId>& blocks);
  bool CheckRow(const PlanRow& row) const;
  void CheckPromptRow(const PlanRow& row) const;
  // Reads what attention would read: all positions before the row's.
  bool CheckMemory(const Slot& slot, uint32_t position) const;
  void RunRow(const PlanRow& row, uint64_t step, RankResult* result);
  PromptRowLogprobs ReadPromptLogprobs(const PlanRow& row) const;
  void Release(uint32_t slot);
  bool InUse(const char* where, uint32_t slot) const;
  Cell& CellAt(const Slot& slot, uint32_t position);
  const Cell& CellAt(const Slot& slot, uint32_t position) const;

  const SimulationConfig& config_;
  const int rank_;
  const References& references_;
  Report& report_;
  const uint32_t block_size_;

  uint64_t pool_epoch_ = 0;
  std::optional<uint64_t> last_step_;  // of the group
  std::optional<uint64_t> last_executed_;
  uint64_t plan_digest_ = 0;
  std::vector<Slot> slots_;
  RankMemory* memory_ = nullptr;
};

}  // namespace wintserve::simulation
