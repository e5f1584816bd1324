// Load on a running server, as clients see it: one scenario a call, numbers as JSON.
//
//   load_generator --port 8180 --metrics-port 8181 --json out.json interference --streams 16
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <exception>
#include <fstream>

#include "bench/load_scenarios.h"
#include "bench/provenance.h"

namespace wintserve::bench {
namespace {

int Main(int argc, char** argv) {
  CLI::App app("Measures a running wintserve through HTTP");
  Target target;
  std::string json_path;
  app.add_option("--host", target.host);
  app.add_option("--port", target.port);
  app.add_option("--metrics-port", target.metrics_port);
  app.add_option("--json", json_path, "Write the result there as well");
  app.require_subcommand(1);

  CachedPrefixOptions cached;
  auto* cached_prefix = app.add_subcommand("cached-prefix", "Time to first token, cold and cached");
  cached_prefix->add_option("--prompt-tokens", cached.prompt_tokens);
  cached_prefix->add_option("--repeats", cached.repeats);

  DecodeOptions decode;
  auto* together = app.add_subcommand("decode", "Streams that begin together");
  together->add_option("--streams", decode.streams)->check(CLI::PositiveNumber);
  together->add_option("--prompt-tokens", decode.prompt_tokens)->check(CLI::PositiveNumber);
  together->add_option("--output-tokens", decode.output_tokens)->check(CLI::Range(2, 1'000'000));
  together->add_option("--repeats", decode.repeats)->check(CLI::PositiveNumber);

  InterferenceOptions interference;
  auto* beside = app.add_subcommand("interference", "Decoding streams beside long prompts");
  beside->add_option("--streams", interference.streams);
  beside->add_option("--prompt-tokens", interference.prompt_tokens);
  beside->add_option("--seconds", interference.seconds);

  WaitingStreamsOptions waiting;
  auto* queued = app.add_subcommand("waiting-streams", "Active streams beside queued ones");
  queued->add_option("--active", waiting.active);
  queued->add_option("--waiting", waiting.waiting);
  queued->add_option("--seconds", waiting.seconds);
  queued->add_option("--rounds", waiting.rounds);

  TraceOptions trace;
  auto* open_loop = app.add_subcommand("trace", "Requests of ShareGPT-like lengths, open loop");
  open_loop->add_option("--requests", trace.requests);
  open_loop->add_option("--rate", trace.requests_per_second, "Requests per second; 0: all at once");
  open_loop->add_option("--duration-seconds", trace.duration_seconds, "Instead of --requests");
  open_loop->add_option("--seed", trace.seed);
  open_loop->add_option("--max-prompt-tokens", trace.max_prompt_tokens);
  open_loop->add_option("--max-output-tokens", trace.max_output_tokens);
  open_loop->add_option("--shared-prefix-share", trace.shared_prefix_share);
  open_loop->add_option("--abort-share", trace.abort_share);
  open_loop->add_option("--whole-share", trace.whole_share);
  open_loop->add_option("--burst-seconds", trace.burst_seconds)->check(CLI::PositiveNumber);
  open_loop->add_option("--burst-requests", trace.burst_requests);
  CLI11_PARSE(app, argc, argv);

  nlohmann::json result;
  try {
    if (*cached_prefix) result = MeasureCachedPrefix(target, cached);
    if (*together) result = MeasureDecode(target, decode);
    if (*beside) result = MeasureInterference(target, interference);
    if (*queued) result = MeasureWaitingStreams(target, waiting);
    if (*open_loop) result = MeasureTrace(target, trace);
  } catch (const std::exception& error) {
    fmt::print(stderr, "load_generator: {}\n", error.what());
    return 1;
  }
  result["device"] = DeviceDescription();
  result["date"] = Today();
  if (!json_path.empty()) std::ofstream(json_path) << result.dump(1) << "\n";
  for (auto& [key, value] : result.items()) {
    if (!key.starts_with("all_")) fmt::print("{}: {}\n", key, value.dump());
  }
  return 0;
}

}  // namespace
}  // namespace wintserve::bench

int main(int argc, char** argv) { return wintserve::bench::Main(argc, argv); }
