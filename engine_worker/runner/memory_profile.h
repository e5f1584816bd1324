// What the memory of one rank's GPU goes to, and whether that leaves enough for its KV pool.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace wintserve {

// In bytes.
struct MemoryProfile {
  int64_t total = 0;       // of the device
  double utilization = 1;  // --gpu-memory-utilization: the share of it that may be used
  int64_t other = 0;       // taken before the model: the driver's context, other processes
  int64_t weights = 0;
  int64_t workspace = 0;  // activations between the operators of the largest step
  int64_t scratch = 0;    // what that step's operators took for themselves
  int64_t graphs = 0;     // kept for CUDA graphs
  int64_t group = 0;      // kept for what ranks share, once they have joined their group

  int64_t allowed() const { return static_cast<int64_t>(static_cast<double>(total) * utilization); }
  int64_t taken() const { return other + weights + workspace + scratch + graphs + group; }
};

// What the pool has to hold.
struct KvDemand {
  int64_t block_bytes = 0;
  int64_t max_model_len = 0;  // tokens of one sequence, the least that a pool serves
  int block_size_tokens = 64;
  std::optional<int64_t> num_blocks_override = {};  // --num-gpu-blocks-override
  bool has_8_bit_cache = false;                     // --kv-cache-dtype int8 already
};

// What is left for KV blocks: of the allowed share or, with an override, which replaces that rule,
// of all. May be negative.
int64_t KvBytes(const MemoryProfile& profile, const KvDemand& demand);

// RESOURCE_EXHAUSTED: the weights alone do not fit; says by how much and what to change.
absl::Status CheckWeightsFit(const MemoryProfile& profile);

// RESOURCE_EXHAUSTED: what is left for KV blocks is less than the demand; says by how much and what
// to change.
absl::Status CheckKvFits(const MemoryProfile& profile, const KvDemand& demand);

// Of the pass that measures what steps take: RESOURCE_EXHAUSTED becomes one that says what is taken
// already and which flags make steps smaller; anything else stays as it is.
absl::Status ExplainStepsThatDoNotFit(const absl::Status& measured, const MemoryProfile& profile);

// A line for each part, for the log.
std::vector<std::string> DescribeMemory(const MemoryProfile& profile, const KvDemand& demand);

}  // namespace wintserve
