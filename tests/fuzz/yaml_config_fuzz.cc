// The file of --config, up to the effective options.
#include <nlohmann/json.hpp>
#include <string>

#include "common/check.h"
#include "common/config/command_line.h"
#include "common/config/serve_options_json.h"
#include "common/config/yaml_file.h"
#include "tests/fuzz/fuzz_target.h"
#include "tests/fuzz/input_dir.h"

namespace wintserve {

void FuzzInput(std::string_view input) {
  static const InputDir dir;
  const std::string path = dir.Write("serve.yaml", input).string();
  const auto entries = ReadYamlFile(path);
  CHECK(entries.ok() || absl::IsInvalidArgument(entries.status()), "{}",
        entries.status().ToString());
  const CommandLine command =
      ParseCommandLine({"serve", "--config", path}, [](const char*) { return nullptr; });
  if (command.verb.has_value()) {
    CHECK(entries.ok());
    // What starts the processes can be handed to them.
    const auto again = ServeOptionsFromJson(ServeOptionsToJson(command.options));
    CHECK(again.ok(), "{}", again.status().ToString());
  } else {
    CHECK(command.error.empty() != command.print.empty());
    CHECK(command.error.find('\n') == std::string::npos, "{}", command.error);
  }
}

}  // namespace wintserve
