// The files of the tasks: one JSON object a line.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "api_server/text/chat_template.h"

namespace wintserve::eval {

struct ChatItem {
  std::string place;  // "chats.jsonl:12", for errors
  std::vector<ChatMessage> messages;
};

struct ChoiceItem {
  std::string place;
  std::string prompt;
  std::vector<std::string> choices;  // at least two, none empty, none like another
  size_t answer = 0;                 // index of the right one
};

struct ExactItem {
  std::string place;
  std::string prompt;
  std::vector<std::string> answers;  // any of them is right; without white space around them
};

// Each reads at most `limit` objects (0: all) and fails with INVALID_ARGUMENT "FILE:LINE: FIELD: …"
// at the first that is wrong, with NOT_FOUND or another code of the system for a file that cannot
// be read, with INVALID_ARGUMENT for a file without objects. Empty lines are skipped.
absl::StatusOr<std::vector<ChatItem>> ReadChats(const std::string& path, int64_t limit);
absl::StatusOr<std::vector<ChoiceItem>> ReadChoices(const std::string& path, int64_t limit);
absl::StatusOr<std::vector<ExactItem>> ReadExactItems(const std::string& path, int64_t limit);

// Calls `take` with each document until it returns false: the field "text" of each line of a file
// whose name ends in ".jsonl", the whole of another file, in UTF-8 and of kMaxRecordBytes at most.
absl::Status ReadDocuments(const std::string& path,
                           const std::function<bool(const std::string& text)>& take);

}  // namespace wintserve::eval
