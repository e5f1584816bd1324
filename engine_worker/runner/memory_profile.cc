#include "engine_worker/runner/memory_profile.h"

#include <fmt/format.h>

namespace wintserve {
namespace {

std::string Gib(int64_t bytes) {
  return fmt::format("{:.2f} GiB", static_cast<double>(bytes) / (int64_t{1} << 30));
}

int64_t NumBlocksNeeded(const KvDemand& demand) {
  return demand.num_blocks_override.value_or((demand.max_model_len + demand.block_size_tokens - 1) /
                                             demand.block_size_tokens);
}

std::string Share(const MemoryProfile& profile) {
  return fmt::format("--gpu-memory-utilization {:g} of {} allows {}", profile.utilization,
                     Gib(profile.total), Gib(profile.allowed()));
}

std::string Parts(const MemoryProfile& profile) {
  return fmt::format(
      "weights {}, workspace {}, scratch {}, CUDA graphs {}{}, others {}", Gib(profile.weights),
      Gib(profile.workspace), Gib(profile.scratch), Gib(profile.graphs),
      profile.group > 0 ? fmt::format(", group of ranks {}", Gib(profile.group)) : "",
      Gib(profile.other));
}

// What would leave more, the likeliest first.
std::string Remedies(const KvDemand& demand) {
  std::string remedies = "lower --max-num-batched-tokens or --max-num-seqs, ";
  if (!demand.has_8_bit_cache) remedies += "set --kv-cache-dtype int8, ";
  return remedies + "or use more ranks (--tensor-parallel-size)";
}

}  // namespace

int64_t KvBytes(const MemoryProfile& profile, const KvDemand& demand) {
  const int64_t limit = demand.num_blocks_override.has_value() ? profile.total : profile.allowed();
  return limit - profile.taken();
}

absl::Status CheckWeightsFit(const MemoryProfile& profile) {
  const int64_t missing = profile.other + profile.weights - profile.allowed();
  if (missing <= 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(fmt::format(
      "the model's weights do not fit: {} a rank beside {} that is taken already, {}: {} too much; "
      "use more ranks (--tensor-parallel-size){}",
      Gib(profile.weights), Gib(profile.other), Share(profile), Gib(missing),
      profile.utilization < 1 ? " or raise --gpu-memory-utilization" : ""));
}

absl::Status CheckKvFits(const MemoryProfile& profile, const KvDemand& demand) {
  const int64_t num_blocks = NumBlocksNeeded(demand);
  const int64_t left = KvBytes(profile, demand);
  const int64_t missing = num_blocks * demand.block_bytes - left;
  if (missing <= 0) return absl::OkStatus();
  if (demand.num_blocks_override.has_value()) {
    return absl::ResourceExhaustedError(fmt::format(
        "--num-gpu-blocks-override {} does not fit: blocks of {} KiB, {} of {} are taken ({}): {} "
        "too much; lower it, {}",
        num_blocks, demand.block_bytes >> 10, Gib(profile.taken()), Gib(profile.total),
        Parts(profile), Gib(missing), Remedies(demand)));
  }
  return absl::ResourceExhaustedError(fmt::format(
      "no room for the KV cache of one sequence of --max-model-len {}, {}: {}, of which {} are "
      "taken ({}): {} too little; raise --gpu-memory-utilization, lower --max-model-len, {}",
      demand.max_model_len, Gib(num_blocks * demand.block_bytes), Share(profile),
      Gib(profile.taken()), Parts(profile), Gib(missing), Remedies(demand)));
}

absl::Status ExplainStepsThatDoNotFit(const absl::Status& measured, const MemoryProfile& profile) {
  if (!absl::IsResourceExhausted(measured)) return measured;
  return absl::ResourceExhaustedError(fmt::format(
      "the largest step does not fit on the device beside weights {}, workspace {}, others {} of "
      "{}: {}; lower --max-num-batched-tokens or --max-num-seqs, or use more ranks "
      "(--tensor-parallel-size)",
      Gib(profile.weights), Gib(profile.workspace), Gib(profile.other), Gib(profile.total),
      std::string(measured.message())));
}

std::vector<std::string> DescribeMemory(const MemoryProfile& profile, const KvDemand& demand) {
  const int64_t left = KvBytes(profile, demand);
  std::vector<std::string> lines = {
      fmt::format("memory: {} of the device, {}", Gib(profile.total), Share(profile)),
      fmt::format("memory: {} taken before (driver, other processes)", Gib(profile.other)),
      fmt::format("memory: {} weights", Gib(profile.weights)),
      fmt::format("memory: {} workspace of the largest step", Gib(profile.workspace)),
      fmt::format("memory: {} scratch of its operators", Gib(profile.scratch)),
      fmt::format("memory: {} kept for CUDA graphs", Gib(profile.graphs))};
  if (profile.group > 0) {
    lines.push_back(fmt::format("memory: {} kept for the group of ranks", Gib(profile.group)));
  }
  lines.push_back(fmt::format("memory: {} left for KV blocks, {} of {} KiB", Gib(left),
                              left / demand.block_bytes, demand.block_bytes >> 10));
  return lines;
}

}  // namespace wintserve
