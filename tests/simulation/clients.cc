#include "tests/simulation/clients.h"

#include <algorithm>
#include <utility>

namespace wintserve::simulation {

Clients::Clients(const SimulationConfig& config, References* references, EventQueue* events,
                 Report* report, Actions actions)
    : config_(config),
      references_(*references),
      events_(*events),
      report_(*report),
      actions_(std::move(actions)),
      random_(config.seed, /*stream=*/4) {
  for (int i = 0; i < config.num_documents; ++i) {
    documents_.push_back(RandomTokens(config.max_prompt_tokens));
  }
}

void Clients::Start() {
  int64_t time_us = 0;
  for (int i = 0; i < config_.num_requests; ++i) {
    time_us += random_.Around(static_cast<double>(config_.mean_interarrival_us));
    const int burst = random_.Chance(0.1) ? 3 : 1;
    for (int j = 0; j < burst; ++j) events_.At(time_us, [this] { Arrive(); });
  }
}

std::vector<int32_t> Clients::RandomTokens(int64_t count) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) {
    token = static_cast<int32_t>(random_.Between(0, config_.scheduler.vocab_size - 1));
  }
  return tokens;
}

// A document or an earlier conversation, or the beginning of one, then something new or nothing.
std::vector<int32_t> Clients::MakePrompt() {
  const int64_t length = random_.Between(1, config_.max_prompt_tokens);
  const bool follow_up = !accepted_.empty() && random_.Chance(0.25);
  std::vector<int32_t> prompt =
      follow_up ? references_.Find(random_.Pick(accepted_))->tokens : random_.Pick(documents_);
  if (random_.Chance(0.5)) {
    const int64_t limit = std::min(length, static_cast<int64_t>(prompt.size()));
    prompt.resize(static_cast<size_t>(random_.Between(0, limit)));
  }
  prompt.resize(std::min(prompt.size(), static_cast<size_t>(config_.max_prompt_tokens)));
  const std::vector<int32_t> rest =
      RandomTokens(std::max(int64_t{0}, length - static_cast<int64_t>(prompt.size())));
  prompt.insert(prompt.end(), rest.begin(), rest.end());
  return prompt;
}

ScheduledRequest Clients::MakeRequest() {
  ScheduledRequest request;
  request.id = next_id_++;
  request.prompt_ids = MakePrompt();
  request.sampling.temperature = random_.Chance(0.5) ? 0.0f : 0.8f;
  if (request.id % 3 == 0) request.sampling.repetition_penalty = 1.25f;
  if (request.id % 4 == 0) request.sampling.frequency_penalty = 0.5f;
  if (request.id % 5 == 0) request.sampling.num_prompt_top_logprobs = 0;
  request.sampling.seed = static_cast<int64_t>(MixBits(config_.seed, request.id));
  request.num_choices = random_.Chance(0.2) ? static_cast<int>(random_.Between(2, 4)) : 1;
  request.max_tokens = static_cast<int>(random_.Between(1, config_.max_answer_tokens));
  if (random_.Chance(0.2)) {
    request.min_tokens = static_cast<int>(random_.Between(0, request.max_tokens));
  }
  request.ignore_eos = random_.Chance(0.1);
  request.priority = random_.Pick({0, 0, 0, 0, 1, -1});
  request.tenant = fmt::format("tenant{}", random_.Between(1, config_.num_tenants));
  if (config_.num_salts > 1) request.cache_salt = fmt::format("s{}", random_.Between(1, 3));
  request.bypass_cache_match = random_.Chance(config_.bypass_chance);
  if (random_.Chance(config_.deadline_chance)) {
    request.deadline_us = events_.now_us() + random_.Between(1, 200'000);
  }
  if (random_.Chance(0.01)) {  // fits no pool of this instance
    request.max_tokens =
        (config_.scheduler.num_blocks + 1) * config_.scheduler.block_size_tokens + 1;
  }
  return request;
}

void Clients::OnServerLost() {
  for (auto& [key, stream] : streams_) {
    if (stream.state != State::kLive) continue;
    stream.state = State::kFailed;
    ++report_.counters.streams_lost;
  }
}

void Clients::Arrive() {
  if (!actions_.is_server_there()) return;
  const ScheduledRequest request = MakeRequest();
  ++report_.counters.requests;
  const absl::Status status = actions_.submit(request);
  if (status.ok()) Register(request);
  if (report_.tracing()) {
    report_.Trace("request {}: {} tokens, {} choices, up to {} tokens, priority {}, {}: {}",
                  request.id, request.prompt_ids.size(), request.num_choices, request.max_tokens,
                  request.priority, request.tenant, status.ToString());
  }
  const bool never_fits =
      request.max_tokens > config_.scheduler.num_blocks * config_.scheduler.block_size_tokens;
  if (absl::IsInvalidArgument(status) != never_fits) {
    report_.Violation("I8", "request {} of {} + {} tokens: {}", request.id,
                      request.prompt_ids.size(), request.max_tokens, status.ToString());
  } else if (absl::IsResourceExhausted(status)) {
    ++report_.counters.refusals;
    if (RetryAfterSeconds(status) < 1) {
      report_.Violation("I8", "request {} may come again after {} s", request.id,
                        RetryAfterSeconds(status));
    }
  } else if (!status.ok() && !never_fits) {
    report_.Violation("I8", "request {} is refused: {}", request.id, status.ToString());
  }
  actions_.done();
}

void Clients::Register(const ScheduledRequest& request) {
  references_.Add(request);
  for (int choice = 0; choice < request.num_choices; ++choice) {
    const SequenceKey key{request.id, static_cast<uint32_t>(choice)};
    accepted_.push_back(key);
    streams_[key] = Stream{.reference = references_.Find(key),
                           .bypasses_cache = request.bypass_cache_match,
                           .deadline_us = request.deadline_us};
  }
  if (random_.Chance(config_.cancel_chance)) GiveUpLater(request);
}

void Clients::GiveUpLater(const ScheduledRequest& request) {
  const int64_t delay_us = random_.Around(static_cast<double>(10 * config_.step_us));
  const auto choice = static_cast<uint32_t>(random_.Between(0, request.num_choices - 1));
  const bool all = random_.Chance(0.5);
  events_.After(delay_us, [this, id = request.id, n = request.num_choices, choice, all] {
    report_.Trace("request {}: the client gives up {}", id, all ? "all" : "a choice");
    if (all) {
      for (int i = 0; i < n; ++i) Cancel({id, static_cast<uint32_t>(i)});
      actions_.cancel_request(id);
    } else {
      Cancel({id, choice});
      actions_.cancel_choice({id, choice});
    }
    actions_.done();
  });
}

void Clients::Cancel(const SequenceKey& key) {
  Stream& stream = streams_.at(key);
  if (stream.state != State::kLive) return;
  stream.state = State::kCancelled;
  ++report_.counters.cancelled;
}

Clients::Stream* Clients::FindLive(const SequenceKey& key, const char* event) {
  const auto it = streams_.find(key);
  if (it != streams_.end() && it->second.state == State::kLive) return &it->second;
  report_.Violation("I1", "sequence {}.{}: {} after its end", key.request, key.choice, event);
  return nullptr;
}

void Clients::OnStarted(const SequenceStart& start) {
  Stream* stream = FindLive(start.sequence, "a start");
  if (stream == nullptr) return;
  const int cached = start.num_cached_tokens;
  const auto prompt_len = static_cast<int>(stream->reference->prompt_len);
  const bool may_be_cached = config_.scheduler.prefix_caching && !stream->bypasses_cache;
  // What the cache has of a prompt has no log-probabilities.
  const bool asks = prompt_len > 1 && !stream->reference->PromptLogprobs().empty();
  if (stream->started || cached < 0 || (asks && cached > 0) || cached >= prompt_len ||
      cached % config_.scheduler.block_size_tokens != 0 || (cached > 0 && !may_be_cached)) {
    report_.Violation("I1", "sequence {}.{} starts{} with {} of {} tokens cached",
                      start.sequence.request, start.sequence.choice,
                      stream->started ? " again" : "", cached, prompt_len);
  }
  stream->started = true;
  report_.counters.cached_tokens += static_cast<uint64_t>(cached);
  const int block_size = config_.scheduler.block_size_tokens;
  if (start.sequence.choice > 0 && cached > 0 &&
      cached == (prompt_len - 1) / block_size * block_size) {
    ++report_.counters.shared_siblings;
  }
}

void Clients::OnToken(const SequenceToken& token) {
  Stream* stream = FindLive(token.sequence, "a token");
  if (stream == nullptr) return;
  const ReferenceSequence& reference = *stream->reference;
  const size_t index = stream->num_tokens++;
  ++report_.counters.tokens;
  const int32_t expected = reference.tokens[reference.prompt_len + index];
  if (!stream->started || token.token != expected) {
    report_.Violation("I1", "sequence {}.{}: token {} is {}, it should be {}{}",
                      token.sequence.request, token.sequence.choice, index, token.token, expected,
                      stream->started ? "" : "; the sequence has not started");
  }
  CheckPromptLogprobs(token, index);
  const bool is_last = stream->num_tokens == reference.answer_len;
  const std::optional<SequenceEnd> end =
      is_last ? std::optional(reference.end) : std::optional<SequenceEnd>();
  if (token.end != end) {
    report_.Violation("I1", "sequence {}.{}: token {} of {} {}", token.sequence.request,
                      token.sequence.choice, index, reference.answer_len,
                      token.end.has_value() ? "ends it (or in the wrong way)" : "does not end it");
  }
  if (!is_last) return;
  stream->state = State::kFinished;
  ++report_.counters.sequences_finished;
}

// All of them, with the first choice's first token, which is the first one of all choices.
void Clients::CheckPromptLogprobs(const SequenceToken& token, size_t index) const {
  const ReferenceSequence& reference = *streams_.at(token.sequence).reference;
  const std::vector<PositionLogprobs> expected =
      index == 0 ? reference.PromptLogprobs() : std::vector<PositionLogprobs>();
  report_.counters.prompt_logprobs += expected.size();
  if (token.prompt_logprobs != expected) {
    report_.Violation(
        "I1",
        "sequence {}.{}: token {} brings {} log-probabilities of its prompt, it should "
        "bring {}{}",
        token.sequence.request, token.sequence.choice, index, token.prompt_logprobs.size(),
        expected.size(), token.prompt_logprobs.size() == expected.size() ? " others" : "");
  }
  const Stream& first = streams_.at({token.sequence.request, 0});
  if (reference.sampling.num_prompt_top_logprobs >= 0 && first.state == State::kLive &&
      first.num_tokens == 0) {
    report_.Violation("I1",
                      "sequence {}.{}: token {} comes before the first choice's, which brings "
                      "the log-probabilities of the prompt",
                      token.sequence.request, token.sequence.choice, index);
  }
}

void Clients::OnFailed(const SequenceFailure& failure) {
  Stream* stream = FindLive(failure.sequence, "an error");
  if (stream == nullptr) return;
  stream->state = State::kFailed;
  ++report_.counters.expired;
  const bool is_late = stream->deadline_us && *stream->deadline_us <= events_.now_us();
  if (!absl::IsDeadlineExceeded(failure.error) || !is_late) {
    report_.Violation("I8", "sequence {}.{} fails: {}", failure.sequence.request,
                      failure.sequence.choice, failure.error.ToString());
  }
}

void Clients::CheckDeadlines() const {
  for (const auto& [key, stream] : streams_) {
    if (stream.state == State::kLive && stream.deadline_us &&
        *stream.deadline_us < events_.now_us()) {
      report_.Violation("I8", "sequence {}.{} goes on after its deadline {}", key.request,
                        key.choice, *stream.deadline_us);
    }
  }
}

void Clients::CheckAllEnded() const {
  for (const auto& [key, stream] : streams_) {
    if (stream.state == State::kLive) {
      report_.Violation("I8", "sequence {}.{} never ends: it has {} of {} tokens", key.request,
                        key.choice, stream.num_tokens, stream.reference->answer_len);
    }
  }
}

bool Clients::IsWanted(const std::string& salt, const std::vector<int32_t>& tokens) const {
  return std::any_of(streams_.begin(), streams_.end(), [&](const auto& item) {
    const Stream& stream = item.second;
    const std::vector<int32_t>& own = stream.reference->tokens;
    return stream.state == State::kLive && stream.reference->salt == salt &&
           tokens.size() <= own.size() && std::equal(tokens.begin(), tokens.end(), own.begin());
  });
}

}  // namespace wintserve::simulation
