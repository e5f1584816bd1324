#include "bench/kernel_table.h"

#include <fmt/format.h>

#include <algorithm>
#include <cctype>
#include <map>

namespace wintserve::bench {
namespace {

bool IsOfIdentifier(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

// What ends with the parameters of a function, without them.
std::string_view WithoutParameters(std::string_view name) {
  if (name.empty() || name.back() != ')') return name;
  int depth = 0;
  for (size_t i = name.size(); i-- > 0;) {
    if (name[i] == ')') ++depth;
    if (name[i] == '(' && --depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace

std::string ShortKernelName(std::string_view demangled) {
  std::string text(WithoutParameters(demangled));
  constexpr std::string_view kUnnamed = "(anonymous namespace)::";
  for (size_t at = text.find(kUnnamed); at != std::string::npos; at = text.find(kUnnamed)) {
    text.erase(at, kUnnamed.size());
  }
  // Every "name::" goes with its name.
  for (size_t at = text.find("::"); at != std::string::npos; at = text.find("::")) {
    size_t begin = at;
    while (begin > 0 && IsOfIdentifier(text[begin - 1])) --begin;
    text.erase(begin, at + 2 - begin);
  }
  if (text.starts_with("void ")) text.erase(0, 5);
  return text;
}

KernelTable MakeKernelTable(std::vector<KernelRun> runs) {
  std::stable_sort(runs.begin(), runs.end(),
                   [](const KernelRun& a, const KernelRun& b) { return a.begin_ns < b.begin_ns; });
  KernelTable table;
  std::map<std::string, KernelRow> rows;
  uint64_t last_end = runs.empty() ? 0 : runs.front().begin_ns;
  for (const KernelRun& run : runs) {
    const uint64_t end = std::max(run.end_ns, run.begin_ns);
    KernelRow& row = rows[run.name];
    ++row.count;
    row.run_ns += static_cast<int64_t>(end - run.begin_ns);
    if (run.begin_ns > last_end) row.gap_ns += static_cast<int64_t>(run.begin_ns - last_end);
    const uint64_t begin = std::max(run.begin_ns, last_end);
    if (end > begin) row.alone_ns += static_cast<int64_t>(end - begin);
    last_end = std::max(last_end, end);
  }
  for (auto& [name, row] : rows) {
    row.name = name;
    table.count += row.count;
    table.run_ns += row.run_ns;
    table.alone_ns += row.alone_ns;
    table.gap_ns += row.gap_ns;
    table.rows.push_back(std::move(row));
  }
  std::stable_sort(table.rows.begin(), table.rows.end(),
                   [](const KernelRow& a, const KernelRow& b) {
                     return a.alone_ns + a.gap_ns > b.alone_ns + b.gap_ns;
                   });
  return table;
}

std::string KernelTableText(const KernelTable& table, int num_steps) {
  const double steps = num_steps;
  const auto span = static_cast<double>(std::max<int64_t>(1, table.alone_ns + table.gap_ns));
  std::string text = fmt::format("{:>7} {:>9} {:>10} {:>10} {:>9} {:>7}  {}\n", "runs", "us a run",
                                 "us a step", "alone", "gap", "share", "kernel");
  const auto add = [&](const KernelRow& row) {
    text += fmt::format("{:7.1f} {:9.2f} {:10.1f} {:10.1f} {:9.1f} {:6.1f}%  {}\n",
                        static_cast<double>(row.count) / steps,
                        1e-3 * static_cast<double>(row.run_ns) /
                            static_cast<double>(std::max<int64_t>(1, row.count)),
                        1e-3 * static_cast<double>(row.run_ns) / steps,
                        1e-3 * static_cast<double>(row.alone_ns) / steps,
                        1e-3 * static_cast<double>(row.gap_ns) / steps,
                        100.0 * static_cast<double>(row.alone_ns + row.gap_ns) / span, row.name);
  };
  for (const KernelRow& row : table.rows) add(row);
  add({"all", table.count, table.run_ns, table.alone_ns, table.gap_ns});
  return text;
}

}  // namespace wintserve::bench
