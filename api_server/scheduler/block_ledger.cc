#include "api_server/scheduler/block_ledger.h"

#include <algorithm>
#include <utility>

#include "common/check.h"

namespace wintserve {

HeldBlock BlockLedger::Take() {
  CHECK(!lease_.empty());
  const PoolBlock block = lease_.back();
  lease_.pop_back();
  return {.block = block, .leased = true};
}

void BlockLedger::Refill(int demand, int margin, uint64_t* next_tag,
                         std::vector<CacheCommand>* commands) {
  if (lost_) return;
  const int target = demand + margin;
  const int ahead = num_leased_ahead();
  if (ahead > 2 * target) {
    ReturnCommand surplus;
    surplus.blocks.assign(lease_.begin() + target, lease_.end());
    lease_.resize(target);
    num_leased_ -= static_cast<int>(surplus.blocks.size());
    commands->push_back(std::move(surplus));
    return;
  }
  // Half of the margin is used up before it is filled again: few messages, never one a step.
  if (ahead >= demand + margin / 2 || lease_tag_ != 0 || exhausted_) return;
  lease_tag_ = (*next_tag)++;
  num_asked_ = static_cast<uint32_t>(target - ahead);
  dropped_since_asked_ = false;
  commands->push_back(LeaseCommand{.tag = lease_tag_, .count = num_asked_});
}

void BlockLedger::OnLeased(uint64_t tag, std::vector<PoolBlock> blocks) {
  if (tag != lease_tag_) return;  // of a session that was lost
  lease_tag_ = 0;
  exhausted_ = blocks.size() < num_asked_ && !dropped_since_asked_;
  num_leased_ += static_cast<int>(blocks.size());
  lease_.insert(lease_.end(), blocks.begin(), blocks.end());
}

void BlockLedger::OnAvailable(int num_blocks) {
  if (lost_) return;
  num_available_ = num_blocks;
  if (num_blocks > 0) exhausted_ = false;
}

void BlockLedger::LeaseBecamePin(uint64_t entry) {
  --num_leased_;
  AddPin(entry);
}

void BlockLedger::Drop(std::vector<HeldBlock>* blocks) {
  if (blocks->empty()) return;
  for (const HeldBlock& held : *blocks) {
    if (held.entry != 0) {
      const auto pin = pins_.find(held.entry);
      CHECK(pin != pins_.end(), "entry={}", held.entry);
      if (--pin->second == 0) pins_.erase(pin);
      if (!lost_) to_release_.push_back(held.entry);
    }
    if (!held.leased) continue;
    if (!lost_) {
      --num_leased_;
      to_return_.push_back(held.block);
    } else if (held.uncertain) {
      --num_leased_;  // it may be matchable by now, so nobody may write to it
    } else {
      lease_.push_back(held.block);
    }
  }
  blocks->clear();
  exhausted_ = false;
  dropped_since_asked_ = true;
}

void BlockLedger::TakeDrops(std::vector<CacheCommand>* commands) {
  if (!to_release_.empty()) {
    commands->push_back(ReleaseCommand{.entries = std::exchange(to_release_, {})});
  }
  if (!to_return_.empty()) {
    commands->push_back(ReturnCommand{.blocks = std::exchange(to_return_, {})});
  }
}

void BlockLedger::Lose() {
  lost_ = true;
  lease_tag_ = 0;
  num_available_ = 0;
  exhausted_ = false;
  to_release_.clear();
  // They were not sent, so the lease still covers them.
  num_leased_ += static_cast<int>(to_return_.size());
  lease_.insert(lease_.end(), to_return_.begin(), to_return_.end());
  to_return_.clear();
}

HeldBlocks BlockLedger::Resume(std::vector<PoolBlock> leased_by_sequences) {
  lost_ = false;
  HeldBlocks held{.pins = {}, .leased = std::move(leased_by_sequences)};
  held.leased.insert(held.leased.end(), lease_.begin(), lease_.end());
  num_leased_ = static_cast<int>(held.leased.size());
  held.pins.reserve(pins_.size());
  for (const auto& [entry, count] : pins_) held.pins.push_back({.entry = entry, .count = count});
  std::sort(held.pins.begin(), held.pins.end(),
            [](const PinCount& a, const PinCount& b) { return a.entry < b.entry; });
  return held;
}

}  // namespace wintserve
