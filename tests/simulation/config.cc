#include "tests/simulation/config.h"

#include <fmt/format.h>

#include <algorithm>

#include "tests/simulation/random.h"

namespace wintserve::simulation {
namespace {

int BlocksFor(int tokens, int block_size) { return (tokens + block_size - 1) / block_size; }

SchedulerConfig RandomSchedulerConfig(const SimulationConfig& config, Random* random) {
  SchedulerConfig scheduler;
  scheduler.block_size_tokens = random->Pick({2, 4, 4, 8, 16});
  scheduler.max_num_seqs = static_cast<int>(random->Between(1, random->Pick({2, 6, 12})));
  scheduler.vocab_size = 1000;
  scheduler.eos_ids = {1, 2};
  scheduler.async_depth = random->Chance(0.7) ? 1 : 0;
  scheduler.prefix_caching = random->Chance(0.85);

  // A pool of barely one longest sequence forces preemption; a large one never does.
  const int longest = BlocksFor(config.max_sequence_tokens, scheduler.block_size_tokens);
  scheduler.num_blocks = longest + static_cast<int>(random->Between(0, 3));
  if (random->Chance(0.7))
    scheduler.num_blocks += static_cast<int>(random->Between(0, 3 * longest));
  if (random->Chance(0.2)) scheduler.num_blocks += longest * scheduler.max_num_seqs;

  scheduler.chunked_prefill = random->Chance(0.75);
  scheduler.max_num_batched_tokens =
      scheduler.max_num_seqs + static_cast<int>(random->Between(0, config.max_prompt_tokens));
  if (!scheduler.chunked_prefill) {  // a prompt, or what is computed again, is one row
    scheduler.max_num_batched_tokens =
        std::max(scheduler.max_num_batched_tokens, config.max_sequence_tokens);
  }
  scheduler.max_partial_prefills = static_cast<int>(random->Between(1, 4));
  scheduler.max_long_partial_prefills =
      static_cast<int>(random->Between(1, scheduler.max_partial_prefills));
  scheduler.long_prefill_token_threshold = random->Chance(0.5) ? config.max_prompt_tokens / 2 : 0;
  scheduler.max_seqs_per_tenant = random->Chance(0.3) ? static_cast<int>(random->Between(1, 3)) : 0;
  scheduler.max_queue_requests = random->Chance(0.3) ? static_cast<int>(random->Between(4, 20)) : 0;
  scheduler.max_queue_tokens =
      random->Chance(0.3) ? random->Between(2, 8) * config.max_prompt_tokens : 0;
  scheduler.max_step_slowdown = random->Pick({0.0, 1.5, 3.0});
  scheduler.restore_us_per_block = random->Pick({0.0, 1.0, 100.0});
  return scheduler;
}

void AddWorkerFaults(SimulationConfig* config, Random* random) {
  config->scheduler.first_step = random->Chance(0.5) ? 1 : random->Between(2, 1'000'000);
  if (random->Chance(0.5)) config->num_worker_kills = static_cast<int>(random->Between(1, 4));
  if (random->Chance(0.3)) config->num_worker_crashes = static_cast<int>(random->Between(1, 3));
  if (random->Chance(0.15)) config->num_worker_hangs = static_cast<int>(random->Between(1, 2));
  config->abort_hang_chance = random->Pick({0.0, 0.0, 0.1});
  config->max_reap_us = random->Pick({100, 5'000, 60'000});
  config->max_restart_us = random->Pick({500, 20'000, 300'000});
  config->abort_timeout_us = random->Between(5'000, 50'000);
  config->step_deadline_us = random->Between(10'000, 100'000);
  config->num_bad_steps = random->Pick({1, 5, 256});
  config->isolation_chance = random->Pick({0.0, 0.5});
}

}  // namespace

SimulationConfig RandomConfig(uint64_t seed) {
  Random random(seed, /*stream=*/1);
  SimulationConfig config;
  config.seed = seed;
  config.num_ranks = random.Pick({1, 1, 2, 3, 4});
  config.max_prompt_tokens = static_cast<int>(random.Between(8, 80));
  config.max_answer_tokens = static_cast<int>(random.Between(1, 40));
  config.max_sequence_tokens = config.max_prompt_tokens + config.max_answer_tokens;
  config.num_host_slots =
      random.Chance(0.5) ? static_cast<int>(random.Between(1, random.Pick({8, 60}))) : 0;
  config.scheduler = RandomSchedulerConfig(config, &random);

  config.step_us = random.Between(200, 2000);
  config.token_us = random.Between(1, 100);
  config.worker_latency_us = random.Between(10, 300);
  config.cache_latency_us = random.Pick({20, 100, 1000, 10'000});
  config.cache_stall_chance = random.Chance(0.3) ? 0.01 : 0;

  config.num_requests = static_cast<int>(random.Between(10, 60));
  // From far below to far above what the instance can take.
  config.mean_interarrival_us = random.Pick({200, 1000, 4000, 15'000});
  config.num_documents = static_cast<int>(random.Between(1, 6));
  config.num_tenants = static_cast<int>(random.Between(1, 4));
  config.num_salts = random.Chance(0.3) ? 3 : 1;
  config.eos_chance = random.Pick({0.0, 0.02, 0.1});
  config.deadline_chance = random.Pick({0.0, 0.0, 0.2});
  config.cancel_chance = random.Pick({0.0, 0.1, 0.4});

  config.grace_us = 100'000;
  config.max_outage_us = random.Pick({20'000, 90'000, 200'000});
  if (random.Chance(0.5)) config.num_drops = static_cast<int>(random.Between(1, 5));
  if (random.Chance(0.3)) config.num_deaths = static_cast<int>(random.Between(1, 3));
  if (random.Chance(0.3)) config.num_flushes = static_cast<int>(random.Between(1, 5));
  config.bypass_chance = random.Pick({0.05, 0.05, 0.5});
  AddWorkerFaults(&config, &random);
  if (random.Chance(0.25)) config.num_server_deaths = static_cast<int>(random.Between(1, 3));
  return config;
}

std::string SimulationConfig::ToString() const {
  return fmt::format(
      "seed {}: {} ranks, {} blocks of {} tokens, {} host slots, {} slots, budget {}, async depth "
      "{}, chunked prefill {}, prefix caching {}; {} requests, one every {} us, prompts up to {}, "
      "answers up to {}; cache latency {} us, {} drops, {} deaths, {} flushes; workers: {} kills, "
      "{} crashes, {} hangs; API server: {} deaths",
      seed, num_ranks, scheduler.num_blocks, scheduler.block_size_tokens, num_host_slots,
      scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.async_depth,
      scheduler.chunked_prefill, scheduler.prefix_caching, num_requests, mean_interarrival_us,
      max_prompt_tokens, max_answer_tokens, cache_latency_us, num_drops, num_deaths, num_flushes,
      num_worker_kills, num_worker_crashes, num_worker_hangs, num_server_deaths);
}

}  // namespace wintserve::simulation
