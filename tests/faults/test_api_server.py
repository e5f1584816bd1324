"""The death of the API server: workers and cache manager stay, what comes next finds the cache warm."""
import signal
import time

import pytest

from faults import (API_SERVER, CACHE_MANAGER, WORKER, Stream, assert_nothing_is_held, client_of, end, fault_free_texts,
                    greedy, prompts, stop_cleanly, wait_for_tokens)
from server import wait_for

NUM_STREAMS = 6
FLAGS = ("--tensor-parallel-size", 2, "--max-model-len", 2048)


def wait_for_another(server, pid):
    wait_for(lambda: server.pids_of(API_SERVER) not in ([], [pid]), 20, "another API server runs")
    wait_for(lambda: server.get("/health")[0] == 200, 60, "/health is 200")


@pytest.mark.fault(what="kill -9 API server", when="streaming", holds="no weights are loaded again, retries hit the cache; I7 I8 I9")
def test_killed_while_streaming(start, note):
    server = start(*FLAGS).wait_ready()
    requests = [greedy("床前明月光，疑是地上霜。" * 20 + prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    keep = {name: server.pids_of(name) for name in (WORKER, CACHE_MANAGER)}
    dead = []
    for _ in range(3):
        streams = [Stream(server, request) for request in requests]
        wait_for_tokens(streams, 10)
        dead += server.pids_of(API_SERVER)
        begin = end(dead[-1])
        wait_for_another(server, dead[-1])
        ready = time.monotonic() - begin
        assert all(stream.wait(10).error is not None for stream in streams), "a stream without its server"
        with client_of(server) as client:
            answer = client.completions.create(**requests[0])
        assert answer.choices[0].text == expected[0], server.log()
        assert answer.usage.prompt_tokens_details.cached_tokens > 0, "the prefix cache is cold"
        assert fault_free_texts(server, requests) == expected, server.log()
        assert {name: server.pids_of(name) for name in keep} == keep, "a process was replaced without need"
        assert_nothing_is_held(server)
    note(f"ready again after {ready:.2f} s")
    stop_cleanly(server)


@pytest.mark.fast
@pytest.mark.fault(what="kill -9 API server", when="idle", holds="I7 I8 I9")
def test_killed_while_idle(start):
    server = start(*FLAGS).wait_ready()
    requests = [greedy(prompt, 32) for prompt in prompts(4)]
    expected = fault_free_texts(server, requests)
    (pid,) = server.pids_of(API_SERVER)
    workers = server.pids_of(WORKER)
    end(pid)
    wait_for_another(server, pid)
    assert fault_free_texts(server, requests) == expected
    assert server.pids_of(WORKER) == workers
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 API server", when="loading", holds="I7 I8 I9")
def test_killed_while_workers_load(start):
    server = start(*FLAGS)
    wait_for(lambda: len(server.pids_of(WORKER)) == 2, 20, "workers exist")
    end(server.pids_of(API_SERVER)[0])
    server.wait_ready(60)
    requests = [greedy(prompt, 32) for prompt in prompts(4)]
    assert fault_free_texts(server, requests) == fault_free_texts(server, requests)
    stop_cleanly(server)


@pytest.mark.fast
@pytest.mark.fault(what="kill -9 API server", when="draining", holds="the instance ends, nothing is left; I8 I9")
def test_killed_while_draining(start):
    server = start(*FLAGS).wait_ready()
    streams = [Stream(server, greedy(prompt, 1000)) for prompt in prompts(2)]
    wait_for_tokens(streams, 10)
    server.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "finishing open requests" in server.log(), 10, "it drains")
    end(server.pids_of(API_SERVER)[0])
    assert server.process.wait(20) != 0, "open requests were cut off"
    server.log_file.close()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()
    assert all(stream.wait(10).error is not None for stream in streams)


@pytest.mark.fault(what="SIGTERM", when="streaming, beyond --drain-timeout", holds="exit 75, streams get an error event; I8 I9")
def test_drained_for_too_long(start):
    server = start(*FLAGS, "--drain-timeout", 1).wait_ready()
    streams = [Stream(server, greedy(prompt, 1900)) for prompt in prompts(NUM_STREAMS)]
    wait_for_tokens(streams, 10)
    assert server.stop() == 75, server.log()
    for stream in streams:
        assert "shutting down" in str(stream.wait(10).error), f"not told why it ended: {stream.error!r}"
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


@pytest.mark.fault(what="SIGSTOP API server, SIGCONT after 4 s", when="streaming", holds="I1 I2 I7 I8")
def test_stopped(start):
    server = start(*FLAGS).wait_ready()
    requests = [greedy(prompt, 400) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    (pid,) = server.pids_of(API_SERVER)
    end(pid, signal.SIGSTOP)
    time.sleep(4)  # longer than the sessions' patience
    end(pid, signal.SIGCONT)
    assert [stream.text() for stream in streams] == expected, server.log()
    assert_nothing_is_held(server)
    assert fault_free_texts(server, requests) == expected
    stop_cleanly(server)


@pytest.mark.parametrize("ranks, victims", [
    pytest.param(ranks, victims, id=f"TP{ranks}" if victims == ranks else f"TP{ranks} with one left", marks=pytest.mark.fault(
        what=f"kill -9 API server and {'every' if victims == ranks else 'a'} worker", when="streaming",
        holds="the pool is taken over, its KV is not trusted; I7 I8 I9"))
    for ranks, victims in ((1, 1), (2, 1), (2, 2))])
def test_killed_together_with_workers(start, note, ranks, victims):
    server = start("--tensor-parallel-size", ranks, "--max-model-len", 2048).wait_ready()
    requests = [greedy(prompt, 400) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    (pid,) = server.pids_of(API_SERVER)
    begin = end(pid)
    for worker in server.pids_of(WORKER)[:victims]:
        end(worker)
    wait_for_another(server, pid)
    note(f"ready again after {time.monotonic() - begin:.2f} s")
    assert "is taken over" in server.log()
    assert fault_free_texts(server, requests) == expected, server.log()
    assert_nothing_is_held(server)
    stop_cleanly(server)
