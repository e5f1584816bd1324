#include "tools/eval/report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <iterator>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/read_file.h"
#include "common/temp_dir_test_util.h"
#include "tools/eval/temporary_file_test_util.h"

namespace wintserve::eval {
namespace {

using ::testing::HasSubstr;

std::string MessageOf(const absl::Status& status) { return std::string(status.message()); }

TaskResult SomeResult() {
  TaskResult result;
  result.options = {TaskKind::kPerplexity, "dir/诗.jsonl", 0};
  result.num_items = 1;
  result.num_tokens = 1023;
  result.measures = {{"nats per token", {4.5, std::nullopt}}, {"perplexity", {90.01713, 0.5}}};
  return result;
}

TEST(EvalReport, IsATableWithAlignedColumns) {
  Report report;
  report.tasks = {SomeResult()};
  EXPECT_EQ(Table(report),
            "task        items  tokens  measure           value  ± error\n"
            "perplexity      1    1023  nats per token   4.5000        -\n"
            "诗.jsonl                   perplexity      90.0171   0.5000\n");
}

TEST(EvalReport, FitsATerminalOfEightyColumns) {
  TaskResult chats;
  chats.options = {TaskKind::kChatLoss, "directory/a-long-name-of-a-validation-set.jsonl", 0};
  chats.num_items = 10000;
  chats.num_tokens = 9999999;
  chats.measures = {{"nats per answer token", {17.334, 1.5}},
                    {"perplexity", {33735097.559, 9999.99994}},
                    {"bits per byte", {25.0077, std::nullopt}}};
  TaskResult exact;
  exact.options = {TaskKind::kExact, "诗诗诗诗诗诗诗诗.jsonl", 0};
  exact.num_items = 200;
  exact.measures = {{"accuracy", {0.5, 0.0354}}};
  Report report;
  report.tasks = {chats, exact};
  EXPECT_EQ(Table(report),
            "task                 items   tokens  measure                    value    ± error\n"
            "chat loss            10000  9999999  nats per answer token    17.3340     1.5000\n"
            "…lidation-set.jsonl                  perplexity             3.374e+07  9999.9999\n"
            "                                     bits per byte            25.0077          -\n"
            "exact answers          200        -  accuracy                  0.5000     0.0354\n"
            "…诗诗诗诗诗诗.jsonl\n");
}

TEST(EvalReport, IsJsonWithAllDigits) {
  Report report;
  report.model.name = "poet";
  report.tasks = {SomeResult()};
  Options options;
  options.model = "models/poet";
  const auto json = ToJson(report, options);
  EXPECT_EQ(json["model"], "poet");
  EXPECT_EQ(json["checkpoint"], "models/poet");
  const auto& task = json["tasks"][0];
  EXPECT_EQ(task["task"], "perplexity");
  EXPECT_EQ(task["context_tokens"], 1024);
  EXPECT_EQ(task["measures"]["perplexity"]["value"], 90.01713);
  EXPECT_TRUE(task["measures"]["nats per token"]["standard_error"].is_null());
}

TEST(EvalReport, OfAPlaceThatCannotBeWrittenIsRefusedBeforeTheWork) {
  const TemporaryFile file("");
  EXPECT_TRUE(CheckJsonPlace("report.json").ok());
  EXPECT_TRUE(CheckJsonPlace(file.path()).ok());
  for (const auto& [path, error] : std::vector<std::pair<std::string, std::string>>{
           {"/tmp", "--json: /tmp is a directory, must be a file"},
           {file.path() + "/r.json",
            "--json: cannot write into " + file.path() + ": Not a directory"},
           {"/no-such-directory/r.json",
            "--json: cannot write into /no-such-directory: No such file or directory"}}) {
    EXPECT_EQ(std::string(CheckJsonPlace(path).message()), error);
  }
}

TEST(EvalReport, ThatCannotBeWrittenNamesItsPlaceAndLeavesNothing) {
  const absl::Status status = WriteJson({{"a", 1}}, "/no-such-directory/report.json");
  EXPECT_EQ(MessageOf(status),
            "--json: cannot write /no-such-directory/report.json: No such file or directory");
  EXPECT_EQ(MessageOf(WriteJson({{"a", 1}}, "/dev/full")),
            "--json: cannot write /dev/full: No space left on device");
}

// As root, a report to /dev/null would have taken its place.
TEST(EvalReport, GoesThroughLinksAndIntoWhatIsNoFile) {
  const TempDir dir;
  const std::string file = (dir.path() / "r.json").string();
  const std::string link = (dir.path() / "link").string();
  const std::string null = (dir.path() / "null").string();
  std::filesystem::create_symlink(file, link);
  std::filesystem::create_symlink("/dev/null", null);
  for (const std::string& path : {file, link, null}) {
    EXPECT_TRUE(CheckJsonPlace(path).ok());
    EXPECT_TRUE(WriteJson({{"path", path}}, path).ok());
  }
  EXPECT_TRUE(std::filesystem::is_symlink(link) && std::filesystem::is_symlink(null));
  EXPECT_EQ(ReadFile(file).value(), "{\n \"path\": \"" + link + "\"\n}\n");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(dir.path()), {}), 3);
}

TEST(EvalReport, IsTriedWhereItWillBeWritten) {
  EXPECT_THAT(MessageOf(CheckJsonPlace("/proc/report.json")),
              HasSubstr("--json: cannot write into /proc: "));
}

}  // namespace
}  // namespace wintserve::eval
