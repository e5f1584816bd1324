// What the Hellos of the engine workers say together: whether they fit the configuration, what a
// group of them is told, what pool they need.
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
  bool chunked_prefill = true;  // false: a plan may hold a whole prompt
  int block_size_tokens = 64;
  int tokenizer_vocab_size = 0;
  std::vector<int32_t> stop_ids = {};
  std::string model_digest = {};  // of what the workers' digests leave out; see PoolSpec::root_seed
  uint64_t host_bytes = 0;        // of the cache's host tier over all ranks
  std::optional<int> num_blocks_override = {};
};

// Pure; of the engine's thread. Who of them is there, and when, is GroupLifecycle's affair. Errors
// end the instance: they are one line for the operator.
class GroupStartup {
 public:
  explicit GroupStartup(const StartupConfig& config);

  // Of a rank's first process, or of one that has replaced it: in a pool that is created anew it
  // then gets as much as the first one had to give, which had no pool beside it.
  // INVALID_ARGUMENT: the worker cannot serve this configuration, or has another model than the
  // process before it.
  absl::Status OnHello(const WorkerHello& hello);

  // REQUIRES: every rank has said Hello, from here on.
  ConfigureWorker configuration(uint64_t group_epoch) const;
  // What a pool is made for, without its size.
  PoolSpec pool_layout() const;
  // Of a new pool, in the memory that the workers have found.
  absl::StatusOr<PoolSpec> pool_spec() const;
  uint64_t block_bytes() const;          // over all ranks
  uint64_t largest_block_bytes() const;  // of one rank
  int max_model_len() const { return max_model_len_; }
  int vocab_size() const;          // ids that the model has an embedding for
  int sampled_vocab_size() const;  // ids that may be sampled

 private:
  bool every_hello_has_come() const;
  uint32_t max_plan_tokens() const;
  std::string root_seed() const;

  const StartupConfig config_;
  int max_model_len_;
  std::vector<std::optional<WorkerHello>> hellos_;  // by rank
};

}  // namespace wintserve
