// What a step costs beside the forward pass: plan -> gRPC -> worker -> gRPC -> engine -> next plan,
// with an in-process worker that answers at once. Reports percentiles of the time from one plan's
// arrival at the worker to the next one's, which is a whole turn of the loop.
#include <benchmark/benchmark.h>
#include <prometheus/registry.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <thread>

#include "api_server/llm/llm_factory.h"
#include "common/check.h"
#include "common/log.h"
#include "common/mutex.h"
#include "tests/fakes/fake_cache.h"
#include "tests/fakes/fake_tokenizer.h"
#include "tests/fakes/fake_worker.h"

namespace wintserve {
namespace {

using std::chrono::steady_clock;

constexpr int kTokens = 2000;  // of every sequence

void StepOverhead(benchmark::State& state) {
  const int num_sequences = static_cast<int>(state.range(0));
  InitLog("bench", "warning");
  std::string directory = (std::filesystem::temp_directory_path() / "bench_XXXXXX").string();
  CHECK(::mkdtemp(directory.data()) != nullptr, "{}", directory);
  FakeCache cache;
  LlmOptions options;
  options.model_path = directory;
  options.work_queue_socket = directory + "/q.sock";
  options.token = "secret";
  options.max_model_len = kTokens + 100;
  auto llm = CreateLlmWith(options, std::make_unique<FakeTokenizer>(),
                           std::make_shared<prometheus::Registry>(), cache.Connector());
  CHECK(llm.ok(), "{}", llm.status().ToString());

  std::vector<double> turn_us;
  steady_clock::time_point last_plan{};
  FakeWorker worker(
      {.target = "unix:" + options.work_queue_socket,
       .token = options.token,
       .hello = FakeHello(0, 1),
       .next_token =
           [](const std::vector<int32_t>& history) {
             return FakeTokenizer::IdOfByte(static_cast<char>('a' + history.size() % 26));
           },
       .before_step =
           [&](const StepPlan& plan) {
             const auto now = steady_clock::now();
             if (plan.rows.size() == static_cast<size_t>(num_sequences)) {
               turn_us.push_back(
                   std::chrono::duration<double, std::micro>(now - last_plan).count());
             }
             last_plan = now;
             return true;
           }});
  while (!(*llm)->Readiness().ready) std::this_thread::sleep_for(std::chrono::milliseconds(1));

  for (auto _ : state) {
    Mutex mutex;
    CondVar changed;
    int num_finished = 0;
    for (int i = 0; i < num_sequences; ++i) {
      GenerationRequest request{.id = "bench", .prompt_ids = {100, 101, 102}};
      request.max_tokens = kTokens;
      request.stop = {"no such text"};
      auto handle = (*llm)->Submit(request, [&](GenerationUpdate update) {
        if (!update.finished) return;
        MutexLock lock(&mutex);
        ++num_finished;
        changed.NotifyAll();
      });
      CHECK(handle.ok(), "{}", handle.status().ToString());
    }
    MutexLock lock(&mutex);
    changed.Wait(&mutex, [&] { return num_finished == num_sequences; });
  }
  llm->reset();
  worker.WaitForShutdown();
  std::filesystem::remove_all(directory);
  std::sort(turn_us.begin(), turn_us.end());
  state.counters["p50_us"] = turn_us[turn_us.size() / 2];
  state.counters["p99_us"] = turn_us[turn_us.size() * 99 / 100];
  state.counters["steps"] = static_cast<double>(turn_us.size());
}

BENCHMARK(StepOverhead)
    ->Arg(1)
    ->Arg(8)
    ->Iterations(3)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace wintserve

BENCHMARK_MAIN();
