#include "common/config/instance.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <charconv>
#include <nlohmann/json.hpp>
#include <string_view>

#include "common/config/serve_options_json.h"
#include "common/status_macros.h"

namespace wintserve {
namespace {

constexpr int kSeals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
constexpr off_t kMaxInstanceBytes = 16 << 20;  // a prompt on the command line is at most 2 MiB
constexpr std::string_view kFlag = "--instance-fd=";

std::string ToHex(std::string_view bytes) {
  std::string hex;
  for (const unsigned char byte : bytes) hex += fmt::format("{:02x}", byte);
  return hex;
}

std::string FromHex(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2) {
    unsigned byte = 0;
    const auto [end, error] = std::from_chars(hex.data() + i, hex.data() + i + 2, byte, 16);
    if (error != std::errc() || end != hex.data() + i + 2) return "";
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

absl::Status Corrupt(std::string_view reason) {
  return absl::InvalidArgumentError(fmt::format("not an instance file: {}", reason));
}

absl::StatusOr<Instance> FromJson(const nlohmann::json& json) {
  Instance instance;
  ASSIGN_OR_RETURN(instance.options, ServeOptionsFromJson(json.at("options")));
  instance.token = FromHex(json.at("token").get<std::string>());
  instance.runtime_dir = json.at("runtime_dir").get<std::string>();
  instance.rank = json.at("rank").get<int>();
  instance.worker_id = json.at("worker_id").get<uint64_t>();
  instance.restarted = json.at("restarted").get<bool>();
  instance.http_fd = json.at("http_fd").get<int>();
  instance.metrics_fd = json.at("metrics_fd").get<int>();
  instance.start_fd = json.at("start_fd").get<int>();
  instance.mode = json.at("mode").get<std::string>();
  instance.generate_json = json.at("generate_json").get<std::string>();
  return instance;
}

}  // namespace

absl::StatusOr<UniqueFd> WriteInstance(const Instance& instance) {
  std::string text;
  try {
    text = nlohmann::json{{"options", ServeOptionsToJson(instance.options)},
                          {"token", ToHex(instance.token)},
                          {"runtime_dir", instance.runtime_dir},
                          {"rank", instance.rank},
                          {"worker_id", instance.worker_id},
                          {"restarted", instance.restarted},
                          {"http_fd", instance.http_fd},
                          {"metrics_fd", instance.metrics_fd},
                          {"start_fd", instance.start_fd},
                          {"mode", instance.mode},
                          {"generate_json", instance.generate_json}}
               .dump();
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(fmt::format("a setting is not UTF-8: {}", error.what()));
  }
  UniqueFd fd(::memfd_create("wintserve-instance", MFD_ALLOW_SEALING));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "memfd_create");
  for (size_t written = 0; written < text.size();) {
    const ssize_t count = ::write(fd.get(), text.data() + written, text.size() - written);
    if (count < 0 && errno != EINTR) return absl::ErrnoToStatus(errno, "write to a memfd");
    if (count > 0) written += count;
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) {
    return absl::ErrnoToStatus(errno, "cannot seal a memfd");
  }
  return fd;
}

absl::StatusOr<Instance> ReadInstance(int fd) {
  const int seals = ::fcntl(fd, F_GET_SEALS);
  if (seals < 0) return Corrupt(fmt::format("descriptor {} is no memfd", fd));
  if ((seals & kSeals) != kSeals) return Corrupt("it is not sealed");
  struct stat info = {};
  if (::fstat(fd, &info) != 0) return absl::ErrnoToStatus(errno, "fstat");
  if (info.st_size > kMaxInstanceBytes) {
    return Corrupt(fmt::format("{} bytes, at most {}", info.st_size, kMaxInstanceBytes));
  }
  std::string text(info.st_size, '\0');
  for (size_t read = 0; read < text.size();) {
    const ssize_t count = ::pread(fd, text.data() + read, text.size() - read, read);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return absl::ErrnoToStatus(errno, "pread");
    read += count;
  }
  try {
    return FromJson(nlohmann::json::parse(text));
  } catch (const nlohmann::json::exception& error) {
    return Corrupt(error.what());
  }
}

absl::StatusOr<Instance> InstanceFromArgv(int argc, const char* const* argv) {
  const std::string_view argument = argc == 2 ? argv[1] : "";
  if (!argument.starts_with(kFlag)) {
    return absl::InvalidArgumentError(
        fmt::format("{} is started by `wintserve serve`, with --instance-fd=N as its only argument",
                    argc > 0 ? argv[0] : "this program"));
  }
  const std::string_view value = argument.substr(kFlag.size());
  int fd = -1;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), fd);
  if (error != std::errc() || end != value.data() + value.size() || fd < 3) {
    return absl::InvalidArgumentError(
        fmt::format("--instance-fd: must be the number of a descriptor above 2 (got {})", value));
  }
  absl::StatusOr<Instance> instance = ReadInstance(fd);
  if (instance.ok()) ::close(fd);
  return instance;
}

}  // namespace wintserve
