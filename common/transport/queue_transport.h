// What the two gRPC queues (work queue, cache queue) share: who may call, over which transport, and
// how much a stranger may cost. Includes gRPC: for .cc files only.
#pragma once

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <string_view>

#include "common/transport/tls_files.h"

namespace wintserve {

// Where a call carries the token, as hexadecimal digits, for metadata is text.
inline constexpr char kTokenMetadataKey[] = "wintserve-token";
std::string TokenMetadataValue(std::string_view token);

// Whether the call carries the token whose TokenMetadataValue is `expected`. Constant time.
bool HasToken(const grpc::ServerContextBase& context, std::string_view expected);

// What every caller without the token is told, whatever and whomever it called.
grpc::Status Unauthenticated();

// Answers the methods that no service of the server has: a stranger is told what it is told
// everywhere, so that it does not even learn which methods there are; others UNIMPLEMENTED.
class UnknownMethods : public grpc::CallbackGenericService {
 public:
  explicit UnknownMethods(std::string token_value) : token_value_(std::move(token_value)) {}
  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override;

 protected:
  const std::string& token_value() const { return token_value_; }

 private:
  const std::string token_value_;
};

// Ends a call at once.
class EndedCall : public grpc::ServerGenericBidiReactor {
 public:
  explicit EndedCall(const grpc::Status& status) { Finish(status); }
  void OnDone() override { delete this; }
};

// Of a TCP port. Without an identity: plain text, for loopback. With a CA clients must show a
// certificate of it.
std::shared_ptr<grpc::ServerCredentials> QueueServerCredentials(const TlsIdentity& tls);
// Of a client. `tls` is for "host:port" targets; a Unix socket never has TLS.
std::shared_ptr<grpc::ChannelCredentials> QueueChannelCredentials(const std::string& target,
                                                                  const TlsIdentity& tls);

// A peer that does not complete its handshake, or that has no call open, is dropped after a few
// seconds; one connection has a few calls at most. So a flood of connections passes.
void LimitStrangers(grpc::ServerBuilder* builder);

// gRPC's own log, for a main to call before it uses gRPC: debug lines of ours. Turns GRPC_TRACE
// off, whose lines show metadata and thereby the token.
void InitGrpcLog();

}  // namespace wintserve
