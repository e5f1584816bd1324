// A scripted LLM: what it says and when is decided by the test; what it was asked is recorded.
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "api_server/llm/llm.h"
#include "common/mutex.h"

namespace wintserve {

// Tokens are bytes: Encode("ab") is {97, 98}; the vocabulary has 256 ids. RenderChat is
// "role:content\n" a message.
//
// By default a request is accepted, then each choice says `pieces`, one an update, and finishes
// with kStop; with a max_tokens of 0, nothing, with kLength. A prompt's token t has the
// log-probability -t / 128, rank 1, and the tokens from t on as its most probable ones. A test that
// wants the clock itself calls HoldUpdates() first and then Send(); HoldRequests() also withholds
// the first update, which says that a request is in the queue.
//
// Threading: as LLM says. Updates come from a thread of the fake's own ("the engine's thread").
class FakeLlm : public LLM {
 public:
  FakeLlm();
  ~FakeLlm() override;

  // --- The script, set before requests come.
  // What every choice says, update by update; the placeholder {choice} becomes its index.
  void SetPieces(std::vector<std::string> pieces);
  void SetDelayBetweenUpdates(std::chrono::milliseconds delay);
  // Submit fails with this instead of accepting.
  void SetSubmitError(absl::Status status);
  // Instead of being accepted, a request ends with this error. Skips the first `num_accepted`.
  void SetQueueError(absl::Status status, size_t num_accepted = 0);
  // After all pieces the request ends with this error instead of a finish reason.
  void SetFinalError(absl::Status status);
  void SetReadiness(ReadinessReport report);
  void SetMaxModelLen(int max_model_len);
  void SetMaxTopLogprobs(int max_top_logprobs);
  // Prompt tokens of every request that were cached.
  void SetNumCachedTokens(int num_cached_tokens);
  // What ResetPrefixCache answers; 7 unless set.
  void SetResetAnswer(absl::StatusOr<uint64_t> answer);

  // --- By hand. After it was accepted, a request gets no update but those sent here.
  void HoldUpdates();
  // As HoldUpdates; and requests are not accepted until Send(handle, AcceptedUpdate()).
  void HoldRequests();
  // Delivered on the fake's thread, in order. Ignored once the request was cancelled or has
  // finished.
  void Send(RequestHandle handle, GenerationUpdate update);

  // --- What happened.
  std::vector<GenerationRequest> submitted() const;
  std::vector<RequestHandle> cancelled() const;
  // False when it did not come to that within ten seconds.
  bool WaitForSubmitted(size_t count) const;
  bool WaitForCancelled(size_t count) const;
  // The salts that were asked to be reset; absent: all.
  std::vector<std::optional<std::string>> resets() const;
  // Updates delivered to any request so far.
  size_t num_updates() const;

  // --- LLM
  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::function<void(GenerationUpdate)> on_update) override;
  void Cancel(RequestHandle handle) override;
  void Stop() override {}
  absl::StatusOr<uint64_t> ResetPrefixCache(const std::optional<std::string>& salt) override;
  ReadinessReport Readiness() const override;
  std::vector<int32_t> Encode(const std::string& text) const override;
  std::string Decode(const std::vector<int32_t>& ids) const override;
  std::string TokenText(int32_t id) const override { return Decode({id}); }
  // Every byte is a character.
  std::vector<int> TextOffsets(const std::vector<int32_t>& ids) const override;
  absl::StatusOr<std::string> RenderChat(const std::vector<ChatMessage>& messages,
                                         bool add_generation_prompt) const override;
  const GenerationDefaults& defaults() const override { return defaults_; }
  int max_model_len() const override;
  int vocab_size() const override { return 256; }
  int max_top_logprobs() const override;
  const std::string& model_name() const override { return model_name_; }
  const std::string& model_path() const override { return model_path_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Running {
    std::function<void(GenerationUpdate)> on_update;
  };
  struct Delivery {
    RequestHandle handle;
    GenerationUpdate update;
  };

  void DeliverLoop();
  void ScheduleScript(RequestHandle handle, const GenerationRequest& request) REQUIRES(mutex_);

  const GenerationDefaults defaults_;
  const std::string model_name_ = "fake";
  const std::string model_path_ = "models/fake";

  mutable Mutex mutex_;
  mutable CondVar changed_;
  std::vector<std::string> pieces_ GUARDED_BY(mutex_) = {"Hello", " world"};
  std::chrono::milliseconds delay_ GUARDED_BY(mutex_){0};
  absl::Status submit_error_ GUARDED_BY(mutex_);
  absl::Status queue_error_ GUARDED_BY(mutex_);
  size_t num_accepted_before_error_ GUARDED_BY(mutex_) = 0;
  absl::Status final_error_ GUARDED_BY(mutex_);
  ReadinessReport readiness_ GUARDED_BY(mutex_) = {true, ""};
  int max_model_len_ GUARDED_BY(mutex_) = 2048;
  int max_top_logprobs_ GUARDED_BY(mutex_) = kMaxTopLogprobs;
  int num_cached_tokens_ GUARDED_BY(mutex_) = 0;
  absl::StatusOr<uint64_t> reset_answer_ GUARDED_BY(mutex_) = 7;
  std::vector<std::optional<std::string>> resets_ GUARDED_BY(mutex_);
  bool hold_updates_ GUARDED_BY(mutex_) = false;
  bool hold_requests_ GUARDED_BY(mutex_) = false;
  std::vector<GenerationRequest> submitted_ GUARDED_BY(mutex_);
  std::vector<RequestHandle> cancelled_ GUARDED_BY(mutex_);
  std::map<RequestHandle, Running> running_ GUARDED_BY(mutex_);
  std::multimap<Clock::time_point, Delivery> deliveries_ GUARDED_BY(mutex_);
  size_t num_updates_ GUARDED_BY(mutex_) = 0;
  bool stopping_ GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// The first update of a request that is in the queue.
inline GenerationUpdate AcceptedUpdate() { return {}; }

// The last update of a request that failed.
GenerationUpdate ErrorUpdate(absl::Status error);

// A RESOURCE_EXHAUSTED whose RetryAfterSeconds() is this.
absl::Status QueueFullError(int retry_after_seconds);

// An update of one choice: text, and if given how it ended (which finishes the request).
GenerationUpdate TextUpdate(int index, std::string text,
                            std::optional<FinishReason> finish_reason = std::nullopt);

}  // namespace wintserve
