#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "tools/inspect/report.h"

namespace wintserve::inspect {
namespace {

constexpr size_t kMostProblems = 20;
constexpr int kLabelColumns = 12;

std::string Bytes(int64_t bytes) {
  constexpr double kKib = 1024;
  const double size = static_cast<double>(bytes);
  if (bytes < 1024) return fmt::format("{} B", bytes);
  if (size < kKib * kKib) return fmt::format("{:.1f} KiB", size / kKib);
  if (size < kKib * kKib * kKib) return fmt::format("{:.1f} MiB", size / kKib / kKib);
  return fmt::format("{:.1f} GiB", size / kKib / kKib / kKib);
}

// 1234567 -> "1,234,567"
std::string Count(int64_t count) {
  const std::string digits = std::to_string(count);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

// "300.5 B": as models are named.
std::string Parameters(int64_t count) {
  const double size = static_cast<double>(count);
  if (count < 10'000) return Count(count);
  if (count < 1'000'000) return fmt::format("{:.1f} K", size / 1e3);
  if (count < 1'000'000'000) return fmt::format("{:.1f} M", size / 1e6);
  return fmt::format("{:.1f} B", size / 1e9);
}

std::string Counted(int64_t count, const char* noun) {
  return fmt::format("{} {}{}", Count(count), noun, count == 1 ? "" : "s");
}

std::string Layers(const LayerRange& range) {
  return range.first == range.last ? std::to_string(range.first)
                                   : fmt::format("{}-{}", range.first, range.last);
}

class TextWriter {
 public:
  TextWriter(const Report& report, bool styled) : report_(report), styled_(styled) {}

  std::string Write() {
    text_ +=
        fmt::format("{}{}{}\n", styled_ ? "\033[1m" : "", report_.dir, styled_ ? "\033[m" : "");
    WriteModel();
    WriteFiles();
    WriteKOrder();
    WriteLayers();
    WriteParts();
    WriteRank();
    if (report_.fit) WriteFit();
    WriteProblems();
    return std::move(text_);
  }

 private:
  void Row(std::string_view label, std::string_view value) {
    text_ += fmt::format("  {:<{}}{}\n", label, kLabelColumns, value);
  }
  void Section(std::string_view title) {
    text_ += fmt::format("\n{}{}{}\n", styled_ ? "\033[1m" : "", title, styled_ ? "\033[m" : "");
  }

  void WriteModel() {
    const ModelConfig& c = report_.config;
    Row("model",
        fmt::format(
            "{}, {} parameters{}", c.architecture, Parameters(report_.sizes.total().num_parameters),
            c.num_experts == 0
                ? ""
                : fmt::format(", {} of them for a token", Parameters(report_.active_parameters))));
    Row("shape",
        fmt::format("{} layers, hidden {}, {} heads of {} ({} KV), vocabulary {}, {} "
                    "positions",
                    c.num_layers, Count(c.hidden_size), c.num_heads, c.head_dim, c.num_kv_heads,
                    Count(c.vocab_size), Count(c.max_position_embeddings)));
    if (c.num_experts == 0) return;
    Row("experts", fmt::format("{} of width {}, {} for a token{}", c.num_experts,
                               Count(c.moe_intermediate_size), c.num_experts_per_token,
                               c.num_shared_experts == 0
                                   ? ""
                                   : fmt::format(" besides {} shared", c.num_shared_experts)));
  }

  void WriteFiles() {
    if (!report_.opened) {
      Row("files", "config.json alone: sizes are what its formats make of its shapes");
      return;
    }
    const CheckpointFiles& opened = *report_.opened;
    int64_t num_tensors = 0;
    for (const FileFacts& file : report_.files) num_tensors += file.num_tensors;
    Row("files",
        fmt::format("{} of {} with {}{}",
                    Counted(static_cast<int64_t>(report_.files.size()), "file"),
                    Bytes(report_.total_file_bytes()), Counted(num_tensors, "tensor"),
                    opened.is_presharded()
                        ? fmt::format(", split for tensor parallel size {}", opened.sets.size())
                        : ""));
    const Layout& layout = opened.layout;
    const bool all = layout.has_fused_qkv && layout.has_fused_gate_up;
    const bool none = !layout.has_fused_qkv && !layout.has_fused_gate_up;
    Row("layout", fmt::format("{}.*, {} matrices {}, head {}", layout.prefix,
                              all    ? "fused"
                              : none ? "separate"
                                     : "partly fused",
                              report_.all_matrices_are_quantized() ? "in quantised layouts"
                              : layout.is_out_in                   ? "as [out, in]"
                                                                   : "as [in, out]",
                              layout.head_is_tied ? "tied to the embedding" : "of its own"));
    for (const SkippedTensors::Count& count : report_.skipped.counts) {
      Row("skipped", fmt::format("{} of {}: {}", Counted(count.num_tensors, "tensor"),
                                 Bytes(count.num_bytes), SkipReasonName(count.reason)));
    }
  }

  void WriteKOrder() {
    if (!report_.k_order) return;
    const KOrderEvidence& k = *report_.k_order;
    const std::string sample =
        fmt::format("{} of {}", Counted(k.num_experts, "expert"), Counted(k.num_layers, "layer"));
    Row("K order",
        fmt::format("{}, {}", k.Decide() == formats::KOrder::kMma64 ? "mma64" : "natural",
                    k.is_conclusive() ? "by " + sample
                                      : "the default: " + sample + " tell no more than chance"));
    const auto show = [&](const char* what, const KOrderCorrelations& c) {
      Row("", fmt::format("norms of {:<18} correlate {:+.3f} as mma64, {:+.3f} as natural; chance: "
                          "{:.3f}",
                          what, c.mma64, c.natural,
                          1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, c.num_values)))));
    };
    show("neurons", k.neurons);
    show("hidden dimensions", k.hidden);
    if (k.contradicts_itself()) {
      Row("", "the two contradict each other: try the other --k-order if the model talks nonsense");
    }
  }

  void WriteLayers() {
    Section("Layers");
    for (const LayerRange& range : report_.layers) {
      const std::string mlp =
          range.num_experts == 0
              ? fmt::format("dense MLP {}", range.mlp)
              : fmt::format("{} experts {}{}", range.num_experts, range.mlp,
                            range.shared_experts.empty()
                                ? ""
                                : fmt::format(", shared experts {}", range.shared_experts));
      Row(Layers(range), fmt::format("attention {}, {}", range.attention, mlp));
    }
  }

  void PartRow(std::string_view name, const Size& size) {
    const bool has_cuda = !report_.sizes.has_float32_matrices;
    text_ += fmt::format("  {:<15}{:>11}{:>12}{:>12}{:>12}\n", name,
                         size.num_parameters == 0 ? "-" : Parameters(size.num_parameters),
                         size.on_disk == 0 ? "-" : Bytes(size.on_disk), Bytes(size.on_cpu),
                         has_cuda ? Bytes(size.on_cuda) : "-");
  }

  void WriteParts() {
    Section(fmt::format("{:<17}{:>11}{:>12}{:>12}{:>12}", "Sizes", "parameters", "on disk",
                        "on a CPU", "on a GPU"));
    for (const auto& [part, size] : report_.sizes.parts) {
      const bool is_tied = part == Part::kHead && size.num_parameters == 0;
      PartRow(is_tied ? "head (tied)" : PartName(part), size);
    }
    PartRow("together", report_.sizes.total());
    if (report_.sizes.has_float32_matrices) {
      text_ += "  Not for a GPU: its kernels take no matrices in float16, float32 or float64\n";
    }
  }

  void WriteRank() {
    if (report_.tensor_parallel_size == 1) return;
    PartRow(fmt::format("a rank of {}", report_.tensor_parallel_size), report_.rank_sizes.total());
  }

  void WriteFit() {
    const FitOptions& o = *report_.fit_options;
    const Fit& fit = *report_.fit;
    Section("Memory");
    Row(o.on_cpu ? "host" : "each GPU",
        fmt::format("{:.1f} GiB{}", o.memory_gib,
                    o.on_cpu ? "" : fmt::format(", {:.0f}% of it to use", 100 * o.utilization)));
    Row("weights", Bytes(fit.weights));
    Row("a step", fmt::format("about {}", Bytes(fit.activations)));
    Row("KV cache", fmt::format("{} for {} tokens of {}", Bytes(fit.kv_bytes), Count(fit.kv_tokens),
                                Bytes(fit.kv_bytes_per_token)));
    const std::string longest = Counted(o.max_model_len, "token");
    if (fit.fits) {
      Row("verdict", fmt::format("fits, with {:.1f} sequences of {}",
                                 static_cast<double>(fit.kv_tokens) / o.max_model_len, longest));
      return;
    }
    const int64_t needed = fit.weights + fit.activations + fit.kv_bytes_per_token * o.max_model_len;
    std::string advice;
    if (fit.smallest_fitting_tp > 0) {
      advice = fmt::format("; --tensor-parallel-size {} does", fit.smallest_fitting_tp);
    }
    Row("verdict", fmt::format("does not fit: a sequence of {} needs {} of {}{}", longest,
                               Bytes(needed), Bytes(fit.allowed), advice));
  }

  void WriteProblems() {
    std::vector<std::string> problems = report_.problems;
    if (report_.verified) {
      const auto& more = report_.verified->problems;
      problems.insert(problems.end(), more.begin(), more.end());
    }
    if (problems.empty()) {
      if (report_.verified) {
        text_ += fmt::format("\nVerified: all {} of {} are sound\n",
                             Counted(report_.verified->num_tensors, "tensor"),
                             Bytes(report_.verified->num_bytes));
      }
      return;
    }
    Section(Counted(static_cast<int64_t>(problems.size()), "problem"));
    for (size_t i = 0; i < std::min(problems.size(), kMostProblems); ++i) {
      text_ += fmt::format("  {}\n", problems[i]);
    }
    if (problems.size() > kMostProblems) {
      text_ += fmt::format("  and {} more; --json has all\n", problems.size() - kMostProblems);
    }
  }

  const Report& report_;
  const bool styled_;
  std::string text_;
};

}  // namespace

std::string ToText(const Report& report, bool styled) { return TextWriter(report, styled).Write(); }

}  // namespace wintserve::inspect
