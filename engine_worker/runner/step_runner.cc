#include "engine_worker/runner/step_runner.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

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
  if (config.block_size_tokens != kernels::kKvBlockTokens) {
    return absl::InvalidArgumentError(
        fmt::format("block_size_tokens is {}, this worker has blocks of {}",
                    config.block_size_tokens, kernels::kKvBlockTokens));
  }
  CHECK(model->max_batch_tokens() > 0 && model->max_logit_rows() > 0);
  auto runner = std::unique_ptr<StepRunner>(
      new StepRunner(WithSortedStopIds(config), model, collective, kv_pool));
  RETURN_IF_ERROR(runner->AllocateMemory(host_tier));
  return runner;
}

StepRunner::StepRunner(const StepRunnerConfig& config, Model* model, Collective* collective,
                       void* kv_pool)
    : config_(config),
      model_(model),
      backend_(model->backend()),
      collective_(collective),
      kv_pool_(kv_pool),
      slots_(LimitsOf(config, *model)),
      chain_(config.chain),
      result_layout_(config.max_slots),
      result_buffers_(std::make_shared<ResultBuffers>(model->backend(), result_layout_)),
      prompt_layout_(model->max_logit_rows()),
      prompt_buffers_(std::make_shared<ResultBuffers>(model->backend(), prompt_layout_)),
      graphs_(model->backend()) {}

absl::Status StepRunner::AllocateMemory(void* host_tier) {
  ASSIGN_OR_RETURN(copier_,
                   BlockCopier::Create(backend_, {.pool = kv_pool_,
                                                  .num_blocks = config_.num_blocks,
                                                  .host_tier = host_tier,
                                                  .num_host_slots = config_.num_host_slots,
                                                  .block_bytes = model_->kv_block_bytes()}));
  // A plan has at most one row a slot.
  const int64_t max_tokens = model_->max_batch_tokens();
  ASSIGN_OR_RETURN(
      device_batch_,
      backend_->CreateBatch({.max_tokens = max_tokens,
                             .max_rows = std::min<int64_t>(config_.max_slots, max_tokens),
                             .max_blocks_per_row = (int64_t{config_.max_sequence_tokens} +
                                                    kernels::kKvBlockTokens - 1) /
                                                   kernels::kKvBlockTokens,
                             .num_slots = static_cast<int32_t>(config_.max_slots),
                             .stop_ids = config_.stop_ids,
                             .counted_vocab_size = samples() ? config_.sampled_vocab_size : 0}));
  ASSIGN_OR_RETURN(device_results_, backend_->Allocate(result_layout_.size_bytes()));
  ASSIGN_OR_RETURN(device_prompt_results_, backend_->Allocate(prompt_layout_.size_bytes()));
  return absl::OkStatus();
}

absl::Status StepRunner::WarmUp() {
  CHECK(chain_.step == config_.chain.step, "a warm-up after step {}", chain_.step);
  graphs_.Clear();
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Buffer> block,
                   backend_->Allocate(model_->kv_block_bytes()));
  RETURN_IF_ERROR(WarmUpRows(1, *block));
  if (config_.use_graphs) RETURN_IF_ERROR(CaptureGraphs());
  RETURN_IF_ERROR(backend_->Record()->Wait());
  return collective_->DeviceStatus();
}

absl::Status StepRunner::WarmUpRows(int64_t num_rows, const kernels::Buffer& kv_block) {
  const int32_t block = 0;
  batch_.tokens = {0};
  batch_.rows = {{.position = 0, .length = 1, .block_table = {&block, 1}, .want_logits = true}};
  batch_.num_padding_rows = static_cast<int32_t>(num_rows - 1);
  batch_logit_rows_ = 1;
  num_device_ids_ = 0;
  return RunBatch(kv_block.data());
}

absl::Status StepRunner::CaptureGraphs() {
  graphs_.Clear();
  // Beyond, operators take long enough to be called one by one.
  constexpr int64_t kMaxRows = 1024;
  const int64_t max_rows = std::min<int64_t>(
      {config_.max_slots, model_->max_batch_tokens(), model_->max_logit_rows(), kMaxRows});
  ASSIGN_OR_RETURN(const std::unique_ptr<kernels::Buffer> block,
                   backend_->Allocate(model_->kv_block_bytes()));
  return graphs_.CaptureUpTo(
      max_rows,
      [&](int64_t num_rows,
          kernels::ConstRows* logits) -> absl::StatusOr<std::function<absl::Status()>> {
        RETURN_IF_ERROR(WarmUpRows(num_rows, *block));
        int32_t* const ids = result_layout_.ids(device_results_->data());
        return [this, ids, logits] { return ComputeIds(kv_pool_, ids, logits); };
      });
}

absl::StatusOr<StepDone> StepRunner::Apply(const StepPlan& plan, uint64_t plan_hash) {
  ASSIGN_OR_RETURN(const std::unique_ptr<PendingStep> pending, Begin(plan, plan_hash));
  return pending->Wait();
}

absl::StatusOr<std::unique_ptr<PendingStep>> StepRunner::Begin(const StepPlan& plan,
                                                               uint64_t plan_hash) {
  RETURN_IF_ERROR(CheckChain(plan));
  RETURN_IF_ERROR(copier_->Check(plan.copies));
  RETURN_IF_ERROR(slots_.BeginStep(plan));
  PendingStep::Work work = {
      .done = {.group_epoch = plan.group_epoch, .step = plan.step, .plan_hash = plan_hash},
      .reports_ids = samples(),
      .sampled_vocab_size = static_cast<int32_t>(config_.sampled_vocab_size),
      .layout = result_layout_,
      .collective = collective_,
      .prompt_layout = prompt_layout_,
      .prompt_buffers = prompt_buffers_};
  ASSIGN_OR_RETURN(work.results, result_buffers_->Take());
  work.begin = backend_->Record();
  work.copies = copier_->Begin(plan.copies);
  StartSlots(plan);
  RETURN_IF_ERROR(RunRows(plan));
  if (!sampled_.empty()) {
    backend_->CopyToHostAsync(work.results->data(), device_results_->data(),
                              wants_logprobs_ ? result_layout_.size_bytes()
                                              : StepResultLayout::ids_bytes(std::ssize(sampled_)));
  }
  work.end = backend_->Record();
  work.sampled = std::move(sampled_);
  work.prompt_pieces = std::move(prompt_pieces_);
  slots_.FinishStep(plan);
  chain_ = {.step = plan.step, .plan_hash = plan_hash};
  return std::make_unique<PendingStep>(std::move(work), result_buffers_);
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
  const bool is_first = chain_.step == 0;
  if (is_first ? plan.step == 0 : plan.step != chain_.step + 1) {
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
  sampled_.clear();
  prompt_pieces_.clear();
  num_device_ids_ = 0;
  wants_logprobs_ = false;
  for (const PlanRow& row : plan.rows) {
    copier_->WaitForBlocks(slots_.slot(row.slot).block_table);
    for (uint32_t offset = 0; offset < row.length;) {
      const size_t free_tokens = model_->max_batch_tokens() - batch_.tokens.size();
      const auto length = static_cast<uint32_t>(std::min<size_t>(row.length - offset, free_tokens));
      AddToBatch(row, offset, length);
      offset += length;
      if (BatchIsFull()) RETURN_IF_ERROR(RunBatch(kv_pool_));
    }
  }
  if (!batch_.rows.empty()) RETURN_IF_ERROR(RunBatch(kv_pool_));
  CHECK(num_device_ids_ == std::ssize(sampled_));
  return absl::OkStatus();
}

void StepRunner::StartSlots(const StepPlan& plan) {
  if (!samples()) return;
  for (const SlotInit& init : plan.slot_init) {
    if (!init.sampling.has_penalties() && init.sampling.logit_biases.empty()) continue;
    std::vector<kernels::sampling::LogitBias> biases;
    biases.reserve(init.sampling.logit_biases.size());
    for (const auto [token, bias] : init.sampling.logit_biases) biases.push_back({token, bias});
    backend_->StartSlot(static_cast<int32_t>(init.slot),
                        {.logit_biases = biases,
                         .prompt_ids = init.prompt_tokens,
                         .generated_ids = init.generated_tokens},
                        device_batch_.get());
  }
}

void StepRunner::AddToBatch(const PlanRow& row, uint32_t offset, uint32_t length) {
  const auto slot = static_cast<int32_t>(row.slot);
  if (row.prompt_logprobs) AddPromptTokens(row, offset, length);
  if (row.tokens.empty()) {
    batch_.tokens.push_back(kernels::TokenOfSlot(slot));
  } else {
    const auto first = row.tokens.begin() + offset;
    batch_.tokens.insert(batch_.tokens.end(), first, first + length);
  }
  kernels::BatchRow batch_row = {.position = static_cast<int32_t>(row.position + offset),
                                 .length = static_cast<int32_t>(length),
                                 .block_table = slots_.slot(row.slot).block_table,
                                 .slot = slot};
  if (row.sample && offset + length == row.length) {
    batch_row.want_logits = true;
    if (samples()) batch_row.sample = SampleParamsOf(row);
    const int32_t num_top_logprobs = batch_row.sample.num_top_logprobs;
    batch_wants_logprobs_ |= num_top_logprobs >= 0;
    sampled_.push_back({.slot = row.slot,
                        .position = row.position + row.length,
                        .num_top_logprobs = num_top_logprobs});
    ++batch_logit_rows_;
  }
  batch_.rows.push_back(batch_row);
}

void StepRunner::AddPromptTokens(const PlanRow& row, uint32_t offset, uint32_t length) {
  const uint32_t end = std::min(offset + length, row.num_prompt_logprobs());
  if (offset == end) return;  // the row's last token, which is sampled after, alone
  PromptTokens& tokens = batch_prompt_tokens_.emplace_back();
  tokens.slot = row.slot;
  tokens.position = row.position + offset + 1;
  tokens.first_token = std::ssize(batch_.tokens);
  tokens.targets.reserve(end - offset);
  for (uint32_t i = offset + 1; i <= end; ++i) {
    tokens.targets.push_back(i < row.length ? row.tokens[i] : row.next_token);
  }
}

bool StepRunner::BatchIsFull() const {
  return std::ssize(batch_.tokens) == model_->max_batch_tokens() ||
         batch_logit_rows_ == model_->max_logit_rows();
}

const StepGraphs::Entry* StepRunner::GraphForBatch() const {
  // Graphs write the first ids of the step. A warm-up brings its own padding.
  if (num_device_ids_ != 0 || batch_.num_padding_rows != 0) return nullptr;
  for (const kernels::BatchRow& row : batch_.rows) {
    if (row.length != 1 || !row.want_logits) return nullptr;
  }
  return graphs_.Find(std::ssize(batch_.rows));
}

absl::Status StepRunner::RunBatch(void* kv_pool) {
  const StepGraphs::Entry* const graph = GraphForBatch();
  if (graph != nullptr) {
    batch_.num_padding_rows = static_cast<int32_t>(graph->num_rows - std::ssize(batch_.rows));
  }
  backend_->SetBatch(batch_, device_batch_.get());
  batch_.tokens.clear();
  batch_.rows.clear();
  batch_.num_padding_rows = 0;
  const int64_t num_ids = std::exchange(batch_logit_rows_, 0);
  const bool wants_logprobs = std::exchange(batch_wants_logprobs_, false);

  int32_t* const ids = result_layout_.ids(device_results_->data()) + num_device_ids_;
  kernels::ConstRows logits;
  if (graph != nullptr) {
    RETURN_IF_ERROR(backend_->Launch(*graph->graph));
    logits = graph->logits;
  } else {
    RETURN_IF_ERROR(ComputeIds(kv_pool, ids, &logits));
  }
  // Few ask for them, so they are no part of a graph.
  if (wants_logprobs) {
    backend_->Logprobs(logits, config_.sampled_vocab_size, *device_batch_, ids,
                       result_layout_.logprobs(device_results_->data()).From(num_device_ids_));
    wants_logprobs_ = true;
  }
  num_device_ids_ += num_ids;
  for (const PromptTokens& tokens : batch_prompt_tokens_) {
    RETURN_IF_ERROR(ReadPromptLogprobs(tokens));
  }
  batch_prompt_tokens_.clear();
  return absl::OkStatus();
}

absl::Status StepRunner::ReadPromptLogprobs(const PromptTokens& tokens) {
  const auto num_targets = static_cast<int32_t>(tokens.targets.size());
  for (int32_t begin = 0; begin < num_targets;) {
    const int32_t count = std::min(num_targets - begin, model_->max_logit_rows());
    ASSIGN_OR_RETURN(const kernels::ConstRows logits,
                     model_->TokenLogits(tokens.first_token + begin, count));
    if (samples()) {
      ASSIGN_OR_RETURN(std::unique_ptr<kernels::Buffer> results, prompt_buffers_->Take());
      int32_t* const host_ids = prompt_layout_.ids(results->data());
      std::copy_n(tokens.targets.begin() + begin, count, host_ids);
      int32_t* const ids = prompt_layout_.ids(device_prompt_results_->data());
      backend_->CopyFromHostAsync(ids, host_ids, StepResultLayout::ids_bytes(count));
      const int32_t num_top = slots_.slot(tokens.slot).sampling.num_prompt_top_logprobs;
      backend_->LogprobsOfIds(logits, count, config_.sampled_vocab_size, ids, num_top,
                              prompt_layout_.logprobs(device_prompt_results_->data()));
      backend_->CopyToHostAsync(results->data(), device_prompt_results_->data(),
                                prompt_layout_.size_bytes());
      prompt_pieces_.push_back({.slot = tokens.slot,
                                .position = tokens.position + static_cast<uint32_t>(begin),
                                .num_tokens = count,
                                .num_top_logprobs = num_top,
                                .results = std::move(results)});
    }
    begin += count;
  }
  return absl::OkStatus();
}

absl::Status StepRunner::ComputeIds(void* kv_pool, int32_t* ids, kernels::ConstRows* logits) {
  ASSIGN_OR_RETURN(*logits, model_->Forward(*device_batch_, kv_pool));
  const int64_t num_ids = device_batch_->num_logit_rows();
  if (num_ids == 0) return absl::OkStatus();
  if (samples()) {
    backend_->Sample(*logits, config_.sampled_vocab_size, device_batch_.get(), ids);
  }
  RETURN_IF_ERROR(collective_->Broadcast(ids, num_ids * static_cast<int64_t>(sizeof(int32_t))));
  backend_->KeepIds(ids, device_batch_.get());
  return absl::OkStatus();
}

kernels::SampleParams StepRunner::SampleParamsOf(const PlanRow& row) const {
  const SamplingParams& sampling = slots_.slot(row.slot).sampling;
  const uint32_t position = row.position + row.length;
  return {.temperature = sampling.temperature,
          .top_p = sampling.top_p,
          .top_k = sampling.top_k,
          .min_p = sampling.min_p,
          .penalties = {.repetition = sampling.repetition_penalty,
                        .presence = sampling.presence_penalty,
                        .frequency = sampling.frequency_penalty},
          .num_logit_biases = static_cast<int32_t>(sampling.logit_biases.size()),
          .num_top_logprobs = sampling.num_top_logprobs,
          .mask_stop_ids = position < sampling.first_stop_position,
          .seed = sampling.seed,
          .position = position,
          .choice_index = sampling.choice_index};
}

}  // namespace wintserve
