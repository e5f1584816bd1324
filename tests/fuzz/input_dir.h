// Files for code that reads paths.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace wintserve {

// A directory of its own in the system's directory for temporary files; gone at the end of the
// process, unless that crashes.
class InputDir {
 public:
  InputDir();
  ~InputDir();
  InputDir(const InputDir&) = delete;
  InputDir& operator=(const InputDir&) = delete;

  const std::filesystem::path& path() const { return path_; }
  // Returns the file's path.
  std::filesystem::path Write(const std::string& name, std::string_view bytes) const;
  // `bytes`, then num_zeros zeros that cost no memory.
  std::filesystem::path WriteWithZeros(const std::string& name, std::string_view bytes,
                                       size_t num_zeros) const;
  // Removes all files.
  void Clear() const;

 private:
  std::filesystem::path path_;
};

}  // namespace wintserve
