#include "launcher/sibling_program.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

#include "common/sibling_path.h"

namespace wintserve {

std::string BecomeSibling(const std::string& program, std::vector<std::string> argv) {
  const absl::StatusOr<std::filesystem::path> sibling = SiblingPath(program);
  if (!sibling.ok()) return std::string(sibling.status().message());
  const std::string path = sibling->string();
  std::vector<char*> pointers;
  for (std::string& argument : argv) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  // Both outlive an exec.
  for (const int number : {SIGPIPE, SIGTTOU, SIGXFSZ}) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::pthread_sigmask(SIG_SETMASK, &none, nullptr);
  ::execv(path.c_str(), pointers.data());
  return fmt::format("cannot start {}: {}", path, std::strerror(errno));
}

}  // namespace wintserve
