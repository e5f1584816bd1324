// Collectives between processes of one host, through memory that they share.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/statusor.h"
#include "common/mapped_memory.h"
#include "engine_worker/collectives/collective.h"

namespace wintserve {

// One incarnation of a rank group. Equal on every rank, but for `rank`.
struct ShmGroup {
  uint64_t group_epoch = 0;  // not 0
  int rank = 0;
  int world_size = 2;      // 2 … 16
  int64_t slot_bytes = 0;  // a multiple of 64; larger messages take several rounds
};

// Size of the memory that a group needs: a header and two slots a rank.
int64_t ShmGroupMemoryBytes(int world_size, int64_t slot_bytes);

// How a round works: every rank copies its part into its slot and arrives; the last to arrive wakes
// the others; then each reads all slots. Slots alternate between two buffers, so a round needs no
// second barrier: whoever arrives at round n has read the slots of round n-1.
//
// Ownership: shares the mapping; the memory is of one group_epoch and is never used again.
// Threading: one thread calls the operations; Abort() from any thread of any rank.
// Errors:    UNAVAILABLE after Abort() by any rank. INTERNAL when ranks call different operations;
//            the group is aborted then. A rank that dies without a word leaves the others waiting
//            until somebody aborts.
class ShmCollective : public Collective {
 public:
  // `memory`: zero bytes at first, the same on every rank. INVALID_ARGUMENT: not
  // ShmGroupMemoryBytes large. FAILED_PRECONDITION: used before, by another group or by this rank.
  static absl::StatusOr<std::unique_ptr<ShmCollective>> Create(std::shared_ptr<MappedMemory> memory,
                                                               const ShmGroup& group);
  ~ShmCollective() override;

  int rank() const override { return group_.rank; }
  int world_size() const override { return group_.world_size; }
  absl::Status AllReduceSum(float* data, int64_t count) override;
  absl::Status AllGather(const float* in, int64_t count, float* out) override;
  absl::Status Broadcast(void* data, int64_t size_bytes) override;
  void Abort() override;

  // What Abort() does, also while the collective is handed on and when it is gone.
  std::function<void()> AbortFunction() const;

  // For groups whose data goes another way, to which this is what ends them. Any thread.
  bool is_aborted() const;
  // Returns once the group is aborted, at the latest after timeout_ms; whether it is.
  bool WaitForAbort(int64_t timeout_ms);
  // This rank has let go of what the others lent it. Returns once all have, at the latest after
  // timeout_ms; whether they have. `is_gone`: of another rank, that it never will because its
  // process has ended; asked now and then.
  bool Leave(
      int64_t timeout_ms, const std::function<bool(int rank)>& is_gone = [](int) { return false; });

 private:
  struct Header;
  struct SlotHeader;
  enum class Operation : uint64_t;

  ShmCollective(std::shared_ptr<MappedMemory> memory, const ShmGroup& group);

  static void AbortIn(const MappedMemory& memory);
  Header* header() const;
  SlotHeader* slot(int rank) const;  // of the current round
  template <typename T>
  T* payload(int rank) const;

  // Publishes [data, size_bytes) as this rank's part of the current round, waits for all ranks and
  // checks that they are in the same operation. nullptr publishes nothing.
  absl::Status Exchange(Operation operation, int64_t total_bytes, const void* data,
                        int64_t size_bytes);
  absl::Status WaitForRound();
  absl::Status CheckPeers(Operation operation, int64_t total_bytes);

  const std::shared_ptr<MappedMemory> memory_;
  const ShmGroup group_;
  uint32_t round_ = 0;  // wraps around
};

}  // namespace wintserve
