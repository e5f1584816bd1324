"""Penalties, biases, banned and stop tokens, log-probabilities: through the real client, checked against what they
must do to the text, and against the goldens of another program."""
import json
import math

import openai
import pytest
from openai import OpenAI

from server import ROOT, Server, compares_with_goldens, golden_cases

POEM = "床前明月光，疑是地上霜。"


def complete(client, prompt=POEM, **fields):
    extra = {k: fields.pop(k) for k in list(fields)
             if k in ("min_p", "top_k", "repetition_penalty", "bad_words", "bad_words_token_ids", "stop_token_ids",
                      "ignore_eos", "min_tokens")}
    request = {"model": "poet", "prompt": prompt, "max_tokens": 40, "temperature": 0, **fields}
    return client.completions.create(**request, extra_body={"ignore_eos": True, **extra})


def tokens_of(choice):
    return choice.logprobs.tokens


def test_penalties_take_repetitions_out_of_the_text(client):
    plain = complete(client, max_tokens=120, logprobs=0).choices[0]
    repeated = len(tokens_of(plain)) - len(set(tokens_of(plain)))
    assert repeated > 10, "the demo model repeats itself when it may not stop"
    for penalty in ({"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 2.0}):
        choice = complete(client, max_tokens=120, logprobs=0, **penalty).choices[0]
        assert choice.text != plain.text, penalty
        assert len(tokens_of(choice)) - len(set(tokens_of(choice))) < repeated, penalty
    # One so large that no token comes twice, nor one of the prompt.
    choice = complete(client, logprobs=0, repetition_penalty=1e6).choices[0]
    assert len(set(tokens_of(choice))) == len(tokens_of(choice))


def test_a_repetition_penalty_counts_the_prompt_and_the_others_do_not(client):
    first = complete(client, prompt=POEM, max_tokens=1).choices[0].text
    prompt = POEM + first + POEM  # the same last tokens, so the same continuation is likely
    plain = complete(client, prompt=prompt, max_tokens=1).choices[0].text
    assert complete(client, prompt=prompt, max_tokens=1, presence_penalty=2, frequency_penalty=2).choices[0].text == plain
    top = complete(client, prompt=prompt, max_tokens=1, logprobs=5).choices[0].logprobs
    penalised = complete(client, prompt=prompt, max_tokens=1, logprobs=5, repetition_penalty=1e6).choices[0].logprobs
    assert plain in prompt and penalised.tokens != top.tokens
    # The log-probabilities are of the model's own logits in both.
    assert penalised.top_logprobs[0][plain] == pytest.approx(top.top_logprobs[0][plain], abs=1e-6)


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(client):
    case = golden_cases()[0]
    first, second = case["greedy"]["ids"][:2]
    greedy = complete(client, prompt=case["prompt"], max_tokens=1).choices[0].text
    assert complete(client, prompt=case["prompt"], max_tokens=1, logit_bias={str(first): -100}).choices[0].text != greedy
    forced = complete(client, prompt=case["prompt"], max_tokens=8, temperature=1, seed=3,
                      logit_bias={str(second): 100}).choices[0]
    assert forced.text == 8 * complete(client, prompt=case["prompt"], max_tokens=1,
                                       logit_bias={str(second): 100}).choices[0].text


def test_banned_tokens_and_words_do_not_come(client):
    case = golden_cases()[0]
    greedy = complete(client, prompt=case["prompt"], logprobs=0).choices[0]
    first = case["greedy"]["ids"][0]
    choice = complete(client, prompt=case["prompt"], logprobs=0, bad_words_token_ids=[first]).choices[0]
    assert tokens_of(greedy)[0] not in tokens_of(choice)
    word = next(token for token in tokens_of(greedy)[1:] if token.isalpha())
    choice = complete(client, prompt=case["prompt"], logprobs=0, bad_words=[word]).choices[0]
    assert word not in tokens_of(choice)
    # The draw is as random as it may be: still never.
    choice = complete(client, prompt=case["prompt"], logprobs=0, bad_words=[word], temperature=2, n=8)
    assert all(word not in tokens_of(c) for c in choice.choices)


def test_a_stop_token_ends_the_text_before_it(client):
    case = golden_cases()[0]
    ids = case["greedy"]["ids"]
    stop = next(i for i in range(3, len(ids)) if ids[i] not in ids[:i])
    choice = complete(client, prompt=case["prompt"], max_tokens=96, stop_token_ids=[ids[stop]], ignore_eos=False)
    assert choice.choices[0].finish_reason == "stop"
    assert choice.usage.completion_tokens == stop + 1
    assert case["greedy"]["text"].startswith(choice.choices[0].text)
    assert len(choice.choices[0].text) < len(case["greedy"]["text"])


def test_min_p_of_one_is_greedy(client):
    greedy = complete(client).choices[0].text
    assert complete(client, temperature=1.5, seed=5, min_p=1).choices[0].text == greedy
    assert complete(client, temperature=1.5, seed=5).choices[0].text != greedy


@compares_with_goldens
def test_logprobs_are_those_of_the_golden_logits(client):
    golden_file = json.loads((ROOT / "tests/golden/poet-wint2.json").read_text())
    tolerance = 2 * golden_file["tolerance"]["float32_activations_abs"]  # of the difference of two logits
    for case in golden_cases():
        golden = next(row for row in case["logits"] if row["position"] == len(case["ids"]) - 1)
        logprobs = complete(client, prompt=case["prompt"], max_tokens=1, logprobs=20).choices[0].logprobs
        values = sorted(logprobs.top_logprobs[0].values(), reverse=True)
        assert len(values) == 20 and sum(math.exp(v) for v in values) <= 1 + 1e-6
        for ours, theirs in zip(values, golden["top8"]):
            # Logits are log-probabilities but for a constant.
            assert ours - values[0] == pytest.approx(theirs - golden["top8"][0], abs=tolerance)


def test_chat_logprobs_are_the_text_token_by_token(client):
    request = dict(model="poet", messages=[{"role": "user", "content": "把李白的静夜思改写为现代诗"}], temperature=0.9,
                   seed=4, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**request).choices[0]
    content = whole.logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == whole.message.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    for token in content:
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True) and token.logprob <= tops[0] <= 0
    streamed, text = [], ""
    for chunk in client.chat.completions.create(**request, stream=True):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        streamed += choice.logprobs.content if choice.logprobs else []
    assert text == whole.message.content
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in content]
    plain = client.chat.completions.create(**{**request, "logprobs": False, "top_logprobs": None}).choices[0]
    assert plain.logprobs is None and plain.message.content == whole.message.content


def test_completion_logprobs_have_offsets_in_characters(client):
    choice = complete(client, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == 40
    for token, logprob, top, offset in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs,
                                           logprobs.text_offset):
        assert top[token] == logprob == max(top.values())
        if not token.startswith("bytes:"):
            assert choice.text[offset:].startswith(token)


def test_choices_of_one_request_count_their_own_tokens(client):
    request = dict(frequency_penalty=1.5, repetition_penalty=1.2, logprobs=0, max_tokens=80)
    # Greedy choices are all that of a request alone: what one of them counted for another would change it.
    plain = complete(client, logprobs=0, max_tokens=80).choices[0]
    alone = complete(client, **request).choices[0]
    assert alone.text != plain.text, "the penalties change nothing: a test of nothing"
    for choice in complete(client, n=3, **request).choices:
        assert choice.text == alone.text
        assert choice.logprobs.token_logprobs == alone.logprobs.token_logprobs
    # The first one drawn is that of its seed alone; eight do not draw the same 80 tokens.
    request.update(temperature=2.0, seed=8)
    together = complete(client, n=8, **request).choices
    alone = complete(client, **request).choices[0]
    assert alone.text == together[0].text
    assert alone.logprobs.token_logprobs == together[0].logprobs.token_logprobs
    assert len({choice.text for choice in together}) > 1


def test_echo_puts_the_prompt_before_the_text(client):
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == POEM + plain
    stream = complete(client, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == POEM + plain


@pytest.mark.parametrize("fields, param", [
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"extra_body": {"repetition_penalty": 0}}, "repetition_penalty"),
    ({"extra_body": {"min_p": 2}}, "min_p"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"99999999": 1}}, "logit_bias.99999999"),
    ({"extra_body": {"stop_token_ids": [99999999]}}, "stop_token_ids[0]"),
    ({"extra_body": {"bad_words": ["把李白的静夜思改写为现代诗"]}}, "bad_words[0]"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
], ids=str)
def test_a_value_out_of_range_is_a_400_that_names_the_field(client, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="poet", messages=[{"role": "user", "content": "hi"}], **fields)
    assert error.value.body["param"] == param


def test_a_server_may_give_few_logprobs_or_none(tmp_path):
    few = Server(tmp_path, "--max-logprobs", "2")
    none = Server(tmp_path, "--no-enable-logprob")
    for server, error in ((few, "at most 2"), (none, "switched off")):
        try:
            server.wait_ready()
            client = OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=0)
            with pytest.raises(openai.BadRequestError, match=error):
                complete(client, max_tokens=1, logprobs=3)
            if server is few:
                assert len(complete(client, max_tokens=1, logprobs=2).choices[0].logprobs.top_logprobs[0]) == 2
        finally:
            assert server.stop() == 0, server.log()
