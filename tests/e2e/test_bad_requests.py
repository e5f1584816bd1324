"""Bad input through the real client: the right exception, no retries, and the server lives on."""
import openai
import pytest


@pytest.mark.parametrize("fields, param", [
    ({"temperature": 9}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"stop": [""]}, "stop"),
    ({"messages": "hello"}, "messages"),
    ({"messages": [{"role": "pirate", "content": "hi"}]}, "messages[0]"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"extra_body": {"priority": "high"}}, "priority"),
    ({"extra_body": {"timeout": 0}}, "timeout"),
    ({"extra_body": {"min_tokens": 9}, "max_tokens": 5}, "min_tokens"),
    ({"extra_body": {"ignore_eos": "yes"}}, "ignore_eos"),
    ({"extra_body": {"cache_salt": "a\nb"}}, "cache_salt"),
], ids=lambda v: str(v)[:40])
def test_bad_field_is_a_400_that_names_it(client, fields, param):
    request = {"model": "poet", "messages": [{"role": "user", "content": "hi"}], **fields}
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**request)
    assert error.value.body["param"].startswith(param)
    assert error.value.body["type"] == "invalid_request_error"


def test_prompt_beyond_the_model_length_is_a_400_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="", prompt=[9] * 5000)
    assert "Input text is too long" in str(error.value) and "5000" in str(error.value)
    assert error.value.body["code"] == "context_length_exceeded"


def test_unknown_route_is_the_openai_error_object(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="poet", input="hi")
