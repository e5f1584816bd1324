#include "tests/fuzz/input_dir.h"

#include <fcntl.h>
#include <unistd.h>

#include "common/check.h"
#include "common/unique_fd.h"

namespace wintserve {

std::filesystem::path InputDir::Write(const std::string& name, std::string_view bytes) const {
  return WriteWithZeros(name, bytes, 0);
}

std::filesystem::path InputDir::WriteWithZeros(const std::string& name, std::string_view bytes,
                                               size_t num_zeros) const {
  const std::filesystem::path file = path() / name;
  std::filesystem::create_directories(file.parent_path());
  const UniqueFd fd(::open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  CHECK(fd.valid(), "{}", file.string());
  CHECK(::write(fd.get(), bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  CHECK(::ftruncate(fd.get(), static_cast<off_t>(bytes.size() + num_zeros)) == 0);
  return file;
}

void InputDir::Clear() const {
  for (const auto& entry : std::filesystem::directory_iterator(path())) {
    std::filesystem::remove_all(entry.path());
  }
}

}  // namespace wintserve
