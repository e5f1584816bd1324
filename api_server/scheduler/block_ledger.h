// Which blocks the session holds: the local lease, and what the sequences have in their tables.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "api_server/scheduler/scheduler.h"
#include "api_server/scheduler/sequence.h"

namespace wintserve {

// Blocks that are dropped here must be named by no plan in flight.
// Threading: thread-compatible.
class BlockLedger {
 public:
  // Of a new pool, of which nothing is held.
  explicit BlockLedger(int num_blocks) : num_available_(num_blocks) {}

  // The local lease.
  int num_leased_ahead() const { return static_cast<int>(lease_.size()); }
  HeldBlock Take();  // REQUIRES: num_leased_ahead() > 0

  // Blocks that could be had: the local lease, and what the cache manager could lease.
  int num_obtainable() const { return num_leased_ahead() + num_available_; }
  int num_available() const { return num_available_; }
  int num_held() const { return num_leased_ + static_cast<int>(pins_.size()); }

  // Asks for what is missing to `demand`, and then for `margin` on top; hands back what is far
  // beyond both. One request at a time, and none while the pool is known to be exhausted.
  void Refill(int demand, int margin, uint64_t* next_tag, std::vector<CacheCommand>* commands);
  bool lease_is_asked() const { return lease_tag_ != 0; }
  // The last answer was short, and nothing has become available since.
  bool exhausted() const { return exhausted_; }

  void OnLeased(uint64_t tag, std::vector<PoolBlock> blocks);
  void OnAvailable(int num_blocks);

  // A match or a commit has pinned it.
  void AddPin(uint64_t entry) { ++pins_[entry]; }
  // A commit turned the lease into a pin.
  void LeaseBecamePin(uint64_t entry);
  // Gives up all of them; the commands follow with TakeDrops.
  void Drop(std::vector<HeldBlock>* blocks);
  // Appends a Release and a Return of all that was dropped.
  void TakeDrops(std::vector<CacheCommand>* commands);

  // Until Resume(): dropped leases stay in the local lease, dropped pins are forgotten.
  void Lose();
  HeldBlocks Resume(std::vector<PoolBlock> leased_by_sequences);
  bool lost() const { return lost_; }

  const std::unordered_map<uint64_t, uint32_t>& pins() const { return pins_; }
  int num_leased() const { return num_leased_; }

 private:
  std::vector<PoolBlock> lease_;
  int num_leased_ = 0;  // in lease_ and in tables
  std::unordered_map<uint64_t, uint32_t> pins_;
  std::vector<uint64_t> to_release_;
  std::vector<PoolBlock> to_return_;
  int num_available_;
  uint64_t lease_tag_ = 0;  // of the request that is not answered; 0: none
  uint32_t num_asked_ = 0;
  bool dropped_since_asked_ = false;
  bool exhausted_ = false;
  bool lost_ = false;
};

}  // namespace wintserve
