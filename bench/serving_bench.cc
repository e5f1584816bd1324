// Load generator: decode and prefill rates of a running server, measured through HTTP as a client
// sees them. Streams are a closed loop: all start together and none is replaced. The report names
// this machine as the device, so the server should run on it.
//
//   serving_bench --port 8180 --streams 1,8 --output-tokens 256 --prompt-tokens 1024 --json
//   out.json
#include <fmt/format.h>
#include <httplib.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "bench/provenance.h"

namespace {

using Clock = std::chrono::steady_clock;
using nlohmann::json;

struct BenchOptions {
  std::string host = "127.0.0.1";
  int port = 8180;
  int metrics_port = 8181;
  std::vector<int> streams = {1, 8};
  int output_tokens = 256;
  int prompt_tokens = 1024;
  int repeats = 5;
  std::string commit = "unknown";
  std::string json_path;
};

struct StreamResult {
  bool ok = false;
  int completion_tokens = 0;
  Clock::time_point first_token;
  Clock::time_point last_token;
};

double Seconds(Clock::duration d) { return std::chrono::duration<double>(d).count(); }

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

json CompletionBody(int seed, int max_tokens) {
  return {{"prompt", "《静夜思》 李白（唐）\n床前"},
          {"max_tokens", max_tokens},
          {"seed", seed},
          {"stream", true},
          {"stream_options", {{"include_usage", true}}}};
}

StreamResult RunStream(const BenchOptions& options, int seed, int max_tokens) {
  StreamResult result;
  std::string buffer;
  httplib::Client client(options.host, options.port);
  client.set_read_timeout(300);
  client.set_tcp_nodelay(true);
  httplib::Request request;
  request.method = "POST";
  request.path = "/v1/completions";
  request.set_header("Content-Type", "application/json");
  request.body = CompletionBody(seed, max_tokens).dump();
  request.content_receiver = [&](const char* data, size_t length, uint64_t, uint64_t) {
    const auto now = Clock::now();
    buffer.append(data, length);
    for (size_t end; (end = buffer.find("\n\n")) != std::string::npos; buffer.erase(0, end + 2)) {
      if (!buffer.starts_with("data: {")) continue;
      const json event = json::parse(buffer.begin() + 6, buffer.begin() + end);
      if (event.at("choices").empty()) {
        result.completion_tokens = event.at("usage").at("completion_tokens");
        result.ok = true;
        continue;
      }
      if (result.first_token == Clock::time_point()) result.first_token = now;
      result.last_token = now;
    }
    return true;
  };
  const httplib::Result response = client.send(request);
  if (!response || response->status != 200) result.ok = false;
  return result;
}

// One stream's output_tokens, over as many requests as it takes.
StreamResult RunClosedLoop(const BenchOptions& options, int seed) {
  StreamResult total;
  for (; total.completion_tokens < options.output_tokens; ++seed) {
    const StreamResult part =
        RunStream(options, seed, options.output_tokens - total.completion_tokens);
    if (!part.ok) return part;
    if (!total.ok) total.first_token = part.first_token;
    total.ok = true;
    total.completion_tokens += part.completion_tokens;
    total.last_token = part.last_token;
  }
  return total;
}

// Tokens per second over all streams, from the first token of any to the last of any.
std::optional<double> DecodeRate(const BenchOptions& options, int num_streams, int round) {
  std::vector<StreamResult> results(num_streams);
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
  for (const StreamResult& r : results) {
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
  std::mt19937 random(round);
  std::vector<int> prompt(options.prompt_tokens);
  for (int& id : prompt) id = 300 + static_cast<int>(random() % 7000);
  httplib::Client client(options.host, options.port);
  client.set_read_timeout(300);
  const std::string body = json{{"prompt", prompt}, {"max_tokens", 1}, {"temperature", 0}}.dump();
  const auto start = Clock::now();
  const httplib::Result response = client.Post("/v1/completions", body, "application/json");
  const double seconds = Seconds(Clock::now() - start);
  if (!response || response->status != 200) return std::nullopt;
  return options.prompt_tokens / seconds;
}

// Mean of a step's parts since the server started, times its count: /metrics holds sums.
struct StepTotals {
  double steps = 0;
  double wall_seconds = 0;     // plan sent until done everywhere, and until the next plan is sent
  double execute_seconds = 0;  // of it, in the slowest worker
};

std::optional<StepTotals> ReadStepTotals(const BenchOptions& options) {
  httplib::Client client(options.host, options.metrics_port);
  const httplib::Result response = client.Get("/metrics");
  if (!response || response->status != 200) return std::nullopt;
  StepTotals totals;
  std::istringstream lines(response->body);
  for (std::string line; std::getline(lines, line);) {
    const size_t space = line.rfind(' ');
    const std::string name = line.substr(0, space);
    const auto value = [&] { return std::stod(line.substr(space)); };
    if (name == "wintserve:step_seconds_count") totals.steps = value();
    if (name == "wintserve:step_seconds_sum" || name == "wintserve:schedule_seconds_sum") {
      totals.wall_seconds += value();
    }
    if (name == "wintserve:step_execute_seconds_sum") totals.execute_seconds = value();
  }
  return totals;
}

int Run(const BenchOptions& options) {
  json report = {{"device", wintserve::bench::DeviceDescription()},
                 {"date", wintserve::bench::Today()},
                 {"commit", options.commit},
                 {"output_tokens", options.output_tokens},
                 {"prompt_tokens", options.prompt_tokens}};
  for (int streams : options.streams) {
    std::vector<double> rates;
    std::optional<StepTotals> before;
    for (int round = 0; round <= options.repeats; ++round) {
      const auto rate = DecodeRate(options, streams, round);
      if (!rate) {
        fmt::print(stderr, "a stream failed: is the server on port {} ready?\n", options.port);
        return 1;
      }
      if (round > 0) rates.push_back(*rate);  // round 0 warms up
      if (round == 0) before = ReadStepTotals(options);
    }
    const auto after = ReadStepTotals(options);
    if (!before || !after) {
      fmt::print(stderr, "no /metrics on port {}\n", options.metrics_port);
      return 1;
    }
    const double steps = after->steps - before->steps;
    const double step_ms = 1000 * (after->wall_seconds - before->wall_seconds) / steps;
    const double execute_ms = 1000 * (after->execute_seconds - before->execute_seconds) / steps;
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

}  // namespace

int main(int argc, char** argv) {
  BenchOptions options;
  CLI::App app("Decode and prefill rates of a running wintserve, through HTTP");
  app.add_option("--host", options.host);
  app.add_option("--port", options.port);
  app.add_option("--metrics-port", options.metrics_port);
  app.add_option("--streams", options.streams)->delimiter(',');
  app.add_option("--output-tokens", options.output_tokens);
  app.add_option("--prompt-tokens", options.prompt_tokens);
  app.add_option("--repeats", options.repeats);
  app.add_option("--commit", options.commit, "What is measured, for the JSON report");
  app.add_option("--json", options.json_path);
  CLI11_PARSE(app, argc, argv);
  return Run(options);
}
