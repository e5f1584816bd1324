#include "launcher/sibling_program.h"

#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>

namespace wintserve {

std::string BecomeSibling(const std::string& program, std::vector<std::string> argv) {
  std::error_code error;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", error);
  if (error) return "cannot read /proc/self/exe: " + error.message();
  const std::string path = (self.parent_path() / program).string();
  std::vector<char*> pointers;
  for (std::string& argument : argv) pointers.push_back(argument.data());
  pointers.push_back(nullptr);
  // Both outlive an exec.
  for (const int number : {SIGPIPE, SIGXFSZ}) ::signal(number, SIG_DFL);
  sigset_t none;
  ::sigemptyset(&none);
  ::pthread_sigmask(SIG_SETMASK, &none, nullptr);
  ::execv(path.c_str(), pointers.data());
  return fmt::format("cannot start {}: {}", path, std::strerror(errno));
}

}  // namespace wintserve
