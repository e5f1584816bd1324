// What a user names as a model: files and directories that may be anything else, be links to
// nothing or be closed to this process. Each of these is one error that names the path, and none
// makes a reader wait or take memory without end.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/unique_fd.h"

namespace wintserve {

struct ModelFile {
  UniqueFd fd;  // read-only, of a regular file
  int64_t size_bytes = 0;
};

// NOT_FOUND: no such file, or a link whose target is not there. DATA_LOSS: no regular file, or one
// that cannot be opened.
absl::StatusOr<ModelFile> OpenModelFile(const std::filesystem::path& path);

// All bytes of a file that is text. DATA_LOSS also: it cannot be read, or is beyond 256 MiB.
absl::StatusOr<std::string> ReadModelText(const std::filesystem::path& path);

// What lies in `dir`, by name. NOT_FOUND: there is no `dir`. DATA_LOSS: it is no directory, or
// cannot be listed.
absl::StatusOr<std::vector<std::filesystem::directory_entry>> ListModelDir(
    const std::filesystem::path& dir);

}  // namespace wintserve
