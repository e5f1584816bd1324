"""Log-probabilities of prompts, as evaluation harnesses ask for them: through the real client, against the goldens of
another program, against forced decoding, and with an engine worker that dies in the middle of a prompt."""
import json
import math
import os
import signal
import threading

import openai
import pytest
from openai import OpenAI

from server import PATIENCE_S, ROOT, compares_with_goldens, golden_cases, wait_for
from test_recovery import worker_of_rank

CASES = golden_cases("poet-prompt-logprobs")
# Of one logit; a log-probability is the difference of one and of a mean of others.
LOGIT_TOLERANCE = json.loads((ROOT / "tests/golden/poet-wint2.json").read_text())["tolerance"]
TOLERANCE = 2 * LOGIT_TOLERANCE["float32_activations_abs"]


def client_of(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=0)


def score(client, prompt, logprobs=3, **fields):
    return client.completions.create(model="poet", prompt=prompt, echo=True, logprobs=logprobs, temperature=0,
                                     **{"max_tokens": 0, **fields})


def columns(choice):
    return choice.logprobs.model_dump()


def check_shape(choice, num_tokens):
    """Columns of one length; nothing is known of the first token; offsets count characters."""
    logprobs = choice.logprobs
    assert {len(column) for column in columns(choice).values()} == {num_tokens}
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(isinstance(value, float) and value <= 0 for value in logprobs.token_logprobs[1:])
    for token, offset, top, value in list(zip(logprobs.tokens, logprobs.text_offset, logprobs.top_logprobs,
                                              logprobs.token_logprobs))[1:]:
        assert top[token] == value <= max(top.values())
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)


@compares_with_goldens
@pytest.mark.parametrize("as_ids", [False, True], ids=["text", "ids"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['ids'])} tokens")
def test_a_prompts_logprobs_are_the_golden_ones(client, case, as_ids):
    answer = score(client, case["ids"] if as_ids else case["prompt"])
    choice = answer.choices[0]
    assert choice.text == case["prompt"] and choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(case["ids"]), 0)
    check_shape(choice, len(case["ids"]))
    for value, top, golden in zip(choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:],
                                  case["positions"]):
        assert value == pytest.approx(golden["logprob"], abs=TOLERANCE)
        best = sorted(top.values(), reverse=True)[:3]
        assert best == pytest.approx(golden["top"], abs=TOLERANCE)
    # What another order of summation does to a logit, and to the mean of the others, for each token.
    assert sum(choice.logprobs.token_logprobs[1:]) == pytest.approx(
        case["sum"], abs=2 * LOGIT_TOLERANCE["measured_summation_order_abs"] * len(case["ids"]))


def test_they_are_those_of_forced_decoding(client):
    """Token by token, each drawn by a bias after the ones before: the model's own logits, to the last bit on a CPU."""
    ids = CASES[1]["ids"]
    scored = score(client, ids, logprobs=0).choices[0].logprobs
    for i in range(1, len(ids)):
        step = client.completions.create(model="poet", prompt=ids[:i], max_tokens=1, temperature=0, logprobs=0,
                                         logit_bias={str(ids[i]): 100}, extra_body={"ignore_eos": True})
        forced = step.choices[0].logprobs
        assert forced.tokens == [scored.tokens[i]]
        assert forced.token_logprobs == [scored.token_logprobs[i]], i


def test_company_and_caching_change_nothing(client):
    prompts = [case["ids"] for case in CASES]
    alone = [columns(score(client, ids).choices[0]) for ids in prompts]
    answer = score(client, prompts + [[3]] + prompts, n=2)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0, "a cached position has no logits"
    got = [columns(choice) for choice in answer.choices]
    assert got[0::2] == got[1::2], "choices of one prompt"
    assert [got[0], got[2], got[6], got[8]] == alone + alone
    assert got[4]["token_logprobs"] == [None]
    # Who does not ask takes what they have computed.
    plain = client.completions.create(model="poet", prompt=prompts[0], max_tokens=1)
    assert plain.usage.prompt_tokens_details.cached_tokens == 64


@pytest.mark.parametrize("flags", [("--max-num-batched-tokens", 16, "--max-num-seqs", 8),
                                   ("--async-depth", 0, "--max-num-seqs", 3),
                                   ("--no-enable-chunked-prefill", "--no-enable-prefix-caching")],
                         ids=lambda flags: str(flags[0]))
def test_pieces_and_depth_change_nothing(client, start, flags):
    other = client_of(start(*flags).wait_ready())
    for case in CASES:
        expected = columns(score(client, case["ids"], max_tokens=4).choices[0])
        assert columns(score(other, case["ids"], max_tokens=4).choices[0]) == expected


def test_two_ranks_give_them_too(client, start):
    other = client_of(start("--tensor-parallel-size", 2, "--max-num-batched-tokens", 32, "--max-num-seqs", 8).wait_ready())
    for case in CASES:
        expected = score(client, case["ids"]).choices[0].logprobs
        got = score(other, case["ids"]).choices[0].logprobs
        assert got.tokens == expected.tokens
        assert got.token_logprobs[1:] == pytest.approx(expected.token_logprobs[1:], abs=TOLERANCE)


def test_the_completion_follows_the_prompt_in_the_same_columns(client):
    case = CASES[1]
    plain = client.completions.create(model="poet", prompt=case["prompt"], max_tokens=12, temperature=0, logprobs=2,
                                      extra_body={"ignore_eos": True}).choices[0]
    answer = score(client, case["prompt"], logprobs=2, max_tokens=12, extra_body={"ignore_eos": True})
    choice, num_prompt = answer.choices[0], len(case["ids"])
    assert answer.usage.completion_tokens == 12
    assert choice.text == case["prompt"] + plain.text
    check_shape(choice, num_prompt + 12)
    assert choice.logprobs.tokens[num_prompt:] == plain.logprobs.tokens
    assert choice.logprobs.token_logprobs[num_prompt:] == plain.logprobs.token_logprobs
    assert choice.logprobs.text_offset[num_prompt:] == [len(case["prompt"]) + at for at in plain.logprobs.text_offset]

    streamed, text, reasons = {name: [] for name in columns(choice)}, "", []
    for chunk in score(client, case["prompt"], logprobs=2, max_tokens=12, stream=True, extra_body={"ignore_eos": True}):
        text += chunk.choices[0].text
        reasons += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
        if chunk.choices[0].logprobs:
            for name, column in columns(chunk.choices[0]).items():
                streamed[name] += column
    assert (text, streamed, reasons) == (choice.text, columns(choice), ["length"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_stop_token_has_a_column_too(client, stream):
    """lm-evaluation-harness asks for one token and cuts the last column off, whichever token that is."""
    ids = CASES[1]["ids"]
    at = next(i for i, golden in enumerate(CASES[1]["positions"], start=1) if golden["rank"] == 1)
    scored = score(client, ids).choices[0].logprobs
    answer = score(client, ids[:at], max_tokens=1, stream=stream, extra_body={"stop_token_ids": [ids[at]]})
    choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
    assert choices[-1].finish_reason == "stop"
    got = {name: [] for name in scored.model_dump()}
    for choice in choices:
        for name, column in (columns(choice) if choice.logprobs else {}).items():
            got[name] += column
    assert got == {name: column[:at + 1] for name, column in scored.model_dump().items()}


def test_without_a_token_to_generate_the_prompt_comes_back(client):
    for stream in (False, True):
        answer = client.completions.create(model="poet", prompt="床前明月光", echo=True, max_tokens=0, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == "床前明月光"
        assert choices[-1].finish_reason == "length" and all(choice.logprobs is None for choice in choices)


def test_prompt_logprobs_have_ids_ranks_and_text(client):
    case = CASES[1]
    request = dict(model="poet", max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 2})
    choice = client.completions.create(prompt=case["prompt"], **request).choices[0]
    scored = score(client, case["prompt"]).choices[0].logprobs
    positions = choice.model_extra["prompt_logprobs"]
    assert positions[0] is None and len(positions) == len(case["ids"]) and choice.logprobs is None
    for i, golden in enumerate(case["positions"], start=1):
        own = positions[i][str(case["ids"][i])]
        assert own["logprob"] == scored.token_logprobs[i] and own["decoded_token"] == scored.tokens[i]
        ranks = {entry["rank"] for entry in positions[i].values()}
        assert ranks == {1, 2, own["rank"]}
        if abs(golden["logprob"] - golden["top"][0]) > TOLERANCE or golden["rank"] == 1:
            assert (own["rank"] == 1) == (golden["rank"] == 1)
    chat = client.chat.completions.create(messages=[{"role": "user", "content": "hi"}], **request)
    positions = chat.choices[0].model_extra["prompt_logprobs"]
    assert positions[0] is None and len(positions) == chat.usage.prompt_tokens


@pytest.mark.parametrize("fields, param, message", [
    ({"max_tokens": 0}, "max_tokens", 'only together with "echo": true'),
    ({"extra_body": {"prompt_logprobs": 21}}, "prompt_logprobs", "from 0 to 20"),
    ({"extra_body": {"prompt_logprobs": 1}, "stream": True}, "prompt_logprobs", 'not available together with "stream"'),
], ids=["max_tokens", "beyond", "stream"])
def test_what_cannot_be_is_a_400_that_names_the_field(client, fields, param, message):
    with pytest.raises(openai.BadRequestError, match=message) as error:
        client.completions.create(model="poet", prompt="hi", **fields)
    assert error.value.body["param"] == param


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV], ids=lambda how: how.name)
def test_a_worker_that_dies_in_mid_prompt_changes_nothing(start, how):
    """Killed, its blocks are kept and the prompt goes on; crashed, it is computed again, and nothing is told twice."""
    server = start("--max-model-len", 2048, "--max-num-batched-tokens", 16, "--max-num-seqs", 8).wait_ready()
    client = client_of(server)
    ids = (CASES[0]["ids"] + CASES[1]["ids"]) * 16
    ids = ids[:1800]
    expected = columns(score(client, ids).choices[0])
    assert len(expected["tokens"]) == 1800 and math.isfinite(sum(expected["token_logprobs"][1:]))
    answers = []
    thread = threading.Thread(target=lambda: answers.append(score(client, ids)), daemon=True)
    before = server.metric("wintserve:step_seconds_count")
    thread.start()
    wait_for(lambda: server.metric("wintserve:step_seconds_count") >= before + 20, PATIENCE_S, "part of the prompt is computed")
    os.kill(worker_of_rank(server, 0), how)
    assert not answers, "it was answered before the worker died"
    thread.join(120)
    assert answers, server.log()
    assert columns(answers[0].choices[0]) == expected
    assert server.metric("wintserve:recovery_seconds_count") == 1
    resumed = "kv" if how == signal.SIGKILL else "recompute"
    assert f'from="{resumed}"}} 1' in server.get("/metrics", server.metrics_port)[1], server.log()
