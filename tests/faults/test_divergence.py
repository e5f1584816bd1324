"""Ranks that no longer do the same: what one hears, says or shares is changed on its way, by as little as one bit."""
import threading
import time

import pytest

from faults import (WORKER, Stream, assert_nothing_is_held, fault_free_texts, greedy, longest_pause, prompts, stop_cleanly,
                    wait_for_tokens)
from server import wait_for
from tamper import GrpcMessages, SharedWords, find, number_at

NUM_STREAMS = 6
MAX_TOKENS = 300

# Field numbers of proto/work_queue.proto.
HELLO, HELLO_RANK = 1, 3
STEP_DONE, STEP_DONE_PLAN_HASH, STEP_DONE_SAMPLED_DIGEST = 4, 3, 7
PLAN, PLAN_PREVIOUS_HASH, PLAN_TOKENS = 3, 3, 9

# Of the memory that ranks sum in; see engine_worker/collectives/shm/shm_collective.cc.
GROUP_MEMORY = "wintserve-group"
GROUP_HEADER_BYTES = 4096
ARRIVED_OFFSET = 64


class OneBit:
    """Flips a bit of the field at `path`, once, in the first message of that rank that has it after arm()."""

    def __init__(self, rank, from_worker, path):
        self.done = threading.Event()
        self._rank = rank
        self._from_worker = from_worker
        self._path = path
        self._armed = False

    def arm(self):
        self._armed = True

    def filters(self):
        rank = []

        def from_worker(message):
            if find(message, HELLO):
                rank[:] = [number_at(message, HELLO, HELLO_RANK)]
            elif self._from_worker:
                self._change(rank, message)

        def to_worker(message):
            if not self._from_worker:
                self._change(rank, message)
        return GrpcMessages(True, from_worker), GrpcMessages(False, to_worker)

    def _change(self, rank, message):
        place = find(message, *self._path)
        if not self._armed or self.done.is_set() or rank != [self._rank] or place is None:
            return
        message[place[0]] ^= 1
        self.done.set()


def wait_until_served_again(server):
    wait_for(lambda: len(server.pids_of(WORKER)) == 2 and server.get("/health")[0] == 200, 60, "it serves again")


def assert_group_was_lost_once(server, why):
    log = server.log()
    assert log.count(" is lost, its ") == 1, log
    assert "its last KV is not trusted" in log and why in log, log
    # No request goes on from what may be wrong.
    assert 'from="kv"} 0' in server.get("/metrics", server.metrics_port)[1]


@pytest.mark.fault(what="one bit of a message differs", when="decode", holds="ranks diverge: nobody dies, all is computed again; I1 I2 I7 I8 I9")
@pytest.mark.parametrize("rank", [0, 1], ids=["r0", "r1"])
@pytest.mark.parametrize("path, why", [
    ((STEP_DONE, STEP_DONE_PLAN_HASH), "ran another plan as step"),
    ((STEP_DONE, STEP_DONE_SAMPLED_DIGEST), "went on with different tokens"),
], ids=["plan hash of an answer", "digest of sampled ids"])
def test_answer_of_a_rank(between, path, why, rank):
    bit = OneBit(rank, True, path)
    server, _ = between("work_queue.sock", 2, filters=bit.filters)
    requests = [greedy(prompt, MAX_TOKENS) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    workers = server.pids_of(WORKER)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    bit.arm()
    assert [stream.text() for stream in streams] == expected, server.log()
    assert bit.done.is_set(), "nothing was changed: a test of nothing"
    wait_until_served_again(server)
    assert server.pids_of(WORKER) == workers, "a process was replaced without need"
    assert_group_was_lost_once(server, why)
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="one bit of a message differs", when="prompt, token of a rank's plan", holds="ranks diverge: all is computed again; I1 I2 I7 I8 I9")
@pytest.mark.parametrize("rank", [0, 1], ids=["r0", "r1"])
def test_token_of_a_plan(between, rank):
    """The rank computes KV of another token, with which nothing of the group's work may go on. Whoever comes first finds
    it: the API server by the hash in the rank's answer, or the rank itself by that in the next plan."""
    bit = OneBit(rank, False, (PLAN, PLAN_TOKENS))
    server, _ = between("work_queue.sock", 2, filters=bit.filters)
    requests = [greedy(prompt, MAX_TOKENS) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests[:-1]]
    wait_for_tokens(streams, 10)
    bit.arm()
    streams.append(Stream(server, requests[-1]))
    assert [stream.text() for stream in streams] == expected, server.log()
    assert bit.done.is_set(), "nothing was changed: a test of nothing"
    wait_until_served_again(server)
    assert_group_was_lost_once(server, f"engine worker {rank} r")  # "ran another plan" or "reports a fault"
    assert fault_free_texts(server, requests) == expected, "the prefix cache has kept what is wrong"
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fast
@pytest.mark.fault(what="one bit of a message differs", when="decode, hash of the plan before", holds="the rank refuses the plan and is replaced, all is computed again; I1 I2 I7 I8 I9")
def test_chain_of_plans(between):
    bit = OneBit(1, False, (PLAN, PLAN_PREVIOUS_HASH))
    server, _ = between("work_queue.sock", 2, filters=bit.filters)
    requests = [greedy(prompt, MAX_TOKENS) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    bit.arm()
    assert [stream.text() for stream in streams] == expected, server.log()
    assert bit.done.is_set(), "nothing was changed: a test of nothing"
    wait_until_served_again(server)
    assert_group_was_lost_once(server, "engine worker 1 reports a fault")
    assert_nothing_is_held(server)
    stop_cleanly(server)


def slot_header_offsets(rank, num_ranks, memory_bytes):
    """Where a rank says which collective it is in, in both of the buffers that rounds take turns with."""
    stride = (memory_bytes - GROUP_HEADER_BYTES) // (2 * num_ranks)
    return [GROUP_HEADER_BYTES + (buffer * num_ranks + rank) * stride for buffer in range(2)]


@pytest.mark.fault(what="stray writes into the memory that ranks sum in", when="decode", holds="a collective error: replaced, all is computed again; I1 I2 I7 I8 I9")
def test_collective_error(start):
    server = start("--tensor-parallel-size", 2, "--max-model-len", 2048).wait_ready()
    requests = [greedy(prompt, MAX_TOKENS) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    stray = SharedWords(server.pids_of(WORKER)[0], GROUP_MEMORY, lambda size: slot_header_offsets(1, 2, size), b"\x55" * 8)
    try:
        wait_for(lambda: " is lost, its " in server.log(), 30, "the group is lost")
    finally:
        stray.end()
    assert [stream.text() for stream in streams] == expected, server.log()
    wait_until_served_again(server)
    assert "is in collective 6148914691236517205" in server.log()
    assert_group_was_lost_once(server, "reports a fault")
    assert_nothing_is_held(server)
    stop_cleanly(server)


@pytest.mark.fault(what="stray writes into the memory that ranks sum in", when="decode, count of arrivals", holds="ranks wait for ever: dead by the step's deadline, nobody is replaced; I1 I2 I7 I8 I9")
def test_collective_hangs(start, note):
    server = start("--tensor-parallel-size", 2, "--max-model-len", 2048).wait_ready()
    requests = [greedy(prompt, MAX_TOKENS) for prompt in prompts(NUM_STREAMS)]
    expected = fault_free_texts(server, requests)
    workers = server.pids_of(WORKER)
    streams = [Stream(server, request) for request in requests]
    wait_for_tokens(streams, 10)
    when = time.monotonic()
    stray = SharedWords(workers[0], GROUP_MEMORY, lambda size: [ARRIVED_OFFSET], b"\x55" * 4)
    try:
        wait_for(lambda: " is lost, its " in server.log(), 60, "the group is lost")
    finally:
        stray.end()
    assert [stream.text() for stream in streams] == expected, server.log()
    note(f"pause of {longest_pause(streams, when, time.monotonic())[0]:.1f} s")
    wait_until_served_again(server)
    assert "has not done step" in server.log()
    assert server.pids_of(WORKER) == workers, "a process was replaced without need"
    assert_nothing_is_held(server)
    stop_cleanly(server)
