#include "tests/simulation/reference.h"

#include <algorithm>

#include "tests/simulation/random.h"

namespace wintserve::simulation {

uint64_t ExtendHistory(uint64_t history, int32_t token) {
  return MixBits(history, static_cast<uint64_t>(token));
}

Model::Model(const SimulationConfig& config)
    : vocab_size_(config.scheduler.vocab_size),
      eos_ids_(config.scheduler.eos_ids),
      eos_chance_(config.eos_chance) {}

int32_t Model::Sample(const SamplingParams& sampling, uint32_t position, uint64_t history) const {
  const uint64_t key = MixBits(static_cast<uint64_t>(sampling.seed), sampling.choice_index);
  Random random(MixBits(key, history), position);
  if (position >= sampling.first_stop_position && random.Chance(eos_chance_)) {
    return random.Pick(eos_ids_);
  }
  int32_t token = 0;
  do token = static_cast<int32_t>(random.Between(0, vocab_size_ - 1));
  while (IsEos(token));
  return token;
}

bool Model::IsEos(int32_t token) const {
  return std::find(eos_ids_.begin(), eos_ids_.end(), token) != eos_ids_.end();
}

PositionLogprobs Model::LogprobsOf(uint64_t history, int32_t token) {
  const uint64_t bits = MixBits(history, static_cast<uint64_t>(token) + (uint64_t{1} << 32));
  return {.logprob = -static_cast<float>(bits >> 44), .rank = static_cast<int32_t>(bits % 99) + 1};
}

std::vector<PositionLogprobs> ReferenceSequence::PromptLogprobs() const {
  std::vector<PositionLogprobs> logprobs;
  if (sampling.num_prompt_top_logprobs < 0 || key.choice != 0) return logprobs;
  for (size_t i = 1; i < prompt_len; ++i) {
    logprobs.push_back(Model::LogprobsOf(HistoryOf(i), tokens[i]));
  }
  return logprobs;
}

void References::Add(const ScheduledRequest& request) {
  for (int choice = 0; choice < request.num_choices; ++choice) {
    ReferenceSequence sequence;
    sequence.key = {request.id, static_cast<uint32_t>(choice)};
    sequence.salt = request.cache_salt;
    sequence.sampling = request.sampling;
    sequence.sampling.choice_index = sequence.key.choice;
    sequence.prompt_len = request.prompt_ids.size();
    sequence.sampling.first_stop_position =
        static_cast<uint32_t>(sequence.prompt_len + request.min_tokens);
    uint64_t history = kEmptyHistory;
    for (const int32_t token : request.prompt_ids) {
      sequence.tokens.push_back(token);
      sequence.history.push_back(history = ExtendHistory(history, token));
    }
    for (int i = 0; i < request.max_tokens; ++i) {
      const auto position = static_cast<uint32_t>(sequence.tokens.size());
      const int32_t token = model_.Sample(sequence.sampling, position, history);
      sequence.tokens.push_back(token);
      sequence.history.push_back(history = ExtendHistory(history, token));
      if (sequence.answer_len == 0 && !request.ignore_eos && model_.IsEos(token)) {
        sequence.answer_len = static_cast<size_t>(i) + 1;
        sequence.end = SequenceEnd::kStop;
      }
    }
    if (sequence.answer_len == 0) sequence.answer_len = static_cast<size_t>(request.max_tokens);
    const SequenceKey key = sequence.key;
    const ReferenceSequence& stored = by_key_[key] = std::move(sequence);
    by_seed_[{request.sampling.seed, key.choice}] = &stored;
  }
}

const ReferenceSequence* References::Find(const SamplingParams& sampling) const {
  const auto it = by_seed_.find({sampling.seed, sampling.choice_index});
  return it == by_seed_.end() ? nullptr : it->second;
}

const ReferenceSequence* References::Find(const SequenceKey& key) const {
  const auto it = by_key_.find(key);
  return it == by_key_.end() ? nullptr : &it->second;
}

}  // namespace wintserve::simulation
