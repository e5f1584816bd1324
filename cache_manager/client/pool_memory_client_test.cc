// Both ends of the memory socket: MemoryServer and FetchPoolMemory.
#include "cache_manager/client/pool_memory_client.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cache_manager/memory/host_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "common/captured_log_test_util.h"
#include "common/check.h"
#include "common/log_limit.h"
#include "common/mapped_memory.h"
#include "common/status_macros.h"
#include "common/unix_socket.h"
#include "proto/cache.pb.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr uint64_t kEpoch = 0xfeedface12345678;
constexpr uint32_t kNumBlocks = 4;
constexpr uint32_t kNumHostSlots = 3;
constexpr int64_t kTimeoutMs = 5000;
// A real token is random bytes, zeros among them.
const std::string kToken = std::string("\0\xff\x80 token of exactly 32 bytes..", 32);
constexpr char kUnauthenticated[] = "the memory socket demands the instance token";

int CountOpenFds() {
  int count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

// The server closes its end of an exchange a moment after we have read the reply.
int CountOpenFdsOnceSettled(int expected) {
  for (int i = 0; i < 500 && CountOpenFds() != expected; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return CountOpenFds();
}

class PoolMemorySocket : public testing::Test {
 protected:
  void SetUp() override {
    auto server = MemoryServer::Start(path_, kToken);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    auto memory = HostPoolMemory::Create({.num_blocks = kNumBlocks,
                                          .block_bytes_by_rank = {4096, 8192},
                                          .num_host_slots = kNumHostSlots},
                                         /*available_bytes=*/1 << 20);
    ASSERT_TRUE(memory.ok()) << memory.status();
    owner_bytes_[0] = static_cast<char*>((*memory)->rank(0).data());
    owner_bytes_[1] = static_cast<char*>((*memory)->rank(1).data());
    owner_host_bytes_ = static_cast<char*>((*memory)->host_rank(1).data());
    server_->Publish(kEpoch, *std::move(memory));
  }

  absl::StatusOr<MappedMemory> Fetch(int rank, PoolTier tier = PoolTier::kDevice) {
    ASSIGN_OR_RETURN(SharedMemory shared,
                     FetchPoolMemory(path_, kToken, kEpoch, rank, tier, kTimeoutMs));
    return MappedMemory::FromParts(std::move(shared));
  }

  // The text of the reply to a packet that FetchPoolMemory would not send.
  std::string ReplyTo(const std::string& bytes) {
    auto socket = ConnectUnix(path_, kTimeoutMs);
    if (!socket.ok()) return socket.status().ToString();
    if (const auto sent = SendPacket(socket->get(), bytes); !sent.ok()) return sent.ToString();
    return ReceiveText(socket->get());
  }

  static std::string ReceiveText(int socket_fd) {
    const auto packet = ReceivePacket(socket_fd, kTimeoutMs);
    proto::MemoryReply reply;
    if (!packet.ok()) return packet.status().ToString();
    EXPECT_FALSE(packet->fd.valid());
    EXPECT_TRUE(reply.ParseFromString(packet->bytes));
    EXPECT_EQ(reply.size_bytes(), 0u);
    return reply.text();
  }

  const std::string path_ = testing::TempDir() + "/memory_" + std::to_string(::getpid()) + ".sock";
  std::unique_ptr<MemoryServer> server_;
  char* owner_bytes_[2] = {};
  char* owner_host_bytes_ = nullptr;  // of rank 1
};

TEST_F(PoolMemorySocket, SharesEachRanksBytesWithTheOwner) {
  auto rank0 = Fetch(0);
  auto rank1 = Fetch(1);
  ASSERT_TRUE(rank0.ok()) << rank0.status();
  ASSERT_TRUE(rank1.ok()) << rank1.status();
  EXPECT_EQ(rank0->size_bytes(), int64_t{kNumBlocks} * 4096);
  EXPECT_EQ(rank1->size_bytes(), int64_t{kNumBlocks} * 8192);
  std::strcpy(static_cast<char*>(rank0->data()), "written by a worker");
  std::strcpy(owner_bytes_[1], "written by the owner");
  EXPECT_STREQ(owner_bytes_[0], "written by a worker");
  EXPECT_STREQ(static_cast<char*>(rank1->data()), "written by the owner");
}

TEST_F(PoolMemorySocket, SharesTheHostTierBesideThePool) {
  auto rank0 = Fetch(0, PoolTier::kHost);
  auto rank1 = Fetch(1, PoolTier::kHost);
  ASSERT_TRUE(rank0.ok()) << rank0.status();
  ASSERT_TRUE(rank1.ok()) << rank1.status();
  EXPECT_EQ(rank0->size_bytes(), int64_t{kNumHostSlots} * 4096);
  EXPECT_EQ(rank1->size_bytes(), int64_t{kNumHostSlots} * 8192);
  std::strcpy(static_cast<char*>(rank1->data()), "host slot 0");
  EXPECT_STREQ(owner_host_bytes_, "host slot 0");
  EXPECT_STREQ(owner_bytes_[1], "");
}

TEST_F(PoolMemorySocket, RefusesTheHostTierOfAPoolWithoutOne) {
  auto memory = HostPoolMemory::Create({.num_blocks = kNumBlocks, .block_bytes_by_rank = {4096}},
                                       /*available_bytes=*/1 << 20);
  ASSERT_TRUE(memory.ok()) << memory.status();
  server_->Publish(kEpoch, *std::move(memory));
  const auto status = Fetch(0, PoolTier::kHost).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the pool has no host tier"));
}

bool IsMapped(const void* data) {
  std::ifstream maps("/proc/self/maps");
  const std::string start = fmt::format("{:x}-", reinterpret_cast<uintptr_t>(data));
  for (std::string line; std::getline(maps, line);) {
    if (line.starts_with(start)) return true;
  }
  return false;
}

// Whoever withdraws it holds a lock, maybe, and unmapping gigabytes takes long.
TEST_F(PoolMemorySocket, WithdrawnMemoryIsUnmappedWhereTheCallerLetsGoOfIt) {
  std::shared_ptr<const void> withdrawn = server_->Withdraw();
  ASSERT_NE(withdrawn, nullptr);
  EXPECT_EQ(Fetch(0).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(IsMapped(owner_bytes_[0]));
  withdrawn.reset();
  EXPECT_FALSE(IsMapped(owner_bytes_[0]));
  EXPECT_EQ(server_->Withdraw(), nullptr);
}

// "dd" among the VmFlags that /proc/self/smaps gives for the mapping that starts at `data`.
bool IsLeftOutOfCoreDumps(const void* data) {
  std::ifstream smaps("/proc/self/smaps");
  const std::string start = fmt::format("{:x}-", reinterpret_cast<uintptr_t>(data));
  bool found = false;
  for (std::string line; std::getline(smaps, line);) {
    found = found || line.starts_with(start);
    if (found && line.starts_with("VmFlags:")) return line.find(" dd") != std::string::npos;
  }
  return false;
}

TEST_F(PoolMemorySocket, LeavesTheContentsOutOfCoreDumps) {
  EXPECT_TRUE(IsLeftOutOfCoreDumps(owner_bytes_[0]));
  EXPECT_TRUE(IsLeftOutOfCoreDumps(owner_host_bytes_));
  for (const PoolTier tier : {PoolTier::kDevice, PoolTier::kHost}) {
    const auto memory = Fetch(0, tier);
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_TRUE(IsLeftOutOfCoreDumps(memory->data()));
  }
}

TEST_F(PoolMemorySocket, LeavesAWorkersMappingAloneWhenThePoolIsWithdrawn) {
  auto memory = Fetch(0);
  ASSERT_TRUE(memory.ok()) << memory.status();
  server_->Withdraw();
  static_cast<char*>(memory->data())[memory->size_bytes() - 1] = 1;
  EXPECT_EQ(Fetch(0).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(PoolMemorySocket, AFloodOfStrangersIsAFewLinesInTheLog) {
  CapturedLog log;
  for (int i = 0; i < 100; ++i) EXPECT_EQ(ReplyTo("malformed"), kUnauthenticated);
  const auto worker = FetchPoolMemory(path_, kToken, kEpoch + 1, 0, PoolTier::kDevice, kTimeoutMs);
  EXPECT_EQ(worker.status().code(), absl::StatusCode::kNotFound);
  server_.reset();
  EXPECT_EQ(log.num_lines(), LogLimit::kMaxLinesPerMinute + 1) << log.text();
  EXPECT_THAT(log.text(), HasSubstr("is not the pool that is open")) << "of one with the token";
}

TEST_F(PoolMemorySocket, RefusesAnotherPoolEpoch) {
  const auto status =
      FetchPoolMemory(path_, kToken, kEpoch + 1, 0, PoolTier::kDevice, kTimeoutMs).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "no KV pool memory from " + path_ +
                                  ": pool_epoch 0xfeedface12345679 is not the pool that is open");
}

TEST_F(PoolMemorySocket, RefusesARankThatThePoolDoesNotHave) {
  for (const int rank : {2, -1}) {
    const auto status = Fetch(rank).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << rank;
    EXPECT_THAT(std::string(status.message()), HasSubstr("is not in the pool, which has 0 to 1"));
  }
}

TEST_F(PoolMemorySocket, TellsAPeerWithoutTheTokenTheSameWhateverItSends) {
  std::string nearly = kToken;
  nearly.back() ^= 1;
  for (const std::string& token : {nearly, kToken + "x", std::string()}) {
    // Wrong in every other way too, which must not show.
    const auto status =
        FetchPoolMemory(path_, token, kEpoch + 1, 7, PoolTier::kHost, kTimeoutMs).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated);
    EXPECT_THAT(std::string(status.message()), HasSubstr(kUnauthenticated));
  }
  EXPECT_EQ(ReplyTo("garbage \xff\xff\xff"), kUnauthenticated);
  EXPECT_EQ(ReplyTo(std::string(kMaxPacketBytes, '\x0a')), kUnauthenticated);
}

// Sends what SendPacket refuses to: any size, several descriptors.
void SendRaw(int socket_fd, const std::string& bytes, const std::vector<int>& fds) {
  iovec part = {const_cast<char*>(bytes.data()), bytes.size()};
  alignas(cmsghdr) char control[CMSG_SPACE(8 * sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  ASSERT_EQ(::sendmsg(socket_fd, &message, MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
}

TEST_F(PoolMemorySocket, SurvivesOversizedPacketsAndUnwantedDescriptors) {
  const int before = CountOpenFds();
  for (const size_t num_fds : {0, 2, 3, 8}) {
    auto socket = ConnectUnix(path_, kTimeoutMs);
    ASSERT_TRUE(socket.ok());
    const size_t size = num_fds == 0 ? kMaxPacketBytes + 1 : 8;
    SendRaw(socket->get(), std::string(size, 'x'), std::vector<int>(num_fds, STDERR_FILENO));
    EXPECT_EQ(ReceiveText(socket->get()), kUnauthenticated) << num_fds << " descriptors";
  }
  EXPECT_TRUE(Fetch(0).ok());
  EXPECT_EQ(CountOpenFdsOnceSettled(before), before);
}

TEST_F(PoolMemorySocket, RandomPacketsAreAnsweredAlikeAndChangeNothing) {
  std::mt19937 random(1);
  proto::MemoryRequest request;
  request.set_token(kToken);
  request.set_pool_epoch(kEpoch);
  const std::string good = request.SerializeAsString();
  const int before = CountOpenFdsOnceSettled(CountOpenFds());
  for (int i = 0; i < 300; ++i) {
    std::string bytes(1 + random() % 300, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    EXPECT_EQ(ReplyTo(bytes), kUnauthenticated);
    std::string changed = good;
    changed[2 + random() % kToken.size()] ^= static_cast<char>(1 + random() % 255);  // of the token
    EXPECT_EQ(ReplyTo(changed), kUnauthenticated);
  }
  EXPECT_TRUE(Fetch(0).ok());
  EXPECT_EQ(CountOpenFdsOnceSettled(before), before);
}

TEST_F(PoolMemorySocket, ServesOthersWhilePeersSayNothingAndDropsThose) {
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 100; ++i) {  // more than the server keeps waiting
    auto socket = ConnectUnix(path_, kTimeoutMs);
    ASSERT_TRUE(socket.ok()) << socket.status();
    silent.push_back(*std::move(socket));
  }
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(Fetch(0).ok());
  // Before the server gives up on any of them.
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::milliseconds(1'900));
  for (const UniqueFd& socket : silent) {
    EXPECT_EQ(ReceivePacket(socket.get(), kTimeoutMs).status().code(),
              absl::StatusCode::kOutOfRange);
  }
}

TEST_F(PoolMemorySocket, LeaksNoDescriptorInAHundredFetches) {
  const int before = CountOpenFds();
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(Fetch(i % 2).ok());
    ASSERT_FALSE(Fetch(2).ok());
    ASSERT_TRUE(ConnectUnix(path_, kTimeoutMs).ok());
  }
  EXPECT_EQ(CountOpenFdsOnceSettled(before), before);
}

TEST_F(PoolMemorySocket, UnlinksItsPathAndIsUnavailableAfterwards) {
  server_.reset();
  EXPECT_FALSE(std::filesystem::exists(path_));
  const auto status =
      FetchPoolMemory(path_, kToken, kEpoch, 0, PoolTier::kDevice, /*timeout_ms=*/20).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), StartsWith("no KV pool memory from " + path_));
}

// The peer that takes the request and dies is followed by one that answers.
TEST_F(PoolMemorySocket, AsksTheNextServerWhenOneDiesBeforeItsReply) {
  server_.reset();
  absl::StatusOr<UniqueFd> dying = ListenUnix(path_);
  ASSERT_TRUE(dying.ok()) << dying.status();
  std::thread successor([&] {
    {
      auto peer = AcceptUnix(dying->get());
      CHECK(peer.ok() && ReceivePacket(peer->get(), kTimeoutMs).ok());
      dying->Reset();
    }
    SetUp();
  });
  const auto memory = Fetch(0);
  successor.join();
  EXPECT_TRUE(memory.ok()) << memory.status();
}

TEST_F(PoolMemorySocket, ReplacesTheSocketOfADeadServer) {
  server_.reset();
  ASSERT_TRUE(ListenUnix(path_).ok());  // closed at once, but the path stays
  ASSERT_TRUE(std::filesystem::exists(path_));
  SetUp();
  EXPECT_TRUE(Fetch(0).ok());
}

// A pool as a GPU's driver would have it made: of several parts.
class PartedPoolMemory final : public PoolMemory {
 public:
  explicit PartedPoolMemory(TierMemory tier) : tier_(std::move(tier)) {}
  int num_ranks() const override { return 1; }
  TierMemory device_tier(int /*rank*/) const override { return tier_; }
  bool has_host_tier() const override { return false; }
  TierMemory host_tier(int /*rank*/) const override { return {}; }

 private:
  const TierMemory tier_;
};

TEST_F(PoolMemorySocket, HandsOutAllPartsInTheirOrder) {
  constexpr int kNumParts = kMaxPacketFds;
  TierMemory tier;
  std::vector<MappedMemory> owned;
  for (int i = 0; i < kNumParts; ++i) {
    auto part = MappedMemory::Create("part", 4096 * (1 + i % 2));
    ASSERT_TRUE(part.ok()) << part.status();
    *static_cast<int*>(part->data()) = i;
    tier.parts.push_back({part->fd(), part->size_bytes()});
    tier.size_bytes += part->size_bytes();
    owned.push_back(*std::move(part));
  }
  server_->Publish(kEpoch, std::make_unique<PartedPoolMemory>(tier));
  const int before = CountOpenFds();
  {
    const auto memory = Fetch(0);
    ASSERT_TRUE(memory.ok()) << memory.status();
    ASSERT_EQ(memory->size_bytes(), tier.size_bytes);
    const char* data = static_cast<const char*>(memory->data());
    for (int i = 0; i < kNumParts; ++i) {
      EXPECT_EQ(*reinterpret_cast<const int*>(data), i);
      data += tier.parts[i].size_bytes;
    }
  }
  EXPECT_EQ(CountOpenFdsOnceSettled(before), before);
}

TEST_F(PoolMemorySocket, AGpusMemoryMayBeLargerThanWhatIsUsedOfIt) {
  const auto part = MappedMemory::Create("part", 8192);
  ASSERT_TRUE(part.ok()) << part.status();
  server_->Publish(
      kEpoch,
      std::make_unique<PartedPoolMemory>(TierMemory{
          .kind = SharedMemory::Kind::kGpu, .size_bytes = 5000, .parts = {{part->fd(), 8192}}}));
  const auto memory = FetchPoolMemory(path_, kToken, kEpoch, 0, PoolTier::kDevice, kTimeoutMs);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->kind, SharedMemory::Kind::kGpu);
  EXPECT_EQ(memory->size_bytes, 5000);
  ASSERT_EQ(memory->parts.size(), 1u);
  EXPECT_EQ(memory->parts[0].size_bytes, 8192);
}

// A cache manager that answers with what it should not.
TEST_F(PoolMemorySocket, RepliesThatDoNotFitTogetherAreRefused) {
  server_.reset();
  const auto listener = ListenUnix(path_);
  ASSERT_TRUE(listener.ok()) << listener.status();
  const auto fetch = [&](const char* text, int num_fds) {
    proto::MemoryReply reply;
    EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &reply)) << text;
    std::thread answering([&] {
      auto peer = AcceptUnix(listener->get());
      CHECK(peer.ok() && ReceivePacket(peer->get(), kTimeoutMs).ok());
      const std::vector<int> fds(num_fds, STDERR_FILENO);
      CHECK(SendPacket(peer->get(), reply.SerializeAsString(), fds).ok());
    });
    const auto status =
        FetchPoolMemory(path_, kToken, kEpoch, 0, PoolTier::kDevice, kTimeoutMs).status();
    answering.join();
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
    return std::string(status.message());
  };
  EXPECT_EQ(fetch("kind: KIND_HOST size_bytes: 8", 0),
            path_ + " sent 0 descriptors of 0 parts of memory");
  EXPECT_EQ(fetch("kind: KIND_HOST size_bytes: 8 part_bytes: 8 part_bytes: 8", 1),
            path_ + " sent 1 descriptors of 2 parts of memory");
  EXPECT_EQ(fetch("kind: KIND_GPU size_bytes: 17 part_bytes: 8 part_bytes: 8", 2),
            path_ + " sent 16 bytes of memory as 17");
  EXPECT_EQ(fetch("kind: KIND_GPU size_bytes: 8 part_bytes: 8 part_bytes: 0", 2),
            path_ + " sent a part of 0 bytes of memory");
  EXPECT_EQ(fetch("kind: KIND_GPU size_bytes: 8 part_bytes: 8 part_bytes: 18446744073709551608", 2),
            path_ + " sent a part of 18446744073709551608 bytes of memory");
  EXPECT_EQ(fetch("size_bytes: 8 part_bytes: 8", 1), path_ + " sent memory of kind 0");
}

absl::Status Refusal(const PoolSize& size, int64_t available_bytes) {
  return HostPoolMemory::Create(size, available_bytes).status();
}

TEST(HostPoolMemory, ThatDoesNotFitIsRefusedWithItsSizes) {
  const auto one =
      Refusal({.num_blocks = 1024, .block_bytes_by_rank = {1 << 20}}, int64_t{1} << 29);
  EXPECT_EQ(one.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(
      one.message(),
      "KV pool of 1.00 GiB does not fit into the 0.50 GiB of memory that is available (1024 "
      "blocks of 1048576 bytes on 1 rank); lower --num-gpu-blocks-override, --max-num-seqs or "
      "--max-model-len");
  const auto uneven =
      Refusal({.num_blocks = 1024, .block_bytes_by_rank = {1 << 19, 1 << 20}}, int64_t{1} << 29);
  EXPECT_THAT(std::string(uneven.message()),
              HasSubstr("(1024 blocks of 524288+1048576 bytes on 2 ranks)"));
}

TEST(HostPoolMemory, HostTierCountsAndItsFlagIsNamed) {
  const auto status =
      Refusal({.num_blocks = 512, .block_bytes_by_rank = {1 << 20}, .num_host_slots = 1024},
              int64_t{1} << 30);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "KV pool of 0.50 GiB with a host tier of 1.00 GiB does not fit into the 1.00 GiB of "
            "memory that is available (512 blocks of 1048576 bytes on 1 rank); lower --swap-space, "
            "--num-gpu-blocks-override, --max-num-seqs or --max-model-len");
}

TEST(HostPoolMemory, SizeThatOverflowsIsRefusedAndNotWrapped) {
  // 2^31 * 2^33 wraps to 0 in 64 bits.
  const auto status =
      Refusal({.num_blocks = 1u << 31, .block_bytes_by_rank = {uint64_t{1} << 33}}, 1 << 20);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
}

}  // namespace
}  // namespace wintserve
