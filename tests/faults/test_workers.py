"""The death of engine workers, by rank, cause and moment: streams go on as if nothing had been."""
import os
import shutil
import signal
import time

import pytest

from faults import (WORKER, Stream, assert_nothing_is_held, cases, end, fault_free_texts, greedy, is_alive, longest_pause,
                    open_descriptors, prompts, stop_cleanly, wait_for_tokens, wait_for_worker, worker_pid)
from server import POET, wait_for

NUM_STREAMS = 8
FLAGS = ("--max-model-len", 2048, "--max-num-seqs", 16)
PLACES = [(1, 0), (2, 0), (2, 1), (4, 3)]
PLACE_NAMES = ["TP1", "TP2 r0", "TP2 r1", "TP4 r3"]
RANKS = pytest.mark.parametrize("ranks, rank", [pytest.param(*place, marks=[pytest.mark.fast] * (place == (2, 1)))
                                                for place in PLACES], ids=PLACE_NAMES)


def start_ready(start, ranks, *flags, **kwargs):
    return start("--tensor-parallel-size", ranks, *FLAGS, *flags, **kwargs).wait_ready(120)


def wait_until_served_again(server, ranks, dead):
    """Every rank has a process again, none of them a dead one, and the group is ready."""
    wait_for(lambda: len(server.pids_of(WORKER)) == ranks and not set(server.pids_of(WORKER)) & set(dead), 60,
             "every rank has a worker")
    wait_for(lambda: server.get("/health")[0] == 200, 60, "/health is 200")


@pytest.mark.fault(what="kill -9 worker", when="loading", holds="it is started again, the instance comes up; I7 I9")
@RANKS
def test_killed_while_loading(start, ranks, rank):
    server = start("--tensor-parallel-size", ranks, *FLAGS)
    wait_for(lambda: len(server.pids_of(WORKER)) == ranks, 20, "workers exist")
    pid = server.pids_of(WORKER)[rank]  # they are started in the order of their ranks
    end(pid)
    server.wait_ready(120)
    assert pid not in server.processes() and len(server.pids_of(WORKER)) == ranks
    requests = [greedy(prompt, 32) for prompt in prompts(4)]
    assert fault_free_texts(server, requests) == fault_free_texts(server, requests)
    stop_cleanly(server)


@pytest.mark.fault(what="SIGSTOP worker", when="loading", holds="replaced once silent for --stall-timeout, the instance comes up; I7 I9")
@pytest.mark.parametrize("name", [WORKER, "wintserve-cache-manager"], ids=["worker", "cache manager"])
def test_frozen_while_starting(start, name):
    server = start("--stall-timeout", 5, *FLAGS)
    wait_for(lambda: server.pids_of(name), 20, "it exists")
    pid = server.pids_of(name)[0]
    end(pid, signal.SIGSTOP)
    server.wait_ready(120)
    assert "hangs: no sign of life for 5 s while it starts" in server.log()
    assert pid not in server.processes() and len(server.pids_of(name)) == 1
    requests = [greedy(prompt, 32) for prompt in prompts(4)]
    assert fault_free_texts(server, requests) == fault_free_texts(server, requests)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="warm-up", holds="it is started again, the instance comes up; I7 I9")
@RANKS
def test_killed_while_warming_up(start, ranks, rank):
    server = start("--tensor-parallel-size", ranks, *FLAGS)
    wait_for(lambda: ": created, " in server.log(), 60, "the pool is created")
    pid = worker_pid(server, rank)
    end(pid)
    server.wait_ready(120)
    wait_until_served_again(server, ranks, [pid])
    requests = [greedy(prompt, 32) for prompt in prompts(4)]
    assert fault_free_texts(server, requests) == fault_free_texts(server, requests)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="idle", holds="not ready, then ready; I2 I7 I8 I9")
@RANKS
def test_killed_while_idle(start, ranks, rank):
    server = start_ready(start, ranks)
    requests = [greedy(prompt, 48) for prompt in prompts(4)]
    expected = fault_free_texts(server, requests)
    others = set(server.pids_of(WORKER)) - {worker_pid(server, rank)}
    pid = worker_pid(server, rank)
    end(pid)
    assert fault_free_texts(server, requests) == expected, "a request that comes in the gap waits"
    wait_until_served_again(server, ranks, [pid])
    assert others <= set(server.pids_of(WORKER)), "the survivors keep their weights"
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="prefill chunk", holds="I1 I2 I7 I8 I9")
@RANKS
def test_killed_within_a_prompt(start, ranks, rank):
    server = start("--tensor-parallel-size", ranks, "--max-model-len", 8192, "--max-num-batched-tokens", 64,
                   "--no-enable-prefix-caching").wait_ready(120)
    request = greedy("床前明月光，疑是地上霜。" * 150, 24)
    short = greedy("白日依山尽", 400)
    (expected, expected_short) = fault_free_texts(server, [request, short])
    decoding = Stream(server, short)
    wait_for_tokens([decoding], 4)
    stream = Stream(server, request)
    wait_for(lambda: server.metric("fastdeploy:num_requests_running") == 2, 20, "the prompt is being computed")
    assert not stream.pieces, "the prompt is too short for this test"
    pid = worker_pid(server, rank)
    end(pid)
    assert (stream.text(), decoding.text()) == (expected, expected_short), server.log()
    wait_until_served_again(server, ranks, [pid])
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="decode", holds="I1 I2 I7 I8 I9")
@pytest.mark.parametrize("ranks, rank", PLACES, ids=PLACE_NAMES)
def test_killed_while_decoding(start, note, ranks, rank):
    server = start_ready(start, ranks)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    descriptors = open_descriptors(server)
    dead = []
    pauses = []
    for _ in range(3):
        streams = [Stream(server, request) for request in requests]
        wait_for_tokens(streams, 10)
        dead.append(wait_for_worker(server, rank))
        when = end(dead[-1])
        assert [stream.text() for stream in streams] == expected, server.log()
        pauses.append(longest_pause(streams, when, time.monotonic())[0])
        wait_until_served_again(server, ranks, dead)
    assert_nothing_is_held(server)
    after = open_descriptors(server)
    assert all(count <= descriptors[name] + 2 for name, count in after.items()), (descriptors, after)
    note("pauses of " + ", ".join(f"{pause:.2f}" for pause in pauses) + " s")
    stop_cleanly(server)


@pytest.mark.fast
@pytest.mark.fault(what="kill -9 worker", when="decode, seeded sampling with penalties", holds="I1 I2 I7 I8")
def test_killed_while_decoding_with_histories(start):
    server = start_ready(start, 2)
    requests = [{**greedy(prompt, 150), "temperature": 0.9, "seed": i, "presence_penalty": 0.5, "n": 1 + i % 2,
                 "extra_body": {"ignore_eos": True, "repetition_penalty": 1.2, "top_k": 50}}
                for i, prompt in enumerate(prompts(NUM_STREAMS))]
    requests = [{**request, "n": 1} for request in requests]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    pid = wait_for_worker(server, 1)
    end(pid)
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server, 2, [pid])
    assert_nothing_is_held(server)


@pytest.mark.fault(what="kill -9 every worker at once", when="decode", holds="I1 I2 I7 I8 I9")
@pytest.mark.parametrize("ranks", cases([2, 4], 2), ids=["TP2", "TP4"])
def test_all_killed_at_once(start, ranks):
    server = start_ready(start, ranks)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    dead = server.pids_of(WORKER)
    for pid in dead:
        end(pid)
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server, ranks, dead)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="during recovery", holds="I1 I2 I7 I8 I9")
@pytest.mark.parametrize("second", ["survivor at once", "survivor while the new one loads", "the new one while it loads",
                                    "the new one as it is attached"])
def test_killed_during_recovery(start, second):
    server = start_ready(start, 2)
    requests = [greedy(prompt, 300) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    first, survivor = worker_pid(server, 0), worker_pid(server, 1)
    attached = server.log().count("is attached")
    dead = [first]
    end(first)
    if second == "survivor at once":
        dead.append(survivor)
    else:
        wait_for(lambda: set(server.pids_of(WORKER)) - {first, survivor}, 20, "a new worker exists")
        (new,) = set(server.pids_of(WORKER)) - {first, survivor}
        if second == "the new one as it is attached":
            wait_for(lambda: server.log().count("is attached") > attached, 20, "it is attached")
        dead.append(survivor if second.startswith("survivor") else new)
    end(dead[-1])
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server, 2, dead)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 cache manager", when="while a worker is replaced", holds="I1 I2 I7 I8 I9")
def test_cache_manager_killed_during_recovery(start):
    server = start_ready(start, 2)
    requests = [greedy(prompt, 300) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    pid = worker_pid(server, 1)
    end(pid)
    end(server.pids_of("wintserve-cache-manager")[0])
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server, 2, [pid])
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="worker dies by itself", when="decode", holds="KV of its steps is not trusted; I1 I2 I7 I8 I9")
@pytest.mark.parametrize("sig", cases([signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS], signal.SIGBUS), ids=lambda sig: sig.name)
def test_fatal_signal(start, sig):
    server = start_ready(start, 2)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    pid = worker_pid(server, 1)
    end(pid, sig)
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server, 2, [pid])
    assert fault_free_texts(server, requests) == expected
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="SIGSTOP worker, SIGCONT after replacement", when="decode", holds="dead by its step's deadline, fenced; I1 I2 I7 I8 I9")
@pytest.mark.parametrize("rank", [0, 1], ids=["r0", "r1"])
def test_stopped(start, note, rank):
    server = start_ready(start, 2)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    pid = worker_pid(server, rank)
    when = end(pid, signal.SIGSTOP)
    wait_for(lambda: set(server.pids_of(WORKER)) and (not is_alive(pid) or len(server.pids_of(WORKER)) > 2), 60,
             "it is replaced")
    if is_alive(pid):
        os.kill(pid, signal.SIGCONT)
    assert [stream.text() for stream in streams] == expected, server.log()
    note(f"pause of {longest_pause(streams, when, time.monotonic())[0]:.1f} s")
    wait_until_served_again(server, 2, [pid])
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="SIGSTOP worker, SIGCONT after 0.5 s", when="decode", holds="nobody is replaced; I1 I2 I7 I8")
def test_stopped_for_a_moment(start):
    server = start_ready(start, 2)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    workers = server.pids_of(WORKER)
    end(workers[0], signal.SIGSTOP)
    time.sleep(0.5)
    end(workers[0], signal.SIGCONT)
    assert [stream.text() for stream in streams] == expected, server.log()
    assert server.pids_of(WORKER) == workers
    assert_nothing_is_held(server)


@pytest.mark.fault(what="kill -9 worker", when="blocks are copied between the tiers", holds="I1 I2 I7 I8 I9")
def test_killed_while_blocks_are_copied(start):
    """A pool of three prompts, and sixteen that come back from the host tier in turn: a kill in the midst of that."""
    server = start("--tensor-parallel-size", 2, "--max-model-len", 1024, "--max-num-seqs", 8,
                   "--num-gpu-blocks-override", 40, "--swap-space", 0.25).wait_ready(120)
    requests = [greedy(f"{i} " + "床前明月光，疑是地上霜。" * 200, 24) for i in range(16)]
    expected = fault_free_texts(server, requests)
    dead = []
    for round_ in range(4):
        before = server.metric("fastdeploy:prefix_cpu_cache_token_num_total")
        streams = [Stream(server, request) for request in requests]
        wait_for(lambda before=before: server.metric("fastdeploy:prefix_cpu_cache_token_num_total") > before, 60,
                 "blocks come from host memory")
        dead.append(wait_for_worker(server, round_ % 2))
        end(dead[-1])
        assert [stream.text() for stream in streams] == expected, server.log()
        wait_until_served_again(server, 2, dead)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.fixture
def model(tmp_path):
    """A checkpoint of the test's own, that it may break."""
    shutil.copytree(POET, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.fault(what="kill -9 worker", when="its checkpoint is gone for good", holds="six times tried, then exit 71 with the reason; streams get an error; I8 I9")
def test_replacement_cannot_load(start, model):
    server = start("--tensor-parallel-size", 2, *FLAGS, model=model).wait_ready()
    stream = Stream(server, greedy("床前明月光", 1500))
    wait_for_tokens([stream], 10)
    shutil.rmtree(model)
    end(worker_pid(server, 1))
    reasons = []

    def says_why():
        reasons.append(server.get("/health"))
        return "another engine worker 1 exited with code 66" in reasons[-1][1]
    wait_for(says_why, 30, "/health says why")
    assert reasons[-1][0] == 503
    assert server.process.wait(60) == 71, server.log()
    stream.wait(10)
    assert "shutting down" in str(stream.error), f"not told why it ended: {stream.error!r}"
    log = server.log()
    errors = [line for line in log.splitlines() if "ERROR " in line]
    assert len([line for line in errors if f"{model}/config.json: no such file" in line]) == 6, log
    (last,) = [line for line in errors if " launcher: " in line]
    assert "engine worker 1 died of exit code 66" in last and "crash loop" in last
    assert "did not stop in time" not in log
    server.log_file.close()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


@pytest.mark.fast
@pytest.mark.fault(what="kill -9 worker", when="its checkpoint is gone for a moment", holds="tried again until it is there; I1 I2 I7 I8 I9")
def test_replacement_can_load_later(start, model):
    """As of a file system of the network that is away."""
    server = start_ready(start, 2, model=model)
    requests = [greedy(prompt, 200) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    model.rename(model.with_suffix(".away"))
    pid = worker_pid(server, 1)
    end(pid)
    wait_for(lambda: server.log().count("engine worker 1 died of exit code 66") >= 2, 30, "it could not load twice")
    model.with_suffix(".away").rename(model)
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server, 2, [pid])
    assert_nothing_is_held(server)
    stop_cleanly(server)
