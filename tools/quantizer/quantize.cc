#include "tools/quantizer/quantize.h"

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <utility>

#include "common/exit_code.h"
#include "common/log.h"
#include "common/progress.h"
#include "tools/quantizer/output/convert.h"

namespace wintserve::quantizer {
namespace {

constexpr double kGib = 1 << 30;

QuantizeResult Fail(int exit_code, const absl::Status& status) {
  QuantizeResult result;
  result.exit_code = exit_code;
  result.error = std::string(status.message());
  result.stopped = absl::IsCancelled(status);
  return result;
}

int64_t CountMatrices(const OutputPlan& plan) {
  int64_t count = 0;
  for (const PlannedStep& step : plan.steps) count += std::holds_alternative<MatrixRef>(step.ref);
  return count;
}

int64_t CountMatricesBefore(const OutputPlan& plan, int64_t num_steps) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_steps; ++i) {
    count += std::holds_alternative<MatrixRef>(plan.steps[i].ref);
  }
  return count;
}

RunIdentity SchemeIdentity(const QuantizeOptions& options, const ModelConfig& target,
                           const Source& source) {
  RunIdentity identity = {
      {"wintserve's version", WINTSERVE_VERSION},
      {"the model's digest", source.Digest()},
      {"--scheme", std::string(SchemeName(options.scheme.scheme))},
      {"--dense", target.dense_is_wint8 ? "wint8" : "bf16"},
      {"--max-shard-gib", fmt::format("{}", options.max_shard_gib)},
  };
  if (target.expert_quantization == ExpertQuantization::kW4W2) {
    identity.emplace_back("--wint4-end-layer", fmt::format("{}", target.last_wint4_layer));
    identity.emplace_back("--first-experts", target.first_experts_are_plain ? "bf16" : "wint4");
  }
  return identity;
}

std::string Summary(const QuantizeOptions& options, const Source& source, const OutputPlan& plan,
                    const Totals& totals, double seconds) {
  const KindTotals sum = totals.Sum();
  const double before = static_cast<double>(source.checkpoint->total_bytes());
  const double after = static_cast<double>(plan.file_bytes());
  std::string text = TotalsTable(totals);
  text += fmt::format("{}: {:.3f} GiB in {} {}, {:.1f}% of {:.3f} GiB, {:.3f} bits a weight\n",
                      options.output.string(), after / kGib, plan.files.size(),
                      plan.files.size() == 1 ? "file" : "files", 100 * after / before,
                      before / kGib, sum.bits_per_weight());
  for (const SkippedTensors::Count& count : source.skipped.counts) {
    text +=
        fmt::format("left out: {} {}: {}\n", count.num_tensors,
                    count.num_tensors == 1 ? "tensor" : "tensors", SkipReasonName(count.reason));
  }
  text += fmt::format("took {:.1f} s on {} {}\n", seconds, options.num_threads,
                      options.num_threads == 1 ? "thread" : "threads");
  return text;
}

}  // namespace

QuantizeResult Quantize(const QuantizeOptions& options, const std::atomic<bool>* stop) {
  const auto begin = std::chrono::steady_clock::now();
  const auto source = OpenSource(options.model);
  if (!source.ok()) return Fail(kExitCheckpoint, source.status());
  const auto target = QuantizedConfig(source->config, options.scheme);
  if (!target.ok()) return Fail(kExitUsage, target.status());
  const auto max_file_bytes = static_cast<int64_t>(std::llround(options.max_shard_gib * kGib));
  const auto plan = PlanOutput(*target, max_file_bytes);
  if (!plan.ok()) return Fail(kExitCheckpoint, plan.status());

  RunIdentity identity = SchemeIdentity(options, *target, *source);
  auto of_method = IdentityOf(options.method);
  if (!of_method.ok()) return Fail(kExitUsage, of_method.status());
  identity.insert(identity.end(), of_method->begin(), of_method->end());
  kernels::cpu::ThreadPool pool(options.num_threads);
  // The output first: tokenising a long text only to find it taken would be a pity.
  auto output =
      OutputDir::Open(options.output, *plan, std::move(identity), options.overwrite_partial);
  if (!output.ok()) return Fail(kExitOutput, output.status());
  const auto method = MakeQuantizer(options.method, *source, &pool);
  if (!method.ok()) {
    output->RemoveIfNothingIsDone();
    return Fail(kExitUsage, method.status());
  }

  absl::StatusOr<Totals> totals;
  {
    const int64_t num_before = CountMatricesBefore(*plan, output->num_steps_before());
    Progress progress({.label = "quantizing",
                       .total = CountMatrices(*plan),
                       .noun = "matrices",
                       .done_before = num_before});
    // Lines of the log keep out of the bar's way.
    InitLog("quantize", "info", [&progress](std::string_view line) { progress.Print(line); });
    if (!method->note.empty()) progress.Print(method->note);
    if (num_before > 0) {
      progress.Print(fmt::format("{}: going on after {} of {} matrices", output->partial().string(),
                                 num_before, CountMatrices(*plan)));
    }
    totals = Convert({.source = &*source,
                      .target = &*target,
                      .plan = &*plan,
                      .k_order = options.method.k_order,
                      .quantizer = method->quantizer.get(),
                      .pool = &pool,
                      .output = &*output,
                      .progress = &progress,
                      .stop = stop});
    InitLog("quantize", "warning");
  }
  if (!totals.ok()) {
    const bool is_source = totals.status().code() == absl::StatusCode::kDataLoss ||
                           totals.status().code() == absl::StatusCode::kInvalidArgument;
    return Fail(is_source ? kExitCheckpoint : kExitOutput, totals.status());
  }
  QuantizeResult result;
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  result.summary = Summary(options, *source, *plan, *totals, took.count());
  return result;
}

}  // namespace wintserve::quantizer
