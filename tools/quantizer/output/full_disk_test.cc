// Runs that find no space, and the same commands once there is some.
#include <errno.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "common/unique_fd.h"
#include "tools/quantizer/output/output_test_util.h"

namespace {
std::atomic<bool> reserves_space = true;
}  // namespace

// Stands in for the C library's: a file system that reserves nothing, as ZFS and some of networks.
extern "C" int posix_fallocate(int fd, off_t offset, off_t size) {
  if (!reserves_space) return EOPNOTSUPP;
  return ::fallocate(fd, 0, offset, size) == 0 ? 0 : errno;
}

namespace wintserve::quantizer {
namespace {

using ::testing::AllOf;
using testing::FilesOf;
using ::testing::HasSubstr;

class FullDisk : public testing::ConversionTest {
 protected:
  FullDisk() : ConversionTest("disk/out") {
    previous_ = ::signal(SIGXFSZ, SIG_IGN);  // as the program does
  }
  ~FullDisk() override {
    ::signal(SIGXFSZ, previous_);
    reserves_space = true;
  }

  std::filesystem::path Disk() const { return Output().parent_path(); }

  // What a run that nothing disturbs writes.
  std::map<std::string, std::string> Expected() {
    EXPECT_TRUE(Run().ok());
    auto files = FilesOf(Output());
    std::filesystem::remove_all(Output());
    return files;
  }

  // Of a run that `result` is of, and that left what goes on.
  void ExpectNamed(const absl::StatusOr<Totals>& result, const std::string& reason) {
    EXPECT_EQ(result.status().code(), absl::StatusCode::kResourceExhausted) << result.status();
    EXPECT_THAT(std::string(result.status().message()),
                AllOf(HasSubstr(Partial().string() + "/"), HasSubstr(reason),
                      HasSubstr("; the output needs "),
                      HasSubstr("; once there is room, the same command goes on")));
    EXPECT_FALSE(std::filesystem::exists(Output()));
    EXPECT_TRUE(std::filesystem::exists(Partial()));
  }

 private:
  sighandler_t previous_;
};

// Of the size of a file; the disk's own is below. A limit of 0 stops the journal, too.
TEST_F(FullDisk, ALimitThatComesInTheMiddleIsNamedAndTheSameCommandGoesOn) {
  const auto expected = Expected();
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  for (const rlim_t bytes : {0, 50'000}) {
    for (int at = 0; at < num_matrices_; at += 4) {
      SCOPED_TRACE(fmt::format("{} bytes from matrix {} on", bytes, at));
      const rlimit small = {.rlim_cur = bytes, .rlim_max = before.rlim_max};
      const auto failed = Run({}, at, [&] { ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0); });
      ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
      ExpectNamed(failed,
                  "cannot be written: File too large; the limit on a file's size "
                  "(ulimit -f) is 0.0 MiB");
      const auto resumed = Run();
      ASSERT_TRUE(resumed.ok()) << resumed.status();
      EXPECT_EQ(num_made_ + num_replayed_, num_matrices_);
      EXPECT_EQ(FilesOf(Output()), expected);
      std::filesystem::remove_all(Output());
    }
  }
}

TEST_F(FullDisk, ANewRunWhoseFirstJournalCannotBeWrittenStandsInNobodysWay) {
  const auto expected = Expected();
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit none = {.rlim_cur = 0, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &none), 0);
  const auto failed = Run();
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  ExpectNamed(failed, "quantize-journal.json.new: cannot be written: File too large");
  EXPECT_TRUE(std::filesystem::exists(Partial() / "quantize-journal.json.new"));
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(FilesOf(Output()), expected);
}

void WriteText(const char* path, const std::string& text) {
  const UniqueFd file(::open(path, O_WRONLY | O_CLOEXEC));
  EXPECT_EQ(::write(file.get(), text.data(), text.size()), std::ssize(text)) << path;
}

// A small disk of one's own; false where this is not allowed. REQUIRES: one thread.
bool MountDisk(const std::filesystem::path& path) {
  std::filesystem::create_directories(path);
  const uid_t user = ::getuid();
  const gid_t group = ::getgid();
  if (::unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0) return false;
  WriteText("/proc/self/setgroups", "deny");
  WriteText("/proc/self/uid_map", fmt::format("0 {} 1", user));
  WriteText("/proc/self/gid_map", fmt::format("0 {} 1", group));
  // What a run wants to be free for small files at its beginning, and some more.
  return ::mount("none", path.c_str(), "tmpfs", 0, "size=40m") == 0;
}

// Fills the disk but for so many bytes.
void Fill(const std::filesystem::path& file, int64_t free_bytes) {
  const UniqueFd fd(::open(file.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600));
  const std::string block(4096, 'x');
  int64_t size = 0;
  while (::write(fd.get(), block.data(), block.size()) == std::ssize(block)) {
    size += std::ssize(block);
  }
  EXPECT_EQ(errno, ENOSPC);
  EXPECT_EQ(::ftruncate(fd.get(), size - free_bytes), 0);
}

TEST_F(FullDisk, AFullDiskInTheMiddleIsNamedAndTheSameCommandGoesOn) {
  constexpr int kNotAllowed = 77;
  struct Case {
    int at;
    int64_t free_bytes;
  };
  const auto run_cases = [&] {
    if (!MountDisk(Disk())) return kNotAllowed;
    const auto expected = Expected();
    reserves_space = false;
    for (const Case& full : {Case{0, 0}, {3, 0}, {3, 20'480}, {9, 0}, {9, 40'960}, {20, 0}}) {
      SCOPED_TRACE(fmt::format("{} bytes free from matrix {} on", full.free_bytes, full.at));
      const auto failed = Run({}, full.at, [&] { Fill(Disk() / "filler", full.free_bytes); });
      ExpectNamed(failed, "cannot be written: No space left on device; 0.0 MiB are free");
      std::filesystem::remove(Disk() / "filler");
      const auto resumed = Run();
      EXPECT_TRUE(resumed.ok()) << resumed.status();
      EXPECT_EQ(num_made_ + num_replayed_, num_matrices_);
      EXPECT_EQ(num_replayed_ > 0, full.at > 1) << "what was committed is not made again";
      EXPECT_TRUE(FilesOf(Output()) == expected);
      std::filesystem::remove_all(Output());
    }
    return HasFailure() ? 1 : 0;
  };
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) ::_exit(run_cases());
  int state = 0;
  ASSERT_EQ(::waitpid(child, &state, 0), child);
  ASSERT_TRUE(WIFEXITED(state));
  if (WEXITSTATUS(state) == kNotAllowed) GTEST_SKIP() << "no disk may be mounted here";
  EXPECT_EQ(WEXITSTATUS(state), 0);
}

}  // namespace
}  // namespace wintserve::quantizer
