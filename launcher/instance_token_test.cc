#include "launcher/instance_token.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

namespace wintserve {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

const char* const kDigits = "00ff8123456789abcdefABCDEF00000000000000000000000000000000000000";

class InstanceToken : public testing::Test {
 protected:
  ~InstanceToken() override { ::unlink(options_.queue_token_file.c_str()); }

  absl::StatusOr<std::string> TokenOf(const std::string& text, mode_t mode = 0600) {
    options_.queue_token_file = testing::TempDir() + "instance_token." + std::to_string(::getpid());
    std::ofstream(options_.queue_token_file) << text;
    EXPECT_EQ(::chmod(options_.queue_token_file.c_str(), mode), 0);
    return MakeInstanceToken(options_, &warning_);
  }

  ServeOptions options_;
  std::string warning_;
};

TEST_F(InstanceToken, IsDrawnAnewEachTime) {
  const auto first = MakeInstanceToken(options_, &warning_);
  const auto second = MakeInstanceToken(options_, &warning_);
  ASSERT_TRUE(first.ok() && second.ok());
  EXPECT_EQ(first->size(), 32u);
  EXPECT_EQ(second->size(), 32u);
  EXPECT_NE(*first, *second);
}

TEST_F(InstanceToken, ComesFromAFile) {
  for (const std::string end : {"", "\n"}) {
    const auto token = TokenOf(kDigits + end);
    ASSERT_TRUE(token.ok()) << token.status();
    EXPECT_EQ(token->size(), kTokenBytes);
    EXPECT_EQ(token->substr(0, 4), std::string("\x00\xff\x81\x23", 4));
    EXPECT_EQ(warning_, "");
  }
  ASSERT_TRUE(TokenOf(kDigits, 0644).ok());
  EXPECT_THAT(warning_, HasSubstr("every user of this machine can read it (mode 0644)"));
  EXPECT_THAT(warning_, Not(HasSubstr("00ff81")));
}

TEST_F(InstanceToken, AFileWithAnythingElseIsRefusedWithoutRepeatingIt) {
  const std::string digits = kDigits;
  for (const std::string& text :
       {std::string(), std::string("\n"), digits.substr(1), digits + "0", digits + "\n\n",
        digits + "\n0", "0x" + digits.substr(2), "g" + digits.substr(1), " " + digits.substr(1)}) {
    const absl::Status status = TokenOf(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_EQ(status.message(),
              "--queue-token-file: " + options_.queue_token_file +
                  ": must hold 64 hexadecimal digits (openssl rand -hex 32 makes them)");
  }
}

TEST_F(InstanceToken, AFileThatCannotBeReadIsNamed) {
  options_.queue_token_file = testing::TempDir() + "no-such-token";
  EXPECT_EQ(MakeInstanceToken(options_, &warning_).status().message(),
            "--queue-token-file: " + options_.queue_token_file + ": No such file or directory");
  options_.queue_token_file = testing::TempDir();
  EXPECT_THAT(std::string(MakeInstanceToken(options_, &warning_).status().message()),
              HasSubstr("is not a regular file"));
}

}  // namespace
}  // namespace wintserve
