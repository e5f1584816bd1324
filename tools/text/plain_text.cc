#include "tools/text/plain_text.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "api_server/text/utf8.h"
#include "common/status_macros.h"
#include "tools/text/line_reader.h"

namespace wintserve::tools {

absl::Status Utf8Checker::NoText(unsigned char byte, int64_t offset) const {
  return absl::InvalidArgumentError(
      fmt::format("{}:{}: must be text in UTF-8, which byte {:#04x} at offset {} is not",
                  path_.string(), num_lines_ + 1, byte, offset));
}

absl::Status Utf8Checker::Add(std::string_view bytes) {
  undecided_ += bytes;
  const std::string before = undecided_;
  // What is no character comes back as another one.
  const std::string whole = TakeWholeCharacters(undecided_);
  const auto [wrong, replaced] =
      std::mismatch(before.begin(), before.end(), whole.begin(), whole.end());
  num_lines_ += std::count(before.begin(), wrong, '\n');
  if (replaced != whole.end()) {
    return NoText(static_cast<unsigned char>(*wrong), num_bytes_ + (wrong - before.begin()));
  }
  num_bytes_ += std::ssize(whole);
  return absl::OkStatus();
}

absl::Status Utf8Checker::Finish() const {
  if (undecided_.empty()) return absl::OkStatus();
  return NoText(static_cast<unsigned char>(undecided_.front()), num_bytes_);
}

absl::StatusOr<std::string> ReadText(const std::filesystem::path& path, size_t max_bytes) {
  ASSIGN_OR_RETURN(LineReader reader, LineReader::Open(path));
  Utf8Checker checker(path);
  std::string text;
  std::string piece;
  while (true) {
    ASSIGN_OR_RETURN(const bool has_more, reader.Next(max_bytes + 1 - text.size(), &piece));
    if (!has_more) break;
    RETURN_IF_ERROR(checker.Add(piece));
    text += piece;
    if (text.size() > max_bytes) {
      return absl::InvalidArgumentError(
          fmt::format("{}: is longer than the {} bytes that are allowed of one text", path.string(),
                      max_bytes));
    }
  }
  RETURN_IF_ERROR(checker.Finish());
  return text;
}

}  // namespace wintserve::tools
