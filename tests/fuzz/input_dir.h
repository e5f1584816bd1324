// Files for code that reads paths.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "common/temp_dir_test_util.h"

namespace wintserve {

// A directory of its own in the system's directory for temporary files; gone at the end of the
// process, unless that crashes.
class InputDir {
 public:
  const std::filesystem::path& path() const { return dir_.path(); }
  // Returns the file's path.
  std::filesystem::path Write(const std::string& name, std::string_view bytes) const;
  // `bytes`, then num_zeros zeros that cost no memory.
  std::filesystem::path WriteWithZeros(const std::string& name, std::string_view bytes,
                                       size_t num_zeros) const;
  // Removes all files.
  void Clear() const;

 private:
  const TempDir dir_;
};

}  // namespace wintserve
