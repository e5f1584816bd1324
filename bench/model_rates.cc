// Load time, decode and prefill rates of a model on one device, through the worker's own loader and
// step runner but without the other processes.
//
//   model_rates --model models/poet --device cuda --batches 1,8,64 --json out.json
//
// Decoding: every sequence has a prompt of --context-tokens random ids; then --steps plans of one
// greedy token a sequence, one plan begun ahead of the one that is waited for, as a worker gets
// them; with --device cuda with CUDA graphs and without. idle is the device's time from the end of
// a step to the begin of the next, host what the call that begins a step takes, graph a pass alone,
// one launch after the other: what the step takes beyond it are the batch on its way to the device,
// the ids on their way back, and waiting.
// Prefill: prompts of --prompt-tokens random ids, one alone and several in one plan; time to
// the sampled ids. Each is the median of --repeats runs after one that warms up. device_ms is what
// the step itself took on the device, from its events.
//
// --kernel-times prints, behind each batch and number of prompts, a table of the kernels of
// --profiled-steps more steps (of one more prefill), per step:
//   us a step   the sum of the kernel's runs; where runs overlap, their time counts for both
//   alone       what was left of them behind the kernels that had begun before: where kernels begin
//               while others run (kernels/cuda/launch.h) this is what the kernel adds to the step
//   gap         when nothing ran, right before them
// alone and gap add up to the step. Recording makes launches dearer: compare the rates with those
// of a run without. --kernel-list writes every run to a file: begin and duration in microseconds,
// name.
//
// --profile-step marks the same for another profiler, such as
//   ncu --profile-from-start off --clock-control none --metrics gpu__time_duration.sum model_rates
//   …
//
// --graphs on (off) leaves the passes without (with) CUDA graphs out.
//
// A mixture of experts reads as many experts as its tokens went to, so that is printed for the last
// step of a batch: the fewest distinct experts of a layer and their mean over the layers. With
// --load-format dummy any config will do as a model (models/shapes).
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "bench/kernel_table.h"
#include "bench/provenance.h"
#include "common/config/serve_options.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "engine_worker/collectives/rank_group.h"
#include "engine_worker/collectives/single_rank_collective.h"
#include "engine_worker/runner/load_model.h"
#include "engine_worker/runner/step_runner.h"
#ifdef WINTSERVE_HAS_CUDA
#include <cuda_profiler_api.h>

#include "bench/kernel_times.h"
#endif

namespace wintserve::bench {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

struct RateOptions {
  ServeOptions serve;
  std::vector<int> batches = {1, 8, 64};
  std::vector<int> prompts = {1, 8};
  int context_tokens = 128;
  int prompt_tokens = 1024;
  int steps = 256;
  int repeats = 5;
  std::string graphs = "both";  // decoding: on, off, both
  int profiled_steps = 1;
  bool profile_step = false;
  bool kernel_times = false;
  std::string kernel_list_path;
  std::string json_path;

  bool profiles() const { return profile_step || kernel_times; }
};

// Runs what is to be profiled: marked for a profiler, or with its kernels' times in a table.
#ifdef WINTSERVE_HAS_CUDA
class Profiler {
 public:
  static absl::StatusOr<Profiler> Create(const RateOptions& options) {
    Profiler profiler;
    profiler.kernel_list_path_ = options.kernel_list_path;
    if (options.kernel_times) {
      ASSIGN_OR_RETURN(profiler.times_, KernelTimes::Create());
      if (!options.kernel_list_path.empty()) std::ofstream(options.kernel_list_path);
    }
    return profiler;
  }

  // The device is idle before and after.
  absl::Status Run(const std::string& name, int num_steps,
                   const std::function<absl::Status()>& steps) {
    if (times_ == nullptr) {
      static_cast<void>(cudaProfilerStart());
      const absl::Status status = steps();
      static_cast<void>(cudaProfilerStop());
      return status;
    }
    RETURN_IF_ERROR(times_->Begin());
    RETURN_IF_ERROR(steps());
    ASSIGN_OR_RETURN(std::vector<KernelRun> runs, times_->End());
    if (!kernel_list_path_.empty()) RETURN_IF_ERROR(AppendList(name, runs));
    fmt::print("kernels of {}, {} step{}:\n{}", name, num_steps, num_steps == 1 ? "" : "s",
               KernelTableText(MakeKernelTable(std::move(runs)), num_steps));
    return absl::OkStatus();
  }

 private:
  absl::Status AppendList(const std::string& name, const std::vector<KernelRun>& runs) const {
    std::ofstream file(kernel_list_path_, std::ios::app);
    file << name << "\n";
    for (const KernelRun& run : runs) {
      file << fmt::format("{:.3f} {:.3f} {}\n",
                          1e-3 * static_cast<double>(run.begin_ns - runs.front().begin_ns),
                          1e-3 * static_cast<double>(run.end_ns - run.begin_ns), run.name);
    }
    file.close();
    return file ? absl::OkStatus()
                : absl::UnknownError(fmt::format("cannot write {}", kernel_list_path_));
  }

  std::string kernel_list_path_;
  std::unique_ptr<KernelTimes> times_;  // null: another profiler
};
#else
class Profiler {
 public:
  static absl::StatusOr<Profiler> Create(const RateOptions& options) {
    if (!options.profiles()) return Profiler();
    return absl::InvalidArgumentError("--kernel-times and --profile-step need a build with CUDA");
  }
  absl::Status Run(const std::string& /*name*/, int /*num_steps*/,
                   const std::function<absl::Status()>& steps) {
    return steps();
  }
};
#endif

struct Rate {
  double tokens_per_second = 0;
  double device_ms = 0;  // of a step, the mean
};

// Distinct experts that a layer's tokens went to, over the layers that have any.
struct DistinctExperts {
  int layers = 0;
  int fewest = 0;
  double mean = 0;
  int of = 0;
};

struct DecodeRate {
  Rate rate;
  int64_t idle_us_p50 = 0;
  int64_t idle_us_p99 = 0;
  double host_us_p50 = 0;
  double graph_ms = 0;  // 0: without graphs
  DistinctExperts experts = {};
};

template <typename T>
T Quantile(std::vector<T> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

// Of the last pass, which had num_tokens.
absl::StatusOr<DistinctExperts> CountExperts(const Model& model, int num_tokens) {
  DistinctExperts counted;
  for (int layer = 0; layer < model.num_layers(); ++layer) {
    const RoutedExperts routed = model.routed_experts(layer);
    if (routed.ids == nullptr) continue;
    std::vector<int32_t> ids(static_cast<size_t>(num_tokens) * routed.top_k);
    RETURN_IF_ERROR(model.backend()->CopyToHost(
        ids.data(), routed.ids, static_cast<int64_t>(ids.size() * sizeof(int32_t))));
    const auto distinct = static_cast<int>(std::set<int32_t>(ids.begin(), ids.end()).size());
    counted.fewest = counted.layers == 0 ? distinct : std::min(counted.fewest, distinct);
    counted.mean += distinct;
    counted.of = routed.num_experts;
    ++counted.layers;
  }
  if (counted.layers > 0) counted.mean /= counted.layers;
  return counted;
}

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

double TokensPerSecond(const Rate& rate) { return rate.tokens_per_second; }
double TokensPerSecond(const DecodeRate& decode) { return decode.rate.tokens_per_second; }

template <typename T>
T MedianOf(std::vector<T> rates) {
  std::sort(rates.begin(), rates.end(),
            [](const T& a, const T& b) { return TokensPerSecond(a) < TokensPerSecond(b); });
  return rates[rates.size() / 2];
}

uint32_t BlocksFor(int tokens) {
  return static_cast<uint32_t>((tokens + kernels::kKvBlockTokens - 1) / kernels::kKvBlockTokens);
}

// Sequences of one length on a pool of their own.
class Sequences {
 public:
  static absl::StatusOr<std::unique_ptr<Sequences>> Create(Model* model, Collective* collective,
                                                           int num_sequences, int max_tokens,
                                                           bool use_graphs) {
    std::unique_ptr<Sequences> made(new Sequences(num_sequences, BlocksFor(max_tokens)));
    const uint32_t num_blocks = num_sequences * made->blocks_each_;
    ASSIGN_OR_RETURN(made->pool_,
                     model->backend()->Allocate(int64_t{num_blocks} * model->kv_block_bytes()));
    const StepRunnerConfig config = {
        .num_blocks = num_blocks,
        .max_slots = static_cast<uint32_t>(num_sequences),
        .max_tokens = static_cast<uint32_t>(num_sequences * max_tokens),
        .max_sequence_tokens = static_cast<uint32_t>(max_tokens),
        .sampled_vocab_size = static_cast<uint32_t>(model->vocab_size()),
        .use_graphs = use_graphs};
    ASSIGN_OR_RETURN(made->runner_,
                     StepRunner::Create(config, model, collective, made->pool_->data(), nullptr));
    RETURN_IF_ERROR(made->runner_->WarmUp());
    made->backend_ = model->backend();
    made->vocab_size_ = model->vocab_size();
    return made;
  }

  // A prompt of random ids in every slot.
  absl::StatusOr<Rate> Prefill(int prompt_tokens) {
    StepPlan plan = {.step = ++step_};
    for (uint32_t slot = 0; slot < num_sequences_; ++slot) {
      std::vector<BlockId> blocks;
      for (uint32_t i = 0; i < blocks_each_; ++i) {
        blocks.push_back(BlockId{static_cast<int32_t>(slot * blocks_each_ + i)});
      }
      std::vector<int32_t> ids(prompt_tokens);
      for (int32_t& id : ids) id = static_cast<int32_t>(random_() % vocab_size_);
      plan.slot_init.push_back({slot, {.temperature = 0}, std::move(blocks)});
      plan.rows.push_back({slot, 0, static_cast<uint32_t>(prompt_tokens), true, std::move(ids)});
    }
    position_ = prompt_tokens;
    const auto begin = Clock::now();
    ASSIGN_OR_RETURN(const StepDone done, runner_->Apply(plan, /*plan_hash=*/0));
    return Rate{num_sequences_ * prompt_tokens / Seconds(Clock::now() - begin),
                1e-3 * done.execute_us};
  }

  absl::StatusOr<DecodeRate> Decode(int steps) {
    constexpr size_t kPlansInHand = 2;
    std::vector<std::unique_ptr<PendingStep>> begun;  // all stay, for the times between them
    size_t num_done = 0;
    double device_ms = 0;
    std::vector<double> host_us;
    const auto wait = [&]() -> absl::Status {
      ASSIGN_OR_RETURN(const StepDone done, begun[num_done++]->Wait());
      device_ms += 1e-3 * done.execute_us;
      return absl::OkStatus();
    };
    const auto begin = Clock::now();
    for (int i = 0; i < steps; ++i, ++position_) {
      StepPlan plan = {.step = ++step_};
      for (uint32_t slot = 0; slot < num_sequences_; ++slot) {
        plan.rows.push_back({slot, static_cast<uint32_t>(position_), 1, true, {}});
      }
      const auto step_begin = Clock::now();
      ASSIGN_OR_RETURN(auto step, runner_->Begin(plan, /*plan_hash=*/0));
      host_us.push_back(1e6 * Seconds(Clock::now() - step_begin));
      begun.push_back(std::move(step));
      if (begun.size() - num_done == kPlansInHand) RETURN_IF_ERROR(wait());
    }
    while (num_done < begun.size()) RETURN_IF_ERROR(wait());
    DecodeRate decode = {
        .rate = {num_sequences_ * steps / Seconds(Clock::now() - begin), device_ms / steps}};
    std::vector<int64_t> idle_us;
    for (size_t i = 1; i < begun.size(); ++i) {
      idle_us.push_back(begun[i]->MicrosecondsAfter(*begun[i - 1]));
    }
    decode.idle_us_p50 = Quantile(idle_us, 0.5);
    decode.idle_us_p99 = Quantile(std::move(idle_us), 0.99);
    decode.host_us_p50 = Quantile(std::move(host_us), 0.5);
    return decode;
  }

  // Of the last batch's pass, again and again; the last tokens are computed anew. 0 without graphs.
  absl::StatusOr<double> GraphMs() {
    constexpr int kLaunches = 100;
    const StepGraphs::Entry* const graph = runner_->graphs().Find(num_sequences_);
    if (graph == nullptr) return 0;
    const std::unique_ptr<kernels::Event> begin = backend_->Record();
    for (int i = 0; i < kLaunches; ++i) RETURN_IF_ERROR(backend_->Launch(*graph->graph));
    const std::unique_ptr<kernels::Event> end = backend_->Record();
    RETURN_IF_ERROR(begin->Wait());
    RETURN_IF_ERROR(end->Wait());
    return 1e-3 * static_cast<double>(end->MicrosecondsSince(*begin)) / kLaunches;
  }

  absl::Status Release() {
    StepPlan plan = {.step = ++step_};
    for (uint32_t slot = 0; slot < num_sequences_; ++slot) plan.slot_release.push_back(slot);
    return runner_->Apply(plan, /*plan_hash=*/0).status();
  }

 private:
  Sequences(int num_sequences, uint32_t blocks_each)
      : num_sequences_(num_sequences), blocks_each_(blocks_each) {}

  const uint32_t num_sequences_;
  const uint32_t blocks_each_;
  kernels::Backend* backend_ = nullptr;
  int vocab_size_ = 0;
  int position_ = 0;
  uint64_t step_ = 0;
  std::mt19937 random_{1};
  std::unique_ptr<kernels::Buffer> pool_;
  std::unique_ptr<StepRunner> runner_;
};

absl::StatusOr<DecodeRate> MeasureDecode(const RateOptions& options, Model* model,
                                         Collective* collective, Profiler* profiler, int batch,
                                         bool use_graphs) {
  const int max_tokens = options.context_tokens + options.steps + options.profiled_steps;
  ASSIGN_OR_RETURN(const auto sequences,
                   Sequences::Create(model, collective, batch, max_tokens, use_graphs));
  std::vector<DecodeRate> rates;
  for (int run = 0; run <= options.repeats; ++run) {
    RETURN_IF_ERROR(sequences->Prefill(options.context_tokens).status());
    ASSIGN_OR_RETURN(DecodeRate rate, sequences->Decode(options.steps));
    ASSIGN_OR_RETURN(rate.graph_ms, sequences->GraphMs());
    ASSIGN_OR_RETURN(rate.experts, CountExperts(*model, batch));
    if (run == options.repeats && options.profiles()) {
      RETURN_IF_ERROR(
          profiler->Run(fmt::format("decode, batch {}{}", batch, use_graphs ? ", graphs" : ""),
                        options.profiled_steps,
                        [&] { return sequences->Decode(options.profiled_steps).status(); }));
    }
    RETURN_IF_ERROR(sequences->Release());
    if (run > 0) rates.push_back(rate);
  }
  return MedianOf(std::move(rates));
}

absl::StatusOr<Rate> MeasurePrefill(const RateOptions& options, Model* model,
                                    Collective* collective, Profiler* profiler, int num_prompts) {
  ASSIGN_OR_RETURN(const auto sequences,
                   Sequences::Create(model, collective, num_prompts, options.prompt_tokens,
                                     /*use_graphs=*/false));
  std::vector<Rate> rates;
  for (int run = 0; run <= options.repeats; ++run) {
    ASSIGN_OR_RETURN(const Rate rate, sequences->Prefill(options.prompt_tokens));
    RETURN_IF_ERROR(sequences->Release());
    if (run > 0) rates.push_back(rate);
  }
  if (options.profiles()) {
    RETURN_IF_ERROR(
        profiler->Run(fmt::format("prefill, {} prompts of {}", num_prompts, options.prompt_tokens),
                      1, [&] { return sequences->Prefill(options.prompt_tokens).status(); }));
    RETURN_IF_ERROR(sequences->Release());
  }
  return MedianOf(std::move(rates));
}

absl::Status Run(const RateOptions& options) {
  ASSIGN_OR_RETURN(Profiler profiler, Profiler::Create(options));
  RankGroup group(/*rank=*/0, /*world_size=*/1);
  const auto begin = Clock::now();
  ASSIGN_OR_RETURN(const LoadedModel loaded, LoadModel(options.serve, &group));
  group.Bind(MakeSingleRankCollective());
  const double load_seconds = Seconds(Clock::now() - begin);
  json report = {{"device", loaded.backend->name()},
                 {"host", DeviceDescription()},
                 {"date", Today()},
                 {"model", options.serve.model},
                 {"load_format", options.serve.load_format},
                 {"load_seconds", load_seconds},
                 {"max_num_batched_tokens", options.serve.max_num_batched_tokens},
                 {"context_tokens", options.context_tokens},
                 {"steps", options.steps},
                 {"prompt_tokens", options.prompt_tokens},
                 {"repeats", options.repeats}};
  fmt::print("{}, {}, {}\n", loaded.backend->name(), DeviceDescription(), Today());
  fmt::print("load:                           {:10.2f} s\n", load_seconds);
  for (const int batch : options.batches) {
    for (const bool use_graphs : {false, true}) {
      if (use_graphs && loaded.backend->uses_host_memory()) continue;
      if (options.graphs == (use_graphs ? "off" : "on")) continue;
      ASSIGN_OR_RETURN(const DecodeRate decode, MeasureDecode(options, loaded.model.get(), &group,
                                                              &profiler, batch, use_graphs));
      const double step_ms = 1e3 * batch / decode.rate.tokens_per_second;
      fmt::print(
          "decode, batch {:3}{}: {:10.0f} tokens/s  step {:.3f} ms, device {:.3f} ms, idle {} us "
          "(p99 {}), host {:.0f} us{}\n",
          batch, use_graphs ? ", graphs   " : ", no graphs", decode.rate.tokens_per_second, step_ms,
          decode.rate.device_ms, decode.idle_us_p50, decode.idle_us_p99, decode.host_us_p50,
          use_graphs ? fmt::format(", graph {:.3f} ms", decode.graph_ms) : std::string());
      report["decode"].push_back({{"batch", batch},
                                  {"graphs", use_graphs},
                                  {"tokens_per_second", decode.rate.tokens_per_second},
                                  {"step_ms", step_ms},
                                  {"device_ms", decode.rate.device_ms},
                                  {"idle_us_p50", decode.idle_us_p50},
                                  {"idle_us_p99", decode.idle_us_p99},
                                  {"host_us_p50", decode.host_us_p50},
                                  {"graph_ms", decode.graph_ms}});
      const DistinctExperts& experts = decode.experts;
      if (experts.layers == 0) continue;
      fmt::print("  experts a layer: {} in the layer with fewest, {:.1f} on average, of {}\n",
                 experts.fewest, experts.mean, experts.of);
      report["decode"].back()["fewest_experts"] = experts.fewest;
      report["decode"].back()["mean_experts"] = experts.mean;
    }
  }
  for (const int prompts : options.prompts) {
    ASSIGN_OR_RETURN(const Rate rate,
                     MeasurePrefill(options, loaded.model.get(), &group, &profiler, prompts));
    fmt::print("prefill, {:2} prompts of {:5}:   {:10.0f} tokens/s  device {:.3f} ms\n", prompts,
               options.prompt_tokens, rate.tokens_per_second, rate.device_ms);
    report["prefill"].push_back({{"prompts", prompts},
                                 {"tokens_per_second", rate.tokens_per_second},
                                 {"device_ms", rate.device_ms}});
  }
  if (options.json_path.empty()) return absl::OkStatus();
  std::ofstream file(options.json_path);
  file << report.dump(1) << "\n";
  file.close();
  return file ? absl::OkStatus()
              : absl::UnknownError(fmt::format("cannot write {}", options.json_path));
}

int Main(int argc, char** argv) {
  RateOptions options;
  options.serve.model = "models/poet";
  options.serve.max_num_batched_tokens = 2048;
  std::string log_level = "warning";
  CLI::App app("Decode and prefill rates of a model through the step runner");
  const auto positive = CLI::Range(1, 1 << 20);
  app.add_option("--model", options.serve.model);
  app.add_option("--load-format", options.serve.load_format)
      ->check(CLI::IsMember({"auto", "dummy"}));
  app.add_option("--dummy-router-skew", options.serve.dummy_router_skew)
      ->check(CLI::Range(0.0, 1000.0));
  app.add_option("--kv-cache-dtype", options.serve.kv_cache_dtype)
      ->check(CLI::IsMember({"auto", "bfloat16", "int8"}));
  app.add_option("--log-level", log_level)
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  app.add_option("--device", options.serve.device)->check(CLI::IsMember({"cpu", "cuda"}));
  app.add_option("--cpu-threads", options.serve.cpu_threads);
  app.add_option("--max-num-batched-tokens", options.serve.max_num_batched_tokens)->check(positive);
  app.add_option("--batches", options.batches)->delimiter(',')->check(positive);
  app.add_option("--prompts", options.prompts)->delimiter(',')->check(positive);
  app.add_option("--context-tokens", options.context_tokens)->check(positive);
  app.add_option("--prompt-tokens", options.prompt_tokens)->check(positive);
  app.add_option("--steps", options.steps)->check(positive);
  app.add_option("--repeats", options.repeats)->check(positive);
  app.add_option("--graphs", options.graphs)->check(CLI::IsMember({"on", "off", "both"}));
  app.add_option("--profiled-steps", options.profiled_steps)->check(positive);
  app.add_flag("--profile-step", options.profile_step);
  CLI::Option* const kernel_times = app.add_flag("--kernel-times", options.kernel_times);
  app.add_option("--kernel-list", options.kernel_list_path)->needs(kernel_times);
  app.add_option("--json", options.json_path);
  CLI11_PARSE(app, argc, argv);
  for (const std::vector<int>* counts : {&options.batches, &options.prompts}) {
    const int largest = counts->empty() ? 1 : *std::max_element(counts->begin(), counts->end());
    options.serve.max_num_seqs = std::max(options.serve.max_num_seqs, largest);
  }
  InitLog("model_rates", log_level);
  const absl::Status status = Run(options);
  if (status.ok()) return 0;
  fmt::print(stderr, "model_rates: {}\n", std::string(status.message()));
  return 1;
}

}  // namespace
}  // namespace wintserve::bench

int main(int argc, char** argv) { return wintserve::bench::Main(argc, argv); }
