// What an output's journal says.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace wintserve::quantizer {

// Everything that the bytes of the output depend on, as names and values of the user's: options,
// digests of the source checkpoint and the calibration text, the program's version. Two runs whose
// lists are equal write the same bytes.
using RunIdentity = std::vector<std::pair<std::string, std::string>>;

struct Journal {
  RunIdentity identity;
  // Of each step that is on the disk: of its tensors' bytes, so that a journal that says too much,
  // and bytes that a disk has lost, are found.
  std::vector<uint64_t> digests;
  nlohmann::json notes;  // null: none
};

std::string JournalText(const Journal& journal);

// Nothing if it is none.
std::optional<Journal> ParseJournal(const std::string& text);

// "--scheme was wint2 and is wint4, …"; empty if no name has another value.
std::string Differences(const RunIdentity& before, const RunIdentity& now);

}  // namespace wintserve::quantizer
