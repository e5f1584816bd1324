"""Random deaths of random workers under load, again and again."""
import random
import statistics
import threading
import time

import pytest

from faults import (WORKER, Stream, assert_nothing_is_held, cases, end, fault_free_texts, greedy, longest_pause,
                    open_descriptors, prompts, stop_cleanly)
from server import wait_for

MAX_TOKENS = 400


class Clients:
    """Keeps `count` greedy streams open until told to end; checks every text that is complete."""

    def __init__(self, server, requests, expected, count):
        self.streams = []
        self.failures = []
        self._server = server
        self._wanted = list(zip(requests, expected))
        self._stopping = threading.Event()
        self._next = 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self):
        while not self._stopping.is_set() and not self.failures:
            with self._lock:
                request, expected = self._wanted[self._next % len(self._wanted)]
                self._next += 1
                stream = Stream(self._server, request)
                self.streams.append(stream)
            try:
                text = stream.text()
                if text != expected:
                    same = next((i for i, pair in enumerate(zip(text, expected)) if pair[0] != pair[1]), -1)
                    self.failures.append(f"{request}: differs at {same}: {text[same:same + 40]!r}, "
                                         f"expected {expected[same:same + 40]!r}")
            except AssertionError as error:
                self.failures.append(f"{request}: {error}")

    def num_tokens_since(self, when):
        return sum(1 for stream in list(self.streams) for at, _ in list(stream.pieces) if at > when)

    def finish(self):
        self._stopping.set()
        for thread in self._threads:
            thread.join(150)
        return self


@pytest.mark.fault(what="kill -9 a random worker, again and again", when="streams all the time", holds="I1 I2 I7 I8 I9")
@pytest.mark.parametrize("ranks", cases([2, 4], 2), ids=["TP2", "TP4"])
def test_campaign(start, request, note, seed, ranks):
    option = request.config.getoption
    kills, count = option("--kills"), option("--campaign-streams")
    chance = random.Random(seed)
    server = start("--tensor-parallel-size", ranks, "--max-model-len", 1024, "--max-num-seqs", count).wait_ready(120)
    requests = [greedy(prompt, MAX_TOKENS) for prompt in prompts(2 * count)]
    expected = fault_free_texts(server, requests)
    descriptors = open_descriptors(server)
    clients = Clients(server, requests, expected, count)
    recoveries = []
    try:
        for kill in range(kills):
            # The group works: tokens come since the last kill. Then a random moment.
            begin = time.monotonic()
            wait_for(lambda: clients.failures or clients.num_tokens_since(begin) > count, 60, f"tokens before kill {kill}")
            time.sleep(chance.uniform(0, 0.5))
            if clients.failures:
                break
            wait_for(lambda: len(server.pids_of(WORKER)) == ranks, 30, "every rank has a worker")
            when = end(chance.choice(server.pids_of(WORKER)))
            # What was computed before may still arrive for a moment.
            wait_for(lambda: clients.failures or clients.num_tokens_since(when + 0.1) > count, 90,
                     f"tokens after kill {kill}")
            recoveries.append(longest_pause(clients.streams, when, time.monotonic())[1] - when)
    finally:
        clients.finish()
    assert not clients.failures, f"seed {seed}, after {len(recoveries)} kills: {clients.failures[:3]}\n{server.log()[-20000:]}"
    assert_nothing_is_held(server, timeout_s=30)
    after = open_descriptors(server)
    assert all(total <= descriptors[name] + 4 for name, total in after.items()), (descriptors, after)
    cuts = statistics.quantiles(recoveries, n=100, method="inclusive")
    note(f"{len(recoveries)} kills (--seed {seed}), {count} streams at a time, {len(clients.streams)} in all; recovery "
         f"p50 {cuts[49]:.2f} s, p99 {cuts[98]:.2f} s, max {max(recoveries):.2f} s")
    stop_cleanly(server)
    assert kills < 100 or cuts[49] < 1.5, f"recovery p50 {cuts[49]:.2f} s"
