// What a run has to say: the first broken invariant, what was exercised, and a readable trace.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <deque>
#include <string>
#include <utility>

#include "tests/simulation/event_queue.h"
#include "tests/simulation/random.h"

namespace wintserve::simulation {

// How often each path was taken.
struct Counters {
  uint64_t events = 0;
  uint64_t requests = 0;
  uint64_t sequences_finished = 0;
  uint64_t plans = 0;
  uint64_t rows = 0;
  uint64_t prompt_chunks = 0;  // rows that end before their prompt does
  uint64_t tokens = 0;
  uint64_t prompt_logprobs = 0;  // of how many tokens
  uint64_t overshoot_rows = 0;
  uint64_t preemptions = 0;
  uint64_t refusals = 0;
  uint64_t expired = 0;
  uint64_t cancelled = 0;
  uint64_t cached_tokens = 0;
  uint64_t device_hit_tokens = 0;
  uint64_t host_hit_tokens = 0;
  uint64_t evicted_blocks = 0;
  uint64_t evicted_host_slots = 0;
  uint64_t commits = 0;
  uint64_t duplicate_commits = 0;
  uint64_t orphan_commits = 0;  // the parent was flushed
  uint64_t write_backs = 0;
  uint64_t restores = 0;
  uint64_t shared_siblings = 0;
  uint64_t tombstones = 0;  // answers for a sequence that had gone
  uint64_t flushes = 0;
  uint64_t cache_drops = 0;
  uint64_t cache_resumes = 0;
  uint64_t cache_deaths = 0;
  uint64_t pools_replaced = 0;
  uint64_t worker_kills = 0;
  uint64_t worker_crashes = 0;
  uint64_t worker_hangs = 0;
  uint64_t workers_ended = 0;  // that did not leave their group in time
  uint64_t late_writes = 0;    // plans that a dying or aborting rank ran in part
  uint64_t groups_lost = 0;
  uint64_t groups_distrusted = 0;  // of them
  uint64_t plans_lost = 0;
  uint64_t copies_lost = 0;
  uint64_t resumed_sequences = 0;
  uint64_t recomputed_sequences = 0;
  uint64_t isolations = 0;
  uint64_t cache_losses_in_recovery = 0;
  uint64_t server_deaths = 0;
  uint64_t streams_lost = 0;  // with an API server
  uint64_t adoptions = 0;

  void Add(const Counters& other);
  std::string ToString() const;
};

class Report {
 public:
  enum class Tracing { kOff, kLast, kPrint };

  Report(const EventQueue* clock, Tracing tracing) : clock_(*clock), tracing_(tracing) {}

  // Cheap when tracing is off, so arguments are formatted only when they are shown.
  template <typename... Args>
  void Trace(fmt::format_string<Args...> format, Args&&... args) {
    if (tracing_ != Tracing::kOff) AddLine(fmt::format(format, std::forward<Args>(args)...));
  }
  bool tracing() const { return tracing_ != Tracing::kOff; }

  // Only the first one counts: those after it follow from it.
  template <typename... Args>
  void Violation(const char* invariant, fmt::format_string<Args...> format, Args&&... args) {
    if (!violation_.empty()) return;
    violation_ = fmt::format("{}: {}", invariant, fmt::format(format, std::forward<Args>(args)...));
    if (tracing()) AddLine(fmt::format("VIOLATION {}", violation_));
  }

  bool ok() const { return violation_.empty(); }
  const std::string& violation() const { return violation_; }
  // The last lines of the trace, oldest first.
  std::string LastLines() const;
  // Of the whole trace: two runs of a seed agree.
  uint64_t digest() const { return digest_; }

  Counters counters;

 private:
  static constexpr size_t kMaxLines = 60;

  void AddLine(const std::string& text);

  const EventQueue& clock_;
  const Tracing tracing_;
  std::string violation_;
  std::deque<std::string> lines_;
  uint64_t digest_ = 0;
};

}  // namespace wintserve::simulation
