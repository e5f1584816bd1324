"""Partitions, delays and losses between processes, and between clients and the server.

The processes of an instance on one host talk over Unix sockets, so what a network would do to their queues is done by a
proxy that takes a socket's place. Clients come over a network name space, where there is one."""
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from faults import (CACHE_MANAGER, WORKER, Stream, assert_nothing_is_held, fault_free_texts, greedy, longest_pause,
                    prompts, stop_cleanly, wait_for_tokens)
from server import ROOT, wait_for

NUM_STREAMS = 6


def check(server, streams, expected):
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_for(lambda: len(server.pids_of(WORKER)) == 2 and server.get("/health")[0] == 200, 60, "it serves again")
    assert_nothing_is_held(server)


@pytest.mark.fast
@pytest.mark.fault(what="work queue delayed by 20 ms each way", when="decode", holds="slower, nobody is replaced; I1 I2 I7 I8")
def test_work_queue_delayed(between):
    server, proxy = between("work_queue.sock", 2)
    requests = [greedy(prompt, 60) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    workers = server.pids_of(WORKER)
    proxy.delay_s = 0.02
    check(server, [Stream(server, request) for request in requests], expected)
    assert server.pids_of(WORKER) == workers


@pytest.mark.fault(what="work queue partitioned", when="decode", holds="as the death of the group after its deadline, heals without a token twice; I1 I2 I7 I8")
@pytest.mark.parametrize("seconds", [0.3, 3, 15], ids=["0.3 s", "3 s", "15 s"])
def test_work_queue_partitioned(between, note, seconds):
    server, proxy = between("work_queue.sock", 2)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    when = time.monotonic()
    proxy.hold(True)
    time.sleep(seconds)
    proxy.hold(False)
    check(server, streams, expected)
    note(f"pause of {longest_pause(streams, when, time.monotonic())[0]:.1f} s")


@pytest.mark.fault(what="work queue partitioned", when="during recovery", holds="I1 I2 I7 I8")
def test_work_queue_partitioned_during_recovery(between):
    server, proxy = between("work_queue.sock", 2)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    os.kill(server.pids_of(WORKER)[0], signal.SIGKILL)
    proxy.hold(True)
    time.sleep(3)
    proxy.hold(False)
    check(server, streams, expected)


@pytest.mark.fault(what="work queue's connections reset", when="decode", holds="I1 I2 I7 I8")
def test_work_queue_cut(between):
    server, proxy = between("work_queue.sock", 2)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    for _ in range(2):
        streams = [Stream(server, request) for request in requests]
        wait_for_tokens(streams, 10)
        proxy.cut()
        check(server, streams, expected)


@pytest.mark.fast
@pytest.mark.fault(what="cache queue delayed by 50 ms each way", when="streaming", holds="I1 I2 I7 I8")
def test_cache_queue_delayed(between):
    server, proxy = between("cache.sock", 1)
    requests = [greedy(prompt, 100) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    proxy.delay_s = 0.05
    check(server, [Stream(server, request) for request in requests], expected)
    assert server.metric("wintserve:kv_pool_replacements_total") == 0


@pytest.mark.fault(what="cache queue partitioned", when="streaming", holds="I1 I2 I7 I8")
@pytest.mark.parametrize("seconds", [1, 8], ids=["1 s", "8 s"])
def test_cache_queue_partitioned(between, seconds):
    server, proxy = between("cache.sock", 1)
    requests = [greedy(prompt, 300) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    proxy.hold(True)
    time.sleep(seconds)
    proxy.hold(False)
    check(server, streams, expected)
    assert fault_free_texts(server, requests) == expected


@pytest.mark.fault(what="cache queue's connection reset", when="streaming", holds="the session resumes, the pool stays; I1 I2 I7 I8")
def test_cache_queue_cut(between):
    server, proxy = between("cache.sock", 1)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    manager = server.pids_of(CACHE_MANAGER)
    for _ in range(3):
        streams = [Stream(server, request) for request in requests]
        wait_for_tokens(streams, 10)
        proxy.cut()
        check(server, streams, expected)
    assert server.pids_of(CACHE_MANAGER) == manager
    assert server.metric("wintserve:kv_pool_replacements_total") == 0


# Reads requests from its input; prints their texts as JSON.
CLIENTS = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from openai import OpenAI
url, requests = json.load(sys.stdin)
client = OpenAI(base_url=url, api_key="x", max_retries=0, timeout=120)
def text(request):
    chunks = client.completions.create(**request, stream=True)
    return "".join(choice.text for chunk in chunks for choice in chunk.choices)
with ThreadPoolExecutor(len(requests)) as pool:
    json.dump(list(pool.map(text, requests)), sys.stdout)
"""


def in_name_space(server, *command, **how):
    return subprocess.run(["nsenter", "-t", str(server.process.pid), "-U", "-n", "--preserve-credentials", *command],
                          capture_output=True, text=True, cwd=ROOT, **how)


@pytest.fixture
def apart(start):
    """A server alone in a network name space, with nothing but a loopback device."""
    prefix = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    probe = subprocess.run([*prefix, "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"no network name space: {probe.stderr.strip()}")
    server = start("--tensor-parallel-size", 2, "--max-model-len", 2048, prefix=prefix)
    wait_for(lambda: "Application startup complete." in server.log(), 60, "it is ready")
    return server


def texts_of(server, requests):
    done = in_name_space(server, sys.executable, "-c", CLIENTS,
                         input=json.dumps([f"{server.url}/v1", requests]), timeout=150)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.fault(what="clients partitioned for 3 s", when="streaming", holds="I1 I7 I8 I9")
def test_clients_partitioned(apart):
    requests = [greedy(prompt, 400) for prompt in prompts(NUM_STREAMS)]
    expected = texts_of(apart, requests)

    def partition():
        time.sleep(1)  # the clients have begun
        assert in_name_space(apart, "ip", "link", "set", "lo", "down").returncode == 0
        time.sleep(3)
        assert in_name_space(apart, "ip", "link", "set", "lo", "up").returncode == 0
    thread = threading.Thread(target=partition)
    thread.start()
    assert texts_of(apart, requests) == expected
    thread.join()
    stop_cleanly(apart)


@pytest.mark.fault(what="clients with 30 ms of delay and 3 % of loss", when="streaming", holds="I1 I7 I8 I9")
def test_clients_with_loss(apart):
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = texts_of(apart, requests)
    shaped = in_name_space(apart, "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "30ms", "loss", "3%")
    if shaped.returncode != 0:
        pytest.skip(f"no netem: {shaped.stderr.strip()}")
    assert texts_of(apart, requests) == expected
    stop_cleanly(apart)
