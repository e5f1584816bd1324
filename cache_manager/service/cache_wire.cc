#include "cache_manager/service/cache_wire.h"

#include <fmt/format.h>

#include <limits>
#include <unordered_set>
#include <utility>

#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr uint32_t kMaxId = std::numeric_limits<int32_t>::max();

template <typename Value, typename Limit>
absl::Status CheckRange(const char* request, const std::string& field, Value value, Limit lowest,
                        Limit highest) {
  if (value >= lowest && value <= highest) return absl::OkStatus();
  return absl::InvalidArgumentError(
      fmt::format("{}: {} is {}; allowed: {} to {}", request, field, value, lowest, highest));
}

using WireTokens = google::protobuf::RepeatedField<uint32_t>;

absl::Status CheckTokens(const char* request, const WireTokens& tokens) {
  for (int i = 0; i < tokens.size(); ++i) {
    if (tokens[i] > kMaxId) {
      return CheckRange(request, fmt::format("tokens[{}]", i), tokens[i], 0u, kMaxId);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ReadPromptTokens(const char* request, const std::string& salt,
                                                      const WireTokens& tokens) {
  RETURN_IF_ERROR(CheckSalt(request, salt));
  RETURN_IF_ERROR(CheckRange(request, "the number of tokens", tokens.size(), 1, kMaxPromptTokens));
  RETURN_IF_ERROR(CheckTokens(request, tokens));
  return std::vector<int32_t>(tokens.begin(), tokens.end());
}

using WireBlocks = google::protobuf::RepeatedPtrField<proto::Block>;

// Known to the pool and each named once.
absl::StatusOr<std::vector<PoolBlock>> ReadBlocks(const char* request, const WireBlocks& blocks,
                                                  const PoolLimits& limits) {
  std::vector<PoolBlock> read;
  read.reserve(blocks.size());
  std::unordered_set<uint32_t> seen;
  for (const proto::Block& block : blocks) {
    RETURN_IF_ERROR(CheckRange(request, "block id", block.id(), 0u, limits.num_blocks - 1));
    if (!seen.insert(block.id()).second) {
      return absl::InvalidArgumentError(
          fmt::format("{}: block {} is named twice", request, block.id()));
    }
    read.push_back({static_cast<int32_t>(block.id()), block.generation()});
  }
  return read;
}

using WireIds = google::protobuf::RepeatedField<uint64_t>;

absl::StatusOr<std::vector<uint64_t>> ReadIds(const char* request, const char* field,
                                              const WireIds& ids) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] == 0) {
      return absl::InvalidArgumentError(
          fmt::format("{}: {}[{}] is 0, which names none", request, field, i));
    }
  }
  return std::vector<uint64_t>(ids.begin(), ids.end());
}

absl::Status CheckDistinct(const char* request, const char* field, const WireIds& ids) {
  std::unordered_set<uint64_t> seen;
  for (const uint64_t id : ids) {
    if (!seen.insert(id).second) {
      return absl::InvalidArgumentError(
          fmt::format("{}: {} {} is named twice", request, field, id));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckOpenPool(const proto::OpenPool& request) {
  constexpr char kName[] = "OpenPool";
  if (request.api_epoch() == 0) return absl::InvalidArgumentError("OpenPool: api_epoch is 0");
  const bool adopts_one = request.adopt_pool_epoch() != 0;
  if (adopts_one && request.adopt_any()) {
    return absl::InvalidArgumentError(fmt::format(
        "OpenPool: adopt_pool_epoch is {:#x} with adopt_any", request.adopt_pool_epoch()));
  }
  if (adopts_one && !request.resume_only()) {
    return absl::InvalidArgumentError(fmt::format(
        "OpenPool: adopt_pool_epoch is {:#x} without resume_only", request.adopt_pool_epoch()));
  }
  if (request.adopt_any() && !request.resume_only()) {
    return absl::InvalidArgumentError("OpenPool: adopt_any without resume_only");
  }
  const bool adopts = adopts_one || request.adopt_any();
  RETURN_IF_ERROR(CheckRange(kName, "num_blocks", request.num_blocks(), adopts ? 0u : 1u, kMaxId));
  const int num_ranks = request.block_bytes_by_rank_size();
  RETURN_IF_ERROR(CheckRange(kName, "the number of block_bytes_by_rank", num_ranks, 1, kMaxRanks));
  for (int rank = 0; rank < num_ranks; ++rank) {
    RETURN_IF_ERROR(CheckRange(kName, fmt::format("block_bytes_by_rank[{}]", rank),
                               request.block_bytes_by_rank(rank), uint64_t{1}, kMaxBlockBytes));
  }
  RETURN_IF_ERROR(CheckRange(kName, "the length of root_seed", request.root_seed().size(),
                             size_t{0}, kMaxRootSeedBytes));
  RETURN_IF_ERROR(
      CheckRange(kName, "host_bytes", request.host_bytes(), uint64_t{0}, kMaxHostBytes));
  return CheckRange(kName, "block_size_tokens", request.block_size_tokens(), 1u,
                    kMaxBlockSizeTokens);
}

absl::Status CheckSalt(const char* request, const std::string& salt) {
  return CheckRange(request, "the length of salt", salt.size(), size_t{0}, kMaxSaltBytes);
}

absl::StatusOr<std::vector<int32_t>> ReadPrompt(const proto::Match& request) {
  return ReadPromptTokens("Match", request.salt(), request.tokens());
}

absl::StatusOr<std::vector<int32_t>> ReadPrompt(const proto::Peek& request) {
  return ReadPromptTokens("Peek", request.salt(), request.tokens());
}

absl::Status CheckLease(const proto::LeaseBlocks& request, const PoolLimits& limits) {
  return CheckRange("LeaseBlocks", "count", request.count(), 1u, limits.num_blocks);
}

absl::StatusOr<CommitRequest> ReadCommit(const proto::Commit& request, const PoolLimits& limits) {
  constexpr char kName[] = "Commit";
  RETURN_IF_ERROR(CheckSalt(kName, request.salt()));
  if (request.blocks_size() == 0) return absl::InvalidArgumentError("Commit: no blocks");
  RETURN_IF_ERROR(CheckRange(kName, "step", request.step(), uint64_t{0}, kMaxStep));
  ASSIGN_OR_RETURN(const std::vector<PoolBlock> blocks,
                   ReadBlocks(kName, request.blocks(), limits));
  // At most 2^31 blocks of 2^12 tokens.
  const uint64_t num_tokens = uint64_t{limits.block_size_tokens} * blocks.size();
  if (static_cast<uint64_t>(request.tokens_size()) != num_tokens) {
    return absl::InvalidArgumentError(fmt::format("Commit: {} tokens for {} blocks of {}",
                                                  request.tokens_size(), blocks.size(),
                                                  limits.block_size_tokens));
  }
  RETURN_IF_ERROR(CheckTokens(kName, request.tokens()));

  CommitRequest read{
      .parent = request.parent(), .salt = request.salt(), .blocks = {}, .step = request.step()};
  read.blocks.reserve(blocks.size());
  auto tokens = request.tokens().begin();
  for (const PoolBlock& block : blocks) {
    const auto end = tokens + limits.block_size_tokens;
    read.blocks.push_back({block, std::vector<int32_t>(tokens, end)});
    tokens = end;
  }
  return read;
}

absl::StatusOr<std::vector<uint64_t>> ReadRelease(const proto::Release& request) {
  return ReadIds("Release", "entries", request.entries());
}

absl::StatusOr<std::vector<PoolBlock>> ReadReturn(const proto::ReturnBlocks& request,
                                                  const PoolLimits& limits) {
  return ReadBlocks("ReturnBlocks", request.blocks(), limits);
}

absl::StatusOr<std::vector<uint64_t>> ReadCopyDone(const proto::CopyDone& request) {
  RETURN_IF_ERROR(
      CheckRange("CopyDone", "the number of copy_ids", request.copy_ids_size(), 0, kMaxCopyIds));
  RETURN_IF_ERROR(CheckRange("CopyDone", "step", request.step(), uint64_t{0}, kMaxStep));
  RETURN_IF_ERROR(CheckDistinct("CopyDone", "copy_id", request.copy_ids()));
  return ReadIds("CopyDone", "copy_ids", request.copy_ids());
}

absl::StatusOr<uint64_t> ReadDistrustSteps(const proto::DistrustSteps& request) {
  RETURN_IF_ERROR(
      CheckRange("DistrustSteps", "first_step", request.first_step(), uint64_t{1}, kMaxStep));
  return request.first_step();
}

absl::StatusOr<HeldState> ReadReconcile(const proto::Reconcile& request, const PoolLimits& limits) {
  constexpr char kName[] = "Reconcile";
  if (request.pinned_entry_size() != request.pin_count_size()) {
    return absl::InvalidArgumentError(
        fmt::format("Reconcile: {} entries of pinned_entry, {} of pin_count",
                    request.pinned_entry_size(), request.pin_count_size()));
  }
  // Each pinned entry has a block of its own.
  RETURN_IF_ERROR(CheckRange(kName, "the number of pinned_entry",
                             static_cast<uint32_t>(request.pinned_entry_size()), 0u,
                             limits.num_blocks));
  RETURN_IF_ERROR(CheckDistinct(kName, "entry", request.pinned_entry()));
  ASSIGN_OR_RETURN(const std::vector<uint64_t> entries,
                   ReadIds(kName, "pinned_entry", request.pinned_entry()));
  HeldState held;
  ASSIGN_OR_RETURN(held.leased, ReadBlocks(kName, request.leased(), limits));
  held.pins.reserve(entries.size());
  for (int i = 0; i < request.pin_count_size(); ++i) {
    RETURN_IF_ERROR(
        CheckRange(kName, fmt::format("pin_count[{}]", i), request.pin_count(i), 1u, kMaxId));
    held.pins.push_back({entries[i], request.pin_count(i)});
  }
  return held;
}

void Write(const PoolBlock& block, proto::Block* message) {
  message->set_id(static_cast<uint32_t>(block.id));
  message->set_generation(block.generation);
}

void Write(const CopyOrder& copy, proto::Copy* message) {
  message->set_copy_id(copy.copy_id);
  message->set_to_device(copy.direction == CopyDirection::kToDevice);
  Write(copy.block, message->mutable_block());
  message->set_host_slot(copy.host_slot);
}

void Write(const PeekResult& result, proto::Peeked* message) {
  message->set_device_blocks(result.device_blocks);
  message->set_host_blocks(result.host_blocks);
}

void Write(const MatchResult& result, proto::Matched* message) {
  const auto write = [](const PinnedBlock& pinned, proto::PinnedBlock* added) {
    added->set_entry(pinned.entry);
    Write(pinned.block, added->mutable_block());
  };
  for (const PinnedBlock& pinned : result.device) write(pinned, message->add_device());
  for (const PinnedBlock& pinned : result.restoring) write(pinned, message->add_restoring());
  for (const CopyOrder& copy : result.copies) Write(copy, message->add_copies());
}

void Write(const std::vector<PoolBlock>& blocks, proto::BlocksLeased* message) {
  for (const PoolBlock& block : blocks) Write(block, message->add_blocks());
}

void Write(const std::vector<CommittedBlock>& blocks, proto::Committed* message) {
  for (const CommittedBlock& block : blocks) {
    message->add_entry(block.entry);
    message->add_duplicate(block.duplicate);
  }
}

void Write(const PrefixCacheStats& stats, proto::StatsReply* message) {
  message->set_num_free(stats.num_free);
  message->set_num_leased(stats.num_leased);
  message->set_num_committed_pinned(stats.num_committed_pinned);
  message->set_num_committed_unpinned(stats.num_committed_unpinned);
  message->set_num_restoring(stats.num_restoring);
  message->set_num_copying_out(stats.num_copying_out);
  message->set_num_quarantined(stats.num_quarantined);
  message->set_num_host_free(stats.num_host_free);
  message->set_num_host_filling(stats.num_host_filling);
  message->set_num_host_valid(stats.num_host_valid);
  message->set_num_host_quarantined(stats.num_host_quarantined);
  message->set_num_entries(stats.num_entries);
  message->set_matches(stats.matches);
  message->set_queried_tokens(stats.queried_tokens);
  message->set_device_hit_tokens(stats.device_hit_tokens);
  message->set_host_hit_tokens(stats.host_hit_tokens);
  message->set_evicted_device_blocks(stats.evicted_device_blocks);
  message->set_evicted_host_slots(stats.evicted_host_slots);
  message->set_committed_blocks(stats.committed_blocks);
  message->set_duplicate_commits(stats.duplicate_commits);
  message->set_refused_stale(stats.refused_stale);
}

void Write(const CacheEvent& event, uint64_t pool_epoch, proto::CacheEvent* message) {
  switch (event.kind) {
    case CacheEvent::Kind::kStored:
      message->set_kind(proto::CacheEvent::KIND_STORED);
      break;
    case CacheEvent::Kind::kRemoved:
      message->set_kind(proto::CacheEvent::KIND_REMOVED);
      break;
    case CacheEvent::Kind::kTierChanged:
      message->set_kind(proto::CacheEvent::KIND_TIER_CHANGED);
      break;
  }
  message->set_pool_epoch(pool_epoch);
  message->set_entry(event.entry);
  message->set_parent(event.parent);
  message->set_on_device(event.on_device);
  message->set_on_host(event.on_host);
  for (const int32_t token : event.tokens) message->add_tokens(static_cast<uint32_t>(token));
}

}  // namespace wintserve
