// Files that are written whole, and errors that say what a disk lacks.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace wintserve::quantizer {

// "PATH: WHAT: what errno says". RESOURCE_EXHAUSTED, with how much is free or allowed, where space
// is what is missing, else UNKNOWN.
absl::Status SystemError(int error, const std::filesystem::path& path, std::string_view what);

// "3.20 GiB", "17.5 MiB"
std::string SizeText(int64_t bytes);

// RESOURCE_EXHAUSTED: less than that is free for us where `directory` is.
absl::Status CheckSpace(const std::filesystem::path& directory, int64_t needed_bytes);

// fsync of a directory: the names in it are on the disk.
absl::Status SyncDirectory(const std::filesystem::path& path);

// All bytes, from `offset` on. `path` is for errors.
absl::Status WriteAll(int fd, std::span<const uint8_t> bytes, int64_t offset,
                      const std::filesystem::path& path);

// So many bytes, from `offset` on. Also an error: the file ends before.
absl::Status ReadAll(int fd, std::span<uint8_t> bytes, int64_t offset,
                     const std::filesystem::path& path);

// Makes or replaces a whole file, which is on the disk before it takes its name. Until then it is
// UnnamedPath(path), which an error may leave.
absl::Status WriteAtomically(const std::filesystem::path& path, std::string_view text);
std::filesystem::path UnnamedPath(const std::filesystem::path& path);

}  // namespace wintserve::quantizer
