#include "tests/fuzz/checkpoint_files.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstring>

namespace wintserve {
namespace {

constexpr size_t kMaxZeros = 1 << 20;

bool IsAllowed(std::string_view name) {
  if (name == "config.json") return true;
  if (name.starts_with("rank0/") || name.starts_with("rank1/")) name.remove_prefix(6);
  return name.starts_with("model") && name.size() <= 64 &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.';
         });
}

// With the length in front that the format demands.
std::string Header(std::string_view json) {
  const uint64_t length = json.size();
  std::string header(sizeof(length), '\0');
  std::memcpy(header.data(), &length, sizeof(length));
  return header += json;
}

CheckpointFile ToFile(std::string_view title, std::string_view content) {
  CheckpointFile file;
  const size_t space = title.find(' ');
  file.name = title.substr(0, space);
  if (space == std::string_view::npos) {
    file.content = content;
    return file;
  }
  const std::string_view size = title.substr(space + 1);
  std::from_chars(size.data(), size.data() + size.size(), file.num_zeros);
  file.num_zeros = std::min(file.num_zeros, kMaxZeros);
  file.content = Header(content);
  return file;
}

}  // namespace

std::vector<CheckpointFile> SplitCheckpointFiles(std::string_view text) {
  std::vector<CheckpointFile> files;
  while (text.starts_with('@')) {
    text.remove_prefix(1);
    const size_t end = std::min(text.find("\n@"), text.size());
    const std::string_view part = text.substr(0, end);
    const size_t title_end = std::min(part.find('\n'), part.size());
    CheckpointFile file =
        ToFile(part.substr(0, title_end), part.substr(std::min(title_end + 1, part.size())));
    if (IsAllowed(file.name)) files.push_back(std::move(file));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return files;
}

}  // namespace wintserve
