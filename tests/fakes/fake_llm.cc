#include "tests/fakes/fake_llm.h"

#include <fmt/core.h>

#include "absl/strings/str_replace.h"

namespace wintserve {
namespace {

constexpr std::chrono::seconds kPatience(10);

float LogprobOf(int32_t id) { return -static_cast<float>(id) / 128; }

PromptLogprobs PromptLogprobsOf(const GenerationRequest& request) {
  PromptLogprobs prompt = {.token_ids = request.prompt_ids};
  for (size_t i = 1; i < prompt.token_ids.size(); ++i) {
    const int32_t id = prompt.token_ids[i];
    PositionLogprobs& position =
        prompt.positions.emplace_back(PositionLogprobs{.logprob = LogprobOf(id), .rank = 1});
    for (int j = 0; j < *request.num_prompt_top_logprobs; ++j) {
      position.top.push_back({id + j, LogprobOf(id + j)});
    }
  }
  return prompt;
}

}  // namespace

GenerationUpdate TextUpdate(int index, std::string text,
                            std::optional<FinishReason> finish_reason) {
  GenerationUpdate update;
  update.choices.push_back({index, std::move(text), {}, finish_reason, {}});
  update.finished = finish_reason.has_value();
  return update;
}

GenerationUpdate ErrorUpdate(absl::Status error) {
  GenerationUpdate update;
  update.finished = true;
  update.error = std::move(error);
  return update;
}

FakeLlm::FakeLlm() : thread_([this] { DeliverLoop(); }) {}

FakeLlm::~FakeLlm() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
    changed_.NotifyAll();
  }
  thread_.join();
}

void FakeLlm::SetPieces(std::vector<std::string> pieces) {
  MutexLock lock(&mutex_);
  pieces_ = std::move(pieces);
}

void FakeLlm::SetDelayBetweenUpdates(std::chrono::milliseconds delay) {
  MutexLock lock(&mutex_);
  delay_ = delay;
}

void FakeLlm::SetSubmitError(absl::Status status) {
  MutexLock lock(&mutex_);
  submit_error_ = std::move(status);
}

void FakeLlm::SetQueueError(absl::Status status, size_t num_accepted) {
  MutexLock lock(&mutex_);
  queue_error_ = std::move(status);
  num_accepted_before_error_ = num_accepted;
}

void FakeLlm::SetFinalError(absl::Status status) {
  MutexLock lock(&mutex_);
  final_error_ = std::move(status);
}

void FakeLlm::SetReadiness(ReadinessReport report) {
  MutexLock lock(&mutex_);
  readiness_ = std::move(report);
}

void FakeLlm::SetMaxModelLen(int max_model_len) {
  MutexLock lock(&mutex_);
  max_model_len_ = max_model_len;
}

void FakeLlm::SetMaxTopLogprobs(int max_top_logprobs) {
  MutexLock lock(&mutex_);
  max_top_logprobs_ = max_top_logprobs;
}

void FakeLlm::SetNumCachedTokens(int num_cached_tokens) {
  MutexLock lock(&mutex_);
  num_cached_tokens_ = num_cached_tokens;
}

void FakeLlm::SetResetAnswer(absl::StatusOr<uint64_t> answer) {
  MutexLock lock(&mutex_);
  reset_answer_ = std::move(answer);
}

void FakeLlm::HoldUpdates() {
  MutexLock lock(&mutex_);
  hold_updates_ = true;
}

void FakeLlm::HoldRequests() {
  MutexLock lock(&mutex_);
  hold_updates_ = true;
  hold_requests_ = true;
}

void FakeLlm::Send(RequestHandle handle, GenerationUpdate update) {
  MutexLock lock(&mutex_);
  deliveries_.emplace(Clock::now(), Delivery{handle, std::move(update)});
  changed_.NotifyAll();
}

std::vector<GenerationRequest> FakeLlm::submitted() const {
  MutexLock lock(&mutex_);
  return submitted_;
}

std::vector<RequestHandle> FakeLlm::cancelled() const {
  MutexLock lock(&mutex_);
  return cancelled_;
}

std::vector<std::optional<std::string>> FakeLlm::resets() const {
  MutexLock lock(&mutex_);
  return resets_;
}

size_t FakeLlm::num_updates() const {
  MutexLock lock(&mutex_);
  return num_updates_;
}

bool FakeLlm::WaitForSubmitted(size_t count) const {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, kPatience,
                          [&]() REQUIRES(mutex_) { return submitted_.size() >= count; });
}

bool FakeLlm::WaitForCancelled(size_t count) const {
  MutexLock lock(&mutex_);
  return changed_.WaitFor(&mutex_, kPatience,
                          [&]() REQUIRES(mutex_) { return cancelled_.size() >= count; });
}

absl::StatusOr<RequestHandle> FakeLlm::Submit(GenerationRequest request,
                                              std::function<void(GenerationUpdate)> on_update) {
  MutexLock lock(&mutex_);
  if (!submit_error_.ok()) return submit_error_;
  submitted_.push_back(request);
  const RequestHandle handle = submitted_.size();
  running_[handle] = {std::move(on_update)};
  if (!queue_error_.ok() && submitted_.size() > num_accepted_before_error_) {
    deliveries_.emplace(Clock::now(), Delivery{handle, ErrorUpdate(queue_error_)});
  } else {
    if (!hold_requests_) deliveries_.emplace(Clock::now(), Delivery{handle, AcceptedUpdate()});
    if (!hold_updates_) ScheduleScript(handle, request);
  }
  changed_.NotifyAll();
  return handle;
}

void FakeLlm::ScheduleScript(RequestHandle handle, const GenerationRequest& request) {
  Clock::time_point when = Clock::now() + delay_;
  const int num_prompt_tokens = static_cast<int>(request.prompt_ids.size());
  const bool says_nothing = request.max_tokens == 0;
  const size_t num_updates = says_nothing ? 1 : pieces_.size();
  for (size_t i = 0; i < num_updates; ++i) {
    GenerationUpdate update;
    update.num_prompt_tokens = num_prompt_tokens;
    update.num_cached_tokens = num_cached_tokens_;
    if (!says_nothing) {
      update.num_completion_tokens = static_cast<int>(i + 1) * request.num_choices;
    }
    if (i == 0 && request.num_prompt_top_logprobs.has_value()) {
      update.prompt_logprobs = PromptLogprobsOf(request);
    }
    update.finished = i + 1 == num_updates;
    if (update.finished) update.error = final_error_;
    for (int choice = 0; choice < request.num_choices; ++choice) {
      ChoiceDelta& delta = update.choices.emplace_back();
      delta.index = choice;
      if (!says_nothing) {
        delta.text = absl::StrReplaceAll(pieces_[i], {{"{choice}", std::to_string(choice)}});
      }
      if (update.finished && final_error_.ok()) {
        delta.finish_reason = says_nothing ? FinishReason::kLength : FinishReason::kStop;
      }
    }
    deliveries_.emplace(when, Delivery{handle, std::move(update)});
    when += delay_;
  }
}

void FakeLlm::Cancel(RequestHandle handle) {
  MutexLock lock(&mutex_);
  if (running_.erase(handle) == 0) return;
  cancelled_.push_back(handle);
  changed_.NotifyAll();
}

absl::StatusOr<uint64_t> FakeLlm::ResetPrefixCache(const std::optional<std::string>& salt) {
  MutexLock lock(&mutex_);
  resets_.push_back(salt);
  return reset_answer_;
}

void FakeLlm::DeliverLoop() {
  for (;;) {
    std::function<void(GenerationUpdate)> on_update;
    GenerationUpdate update;
    {
      MutexLock lock(&mutex_);
      const auto is_due = [&]() REQUIRES(mutex_) {
        return stopping_ || (!deliveries_.empty() && deliveries_.begin()->first <= Clock::now());
      };
      const auto until_due = deliveries_.empty() ? Clock::duration(std::chrono::hours(1))
                                                 : deliveries_.begin()->first - Clock::now();
      const size_t known = deliveries_.size();
      changed_.WaitFor(&mutex_, until_due,
                       [&]() REQUIRES(mutex_) { return is_due() || deliveries_.size() != known; });
      if (stopping_) return;
      if (!is_due()) continue;
      Delivery delivery = std::move(deliveries_.extract(deliveries_.begin()).mapped());
      const auto it = running_.find(delivery.handle);
      if (it == running_.end()) continue;
      on_update = it->second.on_update;
      update = std::move(delivery.update);
      if (update.finished) running_.erase(it);
      ++num_updates_;
    }
    on_update(std::move(update));
  }
}

ReadinessReport FakeLlm::Readiness() const {
  MutexLock lock(&mutex_);
  return readiness_;
}

std::vector<int32_t> FakeLlm::Encode(const std::string& text) const {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

std::string FakeLlm::Decode(const std::vector<int32_t>& ids) const {
  return std::string(ids.begin(), ids.end());
}

std::vector<int> FakeLlm::TextOffsets(const std::vector<int32_t>& ids) const {
  std::vector<int> offsets(ids.size() + 1);
  for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = static_cast<int>(i);
  return offsets;
}

absl::StatusOr<std::string> FakeLlm::RenderChat(const std::vector<ChatMessage>& messages,
                                                bool add_generation_prompt) const {
  std::string text;
  for (const ChatMessage& message : messages) {
    if (message.role == "tool") {
      return absl::InvalidArgumentError("the template has no words for the role tool");
    }
    text += fmt::format("{}:{}\n", message.role, message.content);
  }
  if (add_generation_prompt) text += "assistant:";
  return text;
}

int FakeLlm::max_top_logprobs() const {
  MutexLock lock(&mutex_);
  return max_top_logprobs_;
}

int FakeLlm::max_model_len() const {
  MutexLock lock(&mutex_);
  return max_model_len_;
}

}  // namespace wintserve
