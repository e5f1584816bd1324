// A small configuration, step by step: 4 blocks, 2 host slots, a few requests, faults at any step,
// acknowledgements that come late and in any order.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cache_manager/core/naive_cache.h"
#include "cache_manager/core/prefix_cache.h"

namespace wintserve {

inline constexpr uint32_t kNumBlocks = 4;
inline constexpr uint32_t kNumHostSlots = 2;
inline constexpr uint32_t kWriteBackAhead = 2;
inline constexpr size_t kBlocksPerRequest = 2;

// One token a block, and one more that is always left to compute.
struct Script {
  std::vector<int32_t> prompt;
  int attempts;
};

// What runs, and what may go wrong.
struct Scenario {
  std::vector<Script> scripts;
  // At any step the API server dies, and another one adopts the pool.
  int max_deaths = 0;
  // At any step a rank goes wrong: what the steps from then on write is wrong. At any step after
  // that it is noticed: DistrustSteps. The requests give up what they hold, and try again.
  bool has_wrong_rank = false;
  // What has happened before anything may go wrong, by the names of the steps.
  std::vector<std::string> prelude = {};
};

struct PrivateBlock {
  PoolBlock block;
  enum class Step { kLeased, kUnderWay, kWritten, kDuplicate } step = Step::kLeased;
  uint64_t written_by = 0;  // the number of that step
};

struct Request {
  int attempts_left = 0;
  bool runs = false;
  bool gives_up = false;  // it only waits for its turn to give back what it holds
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

// Of the scenario with a wrong rank, steps are told apart by age alone.
inline constexpr uint64_t kGoodStep = 1;
inline constexpr uint64_t kWrongStep = 2;
inline constexpr uint64_t kLaterStep = 3;  // after DistrustSteps

struct World {
  const Scenario* scenario = nullptr;
  NaiveCache naive{kNumBlocks, kNumHostSlots, 1, kWriteBackAhead};
  std::vector<Request> requests;
  std::vector<CopyOrder> copies;           // in plans that are not acknowledged
  std::map<uint64_t, std::string> source;  // what such a copy has to find where it reads, by id
  std::set<int32_t> zombie_blocks;         // that a process of the crashed session may still use
  std::set<uint32_t> zombie_slots;
  std::map<int32_t, std::string> block_content;
  std::map<uint32_t, std::string> slot_content;
  std::map<uint64_t, uint64_t> parent_of;  // by the events
  int num_deaths = 0;
  bool has_died_unfenced = false;  // while something of a death before was quarantined
  uint64_t step = kGoodStep;       // of what is written now
  std::set<uint64_t> lost_copies;  // of the group that went wrong: nobody knows what they did
  bool has_lost_host_copy_alone = false;  // by DistrustSteps
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
  void Die();
  void Fence();
  void GoWrong();
  void Distrust();

  void TrackCopy(const CopyOrder& copy);
  void FollowEvents();
  void CheckHoldings();
  void CheckContents();
  size_t NumCached(size_t r) const;
  const std::vector<int32_t>& PromptOf(size_t r) const { return w_.scenario->scripts[r].prompt; }
  std::string PathOf(uint64_t handle) const;
  std::string NameOf(int32_t block) const;

  World w_;
  std::unique_ptr<PrefixCache> cache_;
  std::vector<std::function<void(PrefixCache*)>> calls_;
  std::string violation_;
};

}  // namespace wintserve
