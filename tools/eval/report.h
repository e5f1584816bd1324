// What came out, for people and for programs.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/status.h"
#include "tools/eval/evaluate.h"
#include "tools/eval/options.h"

namespace wintserve::eval {

// One row a measure, values with standard errors; columns are aligned, and fit 80 columns. A long
// name of a file lacks its beginning.
std::string Table(const Report& report);

// {"model", "server" or "checkpoint", …, "tasks": [{"task", "file", "items", "tokens",
// "measures": {NAME: {"value", "standard_error"}}, "seconds"}]}; a standard error that is not
// known is null.
nlohmann::ordered_json ToJson(const Report& report, const Options& options);

// INVALID_ARGUMENT: WriteJson will not be able to write there, as far as trying tells.
absl::Status CheckJsonPlace(const std::string& path);

// Writes the report beside its place and moves it there, so that what is there is whole; to a
// device or a pipe as it is.
absl::Status WriteJson(const nlohmann::ordered_json& report, const std::string& path);

}  // namespace wintserve::eval
