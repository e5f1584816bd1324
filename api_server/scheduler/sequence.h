// One choice of one request on its way through the scheduler.
#pragma once

#include <compare>
#include <cstdint>
#include <memory>
#include <vector>

#include "api_server/scheduler/plan.h"

namespace wintserve {

struct SequenceKey {
  uint64_t request = 0;
  uint32_t choice = 0;
  auto operator<=>(const SequenceKey&) const = default;
};

// A block of the KV pool at one generation, as the cache manager leased it.
struct LeasedBlock {
  BlockId id = BlockId{0};
  uint32_t generation = 0;
};

// WAITING -> PREFILL -> DECODE -> FINISHED. A cancelled sequence goes to FINISHED from anywhere.
enum class SequenceState {
  kWaiting,   // in the queue: neither slot nor blocks
  kPrefill,   // owns a slot and its blocks; its prompt has not been planned, or is in flight
  kDecode,    // has at least one sampled token; that one waits in the slot
  kFinished,  // gets no more rows; goes away once no plan in flight mentions it
};

struct Sequence {
  SequenceKey key;
  SequenceState state = SequenceState::kWaiting;
  std::shared_ptr<const std::vector<int32_t>> prompt_ids;  // shared by the choices of a request
  SamplingParams sampling;
  int max_tokens = 0;
  int num_sampled = 0;
  uint32_t slot = 0;                // in kPrefill and later
  bool slot_initialised = false;    // a plan with its SlotInit has been made
  bool in_flight = false;           // the plan in flight has a row of it
  std::vector<LeasedBlock> blocks;  // in sequence order

  int prompt_len() const { return static_cast<int>(prompt_ids->size()); }
  // Tokens whose K and V are ever written. The last sampled token is not among them: nothing
  // follows it.
  int max_computed_tokens() const { return prompt_len() + max_tokens - 1; }
};

}  // namespace wintserve
