"""The death of the cache manager: running requests go on, what it held is not lost twice."""
import os
import signal
import time

import pytest

from faults import (CACHE_MANAGER, Stream, assert_nothing_is_held, end, fault_free_texts, greedy, open_descriptors,
                    prompts, stop_cleanly, wait_for_tokens)
from server import wait_for

NUM_STREAMS = 6
FLAGS = ("--tensor-parallel-size", 2, "--max-model-len", 2048)


def wait_for_another(server, pid):
    wait_for(lambda: server.pids_of(CACHE_MANAGER) not in ([], [pid]), 20, "another cache manager runs")


def wait_for_pool(server, replacements):
    wait_for(lambda: server.metric("wintserve:kv_pool_replacements_total") >= replacements, 30, "its pool is in use")


@pytest.mark.fast
@pytest.mark.fault(what="kill -9 cache manager", when="idle", holds="I2 I7 I8 I9")
def test_killed_while_idle(start):
    server = start(*FLAGS).wait_ready()
    requests = [greedy(prompt, 32) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    (pid,) = server.pids_of(CACHE_MANAGER)
    end(pid)
    wait_for_another(server, pid)
    wait_for_pool(server, 1)
    assert fault_free_texts(server, requests) == expected
    assert server.get("/health")[0] == 200
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 cache manager", when="streaming", holds="I1 I2 I7 I8 I9")
@pytest.mark.parametrize("extra", [(), ("--num-gpu-blocks-override", 40), ("--swap-space", 0.05)],
                         ids=["pool with room", "lease soon used up", "with a host tier"])
def test_killed_while_streaming(start, note, extra):
    server = start(*FLAGS, *extra).wait_ready()
    requests = [greedy(prompt, 300) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    descriptors = open_descriptors(server)
    for replacement in (1, 2):
        streams = [Stream(server, request) for request in requests]
        wait_for_tokens(streams[:1], 20)
        (pid,) = server.pids_of(CACHE_MANAGER)
        begin = end(pid)
        assert [stream.text() for stream in streams] == expected, server.log()
        wait_for_another(server, pid)
        wait_for_pool(server, replacement)
    assert_nothing_is_held(server)
    after = open_descriptors(server)
    assert all(count <= descriptors[name] + 2 for name, count in after.items()), (descriptors, after)
    note(f"{time.monotonic() - begin:.1f} s to the last token after the second kill")
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 cache manager", when="a prompt is matched", holds="I1 I2 I7 I8")
def test_killed_while_prompts_are_matched(start):
    """Prompts whose beginnings are cached come in just as it dies."""
    server = start(*FLAGS).wait_ready()
    requests = [greedy(prompt + "。" * 8, 24) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    for replacement in range(1, 4):
        (pid,) = server.pids_of(CACHE_MANAGER)
        os.kill(pid, signal.SIGSTOP)  # what is asked now is in flight when it dies
        streams = [Stream(server, request) for request in requests]
        time.sleep(0.3)
        end(pid)
        assert [stream.text() for stream in streams] == expected, server.log()
        wait_for_another(server, pid)
        wait_for_pool(server, replacement)
    assert_nothing_is_held(server)


@pytest.mark.fault(what="SIGSTOP cache manager", when="streaming", holds="replaced after 3 s; I1 I2 I7 I8 I9")
def test_stopped_while_streaming(start):
    server = start(*FLAGS).wait_ready()
    requests = [greedy(prompt, 600) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 5)
    (pid,) = server.pids_of(CACHE_MANAGER)
    end(pid, signal.SIGSTOP)
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_for_another(server, pid)
    wait_for(lambda: pid not in server.processes(), 10, "the old one is gone")
    wait_for_pool(server, 1)
    assert fault_free_texts(server, requests[:2]) == expected[:2]
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="SIGSTOP cache manager, SIGCONT after 1 s", when="streaming", holds="not replaced; I1 I2 I7 I8")
def test_stopped_for_a_second(start):
    server = start(*FLAGS).wait_ready()
    requests = [greedy(prompt, 400) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 5)
    (pid,) = server.pids_of(CACHE_MANAGER)
    end(pid, signal.SIGSTOP)
    time.sleep(1)
    end(pid, signal.SIGCONT)
    assert [stream.text() for stream in streams] == expected, server.log()
    assert server.pids_of(CACHE_MANAGER) == [pid]
    assert server.metric("wintserve:kv_pool_replacements_total") == 0
    assert_nothing_is_held(server)
