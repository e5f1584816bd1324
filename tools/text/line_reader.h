// A text file, line by line, in bounded memory.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve::tools {

// For one thread.
class LineReader {
 public:
  // Errors, which name the file, here and below: NOT_FOUND, PERMISSION_DENIED and whatever else
  // errno says.
  static absl::StatusOr<LineReader> Open(const std::filesystem::path& path);

  // Sets `piece` to the next line with its newline, which the last one may lack, or to the next
  // max_bytes of a longer one. False, and an empty piece: the file is at its end.
  absl::StatusOr<bool> Next(size_t max_bytes, std::string* piece);

  // Drops the rest of a line whose beginning Next gave, and returns how many bytes that were,
  // without the newline.
  absl::StatusOr<size_t> SkipLine();

 private:
  LineReader(std::filesystem::path path, UniqueFd file);

  // False at the end of the file; else some bytes are unread.
  absl::StatusOr<bool> Fill();
  // Of what is unread, up to a newline and max_bytes.
  std::string_view Take(size_t max_bytes);

  std::filesystem::path path_;
  UniqueFd file_;
  std::vector<char> buffer_;
  std::string_view unread_;  // in buffer_
};

}  // namespace wintserve::tools
