#include "api_server/llm/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>

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

const Buckets kRecoverySeconds = {.1, .2, .3,  .5, .75, 1,  1.5, 2,  3,
                                  4,  5,  7.5, 10, 20,  40, 60,  120};

// Prometheus counts in double, which is exact up to 2^53.
double AsDouble(uint64_t count) { return static_cast<double>(count); }

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

std::map<FaultCause, prometheus::Counter*> CountersOf(
    prometheus::Family<prometheus::Counter>* family) {
  std::map<FaultCause, prometheus::Counter*> counters;
  for (const FaultCause cause : kFaultCauses) {
    counters[cause] = &family->Add({{"cause", NameOf(cause)}});
  }
  return counters;
}

}  // namespace

struct EngineMetrics::Series {
  explicit Series(std::shared_ptr<prometheus::Registry> r) : registry(std::move(r)) {}

  const std::shared_ptr<prometheus::Registry> registry;
  EngineFacts facts;
  prometheus::Gauge* config_info = nullptr;  // of those facts
  SchedulerStats last;                       // totals that the counters have reached
  uint64_t lookups = 0;
  uint64_t lookups_with_hit = 0;

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
  GAUGE(available_gpu_block_num, "KV blocks that a request could get, cached ones included.");
  GAUGE(free_gpu_block_num, "KV blocks that no request holds, cached ones included.");
  GAUGE(max_gpu_block_num, "KV blocks of the pool.");
  GAUGE(available_gpu_resource, "Share of the KV blocks that a request could get, 0 to 1.");
  GAUGE(hit_req_rate, "Share of the requests that found part of their prompt cached, 0 to 1.");
  GAUGE(hit_token_rate, "Share of the prompt tokens that were cached, 0 to 1.");
  GAUGE(gpu_hit_token_rate, "Share of the prompt tokens that were cached in KV blocks, 0 to 1.");
  GAUGE(cpu_hit_token_rate, "Share of the prompt tokens that were cached in host memory, 0 to 1.");
  COUNTER(prefix_cache_token_num_total, "Prompt tokens that were cached.");
  COUNTER(prefix_gpu_cache_token_num_total, "Prompt tokens that were cached in KV blocks.");
  COUNTER(prefix_cpu_cache_token_num_total, "Prompt tokens that were cached in host memory.");
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

  prometheus::Counter& preemptions =
      Counter(registry.get(), "wintserve:preemptions_total",
              "Sequences that gave up their blocks and are computed again.");
  prometheus::Counter& overshoot_rows =
      Counter(registry.get(), "wintserve:overshoot_rows_total",
              "Rows that were computed for a sequence that had ended.");
  prometheus::Gauge& lease_blocks =
      Gauge(registry.get(), "wintserve:lease_blocks",
            "KV blocks leased ahead of need, not yet given to a sequence.");
  prometheus::Gauge& sequences_matching = Gauge(registry.get(), "wintserve:sequences_matching",
                                                "Sequences whose prefix is being looked up.");
  prometheus::Gauge& sequences_restoring =
      Gauge(registry.get(), "wintserve:sequences_restoring",
            "Sequences whose prefix is being copied from host memory.");
  prometheus::Gauge& plans_in_flight = Gauge(registry.get(), "wintserve:plans_in_flight",
                                             "Plans that the engine workers have not done yet.");
  prometheus::Counter& cache_losses =
      Counter(registry.get(), "wintserve:cache_sessions_lost_total",
              "Sessions with the cache manager that ended unasked.");
  prometheus::Counter& pool_replacements =
      Counter(registry.get(), "wintserve:kv_pool_replacements_total",
              "KV pools that a new cache manager created in place of a lost one.");

  prometheus::Family<prometheus::Counter>& group_faults =
      prometheus::BuildCounter()
          .Name("wintserve:group_faults_total")
          .Help("Rank groups that were lost, by what was noticed first.")
          .Register(*registry);
  std::map<FaultCause, prometheus::Counter*> group_faults_by_cause = CountersOf(&group_faults);
  prometheus::Histogram& recovery_seconds =
      Histogram(registry.get(), "wintserve:recovery_seconds",
                "From the fault of a rank group until another one computes.", kRecoverySeconds);
  prometheus::Family<prometheus::Counter>& resumed =
      prometheus::BuildCounter()
          .Name("wintserve:resumed_sequences_total")
          .Help(
              "Sequences that ran when a rank group was lost and went on: from their KV, or "
              "computed again.")
          .Register(*registry);
  prometheus::Counter& resumed_from_kv = resumed.Add({{"from", "kv"}});
  prometheus::Counter& resumed_by_recompute = resumed.Add({{"from", "recompute"}});
  prometheus::Counter& stale_messages =
      Counter(registry.get(), "wintserve:stale_messages_total",
              "Messages of engine workers that were of an earlier rank group or pool.");
  prometheus::Counter& poison_requests =
      Counter(registry.get(), "wintserve:poison_requests_total",
              "Requests that failed since the rank group was lost whenever they ran.");

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
  auto& config_info = prometheus::BuildGauge()
                          .Name("fastdeploy:cache_config_info")
                          .Help("The KV cache's configuration, as labels.")
                          .Register(*series_->registry);
  if (series_->config_info != nullptr) config_info.Remove(series_->config_info);
  series_->config_info =
      &config_info.Add({{"block_size", std::to_string(facts.block_size_tokens)},
                        {"num_gpu_blocks", std::to_string(facts.num_blocks)},
                        {"num_cpu_blocks", std::to_string(facts.num_host_blocks)},
                        {"enable_prefix_caching", facts.prefix_caching ? "True" : "False"},
                        {"pool_bytes", std::to_string(facts.pool_bytes)},
                        {"max_num_seqs", std::to_string(facts.max_num_seqs)},
                        {"max_model_len", std::to_string(facts.max_model_len)},
                        {"max_num_batched_tokens", std::to_string(facts.max_num_batched_tokens)}});
  series_->config_info->Set(1);
  RecordState(SchedulerStats(series_->last));
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

void EngineMetrics::RecordCacheLookup(bool hit) {
  ++series_->lookups;
  if (hit) ++series_->lookups_with_hit;
  series_->hit_req_rate.Set(static_cast<double>(series_->lookups_with_hit) /
                            static_cast<double>(series_->lookups));
}

void EngineMetrics::RecordCacheLoss() { series_->cache_losses.Increment(); }

void EngineMetrics::RecordPoolReplacement() { series_->pool_replacements.Increment(); }

void EngineMetrics::RecordGroupLoss(FaultCause cause) {
  series_->group_faults_by_cause[cause]->Increment();
}

void EngineMetrics::RecordRecovery(double recovery_seconds) {
  series_->recovery_seconds.Observe(recovery_seconds);
}

void EngineMetrics::RecordStaleMessage() { series_->stale_messages.Increment(); }

void EngineMetrics::RecordPoisonRequest() { series_->poison_requests.Increment(); }

void EngineMetrics::RecordState(const SchedulerStats& stats) {
  SetGauges(stats);
  RecordTotals(stats);
}

void EngineMetrics::RecordStop(const SchedulerStats& last) {
  RecordTotals(last);
  SetGauges({});
}

void EngineMetrics::SetGauges(const SchedulerStats& stats) {
  const EngineFacts& facts = series_->facts;
  const int num_available = stats.num_blocks_available + stats.num_blocks_leased_ahead;
  const double num_blocks = std::max(1, facts.num_blocks);
  const int num_used = stats.num_blocks_held - stats.num_blocks_leased_ahead;
  series_->num_requests_running.Set(stats.num_running);
  series_->num_requests_waiting.Set(stats.num_waiting);
  series_->available_batch_size.Set(facts.max_num_seqs - stats.num_running);
  series_->gpu_cache_usage_perc.Set(num_used / num_blocks);
  series_->available_gpu_block_num.Set(num_available);
  series_->free_gpu_block_num.Set(facts.num_blocks - num_used);
  series_->available_gpu_resource.Set(num_available / num_blocks);
  series_->lease_blocks.Set(stats.num_blocks_leased_ahead);
  series_->sequences_matching.Set(stats.num_matching);
  series_->sequences_restoring.Set(stats.num_restoring);
  series_->plans_in_flight.Set(stats.num_plans_in_flight);
}

void EngineMetrics::RecordTotals(const SchedulerStats& stats) {
  const SchedulerStats last = std::exchange(series_->last, stats);
  series_->preemptions.Increment(AsDouble(stats.preemptions - last.preemptions));
  series_->overshoot_rows.Increment(AsDouble(stats.overshoot_rows - last.overshoot_rows));
  series_->resumed_from_kv.Increment(AsDouble(stats.resumed_sequences - last.resumed_sequences));
  series_->resumed_by_recompute.Increment(
      AsDouble(stats.recomputed_sequences - last.recomputed_sequences));
  if (stats.queried_tokens == last.queried_tokens) return;
  const uint64_t device_hits = stats.device_hit_tokens - last.device_hit_tokens;
  const uint64_t host_hits = stats.host_hit_tokens - last.host_hit_tokens;
  series_->prefix_gpu_cache_token_num_total.Increment(AsDouble(device_hits));
  series_->prefix_cpu_cache_token_num_total.Increment(AsDouble(host_hits));
  series_->prefix_cache_token_num_total.Increment(AsDouble(device_hits + host_hits));
  const double queried = AsDouble(stats.queried_tokens);
  const double device_rate = AsDouble(stats.device_hit_tokens) / queried;
  const double host_rate = AsDouble(stats.host_hit_tokens) / queried;
  series_->gpu_hit_token_rate.Set(device_rate);
  series_->cpu_hit_token_rate.Set(host_rate);
  series_->hit_token_rate.Set(device_rate + host_rate);
}

}  // namespace wintserve
