// The virtual clock: what happens next, in order of time and then of scheduling.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <queue>
#include <tuple>
#include <utility>
#include <vector>

namespace wintserve::simulation {

class EventQueue {
 public:
  int64_t now_us() const { return now_us_; }

  void At(int64_t time_us, std::function<void()> action) {
    events_.push(Event{std::max(time_us, now_us_), next_number_++, std::move(action)});
  }
  void After(int64_t delay_us, std::function<void()> action) {
    At(now_us_ + delay_us, std::move(action));
  }

  // Moves the clock to the next event and runs it; false when there is none.
  bool RunNext() {
    if (events_.empty()) return false;
    const Event event = events_.top();
    events_.pop();
    now_us_ = event.time_us;
    event.action();
    return true;
  }

 private:
  struct Event {
    int64_t time_us = 0;
    uint64_t number = 0;
    std::function<void()> action;
    bool operator<(const Event& other) const {  // std::priority_queue has the greatest on top
      return std::tie(other.time_us, other.number) < std::tie(time_us, number);
    }
  };

  int64_t now_us_ = 0;
  uint64_t next_number_ = 0;
  std::priority_queue<Event> events_;
};

// A connection's one direction: messages arrive in the order of sending, each after a delay of its
// own or right behind the one before.
class OrderedDelay {
 public:
  int64_t Arrival(int64_t now_us, int64_t delay_us) {
    last_us_ = std::max(last_us_, now_us + delay_us);
    return last_us_;
  }

 private:
  int64_t last_us_ = 0;
};

}  // namespace wintserve::simulation
