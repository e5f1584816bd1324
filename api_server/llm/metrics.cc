#include "api_server/llm/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <algorithm>
#include <string>

namespace wintserve {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;

const Buckets kRequestSeconds = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Buckets kTimeToFirstTokenSeconds = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                          1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const Buckets kTimePerOutputTokenSeconds = {.01, .025, .05, .075, .1,  .15, .2, .3, .4, .5,
                                            .75, 1,    2.5, 5,    7.5, 10,  20, 40, 80};
const Buckets kTokens = {1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000};
const Buckets kStepSeconds = {.0001, .00025, .0005, .001, .0025, .005, .01, .025,
                              .05,   .1,     .25,   .5,   1,     2.5,  5,   10};
const Buckets kScheduleSeconds = {.00001, .000025, .00005, .0001, .00025,
                                  .0005,  .001,    .0025,  .005,  .01};

prometheus::Counter& Counter(prometheus::Registry* registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(*registry).Add({});
}
prometheus::Gauge& Gauge(prometheus::Registry* registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(*registry).Add({});
}
prometheus::Histogram& Histogram(prometheus::Registry* registry, const char* name, const char* help,
                                 const Buckets& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry).Add({}, buckets);
}

}  // namespace

struct EngineMetrics::Series {
  explicit Series(std::shared_ptr<prometheus::Registry> r) : registry(std::move(r)) {}

  const std::shared_ptr<prometheus::Registry> registry;
  EngineFacts facts;

#define COUNTER(member, help) \
  prometheus::Counter& member = Counter(registry.get(), "fastdeploy:" #member, help)
#define GAUGE(member, help) \
  prometheus::Gauge& member = Gauge(registry.get(), "fastdeploy:" #member, help)
#define HISTOGRAM(member, buckets, help) \
  prometheus::Histogram& member = Histogram(registry.get(), "fastdeploy:" #member, help, buckets)

  COUNTER(requests_number_total, "Requests that entered the engine.");
  COUNTER(request_success_total, "Requests that finished, for any reason but an error.");
  COUNTER(prompt_tokens_total, "Prompt tokens of the requests that entered the engine.");
  COUNTER(generation_tokens_total, "Tokens sampled for clients.");
  GAUGE(num_requests_running, "Sequences that hold a slot.");
  GAUGE(num_requests_waiting, "Sequences in the queue.");
  GAUGE(batch_size, "Sequences in the last step.");
  GAUGE(max_batch_size, "Slots.");
  GAUGE(available_batch_size, "Free slots.");
  GAUGE(gpu_cache_usage_perc, "Share of the KV blocks in use, 0 to 1.");
  GAUGE(available_gpu_block_num, "KV blocks that a request could get.");
  GAUGE(free_gpu_block_num, "KV blocks that hold nothing.");
  GAUGE(max_gpu_block_num, "KV blocks of the pool.");
  GAUGE(available_gpu_resource, "Share of the KV blocks that a request could get, 0 to 1.");
  HISTOGRAM(time_to_first_token_seconds, kTimeToFirstTokenSeconds, "Arrival to first token.");
  HISTOGRAM(time_per_output_token_seconds, kTimePerOutputTokenSeconds,
            "From a token of a choice to its next.");
  HISTOGRAM(e2e_request_latency_seconds, kRequestSeconds, "Arrival to last token.");
  HISTOGRAM(request_inference_time_seconds, kRequestSeconds, "Start of prefill to last token.");
  HISTOGRAM(request_queue_time_seconds, kRequestSeconds, "Arrival to start of prefill.");
  HISTOGRAM(request_prefill_time_seconds, kRequestSeconds, "Start of prefill to first token.");
  HISTOGRAM(request_decode_time_seconds, kRequestSeconds, "First to last token.");
  HISTOGRAM(request_prompt_tokens, kTokens, "Prompt tokens of a finished request.");
  HISTOGRAM(request_generation_tokens, kTokens, "Generated tokens of a finished request.");
  HISTOGRAM(request_params_max_tokens, kTokens, "max_tokens of a request.");

#undef COUNTER
#undef GAUGE
#undef HISTOGRAM

  prometheus::Histogram& step_seconds =
      Histogram(registry.get(), "wintserve:step_seconds",
                "From sending a plan until every engine worker has done it.", kStepSeconds);
  prometheus::Histogram& step_execute_seconds = Histogram(
      registry.get(), "wintserve:step_execute_seconds",
      "What the slowest engine worker spent on a step: forward pass and sampling.", kStepSeconds);
  prometheus::Histogram& step_tokens = Histogram(registry.get(), "wintserve:step_tokens",
                                                 "Prompt and decode tokens of a step.", kTokens);
  prometheus::Histogram& schedule_seconds =
      Histogram(registry.get(), "wintserve:schedule_seconds",
                "From the end of a step until the next plan is sent.", kScheduleSeconds);
};

EngineMetrics::EngineMetrics(std::shared_ptr<prometheus::Registry> registry)
    : series_(std::make_unique<Series>(std::move(registry))) {}
EngineMetrics::~EngineMetrics() = default;

void EngineMetrics::RecordFacts(const EngineFacts& facts) {
  series_->facts = facts;
  series_->max_batch_size.Set(facts.max_num_seqs);
  series_->max_gpu_block_num.Set(facts.num_blocks);
  prometheus::BuildGauge()
      .Name("fastdeploy:cache_config_info")
      .Help("The KV cache's configuration, as labels.")
      .Register(*series_->registry)
      .Add({{"block_size", std::to_string(facts.block_size_tokens)},
            {"num_gpu_blocks", std::to_string(facts.num_blocks)},
            {"pool_bytes", std::to_string(facts.pool_bytes)},
            {"max_num_seqs", std::to_string(facts.max_num_seqs)},
            {"max_model_len", std::to_string(facts.max_model_len)},
            {"max_num_batched_tokens", std::to_string(facts.max_num_batched_tokens)}})
      .Set(1);
  RecordState({});
}

void EngineMetrics::RecordArrival(int num_prompt_tokens, int max_tokens) {
  series_->requests_number_total.Increment();
  series_->prompt_tokens_total.Increment(num_prompt_tokens);
  series_->request_params_max_tokens.Observe(max_tokens);
}

void EngineMetrics::RecordStart(double queue_seconds) {
  series_->request_queue_time_seconds.Observe(queue_seconds);
}

void EngineMetrics::RecordFirstToken(double since_arrival_seconds, double since_start_seconds) {
  series_->time_to_first_token_seconds.Observe(since_arrival_seconds);
  series_->request_prefill_time_seconds.Observe(since_start_seconds);
}

void EngineMetrics::RecordNextToken(double since_last_token_seconds) {
  series_->time_per_output_token_seconds.Observe(since_last_token_seconds);
}

void EngineMetrics::RecordGeneratedTokens(int num_tokens) {
  series_->generation_tokens_total.Increment(num_tokens);
}

void EngineMetrics::RecordSuccess(double since_arrival_seconds, double since_start_seconds,
                                  double since_first_token_seconds, int num_prompt_tokens,
                                  int num_generated_tokens) {
  series_->request_success_total.Increment();
  series_->e2e_request_latency_seconds.Observe(since_arrival_seconds);
  series_->request_inference_time_seconds.Observe(since_start_seconds);
  series_->request_decode_time_seconds.Observe(since_first_token_seconds);
  series_->request_prompt_tokens.Observe(num_prompt_tokens);
  series_->request_generation_tokens.Observe(num_generated_tokens);
}

void EngineMetrics::RecordStep(double step_seconds, double execute_seconds, int num_sequences,
                               int num_tokens) {
  series_->step_seconds.Observe(step_seconds);
  series_->step_execute_seconds.Observe(execute_seconds);
  series_->step_tokens.Observe(num_tokens);
  series_->batch_size.Set(num_sequences);
}

void EngineMetrics::RecordSchedule(double schedule_seconds) {
  series_->schedule_seconds.Observe(schedule_seconds);
}

void EngineMetrics::RecordState(const SchedulerStats& stats) {
  const EngineFacts& facts = series_->facts;
  const int num_free = facts.num_blocks - stats.num_blocks_held;
  const double free_share = static_cast<double>(num_free) / std::max(1, facts.num_blocks);
  series_->num_requests_running.Set(stats.num_running);
  series_->num_requests_waiting.Set(stats.num_waiting);
  series_->available_batch_size.Set(facts.max_num_seqs - stats.num_running);
  series_->gpu_cache_usage_perc.Set(1 - free_share);
  series_->available_gpu_block_num.Set(num_free);
  series_->free_gpu_block_num.Set(num_free);
  series_->available_gpu_resource.Set(free_share);
}

}  // namespace wintserve
