// Every reachable state of a small configuration: 4 blocks, 2 host slots, 3 requests, a session
// that may crash at any step, acknowledgements that come late and in any order.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_set>
#include <vector>

#include "cache_manager/core/naive_cache.h"
#include "cache_manager/core/prefix_cache.h"

namespace wintserve {
namespace {

using Use = NaiveCache::Use;

constexpr uint32_t kNumBlocks = 4;
constexpr uint32_t kNumHostSlots = 2;
constexpr uint32_t kWriteBackAhead = 2;
constexpr size_t kBlocksPerRequest = 2;

// One token a block, and one more that is always left to compute.
struct Script {
  std::vector<int32_t> prompt;
  int attempts;
};

// What runs. Request 1 shares its prompt with 0, and comes back; request 2 pushes both out.
const std::vector<Script>& Scripts() {
  static const std::vector<Script> scripts = {{{1, 2, 9}, 1}, {{1, 2, 9}, 2}, {{3, 4, 9}, 1}};
  return scripts;
}

struct PrivateBlock {
  PoolBlock block;
  enum class Step { kLeased, kUnderWay, kWritten, kDuplicate } step = Step::kLeased;
};

struct Request {
  int attempts_left = 0;
  bool runs = false;
  std::vector<PinnedBlock> pinned =
      {};                              // in sequence order; of a duplicate, the block of the other
  std::vector<PrivateBlock> own = {};  // not committed
  size_t num_known = 0;                // blocks of the sequence that are matched or committed
};

// The calls that have led to a state; states share what came before.
struct History {
  std::shared_ptr<const History> before;
  std::string name;
  std::function<void(PrefixCache*)> call;
};

struct World {
  NaiveCache naive{kNumBlocks, kNumHostSlots, 1, kWriteBackAhead};
  std::vector<Request> requests;
  std::vector<CopyOrder> copies;           // in plans that are not acknowledged
  std::map<uint64_t, std::string> source;  // what such a copy has to find where it reads, by id
  std::set<int32_t> zombie_blocks;         // that a process of the crashed session may still use
  std::set<uint32_t> zombie_slots;
  std::map<int32_t, std::string> block_content;
  std::map<uint32_t, std::string> slot_content;
  std::map<uint64_t, uint64_t> parent_of;  // by the events
  bool has_crashed = false;
  std::shared_ptr<const History> history;
};

// A World with its PrefixCache, and the steps that lead from it to the next.
class Explorer {
 public:
  explicit Explorer(const World& world) : w_(world), cache_(Replay(world.history)) {}

  const World& world() const { return w_; }
  const std::string& violation() const { return violation_; }
  PrefixCacheStats stats() const { return cache_->stats(); }
  std::string Key() const;

  using Step = std::function<void(Explorer*)>;
  static std::vector<std::pair<std::string, Step>> StepsFrom(const World& world);
  void Take(const std::string& name, const Step& step);

 private:
  static std::unique_ptr<PrefixCache> Replay(const std::shared_ptr<const History>& history);
  // Calls the real one now, and at every replay.
  void Call(std::function<void(PrefixCache*)> call) {
    call(cache_.get());
    calls_.push_back(std::move(call));
  }
  void Expect(bool holds, const std::string& what) {
    if (!holds && violation_.empty()) violation_ = what;
  }
  void ExpectGrantable(const PoolBlock& block, const char* how);

  void Match(size_t r);
  void Lease(size_t r);
  void StartStep(size_t r);
  void EndStep(size_t r);
  void Commit(size_t r);
  void Finish(size_t r);
  void TakeCopyOut();
  void CopyDone(size_t i);
  void Crash();
  void Fence();

  void TrackCopy(const CopyOrder& copy);
  void FollowEvents();
  void CheckHoldings();
  std::string PathOf(uint64_t handle) const;
  std::string NameOf(int32_t block) const;

  World w_;
  std::unique_ptr<PrefixCache> cache_;
  std::vector<std::function<void(PrefixCache*)>> calls_;
  std::string violation_;
};

std::string PathOfPrefix(const std::vector<int32_t>& prompt, size_t num_blocks) {
  return fmt::format("{}", fmt::join(prompt.begin(), prompt.begin() + num_blocks, "."));
}

std::unique_ptr<PrefixCache> Explorer::Replay(const std::shared_ptr<const History>& history) {
  auto cache =
      std::make_unique<PrefixCache>(PrefixCacheConfig{.num_blocks = kNumBlocks,
                                                      .num_host_slots = kNumHostSlots,
                                                      .write_back_ahead_blocks = kWriteBackAhead,
                                                      .block_size_tokens = 1,
                                                      .root_seed = "model"});
  std::vector<const History*> steps;
  for (const History* step = history.get(); step != nullptr; step = step->before.get()) {
    steps.push_back(step);
  }
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) (*step)->call(cache.get());
  uint64_t lost = 0;
  cache->TakeEvents(&lost);
  return cache;
}

void Explorer::Take(const std::string& name, const Step& step) {
  step(this);
  w_.history = std::make_shared<const History>(
      History{w_.history, name, [calls = std::move(calls_)](PrefixCache* cache) {
                for (const auto& call : calls) call(cache);
              }});
  FollowEvents();
  CheckHoldings();
}

// I3 and I5: what is given out is nobody's, and no process can still write it.
void Explorer::ExpectGrantable(const PoolBlock& block, const char* how) {
  for (const Request& request : w_.requests) {
    for (const PinnedBlock& pinned : request.pinned) {
      Expect(pinned.block.id != block.id,
             fmt::format("I3: block {}, {}, is pinned", block.id, how));
    }
    for (const PrivateBlock& own : request.own) {
      Expect(own.block.id != block.id, fmt::format("I3: block {}, {}, is leased", block.id, how));
    }
  }
  for (const CopyOrder& copy : w_.copies) {
    Expect(copy.block.id != block.id,
           fmt::format("I5: block {}, {}, is in copy {}", block.id, how, copy.copy_id));
  }
  Expect(!w_.zombie_blocks.contains(block.id),
         fmt::format("I5: block {}, {}, is not fenced", block.id, how));
}

void Explorer::TrackCopy(const CopyOrder& copy) {
  if (copy.direction == CopyDirection::kToHost) {
    for (const CopyOrder& other : w_.copies) {
      Expect(other.host_slot != copy.host_slot,
             fmt::format("I5: slot {} is filled, and in copy {}", copy.host_slot, other.copy_id));
    }
    Expect(!w_.zombie_slots.contains(copy.host_slot),
           fmt::format("I5: slot {} is filled, and not fenced", copy.host_slot));
    w_.slot_content[copy.host_slot] = "incomplete";
    w_.source[copy.copy_id] = w_.block_content[copy.block.id];
  } else {
    w_.block_content[copy.block.id] = "incomplete";
    w_.source[copy.copy_id] = w_.slot_content[copy.host_slot];
  }
  w_.copies.push_back(copy);
}

void Explorer::Match(size_t r) {
  Request& request = w_.requests[r];
  const auto& prompt = Scripts()[r].prompt;
  const MatchResult result = cache_->Match("", prompt, true);
  calls_.push_back([&prompt](PrefixCache* cache) { cache->Match("", prompt, true); });
  const std::string error = w_.naive.Match("", prompt, true, result);
  Expect(error.empty(), "match: " + error);
  for (const PinnedBlock& block : result.restoring) ExpectGrantable(block.block, "restored into");
  for (const PinnedBlock& block : result.device) {
    request.pinned.push_back(block);
    const std::string path = PathOfPrefix(prompt, request.pinned.size());
    Expect(w_.block_content[block.block.id] == path,
           fmt::format("I4: block {} matches {} and holds {}", block.block.id, path,
                       w_.block_content[block.block.id]));
  }
  for (const PinnedBlock& block : result.restoring) request.pinned.push_back(block);
  for (const CopyOrder& copy : result.copies) TrackCopy(copy);
  request.num_known = request.pinned.size();
  request.runs = true;
  --request.attempts_left;
}

void Explorer::Lease(size_t r) {
  const auto leased = *cache_->Lease(1);
  calls_.push_back([](PrefixCache* cache) { (void)cache->Lease(1); });
  const std::string error = w_.naive.Lease(1, leased);
  Expect(error.empty(), "lease: " + error);
  for (const PoolBlock& block : leased) {
    ExpectGrantable(block, "leased");
    w_.block_content[block.id] = "unwritten";
    w_.requests[r].own.push_back({block});
  }
}

void Explorer::StartStep(size_t r) {
  w_.requests[r].own.back().step = PrivateBlock::Step::kUnderWay;
}

void Explorer::EndStep(size_t r) {
  Request& request = w_.requests[r];
  request.own.back().step = PrivateBlock::Step::kWritten;
  w_.block_content[request.own.back().block.id] =
      PathOfPrefix(Scripts()[r].prompt, request.num_known + 1);
}

void Explorer::Commit(size_t r) {
  Request& request = w_.requests[r];
  CommitRequest commit;
  commit.parent = request.num_known == 0 ? 0 : request.pinned.back().entry;
  commit.blocks = {{request.own.back().block, {Scripts()[r].prompt[request.num_known]}}};
  const auto result = cache_->Commit(commit);
  calls_.push_back([commit](PrefixCache* cache) { (void)cache->Commit(commit); });
  const auto naive = w_.naive.Commit(commit);
  Expect(result.ok() && naive.has_value() && *result == *naive, "commit: another answer");
  if (!violation_.empty()) return;
  const CommittedBlock committed = result->front();
  ++request.num_known;
  if (committed.entry == 0) {
    // Its own from here on: nothing below can be committed either.
    request.own.back().step = PrivateBlock::Step::kDuplicate;
    request.num_known = kBlocksPerRequest;
    return;
  }
  PoolBlock block = request.own.back().block;
  if (committed.duplicate) {
    request.own.back().step = PrivateBlock::Step::kDuplicate;
    for (const auto& entry : w_.naive.entries()) {
      if (entry.handle != committed.entry) continue;
      block = {*entry.block, w_.naive.blocks()[*entry.block].generation};
    }
  } else {
    request.own.pop_back();
  }
  request.pinned.push_back({committed.entry, block});
}

void Explorer::Finish(size_t r) {
  Request& request = w_.requests[r];
  std::vector<uint64_t> entries;
  for (const PinnedBlock& pinned : request.pinned) entries.push_back(pinned.entry);
  std::vector<PoolBlock> blocks;
  for (const PrivateBlock& own : request.own) blocks.push_back(own.block);
  Expect(cache_->Release(entries).ok() && w_.naive.Release(entries), "a pin is lost");
  Expect(cache_->Return(blocks).ok() && w_.naive.Return(blocks), "a lease is lost");
  calls_.push_back([entries, blocks](PrefixCache* cache) {
    (void)cache->Release(entries);
    (void)cache->Return(blocks);
  });
  request = {.attempts_left = request.attempts_left};
}

void Explorer::TakeCopyOut() {
  const auto copies = cache_->TakeCopyOuts(1);
  calls_.push_back([](PrefixCache* cache) { cache->TakeCopyOuts(1); });
  const std::string error = w_.naive.TakeCopyOuts(1, copies);
  Expect(error.empty(), "copy out: " + error);
  for (const CopyOrder& copy : copies) TrackCopy(copy);
}

void Explorer::CopyDone(size_t i) {
  const CopyOrder copy = w_.copies[i];
  w_.copies.erase(w_.copies.begin() + static_cast<int64_t>(i));
  const bool to_host = copy.direction == CopyDirection::kToHost;
  const std::string& found =
      to_host ? w_.block_content[copy.block.id] : w_.slot_content[copy.host_slot];
  Expect(found == w_.source[copy.copy_id],
         fmt::format("I5: copy {} finds {}, not {}", copy.copy_id, found, w_.source[copy.copy_id]));
  (to_host ? w_.slot_content[copy.host_slot] : w_.block_content[copy.block.id]) = found;
  w_.source.erase(copy.copy_id);
  Expect(cache_->CopyDone(copy.copy_id).ok() && w_.naive.CopyDone(copy.copy_id), "a copy is lost");
  calls_.push_back([id = copy.copy_id](PrefixCache* cache) { (void)cache->CopyDone(id); });
}

void Explorer::Crash() {
  for (Request& request : w_.requests) {
    for (const PrivateBlock& own : request.own) {
      if (own.step == PrivateBlock::Step::kUnderWay) w_.zombie_blocks.insert(own.block.id);
    }
    // Its client tries again.
    request = {.attempts_left = request.attempts_left + (request.runs ? 1 : 0)};
  }
  for (const CopyOrder& copy : w_.copies) {
    w_.zombie_blocks.insert(copy.block.id);
    w_.zombie_slots.insert(copy.host_slot);
  }
  w_.copies.clear();
  w_.source.clear();
  w_.has_crashed = true;
  Call([](PrefixCache* cache) { cache->EndSession(); });
  w_.naive.EndSession();
}

void Explorer::Fence() {
  w_.zombie_blocks.clear();
  w_.zombie_slots.clear();
  Call([](PrefixCache* cache) { cache->Fence(); });
  w_.naive.Fence();
}

// I10: no entry goes before its children.
void Explorer::FollowEvents() {
  uint64_t lost = 0;
  for (const CacheEvent& event : cache_->TakeEvents(&lost)) {
    if (event.kind == CacheEvent::Kind::kStored) {
      Expect(event.parent == 0 || w_.parent_of.contains(event.parent), "I10: a child of nobody");
      w_.parent_of[event.entry] = event.parent;
    } else if (event.kind == CacheEvent::Kind::kRemoved) {
      w_.parent_of.erase(event.entry);
      for (const auto& [entry, parent] : w_.parent_of) {
        Expect(parent != event.entry, fmt::format("I10: entry {} is orphaned", entry));
      }
    }
  }
}

void Explorer::CheckHoldings() {
  const absl::Status status = cache_->CheckInvariants();
  Expect(status.ok(), std::string(status.message()));
  const PrefixCacheStats stats = cache_->stats();
  Expect(stats.num_free + stats.num_leased + stats.num_committed_pinned +
                 stats.num_committed_unpinned + stats.num_restoring + stats.num_copying_out +
                 stats.num_quarantined ==
             kNumBlocks,
         "I2: the states do not sum up");
  const std::string counts = w_.naive.CompareCounts(stats);
  Expect(counts.empty(), counts);
  Expect(cache_->num_available() == w_.naive.num_available(), "available: another number");
  uint32_t num_pins = 0;
  uint32_t num_leased = 0;
  for (const Request& request : w_.requests) {
    num_pins += request.pinned.size();
    num_leased += request.own.size();
    for (const PinnedBlock& pinned : request.pinned) {
      Expect(w_.naive.blocks()[pinned.block.id].generation == pinned.block.generation,
             fmt::format("I3: pinned block {} is of another generation now", pinned.block.id));
    }
  }
  for (const auto& entry : w_.naive.entries()) num_pins -= entry.pins;
  Expect(num_pins == 0, "I2: the pins are not those that the requests hold");
  Expect(num_leased == stats.num_leased, "I2: the leases are not those that the requests hold");
}

std::string Explorer::PathOf(uint64_t handle) const {
  std::string path;
  while (handle != 0) {
    const auto entry = std::ranges::find(w_.naive.entries(), handle, &NaiveCache::Entry::handle);
    path = fmt::format("{}.{}", entry->tokens[0], path);
    handle = entry->parent;
  }
  return path;
}

// A block by what it is to whom, so that states that differ in numbers alone are one.
std::string Explorer::NameOf(int32_t block) const {
  for (const auto& entry : w_.naive.entries()) {
    if (entry.block == block) return PathOf(entry.handle);
  }
  for (size_t r = 0; r < w_.requests.size(); ++r) {
    for (size_t i = 0; i < w_.requests[r].own.size(); ++i) {
      if (w_.requests[r].own[i].block.id == block) return fmt::format("r{}/{}", r, i);
    }
  }
  return fmt::format("use{}", static_cast<int>(w_.naive.blocks()[block].use));
}

std::string Explorer::Key() const {
  std::vector<std::string> parts;
  std::set<uint64_t> release_times;
  std::vector<std::tuple<uint64_t, int, uint64_t>> order;
  for (const auto& e : w_.naive.entries()) {
    if (e.pins > 0) continue;
    release_times.insert(e.released_at);
    order.emplace_back(e.released_at, e.depth, e.handle);
  }
  std::ranges::sort(order);
  const auto slot_name = [this](uint32_t slot) {
    for (const auto& e : w_.naive.entries()) {
      if (e.slot == slot) return PathOf(e.handle);
    }
    return std::string("none");
  };
  int64_t num_pinned_copies = 0;  // the lowest handle of them is the first to lose its slot
  for (const auto& e : w_.naive.entries()) {
    int64_t when = -1;
    int64_t place = -1;
    if (e.pins > 0 && e.slot) place = num_pinned_copies++;
    if (e.pins == 0) {
      when = std::distance(release_times.begin(), release_times.find(e.released_at));
      place =
          std::ranges::find(order, std::tuple(e.released_at, e.depth, e.handle)) - order.begin();
    }
    parts.push_back(fmt::format("{}:{}{}{}p{}t{},{}{}{}", PathOf(e.handle),
                                e.block ? static_cast<int>(w_.naive.blocks()[*e.block].use) : 0,
                                e.slot ? "s" : "", e.slot_is_valid ? "v" : "", e.pins, when, place,
                                e.hit ? "h" : "", e.restored ? "r" : ""));
  }
  for (const auto& copy : w_.naive.copies()) {
    parts.push_back(fmt::format("c{}{}{}>{}", copy.to_device, copy.cancelled, NameOf(copy.block),
                                slot_name(copy.slot)));
  }
  for (const int32_t block : w_.zombie_blocks) parts.push_back("zb" + NameOf(block));
  for (const uint32_t slot : w_.zombie_slots) parts.push_back("zs" + slot_name(slot));
  for (int32_t block = 0; block < static_cast<int32_t>(kNumBlocks); ++block) {
    parts.push_back("b" + NameOf(block));
  }
  std::ranges::sort(parts);
  for (const Request& request : w_.requests) {
    parts.push_back(
        fmt::format("r{}{}k{}", request.attempts_left, request.runs, request.num_known));
    for (const PinnedBlock& pinned : request.pinned) parts.push_back(PathOf(pinned.entry));
    for (const PrivateBlock& own : request.own) {
      parts.push_back(fmt::format("o{}", static_cast<int>(own.step)));
    }
  }
  parts.push_back(w_.has_crashed ? "crashed" : "");
  return fmt::format("{}", fmt::join(parts, " "));
}

std::vector<std::pair<std::string, Explorer::Step>> Explorer::StepsFrom(const World& world) {
  std::vector<std::pair<std::string, Step>> steps;
  for (size_t r = 0; r < world.requests.size(); ++r) {
    const Request& request = world.requests[r];
    const auto add = [&](const char* name, void (Explorer::*step)(size_t)) {
      steps.emplace_back(fmt::format("{}({})", name, r), [=](Explorer* e) { (e->*step)(r); });
    };
    if (!request.runs) {
      if (request.attempts_left > 0) add("Match", &Explorer::Match);
      continue;
    }
    const auto newest =
        request.own.empty() ? PrivateBlock::Step::kDuplicate : request.own.back().step;
    if (newest != PrivateBlock::Step::kUnderWay) add("Finish", &Explorer::Finish);
    if (newest == PrivateBlock::Step::kUnderWay) add("EndStep", &Explorer::EndStep);
    if (newest == PrivateBlock::Step::kWritten) add("Commit", &Explorer::Commit);
    // Plans run in order, so what a request restores is there before its next block is computed.
    const bool is_restoring = std::ranges::any_of(world.copies, [&](const CopyOrder& copy) {
      return std::ranges::any_of(request.pinned, [&](const PinnedBlock& pinned) {
        return copy.direction == CopyDirection::kToDevice && copy.block == pinned.block;
      });
    });
    if (is_restoring || request.num_known == kBlocksPerRequest) continue;
    if (newest == PrivateBlock::Step::kLeased) add("StartStep", &Explorer::StartStep);
    if (newest == PrivateBlock::Step::kDuplicate) add("Lease", &Explorer::Lease);
  }
  for (size_t i = 0; i < world.copies.size(); ++i) {
    steps.emplace_back(fmt::format("CopyDone({})", world.copies[i].copy_id),
                       [i](Explorer* e) { e->CopyDone(i); });
  }
  steps.emplace_back("TakeCopyOut", [](Explorer* e) { e->TakeCopyOut(); });
  if (!world.has_crashed) {
    steps.emplace_back("Crash", [](Explorer* e) { e->Crash(); });
  } else {
    steps.emplace_back("Fence", [](Explorer* e) { e->Fence(); });
  }
  return steps;
}

// Which situations some state was in: what is not reached is not tested.
class Reached {
 public:
  void Note(const PrefixCacheStats& stats, const NaiveCache& cache) {
    has_["a restore"] |= stats.num_restoring > 0;
    has_["two restores"] |= stats.num_restoring > 1;
    has_["a write-back"] |= stats.num_copying_out > 0;
    has_["both"] |= stats.num_restoring > 0 && stats.num_copying_out > 0;
    has_["a quarantined block"] |= stats.num_quarantined > 0;
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
  }
  std::string Missing() const {
    std::string missing;
    for (const auto& [what, is_reached] : has_) missing += is_reached ? "" : what + "; ";
    return missing;
  }

 private:
  std::map<std::string, bool> has_;
};

TEST(PrefixCacheExploration, EveryReachableStateIsSound) {
  World start;
  for (const Script& script : Scripts()) {
    start.requests.push_back({.attempts_left = script.attempts});
  }
  std::unordered_set<std::string> seen = {Explorer(start).Key()};
  std::deque<World> frontier = {start};
  size_t num_steps = 0;
  Reached reached;
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
      reached.Note(next.stats(), next.world().naive);
      if (seen.insert(next.Key()).second) frontier.push_back(next.world());
    }
  }
  fmt::print("{} states, {} steps\n", seen.size(), num_steps);
  RecordProperty("states", static_cast<int>(seen.size()));
  RecordProperty("steps", static_cast<int>(num_steps));
  EXPECT_EQ(reached.Missing(), "");
}

}  // namespace
}  // namespace wintserve
