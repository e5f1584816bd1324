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

}  // namespace

GroupStartup::GroupStartup(const StartupConfig& config)
    : config_(config), max_model_len_(config.max_model_len), workers_(config.world_size) {}

absl::Status GroupStartup::OnHello(const WorkerHello& hello) {
  CHECK(hello.rank < workers_.size(), "rank={}", hello.rank);
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
    return Unfit(hello, fmt::format("runs {} tokens in a step, --max-num-batched-tokens {} and "
                                    "--max-model-len {} ask for {}",
                                    hello.max_tokens, config_.max_num_batched_tokens,
                                    max_model_len_, max_plan_tokens()));
  }
  workers_[hello.rank].hello = hello;
  return absl::OkStatus();
}

absl::Status GroupStartup::OnReady(uint32_t rank, const ReadyMessage& ready) {
  CHECK(rank < workers_.size(), "rank={}", rank);
  if (!pool_.has_value() || ready.group_epoch != config_.group_epoch ||
      ready.pool_epoch != pool_->pool_epoch) {
    return absl::InternalError(
        fmt::format("engine worker {} is ready for group epoch {:x} and pool epoch {:x}, which "
                    "it was not asked for",
                    rank, ready.group_epoch, ready.pool_epoch));
  }
  workers_[rank].ready = true;
  return absl::OkStatus();
}

bool GroupStartup::all_attached() const {
  return std::all_of(workers_.begin(), workers_.end(),
                     [](const Worker& worker) { return worker.hello.has_value(); });
}

bool GroupStartup::done() const {
  return std::all_of(workers_.begin(), workers_.end(),
                     [](const Worker& worker) { return worker.ready; });
}

std::string GroupStartup::WaitingFor() const {
  const auto attached = std::count_if(workers_.begin(), workers_.end(), [](const Worker& worker) {
    return worker.hello.has_value();
  });
  if (!all_attached()) {
    return fmt::format("waiting for engine workers: {} of {} connected", attached, workers_.size());
  }
  if (!cache_connected_) return "waiting for the cache manager";
  if (!pool_.has_value()) return "waiting for the cache manager to create the KV pool";
  for (size_t rank = 0; rank < workers_.size(); ++rank) {
    if (!workers_[rank].ready) return fmt::format("engine worker {} is warming up", rank);
  }
  return "";
}

ConfigureWorker GroupStartup::configuration() const {
  CHECK(all_attached());
  return {.group_epoch = config_.group_epoch,
          .world_size = config_.world_size,
          .max_slots = static_cast<uint32_t>(config_.max_num_seqs),
          .max_tokens = max_plan_tokens(),
          .max_sequence_tokens = static_cast<uint32_t>(max_model_len_),
          .sampled_vocab_size = static_cast<uint32_t>(sampled_vocab_size())};
}

absl::StatusOr<PoolSpec> GroupStartup::pool_spec() const {
  CHECK(all_attached());
  PoolSpec spec;
  std::vector<uint64_t> available_bytes_by_rank;
  spec.kv_layout_digest = workers_[0].hello->kv_layout_digest;
  for (const Worker& worker : workers_) {
    spec.block_bytes_by_rank.push_back(worker.hello->kv_block_bytes);
    available_bytes_by_rank.push_back(worker.hello->kv_bytes_available);
  }
  ASSIGN_OR_RETURN(spec.num_blocks,
                   DecideNumBlocks({.max_num_seqs = config_.max_num_seqs,
                                    .max_model_len = max_model_len_,
                                    .block_size_tokens = config_.block_size_tokens,
                                    .block_bytes_by_rank = spec.block_bytes_by_rank,
                                    .available_bytes_by_rank = available_bytes_by_rank,
                                    .num_blocks_override = config_.num_blocks_override}));
  return spec;
}

AttachPool GroupStartup::attach_pool() const {
  CHECK(pool_.has_value());
  return {pool_->pool_epoch, pool_->memory_socket, pool_->num_blocks};
}

uint64_t GroupStartup::block_bytes() const {
  CHECK(all_attached());
  uint64_t bytes = 0;
  for (const Worker& worker : workers_) bytes += worker.hello->kv_block_bytes;
  return bytes;
}

int GroupStartup::vocab_size() const {
  CHECK(all_attached());
  return static_cast<int>(workers_[0].hello->vocab_size);
}

int GroupStartup::sampled_vocab_size() const {
  return std::min(vocab_size(), config_.tokenizer_vocab_size);
}

// A prompt is run whole, whatever the row budget says.
uint32_t GroupStartup::max_plan_tokens() const {
  return static_cast<uint32_t>(std::max(config_.max_num_batched_tokens, max_model_len_));
}

}  // namespace wintserve
