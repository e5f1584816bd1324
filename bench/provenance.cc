#include "bench/provenance.h"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <chrono>
#include <fstream>
#include <thread>

#include "kernels/cpu/matmul.h"

namespace wintserve::bench {
namespace {

std::string CpuModel() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t value = line.find(": ");
    if (line.starts_with("model name") && value != std::string::npos) return line.substr(value + 2);
  }
  return "unknown CPU";
}

}  // namespace

std::string DeviceDescription() {
  return fmt::format("{}, {} cores, {}", CpuModel(), std::thread::hardware_concurrency(),
                     kernels::cpu::SimdTargetName());
}

std::string Today() { return fmt::format("{:%F}", fmt::gmtime(std::chrono::system_clock::now())); }

}  // namespace wintserve::bench
