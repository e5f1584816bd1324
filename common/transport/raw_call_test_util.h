// Calls of a peer that speaks gRPC and nothing of the protocol above it, for tests of what a
// hostile one can do.
#pragma once

#include <grpcpp/grpcpp.h>
#include <grpcpp/support/sync_stream.h>

#include <chrono>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "common/transport/queue_transport.h"

namespace wintserve {

struct RawCall {
  std::string method = {};                 // "/package.Service/Method"
  std::string token_value = {};            // in the metadata; empty: none
  std::vector<std::string> messages = {};  // what is sent
  bool half_close = true;                  // says that no more comes
  std::chrono::seconds deadline{20};
};

struct RawReply {
  grpc::Status status;
  size_t num_messages = 0;
  size_t num_metadata = 0;  // at the beginning and at the end together
};

inline RawReply Call(const std::shared_ptr<grpc::Channel>& channel, const RawCall& call) {
  using grpc::ByteBuffer;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + call.deadline);
  if (!call.token_value.empty()) context.AddMetadata(kTokenMetadataKey, call.token_value);
  const std::unique_ptr<grpc::ClientReaderWriter<ByteBuffer, ByteBuffer>> stream(
      grpc::internal::ClientReaderWriterFactory<ByteBuffer, ByteBuffer>::Create(
          channel.get(),
          grpc::internal::RpcMethod(call.method.c_str(), grpc::internal::RpcMethod::BIDI_STREAMING,
                                    channel),
          &context));
  for (const std::string& message : call.messages) {
    const grpc::Slice slice(message);
    if (!stream->Write(ByteBuffer(&slice, 1))) break;
  }
  if (call.half_close) stream->WritesDone();
  RawReply reply;
  for (ByteBuffer buffer; stream->Read(&buffer);) ++reply.num_messages;
  reply.status = stream->Finish();
  reply.num_metadata =
      context.GetServerInitialMetadata().size() + context.GetServerTrailingMetadata().size();
  return reply;
}

// Of its own connection.
inline RawReply Call(const std::string& target, const RawCall& call, const TlsIdentity& tls = {}) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return Call(grpc::CreateCustomChannel(target, QueueChannelCredentials(target, tls), arguments),
              call);
}

// Messages that no peer of good will sends: random bytes, `good` with a few bytes changed, `good`
// cut off, groups in groups 100,000 deep, fields that claim more than there is. Of the seed alone.
inline std::vector<std::string> HostileMessages(const std::string& good, unsigned seed, int count) {
  std::mt19937 random(seed);
  std::vector<std::string> messages;
  for (int i = 0; i < count; ++i) {
    std::string bytes(random() % 300, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    messages.push_back(bytes);
    std::string changed = good;
    for (unsigned n = 0; !changed.empty() && n <= random() % 4; ++n) {
      changed[random() % changed.size()] = static_cast<char>(random());
    }
    messages.push_back(changed);
    messages.push_back(good.substr(0, random() % (good.size() + 1)));
  }
  std::string groups;
  for (int i = 0; i < 100'000; ++i) groups += "\xa3\x06";  // field 100 begins a group
  messages.push_back(groups);
  messages.push_back("\x0a\xff\xff\xff\xff\x07");  // field 1 of 2^31 - 1 bytes
  messages.push_back(std::string(11, '\xff'));     // a number that does not end
  return messages;
}

}  // namespace wintserve
