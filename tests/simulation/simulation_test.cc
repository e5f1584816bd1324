// Runs whole serving instances on a virtual clock, one a seed.
//
// SIMULATION_FIRST_SEED, SIMULATION_SEEDS: other seeds than the first 200.
// SIMULATION_TRACE=1:                      prints every event.
#include <fmt/format.h>
#include <gtest/gtest.h>

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
