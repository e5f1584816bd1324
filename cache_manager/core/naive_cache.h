// PrefixCache again, as plainly as its contract reads: vectors, linear searches, nothing kept that
// can be recomputed. What the tests compare the real one with.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "cache_manager/core/cache_messages.h"

namespace wintserve {

// Which free block or slot is taken is left to the real one: the calls below take its answer and
// return what is wrong with it, or "".
class NaiveCache {
 public:
  enum class Use { kFree, kLeased, kCommitted, kCopyingOut, kRestoring, kQuarantined };
  struct Block {
    Use use = Use::kFree;
    uint32_t generation = 1;
  };
  struct Entry {
    uint64_t handle = 0;
    uint64_t parent = 0;  // 0: the root of `salt`
    int depth = 1;
    std::string salt;
    std::vector<int32_t> tokens;
    std::optional<int32_t> block;
    std::optional<uint32_t> slot;
    bool slot_is_valid = false;
    uint64_t block_step = 0;  // once the block is written
    uint64_t slot_step = 0;   // once the slot is valid
    uint32_t pins = 0;
    uint64_t released_at = 0;
    bool hit = false;
    bool on_long_chain = false;
    bool restored = false;
    bool flushed = false;
  };
  struct Copy {
    uint64_t id = 0;
    bool to_device = false;
    int32_t block = 0;
    uint32_t slot = 0;
    bool cancelled = false;
  };

  NaiveCache(uint32_t num_blocks, uint32_t num_slots, int block_size, size_t write_back_ahead)
      : block_size_(static_cast<size_t>(block_size)),
        num_slots_(num_slots),
        write_back_ahead_(write_back_ahead),
        blocks_(num_blocks) {}

  PeekResult Peek(const std::string& salt, std::span<const int32_t> tokens) const;
  std::string Match(const std::string& salt, std::span<const int32_t> tokens, bool allow_restore,
                    const MatchResult& real);
  std::string Lease(uint32_t count, const std::vector<PoolBlock>& real);
  // nullopt: refused.
  std::optional<std::vector<CommittedBlock>> Commit(const CommitRequest& request);
  bool Release(std::span<const uint64_t> entries);
  bool Return(std::span<const PoolBlock> blocks);
  std::string TakeCopyOuts(size_t max_copies, const std::vector<CopyOrder>& real);
  bool CopyDone(uint64_t copy_id, uint64_t step);
  bool Reconcile(std::span<const PinCount> pins, std::span<const PoolBlock> leased);
  void EndSession();
  void Fence();
  uint64_t Flush(const std::optional<std::string>& salt);
  uint64_t DistrustSteps(uint64_t first_step);
  uint32_t num_available() const;
  // The states of blocks and slots, and the number of entries.
  std::string CompareCounts(const PrefixCacheStats& real) const;

  const std::vector<Block>& blocks() const { return blocks_; }
  const std::vector<Entry>& entries() const { return entries_; }
  const std::vector<Copy>& copies() const { return copies_; }

 private:
  Use UseOf(const Entry& entry) const {
    return entry.block ? blocks_[*entry.block].use : Use::kFree;
  }
  bool IsReady(const Entry& entry) const {
    return UseOf(entry) == Use::kCommitted || UseOf(entry) == Use::kCopyingOut;
  }
  const Entry* Find(uint64_t handle) const;
  Entry* Find(uint64_t handle);
  Entry* FindChild(const std::string& salt, uint64_t parent, std::span<const int32_t> tokens);
  Entry* OwnerOf(int32_t block);
  bool IsCurrent(const PoolBlock& block) const;
  bool HasChild(const Entry& entry, bool on_device) const;
  bool IsSlotInCopy(uint32_t slot) const;
  bool IsSlotFree(uint32_t slot) const;
  bool HasUnusedCopy(const Entry& entry) const;
  std::vector<uint64_t> Chain(const std::string& salt, std::span<const int32_t> tokens) const;
  // Handles; 0: none.
  uint64_t NextToEvict(bool from_device) const;
  // Without pins and COMMITTED, in the order in which they would be evicted.
  std::vector<Entry> IdleEntries() const;
  // How many of them count as about to be evicted.
  size_t NumAboutToGo(const std::vector<Entry>& idle) const;
  // The entry that is written back next, and the one that loses its slot for it (0: one is free).
  struct WriteBack {
    uint64_t entry = 0;
    uint64_t donor = 0;
  };
  WriteBack NextWriteBack() const;
  void Free(int32_t block);
  bool EvictFromDevice();
  void EvictFromHost(uint64_t handle);
  void RemoveWithDescendants(uint64_t handle);
  void Unpin(uint64_t handle, uint32_t count);
  void CancelRestore(uint64_t handle);
  void EndFlushed();
  void CompleteRestores();
  void FinishCopy(const Copy& copy, uint64_t step);
  void FlushEntries(const std::set<uint64_t>& handles);

  const size_t block_size_;
  const uint32_t num_slots_;
  const size_t write_back_ahead_;
  std::vector<Block> blocks_;
  std::vector<Entry> entries_;
  std::vector<Copy> copies_;
  uint64_t last_handle_ = 0;
  uint64_t now_ = 0;
};

}  // namespace wintserve
