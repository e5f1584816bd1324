#include "tools/eval/model_server.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "absl/strings/str_join.h"
#include "common/check.h"
#include "common/status_macros.h"

namespace wintserve::eval {
namespace {

using nlohmann::json;

// The object at choices[0], or null.
json FirstChoice(const json& answer) {
  const auto choices = answer.find("choices");
  if (choices == answer.end() || !choices->is_array() || choices->empty()) return json();
  return choices->front();
}

absl::StatusOr<std::vector<double>> ReadLogprobs(const json& answer, size_t num_ids,
                                                 const EchoForm& form) {
  const json choice = FirstChoice(answer);
  const json logprobs = choice.is_object() ? choice.value("logprobs", json()) : json();
  const json values = logprobs.is_object() ? logprobs.value("token_logprobs", json()) : json();
  if (!values.is_array()) {
    return absl::InternalError("the answer has no choices[0].logprobs.token_logprobs");
  }
  // What the server generated stands behind, but not the end that it found.
  if (values.size() < num_ids || values.size() > num_ids + static_cast<size_t>(form.max_tokens)) {
    return absl::InternalError(
        fmt::format("the answer has log-probabilities of {} tokens for a prompt of {}",
                    values.size(), num_ids));
  }
  std::vector<double> result(num_ids, 0);
  for (size_t i = 1; i < num_ids; ++i) {
    if (!values[i].is_number() || !std::isfinite(values[i].get<double>())) {
      return absl::InternalError(
          fmt::format("the answer has {} as the log-probability of token {}", values[i].dump(), i));
    }
    result[i] = values[i].get<double>();
  }
  return result;
}

// A server that puts tokens of its own in front would score other text than was asked.
absl::Status CheckPromptTokens(const json& answer, size_t num_ids) {
  const json usage = answer.value("usage", json());
  if (!usage.is_object()) return absl::OkStatus();
  const json counted = usage.value("prompt_tokens", json());
  if (!counted.is_number_integer() || counted.get<size_t>() == num_ids) return absl::OkStatus();
  return absl::InternalError(
      fmt::format("the server counted {} tokens of a prompt of {}", counted.dump(), num_ids));
}

absl::StatusOr<std::vector<double>> AskForLogprobs(HttpClient& client, const ServedModel& model,
                                                   std::span<const int32_t> ids,
                                                   const EchoForm& form) {
  const json body = {{"model", model.name},
                     {"prompt", std::vector<int32_t>(ids.begin(), ids.end())},
                     {"echo", true},
                     {"logprobs", form.logprobs},
                     {"max_tokens", form.max_tokens},
                     {"temperature", 0}};
  ASSIGN_OR_RETURN(const json answer, client.Post("/v1/completions", body));
  RETURN_IF_ERROR(CheckPromptTokens(answer, ids.size()));
  return ReadLogprobs(answer, ids.size(), form);
}

}  // namespace

absl::StatusOr<ServedModel> FindModel(HttpClient& client, const std::string& wanted) {
  ASSIGN_OR_RETURN(const json answer, client.Get("/v1/models"));
  std::vector<std::string> names;
  std::optional<ServedModel> found;
  for (const json& entry : answer.value("data", json::array())) {
    if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_string()) continue;
    names.push_back(entry["id"].get<std::string>());
    if (!wanted.empty() && names.back() != wanted) continue;
    ServedModel model;
    model.name = names.back();
    const json length = entry.value("max_model_len", json());
    if (length.is_number_integer()) model.max_model_len = length.get<int64_t>();
    found = std::move(model);
  }
  if (names.empty()) {
    return absl::NotFoundError(fmt::format("{}/v1/models lists no model", client.url()));
  }
  if (!found.has_value()) {
    return absl::NotFoundError(fmt::format("--served-model-name: {} has no model '{}'; it has: {}",
                                           client.url(), wanted, absl::StrJoin(names, ", ")));
  }
  if (wanted.empty() && names.size() > 1) {
    return absl::NotFoundError(fmt::format("--served-model-name: is needed, {} has several: {}",
                                           client.url(), absl::StrJoin(names, ", ")));
  }
  return *std::move(found);
}

absl::Status FindEchoForm(HttpClient& client, ServedModel* model) {
  constexpr EchoForm kForms[] = {{0, 0}, {1, 0}, {1, 1}};
  constexpr int32_t kProbe[] = {1, 2, 1};  // any model has these
  absl::Status failure;
  for (const EchoForm& form : kForms) {
    const auto logprobs = AskForLogprobs(client, *model, kProbe, form);
    if (logprobs.ok()) {
      model->echo = form;
      return absl::OkStatus();
    }
    const absl::StatusCode code = logprobs.status().code();
    const bool is_refusal =
        code == absl::StatusCode::kInvalidArgument || code == absl::StatusCode::kInternal;
    if (!is_refusal) return logprobs.status();
    failure = logprobs.status();  // the last form is the one that most servers answer
  }
  return absl::UnimplementedError(fmt::format(
      "{} does not give the log-probabilities of a prompt (/v1/completions with \"echo\" "
      "and \"logprobs\"), which all tasks but --exact need: {}",
      client.url(), std::string(failure.message())));
}

absl::StatusOr<std::vector<double>> PromptLogprobs(HttpClient& client, const ServedModel& model,
                                                   std::span<const int32_t> ids) {
  CHECK(model.echo.has_value() && ids.size() >= 2, "ids={}", ids.size());
  const auto num_tokens = std::ssize(ids) + model.echo->max_tokens;
  if (model.max_model_len.has_value() && num_tokens > *model.max_model_len) {
    return absl::InvalidArgumentError(
        fmt::format("{} tokens; the server takes at most {} (its max_model_len is {})", ids.size(),
                    *model.max_model_len - model.echo->max_tokens, *model.max_model_len));
  }
  return AskForLogprobs(client, model, ids, *model.echo);
}

absl::StatusOr<std::string> GreedyAnswer(HttpClient& client, const ServedModel& model,
                                         const std::string& prompt, bool raw, int max_tokens) {
  json body = {{"model", model.name}, {"temperature", 0}, {"max_tokens", max_tokens}};
  if (raw) {
    body["prompt"] = prompt;
  } else {
    body["messages"] = {{{"role", "user"}, {"content", prompt}}};
  }
  ASSIGN_OR_RETURN(const json answer,
                   client.Post(raw ? "/v1/completions" : "/v1/chat/completions", body));
  const json choice = FirstChoice(answer);
  json text;
  if (choice.is_object()) {
    const json message = choice.value("message", json());
    text = raw                   ? choice.value("text", json())
           : message.is_object() ? message.value("content", json())
                                 : json();
  }
  if (!text.is_string()) {
    return absl::InternalError(
        fmt::format("the answer has no choices[0].{}", raw ? "text" : "message.content"));
  }
  return text.get<std::string>();
}

}  // namespace wintserve::eval
