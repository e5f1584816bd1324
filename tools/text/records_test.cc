#include "tools/text/records.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/status_macros.h"
#include "common/temp_dir_test_util.h"

namespace wintserve::tools {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;

class RecordsTest : public ::testing::Test {
 protected:
  std::string Write(const std::string& content) const {
    const std::string path = (dir_.path() / "a.jsonl").string();
    WriteFile(path, content);
    return path;
  }
  // Of reading all of it, with FILE in place of its path.
  std::string ErrorOf(const std::string& content, size_t max_bytes = kMaxRecordBytes) const {
    const std::string path = Write(content);
    const absl::Status status = ForEachRecord(
        path,
        [](const std::string&, const json& record) -> absl::StatusOr<bool> {
          if (record.contains("messages")) RETURN_IF_ERROR(MessagesField(record).status());
          if (record.contains("text")) RETURN_IF_ERROR(TextField(record, "text").status());
          return true;
        },
        max_bytes);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    std::string message(status.message());
    EXPECT_EQ(message.find(path), 0u) << message;
    return message.replace(0, path.size(), "FILE");
  }
  TempDir dir_;
};

TEST_F(RecordsTest, AreReadWithTheirPlacesUntilTheCallerHasEnough) {
  const std::string path = Write("\n{\"n\": 1}\r\n \t\n{\"n\": 2}\n{\"n\": 3}\nno JSON");
  std::vector<std::string> read;
  ASSERT_TRUE(ForEachRecord(path, [&](const std::string& place, const json& record) {
                read.push_back(place + " " + record.dump());
                return record["n"] != 3;
              }).ok());
  EXPECT_THAT(read,
              ElementsAre(path + ":2 {\"n\":1}", path + ":4 {\"n\":2}", path + ":5 {\"n\":3}"));
}

TEST_F(RecordsTest, AFileThatIsMissingIsNamed) {
  const absl::Status status =
      ForEachRecord(dir_.path() / "none", [](const std::string&, const json&) { return true; });
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
}

TEST_F(RecordsTest, ALineThatIsNoObjectIsNamed) {
  EXPECT_EQ(ErrorOf("{}\nnot\n"), "FILE:2: must be a JSON object in UTF-8, got \"not\"");
  EXPECT_EQ(ErrorOf("[1]"), "FILE:1: must be a JSON object in UTF-8, got [1]");
  EXPECT_EQ(ErrorOf("{\"\xff\": 1}"),
            "FILE:1: must be a JSON object in UTF-8, got \"{\\\"\uFFFD\\\": 1}\"");
  EXPECT_EQ(ErrorOf(std::string(100, '[')), "FILE:1: nested deeper than 64 levels");
}

TEST_F(RecordsTest, ALineBeyondTheLimitIsNamedWithItsSize) {
  const std::string six = "{   }\n";
  EXPECT_EQ(ErrorOf(six + "{    }\n" + six, 5), "FILE:2: a line of 6 bytes; allowed: up to 5");
  EXPECT_EQ(ErrorOf(six + std::string(1'000'000, ' ') + "\n", 5),
            "FILE:2: a line of 1000000 bytes; allowed: up to 5");
  EXPECT_EQ(ErrorOf("{    }", 5), "FILE:1: a line of 6 bytes; allowed: up to 5");
  EXPECT_EQ(ErrorOf(std::string(kMaxRecordBytes + 1, ' ')),
            "FILE:1: a line of 16777217 bytes; allowed: up to 16777216");
}

TEST_F(RecordsTest, AWrongFieldIsNamed) {
  EXPECT_EQ(ErrorOf(R"({"text": 1})"), "FILE:1: text: must be a text, got 1");
  EXPECT_EQ(ErrorOf(R"({"messages": "x"})"),
            "FILE:1: messages: must be a list of messages, got \"x\"");
  EXPECT_EQ(ErrorOf(R"({"messages": []})"), "FILE:1: messages: must be a list of messages, got []");
  EXPECT_EQ(ErrorOf(R"({"messages": ["x"]})"), "FILE:1: messages[0]: must be an object, got \"x\"");
  EXPECT_EQ(ErrorOf(R"({"messages": [{"content": "x"}]})"), "FILE:1: messages[0].role: is missing");
  EXPECT_EQ(ErrorOf(R"({"messages": [{"role": "user", "content": 1}]})"),
            "FILE:1: messages[0].content: must be a text, got 1");
}

}  // namespace
}  // namespace wintserve::tools
