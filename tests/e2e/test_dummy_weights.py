"""--load-format dummy: a config and a tokenizer are enough to serve."""
import json

import pytest
from openai import OpenAI

from server import POET, ROOT

SHAPES = ["ernie-4.5-300b-a47b-wint2", "ernie-4.5-21b-a3b-wint2", "ernie-4.5-0.3b"]


@pytest.fixture
def small_model(tmp_path):
    """A published shape with everything but the vocabulary made small, and no weights."""
    config = json.loads((ROOT / "models/shapes" / SHAPES[0] / "config.json").read_text())
    config.update(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                  head_dim=64, intermediate_size=512, moe_intermediate_size=256, moe_num_experts=8,
                  moe_k=2, moe_layer_start_index=1, moe_layer_end_index=3)
    config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"] = 1
    config["quantization_config"]["moe_quant_config"]["moe_w2_quant_config"].update(
        quant_start_layer=2, quant_end_layer=3)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (model / name).symlink_to(POET / name)
    return model


def answer(server, prompt, seed):
    client = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    # A token's logprob says more than its text, which another token may share.
    choice = client.completions.create(model="", prompt=prompt, temperature=0.8, seed=seed, max_tokens=24,
                                       logprobs=1, extra_body={"ignore_eos": True}).choices[0]
    return choice.text, choice.logprobs.token_logprobs


def test_a_config_alone_is_served_and_always_the_same_model(start, small_model):
    server = start("--load-format", "dummy", "--cpu-threads", 1, model=small_model).wait_ready()
    assert "dummy weights" in server.log()
    first = answer(server, "床前明月光", seed=1)
    assert len(first[1]) == 24
    assert answer(server, "疑是地上霜", seed=1) != first
    assert server.stop() == 0
    server.assert_nothing_left()

    again = start("--load-format", "dummy", "--cpu-threads", 2, model=small_model).wait_ready()
    assert answer(again, "床前明月光", seed=1) == first
    assert again.stop() == 0


def test_ranks_have_the_same_model(start, small_model):
    texts = {}
    for ranks in (1, 2):
        server = start("--load-format", "dummy", "--tensor-parallel-size", ranks, model=small_model).wait_ready()
        _, texts[ranks] = answer(server, "床前明月光", seed=1)
        assert server.stop() == 0
    # Sums over ranks round differently; the first tokens' log-probabilities tell another model.
    assert texts[2][0] == pytest.approx(texts[1][0], abs=1e-3)


def test_weights_that_are_missing_are_still_an_error_without_the_flag(start, small_model):
    server = start(model=small_model)
    assert server.process.wait(30) == 66
    server.log_file.close()
    assert str(small_model) in server.log()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shapes_have_a_config_and_a_tokenizer(shape):
    directory = ROOT / "models/shapes" / shape
    assert json.loads((directory / "config.json").read_text())["vocab_size"] == 103424
    assert (directory / "tokenizer.model").read_bytes() == (POET / "tokenizer.model").read_bytes()
