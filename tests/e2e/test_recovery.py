"""What clients see when a process dies under them: nothing but a pause, and the text of a run without faults."""
import fcntl
import json
import os
import re
import shutil
import signal
import threading
import urllib.request

import pytest

from server import DEVICE, PATIENCE_S, POET, PROCESS_NAMES, wait_for

WORKER = "wintserve-engine-worker"
API_SERVER = "wintserve-api-server"
PROMPTS = [f"chapter {i}. the moon over the river " + "and the stars " * (7 * i) for i in range(6)]
MAX_TOKENS = 300 if DEVICE == "cpu" else 1500  # long enough on a GPU, too, that a kill meets all streams


class Stream(threading.Thread):
    """A greedy stream. An answer that ends with an error has `error`."""

    def __init__(self, server, prompt, max_tokens=MAX_TOKENS):
        super().__init__(daemon=True)
        self.server, self.prompt, self.max_tokens = server, prompt, max_tokens
        self.pieces, self.error, self.usage = [], None, None
        self.start()

    def run(self):
        body = json.dumps({"prompt": self.prompt, "temperature": 0, "max_tokens": self.max_tokens, "ignore_eos": True,
                           "stream": True, "stream_options": {"include_usage": True}}).encode()
        http = urllib.request.Request(f"{self.server.url}/v1/completions", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(http, timeout=120) as response:
                for line in response:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    self.error = event.get("error", self.error)
                    self.usage = event.get("usage") or self.usage
                    self.pieces += [choice["text"] for choice in event.get("choices", ())]
        except OSError as error:
            self.error = str(error)

    def text(self):
        self.join(120)
        assert not self.is_alive() and self.error is None, (self.error, self.server.log())
        assert self.usage["completion_tokens"] == self.max_tokens
        return "".join(self.pieces)


def texts(server, prompts=PROMPTS):
    return [stream.text() for stream in [Stream(server, prompt) for prompt in prompts]]


def streams_under_way(server, num_pieces=20):
    streams = [Stream(server, prompt) for prompt in PROMPTS]
    wait_for(lambda: all(len(stream.pieces) >= num_pieces for stream in streams), PATIENCE_S, "every stream has tokens")
    return streams


def worker_of_rank(server, rank):
    """Its newest live process, as it calls itself in the log."""
    said = re.findall(rf" (\d+) engine_worker\.{rank}: ", server.log())
    return [int(pid) for pid in said if int(pid) in server.pids_of(WORKER)][-1]


@pytest.mark.parametrize("rank", [0, 1])
def test_streams_survive_a_killed_rank(start, rank):
    server = start("--tensor-parallel-size", 2).wait_ready()
    expected = texts(server)
    others = set(server.pids_of(WORKER))
    for kill in range(3):
        streams = streams_under_way(server)
        dead = worker_of_rank(server, rank)
        os.kill(dead, signal.SIGKILL)
        assert [stream.text() for stream in streams] == expected, server.log()
        others.discard(dead)
        # A fast device has answered before the other rank has joined.
        wait_for(lambda: server.metric("wintserve:recovery_seconds_count") == kill + 1, PATIENCE_S, f"{kill + 1} recoveries")
    assert server.get("/health")[0] == 200
    assert len(others & set(server.pids_of(WORKER))) == 1, "the other rank was replaced, too"
    assert server.metric("wintserve:kv_pool_replacements_total") == 0
    assert "from=\"recompute\"} 0" in server.get("/metrics", server.metrics_port)[1], "KV that could be kept was not"
    assert texts(server) == expected
    assert server.stop() == 0, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


def test_streams_survive_both_ranks(start):
    server = start("--tensor-parallel-size", 2).wait_ready()
    expected = texts(server)
    streams = streams_under_way(server)
    for pid in server.pids_of(WORKER):
        os.kill(pid, signal.SIGKILL)
    assert [stream.text() for stream in streams] == expected, server.log()


def test_after_a_crash_everything_is_computed_again(start):
    """A process that crashed may have written anything to the KV that it maps."""
    server = start("--tensor-parallel-size", 2).wait_ready()
    expected = texts(server)
    streams = streams_under_way(server)
    os.kill(worker_of_rank(server, 1), signal.SIGSEGV)
    assert [stream.text() for stream in streams] == expected, server.log()
    assert 'from="kv"} 0' in server.get("/metrics", server.metrics_port)[1]


def test_a_stopped_rank_is_replaced(start):
    server = start("--tensor-parallel-size", 2).wait_ready()
    expected = texts(server)
    streams = streams_under_way(server)
    stopped = worker_of_rank(server, 1)
    os.kill(stopped, signal.SIGSTOP)
    assert [stream.text() for stream in streams] == expected, server.log()
    assert stopped not in server.pids_of(WORKER)


def test_readiness_says_why_requests_wait(start):
    server = start("--tensor-parallel-size", 2).wait_ready()
    expected = texts(server, PROMPTS[:1])
    os.kill(worker_of_rank(server, 0), signal.SIGKILL)
    seen = []

    def unready():
        seen.append(server.get("/health"))
        return seen[-1][0] == 503
    wait_for(unready, PATIENCE_S, "/health is 503")
    assert "engine worker 0 " in json.loads(seen[-1][1])["error"]["message"]
    assert texts(server, PROMPTS[:1]) == expected  # taken, and answered when the rank is back
    wait_for(lambda: server.get("/health")[0] == 200, PATIENCE_S, "/health is 200")


def test_a_worker_that_hangs_while_it_loads_is_replaced(start, tmp_path):
    """A file that does not come, as of a network disk that is gone: under a lease of ours, opening it waits for us."""
    model = tmp_path / "model"
    model.mkdir()
    for file in POET.iterdir():
        (model / file.name).symlink_to(file)
    weights = model / "model-00002-of-00003.safetensors"
    there = weights.readlink()
    weights.unlink()
    shutil.copy(there, weights)
    previous = signal.signal(signal.SIGIO, signal.SIG_IGN)  # "somebody waits"
    with open(weights, "rb") as leased:
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        server = start("--stall-timeout", 1, model=model)
        wait_for(lambda: "has got no further for 1 s (--stall-timeout)" in server.log(), PATIENCE_S,
                 "the hang is noticed")
    signal.signal(signal.SIGIO, previous)
    server.wait_ready()
    assert "engine worker 0 died of exit code 70; starting it again" in server.log()
    assert texts(server, PROMPTS[:1])


def test_a_rank_that_hangs_before_it_is_ready_is_replaced_and_the_other_stays(start):
    server = start("--tensor-parallel-size", 2, "--stall-timeout", 1)
    wait_for(lambda: len(server.pids_of(WORKER)) == 2, PATIENCE_S, "workers exist")
    first, second = server.pids_of(WORKER)  # they are started in the order of their ranks
    os.kill(first, signal.SIGSTOP)  # so that the other one can be stopped between its Hello and the group's start
    wait_for(lambda: "engine worker 1 of 2 is attached" in server.log(), PATIENCE_S, "the second is attached")
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGCONT)
    server.wait_ready()
    assert "and has got no further for 1 s (--stall-timeout)" in server.log()
    assert "the API server wants engine worker 1 to go, which hangs or computes wrongly: killing it" in server.log()
    assert first in server.pids_of(WORKER) and second not in server.pids_of(WORKER)
    assert texts(server, PROMPTS[:1])


@pytest.mark.parametrize("drain_timeout, code", [(55, 0), (0.2, 75)])
def test_an_api_server_that_is_stopped_alone_leaves_workers_and_cache_to_the_next(start, tmp_path, drain_timeout, code):
    """As a liveness probe or a new image does with one of the two containers of a pod."""
    flags = ["--runtime-dir", tmp_path / "shared", "--tensor-parallel-size", 2, "--drain-timeout", drain_timeout]
    engine = start("--role", "engine", *flags)
    first = start("--role", "api", *flags).wait_ready()
    expected = texts(first)
    kept = [engine.pids_of(name) for name in PROCESS_NAMES if name != API_SERVER]
    streams = streams_under_way(first)
    assert first.stop() == code, first.log()
    if code == 0:
        assert [stream.text() for stream in streams] == expected
    second = start("--role", "api", *flags).wait_ready()
    assert texts(second) == expected, second.log()
    assert second.metric("fastdeploy:prefix_gpu_cache_token_num_total") > 0, "the cache is cold"
    assert kept == [engine.pids_of(name) for name in PROCESS_NAMES if name != API_SERVER]
    assert engine.log().count("keeping weights and pool") == 2, engine.log()  # one of each rank
    engine.process.send_signal(signal.SIGTERM)
    assert second.stop() == 0, second.log()
    assert engine.stop() == 0, engine.log()


def test_another_api_server_takes_over_workers_and_cache(start):
    server = start("--tensor-parallel-size", 2).wait_ready()
    expected = texts(server)
    kept = [server.pids_of(name) for name in PROCESS_NAMES if name != API_SERVER]
    streams = streams_under_way(server)
    (dead,) = server.pids_of(API_SERVER)
    os.kill(dead, signal.SIGKILL)
    for stream in streams:
        stream.join(10)
        assert not stream.is_alive()
    wait_for(lambda: server.pids_of(API_SERVER) not in ([], [dead]), PATIENCE_S, "another API server runs")
    wait_for(lambda: server.get("/health")[0] == 200, PATIENCE_S, "/health is 200")
    assert texts(server) == expected, server.log()
    assert server.metric("fastdeploy:prefix_gpu_cache_token_num_total") > 0, "the cache is cold"
    assert kept == [server.pids_of(name) for name in PROCESS_NAMES if name != API_SERVER]
