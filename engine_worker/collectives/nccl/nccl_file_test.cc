#include "engine_worker/collectives/nccl/nccl_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

namespace wintserve {
namespace {

constexpr char kRemedy[] = "; install it, or put its directory into LD_LIBRARY_PATH";
constexpr char kNeeds[] = "tensor parallelism on GPUs needs NCCL 2: ";

// The loader knows the library by its name alone, so another one hides it.
TEST(NcclFile, OneThatIsNotThereIsOneLineThatSaysWhatToDo) {
  const auto file = NcclFile::Open("libnccl-that-is-hidden.so.2");
  EXPECT_TRUE(absl::IsUnavailable(file.status()));
  EXPECT_EQ(file.status().message(),
            kNeeds +
                std::string("libnccl-that-is-hidden.so.2: cannot open shared object file: No "
                            "such file or directory") +
                kRemedy);
}

TEST(NcclFile, AFileThatIsNoLibraryIsNamed) {
  const std::string path =
      ::testing::TempDir() + "nccl_file_test." + std::to_string(::getpid()) + ".so";
  std::ofstream(path) << "no library";
  const auto file = NcclFile::Open(path);
  std::filesystem::remove(path);
  EXPECT_TRUE(absl::IsUnavailable(file.status()));
  EXPECT_EQ(file.status().message(), kNeeds + path + ": file too short" + kRemedy);
}

TEST(NcclFile, AFunctionThatALibraryLacksIsNamed) {
  const auto file = NcclFile::Open("libc.so.6");
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_TRUE(file->Find("malloc").ok());
  const absl::Status missing = file->Find("ncclCommAbort").status();
  EXPECT_TRUE(absl::IsUnavailable(missing));
  EXPECT_EQ(missing.message(), kNeeds + std::string("libc.so.6 has no ncclCommAbort") + kRemedy);
}

}  // namespace
}  // namespace wintserve
