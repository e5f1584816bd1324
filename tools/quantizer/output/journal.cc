#include "tools/quantizer/output/journal.h"

#include <fmt/format.h>

#include <algorithm>

#include "common/json_depth.h"

namespace wintserve::quantizer {
namespace {

using nlohmann::json;

bool IsPairOfTexts(const json& entry) {
  return entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string();
}

bool IsUnsigned(const json& value) { return value.is_number_unsigned(); }

// Whether there is a list of that name whose entries are all of the kind.
bool IsListOf(const json& object, const char* name, bool (*is_of_kind)(const json&)) {
  const auto found = object.find(name);
  return found != object.end() && found->is_array() &&
         std::all_of(found->begin(), found->end(), is_of_kind);
}

}  // namespace

std::string JournalText(const Journal& journal) {
  json run = json::array();
  for (const auto& [name, value] : journal.identity) run.push_back({name, value});
  const json object = {{"run", std::move(run)},
                       {"steps_done", journal.digests.size()},
                       {"digests", journal.digests},
                       {"notes", journal.notes}};
  return object.dump(2) + "\n";
}

std::optional<Journal> ParseJournal(const std::string& text) {
  if (IsNestedTooDeep(text)) return std::nullopt;
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object() || !IsListOf(object, "run", IsPairOfTexts) ||
      !IsListOf(object, "digests", IsUnsigned) ||
      object.value("steps_done", json()) != object["digests"].size()) {
    return std::nullopt;
  }
  Journal journal;
  for (const json& entry : object["run"]) journal.identity.emplace_back(entry[0], entry[1]);
  journal.digests = object["digests"].get<std::vector<uint64_t>>();
  journal.notes = object.value("notes", json());
  return journal;
}

std::string Differences(const RunIdentity& before, const RunIdentity& now) {
  const auto find = [](const RunIdentity& identity, const std::string& name) {
    const auto it = std::find_if(identity.begin(), identity.end(),
                                 [&](const auto& entry) { return entry.first == name; });
    return it == identity.end() ? std::string("not given") : it->second;
  };
  std::vector<std::string> names;
  for (const RunIdentity* identity : {&before, &now}) {
    for (const auto& [name, value] : *identity) {
      if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
    }
  }
  std::string text;
  for (const std::string& name : names) {
    const std::string was = find(before, name);
    const std::string is = find(now, name);
    if (was == is) continue;
    text += fmt::format("{}{} was {} and is {}", text.empty() ? "" : ", ", name, was, is);
  }
  return text;
}

}  // namespace wintserve::quantizer
