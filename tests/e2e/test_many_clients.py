"""Several clients at once: batching changes nobody's text, and one who leaves costs nothing."""
import concurrent.futures
import json
import socket

from server import DEVICE, PATIENCE_S, golden_cases, wait_for


def stream_text(client, prompt, max_tokens=96):
    chunks = client.completions.create(model="", prompt=prompt, temperature=0, max_tokens=max_tokens,
                                       stream=True)
    return "".join(c.choices[0].text for c in chunks if c.choices)


def test_32_concurrent_streams_give_the_text_of_one_alone(client):
    cases = golden_cases()
    alone = {c["prompt"]: c["greedy"]["text"] if DEVICE == "cpu" else stream_text(client, c["prompt"]) for c in cases}
    prompts = [cases[i % len(cases)]["prompt"] for i in range(32)]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        texts = list(pool.map(lambda prompt: stream_text(client, prompt), prompts))
    assert texts == [alone[prompt] for prompt in prompts]


def start_long_request(server, stream):
    """A raw socket with a generation under way that would take thousands of steps."""
    body = json.dumps({"prompt": "床前", "max_tokens": 2000, "temperature": 2.0, "seed": 1, "ignore_eos": True,
                       "stream": stream, "n": 4}).encode()
    s = socket.create_connection(("127.0.0.1", server.port))
    s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
              b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    wait_for(lambda: server.metric("fastdeploy:num_requests_running") >= 1, PATIENCE_S, "the request runs")
    return s


def assert_aborted_and_nothing_held(server, aborted_before):
    wait_for(lambda: server.metric("fastdeploy:num_requests_running") == 0, PATIENCE_S, "the request is over")
    assert server.metric("fastdeploy:request_aborted_total") > aborted_before
    wait_for(lambda: server.metric("fastdeploy:free_gpu_block_num")
             == server.metric("fastdeploy:max_gpu_block_num"), PATIENCE_S, "its blocks are returned")


def test_streaming_client_that_leaves_is_aborted(server):
    aborted = server.metric("fastdeploy:request_aborted_total")
    start_long_request(server, stream=True).close()
    assert_aborted_and_nothing_held(server, aborted)


def test_waiting_client_that_leaves_is_aborted(server):
    aborted = server.metric("fastdeploy:request_aborted_total")
    start_long_request(server, stream=False).close()
    assert_aborted_and_nothing_held(server, aborted)
