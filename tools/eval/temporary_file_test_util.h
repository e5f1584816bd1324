// For tests: a file that goes away.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "common/check.h"

namespace wintserve::eval {

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& content, const std::string& suffix = ".jsonl") {
    path_ = (std::filesystem::temp_directory_path() / "eval_test.XXXXXX").string() + suffix;
    const int fd = ::mkstemps(path_.data(), static_cast<int>(suffix.size()));
    CHECK(fd >= 0, "{}", path_);
    ::close(fd);
    std::ofstream(path_) << content;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { ::unlink(path_.c_str()); }

  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace wintserve::eval
