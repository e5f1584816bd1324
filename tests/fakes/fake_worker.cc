#include "tests/fakes/fake_worker.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "api_server/work_queue/plan_codec.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "kernels/cpu/cpu_backend.h"

namespace wintserve {
namespace {

constexpr int64_t kAttachTimeoutMs = 10'000;
constexpr std::chrono::seconds kRefusalPatience(5);  // as of a real worker
constexpr uint32_t kBlockTokens = 64;

template <typename... Args>
absl::Status Wrong(fmt::format_string<Args...> format, Args&&... args) {
  return absl::FailedPreconditionError(fmt::format(format, std::forward<Args>(args)...));
}

// Costs memory from its first write on, so a pool may be as large as a real one.
absl::StatusOr<MappedMemory> TokenMemory(uint32_t num_blocks) {
  if (num_blocks == 0) return MappedMemory();
  return MappedMemory::Create("fake_worker", int64_t{num_blocks} * kBlockTokens * sizeof(int32_t));
}

// Of a token t: -t / 100; the top are the tokens from t on.
PositionLogprobs LogprobsOf(int32_t token, int32_t num_top) {
  const auto logprob_of = [](int32_t id) { return -static_cast<float>(id) / 100; };
  PositionLogprobs logprobs = {.logprob = logprob_of(token), .rank = 1};
  for (int32_t i = 0; i < num_top; ++i) {
    logprobs.top.push_back({token + i, logprob_of(token + i)});
  }
  return logprobs;
}

PromptRowLogprobs PromptLogprobsOf(const PlanRow& row, const SamplingParams& sampling) {
  PromptRowLogprobs logprobs = {.slot = row.slot, .position = row.position + 1};
  for (uint32_t i = 1; i <= row.num_prompt_logprobs(); ++i) {
    logprobs.tokens.push_back(LogprobsOf(i < row.length ? row.tokens[i] : row.next_token,
                                         sampling.num_prompt_top_logprobs));
  }
  return logprobs;
}

}  // namespace

absl::StatusOr<std::shared_ptr<FakePoolMemory::Pool>> FakePoolMemory::Map(
    const AttachPool& attach) {
  MutexLock lock(&mutex_);
  std::shared_ptr<Pool> pool = pools_[attach.pool_epoch].lock();
  if (pool == nullptr) {
    pool = std::make_shared<Pool>();
    ASSIGN_OR_RETURN(pool->blocks, TokenMemory(attach.num_blocks));
    ASSIGN_OR_RETURN(pool->host_tier, TokenMemory(attach.num_host_slots));
    pools_[attach.pool_epoch] = pool;
  }
  last_ = pool;
  return pool;
}

WorkerHello FakeHello(uint32_t rank, uint32_t world_size) {
  return {.worker_id = 1 + rank,
          .rank = rank,
          .world_size = world_size,
          .weights_digest = 7,
          .kv_layout_digest = 8,
          .kv_block_bytes = 4096,
          .kv_bytes_available = 1 << 30,
          .max_slots = 64,
          .max_tokens = 8192,
          .vocab_size = 1000,
          .num_layers = 1,
          .max_position = 8192};
}

FakeWorker::FakeWorker(FakeWorkerOptions options)
    : options_(std::move(options)), backend_(kernels::cpu::CreateCpuBackend({})) {
  if (options_.hello.mapped_pool_epoch != 0) pool_epoch_ = options_.hello.mapped_pool_epoch;
  // The server may have yet to find out that the stream of the process before has ended.
  const auto deadline = std::chrono::steady_clock::now() + kRefusalPatience;
  auto client =
      WorkQueueClient::Attach(options_.target, options_.token, options_.hello, kAttachTimeoutMs);
  while (absl::IsFailedPrecondition(client.status()) &&
         std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    client =
        WorkQueueClient::Attach(options_.target, options_.token, options_.hello, kAttachTimeoutMs);
  }
  CHECK(client.ok(), "{}", client.status().ToString());
  client_ = *std::move(client);
  thread_ = std::thread([this] { Run(); });
}

FakeWorker::~FakeWorker() {
  Kill();
  if (thread_.joinable()) thread_.join();
}

void FakeWorker::Kill() {
  {
    MutexLock lock(&death_mutex_);
    is_dead_ = true;
  }
  client_->Close();
}

absl::Status FakeWorker::SendFault(FaultKind kind, const std::string& text, bool kv_trusted) {
  return client_->SendFault(kind, text, kv_trusted);
}

absl::Status FakeWorker::SendProgress(uint64_t progress) {
  return client_->SendHeartbeat({.progress = progress});
}

bool FakeWorker::WaitForShutdown() {
  thread_.join();
  return shut_down_;
}

void FakeWorker::Run() {
  for (;;) {
    const absl::StatusOr<ServerEvent> event = client_->Next();
    if (!event.ok()) return;
    if (std::holds_alternative<ShutdownWorker>(*event)) {
      shut_down_ = true;
      client_->Close();
      return;
    }
    if (const absl::Status status = Handle(*event); !status.ok()) {
      if (absl::IsCancelled(status)) {  // the dead say nothing, and their stream ends
        while (client_->Next().ok()) continue;
        return;
      }
      (void)client_->SendFault(FaultKind::kInternal, std::string(status.message()),
                               /*kv_trusted=*/false);
      return;
    }
  }
}

absl::Status FakeWorker::Handle(const ServerEvent& event) {
  if (const auto* configure = std::get_if<ConfigureWorker>(&event)) {
    if (config_.has_value()) return Wrong("Configure before AbortGroup");
    config_ = *configure;
    last_step_.reset();
    last_plan_hash_ = 0;
    return absl::OkStatus();
  }
  if (const auto* abort = std::get_if<AbortGroup>(&event)) return Abort(*abort);
  if (const auto* attach = std::get_if<AttachPool>(&event)) return Attach(*attach);
  if (const auto* detach = std::get_if<DetachPool>(&event)) return Detach(*detach);
  return Execute(std::get<ReceivedPlan>(event));
}

absl::Status FakeWorker::Abort(const AbortGroup& abort) {
  if (!config_.has_value() || config_->group_epoch != abort.group_epoch) {
    return Wrong("AbortGroup of group epoch {:x}, which it is not in", abort.group_epoch);
  }
  if (options_.before_abort && !options_.before_abort()) return absl::OkStatus();
  config_.reset();
  pool_.reset();
  (void)client_->SendAborted(abort.group_epoch);
  return absl::OkStatus();
}

absl::Status FakeWorker::Attach(const AttachPool& attach) {
  if (!config_.has_value()) {
    return Wrong("AttachPool of pool epoch {:x} before Configure", attach.pool_epoch);
  }
  if (pool_.has_value() || pool_epoch_.value_or(attach.pool_epoch) != attach.pool_epoch) {
    return Wrong("AttachPool of pool epoch {:x} before DetachPool", attach.pool_epoch);
  }
  if (!pool_epoch_.has_value()) ++num_mappings_;
  pool_epoch_ = attach.pool_epoch;
  if (options_.can_map && !options_.can_map(attach)) return absl::OkStatus();
  if (options_.memory == nullptr) options_.memory = std::make_shared<FakePoolMemory>();
  ASSIGN_OR_RETURN(const std::shared_ptr<FakePoolMemory::Pool> memory,
                   options_.memory->Map(attach));
  const BlockTiers tiers{.pool = memory->blocks.data(),
                         .num_blocks = attach.num_blocks,
                         .host_tier = memory->host_tier.data(),
                         .num_host_slots = attach.num_host_slots,
                         .block_bytes = kBlockTokens * sizeof(int32_t)};
  ASSIGN_OR_RETURN(std::unique_ptr<BlockCopier> copier, BlockCopier::Create(backend_.get(), tiers));
  const SlotLimits limits{.max_slots = config_->max_slots,
                          .max_tokens = config_->max_tokens,
                          .max_sequence_tokens = config_->max_sequence_tokens,
                          .num_blocks = attach.num_blocks,
                          .block_size_tokens = kBlockTokens,
                          .vocab_size = static_cast<int32_t>(options_.hello.vocab_size)};
  pool_.emplace(
      Pool{memory, std::move(copier), SlotTable(limits), std::vector<int32_t>(config_->max_slots)});
  if (!options_.never_ready) (void)client_->SendReady(config_->group_epoch, attach.pool_epoch);
  return absl::OkStatus();
}

absl::Status FakeWorker::Detach(const DetachPool& detach) {
  if (pool_epoch_ != detach.pool_epoch) {
    return Wrong("DetachPool of pool epoch {:x}, which is not attached", detach.pool_epoch);
  }
  if (options_.before_detach) options_.before_detach();
  pool_epoch_.reset();
  pool_.reset();
  if (!options_.never_detached) (void)client_->SendPoolDetached(detach.pool_epoch);
  return absl::OkStatus();
}

absl::Status FakeWorker::CheckChain(const StepPlan& plan) const {
  if (!pool_.has_value() || plan.pool_epoch != pool_epoch_) {
    return Wrong("step {} is of pool epoch {:x}, which is not attached", plan.step,
                 plan.pool_epoch);
  }
  if (plan.group_epoch != config_->group_epoch) {
    return Wrong("step {} is of group epoch {:x}, not {:x}", plan.step, plan.group_epoch,
                 config_->group_epoch);
  }
  const uint64_t expected_step = last_step_.has_value() ? *last_step_ + 1 : plan.step;
  if (plan.step != expected_step || plan.previous_plan_hash != last_plan_hash_) {
    return Wrong("step {} after a plan with hash {:x}, here it was step {} with {:x}", plan.step,
                 plan.previous_plan_hash, expected_step - 1, last_plan_hash_);
  }
  return absl::OkStatus();
}

absl::Status FakeWorker::Execute(const ReceivedPlan& received) {
  const StepPlan& plan = received.plan;
  if (options_.before_step && !options_.before_step(plan)) return absl::OkStatus();
  RETURN_IF_ERROR(CheckChain(plan));
  RETURN_IF_ERROR(pool_->copier->Check(plan.copies));
  RETURN_IF_ERROR(pool_->slots.BeginStep(plan));
  RETURN_IF_ERROR(RunCopies(plan));
  std::this_thread::sleep_for(options_.step_delay);
  StepDone done{
      .group_epoch = plan.group_epoch, .step = plan.step, .plan_hash = received.plan_hash};
  std::vector<int32_t> ids;
  for (const PlanRow& row : plan.rows) {
    ASSIGN_OR_RETURN(const std::vector<int32_t> history, RunRow(row));
    const SamplingParams& sampling = pool_->slots.slot(row.slot).sampling;
    if (row.prompt_logprobs && options_.hello.rank == 0) {
      done.prompt_logprobs.push_back(PromptLogprobsOf(row, sampling));
    }
    if (!row.sample) continue;
    ids.push_back(NextToken(history, sampling));
    pool_->last_tokens[row.slot] = ids.back();
    if (options_.hello.rank == 0) {
      SampledToken& sampled = done.sampled.emplace_back(SampledToken{row.slot, ids.back()});
      if (sampling.num_top_logprobs >= 0) {
        sampled.logprobs = LogprobsOf(ids.back(), sampling.num_top_logprobs);
      }
    }
  }
  pool_->slots.FinishStep(plan);
  last_step_ = plan.step;
  last_plan_hash_ = received.plan_hash;
  done.sampled_digest = SampledDigest(ids);
  if (options_.spoil) options_.spoil(&done);
  (void)client_->SendStepDone(done);
  if (options_.after_step) options_.after_step();
  return absl::OkStatus();
}

absl::Status FakeWorker::RunCopies(const StepPlan& plan) {
  MutexLock lock(&death_mutex_);
  if (is_dead_) return absl::CancelledError("dead");
  const std::unique_ptr<kernels::Event> copied = pool_->copier->Begin(plan.copies);
  return copied != nullptr ? copied->Wait() : absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> FakeWorker::RunRow(const PlanRow& row) {
  MutexLock lock(&death_mutex_);
  if (is_dead_) return absl::CancelledError("dead");
  const Slot& slot = pool_->slots.slot(row.slot);
  auto* const memory = static_cast<int32_t*>(pool_->memory->blocks.data());
  const auto entry = [&](uint32_t position) -> int32_t& {
    return memory[int64_t{slot.block_table[position / kBlockTokens]} * kBlockTokens +
                  position % kBlockTokens];
  };
  for (uint32_t i = 0; i < row.length; ++i) {
    entry(row.position + i) =
        (row.tokens.empty() ? pool_->last_tokens[row.slot] : row.tokens[i]) + 1;
  }
  std::vector<int32_t> history(row.position + row.length);
  for (uint32_t position = 0; position < history.size(); ++position) {
    history[position] = entry(position) - 1;
    if (history[position] < 0) {
      return Wrong("slot {}: position {} was never written", row.slot, position);
    }
  }
  return history;
}

int32_t FakeWorker::NextToken(const std::vector<int32_t>& history,
                              const SamplingParams& sampling) const {
  int32_t token = options_.next_token(history);
  if (history.size() >= sampling.first_stop_position) return token;
  const std::vector<int32_t>& stop_ids = config_->stop_ids;
  const auto vocab_size = static_cast<int32_t>(options_.hello.vocab_size);
  while (std::find(stop_ids.begin(), stop_ids.end(), token) != stop_ids.end()) {
    token = (token + 1) % vocab_size;
  }
  return token;
}

}  // namespace wintserve
