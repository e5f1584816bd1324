// The body of a request to /v1, up to what the engine would get and the bodies that answer it.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "api_server/openai/api_error.h"
#include "api_server/openai/json_fields.h"
#include "api_server/openai/prompts.h"
#include "api_server/openai/request.h"
#include "api_server/openai/responses.h"
#include "common/check.h"
#include "tests/fakes/fake_llm.h"
#include "tests/fuzz/fuzz_target.h"

namespace wintserve {
namespace {

const FakeLlm& Llm() {
  static const FakeLlm* const llm = new FakeLlm;
  return *llm;
}

void CheckRefusal(const absl::Status& status) {
  const ApiError error = ToApiError(status);
  CHECK(error.http_status == 400 || error.http_status == 404, "{}", status.ToString());
  CHECK(!error.message.empty());
  const auto body = nlohmann::json::parse(ErrorBody(error), nullptr, /*allow_exceptions=*/false);
  CHECK(body.is_object(), "{}", status.ToString());
}

void CheckJson(const std::string& text) { CHECK(nlohmann::json::accept(text), "{}", text); }

void Answer(const ApiRequest& request, size_t num_prompts) {
  const ResponseIdentity identity = NewResponseIdentity(request.endpoint, Llm().model_name());
  ResponseAssembler whole(identity, request, Llm());
  StreamAssembler stream(identity, request, Llm());
  std::vector<std::string> payloads;
  for (size_t prompt = 0; prompt < num_prompts; ++prompt) {
    GenerationUpdate update;
    update.finished = true;
    if (request.wants_prompt_logprobs()) {
      update.prompt_logprobs = {.token_ids = {97, 98}, .positions = {{-1, 2, {{99, -0.5f}}}}};
    }
    for (int choice = 0; choice < request.num_choices_per_prompt; ++choice) {
      update.choices.push_back(
          {.index = choice, .text = "text", .finish_reason = FinishReason::kStop});
    }
    whole.Add(prompt, update);
    stream.Add(prompt, update, &payloads);
  }
  CHECK(whole.finished() && stream.finished());
  CheckJson(whole.Body());
  for (const std::string& payload : payloads) CheckJson(payload);
}

void Parse(Endpoint endpoint, std::string_view body) {
  auto request = ParseRequest(endpoint, body);
  if (!request.ok()) return CheckRefusal(request.status());
  CHECK(!request->prompts.empty());
  const absl::Status known = CheckModelName(request->model, Llm(), {.aliases = {}, .strict = true});
  if (!known.ok()) CheckRefusal(known);
  const auto generations = MakeGenerationRequests(*request, Llm(), "id");
  if (!generations.ok()) return CheckRefusal(generations.status());
  CHECK(generations->size() == request->prompts.size());
  for (const GenerationRequest& generation : *generations) {
    CHECK(generation.temperature >= 0 && generation.temperature <= 2);
    CHECK(generation.top_p >= 0 && generation.top_p <= 1);
    CHECK(!generation.prompt_ids.empty());
    for (const int32_t id : generation.prompt_ids) CHECK(id >= 0 && id < Llm().vocab_size());
  }
  request->echo_texts = EchoTexts(*request, *generations, Llm());
  if (generations->size() * request->num_choices_per_prompt <= 64) {
    Answer(*request, generations->size());
  }
}

}  // namespace

void FuzzInput(std::string_view input) {
  Parse(Endpoint::kChat, input);
  Parse(Endpoint::kCompletions, input);
  if (const auto object = ParseJsonObject(input); object.ok()) {
    if (const auto salt = ParseCacheSalt(*object); !salt.ok()) CheckRefusal(salt.status());
  }
}

}  // namespace wintserve
