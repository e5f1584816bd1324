#include "common/mapped_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#include "common/check.h"

namespace wintserve {
namespace {

using ::testing::HasSubstr;

const int64_t kPage = ::sysconf(_SC_PAGESIZE);

// Memory of these sizes, which the test keeps a mapping of, too.
struct TestParts {
  explicit TestParts(const std::vector<int64_t>& sizes) {
    for (const int64_t size : sizes) {
      auto memory = MappedMemory::Create("mapped_memory_test", size);
      CHECK(memory.ok(), "{}", memory.status().ToString());
      shared.parts.push_back({UniqueFd(::dup(memory->fd())), size});
      shared.size_bytes += size;
      owned.push_back(*std::move(memory));
    }
  }

  char* byte(size_t part, int64_t at) { return static_cast<char*>(owned[part].data()) + at; }

  std::vector<MappedMemory> owned;
  SharedMemory shared;
};

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

TEST(MappedMemory, PartsStandOneBehindTheOtherAndAreShared) {
  TestParts parts({2 * kPage, kPage, 100});
  auto memory = MappedMemory::FromParts(std::move(parts.shared));
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->size_bytes(), 3 * kPage + 100);
  char* const data = static_cast<char*>(memory->data());
  std::memset(data, 7, memory->size_bytes());
  for (const auto& [part, at] : std::vector<std::pair<size_t, int64_t>>{
           {0, 0}, {0, 2 * kPage - 1}, {1, 0}, {1, kPage - 1}, {2, 0}, {2, 99}}) {
    EXPECT_EQ(*parts.byte(part, at), 7) << part << " " << at;
  }
  *parts.byte(1, 0) = 9;
  EXPECT_EQ(data[2 * kPage], 9);
  for (const int64_t at : {int64_t{0}, 2 * kPage, 3 * kPage}) {
    EXPECT_TRUE(IsLeftOutOfCoreDumps(data + at)) << at;
  }
}

TEST(MappedMemory, AllPartsAreUnmappedTogether) {
  TestParts parts({kPage, kPage});
  auto memory = MappedMemory::FromParts(std::move(parts.shared));
  ASSERT_TRUE(memory.ok()) << memory.status();
  void* const data = memory->data();
  *memory = MappedMemory();
  unsigned char resident[2];
  EXPECT_EQ(::mincore(data, 2 * kPage, resident), -1);
  EXPECT_EQ(errno, ENOMEM);
}

TEST(MappedMemory, PartsThatDoNotFitTogetherAreRefused) {
  const auto error = [](SharedMemory shared) {
    const absl::Status status = MappedMemory::FromParts(std::move(shared)).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  TestParts inside_a_page({100, kPage});
  EXPECT_THAT(error(std::move(inside_a_page.shared)), HasSubstr("at byte 100, inside a page"));
  TestParts too_few({kPage, kPage});
  too_few.shared.size_bytes += kPage;
  EXPECT_EQ(
      error(std::move(too_few.shared)),
      fmt::format("2 parts of shared memory have {} bytes, expected {}", 2 * kPage, 3 * kPage));
  TestParts lies({kPage, kPage});
  lies.shared.parts[1].size_bytes = 2 * kPage;
  EXPECT_EQ(error(std::move(lies.shared)),
            fmt::format("shared memory has {} bytes, expected {}", kPage, 2 * kPage));
  TestParts unsealed({kPage, kPage});
  const int fd = ::memfd_create("mapped_memory_test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(::ftruncate(fd, kPage), 0);
  unsealed.shared.parts[1].fd = UniqueFd(fd);
  EXPECT_EQ(error(std::move(unsealed.shared)), "shared memory is not sealed against resizing");
  EXPECT_EQ(error({}), "0 parts of shared memory have 0 bytes, expected 0");
  TestParts of_a_gpu({kPage});
  of_a_gpu.shared.kind = SharedMemory::Kind::kGpu;
  EXPECT_EQ(error(std::move(of_a_gpu.shared)), "memory of a GPU cannot be mapped into the host's");
}

}  // namespace
}  // namespace wintserve
