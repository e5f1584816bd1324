#include "api_server/llm/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

namespace wintserve {
namespace {

using testing::HasSubstr;

SchedulerStats BusyStats() {
  return {.num_running = 3,
          .num_waiting = 2,
          .num_matching = 1,
          .num_restoring = 2,
          .num_blocks_held = 6,
          .num_blocks_leased_ahead = 2,
          .num_blocks_available = 3,
          .num_plans_in_flight = 2,
          .preemptions = 1,
          .overshoot_rows = 4,
          .queried_tokens = 200,
          .device_hit_tokens = 64};
}

TEST(EngineMetrics, TellsTheFactsOfTheLastPoolAloneAndGoesOnCounting) {
  auto registry = std::make_shared<prometheus::Registry>();
  EngineMetrics metrics(registry);
  metrics.RecordFacts({.num_blocks = 10, .num_host_blocks = 3});
  metrics.RecordState({.preemptions = 2});
  metrics.RecordFacts({.num_blocks = 10, .num_host_blocks = 7});
  metrics.RecordState({.preemptions = 5});
  const std::string text = prometheus::TextSerializer().Serialize(registry->Collect());
  EXPECT_THAT(text, HasSubstr("num_cpu_blocks=\"7\""));
  EXPECT_THAT(text, testing::Not(HasSubstr("num_cpu_blocks=\"3\"")));
  EXPECT_THAT(text, HasSubstr("wintserve:preemptions_total 5\n"));
}

TEST(EngineMetrics, ExposesTheNamesThatDashboardsAskFor) {
  auto registry = std::make_shared<prometheus::Registry>();
  EngineMetrics metrics(registry);
  metrics.RecordFacts({.max_num_seqs = 4,
                       .max_model_len = 200,
                       .max_num_batched_tokens = 64,
                       .block_size_tokens = 64,
                       .num_blocks = 10,
                       .num_host_blocks = 3,
                       .pool_bytes = 40960,
                       .prefix_caching = true});
  metrics.RecordArrival(/*num_prompt_tokens=*/7, /*max_tokens=*/20);
  metrics.RecordStart(0.1);
  metrics.RecordFirstToken(0.3, 0.2);
  metrics.RecordNextToken(0.01);
  metrics.RecordGeneratedTokens(2);
  metrics.RecordSuccess(1, 0.9, 0.7, 7, 2);
  metrics.RecordStep(0.005, 0.004, 3, 11);
  metrics.RecordSchedule(0.00007);
  metrics.RecordCacheLookup(/*hit=*/false);
  metrics.RecordCacheLookup(/*hit=*/true);
  metrics.RecordCacheLoss();
  metrics.RecordPoolReplacement();
  SchedulerStats stats = BusyStats();
  metrics.RecordState(stats);
  stats.preemptions = 3;
  stats.queried_tokens = 400;
  stats.device_hit_tokens = 100;
  stats.host_hit_tokens = 200;
  metrics.RecordState(stats);
  metrics.RecordState(stats);  // nothing new
  const std::string text = prometheus::TextSerializer().Serialize(registry->Collect());
  for (const char* line : {
           "fastdeploy:requests_number_total 1",
           "fastdeploy:request_success_total 1",
           "fastdeploy:prompt_tokens_total 7",
           "fastdeploy:generation_tokens_total 2",
           "fastdeploy:num_requests_running 3",
           "fastdeploy:num_requests_waiting 2",
           "fastdeploy:batch_size 3",
           "fastdeploy:max_batch_size 4",
           "fastdeploy:available_batch_size 1",
           "fastdeploy:gpu_cache_usage_perc 0.4",
           "fastdeploy:available_gpu_block_num 5",
           "fastdeploy:free_gpu_block_num 6",
           "fastdeploy:max_gpu_block_num 10",
           "fastdeploy:available_gpu_resource 0.5",
           "fastdeploy:hit_req_rate 0.5",
           "fastdeploy:hit_token_rate 0.75",
           "fastdeploy:gpu_hit_token_rate 0.25",
           "fastdeploy:cpu_hit_token_rate 0.5",
           "fastdeploy:prefix_cache_token_num_total 300",
           "fastdeploy:prefix_gpu_cache_token_num_total 100",
           "fastdeploy:prefix_cpu_cache_token_num_total 200",
           "wintserve:preemptions_total 3",
           "wintserve:overshoot_rows_total 4",
           "wintserve:lease_blocks 2",
           "wintserve:sequences_matching 1",
           "wintserve:sequences_restoring 2",
           "wintserve:plans_in_flight 2",
           "wintserve:cache_sessions_lost_total 1",
           "wintserve:kv_pool_replacements_total 1",
           "fastdeploy:time_to_first_token_seconds_bucket{le=\"0.5\"} 1",
           "fastdeploy:time_to_first_token_seconds_bucket{le=\"2560\"} 1",
           "fastdeploy:time_per_output_token_seconds_bucket{le=\"80\"} 1",
           "fastdeploy:e2e_request_latency_seconds_count 1",
           "fastdeploy:request_inference_time_seconds_count 1",
           "fastdeploy:request_queue_time_seconds_count 1",
           "fastdeploy:request_prefill_time_seconds_count 1",
           "fastdeploy:request_decode_time_seconds_count 1",
           "fastdeploy:request_prompt_tokens_sum 7",
           "fastdeploy:request_generation_tokens_sum 2",
           "fastdeploy:request_params_max_tokens_sum 20",
           "wintserve:step_seconds_count 1",
           "wintserve:step_execute_seconds_sum 0.004",
           "wintserve:step_tokens_sum 11",
           "wintserve:schedule_seconds_count 1",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, HasSubstr("fastdeploy:cache_config_info{block_size=\"64\""));
}

TEST(EngineMetrics, AfterTheStopNothingRunsOrWaitsAndTotalsStand) {
  auto registry = std::make_shared<prometheus::Registry>();
  EngineMetrics metrics(registry);
  metrics.RecordFacts({.max_num_seqs = 4, .num_blocks = 10});
  SchedulerStats stats = BusyStats();
  metrics.RecordState(stats);
  stats.preemptions = 2;
  metrics.RecordStop(stats);
  const std::string text = prometheus::TextSerializer().Serialize(registry->Collect());
  for (const char* line : {
           "fastdeploy:num_requests_running 0\n",
           "fastdeploy:num_requests_waiting 0\n",
           "fastdeploy:gpu_cache_usage_perc 0\n",
           "fastdeploy:available_gpu_block_num 0\n",
           "fastdeploy:max_gpu_block_num 10\n",
           "wintserve:lease_blocks 0\n",
           "wintserve:sequences_matching 0\n",
           "wintserve:sequences_restoring 0\n",
           "wintserve:plans_in_flight 0\n",
           "wintserve:preemptions_total 2\n",
           "fastdeploy:gpu_hit_token_rate 0.32\n",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

}  // namespace
}  // namespace wintserve
