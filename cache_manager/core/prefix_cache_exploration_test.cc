// Every reachable state of a small configuration.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_set>
#include <vector>

#include "cache_manager/core/prefix_cache_explorer.h"

namespace wintserve {
namespace {

// Which situations some state was in: what is not reached is not tested.
class Reached {
 public:
  void Note(const PrefixCacheStats& stats, const World& world) {
    const NaiveCache& cache = world.naive;
    has_["a restore"] |= stats.num_restoring > 0;
    has_["two restores"] |= stats.num_restoring > 1;
    has_["a write-back"] |= stats.num_copying_out > 0;
    has_["both"] |= stats.num_restoring > 0 && stats.num_copying_out > 0;
    has_["a quarantined slot"] |= stats.num_host_quarantined > 0;
    has_["a duplicate"] |= stats.duplicate_commits > 0;
    has_["an eviction from the device"] |= stats.evicted_device_blocks > 0;
    has_["an eviction from the host"] |= stats.evicted_host_slots > 0;
    for (const auto& entry : cache.entries()) {
      const bool on_both = entry.block && entry.slot_is_valid;
      has_["a pinned entry on both tiers"] |= on_both && entry.pins > 0;
      has_["an entry without pins on both tiers"] |= on_both && entry.pins == 0;
      has_["an entry on the host alone"] |= !entry.block;
    }
    NoteFaults(stats, world);
  }
  std::string Missing() const {
    std::string missing;
    for (const auto& [what, is_reached] : has_) missing += is_reached ? "" : what + "; ";
    return missing;
  }

 private:
  void NoteFaults(const PrefixCacheStats& stats, const World& world) {
    if (world.scenario->max_deaths > 0) {
      has_["a quarantined block"] |= stats.num_quarantined > 0;
      has_["a hit in an adopted pool"] |= world.num_deaths > 0 && stats.device_hit_tokens > 0;
      has_["a write-back that a death has cancelled"] |=
          world.num_deaths > 0 && stats.num_copying_out > 0;
      if (world.scenario->max_deaths > 1) {
        has_["a death before the fence of the one before"] |= world.has_died_unfenced;
      }
    }
    if (world.scenario->has_wrong_rank) {
      const bool is_noticed = world.step == kLaterStep;
      for (const CopyOrder& copy : world.copies) {
        const bool is_lost = world.lost_copies.contains(copy.copy_id);
        has_["a lost write-back"] |= is_lost && copy.direction == CopyDirection::kToHost;
        has_["a lost restore"] |= is_lost && copy.direction == CopyDirection::kToDevice;
      }
      for (const auto& entry : world.naive.entries()) {
        has_["a distrusted entry with pins"] |= entry.flushed && entry.pins > 0;
        has_["an entry that is still trusted"] |= is_noticed && entry.block_step == kGoodStep;
      }
      has_["a host copy that went alone"] |= world.has_lost_host_copy_alone;
    }
  }

  std::map<std::string, bool> has_;
};

World StartOf(const Scenario& scenario) {
  auto start = std::make_unique<World>();
  start->scenario = &scenario;
  for (const Script& script : scenario.scripts) {
    start->requests.push_back({.attempts_left = script.attempts});
  }
  for (const std::string& wanted : scenario.prelude) {
    const auto steps = Explorer::StepsFrom(*start);
    const auto found =
        std::ranges::find_if(steps, [&](const auto& s) { return s.first == wanted; });
    if (found == steps.end()) {
      ADD_FAILURE() << wanted << " cannot come next in the prelude";
      break;
    }
    Explorer next(*start);
    next.Take(found->first, found->second);
    EXPECT_EQ(next.violation(), "") << wanted;
    start = std::make_unique<World>(next.world());
  }
  return *start;
}

void Explore(const Scenario& scenario, Reached* reached) {
  const World start = StartOf(scenario);
  std::unordered_set<std::string> seen = {Explorer(start).Key()};
  std::deque<World> frontier = {start};
  size_t num_steps = 0;
  while (!frontier.empty()) {
    const World world = std::move(frontier.front());
    frontier.pop_front();
    for (const auto& [name, step] : Explorer::StepsFrom(world)) {
      Explorer next(world);
      next.Take(name, step);
      ++num_steps;
      if (!next.violation().empty()) {
        std::vector<std::string> path;
        for (const History* h = next.world().history.get(); h != nullptr; h = h->before.get()) {
          path.insert(path.begin(), h->name);
        }
        FAIL() << next.violation() << "\nafter " << fmt::format("{}", fmt::join(path, ", "));
      }
      reached->Note(next.stats(), next.world());
      if (seen.insert(next.Key()).second) frontier.push_back(next.world());
    }
  }
  fmt::print("{} states, {} steps\n", seen.size(), num_steps);
}

void ExploreAll(const std::vector<Scenario>& scenarios) {
  Reached reached;
  for (const Scenario& scenario : scenarios) Explore(scenario, &reached);
  EXPECT_EQ(reached.Missing(), "");
}

// Request 1 shares its prompt with 0, and comes back; request 2 pushes both out.
const std::vector<Script> kThreeRequests = {{{1, 2, 9}, 1}, {{1, 2, 9}, 2}, {{3, 4, 9}, 1}};

TEST(PrefixCacheExploration, WithAnApiServerThatDies) {
  ExploreAll({{.scripts = kThreeRequests, .max_deaths = 1}});
}

// The second one may die before it has fenced what the first one left.
TEST(PrefixCacheExploration, WithTwoApiServersThatDie) {
  ExploreAll({{.scripts = {{{1, 2, 9}, 2}, {{3, 4, 9}, 1}}, .max_deaths = 2}});
}

// Computes its two blocks and leaves them to the cache.
std::vector<std::string> Runs(int request) {
  std::vector<std::string> names = {fmt::format("Match({})", request)};
  for (size_t i = 0; i < kBlocksPerRequest; ++i) {
    for (const char* step : {"Lease", "StartStep", "EndStep", "Commit"}) {
      names.push_back(fmt::format("{}({})", step, request));
    }
  }
  names.push_back(fmt::format("Finish({})", request));
  return names;
}

TEST(PrefixCacheExploration, WithARankThatGoesWrong) {
  // Of the second one, the cache is full already: request 0 is worth host copies, as it was hit, is
  // pushed out by 2, and comes back.
  std::vector<std::string> prelude = Runs(0);
  prelude.insert(prelude.end(), {"Match(0)", "Finish(0)"});
  const auto of_another = Runs(1);
  prelude.insert(prelude.end(), of_another.begin(), of_another.end());
  ExploreAll({{.scripts = {{{1, 2, 9}, 1}, {{1, 2, 9}, 2}}, .has_wrong_rank = true},
              {.scripts = {{{1, 2, 9}, 3}, {{3, 4, 9}, 1}, {{5, 6, 9}, 1}},
               .has_wrong_rank = true,
               .prelude = prelude}});
}

}  // namespace
}  // namespace wintserve
