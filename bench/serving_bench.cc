// Load generator: decode and prefill rates of a running server, measured through HTTP as a client
// sees them. Streams are a closed loop: all start together and none is replaced. The report names
// this machine as the device, so the server should run on it.
//
//   serving_bench --port 8180 --streams 1,8 --output-tokens 256 --prompt-tokens 1024 --json
//   out.json
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <exception>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "bench/provenance.h"
#include "bench/stream_client.h"

namespace wintserve::bench {
namespace {

using nlohmann::json;

struct BenchOptions {
  Target target;
  std::vector<int> streams = {1, 8};
  int output_tokens = 256;
  int prompt_tokens = 1024;
  int repeats = 5;
  std::string commit = "unknown";
  std::string json_path;
};

struct ClosedLoopResult {
  bool ok = false;
  int completion_tokens = 0;
  Clock::time_point first_token;
  Clock::time_point last_token;
};

StreamResult RunPoem(const BenchOptions& options, int seed, int max_tokens) {
  return RunStream(
      options.target,
      {{"prompt", "《静夜思》 李白（唐）\n床前"}, {"max_tokens", max_tokens}, {"seed", seed}});
}

// One stream's output_tokens, over as many requests as it takes.
ClosedLoopResult RunClosedLoop(const BenchOptions& options, int seed) {
  ClosedLoopResult total;
  for (; total.completion_tokens < options.output_tokens; ++seed) {
    const StreamResult part =
        RunPoem(options, seed, options.output_tokens - total.completion_tokens);
    if (!part.ok() || part.arrivals.empty()) return {};
    if (!total.ok) total.first_token = part.arrivals.front();
    total.ok = true;
    total.completion_tokens += part.num_completion_tokens;
    total.last_token = part.arrivals.back();
  }
  return total;
}

// Tokens per second over all streams, from the first token of any to the last of any.
std::optional<double> DecodeRate(const BenchOptions& options, int num_streams, int round) {
  std::vector<ClosedLoopResult> results(num_streams);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_streams; ++i) {
    threads.emplace_back([&, i] {
      results[i] = RunClosedLoop(options, (round * num_streams + i) * options.output_tokens);
    });
  }
  for (std::thread& t : threads) t.join();
  auto first = Clock::time_point::max();
  auto last = Clock::time_point::min();
  int64_t tokens = 0;
  for (const ClosedLoopResult& r : results) {
    if (!r.ok) return std::nullopt;
    first = std::min(first, r.first_token);
    last = std::max(last, r.last_token);
    tokens += r.completion_tokens - 1;
  }
  return static_cast<double>(tokens) / Seconds(last - first);
}

// Prompt tokens per second of one request that asks for a single token. Ids are random, so that no
// prefix cache can help.
std::optional<double> PrefillRate(const BenchOptions& options, int round) {
  const StreamResult result =
      RunStream(options.target, {{"prompt", RandomPrompt(options.prompt_tokens, round)},
                                 {"max_tokens", 1},
                                 {"temperature", 0}});
  const double seconds = Seconds(Clock::now() - result.sent);
  if (!result.ok()) return std::nullopt;
  return options.prompt_tokens / seconds;
}

// Mean of a step's parts since the server started, times its count: /metrics holds sums.
struct StepTotals {
  double steps = 0;
  double wall_seconds = 0;     // plan sent until done everywhere, and until the next plan is sent
  double execute_seconds = 0;  // of it, in the slowest worker
};

StepTotals ReadStepTotals(const BenchOptions& options) {
  std::map<std::string, double> metrics = ReadMetrics(options.target);
  return {.steps = metrics["wintserve:step_seconds_count"],
          .wall_seconds =
              metrics["wintserve:step_seconds_sum"] + metrics["wintserve:schedule_seconds_sum"],
          .execute_seconds = metrics["wintserve:step_execute_seconds_sum"]};
}

int Run(const BenchOptions& options) {
  json report = {{"device", DeviceDescription()},
                 {"date", Today()},
                 {"commit", options.commit},
                 {"output_tokens", options.output_tokens},
                 {"prompt_tokens", options.prompt_tokens}};
  for (int streams : options.streams) {
    std::vector<double> rates;
    StepTotals before;
    for (int round = 0; round <= options.repeats; ++round) {
      const auto rate = DecodeRate(options, streams, round);
      if (!rate) {
        fmt::print(stderr, "a stream failed: is the server on port {} ready?\n",
                   options.target.port);
        return 1;
      }
      if (round > 0) rates.push_back(*rate);  // round 0 warms up
      if (round == 0) before = ReadStepTotals(options);
    }
    const StepTotals after = ReadStepTotals(options);
    const double steps = after.steps - before.steps;
    const double step_ms = 1000 * (after.wall_seconds - before.wall_seconds) / steps;
    const double execute_ms = 1000 * (after.execute_seconds - before.execute_seconds) / steps;
    fmt::print(
        "decode, {:2} streams: {:8.1f} tokens/s   step {:.3f} ms, of it {:.3f} ms outside the "
        "worker\n",
        streams, Median(rates), step_ms, step_ms - execute_ms);
    report["decode"].push_back({{"streams", streams},
                                {"tokens_per_second", Median(rates)},
                                {"all_runs", rates},
                                {"step_ms", step_ms},
                                {"outside_worker_ms", step_ms - execute_ms}});
  }
  std::vector<double> prefill;
  for (int round = 0; round <= options.repeats; ++round) {
    const auto rate = PrefillRate(options, round);
    if (!rate) {
      fmt::print(stderr, "a prefill request failed\n");
      return 1;
    }
    if (round > 0) prefill.push_back(*rate);
  }
  fmt::print("prefill, {} tokens: {:8.1f} tokens/s\n", options.prompt_tokens, Median(prefill));
  report["prefill"] = {{"tokens_per_second", Median(prefill)}, {"all_runs", prefill}};
  if (!options.json_path.empty()) std::ofstream(options.json_path) << report.dump(1) << "\n";
  return 0;
}

int Main(int argc, char** argv) {
  BenchOptions options;
  CLI::App app("Decode and prefill rates of a running wintserve, through HTTP");
  app.add_option("--host", options.target.host);
  app.add_option("--port", options.target.port);
  app.add_option("--metrics-port", options.target.metrics_port);
  app.add_option("--streams", options.streams)->delimiter(',');
  app.add_option("--output-tokens", options.output_tokens);
  app.add_option("--prompt-tokens", options.prompt_tokens);
  app.add_option("--repeats", options.repeats);
  app.add_option("--commit", options.commit, "What is measured, for the JSON report");
  app.add_option("--json", options.json_path);
  CLI11_PARSE(app, argc, argv);
  try {
    return Run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "serving_bench: {}\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace wintserve::bench

int main(int argc, char** argv) { return wintserve::bench::Main(argc, argv); }
