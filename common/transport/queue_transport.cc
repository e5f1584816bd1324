#include "common/transport/queue_transport.h"

#include <fmt/format.h>
#include <grpc/support/log.h>

#include <cstdlib>

#include "absl/strings/escaping.h"
#include "common/log.h"
#include "common/token.h"

namespace wintserve {
namespace {

constexpr int kHandshakeTimeoutMs = 5'000;
constexpr int kIdleConnectionMs = 5'000;  // gRPC takes up to twice as long
constexpr int kMaxCallsOfAConnection = 32;

// What goes wrong is reported by us, in one line; gRPC's own account is for debugging.
void LogGrpcMessage(gpr_log_func_args* args) { LOG_DEBUG("grpc: {}", args->message); }

}  // namespace

std::string TokenMetadataValue(std::string_view token) {
  return absl::BytesToHexString({token.data(), token.size()});
}

bool HasToken(const grpc::ServerContextBase& context, std::string_view expected) {
  const auto& metadata = context.client_metadata();
  const auto presented = metadata.find(kTokenMetadataKey);
  return presented != metadata.end() &&
         TokensEqual(expected, {presented->second.data(), presented->second.size()});
}

grpc::Status Unauthenticated() {
  return {grpc::StatusCode::UNAUTHENTICATED, "the queue demands the instance token"};
}

grpc::ServerGenericBidiReactor* UnknownMethods::CreateReactor(
    grpc::GenericCallbackServerContext* context) {
  if (!HasToken(*context, token_value_)) return new EndedCall(Unauthenticated());
  return new EndedCall(
      {grpc::StatusCode::UNIMPLEMENTED, fmt::format("there is no method {}", context->method())});
}

std::shared_ptr<grpc::ServerCredentials> QueueServerCredentials(const TlsIdentity& tls) {
  if (!tls.enabled()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions options(
      tls.is_mutual() ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                      : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  options.pem_key_cert_pairs.push_back({tls.private_key, tls.certificate_chain});
  options.pem_root_certs = tls.ca_certificates;
  return grpc::SslServerCredentials(options);
}

std::shared_ptr<grpc::ChannelCredentials> QueueChannelCredentials(const std::string& target,
                                                                  const TlsIdentity& tls) {
  if (!tls.enabled() || target.starts_with("unix:")) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  // Without a CA of our own the peer's certificate has to be our own one.
  options.pem_root_certs = tls.is_mutual() ? tls.ca_certificates : tls.certificate_chain;
  if (tls.is_mutual()) {
    options.pem_private_key = tls.private_key;
    options.pem_cert_chain = tls.certificate_chain;
  }
  return grpc::SslCredentials(options);
}

void LimitStrangers(grpc::ServerBuilder* builder) {
  builder->AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kIdleConnectionMs);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxCallsOfAConnection);
}

void InitGrpcLog() {
  ::unsetenv("GRPC_TRACE");
  gpr_set_log_function(LogGrpcMessage);
}

}  // namespace wintserve
