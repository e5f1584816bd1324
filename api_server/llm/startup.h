// From the first Hello to a group that can run plans: what has come, what is missing, what follows.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "api_server/work_queue/messages.h"
#include "cache_manager/client/cache_client.h"

namespace wintserve {

struct StartupConfig {
  uint32_t world_size = 1;
  int max_model_len = 0;  // lowered to what the model was made for
  int max_num_seqs = 0;
  int max_num_batched_tokens = 0;
  int block_size_tokens = 64;
  int tokenizer_vocab_size = 0;
  std::optional<int> num_blocks_override = {};
  uint64_t group_epoch = 0;  // not 0
};

// A pure state machine of the engine's thread. Order: every worker's Hello, Configure to all; then
// the cache manager's pool; then AttachPool to all; then every worker's Ready.
// Errors end the start-up: they are one line for the operator.
class GroupStartup {
 public:
  explicit GroupStartup(const StartupConfig& config);

  // INVALID_ARGUMENT: the worker cannot serve this configuration.
  absl::Status OnHello(const WorkerHello& hello);
  void OnCacheConnected() { cache_connected_ = true; }
  void OnPoolOpened(const OpenedPool& pool) { pool_ = pool; }
  // INTERNAL: of another epoch.
  absl::Status OnReady(uint32_t rank, const ReadyMessage& ready);

  bool all_attached() const;
  // All workers are attached and the cache manager is there: the pool can be opened.
  bool can_open_pool() const { return all_attached() && cache_connected_; }
  bool done() const;
  // "waiting for engine workers: 1 of 2 connected"; empty when done.
  std::string WaitingFor() const;

  // REQUIRES: all_attached().
  ConfigureWorker configuration() const;
  absl::StatusOr<PoolSpec> pool_spec() const;
  // REQUIRES: OnPoolOpened.
  AttachPool attach_pool() const;

  uint64_t block_bytes() const;  // over all ranks
  int max_model_len() const { return max_model_len_; }
  int vocab_size() const;          // ids that the model has an embedding for
  int sampled_vocab_size() const;  // ids that may be sampled
  uint64_t group_epoch() const { return config_.group_epoch; }
  const std::optional<OpenedPool>& pool() const { return pool_; }

 private:
  struct Worker {
    std::optional<WorkerHello> hello;
    bool ready = false;
  };

  uint32_t max_plan_tokens() const;

  const StartupConfig config_;
  int max_model_len_;
  std::vector<Worker> workers_;  // by rank
  bool cache_connected_ = false;
  std::optional<OpenedPool> pool_;
};

}  // namespace wintserve
