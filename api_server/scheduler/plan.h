// The plain structs of the step protocol: what the scheduler decides and what comes back. They
// mirror proto/work_queue.proto, which says what each field means.
#pragma once

#include <cstdint>
#include <vector>

namespace wintserve {

enum class BlockId : int32_t {};  // of the KV pool: not a slot, not a request

struct SamplingParams {
  float temperature = 1.0f;  // 0 is greedy
  float top_p = 1.0f;        // (0, 1]; a request's 0 has become temperature 0 before it gets here
  int32_t top_k = 0;         // 0 keeps all
  int64_t seed = 0;
  uint32_t choice_index = 0;
  uint32_t first_stop_position = 0;  // a token sampled for an earlier position is no stop id
};

struct SlotInit {
  uint32_t slot = 0;
  SamplingParams sampling;
  std::vector<BlockId> block_table = {};
};

struct BlockAppend {
  uint32_t slot = 0;
  std::vector<BlockId> blocks = {};
};

// A run of consecutive tokens of one slot. Empty `tokens` with length 1: the token last sampled
// there.
struct PlanRow {
  uint32_t slot = 0;
  uint32_t position = 0;
  uint32_t length = 0;
  bool sample = false;
  std::vector<int32_t> tokens = {};  // `length` ids, or empty (see above)
};

// One block's bytes between the pool and the host tier.
struct BlockCopy {
  bool to_device = false;
  BlockId block = BlockId{0};
  uint32_t host_slot = 0;
};

// Copies run first, then slot_init and block_append apply, then the rows run, then slot_release.
struct StepPlan {
  uint64_t group_epoch = 0;
  uint64_t pool_epoch = 0;
  uint64_t step = 0;
  uint64_t previous_plan_hash = 0;
  std::vector<SlotInit> slot_init = {};
  std::vector<BlockAppend> block_append = {};
  std::vector<PlanRow> rows = {};
  std::vector<uint32_t> slot_release = {};
  std::vector<BlockCopy> copies = {};
};

struct SampledToken {
  uint32_t slot = 0;
  int32_t token = 0;
};

struct StepDone {
  uint64_t group_epoch = 0;
  uint64_t step = 0;
  uint64_t plan_hash = 0;
  uint32_t execute_us = 0;
  std::vector<SampledToken> sampled = {};  // rank 0 only
  uint64_t sampled_digest = 0;
};

}  // namespace wintserve
