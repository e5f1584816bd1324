// Command lines as tests write them.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "common/config/command_line.h"
#include "common/exit_code.h"

namespace wintserve::testing {

using Args = std::vector<std::string>;
using Environment = std::map<std::string, std::string>;

inline CommandLine Parse(const Args& args, const Environment& environment = {}) {
  return ParseCommandLine(args, [&environment](const char* name) -> const char* {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  });
}

inline CommandLine Serve(Args args, const Environment& environment = {}) {
  args.insert(args.begin(), "serve");
  return Parse(args, environment);
}

// `serve` with these is refused with one line that has `expected` in it.
inline void ExpectOneLineError(const Args& args, const std::string& expected) {
  const CommandLine command = Serve(args);
  SCOPED_TRACE(command.error);
  EXPECT_EQ(command.exit_code, kExitUsage);
  EXPECT_FALSE(command.verb.has_value());
  EXPECT_THAT(command.error, ::testing::HasSubstr(expected));
  EXPECT_EQ(command.error.find('\n'), std::string::npos);
  EXPECT_LT(command.error.size(), 400u);
}

}  // namespace wintserve::testing
