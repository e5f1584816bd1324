#include "tests/simulation/ledger.h"

#include <algorithm>
#include <span>

namespace wintserve::simulation {
namespace {

std::string Name(const SequenceKey& key) { return fmt::format("{}.{}", key.request, key.choice); }

}  // namespace

Ledger::Ledger(const SimulationConfig& config, const References* references, Report* report)
    : block_size_(static_cast<size_t>(config.scheduler.block_size_tokens)),
      references_(*references),
      report_(*report) {
  OnPoolReplaced(config.scheduler.num_blocks);
}

void Ledger::OnPoolReplaced(int num_blocks) {
  if (!in_flight_.empty()) report_.Violation("I5", "a new pool while a plan is in flight");
  OnSessionLost();
  blocks_.assign(static_cast<size_t>(num_blocks), Block{});
  entries_.clear();
  copies_.clear();
  slots_.clear();
}

void Ledger::OnServerLost() {
  OnSessionLost();
  for (Block& block : blocks_) block = Block{.generation = block.generation};
  for (auto& [id, entry] : entries_) entry.pins = 0;
  copies_.clear();
}

void Ledger::OnCommand(const CacheCommand& command, bool has_session) {
  const auto check_session = [&](const char* name) {
    if (!has_session) report_.Violation("I8", "{} without a session is never answered", name);
  };
  if (std::holds_alternative<PeekCommand>(command)) {
    check_session("a Peek");
  } else if (const auto* match = std::get_if<MatchCommand>(&command)) {
    check_session("a Match");
    matches_[match->tag] = *match;
  } else if (const auto* lease = std::get_if<LeaseCommand>(&command)) {
    check_session("a Lease");
    leases_.insert(lease->tag);
  } else if (const auto* commit = std::get_if<CommitCommand>(&command)) {
    check_session("a Commit");
    OnCommit(*commit);
  } else if (const auto* release = std::get_if<ReleaseCommand>(&command)) {
    OnRelease(*release);
  } else if (const auto* give_back = std::get_if<ReturnCommand>(&command)) {
    OnReturn(*give_back);
  } else {
    OnCopyDone(std::get<CopyDoneCommand>(command));
  }
}

void Ledger::OnCommit(const CommitCommand& command) {
  const CommitRequest& request = command.request;
  size_t index = 0;
  uint64_t parent_history = kEmptyHistory;
  if (request.parent != 0) {
    const auto parent = entries_.find(request.parent);
    if (parent == entries_.end() || parent->second.pins == 0) {
      report_.Violation("I3", "a Commit below entry {}, which is not pinned", request.parent);
      return;
    }
    index = parent->second.depth;
    parent_history = parent->second.history;
    if (parent->second.salt != request.salt) {
      report_.Violation("I4", "a Commit of salt '{}' below an entry of salt '{}'", request.salt,
                        parent->second.salt);
    }
  }
  for (const CommitBlock& named : request.blocks) {
    if (!IsValid(named.block) || !blocks_[named.block.id].leased) {
      report_.Violation("I3", "a Commit of block {}@{}, which is not leased", named.block.id,
                        named.block.generation);
      return;
    }
    Block& block = blocks_[named.block.id];
    if (block.committing || block.owner == nullptr) {
      report_.Violation("I3", "a Commit of block {}, which {}", named.block.id,
                        block.committing ? "is being committed" : "no sequence has had");
      return;
    }
    const ReferenceSequence& owner = *block.owner;
    if (block.acknowledged_tokens < block_size_) {
      report_.Violation("I4",
                        "a Commit of block {} of sequence {}, of which every rank has "
                        "acknowledged {} of {} tokens",
                        named.block.id, Name(owner.key), block.acknowledged_tokens, block_size_);
    }
    const bool is_its_content =
        block.index == index && owner.salt == request.salt &&
        owner.HistoryOf(index * block_size_) == parent_history &&
        named.tokens.size() == block_size_ &&
        std::equal(named.tokens.begin(), named.tokens.end(),
                   owner.tokens.begin() + static_cast<std::ptrdiff_t>(index * block_size_));
    if (!is_its_content) {
      report_.Violation("I4",
                        "a Commit of block {} of sequence {} (number {} of its table) as "
                        "number {} of a chain, with other tokens, history or salt",
                        named.block.id, Name(owner.key), block.index, index);
    }
    block.committing = true;
    ++index;
    parent_history = owner.HistoryOf(index * block_size_);
  }
  commits_[command.tag] = command;
}

void Ledger::OnRelease(const ReleaseCommand& command) {
  for (const uint64_t id : command.entries) {
    const auto it = entries_.find(id);
    if (it == entries_.end() || it->second.pins == 0) {
      report_.Violation("I2", "a Release of entry {}, which is not pinned", id);
      return;
    }
    Entry& entry = it->second;
    --entry.pins;
    if (!entry.block.has_value()) continue;
    const size_t num_readers = NumReaders(*entry.block);
    if (static_cast<size_t>(entry.pins) < num_readers && blocks_[*entry.block].entry == id) {
      report_.Violation("I5",
                        "a Release of entry {} (block {}), {} pins are left and {} sequences "
                        "use it in plans that are not acknowledged",
                        id, *entry.block, entry.pins, num_readers);
    }
    if (entry.pins == 0) blocks_[*entry.block].entry = 0;
  }
}

void Ledger::OnReturn(const ReturnCommand& command) {
  for (const PoolBlock& named : command.blocks) {
    if (!IsValid(named) || !blocks_[named.id].leased) {
      report_.Violation("I2", "a Return of block {}@{}, which is not leased", named.id,
                        named.generation);
      return;
    }
    Block& block = blocks_[named.id];
    if (block.committing) {
      report_.Violation("I2", "a Return of block {}, which is being committed", named.id);
    }
    if (IsInFlight(named.id)) {
      report_.Violation("I5", "a Return of block {}, which a plan that is not acknowledged names",
                        named.id);
    }
    block = Block{.generation = block.generation};
  }
}

void Ledger::OnCopyDone(const CopyDoneCommand& command) {
  for (const uint64_t id : command.copy_ids) {
    const auto copy = copies_.find(id);
    if (copy == copies_.end() || !copy->second.done || copy->second.is_reported) {
      report_.Violation("I5", "copy {} is reported as done and {}", id,
                        copy == copies_.end() ? "was not ordered"
                        : copy->second.done   ? "was reported before"
                                              : "has not run on every rank");
      return;
    }
    copy->second.is_reported = true;
  }
}

void Ledger::OnReply(const CacheReply& reply) {
  if (const auto* matched = std::get_if<Matched>(&reply)) {
    OnMatched(*matched);
  } else if (const auto* leased = std::get_if<Leased>(&reply)) {
    OnLeased(*leased);
  } else if (const auto* committed = std::get_if<Committed>(&reply)) {
    OnCommitted(*committed);
  } else if (const auto* copy_out = std::get_if<CopyOut>(&reply)) {
    for (const CopyOrder& order : copy_out->copies) AddCopy(order);
  }
}

void Ledger::OnMatched(const Matched& matched) {
  const MatchCommand command = std::move(matches_.at(matched.tag));
  matches_.erase(matched.tag);
  Entry content{.block = std::nullopt, .pins = 0, .salt = command.salt, .depth = 0};
  const auto pin = [&](const PinnedBlock& pinned) {
    const size_t begin = content.depth * block_size_;
    ++content.depth;
    if (content.depth * block_size_ >= command.tokens.size()) {
      report_.Violation("I4", "a match of {} blocks in {} tokens leaves nothing to compute",
                        content.depth, command.tokens.size());
      return;
    }
    for (size_t i = begin; i < begin + block_size_; ++i) {
      content.history = ExtendHistory(content.history, command.tokens[i]);
    }
    Pin(pinned, content);
  };
  for (const PinnedBlock& pinned : matched.result.device) pin(pinned);
  for (const PinnedBlock& pinned : matched.result.restoring) {
    if (IsInFlight(pinned.block.id)) {
      report_.Violation("I5",
                        "block {} is restored into while a plan that names it is not "
                        "acknowledged",
                        pinned.block.id);
    }
    pin(pinned);
  }
  for (const CopyOrder& order : matched.result.copies) AddCopy(order);
}

void Ledger::Pin(const PinnedBlock& pinned, const Entry& content) {
  Entry* entry = CheckContent(pinned.entry, content);
  Block& block = blocks_[pinned.block.id];
  if ((block.leased && !block.uncertain) || pinned.block.generation < block.generation ||
      (block.entry != 0 && block.entry != pinned.entry) ||
      (entry->pins > 0 && entry->block.has_value() && *entry->block != pinned.block.id)) {
    report_.Violation("I5",
                      "entry {} is matched in block {}@{}, which is {} at generation {}, "
                      "entry {}",
                      pinned.entry, pinned.block.id, pinned.block.generation,
                      block.leased ? "leased" : "not leased", block.generation, block.entry);
  }
  block.generation = pinned.block.generation;
  block.entry = pinned.entry;
  entry->block = pinned.block.id;
  ++entry->pins;
}

Ledger::Entry* Ledger::CheckContent(uint64_t id, const Entry& content) {
  const auto [it, is_new] = entries_.try_emplace(id, content);
  Entry& entry = it->second;
  if (!is_new && (entry.salt != content.salt || entry.depth != content.depth ||
                  entry.history != content.history)) {
    report_.Violation("I4",
                      "entry {} of salt '{}' at depth {} is given out for other tokens, or "
                      "salt '{}' at depth {}",
                      id, entry.salt, entry.depth, content.salt, content.depth);
  }
  return &entry;
}

void Ledger::OnLeased(const Leased& leased) {
  leases_.erase(leased.tag);
  for (const PoolBlock& named : leased.blocks) {
    Block& block = blocks_[named.id];
    if (block.leased || block.entry != 0 || named.generation <= block.generation ||
        IsInFlight(named.id)) {
      report_.Violation("I5", "block {}@{} is leased and is {}{} at generation {}", named.id,
                        named.generation, block.leased || block.entry != 0 ? "in use" : "free",
                        IsInFlight(named.id) ? ", named by a plan that is not acknowledged," : "",
                        block.generation);
    }
    block = Block{.generation = named.generation, .leased = true};
  }
}

void Ledger::OnCommitted(const Committed& committed) {
  const CommitRequest request = std::move(commits_.at(committed.tag).request);
  commits_.erase(committed.tag);
  if (committed.blocks.size() != request.blocks.size()) {
    report_.Violation("I2", "{} blocks were committed, the answer has {}", request.blocks.size(),
                      committed.blocks.size());
    return;
  }
  for (size_t i = 0; i < request.blocks.size(); ++i) {
    const CommittedBlock& result = committed.blocks[i];
    const int32_t id = request.blocks[i].block.id;
    Block& block = blocks_[id];
    block.committing = false;
    block.uncertain = false;
    if (result.entry == 0) {
      ++report_.counters.orphan_commits;
      continue;
    }
    const size_t depth = block.index + 1;
    const Entry content{.block = std::nullopt,
                        .pins = 0,
                        .salt = request.salt,
                        .depth = depth,
                        .history = block.owner->HistoryOf(depth * block_size_)};
    Entry* entry = CheckContent(result.entry, content);
    // Without pins it may have got another block, by a Commit whose answer was lost.
    if (entry->pins++ == 0) entry->block.reset();
    if (result.duplicate) {
      ++report_.counters.duplicate_commits;
      continue;
    }
    if (entry->pins > 1 && entry->block != id) {
      report_.Violation("I4", "block {} becomes the pinned entry {} of block {}", id, result.entry,
                        entry->block.value_or(-1));
    }
    block.leased = false;
    block.entry = result.entry;
    entry->block = id;
  }
}

void Ledger::AddCopy(const CopyOrder& order) {
  if (!copies_.emplace(order.copy_id, Copy{.order = order}).second) {
    report_.Violation("I5", "copy {} is ordered twice", order.copy_id);
  }
}

void Ledger::OnSessionLost() {
  matches_.clear();
  commits_.clear();
  leases_.clear();
  for (Block& block : blocks_) {
    block.uncertain |= block.committing;
    block.committing = false;
  }
}

void Ledger::OnSessionResumed(const HeldBlocks& held) {
  std::map<uint64_t, int> pins;
  for (const PinCount& pin : held.pins) {
    const auto entry = entries_.find(pin.entry);
    const int known = entry == entries_.end() ? 0 : entry->second.pins;
    pins[pin.entry] += static_cast<int>(pin.count);
    if (pins[pin.entry] > known) {
      report_.Violation("I2", "the session claims {} pins of entry {}, it has {}", pins[pin.entry],
                        pin.entry, known);
      return;
    }
  }
  std::set<int32_t> leased;
  for (const PoolBlock& block : held.leased) {
    leased.insert(block.id);
    if (!IsValid(block) || !blocks_[block.id].leased) {
      report_.Violation("I2", "the session claims block {}@{}, which it did not lease", block.id,
                        block.generation);
      return;
    }
  }
  for (auto& [id, entry] : entries_) {
    entry.pins = pins.contains(id) ? pins[id] : 0;
    if (entry.pins == 0 && entry.block.has_value() && blocks_[*entry.block].entry == id) {
      blocks_[*entry.block].entry = 0;
    }
  }
  for (size_t id = 0; id < blocks_.size(); ++id) {
    Block& block = blocks_[id];
    if (block.leased && !leased.contains(static_cast<int32_t>(id))) {
      block = Block{.generation = block.generation};
    }
    if (NumReaders(static_cast<int32_t>(id)) > 0 && !block.leased && block.entry == 0) {
      report_.Violation("I5", "the session gives up block {}, which a plan in flight names", id);
    }
  }
  // Write-backs will be ordered again.
  std::erase_if(copies_, [](const auto& item) {
    return item.second.order.direction == CopyDirection::kToHost;
  });
  for (auto& [id, copy] : copies_) {
    const Block& block = blocks_[copy.order.block.id];
    copy.cancelled |= !copy.is_reported && block.entry == 0;
  }
}

void Ledger::CheckQuiescent(int num_leased_ahead) const {
  for (const auto& [id, entry] : entries_) {
    if (entry.pins != 0) report_.Violation("I2", "entry {} has {} pins left", id, entry.pins);
  }
  const auto num_leased = std::count_if(blocks_.begin(), blocks_.end(),
                                        [](const Block& block) { return block.leased; });
  if (num_leased != num_leased_ahead) {
    report_.Violation("I2", "{} blocks are leased, the scheduler has {} in stock", num_leased,
                      num_leased_ahead);
  }
  if (!slots_.empty()) report_.Violation("I8", "slot {} is in use", slots_.begin()->first);
  for (const auto& [id, copy] : copies_) {
    if (!copy.is_reported && !copy.cancelled) {
      report_.Violation("I8", "copy {} was never done", id);
    }
  }
  if (!matches_.empty() || !commits_.empty() || !leases_.empty()) {
    report_.Violation("I8", "a request to the cache manager was never answered");
  }
}

const MatchCommand* Ledger::FindMatch(uint64_t tag) const {
  const auto it = matches_.find(tag);
  return it == matches_.end() ? nullptr : &it->second;
}

bool Ledger::IsValid(const PoolBlock& block) const {
  return block.id >= 0 && static_cast<size_t>(block.id) < blocks_.size() &&
         blocks_[block.id].generation == block.generation;
}

}  // namespace wintserve::simulation
