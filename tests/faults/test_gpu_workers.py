"""The death of a rank of two on GPUs, by moment and cause, as test_workers.py has it on the CPU: with streams long
enough for a fast device, and with what only a GPU can suffer. Runs with --device cpu, too, but for the latter."""
import os
import shutil
import signal
import threading
import time

import pytest

from faults import WORKER, assert_nothing_is_held, end, is_alive, stop_cleanly, wait_for_worker
from fast_stream import FastStream, Recoveries, text_difference, wait_until_under_way
from gpu_cases import FAULT_LIBRARIES, expected, long_requests, only_on_a_gpu, prompt_requests
from server import wait_for

pytestmark = pytest.mark.gpu

STREAMS = 8
RANKS = pytest.mark.parametrize("rank", [0, 1], ids=["r0", "r1"])


def wait_until_served_again(server, dead):
    wait_for(lambda: len(server.pids_of(WORKER)) == 2 and not set(server.pids_of(WORKER)) & set(dead), 60,
             "every rank has a worker")
    wait_for(lambda: server.get("/health")[0] == 200, 60, "/health is 200")


def assert_texts(server, streams, requests):
    """I1 and I7."""
    failures = [difference for stream, text in zip(streams, expected(requests))
                if (difference := text_difference(stream.text(), text))]
    assert not failures, f"{failures}\n{server.log()[-20000:]}"


def assert_serves(server, count=4):
    requests = long_requests(count)
    assert_texts(server, [FastStream(server, request) for request in requests], requests)


class Case:
    """Streams of an instance to which something happens between `begin` and `finish`."""

    def __init__(self, server, requests=None):
        self.server = server
        self.requests = requests or long_requests(STREAMS)
        self.workers = [wait_for_worker(server, rank) for rank in range(2)]
        self.recoveries = Recoveries(server)
        self.streams = [FastStream(server, request) for request in self.requests]
        wait_until_under_way(self.streams)
        self.when = time.monotonic()

    def finish(self, dead, recoveries=1):
        """Every text is right, somebody was resumed, who was not killed is still there, nothing is held."""
        recovery = self.recoveries.wait(recoveries)
        assert_texts(self.server, self.streams, self.requests)
        assert recovery["resumed"] >= STREAMS // 2, f"it met {recovery['resumed']} sequences only"
        wait_until_served_again(self.server, dead)
        survivors = set(self.workers) - set(dead)
        assert survivors <= set(self.server.pids_of(WORKER)), "a rank was replaced that had kept its weights"
        assert_nothing_is_held(self.server)
        return max(gap for stream in self.streams if (gap := stream.gap_after(self.when)) is not None)[0]


@pytest.mark.fault(what="kill -9 worker", when="loading", holds="it is started again, the instance comes up; I7 I9")
@RANKS
def test_killed_while_loading(instance, rank):
    server = instance()
    wait_for(lambda: len(server.pids_of(WORKER)) == 2, 20, "workers exist")
    pid = server.pids_of(WORKER)[rank]  # they are started in the order of their ranks
    end(pid)
    server.wait_ready()
    wait_until_served_again(server, [pid])
    assert_serves(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="warm-up", holds="it is started again, the instance comes up; I7 I9")
@RANKS
def test_killed_while_warming_up(instance, rank):
    for _ in range(5):  # a small model may be ready before it can be killed
        server = instance()
        pid = wait_for_worker(server, rank)
        while ": created, " not in server.log():  # the pool, which the ranks map and then warm up with
            assert server.process.poll() is None, server.log()
        end(pid)
        if f"engine_worker.{rank}: ready: " not in server.log():
            break
        stop_cleanly(server)
    else:
        raise AssertionError("the rank was ready five times before it could be killed")
    server.wait_ready()
    wait_until_served_again(server, [pid])
    assert_serves(server)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="idle", holds="not ready, then ready; I2 I7 I8 I9")
@RANKS
def test_killed_while_idle(instance, rank):
    server = instance().wait_ready()
    workers = [wait_for_worker(server, each) for each in range(2)]
    end(workers[rank])
    assert_serves(server)  # a request that comes in the gap waits
    wait_until_served_again(server, [workers[rank]])
    assert workers[1 - rank] in server.pids_of(WORKER), "the survivor keeps its weights"
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="prefill chunk", holds="I1 I2 I7 I8 I9")
@RANKS
def test_killed_within_a_prompt(instance, rank):
    """Prompts one after another in small chunks, so that the first answer comes while others are being read."""
    server = instance("--max-num-batched-tokens", 64, "--no-enable-prefix-caching").wait_ready()
    pid = wait_for_worker(server, rank)
    recoveries = Recoveries(server)
    requests = prompt_requests(8)
    streams = [FastStream(server, request) for request in requests]
    wait_for(lambda: any(stream.pieces for stream in streams), 60, "the first prompt has been read")
    end(pid)
    waiting = sum(not stream.pieces for stream in streams)
    assert waiting >= 3, f"only {waiting} prompts were left when the rank was killed"
    recoveries.wait()
    assert_texts(server, streams, requests)
    wait_until_served_again(server, [pid])
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="decode", holds="I1 I2 I7 I8 I9")
@RANKS
def test_killed_while_decoding(instance, note, rank):
    server = instance().wait_ready()
    case = Case(server)
    end(case.workers[rank])
    note(f"pause of {case.finish([case.workers[rank]]):.2f} s")
    assert 'from="recompute"} 0' in server.get("/metrics", server.metrics_port)[1], "KV that could be kept was not"
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 every worker at once", when="decode", holds="I1 I2 I7 I8 I9")
def test_both_killed_at_once(instance, note):
    server = instance().wait_ready()
    case = Case(server)
    for pid in case.workers:
        end(pid)
    note(f"pause of {case.finish(case.workers):.2f} s")
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="during recovery", holds="I1 I2 I7 I8 I9")
@pytest.mark.parametrize("second", ["survivor at once", "survivor while the new one loads", "the new one while it loads",
                                    "the new one as it is attached"])
def test_killed_during_recovery(instance, note, second):
    server = instance().wait_ready()
    case = Case(server)
    first, survivor = case.workers
    attached = server.log().count("is attached")
    end(first)
    dead = [first, survivor]
    if second != "survivor at once":
        wait_for(lambda: set(server.pids_of(WORKER)) - {first, survivor}, 20, "a new worker exists")
        (new,) = set(server.pids_of(WORKER)) - {first, survivor}
        if second == "the new one as it is attached":
            wait_for(lambda: server.log().count("is attached") > attached, 30, "it is attached")
        if second.startswith("the new one"):
            dead[1] = new
    end(dead[1])
    note(f"pause of {case.finish(dead):.2f} s")
    stop_cleanly(server)


@pytest.mark.fault(what="kill -9 worker", when="blocks are copied between the tiers", holds="I1 I2 I7 I8 I9")
@RANKS
def test_killed_while_blocks_are_copied(instance, rank):
    """A pool of eleven prompts, and clients who ask for sixteen, which come back from the host tier all the time. In a
    smaller one the next prompt takes what is to be written back before it is: an eighth of the pool is, ahead of time."""
    server = instance("--max-model-len", 1024, "--max-num-seqs", 8, "--num-gpu-blocks-override", 160,
                      "--swap-space", 0.25).wait_ready()
    requests = [{**request, "prompt": request["prompt"][:2] + "床前明月光，疑是地上霜。" * 200, "max_tokens": 24}
                for request in long_requests(16)]
    texts = [FastStream(server, request).text() for request in requests]
    stopping = threading.Event()
    failures = []

    def ask(client):
        turn = client
        while not stopping.is_set() and not failures:
            index = turn % len(requests)
            turn += 5
            try:
                difference = text_difference(FastStream(server, requests[index]).text(), texts[index])
            except AssertionError as error:
                difference = str(error)
            if difference:
                failures.append(difference)

    def restored():
        return server.metric("fastdeploy:prefix_cpu_cache_token_num_total")

    clients = [threading.Thread(target=ask, args=(client,), daemon=True) for client in range(4)]
    for client in clients:
        client.start()
    dead = []
    try:
        for _ in range(3):
            recoveries = Recoveries(server)
            dead.append(wait_for_worker(server, rank))
            before = restored()
            wait_for(lambda before=before: failures or restored() > before, 20, "blocks come from host memory")
            end(dead[-1])
            recoveries.wait()
            before = restored()
            wait_for(lambda before=before: failures or restored() > before, 20, "blocks come from host memory again")
            if failures:
                break
    finally:
        stopping.set()
        for client in clients:
            client.join(60)
    assert not failures, f"{failures[:3]}\n{server.log()[-20000:]}"
    wait_until_served_again(server, dead)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="SIGSTOP worker, SIGCONT after replacement", when="decode", holds="dead by its step's deadline, fenced; I1 I2 I7 I8 I9")
@RANKS
def test_stopped(instance, note, rank):
    server = instance().wait_ready()
    case = Case(server)
    pid = case.workers[rank]
    end(pid, signal.SIGSTOP)
    wait_for(lambda: not is_alive(pid) or set(server.pids_of(WORKER)) - set(case.workers), 60, "it is replaced")
    if is_alive(pid):
        os.kill(pid, signal.SIGCONT)
    note(f"pause of {case.finish([pid]):.2f} s")
    stop_cleanly(server)


@pytest.mark.fault(what="SIGSTOP worker, SIGCONT after 0.5 s", when="decode", holds="nobody is replaced; I1 I2 I7 I8 I9")
def test_stopped_for_a_moment(instance):
    server = instance().wait_ready()
    case = Case(server)
    end(case.workers[0], signal.SIGSTOP)
    time.sleep(0.5)
    end(case.workers[0], signal.SIGCONT)
    assert_texts(server, case.streams, case.requests)
    assert server.pids_of(WORKER) == sorted(case.workers)
    assert_nothing_is_held(server)
    stop_cleanly(server)


def assert_nothing_came_from_the_old_cache(server):
    assert 'from="kv"} 0' in server.get("/metrics", server.metrics_port)[1], "KV that may be wrong was used"


@pytest.mark.fault(what="worker dies by itself", when="decode", holds="KV of its steps is not trusted; I1 I2 I7 I8 I9")
@pytest.mark.parametrize("sig", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS], ids=lambda sig: sig.name)
def test_fatal_signal(instance, note, sig):
    server = instance().wait_ready()
    case = Case(server)
    end(case.workers[1], sig)
    note(f"pause of {case.finish([case.workers[1]]):.2f} s")
    assert_nothing_came_from_the_old_cache(server)
    stop_cleanly(server)


@only_on_a_gpu
@pytest.mark.fault(what="illegal address in a kernel", when="decode", holds="KV of its steps is not trusted; I1 I2 I7 I8 I9")
@RANKS
def test_device_fault(instance, note, monkeypatch, rank):
    monkeypatch.setenv("CUDA_INJECTION64_PATH", str(FAULT_LIBRARIES / "libdevice_fault.so"))
    server = instance().wait_ready()
    case = Case(server)
    end(case.workers[rank], signal.SIGUSR2)
    note(f"pause of {case.finish([case.workers[rank]]):.2f} s")
    assert "device_fault: process" in server.log(), "the library was not loaded: the signal alone ended the process"
    assert "cudaErrorIllegalAddress" in server.log(), server.log()[-5000:]
    assert_nothing_came_from_the_old_cache(server)
    stop_cleanly(server)


def nccl_of_this_machine():
    """The library that the loader would take, by the directories of LD_LIBRARY_PATH."""
    for directory in [*os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/usr/lib/x86_64-linux-gnu",
                      "/usr/local/cuda/lib64"]:
        path = os.path.join(directory, "libnccl.so.2")
        if directory and os.path.exists(path):
            return path
    return pytest.skip("no libnccl.so.2 in LD_LIBRARY_PATH")


@only_on_a_gpu
@pytest.mark.fault(what="NCCL reports an error of a rank", when="decode", holds="another group of the same processes; I1 I2 I7 I8 I9")
@RANKS
def test_collective_error(instance, note, monkeypatch, tmp_path, rank):
    monkeypatch.setenv("WINTSERVE_TEST_NCCL", nccl_of_this_machine())
    shutil.copy(FAULT_LIBRARIES / "libnccl_fault.so", tmp_path / "libnccl.so.2")
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}:{os.environ.get('LD_LIBRARY_PATH', '')}")
    server = instance().wait_ready()
    case = Case(server)
    end(case.workers[rank], signal.SIGUSR1)
    note(f"pause of {case.finish([]):.2f} s")
    assert "NCCL: remote process exited or there was a network error" in server.log(), server.log()[-5000:]
    stop_cleanly(server)
