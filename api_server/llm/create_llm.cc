#include "api_server/llm/create_llm.h"

#include <fmt/core.h>

#include <atomic>
#include <unordered_map>
#include <utility>

#include "api_server/llm/engine.h"
#include "api_server/llm/generation_config.h"
#include "api_server/llm/llm_factory.h"
#include "api_server/llm/metrics.h"
#include "api_server/llm/model_digest.h"
#include "api_server/llm/request_check.h"
#include "api_server/llm/token_text.h"
#include "api_server/text/tokenizer.h"
#include "cache_manager/client/cache_client.h"
#include "common/mutex.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

// Of one try; bounds how long shutting down can take.
constexpr int64_t kCacheConnectTimeoutMs = 1'000;
constexpr int64_t kCacheFlushTimeoutMs = 5'000;
constexpr double kBytesPerGib = 1 << 30;
constexpr double kMaxSwapSpaceGib = 1 << 20;  // its bytes fit 64 bits

class LlmImpl : public LLM {
 public:
  LlmImpl(LlmOptions options, std::unique_ptr<Tokenizer> tokenizer, GenerationConfig generation,
          std::shared_ptr<prometheus::Registry> registry, CacheFlusher flush_cache)
      : options_(std::move(options)),
        tokenizer_(std::move(tokenizer)),
        generation_(std::move(generation)),
        flush_cache_(std::move(flush_cache)),
        metrics_(std::move(registry)) {}

  absl::Status Start(CacheConnector connect_cache) {
    ASSIGN_OR_RETURN(engine_, Engine::Start(MakeEngineConfig(std::move(connect_cache)), &metrics_));
    return absl::OkStatus();
  }

  absl::StatusOr<RequestHandle> Submit(GenerationRequest request,
                                       std::function<void(GenerationUpdate)> on_update) override {
    if (const ReadinessReport readiness = engine_->Readiness();
        !readiness.ready && !readiness.is_recovering) {
      return absl::UnavailableError("not ready: " + readiness.reason);
    }
    const RequestLimits limits = request_limits();
    RETURN_IF_ERROR(CheckRequest(request, limits));
    const RequestHandle handle = ++last_handle_;
    const std::shared_ptr<std::atomic<bool>> cancelled = OpenRequest(handle);
    auto deliver = [this, handle, cancelled,
                    on_update = std::move(on_update)](GenerationUpdate update) {
      if (cancelled->load()) return;
      if (update.finished) CloseRequest(handle);
      on_update(std::move(update));
    };
    RequestOutput output(*tokenizer_, request, std::move(deliver));
    absl::Status status = engine_->Submit(std::make_unique<ActiveRequest>(
        ToScheduled(std::move(request), handle, limits, EngineNowUs()), std::move(output)));
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

  void Stop() override { engine_->Stop(); }

  absl::StatusOr<uint64_t> ResetPrefixCache(const std::optional<std::string>& salt) override {
    return flush_cache_(salt);
  }

  ReadinessReport Readiness() const override { return engine_->Readiness(); }

  std::vector<int32_t> Encode(const std::string& text) const override {
    return tokenizer_->Encode(text);
  }
  std::string Decode(const std::vector<int32_t>& ids) const override {
    return tokenizer_->Decode(ids);
  }
  std::string TokenText(int32_t id) const override { return SpellingOf(tokenizer_->Bytes(id)); }
  std::vector<int> TextOffsets(const std::vector<int32_t>& ids) const override {
    return TextOffsetsOf(*tokenizer_, ids);
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
  int max_top_logprobs() const override { return options_.max_top_logprobs; }
  const std::string& model_name() const override { return options_.model_name; }
  const std::string& model_path() const override { return options_.model_path; }

 private:
  EngineConfig MakeEngineConfig(CacheConnector connect_cache) const {
    std::vector<int32_t> stop_ids = generation_.eos_ids;
    if (tokenizer_->eos_id() >= 0) stop_ids.push_back(tokenizer_->eos_id());
    const auto world_size = static_cast<uint32_t>(options_.world_size);
    EngineConfig config;
    config.work_queue = {.unix_socket = options_.work_queue_socket,
                         .tcp_address = options_.work_queue_address,
                         .tls = options_.queue_tls,
                         .token = options_.token,
                         .world_size = world_size,
                         .wait_for_accept = true};
    config.startup = {.world_size = world_size,
                      .max_model_len = options_.max_model_len,
                      .max_num_seqs = options_.max_num_seqs,
                      .max_num_batched_tokens = options_.max_num_batched_tokens,
                      .chunked_prefill = options_.chunked_prefill,
                      .block_size_tokens = options_.block_size_tokens,
                      .tokenizer_vocab_size = tokenizer_->vocab_size(),
                      .stop_ids = stop_ids,
                      .model_digest = ModelDigest(options_.model_path, *tokenizer_),
                      .host_bytes = static_cast<uint64_t>(options_.swap_space_gib * kBytesPerGib),
                      .num_blocks_override = options_.num_blocks_override};
    config.scheduler = {.max_num_seqs = options_.max_num_seqs,
                        .max_num_batched_tokens = options_.max_num_batched_tokens,
                        .block_size_tokens = options_.block_size_tokens,
                        .eos_ids = std::move(stop_ids),
                        .async_depth = options_.async_depth,
                        .chunked_prefill = options_.chunked_prefill,
                        .prefix_caching = options_.prefix_caching,
                        .max_partial_prefills = options_.max_partial_prefills,
                        .max_long_partial_prefills = options_.max_long_partial_prefills,
                        .long_prefill_token_threshold = options_.long_prefill_token_threshold,
                        .max_seqs_per_tenant = options_.max_seqs_per_tenant,
                        .max_queue_requests = options_.max_queue_requests,
                        .max_queue_tokens = options_.max_queue_tokens};
    config.connect_cache = std::move(connect_cache);
    config.watch_workers = options_.watch_workers;
    config.fault_hold_ms = options_.fault_hold_ms;
    config.leaves_workers = options_.leaves_workers;
    config.stall_timeout_ms = options_.stall_timeout_ms;
    config.step_deadline = options_.step_deadline;
    config.on_ready = options_.on_ready;
    config.on_cache_hang = options_.on_cache_hang;
    config.on_fatal = options_.on_fatal;
    return config;
  }

  // Of an engine that has been ready.
  RequestLimits request_limits() const {
    const EngineLimits limits = engine_->limits();
    return {.max_model_len = limits.max_model_len,
            .vocab_size = limits.vocab_size,
            .max_top_logprobs = options_.max_top_logprobs,
            .max_timeout_ms = options_.request_timeout_ms};
  }

  // The request's cancel flag.
  std::shared_ptr<std::atomic<bool>> OpenRequest(RequestHandle handle) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    return open_requests_[handle] = std::make_shared<std::atomic<bool>>(false);
  }

  // That flag; null when the request is not open any more.
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
  const CacheFlusher flush_cache_;
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
  if (options.async_depth < 0) {
    return absl::InvalidArgumentError(
        fmt::format("--async-depth is {}, must be at least 0", options.async_depth));
  }
  if (!(options.swap_space_gib >= 0 && options.swap_space_gib <= kMaxSwapSpaceGib)) {
    return absl::InvalidArgumentError(fmt::format("--swap-space is {} GiB, must be from 0 to {}",
                                                  options.swap_space_gib, kMaxSwapSpaceGib));
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
    out.work_queue_address =
        fmt::format("{}:{}", options.queue_host, options.engine_worker_queue_port);
  }
  out.cache_target = "unix:" + instance.cache_socket();
  out.token = instance.token;
  out.world_size = options.tensor_parallel_size;
  out.max_model_len = options.max_model_len;
  out.max_num_seqs = options.max_num_seqs;
  out.max_num_batched_tokens = options.max_num_batched_tokens;
  out.block_size_tokens = options.block_size;
  out.num_blocks_override = options.num_gpu_blocks_override;
  out.max_queue_requests = options.max_queue_requests;
  out.max_queue_tokens = options.max_queue_tokens;
  out.max_seqs_per_tenant = options.max_num_seqs_per_user;
  out.max_partial_prefills = options.max_num_partial_prefills;
  out.max_long_partial_prefills = options.max_long_partial_prefills;
  out.long_prefill_token_threshold = options.long_prefill_token_threshold;
  out.request_timeout_ms = options.request_timeout_ms;
  out.fault_hold_ms = options.fault_hold_ms;
  out.stall_timeout_ms = options.stall_timeout_ms;
  // They are another launcher's, who goes on: an API server that is stopped alone is replaced.
  out.leaves_workers = options.role == "api";
  out.prefix_caching = options.enable_prefix_caching;
  out.chunked_prefill = options.enable_chunked_prefill;
  out.async_depth = options.async_depth;
  out.swap_space_gib = options.swap_space_gib;
  out.max_top_logprobs = options.enable_logprob ? options.max_logprobs : -1;
  return out;
}

absl::StatusOr<std::unique_ptr<LLM>> CreateLlmWith(LlmOptions options,
                                                   std::unique_ptr<Tokenizer> tokenizer,
                                                   std::shared_ptr<prometheus::Registry> registry,
                                                   CacheConnector connect_cache,
                                                   CacheFlusher flush_cache) {
  RETURN_IF_ERROR(CheckLimits(options));
  ASSIGN_OR_RETURN(GenerationConfig generation, LoadGenerationConfig(options.model_path));
  auto llm =
      std::make_unique<LlmImpl>(std::move(options), std::move(tokenizer), std::move(generation),
                                std::move(registry), std::move(flush_cache));
  RETURN_IF_ERROR(llm->Start(std::move(connect_cache)));
  return llm;
}

absl::StatusOr<std::unique_ptr<LLM>> CreateLlm(LlmOptions options,
                                               std::shared_ptr<prometheus::Registry> registry) {
  const std::string& directory =
      options.tokenizer_path.empty() ? options.model_path : options.tokenizer_path;
  ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(directory));
  auto connect = [target = options.cache_target, token = options.token, tls = options.queue_tls](
                     uint64_t api_epoch, CacheEvents events) {
    return ConnectCacheClient(target, token, api_epoch, std::move(events), kCacheConnectTimeoutMs,
                              tls);
  };
  auto flush = [target = options.cache_target, token = options.token,
                tls = options.queue_tls](const std::optional<std::string>& salt) {
    return FlushPrefixCache(target, token, salt, kCacheFlushTimeoutMs, tls);
  };
  return CreateLlmWith(std::move(options), std::move(tokenizer), std::move(registry),
                       std::move(connect), std::move(flush));
}

}  // namespace wintserve
