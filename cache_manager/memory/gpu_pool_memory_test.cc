// GpuPoolMemory on a driver that is made up: what it asks for, and what it says where that fails.
#include "cache_manager/memory/gpu_pool_memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <string>
#include <vector>

#include "common/unix_socket.h"

namespace wintserve {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int64_t kMib = 1 << 20;

// Devices of as many bytes as it says. What was allocated once does not come back.
class FakeDriver final : public GpuDriver {
 public:
  absl::StatusOr<GpuTraits> Query(int device) override {
    if (device >= num_devices) return absl::UnavailableError("no such GPU");
    return traits;
  }
  absl::StatusOr<UniqueFd> Allocate(int device, int64_t size_bytes) override {
    EXPECT_LT(device, num_devices);
    EXPECT_EQ(size_bytes % traits.granularity_bytes, 0);
    if (broken) return absl::InternalError("cuMemCreate: error 999");
    if (size_bytes > free_bytes[device]) return absl::ResourceExhaustedError("out of memory");
    free_bytes[device] -= size_bytes;
    sizes[device].push_back(size_bytes);
    return UniqueFd(::memfd_create("fake", MFD_CLOEXEC));
  }

  GpuTraits traits = {.name = "Fake 1",
                      .driver = "CUDA 13.0",
                      .total_bytes = 16384 * kMib,
                      .has_virtual_memory = true,
                      .exports_fds = true,
                      .granularity_bytes = 2 * kMib};
  int num_devices = 2;
  int64_t free_bytes[2] = {8192 * kMib, 8192 * kMib};
  std::vector<int64_t> sizes[2];
  bool broken = false;
};

constexpr int64_t kMuch = int64_t{1} << 40;

TEST(GpuPoolMemory, IsMadeOfGibibytesAndARestOfTheDevicesGranularity) {
  FakeDriver driver;
  // 3.5 MiB a block: blocks lie across the ends of parts. 700 of them are 2450 MiB, and on the
  // other rank 350.
  const auto pool = GpuPoolMemory::Create(
      {.num_blocks = 700, .block_bytes_by_rank = {3584 << 10, 512 << 10}}, kMuch, &driver);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_THAT(driver.sizes[0], ElementsAre(1024 * kMib, 1024 * kMib, 402 * kMib));
  EXPECT_THAT(driver.sizes[1], ElementsAre(350 * kMib));
  EXPECT_EQ((*pool)->num_ranks(), 2);
  EXPECT_FALSE((*pool)->has_host_tier());
  const TierMemory tier = (*pool)->device_tier(0);
  EXPECT_EQ(tier.kind, SharedMemory::Kind::kGpu);
  EXPECT_EQ(tier.size_bytes, 2450 * kMib);
  ASSERT_EQ(tier.parts.size(), 3u);
  EXPECT_EQ(tier.parts[2].size_bytes, 402 * kMib);
  struct stat info = {};
  for (const TierMemory::Part& part : tier.parts) EXPECT_EQ(::fstat(part.fd, &info), 0);
}

TEST(GpuPoolMemory, TakesTheGranularityThatItHasToAndSaysHowMuchIsOfUse) {
  FakeDriver driver;
  const auto pool =
      GpuPoolMemory::Create({.num_blocks = 3, .block_bytes_by_rank = {4097}}, kMuch, &driver);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_THAT(driver.sizes[0], ElementsAre(2 * kMib));
  EXPECT_EQ((*pool)->device_tier(0).size_bytes, 3 * 4097);
}

TEST(GpuPoolMemory, HasNoMorePartsThanAPacketCarries) {
  FakeDriver driver;
  driver.traits.total_bytes = driver.free_bytes[0] = int64_t{1} << 40;
  const auto pool = GpuPoolMemory::Create(
      {.num_blocks = 1000, .block_bytes_by_rank = {uint64_t{1000} << 20}}, kMuch, &driver);
  ASSERT_TRUE(pool.ok()) << pool.status();
  const TierMemory tier = (*pool)->device_tier(0);
  EXPECT_LE(tier.parts.size(), static_cast<size_t>(kMaxPacketFds));
  EXPECT_GT(tier.parts.size(), static_cast<size_t>(kMaxPacketFds) - 2);
  int64_t sum = 0;
  for (const TierMemory::Part& part : tier.parts) sum += part.size_bytes;
  EXPECT_EQ(sum, 1000000 * kMib);
}

TEST(GpuPoolMemory, TheHostTierIsMemoryOfTheHost) {
  FakeDriver driver;
  const auto pool = GpuPoolMemory::Create(
      {.num_blocks = 3, .block_bytes_by_rank = {4096, 8192}, .num_host_slots = 5}, kMuch, &driver);
  ASSERT_TRUE(pool.ok()) << pool.status();
  ASSERT_TRUE((*pool)->has_host_tier());
  const TierMemory tier = (*pool)->host_tier(1);
  EXPECT_EQ(tier.kind, SharedMemory::Kind::kHost);
  EXPECT_EQ(tier.size_bytes, 5 * 8192);
  struct stat info = {};
  ASSERT_EQ(::fstat(tier.parts.at(0).fd, &info), 0);
  EXPECT_EQ(info.st_size, 5 * 8192);
}

TEST(GpuPoolMemory, ThatDoesNotFitIsRefusedWithWhatIsAskedForAndWhatIsFree) {
  FakeDriver driver;
  driver.free_bytes[0] = 3 * 1024 * kMib + 514 * kMib;
  const auto status =
      GpuPoolMemory::Create({.num_blocks = 8192, .block_bytes_by_rank = {1 << 20}}, kMuch, &driver)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(status.message(),
            "KV pool of 8.00 GiB does not fit into GPU 0 (Fake 1): 3.50 GiB of its 16.00 GiB are "
            "free (8192 blocks of 1048576 bytes on 1 rank); lower --gpu-memory-utilization "
            "or --num-gpu-blocks-override");
}

TEST(GpuPoolMemory, TheRankThatHasNoMemoryIsNamed) {
  FakeDriver driver;
  driver.free_bytes[1] = 0;
  const auto status =
      GpuPoolMemory::Create({.num_blocks = 1024, .block_bytes_by_rank = {1 << 20, 1 << 20}}, kMuch,
                            &driver)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("KV pool of 1.00 GiB does not fit into GPU 1 (Fake 1): 0.00 GiB"));
}

TEST(GpuPoolMemory, ASizeThatOverflowsIsRefusedAndNotWrapped) {
  FakeDriver driver;
  // 2^31 * 2^33 wraps to 0 in 64 bits.
  const auto status =
      GpuPoolMemory::Create({.num_blocks = 1u << 31, .block_bytes_by_rank = {uint64_t{1} << 33}},
                            kMuch, &driver)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("8.00 GiB of its 16.00 GiB are free"));
}

TEST(GpuPoolMemory, AHostTierThatDoesNotFitIsRefusedByItsFlag) {
  FakeDriver driver;
  const auto status =
      GpuPoolMemory::Create(
          {.num_blocks = 1, .block_bytes_by_rank = {1 << 20}, .num_host_slots = 2048},
          int64_t{1} << 30, &driver)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(
      status.message(),
      "host tier of 2.00 GiB does not fit into the 1.00 GiB of memory that is available; lower "
      "--swap-space");
  EXPECT_TRUE(driver.sizes[0].empty());
}

TEST(GpuPoolMemory, WhatTheDriverSaysOfAnotherErrorIsPassedOn) {
  FakeDriver driver;
  driver.broken = true;
  const auto status =
      GpuPoolMemory::Create({.num_blocks = 1024, .block_bytes_by_rank = {1 << 20}}, kMuch, &driver)
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(status.message(),
            "KV pool of 1.00 GiB cannot be created on GPU 0 (Fake 1): cuMemCreate: error 999");
}

TEST(CheckGpu, NamesTheDeviceWhatItsDriverLacksAndWhatToDo) {
  FakeDriver driver;
  EXPECT_TRUE(CheckGpu(&driver, 1).ok());
  EXPECT_EQ(CheckGpu(&driver, 2).status().message(), "no such GPU");
  driver.traits.exports_fds = false;
  const absl::Status no_fds = CheckGpu(&driver, 1).status();
  EXPECT_EQ(no_fds.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(no_fds.message(),
            "GPU 1 (Fake 1) has no memory as file descriptors "
            "(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED is 0), of which the "
            "KV pool "
            "is made; its driver serves CUDA 13.0. Update the driver, or, on a virtual machine or "
            "WSL, give "
            "this machine a GPU that has it; --device cpu goes without");
  driver.traits.has_virtual_memory = false;
  EXPECT_THAT(std::string(CheckGpu(&driver, 0).status().message()),
              HasSubstr("GPU 0 (Fake 1) has no virtual memory management "
                        "(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED is 0)"));
  EXPECT_FALSE(
      GpuPoolMemory::Create({.num_blocks = 1, .block_bytes_by_rank = {1}}, kMuch, &driver).ok());
}

}  // namespace
}  // namespace wintserve
