"""TP2 and TP4 as separate worker processes give the goldens of one."""
import pytest
from openai import OpenAI

from server import compares_with_goldens, golden_cases


@compares_with_goldens
@pytest.mark.parametrize("ranks", [2, 4])
def test_greedy_continuations_equal_the_goldens(start, ranks):
    server = start("--tensor-parallel-size", ranks).wait_ready()
    assert len(server.pids_of("wintserve-engine-worker")) == ranks
    client = OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    for case in golden_cases():
        answer = client.completions.create(model="", prompt=case["prompt"], temperature=0, max_tokens=96)
        assert answer.choices[0].text == case["greedy"]["text"]
    assert server.stop() == 0
    server.assert_runtime_dir_empty()
