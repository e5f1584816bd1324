// Private to the scheduler: a request, and one choice of it on its way.
#pragma once

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <iterator>
#include <limits>
#include <list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "api_server/scheduler/drain_rate.h"
#include "api_server/scheduler/scheduler.h"

namespace wintserve {

struct Sequence;

struct Tenant {
  std::string name;
  int num_requests = 0;  // with a choice that has not ended; the last one takes the tenant with it
  // The waiting queue's: sequences.
  int num_running = 0;
  std::deque<Sequence*> waiting;  // by rank
  size_t num_in_line = 0;         // the first ones of `waiting`; the others are parked
  DrainRate drain_rate;           // of `waiting`
};

struct Request {
  uint64_t id = 0;
  std::shared_ptr<const std::vector<int32_t>> prompt_ids;
  SamplingParams sampling;
  int max_tokens = 0;
  bool ignore_eos = false;
  std::vector<int32_t> stop_tokens;
  std::string salt;
  bool bypass_cache_match = false;
  std::optional<int64_t> deadline_us;
  int64_t timeout_ms = 0;
  Tenant* tenant = nullptr;          // null: not capped, or all choices have ended
  std::vector<Sequence*> choices;    // null once it has ended
  bool prompt_is_shareable = false;  // choice 0 has computed and committed it

  int prompt_len() const { return static_cast<int>(prompt_ids->size()); }
};

// Its place in every order: lower comes first.
struct SequenceRank {
  int priority = 0;
  uint64_t arrival = 0;
  auto operator<=>(const SequenceRank&) const = default;
};
inline constexpr SequenceRank kBeforeAllRanks{std::numeric_limits<int>::min(), 0};

// waiting -> running <-> last token in flight -> ended
//    ^          |        (<-: the rank group is lost)  ^
//    '- preempted (until no plan names it)             '-- from anywhere (cancelled, out of time)
enum class Phase {
  kWaiting,            // in the queue; may hold pins of its match
  kRunning,            // owns a slot
  kLastTokenInFlight,  // all its rows are planned, the slot is given up
  kPreempted,          // gives its blocks back and queues again once nothing names them
  kEnded,              // the same, but goes away
};

enum class MatchState { kNone, kAsked, kDone };

// A block in a sequence's table. It is leased (and ours to write), or pinned under `entry`; or
// leased with the pin of another block of the same content, when a commit found a duplicate.
struct HeldBlock {
  PoolBlock block;
  uint64_t entry = 0;
  bool leased = false;
  bool uncertain = false;  // its commit was not answered before the session was lost
  uint64_t step = 0;       // the last one done that wrote to it; 0: none of this sequence did
};

struct Sequence {
  SequenceKey key;
  SequenceRank rank;
  std::shared_ptr<Request> request;
  std::list<Sequence>::iterator place;  // in Impl::sequences_
  Phase phase = Phase::kWaiting;
  int num_prompt_logprobs = 0;                    // that are known, of positions 1 on
  std::vector<int32_t> generated;                 // as reported to the caller
  std::vector<PositionLogprobs> prompt_logprobs;  // they, until the first token takes them along

  // Positions. num_done <= num_planned < length_planned while rows are left to plan.
  int num_done = 0;     // K and V written and acknowledged by every rank, or taken from the cache
  int num_planned = 0;  // the same, with what plans in flight will write
  int length_planned = 0;  // tokens, with those that plans in flight will sample

  std::vector<HeldBlock> blocks;  // in sequence order
  int num_committed = 0;          // blocks[0, num_committed) have an entry
  int num_committing = 0;         // blocks in the commit that is not answered
  uint64_t commit_tag = 0;        // of that commit; 0: none
  bool commit_queued = false;     // in Impl::to_commit_
  bool commits_stopped = false;   // its chain was flushed
  bool never_commits = false;     // its duplicates left it no room

  MatchState match = MatchState::kNone;
  bool match_outdated = false;     // a longer one has been committed since
  bool restored = false;           // some of its blocks were
  int num_host_blocks = 0;         // of the match
  int num_copies_to_plan = 0;      // restores that no plan holds yet
  uint64_t last_copy_step = 0;     // last plan with a restore of it
  uint64_t restore_known_tag = 0;  // an answer to this tag or a later one proves that the cache
                                   // manager knows its restores to be done; 0: not told yet

  uint32_t slot = 0;              // while running
  bool slot_initialised = false;  // a plan has its SlotInit
  bool token_in_slot = false;     // the last token was sampled there
  uint64_t last_plan_step = 0;    // last plan that names it or its blocks

  bool started = false;            // has had a slot before
  bool must_fit_whole = false;     // was preempted or lost its pins: waits for room for all of it
  int64_t num_waiting_tokens = 0;  // its share of the queue's tokens
  bool takes_back = false;         // in line: the place that its tenant has given up

  int prompt_len() const { return request->prompt_len(); }
  int length() const { return prompt_len() + static_cast<int>(generated.size()); }
  int max_length() const { return prompt_len() + request->max_tokens; }
  int num_remaining() const { return length_planned - num_planned; }
  // Its next row is one token of the answer. The row sends it, unless it is in the slot.
  bool decodes() const {
    return num_remaining() == 1 && (token_in_slot || num_planned >= prompt_len());
  }
  bool restoring() const { return restored && restore_known_tag == 0; }
  // What the worker has to be told with a slot, for the penalties; see SlotInit.
  bool sends_prompt() const { return request->sampling.repetition_penalty != 1; }
  bool sends_generated() const { return request->sampling.has_penalties(); }
  int64_t num_init_numbers() const {
    const int64_t num_biases = std::ssize(request->sampling.logit_biases);
    return (sends_prompt() ? prompt_len() : 0) +
           (sends_generated() ? static_cast<int64_t>(generated.size()) : 0) + 2 * num_biases;
  }
  bool lacks_prompt_logprobs() const {
    return request->sampling.num_prompt_top_logprobs >= 0 && key.choice == 0 &&
           num_prompt_logprobs < prompt_len() - 1;
  }
  bool leaving() const { return phase != Phase::kWaiting && phase != Phase::kRunning; }

  void AppendTokens(int begin, int end, std::vector<int32_t>* out) const {
    const auto& prompt = *request->prompt_ids;
    const int split = prompt_len();
    if (begin < split) {
      out->insert(out->end(), prompt.begin() + begin, prompt.begin() + std::min(end, split));
    }
    if (end > split) {
      out->insert(out->end(), generated.begin() + (std::max(begin, split) - split),
                  generated.begin() + (end - split));
    }
  }
};

struct ByRank {
  bool operator()(const Sequence* a, const Sequence* b) const { return a->rank < b->rank; }
};

}  // namespace wintserve
