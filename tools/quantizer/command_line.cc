#include "tools/quantizer/command_line.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <utility>

#include "absl/strings/str_join.h"

namespace wintserve::quantizer {
namespace {

constexpr char kHelp[] =
    "Makes a quantised checkpoint from one in bfloat16: OUTPUT, in the published 2-bit layout, "
    "which\n"
    "FastDeploy and wintserve load. While it is made it is OUTPUT.partial; whatever interrupts "
    "that,\n"
    "the same command goes on where it was.";
constexpr int kMaxThreads = 1024;

// An option that takes one of the names.
template <typename Value>
CLI::Option* AddChoice(CLI::App* app, const std::string& name, Value* value,
                       const std::vector<std::pair<std::string, Value>>& choices,
                       const std::string& help) {
  std::vector<std::string> names;
  for (const auto& [choice, meaning] : choices) names.push_back(choice);
  const auto set = [value, choices](const std::string& text) {
    for (const auto& [choice, meaning] : choices) {
      if (choice == text) *value = meaning;
    }
  };
  return app->add_option_function<std::string>(name, set, help)
      ->check(CLI::IsMember(names).description(""))
      ->type_name(absl::StrJoin(names, "|"))
      ->default_str(names.front());
}

// Of CLI::Range, which takes a value that is not a number for one in range.
template <typename Value>
CLI::Validator InRange(Value least, Value most) {
  return CLI::Validator(
      [least, most](const std::string& text) {
        Value value = 0;
        const bool is_in_range =
            CLI::detail::lexical_cast(text, value) && value >= least && value <= most;
        return is_in_range ? std::string()
                           : fmt::format("Value {} not in range {} to {}", text, least, most);
      },
      "");
}

// An unset variable of a script.
CLI::Validator IsGiven(const char* what) {
  return CLI::Validator(
      [what](const std::string& text) {
        return text.empty() ? fmt::format("must name a {}, got nothing", what) : std::string();
      },
      "");
}

void AddScheme(CLI::App* app, SchemeOptions* scheme, formats::KOrder* k_order) {
  const std::string group = "Scheme";
  AddChoice<Scheme>(
      app, "--scheme", &scheme->scheme,
      {{"wint2", Scheme::kWint2}, {"wint4", Scheme::kWint4}, {"wint8", Scheme::kWint8}},
      "wint2: experts in 2 bits, those of the first MoE\nlayers in 4, the rest in 8; "
      "wint4: experts in 4\nbits, the rest in 8; wint8: all in 8. Embedding,\nhead, norms "
      "and router stay as they are")
      ->group(group);
  app->add_option(
         "--wint4-layers", scheme->wint4_layers,
         "Of how many of the first MoE layers the experts\nare wint4 in --scheme wint2; by "
         "default 4 of 51,\nas in the 300B release, of another number as large\na share, but "
         "at least one")
      ->type_name("N")
      ->group(group);
  app->add_option("--wint4-end-layer", scheme->wint4_end_layer,
                  "The same as the last layer whose experts are\nwint4, counted from 0 over all "
                  "layers")
      ->type_name("LAYER")
      ->group(group);
  AddChoice<bool>(app, "--dense", &scheme->plain_dense, {{"wint8", false}, {"bf16", true}},
                  "Attention, dense layers' MLP and shared experts;\nFastDeploy does not load bf16 "
                  "here")
      ->group(group);
  AddChoice<bool>(
      app, "--first-experts", &scheme->plain_first_experts, {{"wint4", false}, {"bf16", true}},
      "The experts of the first MoE layers in --scheme\nwint2; FastDeploy does not load "
      "bf16 here")
      ->group(group);
  AddChoice<formats::KOrder>(
      app, "--k-order", k_order,
      {{"mma64", formats::KOrder::kMma64}, {"natural", formats::KOrder::kNatural}},
      "Order of the rows in each group of 64 of a wint2\nmatrix: mma64 as FastDeploy since July "
      "2025 "
      "wants\nit, natural as before")
      ->group(group);
}

void AddCalibration(CLI::App* app, MethodOptions* method) {
  const std::string group = "Calibration";
  CLI::Option* file = app->add_option(
      "--calibration", method->calibration,
      "Text that the model is meant for: every matrix is made\nfor the inputs that it "
      "gets from it, with error feedback.\n*.jsonl: records with \"text\" or \"messages\"; "
      "any other\nfile: plain text. Without it weights are rounded alone");
  file->check(IsGiven("file"))->type_name("FILE")->group(group);
  const auto add_number = [&](const std::string& name, auto* value, auto least, auto most,
                              const char* type, const std::string& help) {
    return app->add_option(name, *value, help)
        ->check(InRange(least, most))
        ->capture_default_str()
        ->needs(file)
        ->type_name(type)
        ->group(group);
  };
  const auto add_switch = [&](const std::string& name, bool* value, const std::string& help) {
    app->add_flag(fmt::format("--{0},!--no-{0}", name), *value, help)
        ->default_str(*value ? "yes" : "no")
        ->needs(file)
        ->group(group);
  };
  constexpr int64_t kMany = int64_t{1} << 40;
  CalibrationLimits& limits = method->limits;
  add_number("--calibration-records", &limits.max_records, int64_t{0}, kMany, "N",
             "How many records, from the first on; 0: all");
  add_number("--calibration-tokens", &limits.max_tokens, int64_t{0}, kMany, "N",
             "How many tokens; 0: as many as 4 GiB of activations hold");
  add_number("--calibration-sequence", &limits.max_sequence_tokens, int64_t{1}, kMany, "N",
             "Tokens of a sequence at most");
  FeedbackEncoderOptions& feedback = method->feedback;
  add_number("--sweeps", &feedback.feedback.num_sweeps, 0, 100, "N",
             "Sweeps over the codes of a matrix after the feedback");
  add_number("--damping", &feedback.feedback.damping, kSmallestDamping, 1e6, "X",
             "How much weights count that the inputs do not show, of\ntheir mean square");
  add_switch("asymmetric", &feedback.asymmetric,
             "Aim at the outputs of the unquantised model, not at\nthose of its weights for the "
             "inputs of the quantised one");
  add_number("--ridge", &feedback.target.ridge, kSmallestRidge, 1e6, "X",
             "How much the aim stays near the weights");
  add_switch("repair-residual", &feedback.repair_residual,
             "Matrices that add to the residual make up for what it\nhas lost so far");
  add_switch("resolve-router", &feedback.resolve_router,
             "Solve routers anew for the quantised inputs");
  add_switch("resolve-dense", &feedback.resolve_plain,
             "The same for dense matrices with --dense bf16");
  add_switch("resolve-final-norm", &method->steps.solve_final_norm,
             "The same for the gain of the norm before the head");
}

void AddOperation(CLI::App* app, QuantizeOptions* options) {
  const std::string group = "Operation";
  app->set_help_flag("--help,-h", "Print this help")->group(group);
  app->add_option("--model", options->model, "The checkpoint to quantise")
      ->required()
      ->check(IsGiven("directory"))
      ->type_name("DIR")
      ->group(group);
  app->add_option("--output", options->output, "Where the quantised one goes; must not exist")
      ->required()
      ->check(IsGiven("directory"))
      ->type_name("DIR")
      ->group(group);
  app->add_option("--max-shard-gib", options->max_shard_gib,
                  "Largest file of tensors, in GiB; a matrix is never split")
      ->check(InRange(0.001, 1e6))
      ->capture_default_str()
      ->type_name("X")
      ->group(group);
  app->add_option("--threads", options->num_threads, "Threads that compute; by default one a core")
      ->check(InRange(1, kMaxThreads))
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
  AddScheme(&app, &options.scheme, &options.method.k_order);
  AddCalibration(&app, &options.method);
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
