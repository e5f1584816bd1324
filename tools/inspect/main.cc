// `wintserve inspect`: what a checkpoint is, whether it is whole, and whether it fits.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <thread>

#include "common/exit_code.h"
#include "common/log.h"
#include "common/progress.h"
#include "tools/inspect/report.h"
#include "tools/inspect/verify.h"

namespace wintserve::inspect {
namespace {

struct Arguments {
  InspectOptions inspect;
  FitOptions fit;
  std::string device = "cuda";
  std::string kv_cache_dtype = "auto";
  bool verify = false;
  bool json = false;
  int threads = 0;  // 0: every core
};

// CLI::Range lets pass what is not a number.
std::string RefuseNan(const std::string& text) {
  double value = 0;
  const bool is_nan = CLI::detail::lexical_cast(text, value) && std::isnan(value);
  return is_nan ? fmt::format("Value {} is not a number", text) : "";
}

void Declare(CLI::App& app, Arguments& arguments) {
  app.add_option("DIR", arguments.inspect.dir, "Directory of the model")->required();
  app.add_flag("--verify", arguments.verify,
               "Read every tensor and name those that hold what no model does");
  app.add_flag("--json", arguments.json, "Print one JSON object; sizes are bytes");
  app.add_option("--tensor-parallel-size", arguments.inspect.tensor_parallel_size,
                 "Ranks; by default 1, or what the checkpoint is split for")
      ->check(CLI::Range(1, 1024));
  app.add_option("--memory-gib", arguments.fit.memory_gib,
                 "Say whether the model fits so much memory: of each GPU, or of the host")
      ->check(CLI::Range(0.001, 1e6))
      ->check(RefuseNan);
  app.add_option("--device", arguments.device, "Whose memory that is")
      ->check(CLI::IsMember({"cuda", "cpu"}))
      ->capture_default_str();
  app.add_option("--gpu-memory-utilization", arguments.fit.utilization,
                 "The share of a GPU's memory that may be used")
      ->check(CLI::Range(0.01, 1.0))
      ->check(RefuseNan)
      ->capture_default_str();
  app.add_option("--max-model-len", arguments.fit.max_model_len, "Tokens of the longest sequence")
      ->check(CLI::Range(1, 1 << 30))
      ->capture_default_str();
  app.add_option("--kv-cache-dtype", arguments.kv_cache_dtype, "Of a GPU; on a CPU it is float32")
      ->check(CLI::IsMember({"auto", "bfloat16", "int8"}))
      ->capture_default_str();
  app.add_option("--threads", arguments.threads, "Of --verify; by default one for each core")
      ->check(CLI::Range(1, 4096));
}

void Verify(const Arguments& arguments, Report& report) {
  const int num_threads = arguments.threads > 0
                              ? arguments.threads
                              : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  Progress progress({.label = "verifying", .total = report.total_file_bytes()});
  AddVerified(
      VerifyTensors(*report.opened, num_threads, [&](int64_t bytes) { progress.Add(bytes); }),
      report);
}

int Fail(const absl::Status& status) {
  fmt::print(stderr, "error: {}\n", std::string(status.message()));
  return kExitCheckpoint;
}

int Run(Arguments arguments) {
  InitLog("inspect", "error");  // the report has all that loading would warn of
  if (arguments.fit.memory_gib > 0) {
    arguments.fit.on_cpu = arguments.device == "cpu";
    arguments.fit.kv_cache = arguments.kv_cache_dtype == "int8"
                                 ? kernels::plan::KvCacheKind::kInt8
                                 : kernels::plan::KvCacheKind::kBfloat16;
    arguments.inspect.fit = arguments.fit;
  }
  absl::StatusOr<Report> report = Inspect(arguments.inspect);
  if (!report.ok()) return Fail(report.status());
  if (arguments.verify) {
    if (!report->opened) {
      return Fail(absl::NotFoundError(
          fmt::format("{}: no weights to verify, config.json alone", report->dir)));
    }
    Verify(arguments, *report);
  }
  const std::string text =
      arguments.json ? ToJson(*report) : ToText(*report, ::isatty(STDOUT_FILENO) == 1);
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    return kExitInternal;
  }
  if (!report->is_whole()) return kExitCheckpoint;
  return report->fit && !report->fit->fits ? kExitUnavailable : kExitOk;
}

}  // namespace
}  // namespace wintserve::inspect

int main(int argc, char** argv) {
  CLI::App app(
      "Says what the checkpoint in DIR is: formats, sizes, the order of its WINT2 rows, and "
      "whether every tensor that a model needs is there.\n"
      "Exit codes: 0 whole, 64 a flag, 66 a problem with the checkpoint, 69 does not fit "
      "--memory-gib.",
      "wintserve inspect");
  wintserve::inspect::Arguments arguments;
  wintserve::inspect::Declare(app, arguments);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    const bool is_help = error.get_exit_code() == 0;
    app.exit(error);
    return is_help ? wintserve::kExitOk : wintserve::kExitUsage;
  }
  return wintserve::inspect::Run(arguments);
}
