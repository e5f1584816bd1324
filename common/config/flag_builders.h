// Makes the rows of the flag table. Private to common/config.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "common/config/flag.h"

namespace wintserve {

inline constexpr double kNoLimit = static_cast<double>(std::numeric_limits<int64_t>::max());

inline ServeOptions& Options(Draft& draft) { return draft.command->options; }

// The others are made of this one.
Flag Custom(const char* name, const char* group, FlagType type, std::string default_text,
            const char* help, std::function<absl::Status(const FlagValue&, Draft&)> apply);

// These set one field of the options, whose default the help shows.
Flag Text(const char* name, const char* group, std::string ServeOptions::*field, const char* help,
          std::vector<std::string> choices = {});
// An IPv4 address, or localhost, which becomes one.
Flag Address(const char* name, const char* group, std::string ServeOptions::*field,
             const char* help);
Flag Switch(const char* name, const char* group, bool ServeOptions::*field, const char* help);
Flag Integer(const char* name, const char* group, int64_t min, int64_t max,
             int ServeOptions::*field, const char* help);
Flag Integer(const char* name, const char* group, int64_t min, int64_t max,
             int64_t ServeOptions::*field, const char* help);
Flag Number(const char* name, const char* group, double min, double max,
            double ServeOptions::*field, const char* help);
// Written in seconds, kept in milliseconds.
Flag Seconds(const char* name, const char* group, double min, double max,
             int64_t ServeOptions::*field, const char* help);

Flag ServeOnly(Flag flag);
Flag Repeatable(Flag flag);
Flag Bounded(double min, double max, Flag flag);

// To the nearest, but what is not zero stays so.
inline int64_t MillisecondsOf(double seconds) {
  return seconds > 0 ? std::max<int64_t>(1, std::llround(seconds * 1000)) : 0;
}

// FastDeploy's flags that set nothing here.
void AddCompatibilityFlags(std::vector<Flag>* flags);

// Who may reach the queue ports, and how: queue_flags.cc.
void AddQueueFlags(const char* group, std::vector<Flag>* flags);

}  // namespace wintserve
