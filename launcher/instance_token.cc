#include "launcher/instance_token.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>
#include <string_view>

#include "common/check.h"
#include "common/unique_fd.h"

namespace wintserve {
namespace {

constexpr size_t kNumDigits = 2 * kTokenBytes;

std::string RandomToken() {
  std::string token(kTokenBytes, '\0');
  CHECK(::getrandom(token.data(), token.size(), 0) == static_cast<ssize_t>(token.size()));
  return token;
}

std::optional<std::string> FromDigits(std::string_view digits) {
  if (digits.ends_with('\n')) digits.remove_suffix(1);
  if (digits.size() != kNumDigits) return std::nullopt;
  std::string token;
  for (size_t i = 0; i < digits.size(); i += 2) {
    unsigned byte = 0;
    const char* const end = digits.data() + i + 2;
    const auto [parsed_to, error] = std::from_chars(digits.data() + i, end, byte, 16);
    if (error != std::errc() || parsed_to != end) return std::nullopt;
    token += static_cast<char>(byte);
  }
  return token;
}

}  // namespace

absl::StatusOr<std::string> MakeInstanceToken(const ServeOptions& options, std::string* warning) {
  const std::string& path = options.queue_token_file;
  if (path.empty()) return RandomToken();
  const auto fail = [&path](std::string_view reason) {
    return absl::InvalidArgumentError(fmt::format("--queue-token-file: {}: {}", path, reason));
  };
  // Opening a pipe would wait for somebody to write.
  const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info = {};
  if (!fd.valid() || ::fstat(fd.get(), &info) != 0) return fail(std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return fail("is not a regular file");
  char digits[kNumDigits + 2];  // a longer file shows by the last of them
  const ssize_t size = ::read(fd.get(), digits, sizeof(digits));
  if (size < 0) return fail(std::strerror(errno));
  std::optional<std::string> token = FromDigits({digits, static_cast<size_t>(size)});
  if (!token.has_value()) {
    return fail(fmt::format("must hold {} hexadecimal digits (openssl rand -hex {} makes them)",
                            kNumDigits, kTokenBytes));
  }
  if ((info.st_mode & S_IROTH) != 0) {
    *warning = fmt::format(
        "--queue-token-file: {}: every user of this machine can read it (mode {:04o}); chmod 0600 "
        "it",
        path, info.st_mode & 07777);
  }
  return *std::move(token);
}

}  // namespace wintserve
