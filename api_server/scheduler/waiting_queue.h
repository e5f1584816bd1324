// The sequences that wait for a slot, in order, those of tenants at their cap apart from them, and
// how long a new one would wait.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <queue>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/status.h"
#include "api_server/scheduler/sequence.h"

namespace wintserve {

// By rank. Of each tenant the first ones stand in line, as many as it may run beside those that it
// runs already; the others are parked, and nobody walks over them. Sequences without a tenant all
// stand in line.
// Who comes out of parking with nobody in line before it takes back the place that its own tenant
// has given up: that it departs does not mean that the line has moved.
// Time:      departures happen, and predictions are made, at the time that Advance was told last.
// Ownership: sequences, requests and tenants are the caller's.
// Threading: thread-compatible.
class WaitingQueue {
 public:
  // max_seqs_per_tenant: sequences of a tenant that run at once.
  explicit WaitingQueue(int max_seqs_per_tenant) : max_seqs_per_tenant_(max_seqs_per_tenant) {}

  void Advance(int64_t now_us);
  // `num_tokens`: what it has to compute, as far as is known.
  void Insert(Sequence* sequence, int64_t num_tokens);
  void Remove(Sequence* sequence);
  // It departs: removes it and counts it among those that its tenant runs.
  void Start(Sequence* sequence);
  // A sequence of that tenant runs again without having waited; false, and nothing has changed: the
  // tenant has no room.
  bool RunAgain(Tenant* tenant);
  // A sequence of that tenant runs no more.
  void StopRunning(Tenant* tenant);
  void SetTokens(Sequence* sequence, int64_t num_tokens);

  bool empty() const { return size_ == 0; }
  int size() const { return size_; }
  int num_in_line() const { return static_cast<int>(line_.size()); }
  int64_t num_tokens() const { return num_tokens_; }
  // How long a new sequence of that priority value and tenant (null: none that waits or runs) would
  // wait; nullopt where nobody stands before it, or not enough was seen.
  std::optional<double> WaitSeconds(int priority, const Tenant* tenant) const;
  // How long a client should wait before `num_sequences` have departed, whichever.
  double RetrySecondsFor(double num_sequences) const {
    return drain_rate_.RetrySecondsFor(num_sequences);
  }

  // INTERNAL describes the first broken invariant; for tests, linear in everything.
  absl::Status CheckInvariants(const std::unordered_map<std::string, Tenant>& tenants) const;

 private:
  friend class QueueWalk;

  int Room(const Tenant& tenant) const;
  void EnterLine(Sequence* sequence, bool was_parked);
  void LeaveLine(Sequence* sequence);
  // Takes it out of wherever it stands; the caller lets others move up.
  void TakeOut(Sequence* sequence);
  // Moves the end of the tenant's part of the line to where its room ends.
  void FillRoom(Tenant* tenant);

  const int max_seqs_per_tenant_;
  std::deque<Sequence*> line_;
  int num_taking_back_ = 0;  // in line
  int size_ = 0;             // with those that are parked
  int64_t num_tokens_ = 0;
  int64_t now_us_ = 0;
  DrainRate drain_rate_;       // of all
  DrainRate line_drain_rate_;  // of those in line that take nothing back
};

// One pass over the queue, in order, that passes over those for whom their tenants have no room. It
// touches none of them: a step costs the sequences that it looks at, however many are parked.
// The sequence that Next() has returned may leave the queue before the next call; nothing else may
// change in between.
class QueueWalk {
 public:
  explicit QueueWalk(const WaitingQueue& queue) : queue_(queue) {}

  Sequence* Next();  // null: there is none any more
  // The last one is to start: in this walk it takes up room of its tenant.
  void CountIn();

 private:
  struct ByRankDescending {  // a priority_queue has its last one on top
    bool operator()(const Sequence* a, const Sequence* b) const { return b->rank < a->rank; }
  };

  void AddParkedBehindLast();

  const WaitingQueue& queue_;
  SequenceRank last_rank_ = kBeforeAllRanks;
  const Tenant* last_tenant_ = nullptr;
  // At most one of each tenant: it has room, as one in line before was not counted in.
  std::priority_queue<Sequence*, std::vector<Sequence*>, ByRankDescending> parked_;
  std::unordered_map<const Tenant*, int> counted_in_;
};

}  // namespace wintserve
