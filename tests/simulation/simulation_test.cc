// Runs whole serving instances on a virtual clock, one a seed.
//
// SIMULATION_FIRST_SEED, SIMULATION_SEEDS: other seeds than the first 200.
// SIMULATION_TRACE=1:                      prints every event.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "tests/simulation/config.h"
#include "tests/simulation/instance.h"
#include "tests/simulation/report.h"

namespace wintserve::simulation {
namespace {

constexpr uint64_t kNumSeeds = 200;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

std::string ReplayCommand(uint64_t seed) {
  return fmt::format(
      "SIMULATION_FIRST_SEED={} SIMULATION_SEEDS=1 SIMULATION_TRACE=1 {} "
      "--gtest_filter=Simulation.KeepsEveryInvariant",
      seed, testing::internal::GetArgvs()[0]);
}

// A CHECK of the code under test aborts: it has to leave the seed behind, too.
uint64_t running_seed = 0;
void PrintSeedOnAbort(int) {
  fmt::print(stderr, "seed {} aborts; replay it with:\n  {}\n", running_seed,
             ReplayCommand(running_seed));
}

Report RunSeed(uint64_t seed, Report::Tracing tracing) {
  running_seed = seed;
  Instance instance(RandomConfig(seed), tracing);
  instance.Run();
  return instance.report();
}

// A path that no seed takes proves nothing.
void ExpectEveryPathTaken(const Counters& counters) {
  EXPECT_GT(counters.prompt_chunks, 0u);
  EXPECT_GT(counters.prompt_logprobs, 0u);
  EXPECT_GT(counters.overshoot_rows, 0u);
  EXPECT_GT(counters.preemptions, 0u);
  EXPECT_GT(counters.refusals, 0u);
  EXPECT_GT(counters.expired, 0u);
  EXPECT_GT(counters.cancelled, 0u);
  EXPECT_GT(counters.device_hit_tokens, 0u);
  EXPECT_GT(counters.host_hit_tokens, 0u);
  EXPECT_GT(counters.evicted_blocks, 0u);
  EXPECT_GT(counters.evicted_host_slots, 0u);
  EXPECT_GT(counters.commits, 0u);
  EXPECT_GT(counters.duplicate_commits, 0u);
  EXPECT_GT(counters.orphan_commits, 0u);
  EXPECT_GT(counters.write_backs, 0u);
  EXPECT_GT(counters.restores, 0u);
  EXPECT_GT(counters.shared_siblings, 0u);
  EXPECT_GT(counters.tombstones, 0u);
  EXPECT_GT(counters.flushes, 0u);
  EXPECT_GT(counters.cache_resumes, 0u);
  EXPECT_GT(counters.cache_deaths, 0u);
  EXPECT_GT(counters.pools_replaced, counters.cache_deaths) << "no grace ran out";
  EXPECT_GT(counters.worker_kills, 0u);
  EXPECT_GT(counters.worker_crashes, 0u);
  EXPECT_GT(counters.worker_hangs, 0u);
  EXPECT_GT(counters.workers_ended, 0u);
  EXPECT_GT(counters.late_writes, 0u);
  EXPECT_GT(counters.groups_lost, counters.groups_distrusted);
  EXPECT_GT(counters.groups_distrusted, 0u);
  EXPECT_GT(counters.plans_lost, 0u);
  EXPECT_GT(counters.copies_lost, 0u);
  EXPECT_GT(counters.resumed_sequences, 0u);
  EXPECT_GT(counters.recomputed_sequences, 0u);
  EXPECT_GT(counters.isolations, 0u);
  EXPECT_GT(counters.cache_losses_in_recovery, 0u);
  EXPECT_GT(counters.streams_lost, 0u);
  EXPECT_GT(counters.adoptions, 0u);
}

TEST(Simulation, KeepsEveryInvariant) {
  std::signal(SIGABRT, PrintSeedOnAbort);
  const uint64_t first_seed = FromEnvironment("SIMULATION_FIRST_SEED", 1);
  const uint64_t num_seeds = FromEnvironment("SIMULATION_SEEDS", kNumSeeds);
  const bool trace = FromEnvironment("SIMULATION_TRACE", 0) != 0;
  Counters total;
  int num_failed = 0;
  for (uint64_t seed = first_seed; seed < first_seed + num_seeds && num_failed < 10; ++seed) {
    if (trace) fmt::print("{}\n", RandomConfig(seed).ToString());
    const Report report = RunSeed(seed, trace ? Report::Tracing::kPrint : Report::Tracing::kOff);
    total.Add(report.counters);
    if (report.ok()) continue;
    ++num_failed;
    ADD_FAILURE() << report.violation() << "\n"
                  << RandomConfig(seed).ToString() << "\nThe last events:\n"
                  << RunSeed(seed, Report::Tracing::kLast).LastLines() << "Replay it with:\n  "
                  << ReplayCommand(seed);
  }
  std::signal(SIGABRT, SIG_DFL);
  fmt::print("seeds {} to {}:\n{}", first_seed, first_seed + num_seeds - 1, total.ToString());
  if (first_seed == 1 && num_seeds >= kNumSeeds && num_failed == 0) ExpectEveryPathTaken(total);
}

// A few requests that all end, on two ranks, and nothing goes wrong by chance.
SimulationConfig CalmConfig(uint64_t seed) {
  SimulationConfig config = RandomConfig(seed);
  config.num_ranks = 2;
  config.num_requests = 5;
  config.mean_interarrival_us = 2000;
  config.cache_latency_us = 100;
  config.scheduler.max_queue_requests = 0;
  config.scheduler.max_queue_tokens = 0;
  config.deadline_chance = config.cancel_chance = config.cache_stall_chance = 0;
  config.num_drops = config.num_deaths = config.num_flushes = 0;
  config.num_worker_kills = config.num_worker_crashes = config.num_worker_hangs = 0;
  config.num_server_deaths = 0;
  config.max_outage_us = 20'000;
  config.max_restart_us = 20'000;
  return config;
}

// The clients get the very text that they get without the failure, whenever it comes.
TEST(Simulation, SurvivesAFailureAtEveryMoment) {
  constexpr uint64_t kMostMoments = 70;  // for each seed and kind of failure
  for (uint64_t seed = 1; seed <= 4; ++seed) {
    SimulationConfig config = CalmConfig(seed);
    const auto run = [&config] {
      Instance instance(config, Report::Tracing::kOff);
      instance.Run();
      return instance.report();
    };
    const Report calm = run();
    ASSERT_TRUE(calm.ok()) << calm.violation();
    const uint64_t stride = std::max<uint64_t>(1, calm.counters.events / kMostMoments);
    for (const auto failure :
         {WorkerFailure::kKilled, WorkerFailure::kCrashed, WorkerFailure::kHangs}) {
      for (uint64_t moment = 1; moment < calm.counters.events; moment += stride) {
        config.planned_failures = {
            {.event = moment, .rank = static_cast<int>(moment / stride % 2), .failure = failure}};
        config.cache_dies_at_event.reset();
        if (moment / stride % 3 == 0) config.cache_dies_at_event = moment + moment % 40;
        const Report report = run();
        ASSERT_TRUE(report.ok()) << report.violation() << "\n"
                                 << config.ToString() << "\nfails at event " << moment;
        ASSERT_EQ(report.counters.sequences_finished, calm.counters.sequences_finished);
        ASSERT_EQ(report.counters.tokens, calm.counters.tokens);
        ASSERT_EQ(report.counters.groups_lost, 1u) << "event " << moment;
      }
    }
  }
}

// The second failure comes while the group leaves, gathers, starts or goes on: at the same rank,
// whose process may be the next one by then, or at the other.
TEST(Simulation, SurvivesASecondFailureAtEveryMomentOfTheRecovery) {
  constexpr WorkerFailure kFailures[] = {WorkerFailure::kKilled, WorkerFailure::kCrashed,
                                         WorkerFailure::kHangs};
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SimulationConfig config = CalmConfig(seed);
    const auto run = [&config] {
      Instance instance(config, Report::Tracing::kOff);
      instance.Run();
      return instance.report();
    };
    const Report calm = run();
    ASSERT_TRUE(calm.ok()) << calm.violation();
    uint64_t most_groups_lost = 0;
    for (uint64_t i = 0; i < 180; ++i) {
      const uint64_t first = calm.counters.events * (1 + i % 9) / 10;
      const uint64_t second = first + i / 9 * 2;
      config.planned_failures = {
          {.event = first, .rank = static_cast<int>(i % 2), .failure = kFailures[i % 3]},
          {.event = second, .rank = static_cast<int>(i / 2 % 2), .failure = kFailures[i / 3 % 3]}};
      config.cache_dies_at_event.reset();
      if (i % 4 == 0) config.cache_dies_at_event = second + i % 7;
      const Report report = run();
      ASSERT_TRUE(report.ok()) << report.violation() << "\n"
                               << config.ToString() << "\nfails at events " << first << " and "
                               << second;
      ASSERT_EQ(report.counters.sequences_finished, calm.counters.sequences_finished);
      ASSERT_EQ(report.counters.tokens, calm.counters.tokens);
      most_groups_lost = std::max(most_groups_lost, report.counters.groups_lost);
    }
    EXPECT_EQ(most_groups_lost, 2u);
  }
}

// Streams end with their API server. Its successor serves what comes then from the pool that it
// finds, whose ranks may have failed before, meanwhile, or fail again.
TEST(Simulation, AnotherApiServerGoesOnAtEveryMoment) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    SimulationConfig config = CalmConfig(seed);
    config.num_requests = 20;
    const auto run = [&config] {
      Instance instance(config, Report::Tracing::kOff);
      instance.Run();
      return instance.report();
    };
    const Report calm = run();
    ASSERT_TRUE(calm.ok()) << calm.violation();
    for (uint64_t i = 1; i <= 60; ++i) {
      const uint64_t death = calm.counters.events * i / 70;
      config.server_dies_at_event = death;
      config.planned_failures.clear();
      if (i % 3 != 0) {
        config.planned_failures = {
            {.event = death + i % 5 - 2,
             .rank = static_cast<int>(i % 2),
             .failure = i % 3 == 1 ? WorkerFailure::kKilled : WorkerFailure::kCrashed}};
      }
      const Report report = run();
      ASSERT_TRUE(report.ok()) << report.violation() << "\n"
                               << config.ToString() << "\nthe API server dies at event " << death;
      ASSERT_EQ(report.counters.server_deaths, 1u);
      ASSERT_EQ(report.counters.adoptions, 1u);
    }
  }
}

// What is checked can be seen to fail: each mistake is found by one of the seeds, as what it is.
TEST(Simulation, FindsMistakesInTheRecovery) {
  const struct {
    Mistake mistake;
    const char* invariants;  // one of them is broken first
  } cases[] = {
      {Mistake::kFenceOnStreamDrop, "I5"}, {Mistake::kFenceOnFirst, "I5"},
      {Mistake::kTrustCrashes, "I4"},      {Mistake::kNoDistrust, "I4"},
      {Mistake::kForgetDistrust, "I4"},    {Mistake::kTakeLateResults, "I6"},
      {Mistake::kTrustAdopted, "I4"},      {Mistake::kDistrustByNumber, "I4"},
      {Mistake::kNoFenceOfAdopted, "I2"},
  };
  for (const auto& c : cases) {
    std::string found;
    for (uint64_t seed = 1; seed <= 3000 && found.empty(); ++seed) {
      SimulationConfig config = RandomConfig(seed);
      config.num_worker_kills += 2;
      config.num_worker_crashes += 2;
      config.num_server_deaths += 1;
      config.mistake = c.mistake;
      Instance instance(config, Report::Tracing::kOff);
      instance.Run();
      found = instance.report().violation();
      if (!found.empty())
        fmt::print("mistake {}: seed {}: {}\n", static_cast<int>(c.mistake), seed, found);
    }
    EXPECT_EQ(found.substr(0, 2), c.invariants)
        << "mistake " << static_cast<int>(c.mistake) << ": " << found;
  }
}

TEST(Simulation, RepeatsASeedExactly) {
  for (uint64_t seed = 1; seed <= 10; ++seed) {
    const Report first = RunSeed(seed, Report::Tracing::kLast);
    const Report second = RunSeed(seed, Report::Tracing::kLast);
    const Report untraced = RunSeed(seed, Report::Tracing::kOff);
    EXPECT_EQ(first.digest(), second.digest()) << "seed " << seed;
    EXPECT_EQ(first.counters.ToString(), untraced.counters.ToString()) << "seed " << seed;
  }
}

}  // namespace
}  // namespace wintserve::simulation
