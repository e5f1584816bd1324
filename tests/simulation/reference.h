// What every sequence must be, computed directly: the simulated model, and its output without any
// scheduler, cache or fault.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "api_server/scheduler/plan.h"
#include "api_server/scheduler/scheduler.h"
#include "tests/simulation/config.h"

namespace wintserve::simulation {

// The model: `history` stands for the K and V of a position, which depend on every token up to it.
inline constexpr uint64_t kEmptyHistory = 0;
uint64_t ExtendHistory(uint64_t history, int32_t token);

class Model {
 public:
  explicit Model(const SimulationConfig& config);
  // The token for `position` after a sequence with that history. No stop id before
  // first_stop_position.
  int32_t Sample(const SamplingParams& sampling, uint32_t position, uint64_t history) const;
  bool IsEos(int32_t token) const;
  // Of `token` after a sequence with that history.
  static PositionLogprobs LogprobsOf(uint64_t history, int32_t token);

 private:
  const int vocab_size_;
  const std::vector<int32_t> eos_ids_;
  const double eos_chance_;
};

// One choice of one request.
struct ReferenceSequence {
  SequenceKey key;
  std::string salt;
  SamplingParams sampling;
  size_t prompt_len = 0;
  size_t answer_len = 0;  // tokens that the client gets
  SequenceEnd end = SequenceEnd::kLength;
  // The prompt and what follows, max_tokens long even when the answer ends earlier, as a plan that
  // is in flight when a stop id is found computes beyond it.
  std::vector<int32_t> tokens;
  std::vector<uint64_t> history;  // history[i] is that of tokens[0, i]

  // After the first `length` tokens.
  uint64_t HistoryOf(size_t length) const {
    return length == 0 ? kEmptyHistory : history[length - 1];
  }
  // What its client is to know of its prompt: of the first choice of a request that asks.
  std::vector<PositionLogprobs> PromptLogprobs() const;
};

// Of all sequences that were submitted. Workers know neither request nor prompt of a slot; here the
// sampling seed, which differs between requests, and the choice tell them.
class References {
 public:
  explicit References(const SimulationConfig& config) : model_(config) {}

  const Model& model() const { return model_; }
  void Add(const ScheduledRequest& request);
  // Null: there is no such sequence.
  const ReferenceSequence* Find(const SamplingParams& sampling) const;
  const ReferenceSequence* Find(const SequenceKey& key) const;

 private:
  const Model model_;
  std::map<SequenceKey, ReferenceSequence> by_key_;
  std::map<std::pair<int64_t, uint32_t>, const ReferenceSequence*> by_seed_;
};

}  // namespace wintserve::simulation
