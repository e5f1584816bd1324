#include "api_server/openai/responses.h"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "api_server/openai/api_error.h"
#include "api_server/openai/ids.h"
#include "api_server/openai/logprobs_json.h"
#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kOwner[] = "wintserve";

// Invalid UTF-8 cannot come from the LLM; if it did, U+FFFD is better than an exception.
std::string Dump(const Json& json) {
  return json.dump(-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

Json FinishReasonJson(std::optional<FinishReason> reason) {
  if (!reason.has_value()) return nullptr;
  return *reason == FinishReason::kStop ? "stop" : "length";
}

Json UsageJson(const UsageCounter& usage) {
  return {{"prompt_tokens", usage.prompt_tokens()},
          {"completion_tokens", usage.completion_tokens()},
          {"total_tokens", usage.prompt_tokens() + usage.completion_tokens()},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens()}}}};
}

Json Envelope(const ResponseIdentity& identity, const char* object, Json choices) {
  return {{"id", identity.id},
          {"object", object},
          {"created", identity.created_seconds},
          {"model", identity.model},
          {"choices", std::move(choices)}};
}

// content_key: "message" or "delta" for chat, "text" for completions.
Json ChoiceJson(int index, const char* content_key, Json content,
                std::optional<FinishReason> finish_reason, Json logprobs) {
  return {{"index", index},
          {content_key, std::move(content)},
          {"logprobs", std::move(logprobs)},
          {"finish_reason", FinishReasonJson(finish_reason)}};
}

Json ModelJson(const std::string& id, const LLM& llm, int64_t created_seconds) {
  return {{"id", id},
          {"object", "model"},
          {"created", created_seconds},
          {"owned_by", kOwner},
          {"root", llm.model_path()},
          {"parent", nullptr},
          {"max_model_len", llm.max_model_len()}};
}

const char* ChunkObject(Endpoint endpoint) {
  return endpoint == Endpoint::kChat ? "chat.completion.chunk" : "text_completion";
}

size_t NumChoices(const ApiRequest& request) {
  return request.prompts.size() * static_cast<size_t>(request.num_choices_per_prompt);
}

}  // namespace

ResponseIdentity NewResponseIdentity(Endpoint endpoint, const std::string& model) {
  ResponseIdentity identity;
  identity.endpoint = endpoint;
  identity.id = (endpoint == Endpoint::kChat ? "chatcmpl-" : "cmpl-") + NewUuid();
  identity.created_seconds = std::chrono::duration_cast<std::chrono::seconds>(
                                 std::chrono::system_clock::now().time_since_epoch())
                                 .count();
  identity.model = model;
  return identity;
}

void UsageCounter::Update(size_t prompt_index, const GenerationUpdate& update) {
  per_prompt_.at(prompt_index) = {update.num_prompt_tokens, update.num_completion_tokens,
                                  update.num_cached_tokens, update.finished};
}

int64_t UsageCounter::Sum(int64_t Counts::*member) const {
  int64_t sum = 0;
  for (const Counts& counts : per_prompt_) sum += counts.*member;
  return sum;
}

int64_t UsageCounter::prompt_tokens() const { return Sum(&Counts::prompt); }
int64_t UsageCounter::completion_tokens() const { return Sum(&Counts::completion); }
int64_t UsageCounter::cached_tokens() const { return Sum(&Counts::cached); }

bool UsageCounter::all_finished() const {
  return std::all_of(per_prompt_.begin(), per_prompt_.end(),
                     [](const Counts& counts) { return counts.finished; });
}

ResponseAssembler::ResponseAssembler(ResponseIdentity identity, const ApiRequest& request,
                                     const LLM& llm)
    : identity_(std::move(identity)),
      llm_(llm),
      num_choices_per_prompt_(request.num_choices_per_prompt),
      num_top_logprobs_(request.num_top_logprobs),
      echoes_logprobs_(request.echoes_logprobs()),
      num_prompt_top_logprobs_(request.prompt_logprobs),
      choices_(NumChoices(request)),
      prompt_logprobs_(request.prompts.size()),
      usage_(request.prompts.size()) {
  for (size_t i = 0; i < choices_.size() && !request.echo_texts.empty(); ++i) {
    choices_[i].text = request.echo_texts.at(i / num_choices_per_prompt_);
  }
}

void ResponseAssembler::Add(size_t prompt_index, const GenerationUpdate& update) {
  usage_.Update(prompt_index, update);
  if (update.prompt_logprobs.has_value()) {
    prompt_logprobs_[prompt_index] = *update.prompt_logprobs;
  }
  for (const ChoiceDelta& delta : update.choices) {
    CHECK(0 <= delta.index && delta.index < num_choices_per_prompt_, "index={}", delta.index);
    Choice& choice = choices_[prompt_index * num_choices_per_prompt_ + delta.index];
    choice.text += delta.text;
    choice.logprobs.insert(choice.logprobs.end(), delta.logprobs.begin(), delta.logprobs.end());
    if (delta.finish_reason.has_value()) choice.finish_reason = delta.finish_reason;
  }
}

std::string ResponseAssembler::Body() const {
  Json choices = Json::array();
  for (size_t prompt = 0; prompt < prompt_logprobs_.size(); ++prompt) {
    AddChoicesOf(prompt, &choices);
  }
  const bool is_chat = identity_.endpoint == Endpoint::kChat;
  Json body =
      Envelope(identity_, is_chat ? "chat.completion" : "text_completion", std::move(choices));
  body["usage"] = UsageJson(usage_);
  return Dump(body);
}

void ResponseAssembler::AddChoicesOf(size_t prompt_index, Json* choices) const {
  const bool is_chat = identity_.endpoint == Endpoint::kChat;
  const PromptLogprobs& prompt = prompt_logprobs_[prompt_index];
  std::optional<EchoJson> echo;
  if (echoes_logprobs_) echo.emplace(EchoLogprobsJson(prompt, *num_top_logprobs_, llm_));
  Json prompt_logprobs;
  if (num_prompt_top_logprobs_.has_value()) {
    prompt_logprobs = PromptLogprobsJson(prompt, *num_prompt_top_logprobs_, llm_);
  }
  for (int i = 0; i < num_choices_per_prompt_; ++i) {
    const size_t index = prompt_index * num_choices_per_prompt_ + i;
    const Choice& choice = choices_[index];
    Json logprobs;
    if (num_top_logprobs_.has_value()) {
      logprobs = LogprobsJson(identity_.endpoint, choice.logprobs,
                              echo.has_value() ? echo->num_characters : 0);
    }
    if (echo.has_value()) {
      const Json sampled = std::exchange(logprobs, echo->logprobs);
      AppendColumns(sampled, &logprobs);
    }
    Json content =
        is_chat ? Json{{"role", "assistant"}, {"content", choice.text}} : Json(choice.text);
    choices->push_back(ChoiceJson(static_cast<int>(index), is_chat ? "message" : "text",
                                  std::move(content), choice.finish_reason, std::move(logprobs)));
    if (num_prompt_top_logprobs_.has_value()) {
      choices->back()["prompt_logprobs"] = prompt_logprobs;
    }
  }
}

StreamAssembler::StreamAssembler(ResponseIdentity identity, const ApiRequest& request,
                                 const LLM& llm)
    : identity_(std::move(identity)),
      llm_(llm),
      num_choices_per_prompt_(request.num_choices_per_prompt),
      options_(request.stream_options),
      echoed_top_logprobs_(request.echoes_logprobs() ? request.num_top_logprobs : std::nullopt),
      began_(NumChoices(request), false),
      usage_(request.prompts.size()) {
  for (const std::string& text : request.echo_texts) echoes_.push_back({.text = text});
}

void StreamAssembler::Add(size_t prompt_index, const GenerationUpdate& update,
                          std::vector<std::string>* payloads) {
  usage_.Update(prompt_index, update);
  if (echoed_top_logprobs_.has_value() && update.prompt_logprobs.has_value()) {
    EchoJson echo = EchoLogprobsJson(*update.prompt_logprobs, *echoed_top_logprobs_, llm_);
    echoes_.at(prompt_index).logprobs = std::move(echo.logprobs);
    echoes_.at(prompt_index).num_characters = echo.num_characters;
  }
  std::vector<const ChoiceDelta*> by_index;
  for (const ChoiceDelta& delta : update.choices) by_index.push_back(&delta);
  std::stable_sort(by_index.begin(), by_index.end(),
                   [](const auto* a, const auto* b) { return a->index < b->index; });
  for (const ChoiceDelta* delta : by_index) {
    CHECK(0 <= delta->index && delta->index < num_choices_per_prompt_, "index={}", delta->index);
    AddChoice(static_cast<int>(prompt_index) * num_choices_per_prompt_ + delta->index, *delta,
              payloads);
  }
  if (finished() && options_.include_usage) payloads->push_back(UsageChunk());
}

void StreamAssembler::AddChoice(int index, const ChoiceDelta& delta,
                                std::vector<std::string>* payloads) {
  const bool is_chat = identity_.endpoint == Endpoint::kChat;
  const Echo* const echo = echoes_.empty() ? nullptr : &echoes_[index / num_choices_per_prompt_];
  if (!began_[index]) {
    began_[index] = true;
    if (is_chat) {
      payloads->push_back(
          ChoiceChunk(index, {{"role", "assistant"}, {"content", ""}}, std::nullopt, nullptr));
    } else if (echo != nullptr) {
      payloads->push_back(ChoiceChunk(index, echo->text, std::nullopt, echo->logprobs));
    }
  }
  if (!delta.text.empty() || !delta.logprobs.empty()) {
    Json logprobs;
    if (!delta.logprobs.empty()) {
      logprobs = LogprobsJson(identity_.endpoint, delta.logprobs,
                              echo == nullptr ? 0 : echo->num_characters);
    }
    payloads->push_back(ChoiceChunk(index,
                                    is_chat ? Json{{"content", delta.text}} : Json(delta.text),
                                    std::nullopt, std::move(logprobs)));
  }
  if (delta.finish_reason.has_value()) {
    payloads->push_back(
        ChoiceChunk(index, is_chat ? Json::object() : Json(""), delta.finish_reason, nullptr));
  }
}

std::string StreamAssembler::ChoiceChunk(int index, Json content,
                                         std::optional<FinishReason> finish_reason,
                                         Json logprobs) const {
  const char* content_key = identity_.endpoint == Endpoint::kChat ? "delta" : "text";
  Json chunk = Envelope(identity_, ChunkObject(identity_.endpoint),
                        Json::array({ChoiceJson(index, content_key, std::move(content),
                                                finish_reason, std::move(logprobs))}));
  if (options_.include_usage) {
    chunk["usage"] = options_.continuous_usage_stats ? UsageJson(usage_) : Json(nullptr);
  }
  return Dump(chunk);
}

std::string StreamAssembler::UsageChunk() const {
  Json chunk = Envelope(identity_, ChunkObject(identity_.endpoint), Json::array());
  chunk["usage"] = UsageJson(usage_);
  return Dump(chunk);
}

std::string ModelListBody(const LLM& llm, const ModelNames& names, int64_t created_seconds) {
  Json data = Json::array({ModelJson(llm.model_name(), llm, created_seconds)});
  for (const std::string& alias : names.aliases) {
    data.push_back(ModelJson(alias, llm, created_seconds));
  }
  return Dump({{"object", "list"}, {"data", std::move(data)}});
}

absl::StatusOr<std::string> ModelBody(const std::string& id, const LLM& llm,
                                      const ModelNames& names, int64_t created_seconds) {
  RETURN_IF_ERROR(CheckModelName(id, llm, {names.aliases, /*strict=*/true}));
  return Dump(ModelJson(id, llm, created_seconds));
}

}  // namespace wintserve
