"""What clients see of the queue: its limit, its order, its time limits, its comments, and what becomes of those
that do not wait or do not read."""
import contextlib
import json
import socket
import threading

import httpx
import openai
import pytest
from openai import OpenAI

from server import PATIENCE_S, Server, wait_for

MAX_QUEUE_REQUESTS = 3
LONG = {"prompt": "床前明月光", "max_tokens": 8000, "temperature": 0, "ignore_eos": True}
SHORT = {"prompt": "白日依山尽", "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One sequence runs at a time, so that the second request waits for as long as the first is wanted."""
    one = Server(tmp_path_factory.mktemp("queue"), "--max-model-len", "8192", "--max-num-seqs", "1",
                 "--max-queue-requests", MAX_QUEUE_REQUESTS)
    one.wait_ready()
    yield one
    assert one.stop() == 0, one.log()
    one.assert_nothing_left()


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=30) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_stays_in_the_queue(server):
    yield
    wait_for(lambda: server.metric("fastdeploy:num_requests_waiting") == 0
             and server.metric("fastdeploy:num_requests_running") == 0, PATIENCE_S, "all requests are over")


class Stream:
    """A streamed completion, read by a thread of its own; it is in the queue once this is constructed."""

    def __init__(self, server, request):
        self.lines = []
        self._client = httpx.Client(base_url=server.url, timeout=30)
        message = self._client.build_request("POST", "/v1/completions", json={**request, "stream": True})
        self._response = self._client.send(message, stream=True)
        assert self._response.status_code == 200, self._response.read()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self):
        with contextlib.suppress(httpx.HTTPError, httpx.StreamError):
            for line in self._response.iter_lines():
                self.lines.append(line)

    @property
    def has_begun(self):
        return any(line.startswith("data: ") for line in self.lines)

    @property
    def has_ended(self):
        return "data: [DONE]" in self.lines[-2:]

    def wait(self):
        self._thread.join(PATIENCE_S)
        assert self.lines[-2:] == ["data: [DONE]", ""], self.lines[-4:]

    def close(self):
        with contextlib.suppress(OSError):
            self._response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._response.close()
        self._client.close()


@pytest.fixture
def streams(server):
    """streams(request) -> Stream; each is closed at the end."""
    opened = []

    def open_one(request):
        opened.append(Stream(server, request))
        return opened[-1]

    yield open_one
    for stream in opened:
        stream.close()


@pytest.fixture
def running(streams):
    """A stream that takes longer than any test: what comes after it waits."""
    stream = streams(LONG)
    wait_for(lambda: stream.has_begun, PATIENCE_S, "the first request runs")
    return stream


def test_a_full_queue_is_a_rate_limit_error_and_a_client_that_retries_is_served(server, running, streams):
    waiting = [streams(SHORT) for _ in range(MAX_QUEUE_REQUESTS)]
    with OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=0) as impatient:
        for stream in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                impatient.completions.create(model="null", prompt="白日", max_tokens=4, stream=stream)
            assert refused.value.code == "rate_limit_exceeded"
            assert int(refused.value.response.headers["retry-after"]) >= 1
    assert not any(stream.has_begun for stream in waiting)

    threading.Timer(0.5, running.close).start()
    with OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=5) as patient:
        reply = patient.completions.create(model="null", prompt="白日", max_tokens=4)
    assert reply.usage.completion_tokens > 0
    for stream in waiting:
        stream.wait()


def test_priority_overtakes_in_the_queue(running, streams):
    order = []
    # So many tokens that the ends lie further apart than what wakes the watchers.
    waiting = {priority: streams({**SHORT, "max_tokens": 200, "priority": priority}) for priority in (5, 0, -5)}
    watchers = [threading.Thread(target=lambda s=s, p=p: (s.wait(), order.append(p))) for p, s in waiting.items()]
    for watcher in watchers:
        watcher.start()
    running.close()
    for watcher in watchers:
        watcher.join()
    assert order == [-5, 0, 5]


def test_a_stream_that_waits_gets_comments_and_leaves_the_queue_with_its_client(server, streams):
    # No request is long on a fast device: whenever the one that runs ends, another is ahead of this.
    ahead = [streams({**LONG, "priority": -1}) for _ in range(2)]
    wait_for(lambda: ahead[0].has_begun, PATIENCE_S, "the first request runs")
    waiting = streams(SHORT)

    def has_comment():
        if ahead[-2].has_ended:
            ahead.append(streams({**LONG, "priority": -1}))
        return ": keep-alive" in waiting.lines
    wait_for(has_comment, PATIENCE_S, "a comment after 5 s")
    assert not waiting.has_begun
    assert server.metric("fastdeploy:num_requests_waiting") == 2
    waiting.close()
    wait_for(lambda: server.metric("fastdeploy:num_requests_waiting") == 1, 4,
             "the request is cancelled before another comment is due")
    num_lines = sum(len(stream.lines) for stream in ahead)
    wait_for(lambda: sum(len(stream.lines) for stream in ahead) > num_lines, PATIENCE_S,
             "the other streams go on")


def test_timeout_while_it_runs(server, http):
    reply = http.post("/v1/completions", json={**LONG, "timeout": 0.5})
    assert reply.status_code == 504
    error = reply.json()["error"]
    assert error["type"] == "timeout_error" and error["code"] == "timeout"
    assert error["message"].startswith("the timeout of 0.5 s is over, after ")

    failures = server.metric("fastdeploy:request_failure_total")
    with OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=2) as client:
        with pytest.raises(openai.InternalServerError, match="the timeout of 0.1 s is over") as late:
            client.completions.create(model="null", prompt="床前明月光", max_tokens=8000,
                                      extra_body={"ignore_eos": True, "timeout": 0.1})
        assert late.value.status_code == 504
        assert server.metric("fastdeploy:request_failure_total") == failures + 1  # it has not tried again

        num_chunks = 0
        for timeout_s in (0.5, 2, 8):  # a slow machine has nothing to show for the shorter ones
            with pytest.raises(openai.APIError, match=f"the timeout of {timeout_s} s is over"):
                for _ in client.completions.create(model="null", prompt="床前明月光", max_tokens=8000, stream=True,
                                                   extra_body={"ignore_eos": True, "timeout": timeout_s}):
                    num_chunks += 1
            if num_chunks > 0:
                break
        assert num_chunks > 0


def test_timeout_in_the_queue(running, http, streams):
    reply = http.post("/v1/completions", json={**SHORT, "timeout": 0.3})
    assert reply.status_code == 504
    assert reply.json()["error"]["message"] == "the timeout of 0.3 s is over, after 0 of at most 4 tokens"

    stream = streams({**SHORT, "timeout": 0.3})
    stream.wait()
    events = [line.removeprefix("data: ") for line in stream.lines if line.startswith("data: ")]
    assert json.loads(events[0])["error"]["code"] == "timeout" and events[1:] == ["[DONE]"]


def test_cached_tokens_and_reset_prefix_cache(server, http):
    prompt = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 12

    def cached_tokens(salt):
        usage = http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1, "cache_salt": salt}).json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert cached in (0, (usage["prompt_tokens"] - 1) // 64 * 64)  # whole blocks; one token is always computed
        return cached

    def reset(body):
        reply = http.post("/reset_prefix_cache", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["num_blocks"]

    salts = ("red", "blue")
    assert [cached_tokens(salt) for salt in salts] == [0, 0]
    assert all(cached_tokens(salt) > 0 for salt in salts)
    assert reset({"cache_salt": "red"}) > 0
    assert cached_tokens("red") == 0 and cached_tokens("blue") > 0
    assert reset({}) > 0
    assert [cached_tokens(salt) for salt in salts] == [0, 0]
    assert http.post("/reset_prefix_cache", json={"salt": "red"}).status_code == 400
    assert cached_tokens("red") > 0


def test_a_client_that_does_not_read_is_given_up_and_holds_up_nobody(start):
    # The name is in every event: the socket's buffers are full soon.
    server = start("--max-model-len", "8192", "--client-stall-timeout", "2", "--served-model-name", "m" * 2000)
    server.wait_ready()
    body = json.dumps({**LONG, "stream": True}).encode()
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.connect(("127.0.0.1", server.port))
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        wait_for(lambda: server.metric("fastdeploy:num_requests_running") == 1, PATIENCE_S, "the silent client's request runs")
        with httpx.Client(base_url=server.url, timeout=10) as other:
            reply = other.post("/v1/completions", json={**LONG, "max_tokens": 300})
        assert reply.json()["usage"]["completion_tokens"] == 300
        wait_for(lambda: server.metric("fastdeploy:request_aborted_total") == 1, PATIENCE_S, "the request is cancelled")
        wait_for(lambda: server.metric("fastdeploy:num_requests_running") == 0, PATIENCE_S, "it leaves its slot")

        silent.settimeout(5)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := silent.recv(1 << 16):
                received += piece
        assert b"data: " in received and b"[DONE]" not in received


def test_a_request_of_several_prompts_counts_once_for_max_concurrency(start):
    server = start("--max-model-len", "2048", "--max-concurrency", "1").wait_ready()
    with httpx.Client(base_url=server.url, timeout=30) as http:
        reply = http.post("/v1/completions", json={**SHORT, "prompt": ["白日依山尽"] * 3})
    assert reply.status_code == 200, reply.text
    assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2]
