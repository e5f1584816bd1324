#include "api_server/openai/unsupported_fields.h"

#include <fmt/core.h>

#include "api_server/openai/api_error.h"
#include "api_server/openai/json_fields.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

using nlohmann::json;

struct UnsupportedField {
  const char* name;
  // True: the value asks for nothing, so it is accepted.
  bool (*is_neutral)(const json& value);
};

bool IsFalse(const json& value) { return value.is_boolean() && !value.get<bool>(); }
bool IsEmpty(const json& value) {
  return (value.is_array() || value.is_object()) ? value.empty() : value == "";
}
bool IsNone(const json& value) { return value == "none"; }
bool IsTextFormat(const json& value) {
  return value.is_object() && value.contains("type") && value["type"] == "text";
}
bool IsTextModality(const json& value) { return value == json::array({"text"}) || IsEmpty(value); }
bool IsNever(const json&) { return false; }

constexpr UnsupportedField kBothEndpoints[] = {
    {"use_beam_search", IsFalse},
    {"temp_scaled_logprobs", IsFalse},
    {"top_p_normalized_logprobs", IsFalse},
    {"include_draft_logprobs", IsFalse},
    {"logits_processors_args", IsEmpty},
    {"allowed_token_ids", IsEmpty},
    {"response_format", IsTextFormat},
    {"guided_json", IsNever},
    {"guided_regex", IsNever},
    {"guided_choice", IsNever},
    {"guided_grammar", IsNever},
    {"structural_tag", IsNever},
    {"structured_outputs", IsNever},
    {"return_token_ids", IsFalse},
    {"prompt_token_ids", IsEmpty},
};

constexpr UnsupportedField kChatOnly[] = {
    {"modalities", IsTextModality},    {"audio", IsNever},
    {"chat_template", IsEmpty},        {"disable_chat_template", IsFalse},
    {"completion_token_ids", IsEmpty}, {"echo", IsFalse},
};

constexpr UnsupportedField kCompletionsOnly[] = {
    {"suffix", IsEmpty},
};

absl::Status Unsupported(std::string_view name, const json& value) {
  return InvalidField(name,
                      fmt::format("{} is not supported by this server version", Quoted(value)),
                      "unsupported_parameter");
}

template <size_t kNumFields>
absl::Status RefuseAny(const UnsupportedField (&fields)[kNumFields], const json& body) {
  for (const UnsupportedField& field : fields) {
    const json* value = FindField(body, field.name);
    if (value != nullptr && !field.is_neutral(*value)) return Unsupported(field.name, *value);
  }
  return absl::OkStatus();
}

// Tools that must not be called change nothing; "auto" without tools neither.
absl::Status RefuseTools(const json& body, const char* tools_name, const char* choice_name) {
  const json* tools = FindField(body, tools_name);
  const json* choice = FindField(body, choice_name);
  if (choice != nullptr && IsNone(*choice)) return absl::OkStatus();
  if (tools != nullptr && !IsEmpty(*tools)) return Unsupported(tools_name, *tools);
  if (choice != nullptr && *choice != "auto") return Unsupported(choice_name, *choice);
  return absl::OkStatus();
}

absl::Status RefuseBestOfMoreThanN(const json& body) {
  const json* best_of = FindField(body, "best_of");
  if (best_of == nullptr) return absl::OkStatus();
  const json* n = FindField(body, "n");
  const json one = 1;
  if (AsInteger(*best_of) == AsInteger(n == nullptr ? one : *n)) return absl::OkStatus();
  return Unsupported("best_of", *best_of);
}

}  // namespace

absl::Status RefuseUnsupportedFields(const json& body, Endpoint endpoint) {
  RETURN_IF_ERROR(RefuseAny(kBothEndpoints, body));
  RETURN_IF_ERROR(RefuseBestOfMoreThanN(body));
  if (endpoint == Endpoint::kCompletions) return RefuseAny(kCompletionsOnly, body);
  RETURN_IF_ERROR(RefuseAny(kChatOnly, body));
  RETURN_IF_ERROR(RefuseTools(body, "tools", "tool_choice"));
  return RefuseTools(body, "functions", "function_call");
}

}  // namespace wintserve
