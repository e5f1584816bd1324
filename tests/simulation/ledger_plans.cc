// The ledger's view of plans: what they name must be held.
#include <algorithm>

#include "tests/simulation/ledger.h"

namespace wintserve::simulation {

void Ledger::OnPlan(const StepPlan& plan) {
  InFlight flight{.step = plan.step, .rows = {}, .copies = {}, .written = {}};
  if (plan.rows.empty() && plan.copies.empty() && plan.slot_release.empty()) {
    report_.Violation("plan", "step {} does nothing", plan.step);
  }
  for (const BlockCopy& copy : plan.copies) PlanCopy(copy, &flight);
  for (const SlotInit& init : plan.slot_init) {
    Slot& slot = slots_[init.slot];
    if (slot.sequence != nullptr) {
      report_.Violation("plan", "step {}: slot {} is used again before its release", plan.step,
                        init.slot);
    }
    slot = Slot{.sequence = references_.Find(init.sampling), .table = {}};
    GiveBlocks(init.slot, init.block_table);
  }
  for (const BlockAppend& append : plan.block_append) GiveBlocks(append.slot, append.blocks);
  for (const PlanRow& row : plan.rows) CheckRow(row, &flight);
  in_flight_.push_back(std::move(flight));
  CheckPinCounts(in_flight_.back());
  for (const uint32_t slot : plan.slot_release) ReleaseSlot(slot);
}

void Ledger::PlanCopy(const BlockCopy& copy, InFlight* flight) {
  const auto id = static_cast<int32_t>(copy.block);
  const auto direction = copy.to_device ? CopyDirection::kToDevice : CopyDirection::kToHost;
  const auto order = std::find_if(copies_.begin(), copies_.end(), [&](const auto& item) {
    const Copy& known = item.second;
    return known.step == 0 && !known.cancelled && known.order.direction == direction &&
           known.order.block.id == id && known.order.host_slot == copy.host_slot;
  });
  if (order == copies_.end()) {
    report_.Violation("I5", "step {} copies block {} {} host slot {}, which was not ordered",
                      flight->step, id, copy.to_device ? "from" : "to", copy.host_slot);
    return;
  }
  order->second.step = flight->step;
  flight->copies.insert(id);
  ++(copy.to_device ? report_.counters.restores : report_.counters.write_backs);
}

void Ledger::GiveBlocks(uint32_t index, const std::vector<BlockId>& blocks) {
  Slot& slot = slots_[index];
  if (slot.sequence == nullptr) {
    report_.Violation("plan", "slot {} gets blocks and is not in use", index);
    return;
  }
  for (const BlockId named : blocks) {
    const auto id = static_cast<int32_t>(named);
    if (id < 0 || static_cast<size_t>(id) >= blocks_.size()) {
      report_.Violation("plan", "slot {}: there is no block {}", index, id);
      return;
    }
    Block& block = blocks_[id];
    const size_t position = slot.table.size();
    slot.table.push_back({.id = id, .generation = block.generation});
    const bool is_its_own = block.owner == slot.sequence && block.index == position;
    if (block.leased && block.owner != nullptr && !is_its_own &&
        (block.committing || IsInFlight(id))) {
      report_.Violation("I5", "sequence {}.{} gets block {}, which sequence {}.{} still uses",
                        slot.sequence->key.request, slot.sequence->key.choice, id,
                        block.owner->key.request, block.owner->key.choice);
    }
    if (!block.leased) continue;  // a pinned one; CheckHeld looks at it
    if (!is_its_own) block.acknowledged_tokens = 0;
    block.owner = slot.sequence;
    block.index = position;
  }
}

void Ledger::CheckRow(const PlanRow& row, InFlight* flight) {
  const auto it = slots_.find(row.slot);
  if (it == slots_.end() || it->second.sequence == nullptr) {
    report_.Violation("plan", "a row of slot {}, which is not in use", row.slot);
    return;
  }
  const Slot& slot = it->second;
  const size_t begin = row.position;
  const size_t end = begin + row.length;
  for (size_t index = 0; index < slot.table.size(); ++index) {
    CheckHeld(slot, index, end);
    flight->rows.insert({slot.table[index].id, slot.sequence->key});
    const size_t block_begin = index * block_size_;
    if (end <= block_begin || begin >= block_begin + block_size_) continue;
    if (!blocks_[slot.table[index].id].leased) {
      report_.Violation("I4",
                        "sequence {}.{} writes positions {} to {} into block {}, which is "
                        "not leased",
                        slot.sequence->key.request, slot.sequence->key.choice, begin, end,
                        slot.table[index].id);
    }
    flight->written.push_back(
        {.block = slot.table[index], .num_tokens = std::min(end - block_begin, block_size_)});
  }
  ++report_.counters.rows;
  if (!row.sample) ++report_.counters.prompt_chunks;
}

void Ledger::CheckHeld(const Slot& slot, size_t index, size_t end_position) const {
  const ReferenceSequence& sequence = *slot.sequence;
  const PoolBlock& named = slot.table[index];
  const Block& block = blocks_[named.id];
  const auto fail = [&](const char* text) {
    report_.Violation("I3",
                      "a row of sequence {}.{} up to position {}: block {} (number {} of its "
                      "table) {}",
                      sequence.key.request, sequence.key.choice, end_position, named.id, index,
                      text);
  };
  if (block.generation != named.generation) return fail("has another generation by now");
  if (block.leased && block.owner == &sequence && block.index == index) return;
  if (block.entry == 0) {
    return fail(block.leased ? "is another sequence's" : "is neither leased nor pinned");
  }
  const Entry& entry = entries_.at(block.entry);
  if (entry.depth != index + 1 || entry.salt != sequence.salt ||
      entry.history != sequence.HistoryOf((index + 1) * block_size_)) {
    fail("is pinned with other content");
  }
  for (const auto& [id, copy] : copies_) {
    if (copy.order.block.id == named.id && copy.order.direction == CopyDirection::kToDevice &&
        copy.step == 0 && !copy.cancelled) {
      fail("has not been restored");
    }
  }
}

void Ledger::CheckPinCounts(const InFlight& flight) const {
  for (const auto& [id, sequence] : flight.rows) {
    const Block& block = blocks_[id];
    if (block.leased || block.entry == 0) continue;
    const int pins = entries_.at(block.entry).pins;
    if (NumReaders(id) > static_cast<size_t>(pins)) {
      report_.Violation("I3", "block {} is used by {} sequences and pinned {} times", id,
                        NumReaders(id), pins);
    }
  }
}

void Ledger::ReleaseSlot(uint32_t index) {
  if (slots_.erase(index) == 0) {
    report_.Violation("plan", "slot {} is released and is not in use", index);
  }
}

void Ledger::OnPlanDone(uint64_t step) {
  if (in_flight_.empty() || in_flight_.front().step != step) {
    report_.Violation("I6", "step {} is done and is not the oldest in flight", step);
    return;
  }
  for (const Written& written : in_flight_.front().written) {
    Block& block = blocks_[written.block.id];
    if (block.generation != written.block.generation) continue;
    block.acknowledged_tokens = std::max(block.acknowledged_tokens, written.num_tokens);
  }
  for (auto& [id, copy] : copies_) copy.done |= copy.step == step;
  in_flight_.pop_front();
}

void Ledger::OnGroupLost(bool kv_trusted) {
  in_flight_.clear();
  slots_.clear();
  for (auto& [id, copy] : copies_) {
    if (copy.step == 0 || copy.done) continue;
    copy.step = 0;  // and has to be planned again
    if (!copy.cancelled) ++report_.counters.copies_lost;
  }
  if (kv_trusted) return;
  for (Block& block : blocks_) block.acknowledged_tokens = 0;
}

size_t Ledger::NumReaders(int32_t block) const {
  std::set<SequenceKey> readers;
  for (const InFlight& flight : in_flight_) {
    for (auto it = flight.rows.lower_bound({block, SequenceKey{}});
         it != flight.rows.end() && it->first == block; ++it) {
      readers.insert(it->second);
    }
  }
  return readers.size();
}

bool Ledger::IsInFlight(int32_t block) const {
  return NumReaders(block) > 0 ||
         std::any_of(in_flight_.begin(), in_flight_.end(),
                     [block](const InFlight& flight) { return flight.copies.contains(block); });
}

}  // namespace wintserve::simulation
