// Text files as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace wintserve::tools {

// Finds what is no text in bytes that come piece by piece. For one thread.
class Utf8Checker {
 public:
  // path: for errors. INVALID_ARGUMENT "FILE:LINE: …", here and below: bytes that are not UTF-8.
  explicit Utf8Checker(std::filesystem::path path) : path_(std::move(path)) {}
  absl::Status Add(std::string_view bytes);
  // After the last piece: the end may not cut a character.
  absl::Status Finish() const;

 private:
  absl::Status NoText(unsigned char byte, int64_t offset) const;

  std::filesystem::path path_;
  std::string undecided_;  // the beginning of a character
  int64_t num_bytes_ = 0;  // before that
  int64_t num_lines_ = 0;
};

// All of a text. Errors: as of LineReader and Utf8Checker; INVALID_ARGUMENT for more than
// max_bytes, of which no more are read.
absl::StatusOr<std::string> ReadText(const std::filesystem::path& path, size_t max_bytes);

}  // namespace wintserve::tools
