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

// What vLLM says, whose JSON has no infinity, of a token whose probability is 0.
constexpr double kLogprobOfZero = -9999;

// The object at choices[0], or null.
json FirstChoice(const json& answer) {
  const auto choices = answer.find("choices");
  if (choices == answer.end() || !choices->is_array() || choices->empty()) return json();
  return choices->front();
}

json Member(const json& object, const char* name) {
  return object.is_object() ? object.value(name, json()) : json();
}

// The log-probability of each id, null where there is none, and perhaps those of generated tokens.
// Null: the answer does not have them.
json LogprobsOf(const json& answer, std::span<const int32_t> ids, PromptForm::Kind kind) {
  const json choice = FirstChoice(answer);
  if (kind == PromptForm::Kind::kEcho) {
    return Member(Member(choice, "logprobs"), "token_logprobs");
  }
  // A list with {"ID": {"logprob": …}} of each position.
  const json positions = Member(choice, "prompt_logprobs");
  if (!positions.is_array()) return json();
  json values = json::array();
  for (size_t i = 0; i < positions.size(); ++i) {
    const std::string id = i < ids.size() ? fmt::format("{}", ids[i]) : "";
    values.push_back(Member(Member(positions[i], id.c_str()), "logprob"));
  }
  return values;
}

absl::StatusOr<std::vector<double>> ReadLogprobs(const json& answer, std::span<const int32_t> ids,
                                                 const PromptForm& form) {
  const bool is_echo = form.kind == PromptForm::Kind::kEcho;
  const json values = LogprobsOf(answer, ids, form.kind);
  if (!values.is_array()) {
    return absl::InternalError(
        fmt::format("the answer has no choices[0].{}",
                    is_echo ? "logprobs.token_logprobs" : "prompt_logprobs"));
  }
  // What the server generated stands behind, but not the end that it found.
  const size_t most = ids.size() + static_cast<size_t>(is_echo ? form.max_tokens : 0);
  if (values.size() < ids.size() || values.size() > most) {
    return absl::InternalError(
        fmt::format("the answer has log-probabilities of {} tokens for a prompt of {}",
                    values.size(), ids.size()));
  }
  std::vector<double> result(ids.size(), 0);
  for (size_t i = 1; i < ids.size(); ++i) {
    if (!values[i].is_number() || !std::isfinite(values[i].get<double>())) {
      return absl::InternalError(
          fmt::format("the answer has {} as the log-probability of token {}", values[i].dump(), i));
    }
    result[i] = values[i].get<double>();
    if (result[i] > 0) {
      return absl::InternalError(
          fmt::format("the answer has {} as the log-probability of token {}, which is none",
                      values[i].dump(), i));
    }
    if (result[i] <= kLogprobOfZero) {
      return absl::InternalError(fmt::format(
          "the answer has {} as the log-probability of token {} (id {}), as of one that "
          "the model never gives; a mean over it would say nothing",
          values[i].dump(), i, ids[i]));
    }
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
                                                   const PromptForm& form) {
  json body = {{"model", model.name},
               {"prompt", std::vector<int32_t>(ids.begin(), ids.end())},
               {"max_tokens", form.max_tokens},
               {"temperature", 0}};
  if (form.kind == PromptForm::Kind::kEcho) {
    body["echo"] = true;
    body["logprobs"] = form.logprobs;
  } else {
    body["prompt_logprobs"] = form.logprobs;
  }
  ASSIGN_OR_RETURN(const json answer, client.Post("/v1/completions", body));
  RETURN_IF_ERROR(CheckPromptTokens(answer, ids.size()));
  return ReadLogprobs(answer, ids, form);
}

}  // namespace

absl::StatusOr<ServedModel> FindModel(HttpClient& client, const std::string& wanted) {
  ASSIGN_OR_RETURN(const json answer, client.Get("/v1/models"));
  std::vector<std::string> names;
  int num_whole = 0;
  std::optional<ServedModel> found;
  for (const json& entry : answer.value("data", json::array())) {
    if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_string()) continue;
    names.push_back(entry["id"].get<std::string>());
    // vLLM lists adapters among the models, with the name of the one that they change.
    const bool is_adapter = entry.value("parent", json()).is_string();
    num_whole += is_adapter ? 0 : 1;
    if (wanted.empty() ? is_adapter : names.back() != wanted) continue;
    ServedModel model;
    model.name = names.back();
    const json length = entry.value("max_model_len", json());
    if (length.is_number_integer()) model.max_model_len = length.get<int64_t>();
    found = std::move(model);
  }
  if (names.empty()) {
    return absl::NotFoundError(fmt::format("{}/v1/models lists no model", client.url()));
  }
  if (!wanted.empty() && !found.has_value()) {
    return absl::NotFoundError(fmt::format("--served-model-name: {} has no model '{}'; it has: {}",
                                           client.url(), wanted, absl::StrJoin(names, ", ")));
  }
  if (wanted.empty() && num_whole != 1) {
    return absl::NotFoundError(fmt::format("--served-model-name: is needed, {} has several: {}",
                                           client.url(), absl::StrJoin(names, ", ")));
  }
  return *std::move(found);
}

absl::Status FindPromptForm(HttpClient& client, ServedModel* model) {
  using Kind = PromptForm::Kind;
  constexpr PromptForm kForms[] = {
      {Kind::kEcho, 0, 0}, {Kind::kEcho, 1, 0}, {Kind::kEcho, 1, 1}, {Kind::kPromptLogprobs, 1, 1}};
  constexpr int32_t kProbe[] = {1, 2, 1};  // any model has these
  std::string failures;
  for (const PromptForm& form : kForms) {
    const auto logprobs = AskForLogprobs(client, *model, kProbe, form);
    if (logprobs.ok()) {
      model->form = form;
      return absl::OkStatus();
    }
    const absl::StatusCode code = logprobs.status().code();
    const bool is_refusal = code == absl::StatusCode::kInvalidArgument ||
                            code == absl::StatusCode::kNotFound ||
                            code == absl::StatusCode::kInternal;
    if (!is_refusal) return logprobs.status();
    // Of each way to ask what stands against its last, most modest form.
    const bool is_last = form.kind == Kind::kPromptLogprobs || form.logprobs == 1;
    if (!is_last) continue;
    failures +=
        fmt::format("{}{}", failures.empty() ? "" : "; ", std::string(logprobs.status().message()));
  }
  return absl::UnimplementedError(fmt::format(
      "{} does not give the log-probabilities of a prompt (/v1/completions with \"echo\" "
      "and \"logprobs\", or \"prompt_logprobs\"), which all tasks but --exact need: {}",
      client.url(), failures));
}

absl::StatusOr<std::vector<double>> PromptLogprobs(HttpClient& client, const ServedModel& model,
                                                   std::span<const int32_t> ids) {
  CHECK(model.form.has_value() && ids.size() >= 2, "ids={}", ids.size());
  const auto num_tokens = std::ssize(ids) + model.form->max_tokens;
  if (model.max_model_len.has_value() && num_tokens > *model.max_model_len) {
    return absl::InvalidArgumentError(
        fmt::format("{} tokens; the server takes at most {} (its max_model_len is {})", ids.size(),
                    *model.max_model_len - model.form->max_tokens, *model.max_model_len));
  }
  return AskForLogprobs(client, model, ids, *model.form);
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
  const json text = raw ? Member(choice, "text") : Member(Member(choice, "message"), "content");
  if (text.is_string()) return text.get<std::string>();
  const json reason = Member(choice, "finish_reason");
  if (reason == "length") {
    return absl::InternalError(fmt::format(
        "the model wrote {} tokens and had not begun its answer (choices[0].{} is {}); raise "
        "--max-tokens, or have the server not let it think",
        max_tokens, raw ? "text" : "message.content", text.dump()));
  }
  return absl::InternalError(
      fmt::format("the answer has no choices[0].{}{}", raw ? "text" : "message.content",
                  reason.is_string() ? " (finish_reason " + reason.dump() + ")" : std::string()));
}

}  // namespace wintserve::eval
