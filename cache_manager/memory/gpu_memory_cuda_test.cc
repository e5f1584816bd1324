// A GPU's memory in several processes: its owner, which has no context and maps nothing, and
// workers, which die. Each runs this program anew (a child of a process that has used CUDA cannot
// use it);
// `--child=NAME` says as what, a socket at kChildFd is how it speaks to the test.
#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cache_manager/client/pool_memory_client.h"
#include "cache_manager/memory/cuda_driver.h"
#include "cache_manager/memory/gpu_pool_memory.h"
#include "cache_manager/memory/memory_server.h"
#include "common/check.h"
#include "common/unix_socket.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device.h"

namespace wintserve {
namespace {

using std::chrono::milliseconds;
using std::chrono::steady_clock;
using ::testing::HasSubstr;

constexpr int kChildFd = 3;
constexpr int64_t kTimeoutMs = 60'000;
constexpr uint64_t kEpoch = 0x1234;
constexpr char kToken[] = "token";
// 3.5 MiB a block and two parts, of which the first ends inside a block.
constexpr uint64_t kBlockBytes = uint64_t{3584} << 10;
constexpr uint32_t kNumBlocks = 320;
constexpr uint32_t kNumHostSlots = 16;

template <typename T>
T Must(absl::StatusOr<T> value) {
  CHECK(value.ok(), "{}", value.status().ToString());
  return *std::move(value);
}

GpuDriver& Driver() {
  static auto* const driver = Must(LoadCudaDriver()).release();
  return *driver;
}

std::string SocketPath(pid_t test) { return fmt::format("/tmp/gpu_memory_cuda_test.{}", test); }

// A process of this program, to which the test speaks in words.
class Child {
 public:
  explicit Child(const std::string& name) {
    int ends[2];
    CHECK(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    socket_.Reset(ends[0]);
    const UniqueFd theirs(ends[1]);
    const std::string argument = "--child=" + name;
    const std::string path = "--path=" + SocketPath(::getpid());
    pid_ = ::fork();
    CHECK(pid_ >= 0);
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::fcntl(theirs.get(), F_SETFD, 0);  // in case it is kChildFd, which dup2 then leaves alone
      ::dup2(theirs.get(), kChildFd);
      ::execl("/proc/self/exe", "gpu_memory_cuda_test", argument.c_str(), path.c_str(), nullptr);
      ::_exit(127);
    }
  }
  ~Child() { Kill(); }

  // What the child answers; what went wrong, if it does not.
  std::string Ask(const std::string& word) {
    const absl::Status sent = SendPacket(socket_.get(), word);
    if (!sent.ok()) return sent.ToString();
    const auto reply = ReceivePacket(socket_.get(), kTimeoutMs);
    return reply.ok() ? reply->bytes : reply.status().ToString();
  }

  // Returns once it is reaped: nothing of it runs any more.
  void Kill() {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGKILL);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  pid_t pid() const { return pid_; }

 private:
  pid_t pid_ = -1;
  UniqueFd socket_;
};

// A worker's two tiers, mapped.
struct Worker {
  explicit Worker(const std::string& path) {
    backend = Must(kernels::cuda::CreateCudaBackend({.num_host_threads = 4}));
    const auto fetch = [&](PoolTier tier) {
      return Must(FetchPoolMemory(path, kToken, kEpoch, 0, tier, kTimeoutMs));
    };
    const auto begin = steady_clock::now();
    pool = Must(backend->MapDeviceMemory(fetch(PoolTier::kDevice)));
    const auto mapped = steady_clock::now();
    host = Must(backend->MapHostMemory(fetch(PoolTier::kHost)));
    std::fprintf(stderr,
                 "NOTE pool of %lld MiB mapped in %.1f ms, host tier of %lld MiB in %.1f ms\n",
                 static_cast<long long>(pool->size_bytes() >> 20),
                 std::chrono::duration<double, std::milli>(mapped - begin).count(),
                 static_cast<long long>(host->size_bytes() >> 20),
                 std::chrono::duration<double, std::milli>(steady_clock::now() - mapped).count());
  }

  char* block(uint32_t id) const { return static_cast<char*>(pool->data()) + id * kBlockBytes; }

  // Every word of every block is its own place in the pool, plus `seed`.
  void Write(uint64_t seed) const {
    std::vector<uint64_t> words(kBlockBytes / sizeof(uint64_t));
    for (uint32_t id = 0; id < kNumBlocks; ++id) {
      for (size_t i = 0; i < words.size(); ++i) words[i] = seed + id * words.size() + i;
      backend->CopyFromHost(block(id), words.data(), kBlockBytes);
    }
  }
  // "ok", or the first word that is another.
  std::string Check(uint64_t seed) const {
    std::vector<uint64_t> words(kBlockBytes / sizeof(uint64_t));
    for (uint32_t id = 0; id < kNumBlocks; ++id) {
      CHECK(backend->CopyToHost(words.data(), block(id), kBlockBytes).ok());
      for (size_t i = 0; i < words.size(); ++i) {
        if (words[i] == seed + id * words.size() + i) continue;
        return fmt::format("block {} word {} is {:x}", id, i, words[i]);
      }
    }
    return "ok";
  }

  // All blocks by a queue of copies to the host tier and back, in rounds, and `seed` is there
  // again.
  std::string ThroughTheHostTier(uint64_t seed) const {
    const auto queue = Must(backend->CreateCopyQueue());
    auto* const slots = static_cast<char*>(host->data());
    for (uint32_t first = 0; first < kNumBlocks; first += kNumHostSlots) {
      queue->WaitForOperators();
      for (uint32_t i = 0; i < kNumHostSlots; ++i) {
        queue->CopyToHost(slots + i * kBlockBytes, block(first + i), kBlockBytes);
      }
      if (!queue->Record()->Wait().ok()) return "copies out failed";
      const std::vector<char> zeros(kBlockBytes);
      for (uint32_t i = 0; i < kNumHostSlots; ++i) {
        backend->CopyFromHost(block(first + i), zeros.data(), kBlockBytes);
        queue->CopyFromHost(block(first + i), slots + i * kBlockBytes, kBlockBytes);
      }
      queue->HoldOperators();
    }
    return Check(seed);
  }

  std::unique_ptr<kernels::Backend> backend;
  std::unique_ptr<kernels::Buffer> pool;
  std::unique_ptr<kernels::Buffer> host;
};

std::unique_ptr<GpuPoolMemory> NewPool() {
  return Must(GpuPoolMemory::Create({.num_blocks = kNumBlocks,
                                     .block_bytes_by_rank = {kBlockBytes},
                                     .num_host_slots = kNumHostSlots},
                                    int64_t{8} << 30, &Driver()));
}

// Answers words until the test ends.
using Answers = std::map<std::string, std::function<std::string()>>;
int Serve(const Answers& answers) {
  while (true) {
    const auto word = ReceivePacket(kChildFd, /*timeout_ms=*/-1);
    if (!word.ok()) return 0;
    const auto answer = answers.find(word->bytes);
    const std::string text = answer == answers.end() ? "unknown word" : answer->second();
    if (!SendPacket(kChildFd, text).ok()) return 0;
  }
}

int RunChild(const std::string& name, const std::string& path) {
  if (name == "owner") {
    auto server = Must(MemoryServer::Start(path, kToken));
    return Serve({{"open", [&] {
                     server->Publish(kEpoch, NewPool());
                     return std::string("ok");
                   }}});
  }
  if (name == "free") {
    return Serve({{"bytes", [] {
                     CHECK(kernels::cuda::UseDevice(0).ok());
                     return std::to_string(Must(kernels::cuda::QueryDeviceMemory()).free);
                   }}});
  }
  const Worker worker(path);
  return Serve({{"map", [] { return std::string("ok"); }},
                {"write",
                 [&] {
                   worker.Write(1);
                   return std::string("ok");
                 }},
                {"check", [&] { return worker.Check(1); }},
                {"rewrite",
                 [&] {
                   worker.Write(1000);
                   return worker.Check(1000);
                 }},
                {"through the host tier", [&] { return worker.ThroughTheHostTier(1); }}});
}

int64_t FreeBytes() { return std::stoll(Child("free").Ask("bytes")); }

// The driver takes memory back a moment after the last who had it has gone.
int64_t FreeBytesOnce(int64_t at_least) {
  int64_t free_bytes = FreeBytes();
  for (int i = 0; i < 20 && free_bytes < at_least; ++i) {
    std::this_thread::sleep_for(milliseconds(250));
    free_bytes = FreeBytes();
  }
  return free_bytes;
}

// The owner's half, in the test's own process.
class GpuPool : public testing::Test {
 protected:
  void Start() {
    server_ = Must(MemoryServer::Start(SocketPath(::getpid()), kToken));
    const auto begin = steady_clock::now();
    server_->Publish(kEpoch, NewPool());
    std::printf("NOTE pool of %lld MiB created in %.1f ms\n",
                static_cast<long long>(kNumBlocks * kBlockBytes >> 20),
                std::chrono::duration<double, std::milli>(steady_clock::now() - begin).count());
  }

  std::unique_ptr<MemoryServer> server_;
};

TEST_F(GpuPool, KeepsItsContentWhenTheWorkerThatWroteItIsKilled) {
  Start();
  {
    Child writer("worker");
    ASSERT_EQ(writer.Ask("write"), "ok");
    writer.Kill();
  }
  Child reader("worker");
  EXPECT_EQ(reader.Ask("check"), "ok");
  Child second("worker");  // beside the first: both see what either writes
  EXPECT_EQ(reader.Ask("rewrite"), "ok");
  EXPECT_THAT(second.Ask("check"), HasSubstr("block 0 word 0 is 3e8"));
}

TEST_F(GpuPool, StaysWithItsWorkersWhenItsOwnerIsKilled) {
  Child owner("owner");
  ASSERT_EQ(owner.Ask("open"), "ok");
  Child worker("worker");
  ASSERT_EQ(worker.Ask("write"), "ok");
  owner.Kill();
  EXPECT_EQ(worker.Ask("check"), "ok");
  EXPECT_EQ(worker.Ask("rewrite"), "ok");
}

TEST_F(GpuPool, BlocksGoThroughTheHostTierAndBackBesideTheOperators) {
  Start();
  Child worker("worker");
  ASSERT_EQ(worker.Ask("write"), "ok");
  EXPECT_EQ(worker.Ask("through the host tier"), "ok");
}

TEST_F(GpuPool, IsFreedWithItsLastDescriptorAndMapping) {
  constexpr int64_t kPoolBytes = kNumBlocks * kBlockBytes;
  constexpr int64_t kSlackBytes = int64_t{64} << 20;
  const int64_t before = FreeBytes();
  Start();
  EXPECT_LE(FreeBytes(), before - kPoolBytes);
  Child worker("worker");
  ASSERT_EQ(worker.Ask("map"), "ok");
  server_->Withdraw();
  EXPECT_LE(FreeBytes(), before - kPoolBytes) << "the worker still maps it";
  worker.Kill();
  EXPECT_GE(FreeBytesOnce(before - kSlackBytes), before - kSlackBytes);
}

// The cache manager must be no process that computes: it would take half a gigabyte of the GPU.
TEST_F(GpuPool, TakesNoMoreOfTheGpuThanItsSize) {
  const int64_t before = FreeBytes();
  Start();
  EXPECT_GE(FreeBytes(), before - int64_t{kNumBlocks * kBlockBytes} - (int64_t{32} << 20));
}

TEST_F(GpuPool, OfMoreThanTheDeviceHasIsRefusedWithWhatIsFreeAndLeavesNothing) {
  const int64_t before = FreeBytes();
  const GpuTraits traits = Must(Driver().Query(0));
  // As large as the whole device, of which a part is always in use.
  const auto num_blocks = static_cast<uint32_t>(traits.total_bytes >> 20);
  const auto begin = steady_clock::now();
  const absl::Status status =
      GpuPoolMemory::Create({.num_blocks = num_blocks, .block_bytes_by_rank = {1 << 20}},
                            int64_t{1} << 30, &Driver())
          .status();
  std::printf("NOTE refused in %.0f ms: %s\n",
              std::chrono::duration<double, std::milli>(steady_clock::now() - begin).count(),
              std::string(status.message()).c_str());
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("does not fit into GPU 0 (" + traits.name));
  // Within a gibibyte, as the runtime that says what is free needs some of it itself.
  const std::string text(status.message());
  const size_t at = text.find(": ", text.find(')'));
  ASSERT_NE(at, std::string::npos);
  EXPECT_NEAR(std::stod(text.substr(at + 2)), static_cast<double>(before) / kGib, 1.0);
  EXPECT_GE(FreeBytesOnce(before - (64 << 20)), before - (64 << 20));
  Start();  // and the next one that fits is made
}

TEST(CudaDriver, KnowsTheDevice) {
  const GpuTraits traits = Must(CheckGpu(&Driver(), 0));
  EXPECT_FALSE(traits.name.empty());
  EXPECT_THAT(traits.driver, HasSubstr("CUDA "));
  EXPECT_GT(traits.total_bytes, int64_t{1} << 30);
  EXPECT_EQ(traits.granularity_bytes % (64 << 10), 0);
  std::printf("NOTE %s, %s, granularity %lld\n", traits.name.c_str(), traits.driver.c_str(),
              static_cast<long long>(traits.granularity_bytes));
}

TEST(CudaDriver, NamesADeviceThatIsNotThere) {
  const absl::Status status = Driver().Query(99).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("no GPU 99: 0 … "));
}

TEST(CudaDriver, SaysWhatTheDriverSays) {
  const absl::Status status = Driver().Allocate(0, 12345).status();  // not of its granularity
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("cuMemCreate of 12345 bytes: error 1, CUDA_ERROR_INVALID_VALUE ("));
}

TEST(CudaDriver, ThatIsNotThereOrTooOldIsNamed) {
  const absl::Status missing = LoadCudaDriver("libno-such-driver.so.1").status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(missing.message()),
              HasSubstr("--device cuda needs the NVIDIA driver, which is not on this machine: "
                        "libno-such-driver.so.1"));
  const absl::Status too_old = LoadCudaDriver("libc.so.6").status();
  EXPECT_EQ(too_old.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(too_old.message(), "the NVIDIA driver's libc.so.6 has no cuInit: update the driver");
}

std::string ValueOf(const std::vector<std::string>& arguments, const std::string& flag) {
  for (const std::string& argument : arguments) {
    if (argument.starts_with(flag)) return argument.substr(flag.size());
  }
  return "";
}

}  // namespace
}  // namespace wintserve

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv, argv + argc);
  const std::string child = wintserve::ValueOf(arguments, "--child=");
  if (!child.empty()) {
    return wintserve::RunChild(child, wintserve::ValueOf(arguments, "--path="));
  }
  testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
