#include "cache_manager/memory/available_memory.h"

#include <gtest/gtest.h>

#include <map>
#include <string>

#include "common/temp_dir_test_util.h"

namespace wintserve {
namespace {

struct Machine {
  const char* name;
  std::map<std::string, std::string> files;
  int64_t available_bytes;
};

class AvailableMemory : public testing::TestWithParam<Machine> {};

TEST_P(AvailableMemory, IsTheLeastOfTheMachineAndItsCgroups) {
  const TempDir root;
  for (const auto& [path, text] : GetParam().files) WriteFile(root.path() / path, text);
  const auto available = AvailableMemoryBytes(root.path());
  ASSERT_TRUE(available.ok()) << available.status();
  EXPECT_EQ(*available, GetParam().available_bytes);
}

constexpr const char kMeminfo[] = "MemTotal:  100 kB\nMemFree: 5 kB\nMemAvailable:     64 kB\n";

INSTANTIATE_TEST_SUITE_P(
    All, AvailableMemory,
    testing::Values(Machine{"NoCgroup", {{"proc/meminfo", kMeminfo}}, 65536},
                    Machine{"Version2WithoutALimit",
                            {{"proc/meminfo", kMeminfo},
                             {"proc/self/cgroup", "0::/\n"},
                             {"sys/fs/cgroup/memory.max", "max\n"},
                             {"sys/fs/cgroup/memory.current", "1000\n"}},
                            65536},
                    Machine{
                        "Version2CountsFileCacheAsAvailable",
                        {{"proc/meminfo", kMeminfo},
                         {"proc/self/cgroup", "0::/pod/serve\n"},
                         {"sys/fs/cgroup/pod/serve/memory.max", "30000\n"},
                         {"sys/fs/cgroup/pod/serve/memory.current", "20000\n"},
                         {"sys/fs/cgroup/pod/serve/memory.stat", "anon 1\ninactive_file 5000\n"}},
                        15000},
                    Machine{"Version2ParentHasLessLeft",
                            {{"proc/meminfo", kMeminfo},
                             {"proc/self/cgroup", "0::/pod/serve\n"},
                             {"sys/fs/cgroup/pod/serve/memory.max", "30000\n"},
                             {"sys/fs/cgroup/pod/serve/memory.current", "20000\n"},
                             {"sys/fs/cgroup/pod/memory.max", "40000\n"},
                             {"sys/fs/cgroup/pod/memory.current", "39000\n"}},
                            1000},
                    Machine{"Version1ContainerSeesItselfAtTheTop",
                            {{"proc/meminfo", kMeminfo},
                             {"proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n"},
                             {"sys/fs/cgroup/memory/memory.limit_in_bytes", "30000\n"},
                             {"sys/fs/cgroup/memory/memory.usage_in_bytes", "28000\n"},
                             {"sys/fs/cgroup/memory/memory.stat", "total_inactive_file 500\n"}},
                            2500},
                    Machine{"UsageAboveTheLimitIsNothingLeft",
                            {{"proc/meminfo", kMeminfo},
                             {"proc/self/cgroup", "0::/\n"},
                             {"sys/fs/cgroup/memory.max", "30000\n"},
                             {"sys/fs/cgroup/memory.current", "30001\n"}},
                            0}),
    [](const auto& info) { return info.param.name; });

TEST(AvailableMemoryError, NamesTheFile) {
  EXPECT_EQ(AvailableMemoryBytes("/nonexistent").status().message(),
            "/nonexistent/proc/meminfo has no MemAvailable");
}

}  // namespace
}  // namespace wintserve
