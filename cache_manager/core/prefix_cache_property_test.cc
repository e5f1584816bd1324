// Random calls on PrefixCache, compared with NaiveCache after each. A failing sequence is shrunk to
// one from which no call can be left out. PREFIX_CACHE_SEED=<seed> runs the sequence of that seed.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cache_manager/core/naive_cache.h"
#include "cache_manager/core/prefix_cache.h"

namespace wintserve {
namespace {

constexpr uint32_t kNumBlocks = 7;
constexpr uint32_t kNumHostSlots = 4;
constexpr int kBlockSizeTokens = 2;
constexpr uint64_t kNumSteps = 6;

enum class OpKind {
  kMatch,
  kLease,
  kCommit,
  kCommitAgain,
  kRelease,
  kReleaseAll,
  kReturn,
  kTakeCopyOuts,
  kCopyDone,
  kReconcile,
  kEndSession,
  kFence,
  kFlush,
  kDistrustSteps
};

// What a, b and c choose is taken modulo what there is to choose from, so that every part of a
// sequence is a sequence.
struct Op {
  OpKind kind;
  uint32_t a, b, c;
};

std::string ToString(const Op& op) {
  constexpr const char* kNames[] = {"Match",    "Lease",        "Commit",     "CommitAgain",
                                    "Release",  "ReleaseAll",   "Return",     "TakeCopyOuts",
                                    "CopyDone", "Reconcile",    "EndSession", "Fence",
                                    "Flush",    "DistrustSteps"};
  return fmt::format("{}({}, {}, {})", kNames[static_cast<int>(op.kind)], op.a, op.b, op.c);
}

// Block number i is one of two, by bit i.
std::vector<int32_t> TokensOf(uint32_t bits, size_t num_blocks) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < num_blocks; ++i) {
    tokens.insert(tokens.end(), kBlockSizeTokens, static_cast<int32_t>(bits >> i & 1));
  }
  return tokens;
}

class Comparison {
 public:
  explicit Comparison(uint32_t write_back_ahead)
      : real_({.num_blocks = kNumBlocks,
               .num_host_slots = kNumHostSlots,
               .write_back_ahead_blocks = write_back_ahead,
               .block_size_tokens = kBlockSizeTokens,
               .root_seed = "model"}),
        naive_(kNumBlocks, kNumHostSlots, kBlockSizeTokens, write_back_ahead) {}

  PrefixCacheStats stats() const { return real_.stats(); }
  // Calls of DistrustSteps that dropped some of the entries and not all.
  int num_partly_distrusted() const { return num_partly_distrusted_; }
  // Sessions that ended with blocks leased, and entries that stay.
  int num_adoptions() const { return num_adoptions_; }

  // What differs, or "".
  std::string Apply(const Op& op) {
    std::string error = Call(op);
    if (!error.empty()) return error;
    if (const absl::Status status = real_.CheckInvariants(); !status.ok()) {
      return std::string(status.message());
    }
    const PrefixCacheStats stats = real_.stats();
    if (error = naive_.CompareCounts(stats); !error.empty()) return error;
    if (real_.num_available() != naive_.num_available()) {
      return fmt::format("{} available, not {}", real_.num_available(), naive_.num_available());
    }
    for (uint32_t bits = 0; bits < 8; ++bits) {
      const auto prompt = TokensOf(bits, 5);
      const PeekResult real = real_.Peek("", prompt);
      const PeekResult naive = naive_.Peek("", prompt);
      if (real.device_blocks != naive.device_blocks || real.host_blocks != naive.host_blocks) {
        return fmt::format("a peek of {:#x} finds {} + {} blocks, not {} + {}", bits,
                           real.device_blocks, real.host_blocks, naive.device_blocks,
                           naive.host_blocks);
      }
    }
    return "";
  }

 private:
  static std::string Salt(uint32_t choice) { return choice % 4 == 0 ? "other" : ""; }
  static std::string SameAnswer(bool real, bool naive) {
    if (real == naive) return "";
    return real ? "accepted, and not by the naive one" : "refused, and not by the naive one";
  }

  std::vector<PoolBlock> BlocksIn(NaiveCache::Use use) const {
    std::vector<PoolBlock> blocks;
    for (size_t id = 0; id < naive_.blocks().size(); ++id) {
      if (naive_.blocks()[id].use != use) continue;
      blocks.push_back({static_cast<int32_t>(id), naive_.blocks()[id].generation});
    }
    return blocks;
  }
  std::vector<uint64_t> Pins() const {
    std::vector<uint64_t> pins;
    for (const auto& entry : naive_.entries()) pins.insert(pins.end(), entry.pins, entry.handle);
    return pins;
  }

  std::string Call(const Op& op) {
    switch (op.kind) {
      case OpKind::kMatch: {
        auto tokens = TokensOf(op.b, 1 + op.a % 5);
        tokens.resize(tokens.size() - op.a / 8 % 2);
        const bool allow_restore = op.c % 4 != 0;
        const MatchResult real = real_.Match(Salt(op.c / 4), tokens, allow_restore);
        return naive_.Match(Salt(op.c / 4), tokens, allow_restore, real);
      }
      case OpKind::kLease:
        return naive_.Lease(1 + op.a % 3, *real_.Lease(1 + op.a % 3));
      case OpKind::kCommit:
        last_commit_ = CommitOf(op);
        return Commit();
      case OpKind::kCommitAgain:
        return Commit();
      case OpKind::kRelease: {
        std::vector<uint64_t> entries = Pins();
        std::ranges::shuffle(entries, std::minstd_rand(op.b));
        entries.resize(std::min<size_t>(entries.size(), 1 + op.a % 3));
        if (op.c % 16 == 0) entries.push_back(op.b % 32);
        return SameAnswer(real_.Release(entries).ok(), naive_.Release(entries));
      }
      case OpKind::kReleaseAll: {
        const auto entries = Pins();
        return SameAnswer(real_.Release(entries).ok(), naive_.Release(entries));
      }
      case OpKind::kReturn: {
        std::vector<PoolBlock> blocks = BlocksIn(NaiveCache::Use::kLeased);
        std::ranges::shuffle(blocks, std::minstd_rand(op.b));
        blocks.resize(std::min<size_t>(blocks.size(), 1 + op.a % 2));
        if (op.c % 16 == 0) blocks.push_back({static_cast<int32_t>(op.b % kNumBlocks), 1});
        return SameAnswer(real_.Return(blocks).ok(), naive_.Return(blocks));
      }
      case OpKind::kTakeCopyOuts:
        return naive_.TakeCopyOuts(1 + op.a % 3, real_.TakeCopyOuts(1 + op.a % 3));
      case OpKind::kCopyDone: {
        const auto& copies = naive_.copies();
        const uint64_t id =
            copies.empty() || op.c % 16 == 0 ? op.b % 32 : copies[op.a % copies.size()].id;
        const uint64_t step = StepOf(op);
        return SameAnswer(real_.CopyDone(id, step).ok(), naive_.CopyDone(id, step));
      }
      case OpKind::kReconcile:
        return Reconcile(op);
      case OpKind::kEndSession:
        return EndSession();
      case OpKind::kFence:
        real_.Fence();
        naive_.Fence();
        return "";
      case OpKind::kFlush: {
        std::optional<std::string> salt;
        if (op.a % 2 == 0) salt = Salt(op.b);
        const uint64_t real = real_.Flush(salt);
        const uint64_t naive = naive_.Flush(salt);
        return real == naive ? "" : fmt::format("{} entries flushed, not {}", real, naive);
      }
      case OpKind::kDistrustSteps:
        return DistrustSteps(1 + op.a % (kNumSteps + 1));
    }
    return "";
  }

  // Now and then unknown. Not in order: entries do not rely on it.
  static uint64_t StepOf(const Op& op) { return (op.c >> 20) % (kNumSteps + 1); }

  // Whoever adopts the pool finds what there is without any of it being held.
  std::string EndSession() {
    const PrefixCacheStats before = real_.stats();
    num_adoptions_ += before.num_leased > 0 && before.num_entries > 0 ? 1 : 0;
    real_.EndSession();
    naive_.EndSession();
    const PrefixCacheStats after = real_.stats();
    if (after.num_leased + after.num_restoring + after.num_committed_pinned > 0) {
      return "the session holds blocks after its end";
    }
    if (after.num_host_filling > 0) return "a host slot is being filled after the session's end";
    if (after.num_entries != before.num_entries) return "the session's end costs entries";
    if (after.num_quarantined < before.num_leased) return "leased blocks are not quarantined";
    return "";
  }

  std::string DistrustSteps(uint64_t first_step) {
    const uint64_t num_entries = real_.stats().num_entries;
    const uint64_t real = real_.DistrustSteps(first_step);
    const uint64_t naive = naive_.DistrustSteps(first_step);
    if (real != naive) return fmt::format("{} entries distrusted, not {}", real, naive);
    num_partly_distrusted_ += real > 0 && real < num_entries ? 1 : 0;
    const PrefixCacheStats before = real_.stats();
    if (real_.DistrustSteps(first_step) != 0 || real_.stats().num_free != before.num_free) {
      return "it is something else the second time";
    }
    return "";
  }

  CommitRequest CommitOf(const Op& op) const {
    CommitRequest request;
    request.step = StepOf(op);
    request.salt = Salt(op.c);
    const auto pins = Pins();
    const size_t choice = op.a % (pins.size() + 1);
    request.parent = choice == pins.size() ? 0 : pins[choice];
    if (op.c % 16 == 1) request.parent = op.a % 32;
    auto blocks = BlocksIn(NaiveCache::Use::kLeased);
    std::ranges::shuffle(blocks, std::minstd_rand(op.b));
    blocks.resize(std::min<size_t>(blocks.size(), 1 + op.b % 3));
    // Now and then a block of someone else's.
    if (op.c % 32 == 2) blocks.push_back({static_cast<int32_t>(op.b % kNumBlocks), 1});
    for (size_t i = 0; i < blocks.size(); ++i) {
      request.blocks.push_back({blocks[i], TokensOf(op.c >> (5 + i), 1)});
    }
    return request;
  }

  std::string Commit() {
    const auto real = real_.Commit(last_commit_);
    const auto naive = naive_.Commit(last_commit_);
    if (real.ok() != naive.has_value()) return SameAnswer(real.ok(), naive.has_value());
    return !naive.has_value() || *real == *naive ? "" : "another answer than the naive one's";
  }

  std::string Reconcile(const Op& op) {
    std::vector<PinCount> pins;
    uint32_t bit = 0;
    for (const uint64_t handle : Pins()) {
      if (op.a >> (bit++ % 32) & 1) pins.push_back({handle, 1});
    }
    if (op.c % 16 == 0) pins.push_back({op.c / 16 % 32, 1});
    std::vector<PoolBlock> leased;
    for (const PoolBlock& block : BlocksIn(NaiveCache::Use::kLeased)) {
      if (op.b >> (bit++ % 32) & 1) leased.push_back(block);
    }
    // Blocks whose Commit may not have been answered.
    for (const CommitBlock& block : last_commit_.blocks) {
      if (op.b >> (bit++ % 32) & 1) leased.push_back(block.block);
    }
    return SameAnswer(real_.Reconcile(pins, leased).ok(), naive_.Reconcile(pins, leased));
  }

  PrefixCache real_;
  NaiveCache naive_;
  CommitRequest last_commit_;
  int num_partly_distrusted_ = 0;
  int num_adoptions_ = 0;
};

struct Failure {
  size_t op_index;
  std::string what;
};

std::optional<Failure> FirstFailure(const std::vector<Op>& ops, Comparison* comparison) {
  for (size_t i = 0; i < ops.size(); ++i) {
    std::string what = comparison->Apply(ops[i]);
    if (!what.empty()) return Failure{i, std::move(what)};
  }
  return std::nullopt;
}

std::optional<Failure> FirstFailure(const std::vector<Op>& ops, uint32_t write_back_ahead) {
  Comparison comparison(write_back_ahead);
  return FirstFailure(ops, &comparison);
}

// In how many of the sequences something happened at all.
struct Reached {
  uint32_t num_hit = 0, num_restored = 0, num_duplicate = 0, num_evicted = 0;
  uint32_t num_evicted_from_host = 0, num_adopted = 0, num_distrusted = 0;

  void Add(const Comparison& comparison) {
    const PrefixCacheStats stats = comparison.stats();
    num_restored += stats.host_hit_tokens > 0;
    num_hit += stats.device_hit_tokens > 0;
    num_duplicate += stats.duplicate_commits > 0;
    num_evicted += stats.evicted_device_blocks > 0;
    num_evicted_from_host += stats.evicted_host_slots > 0;
    num_adopted += comparison.num_adoptions() > 0;
    num_distrusted += comparison.num_partly_distrusted() > 0;
  }
};

// Leaves out ever smaller runs of calls for as long as what is left still fails.
std::vector<Op> Shrink(std::vector<Op> ops,
                       const std::function<bool(const std::vector<Op>&)>& fails) {
  for (size_t run = std::max<size_t>(ops.size() / 2, 1);;) {
    bool has_shrunk = false;
    for (size_t begin = 0; begin < ops.size();) {
      std::vector<Op> fewer(ops.begin(), ops.begin() + static_cast<int64_t>(begin));
      fewer.insert(fewer.end(),
                   ops.begin() + static_cast<int64_t>(std::min(begin + run, ops.size())),
                   ops.end());
      if (fails(fewer)) {
        ops = std::move(fewer);
        has_shrunk = true;
      } else {
        begin += run;
      }
    }
    if (run > 1) {
      run /= 2;
    } else if (!has_shrunk) {
      return ops;
    }
  }
}

std::vector<Op> RandomOps(uint32_t seed) {
  std::mt19937 rng(seed);
  std::discrete_distribution<int> kind({16, 10, 18, 1, 8, 6, 5, 12, 18, 1, 2, 2, 1, 2});
  std::vector<Op> ops(20 + rng() % 180);
  for (Op& op : ops)
    op = {static_cast<OpKind>(kind(rng)), static_cast<uint32_t>(rng()),
          static_cast<uint32_t>(rng()), static_cast<uint32_t>(rng())};
  return ops;
}

TEST(PrefixCacheProperty, BehavesLikeTheNaiveCache) {
  const char* const seed_text = std::getenv("PREFIX_CACHE_SEED");
  const uint32_t first_seed = seed_text != nullptr
                                  ? static_cast<uint32_t>(std::strtoul(seed_text, nullptr, 10))
                                  : std::random_device{}();
  const uint32_t num_sequences = seed_text != nullptr ? 1 : 4000;
  Reached reached;
  for (uint32_t i = 0; i < num_sequences; ++i) {
    const std::vector<Op> ops = RandomOps(first_seed + i);
    const uint32_t write_back_ahead = (first_seed + i) % kNumBlocks + 1;
    Comparison comparison(write_back_ahead);
    if (!FirstFailure(ops, &comparison).has_value()) {
      reached.Add(comparison);
      continue;
    }
    const std::vector<Op> minimal = Shrink(ops, [write_back_ahead](const std::vector<Op>& fewer) {
      return FirstFailure(fewer, write_back_ahead).has_value();
    });
    std::string text;
    for (const Op& op : minimal) text += "  " + ToString(op) + "\n";
    const Failure failure = *FirstFailure(minimal, write_back_ahead);
    FAIL() << "call " << failure.op_index << ": " << failure.what
           << "\nPREFIX_CACHE_SEED=" << first_seed + i << ", " << ops.size()
           << " calls, shrunk to:\n"
           << text;
  }
  if (seed_text != nullptr) return;
  // Sequences that stay near the empty cache would prove little.
  fmt::print(
      "of {} sequences: {} hit, {} restored, {} duplicates, {} evicted, {} from the host, {} with "
      "a "
      "session that ended amid its work, {} with steps distrusted\n",
      num_sequences, reached.num_hit, reached.num_restored, reached.num_duplicate,
      reached.num_evicted, reached.num_evicted_from_host, reached.num_adopted,
      reached.num_distrusted);
  for (const uint32_t num_reached :
       {reached.num_hit, reached.num_restored, reached.num_duplicate, reached.num_evicted,
        reached.num_evicted_from_host, reached.num_adopted, reached.num_distrusted}) {
    EXPECT_GT(num_reached, num_sequences / 50);
  }
}

// The search for a minimum has to work on the day it is needed.
TEST(PrefixCacheProperty, ShrinksToTheCallsThatMatter) {
  std::vector<Op> ops = RandomOps(1);
  ops.insert(ops.begin() + 3, Op{OpKind::kFence, 7, 0, 0});
  ops.insert(ops.begin() + 15, Op{OpKind::kFence, 8, 0, 0});
  const auto minimal = Shrink(ops, [](const std::vector<Op>& fewer) {
    const auto has = [&fewer](uint32_t a) {
      return std::ranges::any_of(
          fewer, [a](const Op& op) { return op.kind == OpKind::kFence && op.a == a; });
    };
    return has(7) && has(8);
  });
  ASSERT_EQ(minimal.size(), 2u);
  EXPECT_EQ(minimal[0].a, 7u);
  EXPECT_EQ(minimal[1].a, 8u);
}

}  // namespace
}  // namespace wintserve
