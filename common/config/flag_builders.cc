#include "common/config/flag_builders.h"

#include <arpa/inet.h>
#include <fmt/format.h>

namespace wintserve {
namespace {

template <typename Field>
Flag IntegerFlag(const char* name, const char* group, int64_t min, int64_t max,
                 Field ServeOptions::*field, const char* help) {
  return Bounded(static_cast<double>(min), static_cast<double>(max),
                 Custom(name, group, FlagType::kInteger, fmt::format("{}", ServeOptions().*field),
                        help, [field](const FlagValue& value, Draft& draft) {
                          Options(draft).*field = static_cast<Field>(value.integer);
                          return absl::OkStatus();
                        }));
}

}  // namespace

Flag Custom(const char* name, const char* group, FlagType type, std::string default_text,
            const char* help, std::function<absl::Status(const FlagValue&, Draft&)> apply) {
  Flag flag;
  flag.name = name;
  flag.group = group;
  flag.type = type;
  flag.default_text = std::move(default_text);
  flag.help = help;
  flag.apply = std::move(apply);
  return flag;
}

Flag Text(const char* name, const char* group, std::string ServeOptions::*field, const char* help,
          std::vector<std::string> choices) {
  Flag flag = Custom(name, group, FlagType::kText, ServeOptions().*field, help,
                     [field](const FlagValue& value, Draft& draft) {
                       Options(draft).*field = value.text;
                       return absl::OkStatus();
                     });
  flag.choices = std::move(choices);
  return flag;
}

Flag Address(const char* name, const char* group, std::string ServeOptions::*field,
             const char* help) {
  return Custom(name, group, FlagType::kText, ServeOptions().*field, help,
                [field](const FlagValue& value, Draft& draft) {
                  const std::string host = value.text == "localhost" ? "127.0.0.1" : value.text;
                  in_addr address;
                  if (::inet_pton(AF_INET, host.c_str(), &address) != 1) {
                    return absl::InvalidArgumentError(fmt::format(
                        "must be an IPv4 address or localhost (got {})", ForErrorLine(value.text)));
                  }
                  Options(draft).*field = host;
                  return absl::OkStatus();
                });
}

Flag Switch(const char* name, const char* group, bool ServeOptions::*field, const char* help) {
  return Custom(name, group, FlagType::kSwitch, ServeOptions().*field ? "true" : "false", help,
                [field](const FlagValue& value, Draft& draft) {
                  Options(draft).*field = value.on;
                  return absl::OkStatus();
                });
}

Flag Integer(const char* name, const char* group, int64_t min, int64_t max,
             int ServeOptions::*field, const char* help) {
  return IntegerFlag(name, group, min, max, field, help);
}

Flag Integer(const char* name, const char* group, int64_t min, int64_t max,
             int64_t ServeOptions::*field, const char* help) {
  return IntegerFlag(name, group, min, max, field, help);
}

Flag Number(const char* name, const char* group, double min, double max,
            double ServeOptions::*field, const char* help) {
  return Bounded(min, max,
                 Custom(name, group, FlagType::kNumber, fmt::format("{:g}", ServeOptions().*field),
                        help, [field](const FlagValue& value, Draft& draft) {
                          Options(draft).*field = value.number;
                          return absl::OkStatus();
                        }));
}

Flag Seconds(const char* name, const char* group, double min, double max,
             int64_t ServeOptions::*field, const char* help) {
  const double seconds = static_cast<double>(ServeOptions().*field) / 1000;
  return Bounded(min, max,
                 Custom(name, group, FlagType::kNumber, fmt::format("{:g}", seconds), help,
                        [field](const FlagValue& value, Draft& draft) {
                          Options(draft).*field = MillisecondsOf(value.number);
                          return absl::OkStatus();
                        }));
}

Flag ServeOnly(Flag flag) {
  flag.serve_only = true;
  return flag;
}

Flag Repeatable(Flag flag) {
  flag.accumulates = true;
  return flag;
}

Flag Bounded(double min, double max, Flag flag) {
  flag.min = min;
  flag.max = max;
  return flag;
}

}  // namespace wintserve
