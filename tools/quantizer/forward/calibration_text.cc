#include "tools/quantizer/forward/calibration_text.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "api_server/text/chat_template.h"
#include "common/check.h"
#include "common/json_depth.h"
#include "common/status_macros.h"
#include "fmt/format.h"

namespace wintserve::quantizer {
namespace {

using nlohmann::json;

constexpr char kAssistant[] = "assistant";

absl::StatusOr<std::ifstream> Open(const std::filesystem::path& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file.good()) {
    return absl::ErrnoToStatus(errno == 0 ? EIO : errno, path.string());
  }
  // A directory opens like a file.
  if (file.peek() == std::ifstream::traits_type::eof() && errno != 0) {
    return absl::ErrnoToStatus(errno, path.string());
  }
  file.clear();
  return file;
}

// Fills CalibrationText up to its limits.
class Collector {
 public:
  explicit Collector(const CalibrationLimits& limits) : limits_(limits) {}

  bool is_full() const {
    return (limits_.max_records > 0 && text_.num_records >= limits_.max_records) ||
           (limits_.max_tokens > 0 && text_.num_tokens >= limits_.max_tokens);
  }
  void Add(TokenSequence record) {
    if (record.empty()) return;
    ++text_.num_records;
    if (std::ssize(record) > limits_.max_sequence_tokens) {
      record.resize(limits_.max_sequence_tokens);
      ++text_.num_cut_records;
    }
    if (limits_.max_tokens > 0) {
      const int64_t rest = limits_.max_tokens - text_.num_tokens;
      if (std::ssize(record) > rest) record.resize(rest);
    }
    text_.num_tokens += std::ssize(record);
    text_.sequences.push_back(std::move(record));
  }
  CalibrationText Take() { return std::move(text_); }

 private:
  const CalibrationLimits limits_;
  CalibrationText text_;
};

void Append(const std::vector<int32_t>& ids, TokenSequence* sequence) {
  sequence->insert(sequence->end(), ids.begin(), ids.end());
}

TokenSequence EncodeDocument(const std::string& text, const Tokenizer& tokenizer) {
  TokenSequence sequence;
  if (text.empty()) return sequence;
  const int32_t begin = tokenizer.IdOf(tokenizer.chat_tokens().cls_token);
  if (begin >= 0) sequence.push_back(begin);
  Append(tokenizer.Encode(text), &sequence);
  sequence.push_back(tokenizer.eos_id());
  return sequence;
}

// REQUIRES: every role is known to the template.
TokenSequence EncodeChat(const std::vector<ChatMessage>& messages, const Tokenizer& tokenizer) {
  const ChatTokens tokens = tokenizer.chat_tokens();
  const auto render = [&](size_t num_messages, bool add_generation_prompt) {
    const std::vector<ChatMessage> first(messages.begin(), messages.begin() + num_messages);
    absl::StatusOr<std::string> text = RenderErnieChat(first, add_generation_prompt, tokens);
    CHECK(text.ok(), "{}", text.status().ToString());
    return *std::move(text);
  };
  TokenSequence sequence;
  size_t num_rendered_bytes = 0;
  for (size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != kAssistant) continue;
    Append(tokenizer.Encode(std::string_view(render(i, true)).substr(num_rendered_bytes)),
           &sequence);
    Append(tokenizer.Encode(messages[i].content), &sequence);
    // What ends the turn in the template belongs to the next segment.
    num_rendered_bytes = render(i + 1, false).size() - tokens.sep_token.size();
  }
  if (messages.back().role == kAssistant) {
    sequence.push_back(tokenizer.eos_id());
  } else {
    Append(tokenizer.Encode(
               std::string_view(render(messages.size(), true)).substr(num_rendered_bytes)),
           &sequence);
  }
  return sequence;
}

absl::Status FieldError(std::string_view field, std::string_view problem) {
  return absl::InvalidArgumentError(fmt::format("{}: {}", field, problem));
}

absl::StatusOr<std::string> StringField(const json& object, const char* key,
                                        const std::string& field) {
  const auto found = object.find(key);
  if (found == object.end()) return FieldError(field, "missing, expected a string");
  if (!found->is_string()) {
    return FieldError(field, fmt::format("found {}, expected a string", found->type_name()));
  }
  return found->get<std::string>();
}

absl::StatusOr<std::vector<ChatMessage>> ParseMessages(const json& list, const ChatTokens& tokens) {
  if (!list.is_array() || list.empty()) {
    return FieldError("messages", fmt::format("found {}, expected a list of messages",
                                              list.is_array() ? "none" : list.type_name()));
  }
  std::vector<ChatMessage> messages;
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string field = fmt::format("messages[{}]", i);
    if (!list[i].is_object()) {
      return FieldError(field, fmt::format("found {}, expected an object", list[i].type_name()));
    }
    ChatMessage message;
    ASSIGN_OR_RETURN(message.role, StringField(list[i], "role", field + ".role"));
    ASSIGN_OR_RETURN(message.content, StringField(list[i], "content", field + ".content"));
    if (!RenderErnieChat({message}, false, tokens).ok()) {
      return FieldError(field + ".role", fmt::format("found \"{}\", expected system, user or "
                                                     "assistant",
                                                     message.role));
    }
    messages.push_back(std::move(message));
  }
  return messages;
}

absl::StatusOr<TokenSequence> EncodeRecord(std::string_view line, const Tokenizer& tokenizer) {
  if (IsNestedTooDeep(line)) {
    return absl::InvalidArgumentError(fmt::format("nested deeper than {} levels", kMaxJsonDepth));
  }
  const json record = json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!record.is_object()) {
    return absl::InvalidArgumentError("expected a JSON object in UTF-8");
  }
  const bool has_text = record.contains("text");
  const bool has_messages = record.contains("messages");
  if (has_text == has_messages) {
    return absl::InvalidArgumentError(
        fmt::format("found {} the keys text and messages, expected "
                    "one of them",
                    has_text ? "both" : "neither of"));
  }
  if (has_text) {
    ASSIGN_OR_RETURN(const std::string text, StringField(record, "text", "text"));
    return EncodeDocument(text, tokenizer);
  }
  ASSIGN_OR_RETURN(const std::vector<ChatMessage> messages,
                   ParseMessages(record["messages"], tokenizer.chat_tokens()));
  return EncodeChat(messages, tokenizer);
}

absl::Status ReadRecords(const std::filesystem::path& path, std::istream& file,
                         const Tokenizer& tokenizer, Collector* collector) {
  std::string line;
  for (int64_t number = 1; !collector->is_full() && std::getline(file, line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    absl::StatusOr<TokenSequence> record = EncodeRecord(line, tokenizer);
    if (!record.ok()) {
      return absl::InvalidArgumentError(
          fmt::format("{}:{}: {}", path.string(), number, std::string(record.status().message())));
    }
    collector->Add(*std::move(record));
  }
  return absl::OkStatus();
}

// Encoded some lines at a time, so that a long file is read only as far as it is needed.
void ReadPlainText(std::istream& file, const Tokenizer& tokenizer, const CalibrationLimits& limits,
                   Collector* collector) {
  constexpr size_t kStretchBytes = 64 << 10;
  TokenSequence piece;
  std::string stretch;
  std::string line;
  bool has_more = true;
  while (has_more && !collector->is_full()) {
    stretch.clear();
    while (stretch.size() < kStretchBytes && (has_more = !!std::getline(file, line))) {
      stretch += line;
      if (!file.eof()) stretch += '\n';
    }
    for (const int32_t id : tokenizer.Encode(stretch)) {
      piece.push_back(id);
      if (std::ssize(piece) < limits.max_sequence_tokens) continue;
      if (collector->is_full()) return;
      collector->Add(std::exchange(piece, {}));
    }
  }
  if (!collector->is_full()) collector->Add(std::move(piece));
}

}  // namespace

absl::StatusOr<CalibrationText> LoadCalibrationText(const std::filesystem::path& path,
                                                    const Tokenizer& tokenizer,
                                                    const CalibrationLimits& limits) {
  CHECK(limits.max_sequence_tokens >= 1 && limits.max_records >= 0 && limits.max_tokens >= 0,
        "max_sequence_tokens={} max_records={} max_tokens={}", limits.max_sequence_tokens,
        limits.max_records, limits.max_tokens);
  ASSIGN_OR_RETURN(std::ifstream file, Open(path));
  Collector collector(limits);
  if (path.extension() == ".jsonl") {
    RETURN_IF_ERROR(ReadRecords(path, file, tokenizer, &collector));
  } else {
    ReadPlainText(file, tokenizer, limits, &collector);
  }
  if (file.bad()) return absl::DataLossError(fmt::format("{}: cannot be read on", path.string()));
  CalibrationText text = collector.Take();
  if (text.sequences.empty()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: found no text, expected some to calibrate on", path.string()));
  }
  return text;
}

}  // namespace wintserve::quantizer
