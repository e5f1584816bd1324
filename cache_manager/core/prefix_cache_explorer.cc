#include "cache_manager/core/prefix_cache_explorer.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <optional>
#include <tuple>

namespace wintserve {

using Use = NaiveCache::Use;

namespace {

std::string PathOfPrefix(const std::vector<int32_t>& prompt, size_t num_blocks) {
  return fmt::format("{}", fmt::join(prompt.begin(), prompt.begin() + num_blocks, "."));
}

// What a rank that has gone wrong makes of it.
std::string Wrong(const std::string& content) {
  return content.starts_with("wrong ") ? content : "wrong " + content;
}

}  // namespace

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
  CheckContents();
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
  const auto& prompt = PromptOf(r);
  const MatchResult result = cache_->Match("", prompt, true);
  calls_.push_back([&prompt](PrefixCache* cache) { cache->Match("", prompt, true); });
  const std::string error = w_.naive.Match("", prompt, true, result);
  Expect(error.empty(), "match: " + error);
  for (const PinnedBlock& block : result.restoring) ExpectGrantable(block.block, "restored into");
  for (const PinnedBlock& block : result.device) {
    request.pinned.push_back(block);
    const std::string path = PathOfPrefix(prompt, request.pinned.size());
    const std::string& content = w_.block_content[block.block.id];
    Expect(content == path || (w_.step == kWrongStep && content == Wrong(path)),
           fmt::format("I4: block {} matches {} and holds {}", block.block.id, path, content));
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
  w_.requests[r].own.back().written_by = w_.step;
}

void Explorer::EndStep(size_t r) {
  Request& request = w_.requests[r];
  PrivateBlock& own = request.own.back();
  own.step = PrivateBlock::Step::kWritten;
  const std::string path = PathOfPrefix(PromptOf(r), request.num_known + 1);
  w_.block_content[own.block.id] = own.written_by == kWrongStep ? Wrong(path) : path;
}

void Explorer::Commit(size_t r) {
  Request& request = w_.requests[r];
  CommitRequest commit;
  commit.parent = request.num_known == 0 ? 0 : request.pinned.back().entry;
  commit.blocks = {{request.own.back().block, {PromptOf(r)[request.num_known]}}};
  commit.step = request.own.back().written_by;
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
  request = {.attempts_left = request.attempts_left + (request.gives_up ? 1 : 0)};
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
  const bool was_lost = w_.lost_copies.erase(copy.copy_id) > 0;
  const bool is_wrong = w_.step == kWrongStep || was_lost;
  (to_host ? w_.slot_content[copy.host_slot] : w_.block_content[copy.block.id]) =
      is_wrong ? Wrong(found) : found;
  w_.source.erase(copy.copy_id);
  const uint64_t step = w_.step;  // of a lost one it is a guess
  Expect(cache_->CopyDone(copy.copy_id, step).ok() && w_.naive.CopyDone(copy.copy_id, step),
         "a copy is lost");
  calls_.push_back(
      [id = copy.copy_id, step](PrefixCache* cache) { (void)cache->CopyDone(id, step); });
}

// The API server dies. What follows is the pool's, whoever adopts it.
void Explorer::Die() {
  std::vector<size_t> num_cached;
  for (size_t r = 0; r < w_.requests.size(); ++r) num_cached.push_back(NumCached(r));
  w_.has_died_unfenced = !w_.zombie_blocks.empty();
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
  ++w_.num_deaths;
  Call([](PrefixCache* cache) { cache->EndSession(); });
  w_.naive.EndSession();
  const PrefixCacheStats stats = cache_->stats();
  Expect(stats.num_leased + stats.num_restoring + stats.num_committed_pinned == 0,
         "the dead API server still holds blocks");
  for (size_t r = 0; r < w_.requests.size(); ++r) {
    Expect(NumCached(r) >= num_cached[r], fmt::format("the prefix of request {} is lost", r));
  }
}

size_t Explorer::NumCached(size_t r) const {
  const PeekResult peeked = cache_->Peek("", PromptOf(r));
  return peeked.device_blocks + peeked.host_blocks;
}

void Explorer::Fence() {
  w_.zombie_blocks.clear();
  w_.zombie_slots.clear();
  Call([](PrefixCache* cache) { cache->Fence(); });
  w_.naive.Fence();
}

void Explorer::GoWrong() { w_.step = kWrongStep; }

// It is noticed: the group is gone, and with it what was under way.
void Explorer::Distrust() {
  w_.step = kLaterStep;
  for (size_t r = 0; r < w_.requests.size(); ++r) {
    Request& request = w_.requests[r];
    request.gives_up = request.runs;
    if (!request.own.empty() && request.own.back().step == PrivateBlock::Step::kUnderWay)
      EndStep(r);
  }
  for (const CopyOrder& copy : w_.copies) w_.lost_copies.insert(copy.copy_id);
  size_t num_host_copies = 0;
  for (const auto& entry : w_.naive.entries())
    num_host_copies += entry.block && entry.slot_is_valid;
  const uint64_t num_dropped = cache_->DistrustSteps(kWrongStep);
  calls_.push_back([](PrefixCache* cache) { cache->DistrustSteps(kWrongStep); });
  Expect(num_dropped == w_.naive.DistrustSteps(kWrongStep), "distrust: another number of entries");
  for (const auto& entry : w_.naive.entries())
    num_host_copies -= entry.block && entry.slot_is_valid;
  w_.has_lost_host_copy_alone = num_dropped == 0 && num_host_copies > 0;
}

// I4: whatever could be matched from now on is right.
void Explorer::CheckContents() {
  if (w_.step == kWrongStep) return;
  for (const auto& entry : w_.naive.entries()) {
    if (entry.flushed) continue;
    const std::string path = PathOf(entry.handle);
    const bool is_written = entry.block && w_.naive.blocks()[*entry.block].use != Use::kRestoring;
    Expect(!is_written || w_.block_content[*entry.block] + "." == path,
           fmt::format("I4: the block of {} holds {}", path, w_.block_content[*entry.block]));
    Expect(!entry.slot_is_valid || w_.slot_content[*entry.slot] + "." == path,
           fmt::format("I4: the host copy of {} holds {}", path, w_.slot_content[*entry.slot]));
  }
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

// A flushed entry may have outlived its parents, and has another one of its path beside it.
std::string Explorer::PathOf(uint64_t handle) const {
  std::string path;
  std::string flushed;
  while (handle != 0) {
    const auto entry = std::ranges::find(w_.naive.entries(), handle, &NaiveCache::Entry::handle);
    if (entry == w_.naive.entries().end()) break;
    if (path.empty() && entry->flushed) flushed = "flushed ";
    path = fmt::format("{}.{}", entry->tokens[0], path);
    handle = entry->parent;
  }
  return flushed + path;
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
    const bool is_written =
        e.block && (e.restored || w_.naive.blocks()[*e.block].use != Use::kRestoring);
    parts.push_back(fmt::format(
        "{}:{}{}{}p{}t{},{}{}{}w{},{}{}", PathOf(e.handle),
        e.block ? static_cast<int>(w_.naive.blocks()[*e.block].use) : 0, e.slot ? "s" : "",
        e.slot_is_valid ? "v" : "", e.pins, when, place, e.hit ? "h" : "", e.restored ? "r" : "",
        is_written ? e.block_step : 0, e.slot_is_valid ? e.slot_step : 0, e.flushed ? "f" : ""));
  }
  for (const auto& copy : w_.naive.copies()) {
    parts.push_back(fmt::format("c{}{}{}>{}{}", copy.to_device, copy.cancelled, NameOf(copy.block),
                                slot_name(copy.slot), w_.lost_copies.contains(copy.id) ? "l" : ""));
  }
  for (const int32_t block : w_.zombie_blocks) parts.push_back("zb" + NameOf(block));
  for (const uint32_t slot : w_.zombie_slots) parts.push_back("zs" + slot_name(slot));
  for (int32_t block = 0; block < static_cast<int32_t>(kNumBlocks); ++block) {
    parts.push_back("b" + NameOf(block));
  }
  std::ranges::sort(parts);
  for (const Request& request : w_.requests) {
    parts.push_back(fmt::format("r{}{}{}k{}", request.attempts_left, request.runs, request.gives_up,
                                request.num_known));
    for (const PinnedBlock& pinned : request.pinned) parts.push_back(PathOf(pinned.entry));
    for (const PrivateBlock& own : request.own) {
      parts.push_back(fmt::format("o{}w{}", static_cast<int>(own.step), own.written_by));
    }
  }
  parts.push_back(fmt::format("d{}s{}", w_.num_deaths, w_.step));
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
    if (request.gives_up) continue;
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
  const auto add = [&](const char* name, void (Explorer::*step)()) {
    steps.emplace_back(name, [=](Explorer* e) { (e->*step)(); });
  };
  if (world.num_deaths < world.scenario->max_deaths) add("Die", &Explorer::Die);
  // Of a session that goes on it is said too, after a reconnect.
  if (world.num_deaths > 0 || world.step == kLaterStep) add("Fence", &Explorer::Fence);
  if (world.scenario->has_wrong_rank && world.step == kGoodStep) add("GoWrong", &Explorer::GoWrong);
  if (world.step == kWrongStep) add("Distrust", &Explorer::Distrust);
  return steps;
}

}  // namespace wintserve
