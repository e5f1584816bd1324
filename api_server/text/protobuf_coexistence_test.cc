// libsentencepiece exports a protobuf of its own. These tests fail, or crash, if a process mixes it
// up with ours.
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include "api_server/text/golden_test_util.h"
#include "proto/work_queue.grpc.pb.h"

namespace wintserve {
namespace {

TEST(ProtobufCoexistence, MessagesSurviveARoundTripWhileTheTokenizerIsLoaded) {
  EXPECT_EQ(PoetTokenizer().Encode("你好").size(), 1u);
  proto::WorkerMessage message;
  message.mutable_hello()->set_backend("cpu");
  message.mutable_hello()->set_world_size(4);
  message.mutable_hello()->mutable_model()->set_vocab_size(PoetTokenizer().vocab_size());
  proto::WorkerMessage parsed;
  ASSERT_TRUE(parsed.ParseFromString(message.SerializeAsString()));
  EXPECT_EQ(parsed.hello().backend(), "cpu");
  EXPECT_EQ(parsed.hello().world_size(), 4u);
  EXPECT_EQ(parsed.hello().model().vocab_size(), 8192u);
  EXPECT_NE(parsed.ShortDebugString().find("world_size: 4"), std::string::npos);
  EXPECT_EQ(PoetTokenizer().Encode("你好").size(), 1u);
}

TEST(ProtobufCoexistence, AMalformedMessageIsRefusedAndTheTokenizerStillWorks) {
  proto::WorkerMessage parsed;
  EXPECT_FALSE(parsed.ParseFromString("\xFF\xFF\xFF"));
  EXPECT_EQ(PoetTokenizer().Decode(PoetTokenizer().Encode("床前明月光")), "床前明月光");
}

TEST(ProtobufCoexistence, AnRpcWithoutAServerFailsCleanly) {
  const auto stub = proto::WorkQueue::NewStub(
      grpc::CreateChannel("unix:/nonexistent.sock", grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto stream = stub->Attach(&context);
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

}  // namespace
}  // namespace wintserve
