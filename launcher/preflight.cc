#include "launcher/preflight.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "common/descriptor_shares.h"
#include "common/exit_code.h"
#include "common/transport/tls_files.h"

namespace wintserve {
namespace {

constexpr int kBacklog = 4096;  // the kernel lowers it to net.core.somaxconn

UniqueFd TcpSocket(int reuse_option) {
  UniqueFd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const int on = 1;
  if (reuse_option != 0) ::setsockopt(fd.get(), SOL_SOCKET, reuse_option, &on, sizeof(on));
  return fd;
}

// 0, or the errno of bind.
int Bind(const UniqueFd& fd, const std::string& host, int port) {
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  ::inet_pton(AF_INET, host.c_str(), &address.sin_addr);
  return ::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0
             ? 0
             : errno;
}

int BoundPort(const UniqueFd& fd) {
  sockaddr_in address = {};
  socklen_t length = sizeof(address);
  ::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length);
  return ntohs(address.sin_port);
}

// host_flag: where `host` comes from.
PreflightError PortError(const char* flag, const char* host_flag, const std::string& host, int port,
                         int error_number) {
  if (error_number == EADDRINUSE) {
    return {kExitUnavailable, fmt::format("{}: {} is already in use", flag, port)};
  }
  if (error_number == EADDRNOTAVAIL) {
    return {kExitUnavailable, fmt::format("{}: {} is no address of this machine", host_flag, host)};
  }
  return {kExitUnavailable, fmt::format("{}: cannot listen on {}:{}: {}", flag, host, port,
                                        std::strerror(error_number))};
}

PreflightError Listen(const char* flag, const std::string& host, int* port, UniqueFd* result) {
  // With SO_REUSEADDR connections that linger after a restart do not count; a listener does.
  UniqueFd fd = TcpSocket(SO_REUSEADDR);
  int error_number = Bind(fd, host, *port);
  if (error_number == 0 && ::listen(fd.get(), kBacklog) != 0) error_number = errno;
  if (error_number != 0) return PortError(flag, "--host", host, *port, error_number);
  *port = BoundPort(fd);
  *result = std::move(fd);
  return {};
}

PreflightError Hold(const char* flag, const std::string& host, int* port, UniqueFd* result) {
  // Bound alone, and open to a queue's SO_REUSEPORT only then: at no moment can two hold it.
  UniqueFd fd = TcpSocket(0);
  int error_number = Bind(fd, host, *port);
  if (error_number == EADDRINUSE && Bind(TcpSocket(SO_REUSEADDR), host, *port) == 0) {
    // Only lingering connections of an earlier instance are in the way, which had SO_REUSEPORT.
    fd = TcpSocket(SO_REUSEPORT);
    error_number = Bind(fd, host, *port);
  }
  const int on = 1;
  if (error_number == 0 && ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEPORT, &on, sizeof(on)) != 0) {
    error_number = errno;
  }
  if (error_number != 0) return PortError(flag, "--queue-host", host, *port, error_number);
  *port = BoundPort(fd);
  *result = std::move(fd);
  return {};
}

PreflightError CheckDirectory(const char* flag, const std::string& path, bool may_be_hub_name) {
  struct stat info = {};
  if (::stat(path.c_str(), &info) != 0) {
    if (errno != ENOENT && errno != ENOTDIR) {
      return {kExitCheckpoint, fmt::format("{}: {}: {}", flag, path, std::strerror(errno))};
    }
    return {kExitCheckpoint,
            fmt::format("{}: {}: no such directory{}", flag, path,
                        may_be_hub_name ? "; downloading from a hub is not in this version" : "")};
  }
  if (!S_ISDIR(info.st_mode)) {
    return {kExitCheckpoint, fmt::format("{}: {}: is not a directory", flag, path)};
  }
  return {};
}

}  // namespace

PreflightError CheckModelAndDevice(const ServeOptions& options) {
  PreflightError error =
      CheckDirectory("--model", options.model, /*may_be_hub_name=*/!options.model.starts_with('/'));
  if (!error.ok()) return error;
  const std::string config = options.model + "/config.json";
  if (UniqueFd fd(::open(config.c_str(), O_RDONLY | O_CLOEXEC)); !fd.valid()) {
    return {kExitCheckpoint, fmt::format("--model: {}: {}", config, std::strerror(errno))};
  }
  if (!options.tokenizer.empty()) {
    error = CheckDirectory("--tokenizer", options.tokenizer, /*may_be_hub_name=*/false);
    if (!error.ok()) return error;
  }
#ifndef WINTSERVE_HAS_CUDA
  // The API server computes nothing.
  if (options.device == "cuda" && options.role != "api") {
    return {kExitUnavailable, "--device: cuda is not in this build; use cpu"};
  }
#endif
  return {};
}

PreflightError CheckQueueTls(const ServeOptions& options, std::vector<std::string>* warnings) {
  const auto identity = LoadTlsIdentity(QueueTlsFiles(options), warnings);
  if (identity.ok()) return {};
  return {kExitUsage, std::string(identity.status().message())};
}

std::string RaiseDescriptorLimit(const ServeOptions& options) {
  rlimit limit = {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return "";
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  const int64_t most = OwnDescriptorShares().http;
  if (options.max_concurrency <= most) return "";
  return fmt::format(
      "--max-concurrency {}: of the {} open files that the system allows (ulimit -Hn), {} are for "
      "clients: more cannot stay connected",
      options.max_concurrency, limit.rlim_max, most);
}

PreflightError ReservePorts(bool with_http, ServeOptions* options, ReservedPorts* ports) {
  const bool has_api_server = options->role != "engine";
  const bool has_cache_manager = options->role != "api";
  PreflightError error;
  if (with_http && has_api_server) {
    error = Listen("--port", options->host, &options->port, &ports->http);
    if (!error.ok()) return error;
    if (options->metrics_port.has_value()) {
      error = Listen("--metrics-port", options->host, &*options->metrics_port, &ports->metrics);
      if (!error.ok()) return error;
    }
  }
  if (has_api_server) {
    error = Hold("--engine-worker-queue-port", options->queue_host,
                 &options->engine_worker_queue_port, &ports->engine_worker_queue);
    if (!error.ok()) return error;
  }
  if (!has_cache_manager) return {};
  return Hold("--cache-queue-port", options->queue_host, &options->cache_queue_port,
              &ports->cache_queue);
}

}  // namespace wintserve
