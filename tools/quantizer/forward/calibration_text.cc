#include "tools/quantizer/forward/calibration_text.h"

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/check.h"
#include "common/status_macros.h"
#include "fmt/format.h"
#include "tools/text/encode_text.h"
#include "tools/text/line_reader.h"
#include "tools/text/records.h"

namespace wintserve::quantizer {
namespace {

using nlohmann::json;

// Of plain text, encoded together.
constexpr size_t kStretchBytes = 64 << 10;  // at least
constexpr size_t kMaxLineBytes = 1 << 20;   // a longer line is cut between characters

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

absl::StatusOr<TokenSequence> EncodeRecord(const json& record, const Tokenizer& tokenizer) {
  const bool has_text = record.contains("text");
  const bool has_messages = record.contains("messages");
  if (has_text == has_messages) {
    return absl::InvalidArgumentError(
        fmt::format("found {} the keys text and messages, expected one of them",
                    has_text ? "both" : "neither of"));
  }
  TokenSequence sequence;
  if (has_text) {
    ASSIGN_OR_RETURN(const std::string text, tools::TextField(record, "text"));
    if (!text.empty()) sequence = tools::EncodeDocument(text, tokenizer);
    return sequence;
  }
  ASSIGN_OR_RETURN(const std::vector<ChatMessage> messages, tools::MessagesField(record));
  ASSIGN_OR_RETURN(const std::vector<tools::ChatPart> parts,
                   tools::EncodeChat(messages, tokenizer));
  for (const tools::ChatPart& part : parts) {
    sequence.insert(sequence.end(), part.ids.begin(), part.ids.end());
  }
  return sequence;
}

absl::Status ReadRecords(const std::filesystem::path& path, const Tokenizer& tokenizer,
                         Collector* collector) {
  return tools::ForEachRecord(
      path, [&](const std::string&, const json& record) -> absl::StatusOr<bool> {
        ASSIGN_OR_RETURN(TokenSequence sequence, EncodeRecord(record, tokenizer));
        collector->Add(std::move(sequence));
        return !collector->is_full();
      });
}

// Removes and returns the last character, or bytes that may be its beginning.
std::string TakeLastCharacter(std::string* text) {
  const auto continues = [&](size_t i) {
    return (static_cast<unsigned char>((*text)[i]) >> 6) == 2;
  };
  size_t begin = text->size() - 1;
  while (begin > 0 && text->size() - begin < 4 && continues(begin)) --begin;
  std::string character = text->substr(begin);
  text->resize(begin);
  return character;
}

// Encoded some lines at a time, so that a long file is read only as far as it is needed.
absl::Status ReadPlainText(const std::filesystem::path& path, const Tokenizer& tokenizer,
                           const CalibrationLimits& limits, Collector* collector) {
  ASSIGN_OR_RETURN(tools::LineReader reader, tools::LineReader::Open(path));
  TokenSequence sequence;
  std::string rest;
  std::string piece;
  bool has_more = true;
  while (has_more && !collector->is_full()) {
    std::string stretch = std::exchange(rest, {});
    while (stretch.size() < kStretchBytes) {
      ASSIGN_OR_RETURN(has_more, reader.Next(kMaxLineBytes, &piece));
      if (!has_more) break;
      stretch += piece;
    }
    if (has_more && stretch.back() != '\n') rest = TakeLastCharacter(&stretch);
    for (const int32_t id : tokenizer.Encode(stretch)) {
      sequence.push_back(id);
      if (std::ssize(sequence) < limits.max_sequence_tokens) continue;
      if (collector->is_full()) return absl::OkStatus();
      collector->Add(std::exchange(sequence, {}));
    }
  }
  if (!collector->is_full()) collector->Add(std::move(sequence));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CalibrationText> LoadCalibrationText(const std::filesystem::path& path,
                                                    const Tokenizer& tokenizer,
                                                    const CalibrationLimits& limits) {
  CHECK(limits.max_sequence_tokens >= 1 && limits.max_records >= 0 && limits.max_tokens >= 0,
        "max_sequence_tokens={} max_records={} max_tokens={}", limits.max_sequence_tokens,
        limits.max_records, limits.max_tokens);
  Collector collector(limits);
  if (path.extension() == ".jsonl") {
    RETURN_IF_ERROR(ReadRecords(path, tokenizer, &collector));
  } else {
    RETURN_IF_ERROR(ReadPlainText(path, tokenizer, limits, &collector));
  }
  CalibrationText text = collector.Take();
  if (text.sequences.empty()) {
    return absl::InvalidArgumentError(
        fmt::format("{}: found no text, expected some to calibrate on", path.string()));
  }
  return text;
}

}  // namespace wintserve::quantizer
