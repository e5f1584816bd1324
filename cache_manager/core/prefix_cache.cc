#include "cache_manager/core/prefix_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>
#include <string_view>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "cache_manager/core/cache_state.h"
#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

absl::Status CheckDistinct(std::span<const PoolBlock> blocks, std::string_view verb) {
  std::vector<int32_t> ids;
  ids.reserve(blocks.size());
  for (const PoolBlock& block : blocks) ids.push_back(block.id);
  std::ranges::sort(ids);
  if (const auto twice = std::ranges::adjacent_find(ids); twice != ids.end()) {
    return absl::InvalidArgumentError(fmt::format("block {} is {} twice", *twice, verb));
  }
  return absl::OkStatus();
}

uint64_t StepOrUnknown(uint64_t step) { return step == 0 ? CacheState::kUnknownStep : step; }

}  // namespace

class PrefixCache::Impl {
 public:
  Impl(PrefixCacheConfig config, ChainHash chain_hash)
      : config_(std::move(config)),
        state_(config_.num_blocks, config_.num_host_slots,
               config_.write_back_ahead_blocks.value_or(
                   DefaultWriteBackAhead(config_.num_blocks, config_.num_host_slots)),
               kMaxPendingEvents, chain_hash) {
    CHECK(config_.block_size_tokens > 0, "block_size_tokens={}", config_.block_size_tokens);
  }

  PeekResult Peek(const std::string& salt, std::span<const int32_t> tokens) const;
  MatchResult Match(const std::string& salt, std::span<const int32_t> tokens, bool allow_restore);
  absl::StatusOr<std::vector<PoolBlock>> Lease(uint32_t count);
  absl::StatusOr<std::vector<CommittedBlock>> Commit(const CommitRequest& request);
  absl::Status Release(std::span<const uint64_t> entries);
  absl::Status Return(std::span<const PoolBlock> blocks);
  std::vector<CopyOrder> TakeCopyOuts(size_t max_copies);
  absl::Status CopyDone(uint64_t copy_id, uint64_t step);
  absl::Status Reconcile(std::span<const PinCount> pins, std::span<const PoolBlock> leased);
  void EndSession();
  void Fence();
  uint64_t Flush(const std::optional<std::string>& salt);
  uint64_t DistrustSteps(uint64_t first_step);
  PrefixCacheStats stats() const;
  CacheState& state() { return state_; }
  const CacheState& state() const { return state_; }

 private:
  using PinClaims = std::map<CacheEntry*, uint32_t>;

  RootDigest DigestOf(const std::string& salt) const {
    return DigestOfRoot(config_.root_seed, salt);
  }
  // The chain of `salt` that Match may use: entries that are ready, then entries on the host only.
  struct Chain {
    std::vector<CacheEntry*> device;
    std::vector<CacheEntry*> host;
  };
  Chain FindChain(const std::string& salt, std::span<const int32_t> tokens) const;
  // Where a Commit starts; nullptr: the parent is gone.
  CacheEntry* ParentOf(const CommitRequest& request);
  absl::Status CheckCommit(const CommitRequest& request);
  absl::Status CheckRepeatedBlock(const CommitBlock& block, const CacheEntry* parent) const;
  CommittedBlock CommitOne(CacheEntry* parent, const CommitBlock& block, uint64_t step);
  // REQUIRES: parents before their children, and with an entry its descendants.
  uint64_t FlushEntries(std::vector<CacheEntry*> entries);
  absl::StatusOr<PinClaims> CheckClaims(std::span<const PinCount> pins,
                                        std::span<const PoolBlock> leased);

  const PrefixCacheConfig config_;
  CacheState state_;
  PrefixCacheStats totals_;  // only the totals that are counted here
};

PrefixCache::Impl::Chain PrefixCache::Impl::FindChain(const std::string& salt,
                                                      std::span<const int32_t> tokens) const {
  Chain chain;
  const PrefixIndex& index = state_.index();
  const CacheEntry* parent = index.FindRoot(DigestOf(salt));
  const size_t block_size = static_cast<size_t>(config_.block_size_tokens);
  // Below the whole prompt: the last token's logits have to be computed.
  for (size_t begin = 0; parent != nullptr && begin + block_size < tokens.size();
       begin += block_size) {
    CacheEntry* const entry = index.FindChild(*parent, tokens.subspan(begin, block_size));
    if (entry == nullptr) break;
    if (chain.host.empty() && state_.IsReady(*entry)) {
      chain.device.push_back(entry);
    } else if (state_.IsOnHostOnly(*entry)) {
      chain.host.push_back(entry);
    } else {
      break;
    }
    parent = entry;
  }
  return chain;
}

PeekResult PrefixCache::Impl::Peek(const std::string& salt, std::span<const int32_t> tokens) const {
  const Chain chain = FindChain(salt, tokens);
  return {static_cast<uint32_t>(chain.device.size()), static_cast<uint32_t>(chain.host.size())};
}

MatchResult PrefixCache::Impl::Match(const std::string& salt, std::span<const int32_t> tokens,
                                     bool allow_restore) {
  MatchResult result;
  const Chain chain = FindChain(salt, tokens);
  for (CacheEntry* const entry : chain.device) {
    entry->was_hit = true;
    state_.Pin(entry);
    result.device.push_back({entry->handle, state_.pool().Named(*entry->block)});
  }
  // Taking a block ends no entry of the chain: each one's ancestors are roots or pinned by now.
  for (CacheEntry* const entry : chain.host) {
    if (!allow_restore) break;
    const auto block = state_.TakeBlock(BlockState::kRestoring);
    if (!block.has_value()) break;
    entry->was_hit = true;
    state_.Pin(entry);
    result.restoring.push_back({entry->handle, *block});
    result.copies.push_back(state_.StartRestore(entry, *block));
  }
  const uint64_t block_size = static_cast<uint64_t>(config_.block_size_tokens);
  ++totals_.matches;
  totals_.queried_tokens += tokens.size();
  totals_.device_hit_tokens += result.device.size() * block_size;
  totals_.host_hit_tokens += result.restoring.size() * block_size;
  return result;
}

absl::StatusOr<std::vector<PoolBlock>> PrefixCache::Impl::Lease(uint32_t count) {
  if (count == 0) return absl::InvalidArgumentError("a lease of 0 blocks; at least 1");
  std::vector<PoolBlock> leased;
  leased.reserve(std::min(count, state_.num_available()));
  while (leased.size() < count) {
    const auto block = state_.TakeBlock(BlockState::kLeased);
    if (!block.has_value()) break;
    leased.push_back(*block);
  }
  return leased;
}

CacheEntry* PrefixCache::Impl::ParentOf(const CommitRequest& request) {
  if (request.parent == 0) return state_.index().FindRoot(DigestOf(request.salt));
  CacheEntry* const parent = state_.index().FindHandle(request.parent);
  return parent != nullptr && parent->indexed ? parent : nullptr;
}

absl::Status PrefixCache::Impl::CheckCommit(const CommitRequest& request) {
  std::vector<PoolBlock> named;
  named.reserve(request.blocks.size());
  bool all_leased = true;
  for (const CommitBlock& block : request.blocks) {
    RETURN_IF_ERROR(state_.pool().CheckCurrent(block.block));
    if (block.tokens.size() != static_cast<size_t>(config_.block_size_tokens)) {
      return absl::InvalidArgumentError(
          fmt::format("block {} is committed with {} tokens; a block has {}", block.block.id,
                      block.tokens.size(), config_.block_size_tokens));
    }
    all_leased &= state_.pool().state(block.block.id) == BlockState::kLeased;
    named.push_back(block.block);
  }
  RETURN_IF_ERROR(CheckDistinct(named, "committed"));
  if (all_leased) return absl::OkStatus();

  const CacheEntry* parent = ParentOf(request);
  for (const CommitBlock& block : request.blocks) {
    if (state_.pool().state(block.block.id) != BlockState::kLeased) {
      RETURN_IF_ERROR(CheckRepeatedBlock(block, parent));
      parent = state_.EntryOf(block.block.id);
    } else if (parent != nullptr) {
      parent = state_.index().FindChild(*parent, block.tokens);
    }
  }
  return absl::OkStatus();
}

// A Commit that is sent again, as its answer was lost, names blocks that are their entries'
// already.
absl::Status PrefixCache::Impl::CheckRepeatedBlock(const CommitBlock& block,
                                                   const CacheEntry* parent) const {
  const CacheEntry* const own = state_.EntryOf(block.block.id);
  if (own == nullptr || !state_.IsReady(*own)) {
    return absl::FailedPreconditionError(
        fmt::format("block {} is not leased but {}", block.block.id,
                    ToString(state_.pool().state(block.block.id))));
  }
  if (own->tokens != block.tokens || (own->indexed && own->parent != parent)) {
    return absl::FailedPreconditionError(
        fmt::format("block {} is not leased but committed with other content, as entry {}",
                    block.block.id, own->handle));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CommittedBlock>> PrefixCache::Impl::Commit(
    const CommitRequest& request) {
  RETURN_IF_ERROR(CheckCommit(request));
  PrefixIndex& index = state_.index();
  CacheEntry* const root =
      request.parent == 0 ? index.FindOrAddRoot(DigestOf(request.salt)) : nullptr;
  CacheEntry* parent = root != nullptr ? root : ParentOf(request);
  std::vector<CommittedBlock> committed;
  committed.reserve(request.blocks.size());
  for (const CommitBlock& block : request.blocks) {
    committed.push_back(CommitOne(parent, block, StepOrUnknown(request.step)));
    parent = index.FindHandle(committed.back().entry);
  }
  if (root != nullptr) index.EraseRootIfUnused(root);
  return committed;
}

CommittedBlock PrefixCache::Impl::CommitOne(CacheEntry* parent, const CommitBlock& block,
                                            uint64_t step) {
  if (CacheEntry* const own = state_.EntryOf(block.block.id); own != nullptr) {
    if (own->pins == 0) state_.Pin(own);
    return {own->handle, false};
  }
  const bool can_have_children =
      parent != nullptr && (parent->indexed || parent->depth == 0) && state_.IsReady(*parent);
  if (!can_have_children) return {};
  const auto [entry, is_new] = state_.index().FindOrAddChild(parent, block.tokens);
  if (entry == nullptr || state_.IsRestoring(*entry)) return {};
  const bool duplicate = !is_new && !state_.IsOnHostOnly(*entry);
  if (duplicate) {
    ++totals_.duplicate_commits;
  } else {
    state_.CommitBlock(entry, block.block.id, step);
    ++totals_.committed_blocks;
  }
  state_.Pin(entry);
  return {entry->handle, duplicate};
}

absl::Status PrefixCache::Impl::Release(std::span<const uint64_t> entries) {
  // Each run of equal handles is one entry's pins.
  std::vector<uint64_t> sorted(entries.begin(), entries.end());
  std::ranges::sort(sorted);
  std::vector<std::pair<uint64_t, size_t>> counts;
  for (const uint64_t handle : sorted) {
    if (counts.empty() || counts.back().first != handle) counts.emplace_back(handle, 0);
    ++counts.back().second;
  }
  for (const auto& [handle, count] : counts) {
    const CacheEntry* const entry = state_.index().FindHandle(handle);
    if (entry == nullptr) {
      return absl::FailedPreconditionError(fmt::format("no entry {} to release", handle));
    }
    if (entry->pins < count) {
      return absl::FailedPreconditionError(fmt::format(
          "entry {} has {} pins, of which {} are released", handle, entry->pins, count));
    }
  }
  state_.Tick();
  for (const auto& [handle, count] : counts) {
    state_.Unpin(state_.index().FindHandle(handle), static_cast<uint32_t>(count));
  }
  return absl::OkStatus();
}

absl::Status PrefixCache::Impl::Return(std::span<const PoolBlock> blocks) {
  for (const PoolBlock& block : blocks) RETURN_IF_ERROR(state_.pool().CheckLeased(block));
  RETURN_IF_ERROR(CheckDistinct(blocks, "returned"));
  for (const PoolBlock& block : blocks) {
    state_.pool().Move(block.id, BlockState::kLeased, BlockState::kFree);
  }
  return absl::OkStatus();
}

std::vector<CopyOrder> PrefixCache::Impl::TakeCopyOuts(size_t max_copies) {
  std::vector<CopyOrder> copies;
  while (copies.size() < max_copies) {
    const auto copy = state_.StartWriteBack();
    if (!copy.has_value()) break;
    copies.push_back(*copy);
  }
  return copies;
}

absl::Status PrefixCache::Impl::CopyDone(uint64_t copy_id, uint64_t step) {
  if (!state_.EndCopy(copy_id, StepOrUnknown(step))) {
    return absl::FailedPreconditionError(fmt::format("no copy {} is under way", copy_id));
  }
  return absl::OkStatus();
}

absl::StatusOr<PrefixCache::Impl::PinClaims> PrefixCache::Impl::CheckClaims(
    std::span<const PinCount> pins, std::span<const PoolBlock> leased) {
  PinClaims claims;
  for (const PinCount& pin : pins) {
    CacheEntry* const entry = state_.index().FindHandle(pin.entry);
    if (entry == nullptr) {
      return absl::FailedPreconditionError(
          fmt::format("a pin on entry {} is claimed; there is no such entry", pin.entry));
    }
    if (pin.count > 0) claims[entry] += pin.count;
  }
  for (const PoolBlock& block : leased) {
    RETURN_IF_ERROR(state_.pool().CheckCurrent(block));
    if (state_.pool().state(block.id) == BlockState::kLeased) continue;
    CacheEntry* const entry = state_.EntryOf(block.id);
    if (entry == nullptr || !state_.IsReady(*entry)) {
      return absl::FailedPreconditionError(fmt::format("block {} is claimed as leased; it is {}",
                                                       block.id,
                                                       ToString(state_.pool().state(block.id))));
    }
    ++claims[entry];
  }
  RETURN_IF_ERROR(CheckDistinct(leased, "claimed"));
  for (const auto& [entry, count] : claims) {
    if (count > entry->pins) {
      return absl::FailedPreconditionError(fmt::format("{} pins on entry {} are claimed; it has {}",
                                                       count, entry->handle, entry->pins));
    }
    const CacheEntry* const parent = entry->parent;
    if (state_.IsRestoring(*entry) && parent != nullptr && state_.IsRestoring(*parent) &&
        !claims.contains(entry->parent)) {
      return absl::FailedPreconditionError(
          fmt::format("entry {}, which is being restored, is claimed without its parent {}",
                      entry->handle, parent->handle));
    }
  }
  return claims;
}

absl::Status PrefixCache::Impl::Reconcile(std::span<const PinCount> pins,
                                          std::span<const PoolBlock> leased) {
  ASSIGN_OR_RETURN(const PinClaims claims, CheckClaims(pins, leased));
  state_.Tick();
  for (CacheEntry* const entry : state_.index().AllEntries()) {
    const auto claim = claims.find(entry);
    const uint32_t claimed = claim == claims.end() ? 0 : claim->second;
    const bool is_cancelled = state_.IsRestoring(*entry) && claimed == 0;
    const uint32_t dropped = entry->pins - claimed;
    // Either may end the entry, but the first of two does not: a block being restored keeps it.
    if (dropped > 0) state_.Unpin(entry, dropped);
    if (is_cancelled) state_.CancelRestore(entry);
  }
  std::set<int32_t> kept;
  for (const PoolBlock& block : leased) kept.insert(block.id);
  for (int32_t id = 0; id < static_cast<int32_t>(config_.num_blocks); ++id) {
    if (state_.pool().state(id) == BlockState::kLeased && !kept.contains(id)) {
      state_.pool().Move(id, BlockState::kLeased, BlockState::kFree);
    }
  }
  return absl::OkStatus();
}

void PrefixCache::Impl::EndSession() {
  state_.Tick();
  for (CacheEntry* const entry : state_.index().AllEntries()) {
    const bool is_cancelled = state_.IsRestoring(*entry);
    if (entry->pins > 0) state_.Unpin(entry, entry->pins);
    if (is_cancelled) state_.CancelRestore(entry);
  }
  state_.CancelWriteBacks();
  for (int32_t id = 0; id < static_cast<int32_t>(config_.num_blocks); ++id) {
    if (state_.pool().state(id) == BlockState::kLeased) {
      state_.pool().Move(id, BlockState::kLeased, BlockState::kQuarantined);
    }
  }
}

void PrefixCache::Impl::Fence() {
  state_.EndCancelledCopies();
  for (int32_t id = 0; id < static_cast<int32_t>(config_.num_blocks); ++id) {
    if (state_.pool().state(id) == BlockState::kQuarantined) {
      state_.pool().Move(id, BlockState::kQuarantined, BlockState::kFree);
    }
  }
}

uint64_t PrefixCache::Impl::Flush(const std::optional<std::string>& salt) {
  std::vector<CacheEntry*> roots;
  if (!salt.has_value()) {
    roots = state_.index().AllRoots();
  } else if (CacheEntry* const root = state_.index().FindRoot(DigestOf(*salt)); root != nullptr) {
    roots.push_back(root);
  }
  uint64_t num_flushed = 0;
  for (CacheEntry* const root : roots) num_flushed += FlushEntries(PrefixIndex::Descendants(*root));
  return num_flushed;
}

uint64_t PrefixCache::Impl::FlushEntries(std::vector<CacheEntry*> entries) {
  for (auto entry = entries.rbegin(); entry != entries.rend(); ++entry) state_.Flush(*entry);
  return entries.size();
}

uint64_t PrefixCache::Impl::DistrustSteps(uint64_t first_step) {
  CHECK(first_step > 0, "first_step={}", first_step);
  uint64_t num_flushed = 0;
  for (CacheEntry* const root : state_.index().AllRoots()) {
    std::vector<CacheEntry*> flushed;
    absl::flat_hash_set<const CacheEntry*> is_flushed;
    for (CacheEntry* const entry : PrefixIndex::Descendants(*root)) {
      if (is_flushed.contains(entry->parent) || state_.IsWrittenSince(*entry, first_step)) {
        is_flushed.insert(entry);
        flushed.push_back(entry);
      } else {
        state_.DropHostCopyMadeSince(entry, first_step);
      }
    }
    num_flushed += FlushEntries(std::move(flushed));
  }
  return num_flushed;
}

PrefixCacheStats PrefixCache::Impl::stats() const {
  PrefixCacheStats stats = totals_;
  state_.FillStats(&stats);
  return stats;
}

PrefixCache::PrefixCache(PrefixCacheConfig config, ChainHash chain_hash)
    : impl_(std::make_unique<Impl>(std::move(config), chain_hash)) {}
PrefixCache::~PrefixCache() = default;

PeekResult PrefixCache::Peek(const std::string& salt, std::span<const int32_t> tokens) const {
  return impl_->Peek(salt, tokens);
}
MatchResult PrefixCache::Match(const std::string& salt, std::span<const int32_t> tokens,
                               bool allow_restore) {
  return impl_->Match(salt, tokens, allow_restore);
}
absl::StatusOr<std::vector<PoolBlock>> PrefixCache::Lease(uint32_t count) {
  return impl_->Lease(count);
}
absl::StatusOr<std::vector<CommittedBlock>> PrefixCache::Commit(const CommitRequest& request) {
  return impl_->Commit(request);
}
absl::Status PrefixCache::Release(std::span<const uint64_t> entries) {
  return impl_->Release(entries);
}
absl::Status PrefixCache::Return(std::span<const PoolBlock> blocks) {
  return impl_->Return(blocks);
}
std::vector<CopyOrder> PrefixCache::TakeCopyOuts(size_t max_copies) {
  return impl_->TakeCopyOuts(max_copies);
}
absl::Status PrefixCache::CopyDone(uint64_t copy_id, uint64_t step) {
  return impl_->CopyDone(copy_id, step);
}
absl::Status PrefixCache::Reconcile(std::span<const PinCount> pins,
                                    std::span<const PoolBlock> leased) {
  return impl_->Reconcile(pins, leased);
}
void PrefixCache::EndSession() { impl_->EndSession(); }
void PrefixCache::Fence() { impl_->Fence(); }
uint64_t PrefixCache::Flush(const std::optional<std::string>& salt) { return impl_->Flush(salt); }
uint64_t PrefixCache::DistrustSteps(uint64_t first_step) {
  return impl_->DistrustSteps(first_step);
}
uint32_t PrefixCache::num_available() const { return impl_->state().num_available(); }
PrefixCacheStats PrefixCache::stats() const { return impl_->stats(); }
std::vector<CacheEvent> PrefixCache::TakeEvents(uint64_t* lost) {
  return impl_->state().events().Take(lost);
}
absl::Status PrefixCache::CheckInvariants() const { return impl_->state().CheckInvariants(); }

}  // namespace wintserve
