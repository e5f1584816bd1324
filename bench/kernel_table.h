// Where the device's time went: a table of the kernels that ran in a stretch of time. Plain
// functions without a device.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace wintserve::bench {

// One kernel, copy or fill that ran on the device, by the device's clock in nanoseconds.
struct KernelRun {
  std::string name;
  uint64_t begin_ns = 0;
  uint64_t end_ns = 0;
};

// Of all runs of one name.
struct KernelRow {
  std::string name;
  int64_t count = 0;
  int64_t run_ns = 0;    // sum of the runs' own times, the same time twice where two overlap
  int64_t alone_ns = 0;  // what was left of them behind all runs that had begun before
  int64_t gap_ns = 0;    // in which nothing ran, right before them
};

struct KernelTable {
  std::vector<KernelRow> rows;  // the largest alone + gap first
  int64_t count = 0;
  int64_t run_ns = 0;
  int64_t alone_ns = 0;  // alone + gap is the time from the first begin to the last end
  int64_t gap_ns = 0;
};

// In any order of runs. An end before its begin counts as no time.
KernelTable MakeKernelTable(std::vector<KernelRun> runs);

// The table's text, per step: a line a row, then the sum. num_steps: at least 1.
std::string KernelTableText(const KernelTable& table, int num_steps);

// "void ns::(anonymous namespace)::Kernel<ns::Codec, 4>(ns::Params)" is "Kernel<Codec, 4>".
std::string ShortKernelName(std::string_view demangled);

}  // namespace wintserve::bench
