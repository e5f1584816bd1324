// What a step costs beside the forward pass: scheduler, plan, gRPC, and the engine's turn, with the
// real engine, the real step protocol over a Unix socket, the real prefix cache in the same process
// and a worker that computes nothing but takes compute_us for it.
//
//   turn_*  from one plan in the worker's hands to the next
//   wait_*  of that, from the worker's StepDone until it has the next plan: the device would idle
#include <benchmark/benchmark.h>
#include <prometheus/registry.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "api_server/llm/llm_factory.h"
#include "api_server/work_queue/client/work_queue_client.h"
#include "api_server/work_queue/plan_codec.h"
#include "common/check.h"
#include "common/log.h"
#include "common/mutex.h"
#include "common/temp_dir_test_util.h"
#include "tests/fakes/fake_cache.h"
#include "tests/fakes/fake_tokenizer.h"
#include "tests/fakes/fake_worker.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr int kTokens = 500;  // of every sequence
constexpr int64_t kAttachTimeoutMs = 10'000;

double Microseconds(steady_clock::duration duration) {
  return std::chrono::duration<double, std::micro>(duration).count();
}

// Answers every plan with the same token for every row, at once or after compute_us.
class InstantWorker {
 public:
  InstantWorker(const std::string& target, const std::string& token, int num_sequences,
                int64_t compute_us)
      : num_sequences_(static_cast<size_t>(num_sequences)), compute_us_(compute_us) {
    WorkerHello hello = FakeHello(0, 1);
    hello.max_slots = static_cast<uint32_t>(num_sequences);
    auto client = WorkQueueClient::Attach(target, token, hello, kAttachTimeoutMs);
    CHECK(client.ok(), "{}", client.status().ToString());
    client_ = *std::move(client);
    thread_ = std::thread([this] { Run(); });
  }
  // The server has said Shutdown, or its stream has ended.
  void Join() { thread_.join(); }

  std::vector<double> turns_us;  // of steps in which every sequence decodes
  std::vector<double> waits_us;

 private:
  void Run() {
    uint64_t group_epoch = 0;
    for (;;) {
      const absl::StatusOr<ServerEvent> event = client_->Next();
      if (!event.ok() || std::holds_alternative<ShutdownWorker>(*event)) return client_->Close();
      if (const auto* configure = std::get_if<ConfigureWorker>(&*event)) {
        group_epoch = configure->group_epoch;
      } else if (const auto* attach = std::get_if<AttachPool>(&*event)) {
        CHECK(client_->SendReady(group_epoch, attach->pool_epoch).ok());
      } else {
        Execute(std::get<ReceivedPlan>(*event));
      }
    }
  }

  void Execute(const ReceivedPlan& received) {
    const StepPlan& plan = received.plan;
    const bool decodes = plan.rows.size() == num_sequences_ &&
                         std::all_of(plan.rows.begin(), plan.rows.end(),
                                     [](const PlanRow& row) { return row.length == 1; });
    const auto now = steady_clock::now();
    if (decodes && last_decoded_) {
      turns_us.push_back(Microseconds(now - last_plan_));
      waits_us.push_back(Microseconds(now - last_done_));
    }
    last_plan_ = now;
    last_decoded_ = decodes;
    if (compute_us_ > 0) std::this_thread::sleep_for(std::chrono::microseconds(compute_us_));
    StepDone done{
        .group_epoch = plan.group_epoch, .step = plan.step, .plan_hash = received.plan_hash};
    std::vector<int32_t> ids;
    for (const PlanRow& row : plan.rows) {
      if (!row.sample) continue;
      ids.push_back(FakeTokenizer::IdOfByte(static_cast<char>('a' + row.position % 26)));
      done.sampled.push_back({row.slot, ids.back()});
    }
    done.sampled_digest = SampledDigest(ids);
    CHECK(client_->SendStepDone(done).ok());
    last_done_ = steady_clock::now();
  }

  const size_t num_sequences_;
  const int64_t compute_us_;
  std::unique_ptr<WorkQueueClient> client_;
  steady_clock::time_point last_plan_;
  steady_clock::time_point last_done_;
  bool last_decoded_ = false;
  std::thread thread_;
};

// Prompts of many lengths, so that sequences fill their blocks in different steps, and none that
// another one could share.
GenerationRequest Request(int i) {
  GenerationRequest request{.id = "bench", .prompt_ids = {}};
  request.prompt_ids.assign(static_cast<size_t>(1 + i % 64), 100 + i % 256);
  request.max_tokens = kTokens;
  request.ignore_eos = true;
  request.stop = {"no such text"};
  return request;
}

void GenerateAll(LLM* llm, int num_sequences) {
  Mutex mutex;
  CondVar changed;
  int num_finished = 0;
  for (int i = 0; i < num_sequences; ++i) {
    auto handle = llm->Submit(Request(i), [&](GenerationUpdate update) {
      if (!update.finished) return;
      CHECK(update.error.ok(), "{}", update.error.ToString());
      MutexLock lock(&mutex);
      ++num_finished;
      changed.NotifyAll();
    });
    CHECK(handle.ok(), "{}", handle.status().ToString());
  }
  MutexLock lock(&mutex);
  changed.Wait(&mutex, [&] { return num_finished == num_sequences; });
}

void Report(const char* name, std::vector<double> samples, benchmark::State* state) {
  CHECK(!samples.empty());
  std::sort(samples.begin(), samples.end());
  state->counters[std::string(name) + "_p50_us"] = samples[samples.size() / 2];
  state->counters[std::string(name) + "_p99_us"] = samples[samples.size() * 99 / 100];
}

void StepOverhead(benchmark::State& state) {
  const int num_sequences = static_cast<int>(state.range(0));
  InitLog("bench", "warning");
  const TempDir directory;
  FakeCache cache;
  LlmOptions options;
  options.model_path = directory.path().string();
  options.work_queue_socket = (directory.path() / "q.sock").string();
  options.token = "secret";
  options.max_model_len = kTokens + 100;
  options.max_num_seqs = num_sequences;
  options.max_num_batched_tokens = 512;
  options.async_depth = static_cast<int>(state.range(1));
  auto llm = CreateLlmWith(options, std::make_unique<FakeTokenizer>(),
                           std::make_shared<prometheus::Registry>(), cache.Connector(),
                           [](const auto&) { return 0; });
  CHECK(llm.ok(), "{}", llm.status().ToString());
  InstantWorker worker("unix:" + options.work_queue_socket, options.token, num_sequences,
                       state.range(2));
  while (!(*llm)->Readiness().ready) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  for (auto _ : state) GenerateAll(llm->get(), num_sequences);
  llm->reset();
  worker.Join();
  Report("turn", std::move(worker.turns_us), &state);
  Report("wait", std::move(worker.waits_us), &state);
}

BENCHMARK(StepOverhead)
    ->ArgNames({"sequences", "async_depth", "compute_us"})
    ->ArgsProduct({{1, 8, 64, 256}, {0, 1}, {0, 3000}})
    ->Iterations(2)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace wintserve

BENCHMARK_MAIN();
