// A PrefixCache with blocks of two tokens, and the calls that most tests begin with.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cache_manager/core/prefix_cache.h"

namespace wintserve {

inline std::vector<int32_t> TokensOfBlock(int32_t id) { return {id, id + 1000}; }

// The tokens of these blocks, and one more: a Match is allowed to cover all of the blocks.
inline std::vector<int32_t> Prompt(const std::vector<int32_t>& ids) {
  std::vector<int32_t> tokens;
  for (const int32_t id : ids) {
    for (const int32_t token : TokensOfBlock(id)) tokens.push_back(token);
  }
  tokens.push_back(7);
  return tokens;
}

// Whatever is released counts as about to be evicted, unless a test says otherwise.
class TestCache {
 public:
  explicit TestCache(uint32_t num_blocks, uint32_t num_host_slots = 0,
                     ChainHash chain_hash = &Xxh3ChainHash,
                     std::optional<uint32_t> write_back_ahead_blocks = {})
      : cache_({.num_blocks = num_blocks,
                .num_host_slots = num_host_slots,
                .write_back_ahead_blocks = write_back_ahead_blocks.value_or(num_blocks),
                .block_size_tokens = 2,
                .root_seed = "model"},
               chain_hash) {}
  ~TestCache() { EXPECT_EQ(cache_.CheckInvariants(), absl::OkStatus()); }

  PrefixCache* operator->() { return &cache_; }

  std::vector<PoolBlock> Lease(uint32_t count) {
    const auto leased = cache_.Lease(count);
    EXPECT_EQ(leased.status(), absl::OkStatus());
    return *leased;
  }
  static CommitRequest CommitOf(const std::vector<PoolBlock>& blocks,
                                const std::vector<int32_t>& ids, uint64_t parent = 0,
                                const std::string& salt = "") {
    CommitRequest request{parent, salt, {}};
    for (size_t i = 0; i < ids.size(); ++i) {
      request.blocks.push_back({blocks[i], TokensOfBlock(ids[i])});
    }
    return request;
  }
  std::vector<CommittedBlock> Commit(const CommitRequest& request) {
    const auto committed = cache_.Commit(request);
    EXPECT_EQ(committed.status(), absl::OkStatus());
    return *committed;
  }
  // Leases and commits a chain; its entries, each with one pin.
  std::vector<uint64_t> Store(const std::vector<int32_t>& ids, uint64_t parent = 0,
                              const std::string& salt = "") {
    const auto blocks = Lease(static_cast<uint32_t>(ids.size()));
    std::vector<uint64_t> entries;
    for (const auto& committed : Commit(CommitOf(blocks, ids, parent, salt))) {
      entries.push_back(committed.entry);
    }
    return entries;
  }
  void Release(const std::vector<uint64_t>& entries) {
    EXPECT_EQ(cache_.Release(entries), absl::OkStatus());
  }
  MatchResult Match(const std::vector<int32_t>& ids, bool allow_restore = true) {
    return cache_.Match("", Prompt(ids), allow_restore);
  }
  // Device and host blocks that a Match would find.
  std::pair<uint32_t, uint32_t> Peek(const std::vector<int32_t>& ids,
                                     const std::string& salt = "") {
    const PeekResult result = cache_.Peek(salt, Prompt(ids));
    return {result.device_blocks, result.host_blocks};
  }
  // Makes every write-back that is due; how many.
  int WriteBack() {
    int num_copies = 0;
    for (auto copies = cache_.TakeCopyOuts(100); !copies.empty();
         copies = cache_.TakeCopyOuts(100)) {
      for (const CopyOrder& copy : copies) {
        EXPECT_EQ(cache_.CopyDone(copy.copy_id), absl::OkStatus());
        ++num_copies;
      }
    }
    return num_copies;
  }
  // A chain in the host tier alone: stored, hit, written back, and pushed out by leases that are
  // returned.
  std::vector<uint64_t> StoreOnHost(const std::vector<int32_t>& ids, uint32_t num_blocks) {
    const auto entries = Store(ids);
    for (const PinnedBlock& hit : Match(ids).device) Release({hit.entry});
    Release(entries);
    WriteBack();
    EXPECT_EQ(cache_.Return(Lease(num_blocks)), absl::OkStatus());
    EXPECT_EQ(Peek(ids), (std::pair<uint32_t, uint32_t>(0, ids.size())));
    return entries;
  }

 private:
  PrefixCache cache_;
};

}  // namespace wintserve
