// The file of --config: one mapping from setting names to values.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace wintserve {

struct YamlEntry {
  std::string key;                  // as written
  int line = 0;                     // from 1
  std::vector<std::string> values;  // one for a scalar, several for a list; a mapping becomes JSON
};

// Entries in the order of the file; a null value counts as absent. INVALID_ARGUMENT or NOT_FOUND
// with "FILE:LINE: reason" or "FILE: reason".
absl::StatusOr<std::vector<YamlEntry>> ReadYamlFile(const std::string& path);

}  // namespace wintserve
