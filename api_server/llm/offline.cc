#include "api_server/llm/offline.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cerrno>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/mutex.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using nlohmann::json;

template <typename T>
std::optional<T> Optional(const json& value) {
  if (value.is_null()) return std::nullopt;
  return value.get<T>();
}

absl::StatusOr<GenerationRequest> MakeRequest(const LLM& llm, const json& spec) {
  std::string prompt = spec.at("prompt");
  if (spec.at("chat").get<bool>()) {
    ASSIGN_OR_RETURN(prompt, llm.RenderChat({{"user", prompt}}, /*add_generation_prompt=*/true));
  }
  GenerationRequest request;
  request.id = "generate";
  request.prompt_ids = llm.Encode(prompt);
  request.temperature =
      Optional<float>(spec.at("temperature")).value_or(llm.defaults().temperature);
  request.top_p = Optional<float>(spec.at("top_p")).value_or(llm.defaults().top_p);
  request.top_k = spec.at("top_k");
  request.min_p = llm.defaults().min_p;
  request.repetition_penalty = llm.defaults().repetition_penalty;
  request.presence_penalty = llm.defaults().presence_penalty;
  request.frequency_penalty = llm.defaults().frequency_penalty;
  request.max_tokens = Optional<int>(spec.at("max_tokens"));
  request.seed = Optional<int64_t>(spec.at("seed"));
  request.stop = spec.at("stop").get<std::vector<std::string>>();
  return request;
}

// Prints on the engine's thread, tells the caller's when all is printed or nothing more can be.
class Printer {
 public:
  explicit Printer(bool print_ids) : print_ids_(print_ids) {}

  void OnUpdate(const GenerationUpdate& update) EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    if (finished_) return;
    std::string text;
    for (const ChoiceDelta& choice : update.choices) {
      ids_.insert(ids_.end(), choice.token_ids.begin(), choice.token_ids.end());
      if (!print_ids_) text += choice.text;
    }
    if (update.finished && update.error.ok()) {
      text += print_ids_ ? fmt::format("{}\n", fmt::join(ids_, " ")) : "\n";
    }
    status_ = Write(text);
    if (status_.ok()) status_ = update.error;
    finished_ = update.finished || !status_.ok();
    changed_.NotifyOne();
  }

  absl::Status Wait() EXCLUDES(mutex_) {
    MutexLock lock(&mutex_);
    changed_.Wait(&mutex_, [this]() REQUIRES(mutex_) { return finished_; });
    return status_;
  }

 private:
  // CANCELLED: nobody reads any more.
  static absl::Status Write(const std::string& text) {
    if (std::fwrite(text.data(), 1, text.size(), stdout) == text.size() &&
        std::fflush(stdout) == 0) {
      return absl::OkStatus();
    }
    if (errno == EPIPE) return absl::CancelledError("stdout is closed");
    return absl::ErrnoToStatus(errno, "cannot write to stdout");
  }

  const bool print_ids_;
  Mutex mutex_;
  CondVar changed_;
  std::vector<int32_t> ids_ GUARDED_BY(mutex_);
  bool finished_ GUARDED_BY(mutex_) = false;
  absl::Status status_ GUARDED_BY(mutex_);
};

}  // namespace

absl::Status GenerateOffline(LLM* llm, const std::string& request_json) {
  const json spec = json::parse(request_json, nullptr, /*allow_exceptions=*/false);
  CHECK(spec.is_object(), "the launcher wrote {}", request_json);
  ASSIGN_OR_RETURN(GenerationRequest request, MakeRequest(*llm, spec));
  // Shared: an update may still be on its way when the request is cancelled.
  const auto printer = std::make_shared<Printer>(spec.at("print_ids"));
  ASSIGN_OR_RETURN(const RequestHandle handle,
                   llm->Submit(std::move(request), [printer](const GenerationUpdate& update) {
                     printer->OnUpdate(update);
                   }));
  const absl::Status status = printer->Wait();
  llm->Cancel(handle);  // ignored where it has finished
  // As with any command whose reader has seen enough.
  return absl::IsCancelled(status) ? absl::OkStatus() : status;
}

}  // namespace wintserve
