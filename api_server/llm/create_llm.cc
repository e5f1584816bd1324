#include "api_server/llm/create_llm.h"

#include <fmt/core.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>
#include <unordered_map>
#include <utility>

#include "api_server/llm/engine.h"
#include "api_server/llm/generation_config.h"
#include "api_server/llm/llm_factory.h"
#include "api_server/llm/metrics.h"
#include "api_server/text/tokenizer.h"
#include "cache_manager/client/cache_client.h"
#include "common/mutex.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr int64_t kCacheConnectTimeoutMs =
    1'000;  // of one try; bounds how long shutting down can take

// Not 0, which stands for "none" in a message that lacks the field.
uint64_t RandomEpoch() {
  std::random_device random;
  return (uint64_t{random()} << 32 | random()) | 1;
}

int64_t RandomSeed() {
  std::random_device random;
  return static_cast<int64_t>(uint64_t{random()} << 32 | random());
}

class LlmImpl : public LLM {
 public:
  LlmImpl(LlmOptions options, std::unique_ptr<Tokenizer> tokenizer, GenerationConfig generation,
          std::shared_ptr<prometheus::Registry> registry)
      : options_(std::move(options)),
        tokenizer_(std::move(tokenizer)),
        generation_(std::move(generation)),
        metrics_(std::move(registry)) {}

  absl::Status Start(CacheConnector connect_cache) {
    std::vector<int32_t> eos_ids = generation_.eos_ids;
    if (tokenizer_->eos_id() >= 0) eos_ids.push_back(tokenizer_->eos_id());
    EngineConfig config{.work_queue = {.unix_socket = options_.work_queue_socket,
                                       .tcp_address = options_.work_queue_address,
                                       .token = options_.token,
                                       .world_size = static_cast<uint32_t>(options_.world_size)},
                        .startup = {.world_size = static_cast<uint32_t>(options_.world_size),
                                    .max_model_len = options_.max_model_len,
                                    .max_num_seqs = options_.max_num_seqs,
                                    .max_num_batched_tokens = options_.max_num_batched_tokens,
                                    .block_size_tokens = options_.block_size_tokens,
                                    .tokenizer_vocab_size = tokenizer_->vocab_size(),
                                    .num_blocks_override = options_.num_blocks_override,
                                    .group_epoch = RandomEpoch()},
                        .eos_ids = std::move(eos_ids),
                        .connect_cache = std::move(connect_cache),
                        .on_ready = options_.on_ready,
                        .on_fatal = options_.on_fatal};
    ASSIGN_OR_RETURN(engine_, Engine::Start(std::move(config), &metrics_));
    return absl::OkStatus();
  }

  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::function<void(GenerationUpdate)> on_update) override {
    if (const ReadinessReport readiness = engine_->Readiness(); !readiness.ready) {
      return absl::UnavailableError("not ready: " + readiness.reason);
    }
    RETURN_IF_ERROR(CheckRequest(request));
    const RequestHandle handle = ++last_handle_;
    ASSIGN_OR_RETURN(const std::shared_ptr<std::atomic<bool>> cancelled, OpenRequest(handle));
    auto deliver = [this, handle, cancelled,
                    on_update = std::move(on_update)](GenerationUpdate update) {
      if (cancelled->load()) return;
      if (update.finished) CloseRequest(handle);
      on_update(std::move(update));
    };
    RequestOutput output(*tokenizer_, request, std::move(deliver));
    absl::Status status = engine_->Submit(std::make_unique<ActiveRequest>(
        ToScheduled(std::move(request), handle), std::move(output)));
    if (!status.ok()) {
      CloseRequest(handle);
      return status;
    }
    return handle;
  }

  void Cancel(RequestHandle handle) override {
    if (const auto cancelled = CloseRequest(handle)) {
      cancelled->store(true);
      engine_->Cancel(handle);
    }
  }

  ReadinessReport Readiness() const override { return engine_->Readiness(); }

  std::vector<int32_t> Encode(const std::string& text) const override {
    return tokenizer_->Encode(text);
  }
  std::string Decode(const std::vector<int32_t>& ids) const override {
    return tokenizer_->Decode(ids);
  }
  absl::StatusOr<std::string> RenderChat(const std::vector<ChatMessage>& messages,
                                         bool add_generation_prompt) const override {
    return RenderErnieChat(messages, add_generation_prompt, tokenizer_->chat_tokens());
  }

  const GenerationDefaults& defaults() const override { return generation_.defaults; }
  int max_model_len() const override {
    const int lowered = engine_->limits().max_model_len;
    return lowered > 0 ? lowered : options_.max_model_len;
  }
  int vocab_size() const override { return tokenizer_->vocab_size(); }
  const std::string& model_name() const override { return options_.model_name; }
  const std::string& model_path() const override { return options_.model_path; }

 private:
  // REQUIRES: the engine has been ready.
  absl::Status CheckRequest(const GenerationRequest& request) const {
    const EngineLimits limits = engine_->limits();
    const auto& ids = request.prompt_ids;
    if (ids.empty()) return absl::InvalidArgumentError("the prompt has no tokens");
    if (ids.size() > static_cast<size_t>(limits.max_model_len - 1)) {
      return absl::InvalidArgumentError(
          fmt::format("Input text is too long: {} tokens, at most {} (max_model_len {} leaves room "
                      "for one output token)",
                      ids.size(), limits.max_model_len - 1, limits.max_model_len));
    }
    for (const int32_t id : ids) {
      if (id >= 0 && id < limits.vocab_size) continue;
      return absl::InvalidArgumentError(fmt::format(
          "the prompt holds token id {}, must be from 0 to {}", id, limits.vocab_size - 1));
    }
    // Written so that NaN fails too.
    if (!(request.temperature >= 0) || !std::isfinite(request.temperature)) {
      return absl::InvalidArgumentError(
          fmt::format("temperature is {}, must be at least 0", request.temperature));
    }
    if (!(request.top_p >= 0 && request.top_p <= 1)) {
      return absl::InvalidArgumentError(
          fmt::format("top_p is {}, must be from 0 to 1", request.top_p));
    }
    if (request.top_k < -1) {
      return absl::InvalidArgumentError(
          fmt::format("top_k is {}, must be -1 or more", request.top_k));
    }
    if (request.num_choices < 1) {
      return absl::InvalidArgumentError(
          fmt::format("n is {}, must be at least 1", request.num_choices));
    }
    if (request.max_tokens.has_value() && *request.max_tokens < 1) {
      return absl::InvalidArgumentError(
          fmt::format("max_tokens is {}, must be at least 1", *request.max_tokens));
    }
    return absl::OkStatus();
  }

  ScheduledRequest ToScheduled(GenerationRequest request, RequestHandle handle) const {
    const int room = engine_->limits().max_model_len - static_cast<int>(request.prompt_ids.size());
    const bool greedy = request.temperature == 0 || request.top_p == 0;
    ScheduledRequest scheduled{.id = handle,
                               .prompt_ids = std::move(request.prompt_ids),
                               .num_choices = request.num_choices,
                               .max_tokens = std::min(request.max_tokens.value_or(room), room)};
    scheduled.sampling = {.temperature = greedy ? 0.0f : request.temperature,
                          .top_p = greedy ? 1.0f : request.top_p,
                          .top_k = std::max(0, request.top_k),
                          .seed = request.seed.has_value() ? *request.seed : RandomSeed()};
    return scheduled;
  }

  absl::StatusOr<std::shared_ptr<std::atomic<bool>>> OpenRequest(RequestHandle handle)
      EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    if (open_requests_.size() >= static_cast<size_t>(options_.max_open_requests)) {
      return absl::ResourceExhaustedError(
          fmt::format("too many requests: {} are open, which is the limit (--max-concurrency)",
                      open_requests_.size()));
    }
    return open_requests_[handle] = std::make_shared<std::atomic<bool>>(false);
  }

  // The request's cancel flag; null when it is not open any more.
  std::shared_ptr<std::atomic<bool>> CloseRequest(RequestHandle handle) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    const auto found = open_requests_.find(handle);
    if (found == open_requests_.end()) return nullptr;
    std::shared_ptr<std::atomic<bool>> cancelled = std::move(found->second);
    open_requests_.erase(found);
    return cancelled;
  }

  const LlmOptions options_;
  const std::unique_ptr<Tokenizer> tokenizer_;
  const GenerationConfig generation_;
  EngineMetrics metrics_;
  std::atomic<RequestHandle> last_handle_ = 0;
  Mutex mutex_;
  std::unordered_map<RequestHandle, std::shared_ptr<std::atomic<bool>>> open_requests_
      GUARDED_BY(mutex_);
  std::unique_ptr<Engine> engine_;  // last: its thread uses the rest until it is joined
};

absl::Status CheckLimits(const LlmOptions& options) {
  if (options.max_model_len < 2) {
    return absl::InvalidArgumentError(
        fmt::format("--max-model-len is {}, must be at least 2", options.max_model_len));
  }
  if (options.max_num_seqs < 1) {
    return absl::InvalidArgumentError(
        fmt::format("--max-num-seqs is {}, must be at least 1", options.max_num_seqs));
  }
  if (options.max_num_batched_tokens < options.max_num_seqs) {
    return absl::InvalidArgumentError(
        fmt::format("--max-num-batched-tokens is {}, must be at least --max-num-seqs ({})",
                    options.max_num_batched_tokens, options.max_num_seqs));
  }
  return absl::OkStatus();
}

}  // namespace

LlmOptions LlmOptionsFor(const Instance& instance) {
  const ServeOptions& options = instance.options;
  LlmOptions out;
  out.model_path = options.model;
  out.tokenizer_path = options.tokenizer;
  out.model_name =
      options.served_model_name.empty() ? options.model : options.served_model_name.front();
  out.work_queue_socket = instance.work_queue_socket();
  if (options.engine_worker_queue_port > 0) {
    out.work_queue_address = fmt::format("127.0.0.1:{}", options.engine_worker_queue_port);
  }
  out.cache_target = "unix:" + instance.cache_socket();
  out.token = instance.token;
  out.world_size = options.tensor_parallel_size;
  out.max_model_len = options.max_model_len;
  out.max_num_seqs = options.max_num_seqs;
  out.max_num_batched_tokens = options.max_num_batched_tokens;
  out.max_open_requests = options.max_concurrency;
  out.block_size_tokens = options.block_size;
  out.num_blocks_override = options.num_gpu_blocks_override;
  return out;
}

absl::StatusOr<std::unique_ptr<LLM>> CreateLlmWith(LlmOptions options,
                                                   std::unique_ptr<Tokenizer> tokenizer,
                                                   std::shared_ptr<prometheus::Registry> registry,
                                                   CacheConnector connect_cache) {
  RETURN_IF_ERROR(CheckLimits(options));
  ASSIGN_OR_RETURN(GenerationConfig generation, LoadGenerationConfig(options.model_path));
  auto llm = std::make_unique<LlmImpl>(std::move(options), std::move(tokenizer),
                                       std::move(generation), std::move(registry));
  RETURN_IF_ERROR(llm->Start(std::move(connect_cache)));
  return llm;
}

absl::StatusOr<std::unique_ptr<LLM>> CreateLlm(LlmOptions options,
                                               std::shared_ptr<prometheus::Registry> registry) {
  const std::string& directory =
      options.tokenizer_path.empty() ? options.model_path : options.tokenizer_path;
  ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(directory));
  auto connect = [target = options.cache_target, token = options.token](uint64_t api_epoch,
                                                                        CacheEvents events) {
    return ConnectCacheClient(target, token, api_epoch, std::move(events), kCacheConnectTimeoutMs);
  };
  return CreateLlmWith(std::move(options), std::move(tokenizer), std::move(registry),
                       std::move(connect));
}

}  // namespace wintserve
