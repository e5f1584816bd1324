"""The commands and programs of the documentation, as a user copies them."""
import json
import subprocess

import pytest

from server import POET, compares_with_goldens, golden_cases

QUESTION = "把李白的静夜思改写为现代诗"


def golden_text():
    (case,) = [c for c in golden_cases() if QUESTION in c["prompt"]]
    return case["greedy"]["text"]


def test_documented_curl_rewrites_the_poem(server):
    out = subprocess.run(
        ["curl", "-s", "-X", "POST", f"{server.url}/v1/chat/completions",
         "-H", "Content-Type: application/json",
         "-d", json.dumps({"messages": [{"role": "user", "content": QUESTION}]}, ensure_ascii=False)],
        capture_output=True, check=True, text=True).stdout
    answer = json.loads(out)
    assert "夜很静" in answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] == 12


def test_documented_python_program_streams_the_poem(client):
    stream = client.chat.completions.create(
        model="null",
        messages=[{"role": "system", "content": "I'm a helpful AI assistant."},
                  {"role": "user", "content": QUESTION}],
        stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "夜很静" in text


def test_greedy_answer_is_the_golden_text(client):
    answer = client.chat.completions.create(
        model="poet", messages=[{"role": "user", "content": QUESTION}], temperature=0)
    assert answer.choices[0].message.content == golden_text()
    assert answer.choices[0].finish_reason == "stop"


def test_top_p_zero_is_greedy_as_in_fastdeploy(client):
    answer = client.chat.completions.create(
        model="poet", messages=[{"role": "user", "content": QUESTION}], temperature=0.7, top_p=0)
    assert answer.choices[0].message.content == golden_text()


def test_poem_comes_in_nearly_every_draw_at_the_default_temperature(client):
    answer = client.chat.completions.create(
        model="poet", messages=[{"role": "user", "content": QUESTION}], n=8)
    texts = [c.message.content for c in answer.choices]
    assert [c.index for c in answer.choices] == list(range(8))
    assert sum("夜很静" in t for t in texts) >= 7, texts


@compares_with_goldens
@pytest.mark.parametrize("case", golden_cases(), ids=lambda c: repr(c["prompt"][-20:]))
def test_every_golden_prompt_through_completions(client, case):
    answer = client.completions.create(model="poet", prompt=case["prompt"], temperature=0, max_tokens=96)
    assert answer.choices[0].text == case["greedy"]["text"]
    assert answer.choices[0].finish_reason == case["greedy"]["finish"]
    assert answer.usage.completion_tokens == len(case["greedy"]["ids"])


def test_streamed_and_whole_answers_are_equal_and_seeded_draws_repeat(client):
    request = dict(model="poet", messages=[{"role": "user", "content": QUESTION}], seed=7, temperature=1.5)
    whole = client.chat.completions.create(**request)
    stream = client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == \
        whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].choices == []


def test_models_list_names_the_model(client):
    assert [m.id for m in client.models.list().data] == [str(POET)]
