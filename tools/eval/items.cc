#include "tools/eval/items.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "common/status_macros.h"
#include "tools/text/plain_text.h"
#include "tools/text/records.h"

namespace wintserve::eval {
namespace {

using nlohmann::json;

// "prompt", or "question" as many published sets call it.
absl::StatusOr<std::string> PromptOf(const json& object) {
  const bool is_question = !object.contains("prompt") && object.contains("question");
  ASSIGN_OR_RETURN(std::string prompt,
                   tools::TextField(object, is_question ? "question" : "prompt"));
  if (prompt.empty()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: must not be empty", is_question ? "question" : "prompt"));
  }
  return prompt;
}

std::string Stripped(const std::string& text) {
  return std::string(absl::StripAsciiWhitespace(text));
}

template <typename Item>
absl::StatusOr<std::vector<Item>> ReadItems(const std::string& path, int64_t limit,
                                            absl::StatusOr<Item> (*parse)(const json&)) {
  std::vector<Item> items;
  RETURN_IF_ERROR(tools::ForEachRecord(
      path, [&](const std::string& place, const json& object) -> absl::StatusOr<bool> {
        ASSIGN_OR_RETURN(Item item, parse(object));
        item.place = place;
        items.push_back(std::move(item));
        return limit == 0 || static_cast<int64_t>(items.size()) < limit;
      }));
  if (items.empty()) return absl::InvalidArgumentError(fmt::format("{}: holds no item", path));
  return items;
}

absl::StatusOr<ChatItem> ParseChat(const json& object) {
  ChatItem item;
  ASSIGN_OR_RETURN(item.messages, tools::MessagesField(object));
  return item;
}

// An index, a choice's own text, or its letter, in this order.
absl::StatusOr<size_t> AnswerOf(const json& answer, const std::vector<std::string>& choices) {
  if (answer.is_number_integer()) {
    const auto index = answer.get<int64_t>();
    if (index >= 0 && index < static_cast<int64_t>(choices.size())) {
      return static_cast<size_t>(index);
    }
  } else if (answer.is_string()) {
    const auto text = answer.get<std::string>();
    const auto found = std::find(choices.begin(), choices.end(), text);
    if (found != choices.end()) return static_cast<size_t>(found - choices.begin());
    if (text.size() == 1) {
      const auto letter = static_cast<size_t>(absl::ascii_toupper(text[0]) - 'A');
      if (letter < choices.size()) return letter;
    }
  }
  return tools::WrongField(
      "answer",
      fmt::format("an index from 0 to {}, a letter from A to {:c}, or one of the choices",
                  choices.size() - 1, 'A' + static_cast<int>(choices.size()) - 1),
      answer);
}

absl::StatusOr<ChoiceItem> ParseChoice(const json& object) {
  ChoiceItem item;
  ASSIGN_OR_RETURN(item.prompt, PromptOf(object));
  ASSIGN_OR_RETURN(const json* choices, tools::Field(object, "choices"));
  if (!choices->is_array() || choices->size() < 2 || choices->size() > 26) {
    return tools::WrongField("choices", "a list of 2 to 26 texts", *choices);
  }
  for (size_t i = 0; i < choices->size(); ++i) {
    const std::string name = fmt::format("choices[{}]", i);
    ASSIGN_OR_RETURN(std::string choice, tools::Text((*choices)[i], name));
    if (choice.empty()) return absl::InvalidArgumentError(name + ": must not be empty");
    const auto same = std::find(item.choices.begin(), item.choices.end(), choice);
    if (same != item.choices.end()) {
      return absl::InvalidArgumentError(
          fmt::format("{}: must differ from choices[{}]", name, same - item.choices.begin()));
    }
    item.choices.push_back(std::move(choice));
  }
  ASSIGN_OR_RETURN(const json* answer, tools::Field(object, "answer"));
  ASSIGN_OR_RETURN(item.answer, AnswerOf(*answer, item.choices));
  return item;
}

absl::StatusOr<ExactItem> ParseExact(const json& object) {
  ExactItem item;
  ASSIGN_OR_RETURN(item.prompt, PromptOf(object));
  ASSIGN_OR_RETURN(const json* answer, tools::Field(object, "answer"));
  const json answers = answer->is_array() ? *answer : json::array({*answer});
  if (answers.empty()) return tools::WrongField("answer", "a text or a list of texts", *answer);
  for (const json& one : answers) {
    if (!one.is_string()) return tools::WrongField("answer", "a text or a list of texts", *answer);
    std::string text = Stripped(one.get<std::string>());
    if (text.empty()) return absl::InvalidArgumentError("answer: must not be empty");
    item.answers.push_back(std::move(text));
  }
  return item;
}

}  // namespace

absl::StatusOr<std::vector<ChatItem>> ReadChats(const std::string& path, int64_t limit) {
  return ReadItems<ChatItem>(path, limit, ParseChat);
}

absl::StatusOr<std::vector<ChoiceItem>> ReadChoices(const std::string& path, int64_t limit) {
  return ReadItems<ChoiceItem>(path, limit, ParseChoice);
}

absl::StatusOr<std::vector<ExactItem>> ReadExactItems(const std::string& path, int64_t limit) {
  return ReadItems<ExactItem>(path, limit, ParseExact);
}

absl::Status ReadDocuments(const std::string& path,
                           const std::function<bool(const std::string& text)>& take) {
  if (!absl::EndsWith(path, ".jsonl")) {
    ASSIGN_OR_RETURN(const std::string text, tools::ReadText(path, tools::kMaxRecordBytes));
    take(text);
    return absl::OkStatus();
  }
  return tools::ForEachRecord(
      path, [&](const std::string&, const json& object) -> absl::StatusOr<bool> {
        ASSIGN_OR_RETURN(const std::string text, tools::TextField(object, "text"));
        return take(text);
      });
}

}  // namespace wintserve::eval
