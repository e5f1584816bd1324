// The sequences that wait for a slot, in order.
#pragma once

#include <cstdint>
#include <deque>

#include "api_server/scheduler/sequence.h"

namespace wintserve {

// Threading: thread-compatible.
class WaitingQueue {
 public:
  // `num_tokens`: what it has to compute, as far as is known.
  void Insert(Sequence* sequence, int64_t num_tokens);
  void Remove(Sequence* sequence);
  void SetTokens(Sequence* sequence, int64_t num_tokens);

  bool empty() const { return queue_.empty(); }
  int size() const { return static_cast<int>(queue_.size()); }
  Sequence* operator[](size_t i) const { return queue_[i]; }
  int64_t num_tokens() const { return num_tokens_; }
  // Sequences of at most that priority value: those that go before a new one of it.
  int NumBefore(int priority) const;

  std::deque<Sequence*>::const_iterator begin() const { return queue_.begin(); }
  std::deque<Sequence*>::const_iterator end() const { return queue_.end(); }

 private:
  std::deque<Sequence*> queue_;  // by rank
  int64_t num_tokens_ = 0;
};

}  // namespace wintserve
