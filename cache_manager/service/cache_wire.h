// Between the messages of proto/cache.proto and the structs of the core. What comes from a peer is
// checked here, field by field, against what the pool can hold.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cache_manager/core/cache_messages.h"
#include "cache_manager/core/pool_block.h"
#include "proto/cache.pb.h"

namespace wintserve {

// A peer's limits. Within them every field fits the core's types, and a request costs memory in
// proportion to its own size.
inline constexpr int kMaxRanks = 4;
inline constexpr uint32_t kMaxBlockSizeTokens = 4096;
inline constexpr uint64_t kMaxBlockBytes = uint64_t{1} << 40;
inline constexpr uint64_t kMaxHostBytes = uint64_t{1} << 50;
inline constexpr size_t kMaxRootSeedBytes = 4096;
inline constexpr size_t kMaxSaltBytes = 128;
inline constexpr int kMaxPromptTokens = 1 << 20;
inline constexpr int kMaxCopyIds = 1 << 20;                    // of one CopyDone
inline constexpr uint64_t kMaxStep = (uint64_t{1} << 63) - 1;  // so that nobody's sums overflow

// What a request may name.
struct PoolLimits {
  uint32_t num_blocks = 0;
  uint32_t block_size_tokens = 0;
};

// All errors are INVALID_ARGUMENT and name the request, the field, the value and what is allowed.
absl::Status CheckOpenPool(const proto::OpenPool& request);
absl::Status CheckSalt(const char* request, const std::string& salt);
// The tokens of a Peek or Match: at least one.
absl::StatusOr<std::vector<int32_t>> ReadPrompt(const proto::Match& request);
absl::StatusOr<std::vector<int32_t>> ReadPrompt(const proto::Peek& request);
absl::Status CheckLease(const proto::LeaseBlocks& request, const PoolLimits& limits);
absl::StatusOr<CommitRequest> ReadCommit(const proto::Commit& request, const PoolLimits& limits);
absl::StatusOr<std::vector<uint64_t>> ReadRelease(const proto::Release& request);
absl::StatusOr<std::vector<PoolBlock>> ReadReturn(const proto::ReturnBlocks& request,
                                                  const PoolLimits& limits);
absl::StatusOr<std::vector<uint64_t>> ReadCopyDone(const proto::CopyDone& request);
absl::StatusOr<uint64_t> ReadDistrustSteps(const proto::DistrustSteps& request);

struct HeldState {
  std::vector<PinCount> pins;
  std::vector<PoolBlock> leased;
};
absl::StatusOr<HeldState> ReadReconcile(const proto::Reconcile& request, const PoolLimits& limits);

void Write(const PoolBlock& block, proto::Block* message);
void Write(const CopyOrder& copy, proto::Copy* message);
void Write(const PeekResult& result, proto::Peeked* message);
void Write(const MatchResult& result, proto::Matched* message);
void Write(const std::vector<PoolBlock>& blocks, proto::BlocksLeased* message);
void Write(const std::vector<CommittedBlock>& blocks, proto::Committed* message);
void Write(const PrefixCacheStats& stats, proto::StatsReply* message);
void Write(const CacheEvent& event, uint64_t pool_epoch, proto::CacheEvent* message);

}  // namespace wintserve
