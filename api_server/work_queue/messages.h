// What the two ends of the step protocol say to each other beside plans, as plain structs. They
// mirror proto/work_queue.proto, which says what each field means.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "api_server/scheduler/plan.h"

namespace wintserve {

// XXH3-64 of the ids that one step sampled, in row order. Never 0, which stands for "not computed".
uint64_t SampledDigest(std::span<const int32_t> ids);

struct WorkerHello {
  uint64_t worker_id = 0;
  uint32_t rank = 0;
  uint32_t world_size = 1;
  std::string backend = "cpu";
  uint64_t weights_digest = 0;
  uint64_t kv_layout_digest = 0;
  uint64_t kv_block_bytes = 0;
  uint64_t kv_bytes_available = 0;
  uint32_t max_slots = 0;
  uint32_t max_tokens = 0;
  uint32_t vocab_size = 0;
  uint32_t num_layers = 0;
  uint32_t max_position = 0;
  uint32_t block_size_tokens = 64;
  uint64_t mapped_pool_epoch = 0;  // 0: it maps none
};

struct ConfigureWorker {
  uint64_t group_epoch = 0;
  uint32_t world_size = 1;
  uint32_t max_slots = 0;
  uint32_t max_tokens = 0;
  uint32_t max_sequence_tokens = 0;
  uint32_t sampled_vocab_size = 0;
  std::vector<int32_t> stop_ids = {};
};

struct AttachPool {
  uint64_t pool_epoch = 0;
  std::string memory_socket;
  uint32_t num_blocks = 0;
  uint32_t num_host_slots = 0;
};

struct DetachPool {
  uint64_t pool_epoch = 0;
};

struct PoolDetachedMessage {
  uint64_t pool_epoch = 0;
};

// plan_hash: XXH3-64 of the plan's bytes as received.
struct ReceivedPlan {
  StepPlan plan;
  uint64_t plan_hash = 0;
};

struct AbortGroup {
  uint64_t group_epoch = 0;  // not 0
  std::string reason = {};
};

struct AbortedMessage {
  uint64_t group_epoch = 0;  // not 0; as in the AbortGroup that it answers
};

struct ShutdownWorker {};

using ServerEvent =
    std::variant<ConfigureWorker, AttachPool, DetachPool, ReceivedPlan, AbortGroup, ShutdownWorker>;

enum class FaultKind { kCheckpoint, kOutOfMemory, kCollective, kDevice, kInternal };

struct ReadyMessage {
  uint64_t group_epoch = 0;
  uint64_t pool_epoch = 0;
};

struct HeartbeatMessage {
  uint64_t step_started = 0;  // 0 before the first step
  uint64_t step_done = 0;
  uint64_t resident_bytes = 0;
  uint64_t progress = 0;  // changes while the rank gets further on its way to Ready
};

struct FaultMessage {
  FaultKind kind = FaultKind::kInternal;
  std::string text;
  bool kv_trusted = false;
};

}  // namespace wintserve
