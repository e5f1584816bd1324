"""Deaths of random ranks of two GPUs under streams that never rest. Runs with --device cpu, too."""
import random
import statistics
import threading
import time

import pytest

from fast_stream import FastStream, Recoveries, text_difference
from faults import assert_nothing_is_held, end, open_descriptors, stop_cleanly, wait_for_worker
from gpu_cases import expected, long_requests
from server import wait_for

pytestmark = pytest.mark.gpu

STREAMS = 8
KILLS = 20
MOST_SECONDS = 5.0  # of the median recovery


class BusyClients:
    """Keeps a stream open for each client, a new one as soon as one has ended, until told to end; compares every
    text with the one that it has without faults."""

    def __init__(self, server, requests, expected, count):
        self.current = [None] * count
        self.failures = []
        self.num_ended = 0
        self._server = server
        self._wanted = list(zip(requests, expected))
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self, client):
        turn = client
        while not self._stopping.is_set() and not self.failures:
            request, expected = self._wanted[turn % len(self._wanted)]
            turn += len(self.current)
            self.current[client] = stream = FastStream(self._server, request)
            try:
                failure = text_difference(stream.text(), expected)
            except AssertionError as error:
                failure = str(error)
            with self._lock:
                self.num_ended += 1
                if failure:
                    self.failures.append(f"client {client}, {request['prompt'][:20]}…: {failure}")

    def all_receive(self):
        """Each of them has got something within the last moment."""
        now = time.monotonic()
        return all(stream is not None and now - stream.last_at < 0.2 for stream in self.current)

    def finish(self):
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
        return self


@pytest.mark.fault(what="kill -9 a random worker, again and again", when="8 streams all the time, TP2",
                   holds="every kill meets streams; I1 I2 I7 I8 I9")
@pytest.mark.limit(seconds=240)
def test_campaign_under_streams_that_never_rest(instance, request, note, seed):
    kills = min(KILLS, request.config.getoption("--kills"))
    chance = random.Random(seed)
    server = instance().wait_ready()
    requests = long_requests(2 * STREAMS)
    descriptors = open_descriptors(server)
    pids = [wait_for_worker(server, rank) for rank in range(2)]
    clients = BusyClients(server, requests, expected(requests), STREAMS)
    seconds, met = [], []
    try:
        for kill in range(kills):
            wait_for(lambda: clients.failures or clients.all_receive(), 60, f"every stream receives before kill {kill}")
            time.sleep(chance.uniform(0, 0.5))
            wait_for(lambda: clients.failures or clients.all_receive(), 60, f"every stream receives before kill {kill}")
            if clients.failures:
                break
            rank = chance.randrange(2)
            recoveries = Recoveries(server)
            streams = list(clients.current)
            when = end(pids[rank])
            recovery = recoveries.wait()
            again = time.monotonic()
            wait_for(lambda: clients.failures or all(stream.ended or stream.last_at > again for stream in streams), 60,
                     f"every stream receives after kill {kill}")
            if clients.failures:
                break
            met.append(int(recovery["resumed"]))
            gaps = [gap for stream in streams if (gap := stream.gap_after(when)) is not None]
            seconds.append(max(until for _, until in gaps))
            pids[rank] = wait_for_worker(server, rank)
            print(f"kill {kill + 1}: rank {rank}, {met[-1]} sequences resumed, {recovery['seconds']:.2f} s by the "
                  f"server, {seconds[-1]:.2f} s until every stream went on, {clients.num_ended} streams done", flush=True)
    finally:
        clients.finish()
    assert not clients.failures, f"seed {seed}, after {len(seconds)} kills: {clients.failures[:3]}\n{server.log()[-20000:]}"
    assert len(seconds) == kills
    assert_nothing_is_held(server, timeout_s=30)
    after = open_descriptors(server)
    assert all(total <= descriptors[name] + 4 for name, total in after.items()), (descriptors, after)
    note(f"{kills} kills, {clients.num_ended} streams; recovery p50 {statistics.median(seconds):.2f} s, max "
         f"{max(seconds):.2f} s; {min(met)} to {max(met)} sequences ran at a kill")
    assert min(met) >= STREAMS - 2, f"a kill met too few streams to prove anything: {met}"
    assert statistics.median(seconds) < MOST_SECONDS, seconds
    stop_cleanly(server)
