#include "tools/quantizer/command_line.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <map>

namespace wintserve::quantizer {
namespace {

constexpr char kHelp[] =
    "Makes a quantised checkpoint from one in bfloat16: OUTPUT, in the published 2-bit layout, "
    "which\n"
    "FastDeploy and wintserve load. While it is made it is OUTPUT.partial; whatever interrupts "
    "that,\n"
    "the same command goes on where it was.";
constexpr int kMaxThreads = 1024;

void AddScheme(CLI::App* app, SchemeOptions* scheme) {
  const std::map<std::string, Scheme> schemes = {
      {"wint2", Scheme::kWint2}, {"wint4", Scheme::kWint4}, {"wint8", Scheme::kWint8}};
  const std::string group = "Scheme";
  app->add_option(
         "--scheme", scheme->scheme,
         "wint2: experts in 2 bits, those of the first MoE layers in 4, the rest in 8; "
         "wint4: experts in 4 bits, the rest in 8; wint8: all in 8. Embedding, head, norms "
         "and router stay as they are")
      ->transform(CLI::CheckedTransformer(schemes).description("wint2|wint4|wint8"))
      ->default_str("wint2")
      ->group(group);
  app->add_option(
         "--wint4-layers", scheme->wint4_layers,
         "Of how many of the first MoE layers the experts are wint4 in --scheme wint2; by "
         "default 4 of 51, as in the 300B release, of another number as large a share, but "
         "at least one")
      ->type_name("N")
      ->group(group);
  app->add_option("--wint4-end-layer", scheme->wint4_end_layer,
                  "The same as the last layer whose experts are wint4, counted from 0 over all "
                  "layers")
      ->type_name("LAYER")
      ->group(group);
  const std::map<std::string, bool> dense = {{"wint8", false}, {"bf16", true}};
  app->add_option("--dense", scheme->plain_dense,
                  "Attention, dense layers' MLP and shared experts. FastDeploy does not load bf16 "
                  "here")
      ->transform(CLI::CheckedTransformer(dense).description("wint8|bf16"))
      ->default_str("wint8")
      ->group(group);
  const std::map<std::string, bool> first = {{"wint4", false}, {"bf16", true}};
  app->add_option("--first-experts", scheme->plain_first_experts,
                  "The experts of the first MoE layers in --scheme wint2. FastDeploy does not load "
                  "bf16 here")
      ->transform(CLI::CheckedTransformer(first).description("wint4|bf16"))
      ->default_str("wint4")
      ->group(group);
}

void AddMethod(CLI::App* app, MethodOptions* method) {
  using formats::KOrder;
  const std::map<std::string, KOrder> orders = {{"mma64", KOrder::kMma64},
                                                {"natural", KOrder::kNatural}};
  app->add_option("--k-order", method->k_order,
                  "Order of the rows in each group of 64 of a wint2 matrix: mma64 as FastDeploy "
                  "since July 2025 wants it, natural as before")
      ->transform(CLI::CheckedTransformer(orders).description("mma64|natural"))
      ->default_str("mma64")
      ->group("Scheme");
}

void AddOperation(CLI::App* app, QuantizeOptions* options) {
  const std::string group = "Operation";
  app->set_help_flag("--help,-h", "Print this help")->group(group);
  app->add_option("--model", options->model, "The checkpoint to quantise")
      ->required()
      ->type_name("DIR")
      ->group(group);
  app->add_option("--output", options->output, "Where the quantised one goes; must not exist")
      ->required()
      ->type_name("DIR")
      ->group(group);
  app->add_option("--max-shard-gib", options->max_shard_gib,
                  "Largest file of tensors, in GiB; a matrix is never split")
      ->check(CLI::Range(0.0, 1e6).description(""))
      ->capture_default_str()
      ->type_name("X")
      ->group(group);
  app->add_option("--threads", options->num_threads, "Threads that compute; by default one a core")
      ->check(CLI::Range(1, kMaxThreads).description(""))
      ->type_name("N")
      ->group(group);
  app->add_flag("--overwrite-partial", options->overwrite_partial,
                "Begin anew where OUTPUT.partial is there, whatever run left it")
      ->group(group);
}

}  // namespace

QuantizeCommand ParseQuantizeCommand(const std::vector<std::string>& args, int num_cores) {
  QuantizeCommand command;
  QuantizeOptions& options = command.options;
  options.num_threads = std::clamp(num_cores, 1, kMaxThreads);
  CLI::App app(kHelp, "wintserve quantize");
  app.get_formatter()->column_width(36);
  AddOperation(&app, &options);
  AddScheme(&app, &options.scheme);
  AddMethod(&app, &options.method);
  try {
    std::vector<std::string> reversed(args.rbegin(), args.rend());  // as CLI11 takes a vector
    app.parse(std::move(reversed));
    command.run = true;
  } catch (const CLI::CallForHelp&) {
    command.print = app.help();
  } catch (const CLI::ParseError& error) {
    command.error = std::string("error: ") + error.what();
  }
  return command;
}

}  // namespace wintserve::quantizer
