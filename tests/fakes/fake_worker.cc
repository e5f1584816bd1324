#include "tests/fakes/fake_worker.h"

#include <utility>

#include "api_server/work_queue/plan_codec.h"
#include "common/check.h"

namespace wintserve {
namespace {

constexpr int64_t kAttachTimeoutMs = 10'000;

}  // namespace

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

FakeWorker::FakeWorker(FakeWorkerOptions options) : options_(std::move(options)) {
  auto client =
      WorkQueueClient::Attach(options_.target, options_.token, options_.hello, kAttachTimeoutMs);
  CHECK(client.ok(), "{}", client.status().ToString());
  client_ = *std::move(client);
  history_.resize(options_.hello.max_slots);
  thread_ = std::thread([this] { Run(); });
}

FakeWorker::~FakeWorker() {
  Kill();
  if (thread_.joinable()) thread_.join();
}

void FakeWorker::Kill() { client_->Close(); }

absl::Status FakeWorker::SendFault(FaultKind kind, const std::string& text) {
  return client_->SendFault(kind, text);
}

bool FakeWorker::WaitForShutdown() {
  thread_.join();
  return shut_down_;
}

void FakeWorker::Run() {
  uint64_t group_epoch = 0;
  for (;;) {
    const absl::StatusOr<ServerEvent> event = client_->Next();
    if (!event.ok()) return;
    if (const auto* configure = std::get_if<ConfigureWorker>(&*event)) {
      group_epoch = configure->group_epoch;
    } else if (const auto* attach = std::get_if<AttachPool>(&*event)) {
      if (!options_.never_ready) (void)client_->SendReady(group_epoch, attach->pool_epoch);
    } else if (const auto* received = std::get_if<ReceivedPlan>(&*event)) {
      if (options_.before_step && !options_.before_step(received->plan)) continue;
      (void)client_->SendStepDone(Execute(*received));
    } else {
      shut_down_ = true;
      client_->Close();
      return;
    }
  }
}

StepDone FakeWorker::Execute(const ReceivedPlan& received) {
  const StepPlan& plan = received.plan;
  CHECK(plan.previous_plan_hash == last_plan_hash_, "step={}", plan.step);
  last_plan_hash_ = received.plan_hash;
  StepDone done{
      .group_epoch = plan.group_epoch, .step = plan.step, .plan_hash = received.plan_hash};
  for (const SlotInit& init : plan.slot_init) history_[init.slot].clear();
  std::vector<int32_t> ids;
  for (const PlanRow& row : plan.rows) {
    std::vector<int32_t>& history = history_[row.slot];
    history.insert(history.end(), row.tokens.begin(), row.tokens.end());
    // A token from the slot is in the history since it was sampled.
    CHECK(history.size() == row.position + row.length, "slot={} position={}", row.slot,
          row.position);
    if (!row.sample) continue;
    const int32_t token = options_.next_token(history);
    history.push_back(token);
    ids.push_back(token);
    if (options_.hello.rank == 0) done.sampled.push_back({row.slot, token});
  }
  done.sampled_digest = SampledDigest(ids);
  if (options_.spoil) options_.spoil(&done);
  return done;
}

}  // namespace wintserve
