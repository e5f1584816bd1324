#include "api_server/llm/startup.h"

#include <fmt/core.h>

#include <algorithm>

#include "api_server/llm/pool_sizing.h"
#include "common/check.h"
#include "common/log.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

absl::Status Unfit(const WorkerHello& hello, const std::string& what) {
  return absl::InvalidArgumentError(fmt::format("engine worker {}: {}", hello.rank, what));
}

// The pool, its index and the sequences under way are of the first one's model.
absl::Status CheckSameModel(const WorkerHello& hello, const WorkerHello& before) {
  const struct {
    const char* name;
    uint64_t now;
    uint64_t before;
  } facts[] = {{"weights_digest", hello.weights_digest, before.weights_digest},
               {"kv_layout_digest", hello.kv_layout_digest, before.kv_layout_digest},
               {"kv_block_bytes", hello.kv_block_bytes, before.kv_block_bytes},
               {"vocab_size", hello.vocab_size, before.vocab_size},
               {"max_position", hello.max_position, before.max_position}};
  for (const auto& fact : facts) {
    if (fact.now == fact.before) continue;
    return Unfit(hello, fmt::format("came back with another model than it had before: {} {:x}, it "
                                    "was {:x}",
                                    fact.name, fact.now, fact.before));
  }
  return absl::OkStatus();
}

}  // namespace

GroupStartup::GroupStartup(const StartupConfig& config)
    : config_(config), max_model_len_(config.max_model_len), hellos_(config.world_size) {}

absl::Status GroupStartup::OnHello(const WorkerHello& hello) {
  CHECK(hello.rank < hellos_.size(), "rank={}", hello.rank);
  if (hello.vocab_size == 0 || hello.max_position < 2 || hello.kv_block_bytes == 0) {
    return Unfit(hello,
                 fmt::format("vocab_size {}, max_position {}, kv_block_bytes {}: none may be "
                             "0, and a sequence has at least 2 tokens",
                             hello.vocab_size, hello.max_position, hello.kv_block_bytes));
  }
  if (hello.block_size_tokens != static_cast<uint32_t>(config_.block_size_tokens)) {
    return Unfit(hello, fmt::format("its KV blocks hold {} tokens, --block-size is {}",
                                    hello.block_size_tokens, config_.block_size_tokens));
  }
  if (max_model_len_ > static_cast<int>(hello.max_position)) {
    LOG_WARNING("--max-model-len {} is more than the model's {} positions: lowered to {}",
                max_model_len_, hello.max_position, hello.max_position);
    max_model_len_ = static_cast<int>(hello.max_position);
  }
  if (hello.max_slots < static_cast<uint32_t>(config_.max_num_seqs)) {
    return Unfit(hello, fmt::format("holds {} sequences, --max-num-seqs is {}", hello.max_slots,
                                    config_.max_num_seqs));
  }
  if (hello.max_tokens < max_plan_tokens()) {
    const std::string cause =
        config_.chunked_prefill
            ? fmt::format("--max-num-batched-tokens {} asks", config_.max_num_batched_tokens)
            : fmt::format(
                  "without chunked prefill, --max-num-batched-tokens {} and "
                  "--max-model-len {} ask",
                  config_.max_num_batched_tokens, max_model_len_);
    return Unfit(hello, fmt::format("runs {} tokens in a step, {} for {}", hello.max_tokens, cause,
                                    max_plan_tokens()));
  }
  std::optional<WorkerHello>& known = hellos_[hello.rank];
  if (known.has_value()) RETURN_IF_ERROR(CheckSameModel(hello, *known));
  const uint64_t first_available = known.has_value() ? known->kv_bytes_available : 0;
  known = hello;
  known->kv_bytes_available = std::max(known->kv_bytes_available, first_available);
  return absl::OkStatus();
}

bool GroupStartup::every_hello_has_come() const {
  return std::all_of(hellos_.begin(), hellos_.end(),
                     [](const auto& hello) { return hello.has_value(); });
}

ConfigureWorker GroupStartup::configuration(uint64_t group_epoch) const {
  CHECK(every_hello_has_come());
  ConfigureWorker configure{.group_epoch = group_epoch,
                            .world_size = config_.world_size,
                            .max_slots = static_cast<uint32_t>(config_.max_num_seqs),
                            .max_tokens = max_plan_tokens(),
                            .max_sequence_tokens = static_cast<uint32_t>(max_model_len_),
                            .sampled_vocab_size = static_cast<uint32_t>(sampled_vocab_size())};
  for (const int32_t id : config_.stop_ids) {
    if (id >= 0 && id < sampled_vocab_size()) configure.stop_ids.push_back(id);
  }
  return configure;
}

PoolSpec GroupStartup::pool_layout() const {
  CHECK(every_hello_has_come());
  PoolSpec spec;
  spec.root_seed = root_seed();
  spec.host_bytes = config_.host_bytes;
  spec.block_size_tokens = config_.block_size_tokens;
  for (const auto& hello : hellos_) spec.block_bytes_by_rank.push_back(hello->kv_block_bytes);
  return spec;
}

absl::StatusOr<PoolSpec> GroupStartup::pool_spec() const {
  PoolSpec spec = pool_layout();
  std::vector<uint64_t> available_bytes_by_rank;
  for (const auto& hello : hellos_) available_bytes_by_rank.push_back(hello->kv_bytes_available);
  ASSIGN_OR_RETURN(spec.num_blocks,
                   DecideNumBlocks({.max_num_seqs = config_.max_num_seqs,
                                    .max_model_len = max_model_len_,
                                    .block_size_tokens = config_.block_size_tokens,
                                    .ranks_share_memory = hellos_[0]->backend == "cpu",
                                    .block_bytes_by_rank = spec.block_bytes_by_rank,
                                    .available_bytes_by_rank = available_bytes_by_rank,
                                    .num_blocks_override = config_.num_blocks_override}));
  return spec;
}

std::string GroupStartup::root_seed() const {
  return fmt::format("weights={:016x} kv_layout={:016x} block_tokens={} ranks={} model={}",
                     hellos_[0]->weights_digest, hellos_[0]->kv_layout_digest,
                     config_.block_size_tokens, config_.world_size, config_.model_digest);
}

uint64_t GroupStartup::block_bytes() const {
  CHECK(every_hello_has_come());
  uint64_t bytes = 0;
  for (const auto& hello : hellos_) bytes += hello->kv_block_bytes;
  return bytes;
}

uint64_t GroupStartup::largest_block_bytes() const {
  CHECK(every_hello_has_come());
  uint64_t bytes = 0;
  for (const auto& hello : hellos_) bytes = std::max(bytes, hello->kv_block_bytes);
  return bytes;
}

int GroupStartup::vocab_size() const {
  CHECK(every_hello_has_come());
  return static_cast<int>(hellos_[0]->vocab_size);
}

int GroupStartup::sampled_vocab_size() const {
  return std::min(vocab_size(), config_.tokenizer_vocab_size);
}

uint32_t GroupStartup::max_plan_tokens() const {
  const int whole_prompt = config_.chunked_prefill ? 0 : max_model_len_;
  return static_cast<uint32_t>(std::max(config_.max_num_batched_tokens, whole_prompt));
}

}  // namespace wintserve
