// Runs that end before their time, and those that go on from what they leave.
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tools/quantizer/output/output_test_util.h"

namespace {
std::atomic<bool> next_fsync_fails = false;
std::function<void()> before_next_flock;
}  // namespace

// Stands in for the C library's: what another process does just before it.
extern "C" int flock(int fd, int operation) {
  if (before_next_flock) std::exchange(before_next_flock, nullptr)();
  return static_cast<int>(::syscall(SYS_flock, fd, operation));
}

// Stands in for the C library's: a disk whose errors are told once, as Linux does.
extern "C" int fsync(int fd) {
  if (!next_fsync_fails.exchange(false)) return static_cast<int>(::syscall(SYS_fsync, fd));
  errno = EIO;
  return -1;
}

namespace wintserve::quantizer {
namespace {

using ::testing::AllOf;
using testing::FilesOf;
using ::testing::HasSubstr;
using testing::Job;
using testing::RunJob;

class Resume : public testing::ConversionTest {
 protected:
  // A run in a process that ends with SIGKILL before matrix `at`.
  void RunAndKill(int at) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      (void)Run({}, at, [] { ::raise(SIGKILL); });
      ::_exit(0);
    }
    int state = 0;
    ASSERT_EQ(::waitpid(child, &state, 0), child);
    ASSERT_TRUE(WIFSIGNALED(state) && WTERMSIG(state) == SIGKILL);
  }

  // Of those with tensors.
  std::filesystem::path FirstFile() const {
    std::filesystem::path first;
    for (const auto& [name, bytes] : FilesOf(Partial())) {
      if (name.starts_with("model-00001-of-")) first = Partial() / name;
    }
    return first;
  }

  std::string ErrorOf(const absl::StatusOr<Totals>& result) {
    EXPECT_FALSE(result.ok());
    return std::string(result.status().message());
  }
};

TEST_F(Resume, AKilledRunGoesOnAndWritesTheSameBytes) {
  const auto whole = Run();
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(num_made_, num_matrices_);
  const auto expected = FilesOf(Output());
  for (int at = 0; at < num_matrices_; ++at) {
    SCOPED_TRACE(at);
    std::filesystem::remove_all(Output());
    RunAndKill(at);
    EXPECT_FALSE(std::filesystem::exists(Output()));
    const auto resumed = Run();
    ASSERT_TRUE(resumed.ok()) << resumed.status();
    EXPECT_EQ(num_made_ + num_replayed_, num_matrices_);
    EXPECT_LE(num_replayed_, at);
    // Layers are committed: 1 embedding, 4 of the dense layer, 9 of each other one, 1 head.
    EXPECT_EQ(num_replayed_, at >= 23 ? 23 : at >= 14 ? 14 : at >= 5 ? 5 : at >= 1 ? 1 : 0);
    EXPECT_EQ(FilesOf(Output()), expected);
    EXPECT_FALSE(std::filesystem::exists(Partial()));
    EXPECT_EQ(resumed->ToJson(), whole->ToJson()) << "errors of both runs are counted";
  }
}

TEST_F(Resume, ARunThatIsKilledAgainAndAgainWritesTheSameBytes) {
  ASSERT_TRUE(Run().ok());
  const auto expected = FilesOf(Output());
  std::filesystem::remove_all(Output());
  for (const int at : {3, 7, 16, 20}) RunAndKill(at);
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(num_replayed_, 14);
  EXPECT_EQ(FilesOf(Output()), expected);
}

TEST_F(Resume, AStopIsCommittedMidLayer) {
  std::atomic<bool> stop = false;
  const auto stopped = Run({.stop = &stop}, 9, [&] { stop = true; });
  EXPECT_EQ(stopped.status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(ErrorOf(stopped), "stopped; the same command goes on with " + Partial().string());
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(num_replayed_, 10) << "the matrix that was worked on is kept";
}

TEST_F(Resume, OtherOptionsAreRefusedUntilTheUserSaysOtherwise) {
  RunAndKill(9);
  const Job other = {.scheme = {.scheme = Scheme::kWint8},
                     .identity = {{"--scheme", "wint8"}, {"--calibration", "a.jsonl"}}};
  const auto refused = Run(other);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ErrorOf(refused),
            Partial().string() +
                ": was begun by another run: --scheme was test and is wint8, --calibration was not "
                "given and is a.jsonl; give the same to go on, or --overwrite-partial to begin "
                "anew");
  EXPECT_EQ(num_made_, 0);
  Job anew = other;
  anew.overwrite_partial = true;
  ASSERT_TRUE(Run(anew).ok());
  EXPECT_EQ(num_made_, num_matrices_);
}

TEST_F(Resume, AnExistingOutputIsNeverTouched) {
  std::filesystem::create_directory(Output());
  const auto result = Run({.overwrite_partial = true});
  EXPECT_EQ(result.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(ErrorOf(result), HasSubstr(Output().string() + ": is there already"));
  EXPECT_TRUE(std::filesystem::is_empty(Output()));
}

TEST_F(Resume, AnOutputThatAppearsMeanwhileIsNotReplaced) {
  const auto result =
      Run({}, num_matrices_ - 1, [&] { std::filesystem::create_directory(Output()); });
  EXPECT_THAT(ErrorOf(result), HasSubstr("cannot be renamed to " + Output().string()));
  EXPECT_TRUE(std::filesystem::is_empty(Output()));
  std::filesystem::remove(Output());
  EXPECT_TRUE(Run().ok());
  EXPECT_EQ(num_made_, 0) << "everything was made already";
}

TEST_F(Resume, AnOutputIsWhereTheSystemLooksForIt) {
  const auto& root = std::filesystem::canonical(dir_.path());
  std::filesystem::create_directories(root / "real" / "deep");
  std::filesystem::create_directory_symlink(root / "real" / "deep", root / "link");
  for (const auto& [output, is] : std::map<std::string, std::string>{{"link/../out", "real/out"},
                                                                     {"link/out", "real/deep/out"},
                                                                     {"new/out/", "new/out"},
                                                                     {"out/.", "out"},
                                                                     {"out//", "out"},
                                                                     {"none/../out", "out"},
                                                                     {"link/..", "real"},
                                                                     {"link", "link"},
                                                                     {"link/", "link"}}) {
    EXPECT_EQ(OutputDir::PartialPath(root / output), root / (is + ".partial")) << output;
  }
  EXPECT_EQ(OutputDir::PartialPath("/"), "/.partial");
}

TEST_F(Resume, ADirectoryOfSomebodyElseIsNotOverwritten) {
  wintserve::testing::WriteFile(Partial() / "precious", "mine");
  for (const bool overwrite : {false, true}) {
    EXPECT_THAT(ErrorOf(Run({.overwrite_partial = overwrite})),
                HasSubstr("is there already and is no output of `wintserve quantize`"));
  }
  EXPECT_EQ(FilesOf(Partial()).at("precious"), "mine");
}

TEST_F(Resume, TwoProcessesDoNotWriteOneOutput) {
  const auto result = Run({}, 5, [&] {
    const auto second = RunJob(Model(), Output(), {});
    EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(ErrorOf(second), HasSubstr("another process is writing it"));
    EXPECT_FALSE(RunJob(Model(), Output(), {.overwrite_partial = true}).ok());
  });
  EXPECT_TRUE(result.ok()) << result.status();
}

// The lock would be one on the directory of the process that has just ended.
TEST_F(Resume, ADirectoryThatIsNotThereAnyMoreIsNotLocked) {
  RunAndKill(9);
  before_next_flock = [&] {
    std::filesystem::rename(Partial(), dir_.path() / "ended");
    std::filesystem::copy(dir_.path() / "ended", Partial());
  };
  EXPECT_THAT(ErrorOf(Run()), HasSubstr("another process is writing it"));
  EXPECT_TRUE(Run().ok());
}

TEST_F(Resume, AnOutputThatWasFinishedMeanwhileIsNotMadeAgain) {
  before_next_flock = [&] { std::filesystem::create_directory(Output()); };
  EXPECT_THAT(ErrorOf(Run()), HasSubstr(Output().string() + ": is there already"));
  EXPECT_EQ(num_made_, 0);
  EXPECT_FALSE(std::filesystem::exists(Partial()));
}

TEST_F(Resume, ADamagedPartialOutputIsRefused) {
  RunAndKill(9);
  const std::filesystem::path file = FirstFile();
  std::filesystem::resize_file(file, 1000);
  EXPECT_THAT(ErrorOf(Run()), AllOf(HasSubstr(file.string()), HasSubstr("--overwrite-partial")));
}

TEST_F(Resume, ADamagedJournalIsRefused) {
  RunAndKill(9);
  const std::filesystem::path path = Partial() / "quantize-journal.json";
  const nlohmann::json journal = nlohmann::json::parse(*ReadFile(path));
  const auto with = [&](const char* name, const nlohmann::json& value) {
    nlohmann::json changed = journal;
    changed[name] = value;
    return changed.dump();
  };
  std::vector<uint64_t> many(99, 1);
  nlohmann::json twice = journal["run"];
  twice.insert(twice.end(), journal["run"].begin(), journal["run"].end());
  for (const std::string& damaged :
       {std::string(), std::string("{}"), std::string("null"), journal.dump().substr(0, 50),
        std::string(2'000'000, '['), with("run", {{1, 2}}), with("run", nullptr),
        with("steps_done", 99), with("steps_done", "7"), with("steps_done", -1),
        with("steps_done", uint64_t{1} << 63), with("digests", nullptr), with("digests", {"x"}),
        nlohmann::json({{"run", journal["run"]}, {"steps_done", 99}, {"digests", many}}).dump()}) {
    wintserve::testing::WriteFile(path, damaged);
    EXPECT_EQ(ErrorOf(Run()), Partial().string() +
                                  ": quantize-journal.json is damaged; --overwrite-partial begins "
                                  "anew")
        << damaged.substr(0, 100);
  }
  wintserve::testing::WriteFile(path, with("run", twice));
  EXPECT_TRUE(Run().ok()) << "nothing differs";
}

// Of a journal that claims too much the bytes are not there, and neither are they on a disk that
// lost them.
TEST_F(Resume, OnlyWhatTheEarlierRunWroteIsTakenUp) {
  RunAndKill(9);
  const std::filesystem::path path = Partial() / "quantize-journal.json";
  nlohmann::json journal = nlohmann::json::parse(*ReadFile(path));
  journal["steps_done"] = journal["steps_done"].get<int>() + 1;
  journal["digests"].push_back(12345);
  wintserve::testing::WriteFile(path, journal.dump());
  const std::string refused = " is not what the earlier run wrote; --overwrite-partial begins anew";
  EXPECT_THAT(ErrorOf(Run()), HasSubstr(refused));
  EXPECT_EQ(num_made_, 0);

  std::filesystem::remove_all(Partial());
  RunAndKill(9);
  const std::filesystem::path first = FirstFile();
  std::string bytes = *ReadFile(first);
  const uint64_t header_bytes =
      static_cast<uint8_t>(bytes[0]) + 256 * static_cast<uint8_t>(bytes[1]);
  bytes[8 + header_bytes] ^= 1;
  wintserve::testing::WriteFile(first, bytes);
  EXPECT_EQ(ErrorOf(Run()), Partial().string() + ": ernie.embed_tokens" + refused);
  EXPECT_TRUE(Run({.overwrite_partial = true}).ok());
}

// A limit on the size of files stands in for a full disk.
TEST_F(Resume, AFullDiskIsNamedBeforeAnythingIsMadeAndLeavesNothingWrong) {
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before = {};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  rlimit small = before;
  small.rlim_cur = 200'000;
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto result = Run();
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_EQ(result.status().code(), absl::StatusCode::kResourceExhausted) << result.status();
  EXPECT_THAT(ErrorOf(result), HasSubstr("cannot be made as large as it will be: File too large"));
  EXPECT_EQ(num_made_, 0);
  EXPECT_TRUE(Run().ok());
}

TEST_F(Resume, WhatADiskFailedToWriteIsNotTakenForWritten) {
  const auto failed = Run({}, 9, [] { next_fsync_fails = true; });
  EXPECT_THAT(ErrorOf(failed), HasSubstr("cannot be synchronised: Input/output error"));
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(num_replayed_, 5) << "the last layer that was synchronised";
}

TEST_F(Resume, ARunThatCannotBeginLeavesOnlyWhatAnEarlierOneHasMade) {
  const auto source = OpenSource(Model());
  ASSERT_TRUE(source.ok()) << source.status();
  const auto target = QuantizedConfig(source->config, {});
  ASSERT_TRUE(target.ok()) << target.status();
  const auto plan = PlanOutput(*target, Job().max_file_bytes);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const auto open_and_remove = [&] {
    auto dir = OutputDir::Open(Output(), *plan, Job().identity, false);
    ASSERT_TRUE(dir.ok()) << dir.status();
    dir->RemoveIfNothingIsDone();
  };
  open_and_remove();
  EXPECT_FALSE(std::filesystem::exists(Partial()));
  RunAndKill(9);
  open_and_remove();
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(num_replayed_, 5);
}

TEST_F(Resume, AModelThatDoesNotFitTheDiskIsRefusedAtOnce) {
  OutputPlan plan;
  plan.files.push_back({"model.safetensors", "", int64_t{1} << 60});
  const auto dir = OutputDir::Open(Output(), plan, {}, false);
  EXPECT_EQ(dir.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(dir.status().message()),
              HasSubstr("GiB are free, the output needs 1073741824.03 GiB"));
  EXPECT_FALSE(std::filesystem::exists(Partial()));
}

TEST_F(Resume, AnErrorOfTheQuantizerLeavesWhatWasMade) {
  class Failing final : public MatrixQuantizer {
   public:
    explicit Failing(MatrixQuantizer* inner) : inner_(inner) {}
    absl::StatusOr<formats::HostMatrix> Next(const MatrixRef& ref, StoredFormat format) override {
      if (ref.role == MatrixRole::kRouter) return absl::InternalError("no");
      return inner_->Next(ref, format);
    }
    absl::Status Replay(const MatrixRef& ref, formats::HostMatrix done) override {
      return inner_->Replay(ref, std::move(done));
    }

   private:
    MatrixQuantizer* const inner_;
  };
  const auto failed =
      RunJob(Model(), Output(),
             {.wrap = [](MatrixQuantizer* inner) { return std::make_unique<Failing>(inner); }});
  EXPECT_EQ(ErrorOf(failed), "ernie.layers.1.mlp.gate: no");
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(num_replayed_, 7) << "embedding, dense layer, attention of the next one";
}

}  // namespace
}  // namespace wintserve::quantizer
