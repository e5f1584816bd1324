#include "common/config/queue_flags.h"

#include <fmt/format.h>

#include "common/config/flag_builders.h"

namespace wintserve {
namespace {

// Of an IPv4 address in digits: all of 127.0.0.0/8 never leaves the machine.
bool IsLoopback(const std::string& address) { return address.starts_with("127."); }

}  // namespace

void AddQueueFlags(const char* group, std::vector<Flag>* flags) {
  flags->push_back(ServeOnly(Address("queue-host", group, &ServeOptions::queue_host,
                                     "IPv4 address of the two queue ports")));
  flags->push_back(ServeOnly(Text("queue-tls-cert", group, &ServeOptions::queue_tls_cert,
                                  "PEM file: certificate chain of the queue ports, which then "
                                  "speak TLS")));
  flags->push_back(ServeOnly(Text("queue-tls-key", group, &ServeOptions::queue_tls_key,
                                  "PEM file: private key of --queue-tls-cert")));
  flags->push_back(ServeOnly(Text("queue-tls-ca", group, &ServeOptions::queue_tls_ca,
                                  "PEM file: whose certificates clients of the queue ports must "
                                  "show (mutual TLS)")));
  flags->push_back(ServeOnly(Text("queue-token-file", group, &ServeOptions::queue_token_file,
                                  "File with the instance's token, 64 hexadecimal digits; "
                                  "default: drawn at start")));
  flags->push_back(ServeOnly(Switch("insecure-bind", group, &ServeOptions::insecure_bind,
                                    "A --queue-host other than loopback may go without TLS")));
}

std::optional<QueueFlagError> CheckQueueFlags(const ServeOptions& options) {
  const bool has_certificate = !options.queue_tls_cert.empty();
  if (has_certificate && options.queue_tls_key.empty()) {
    return QueueFlagError{"queue-tls-cert", "needs --queue-tls-key, too"};
  }
  if (!has_certificate && !options.queue_tls_key.empty()) {
    return QueueFlagError{"queue-tls-key", "needs --queue-tls-cert, too"};
  }
  if (!has_certificate && !options.queue_tls_ca.empty()) {
    return QueueFlagError{"queue-tls-ca", "needs --queue-tls-cert and --queue-tls-key, too"};
  }
  if (!IsLoopback(options.queue_host) && !has_certificate && !options.insecure_bind) {
    return QueueFlagError{
        "queue-host",
        fmt::format("beyond loopback the queue ports need --queue-tls-cert and --queue-tls-key "
                    "(with --queue-tls-ca for mutual TLS), or --insecure-bind (got {})",
                    options.queue_host)};
  }
  return std::nullopt;
}

std::vector<std::string> QueueFlagWarnings(const ServeOptions& options) {
  if (!options.insecure_bind) return {};
  if (IsLoopback(options.queue_host) || !options.queue_tls_cert.empty()) {
    return {"--insecure-bind: the queue ports are safe without it; ignored"};
  }
  return {
      fmt::format("--insecure-bind: the queue ports on {} have no TLS: whoever can read that "
                  "network reads the token, prompts and answers, and can take the instance "
                  "over",
                  options.queue_host)};
}

}  // namespace wintserve
