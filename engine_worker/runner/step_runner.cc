#include "engine_worker/runner/step_runner.h"

#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// Enough rows for matrix products to run at full speed; more would only grow the model's scratch.
constexpr int kMaxBatchTokens = 512;

SlotLimits LimitsOf(const StepRunnerConfig& config, const Model& model) {
  return {.max_slots = config.max_slots,
          .max_tokens = config.max_tokens,
          .max_sequence_tokens = config.max_sequence_tokens,
          .num_blocks = config.num_blocks,
          .block_size_tokens = config.block_size_tokens,
          .vocab_size = model.vocab_size()};
}

absl::Status CheckRange(const char* name, int64_t value, int64_t maximum) {
  if (value >= 1 && value <= maximum) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("{} is {}, this worker can do 1 … {}", name, value, maximum));
}

StepRunnerConfig WithSortedStopIds(StepRunnerConfig config) {
  std::vector<int32_t>& ids = config.stop_ids;
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return config;
}

}  // namespace

absl::StatusOr<std::unique_ptr<StepRunner>> StepRunner::Create(const StepRunnerConfig& config,
                                                               Model* model, Collective* collective,
                                                               void* kv_pool, void* host_tier) {
  constexpr int64_t kMaxSlots = 1 << 16;
  constexpr int64_t kMaxInt = INT32_MAX;
  RETURN_IF_ERROR(CheckRange("max_slots", config.max_slots, kMaxSlots));
  RETURN_IF_ERROR(CheckRange("max_tokens", config.max_tokens, kMaxInt));
  RETURN_IF_ERROR(
      CheckRange("max_sequence_tokens", config.max_sequence_tokens, model->max_position()));
  RETURN_IF_ERROR(CheckRange("sampled_vocab_size", config.sampled_vocab_size, model->vocab_size()));
  RETURN_IF_ERROR(CheckRange("num_blocks", config.num_blocks, kMaxInt));
  for (const int32_t id : config.stop_ids) {
    if (id >= 0 && id < model->vocab_size()) continue;
    return absl::InvalidArgumentError(
        fmt::format("stop_ids holds {}, this model has ids 0 … {}", id, model->vocab_size() - 1));
  }
  CHECK(config.block_size_tokens > 0 && model->max_batch_tokens() > 0);
  return std::unique_ptr<StepRunner>(
      new StepRunner(WithSortedStopIds(config), model, collective, kv_pool, host_tier));
}

StepRunner::StepRunner(const StepRunnerConfig& config, Model* model, Collective* collective,
                       void* kv_pool, void* host_tier)
    : config_(config),
      model_(model),
      collective_(collective),
      kv_pool_(kv_pool),
      batch_tokens_(std::min(kMaxBatchTokens, model->max_batch_tokens())),
      copier_({.pool = kv_pool,
               .num_blocks = config.num_blocks,
               .host_tier = host_tier,
               .num_host_slots = config.num_host_slots,
               .block_bytes = model->kv_block_bytes()}),
      slots_(LimitsOf(config, *model)),
      chain_(config.chain) {
  batch_.tokens.reserve(batch_tokens_);
}

absl::Status StepRunner::WarmUp() {
  CHECK(chain_.step == config_.chain.step, "a warm-up after step {}", chain_.step);
  const int32_t block = 0;
  Batch batch;
  batch.tokens = {0};
  batch.rows = {{.position = 0, .length = 1, .block_table = {&block, 1}, .want_logits = true}};
  RETURN_IF_ERROR(model_->Forward(batch, kv_pool_).status());
  sampled_ids_.assign(1, 0);
  return ShareSampledIds(1);
}

absl::StatusOr<StepDone> StepRunner::Apply(const StepPlan& plan, uint64_t plan_hash) {
  const auto begin = std::chrono::steady_clock::now();
  RETURN_IF_ERROR(CheckChain(plan));
  RETURN_IF_ERROR(copier_.Check(plan.copies));
  RETURN_IF_ERROR(slots_.BeginStep(plan));
  copier_.Run(plan.copies);
  RETURN_IF_ERROR(RunRows(plan));
  slots_.FinishStep(plan, sampled_ids_);
  chain_ = {.step = plan.step, .plan_hash = plan_hash};

  StepDone done = {.group_epoch = plan.group_epoch, .step = plan.step, .plan_hash = plan_hash};
  done.sampled_digest =
      XXH3_64bits(sampled_ids_.data(), sampled_ids_.size() * sizeof(sampled_ids_[0]));
  if (collective_->rank() == 0) {
    done.sampled.reserve(sampled_ids_.size());
    for (const PlanRow& row : plan.rows) {
      if (row.sample) done.sampled.push_back({row.slot, sampled_ids_[done.sampled.size()]});
    }
  }
  done.execute_us = static_cast<uint32_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                              std::chrono::steady_clock::now() - begin)
                                              .count());
  return done;
}

absl::Status StepRunner::CheckChain(const StepPlan& plan) const {
  if (plan.group_epoch != config_.group_epoch) {
    return absl::FailedPreconditionError(fmt::format("plan of group epoch {:x}, this group is {:x}",
                                                     plan.group_epoch, config_.group_epoch));
  }
  if (plan.pool_epoch != config_.pool_epoch) {
    return absl::FailedPreconditionError(fmt::format(
        "plan of pool epoch {:x}, the mapped pool is {:x}", plan.pool_epoch, config_.pool_epoch));
  }
  if (plan.step != chain_.step + 1) {
    return absl::FailedPreconditionError(
        fmt::format("plan of step {} after step {}", plan.step, chain_.step));
  }
  if (plan.previous_plan_hash != chain_.plan_hash) {
    return absl::FailedPreconditionError(
        fmt::format("step {} follows a plan with hash {:x}, this rank executed one with {:x}",
                    plan.step, plan.previous_plan_hash, chain_.plan_hash));
  }
  return absl::OkStatus();
}

absl::Status StepRunner::RunRows(const StepPlan& plan) {
  sampled_ids_.clear();
  size_t num_sampled = 0;
  for (const PlanRow& row : plan.rows) {
    num_sampled += row.sample ? 1 : 0;
    for (uint32_t offset = 0; offset < row.length;) {
      const size_t free_tokens = batch_tokens_ - batch_.tokens.size();
      const auto length = static_cast<uint32_t>(std::min<size_t>(row.length - offset, free_tokens));
      AddToBatch(row, offset, length);
      offset += length;
      if (batch_.tokens.size() == batch_tokens_) RETURN_IF_ERROR(RunBatch());
    }
  }
  if (!batch_.rows.empty()) RETURN_IF_ERROR(RunBatch());
  return ShareSampledIds(num_sampled);
}

void StepRunner::AddToBatch(const PlanRow& row, uint32_t offset, uint32_t length) {
  const Slot& slot = slots_.slot(row.slot);
  if (row.tokens.empty()) {
    batch_.tokens.push_back(*slot.last_token);
  } else {
    const auto first = row.tokens.begin() + offset;
    batch_.tokens.insert(batch_.tokens.end(), first, first + length);
  }
  const bool want_logits = row.sample && offset + length == row.length;
  batch_.rows.push_back({.position = static_cast<int32_t>(row.position + offset),
                         .length = static_cast<int32_t>(length),
                         .block_table = slot.block_table,
                         .want_logits = want_logits});
  if (want_logits) batch_samples_.push_back(&row);
}

absl::Status StepRunner::RunBatch() {
  ASSIGN_OR_RETURN(const std::span<const float> logits, model_->Forward(batch_, kv_pool_));
  if (collective_->rank() == 0) RETURN_IF_ERROR(Sample(logits));
  batch_.tokens.clear();
  batch_.rows.clear();
  batch_samples_.clear();
  return absl::OkStatus();
}

absl::Status StepRunner::Sample(std::span<const float> logits) {
  const size_t vocab_size = model_->vocab_size();
  CHECK(logits.size() == batch_samples_.size() * vocab_size, "logits {} rows {} vocabulary {}",
        logits.size(), batch_samples_.size(), vocab_size);
  for (const PlanRow* row : batch_samples_) {
    const kernels::cpu::SampleRequest request = RequestOf(*row);
    const absl::StatusOr<int32_t> id =
        sampler_.Sample(logits.first(config_.sampled_vocab_size), request);
    if (!id.ok()) {
      return absl::InternalError(fmt::format("slot {} at position {}: {}", row->slot,
                                             request.position, std::string(id.status().message())));
    }
    sampled_ids_.push_back(*id);
    logits = logits.subspan(vocab_size);
  }
  return absl::OkStatus();
}

kernels::cpu::SampleRequest StepRunner::RequestOf(const PlanRow& row) const {
  const SamplingParams& sampling = slots_.slot(row.slot).sampling;
  kernels::cpu::SampleRequest request = {.temperature = sampling.temperature,
                                         .top_p = sampling.top_p,
                                         .top_k = sampling.top_k,
                                         .seed = sampling.seed,
                                         .position = row.position + row.length,
                                         .choice_index = sampling.choice_index};
  if (request.position < sampling.first_stop_position) request.masked_ids = config_.stop_ids;
  return request;
}

absl::Status StepRunner::ShareSampledIds(size_t num_sampled) {
  sampled_ids_.resize(num_sampled);
  if (num_sampled == 0) return absl::OkStatus();
  RETURN_IF_ERROR(
      collective_->Broadcast(sampled_ids_.data(), num_sampled * sizeof(sampled_ids_[0])));
  for (const int32_t id : sampled_ids_) {
    if (id < 0 || static_cast<uint32_t>(id) >= config_.sampled_vocab_size) {
      return absl::InternalError(fmt::format("rank 0 shared the token {}, allowed are 0 … {}", id,
                                             config_.sampled_vocab_size - 1));
    }
  }
  return absl::OkStatus();
}

}  // namespace wintserve
