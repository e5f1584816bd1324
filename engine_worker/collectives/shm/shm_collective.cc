#include "engine_worker/collectives/shm/shm_collective.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <utility>

#include "common/check.h"
#include "common/status_macros.h"
#include "engine_worker/collectives/shm/futex.h"

namespace wintserve {
namespace {

constexpr int kMaxWorldSize = 16;
constexpr int64_t kCacheLineBytes = 64;
constexpr int64_t kHeaderBytes = 4096;

// A rank that is killed between its arrival and its wake-up call would leave sleepers behind.
constexpr int64_t kSleepUs = 1000;
// How often Leave() asks for ranks that are gone, of whom no wake-up call comes.
constexpr int64_t kGoneSliceMs = 5;
// About 1 us: a peer on another core is often that close, and a sleep and wake-up cost 5 us and
// more.
constexpr int kSpins = 32;

// Of Header::progress: the round number counts in steps of 2 above this bit.
constexpr uint32_t kAborted = 1;

void SpinPause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

absl::Status Aborted() {
  return absl::UnavailableError("the rank group was aborted, or a rank has left it");
}

int64_t SlotStride(int64_t slot_bytes) { return kCacheLineBytes + slot_bytes; }

// Two, each without overlaps: of one for both, where sum may be a, compilers would have to be told
// in words of their own that it is only ever the same.
void SetToSum(const float* __restrict a, const float* __restrict b, int64_t count,
              float* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] = a[i] + b[i];
}
void AddTo(float* __restrict sum, const float* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += b[i];
}

// Sleeps until condition(*word), at most timeout_ms. Returns condition(*word).
template <typename Condition>
bool WaitUntil(std::atomic<uint32_t>* word, int64_t timeout_ms, const Condition& condition) {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (true) {
    const uint32_t value = word->load(std::memory_order_acquire);
    if (condition(value)) return true;
    const int64_t left_us =
        std::chrono::duration_cast<std::chrono::microseconds>(deadline - steady_clock::now())
            .count();
    if (left_us <= 0) return false;
    FutexWait(word, value, left_us);
  }
}

}  // namespace

enum class ShmCollective::Operation : uint64_t { kAllReduceSum = 1, kAllGather, kBroadcast };

// At the start of the memory. Zero bytes are a valid start.
struct ShmCollective::Header {
  std::atomic<uint64_t> group_epoch;     // set by the first rank, compared by the others
  std::atomic<uint64_t> attached_ranks;  // bit set
  std::atomic<uint32_t> left_ranks;      // futex: bit set, of Leave()
  alignas(kCacheLineBytes) std::atomic<uint32_t> arrived;  // over all rounds; wraps around
  std::atomic<uint32_t> sleepers;  // saves the wake-up call when nobody sleeps
  alignas(kCacheLineBytes) std::atomic<uint32_t> progress;  // futex: 2 * rounds finished | kAborted
};

struct alignas(kCacheLineBytes) ShmCollective::SlotHeader {
  Operation operation;
  int64_t total_bytes;
};

int64_t ShmGroupMemoryBytes(int world_size, int64_t slot_bytes) {
  return kHeaderBytes + 2 * world_size * SlotStride(slot_bytes);
}

ShmCollective::ShmCollective(std::shared_ptr<MappedMemory> memory, const ShmGroup& group)
    : memory_(std::move(memory)), group_(group) {}

// Whoever leaves will not arrive again: peers that wait for it must learn so.
ShmCollective::~ShmCollective() { Abort(); }

absl::StatusOr<std::unique_ptr<ShmCollective>> ShmCollective::Create(
    std::shared_ptr<MappedMemory> memory, const ShmGroup& group) {
  static_assert(sizeof(Header) <= kHeaderBytes && sizeof(SlotHeader) == kCacheLineBytes);
  CHECK(group.group_epoch != 0);
  CHECK(group.world_size >= 2 && group.world_size <= kMaxWorldSize, "world_size={}",
        group.world_size);
  CHECK(group.rank >= 0 && group.rank < group.world_size, "rank={}", group.rank);
  CHECK(group.slot_bytes > 0 && group.slot_bytes % kCacheLineBytes == 0, "slot_bytes={}",
        group.slot_bytes);

  const int64_t expected_bytes = ShmGroupMemoryBytes(group.world_size, group.slot_bytes);
  if (memory->size_bytes() != expected_bytes) {
    return absl::InvalidArgumentError(
        fmt::format("group memory has {} bytes; {} ranks with slots of {} bytes need {}",
                    memory->size_bytes(), group.world_size, group.slot_bytes, expected_bytes));
  }
  auto* header = static_cast<Header*>(memory->data());
  uint64_t epoch = 0;
  if (!header->group_epoch.compare_exchange_strong(epoch, group.group_epoch) &&
      epoch != group.group_epoch) {
    return absl::FailedPreconditionError(fmt::format(
        "group memory belongs to group epoch {:x}, not {:x}", epoch, group.group_epoch));
  }
  const uint64_t bit = uint64_t{1} << group.rank;
  if ((header->attached_ranks.fetch_or(bit) & bit) != 0) {
    return absl::FailedPreconditionError(
        fmt::format("group memory of epoch {:x} already had a rank {}", epoch, group.rank));
  }
  return std::unique_ptr<ShmCollective>(new ShmCollective(std::move(memory), group));
}

void ShmCollective::AbortIn(const MappedMemory& memory) {
  std::atomic<uint32_t>& progress = static_cast<Header*>(memory.data())->progress;
  const uint32_t before = progress.fetch_or(kAborted);
  if ((before & kAborted) == 0) FutexWakeAll(&progress);
}

void ShmCollective::Abort() { AbortIn(*memory_); }

std::function<void()> ShmCollective::AbortFunction() const {
  return [memory = memory_] { AbortIn(*memory); };
}

bool ShmCollective::is_aborted() const {
  return (header()->progress.load(std::memory_order_acquire) & kAborted) != 0;
}

bool ShmCollective::WaitForAbort(int64_t timeout_ms) {
  return WaitUntil(&header()->progress, timeout_ms,
                   [](uint32_t progress) { return (progress & kAborted) != 0; });
}

bool ShmCollective::Leave(int64_t timeout_ms, const std::function<bool(int rank)>& is_gone) {
  using std::chrono::steady_clock;
  const auto deadline = steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  std::atomic<uint32_t>& left_ranks = header()->left_ranks;
  left_ranks.fetch_or(uint32_t{1} << rank());
  FutexWakeAll(&left_ranks);
  const auto all_have = [&](uint32_t left) {
    for (int peer = 0; peer < world_size(); ++peer) {
      if ((left >> peer & 1) == 0 && !is_gone(peer)) return false;
    }
    return true;
  };
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - steady_clock::now());
    const bool is_last = left.count() <= kGoneSliceMs;
    if (WaitUntil(&left_ranks, is_last ? left.count() : kGoneSliceMs, all_have)) return true;
    if (is_last) return false;
  }
}

ShmCollective::Header* ShmCollective::header() const {
  return static_cast<Header*>(memory_->data());
}

ShmCollective::SlotHeader* ShmCollective::slot(int rank) const {
  const int64_t index = (round_ % 2) * group_.world_size + rank;
  return reinterpret_cast<SlotHeader*>(static_cast<char*>(memory_->data()) + kHeaderBytes +
                                       index * SlotStride(group_.slot_bytes));
}

template <typename T>
T* ShmCollective::payload(int rank) const {
  return reinterpret_cast<T*>(slot(rank) + 1);
}

absl::Status ShmCollective::Exchange(Operation operation, int64_t total_bytes, const void* data,
                                     int64_t size_bytes) {
  if (is_aborted()) return Aborted();
  *slot(rank()) = {.operation = operation, .total_bytes = total_bytes};
  if (data != nullptr) std::memcpy(payload<void>(rank()), data, size_bytes);
  RETURN_IF_ERROR(WaitForRound());
  return CheckPeers(operation, total_bytes);
}

absl::Status ShmCollective::WaitForRound() {
  Header& shared = *header();
  const uint32_t unfinished = round_ * 2;
  const uint32_t all_arrived = (round_ + 1) * group_.world_size;
  if (shared.arrived.fetch_add(1) + 1 == all_arrived) {
    // Adding, not storing, keeps an abort that comes at the same time.
    shared.progress.fetch_add(2);
    if (shared.sleepers.load() != 0) FutexWakeAll(&shared.progress);
    return absl::OkStatus();
  }
  for (int spin = 0;; ++spin) {
    const uint32_t progress = shared.progress.load(std::memory_order_acquire);
    // Finished wins over aborted: a peer may leave right after the last round.
    if ((progress & ~kAborted) != unfinished) return absl::OkStatus();
    if ((progress & kAborted) != 0) return Aborted();
    if (spin < kSpins) {
      SpinPause();
      continue;
    }
    shared.sleepers.fetch_add(1);
    FutexWait(&shared.progress, progress, kSleepUs);
    shared.sleepers.fetch_sub(1);
  }
}

absl::Status ShmCollective::CheckPeers(Operation operation, int64_t total_bytes) {
  for (int peer = 0; peer < world_size(); ++peer) {
    const SlotHeader& theirs = *slot(peer);
    if (theirs.operation == operation && theirs.total_bytes == total_bytes) continue;
    Abort();
    return absl::InternalError(
        fmt::format("rank {} is in collective {} of {} bytes, rank {} in {} of {} bytes", peer,
                    static_cast<uint64_t>(theirs.operation), theirs.total_bytes, rank(),
                    static_cast<uint64_t>(operation), total_bytes));
  }
  return absl::OkStatus();
}

absl::Status ShmCollective::AllReduceSum(float* data, int64_t count) {
  const int64_t slot_floats = group_.slot_bytes / sizeof(float);
  for (int64_t begin = 0; begin < count; begin += slot_floats) {
    const int64_t size = std::min(slot_floats, count - begin);
    float* sum = data + begin;
    RETURN_IF_ERROR(
        Exchange(Operation::kAllReduceSum, count * sizeof(float), sum, size * sizeof(float)));
    // Rank order, starting with the first two: the same additions on every rank.
    SetToSum(payload<float>(0), payload<float>(1), size, sum);
    for (int peer = 2; peer < world_size(); ++peer) AddTo(sum, payload<float>(peer), size);
    ++round_;
  }
  return absl::OkStatus();
}

absl::Status ShmCollective::AllGather(const float* in, int64_t count, float* out) {
  const int64_t slot_floats = group_.slot_bytes / sizeof(float);
  for (int64_t begin = 0; begin < count; begin += slot_floats) {
    const int64_t size = std::min(slot_floats, count - begin);
    RETURN_IF_ERROR(
        Exchange(Operation::kAllGather, count * sizeof(float), in + begin, size * sizeof(float)));
    for (int peer = 0; peer < world_size(); ++peer) {
      std::copy_n(payload<float>(peer), size, out + peer * count + begin);
    }
    ++round_;
  }
  return absl::OkStatus();
}

absl::Status ShmCollective::Broadcast(void* data, int64_t size_bytes) {
  for (int64_t begin = 0; begin < size_bytes; begin += group_.slot_bytes) {
    const int64_t size = std::min(group_.slot_bytes, size_bytes - begin);
    char* part = static_cast<char*>(data) + begin;
    const bool is_root = rank() == 0;
    RETURN_IF_ERROR(Exchange(Operation::kBroadcast, size_bytes, is_root ? part : nullptr, size));
    if (!is_root) std::memcpy(part, payload<char>(0), size);
    ++round_;
  }
  return absl::OkStatus();
}

}  // namespace wintserve
