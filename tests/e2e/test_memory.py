"""The memory of a server is that of the requests that are open: none that has ended leaves anything, however it ended."""
import asyncio
import json
import re
import time
from pathlib import Path

from server import PATIENCE_S, wait_for

PROMPT = [300 + i % 7000 for i in range(900)]
PROMPT_BYTES = 4 * len(PROMPT)  # its ids alone, wherever a request is kept
CLIENTS = 24
REQUESTS = 240  # of each kind
BURST = 600


NUM_CHOICES = 128  # the most that a request may have


def start_small(start, max_queue_requests):
    return start("--max-model-len", "1024", "--max-num-seqs", "8", "--num-gpu-blocks-override", "160",
                 "--max-queue-requests", max_queue_requests, "--log-level", "warning").wait_ready()


def private_kib(server):
    """{process: RssAnon}: the KV pool is shared memory, which does not count here."""
    return {name: int(re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
            for pid, name in server.processes().items()}


def message(**fields):
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2, "ignore_eos": True, **fields}).encode()
    return (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body)) + body


async def ask(server, request, leave_early=False):
    """The status. With leave_early the client goes once the answer has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    if not leave_early:
        await reader.read()
    writer.transport.abort()
    return int(head.split()[1])


def ask_often(server, count, request, expected_statuses, beside=None, **how):
    """`beside`: a request that is there all the time, and whose client leaves at the end."""
    async def client(num_requests):
        return [await ask(server, request, **how) for _ in range(num_requests)]

    async def clients():
        if beside is not None:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(beside)
            await reader.readuntil(b"\r\n\r\n")
        statuses = await asyncio.gather(*(client(count // CLIENTS) for _ in range(CLIENTS)))
        if beside is not None:
            writer.transport.abort()
        return {status for own in statuses for status in own}

    assert asyncio.run(clients()) <= expected_statuses
    wait_for_no_request(server)


def wait_for_no_request(server):
    wait_for(lambda: server.metric("fastdeploy:num_requests_waiting") == 0
             and server.metric("fastdeploy:num_requests_running") == 0, PATIENCE_S, "all requests are over")


def test_requests_of_every_kind_leave_nothing(start):
    server = start_small(start, max_queue_requests=NUM_CHOICES - 1)
    kinds = {
        "an answer in one piece": (message(), {200}, {}),
        "a stream": (message(stream=True), {200}, {}),
        "a stream whose client leaves": (message(stream=True, max_tokens=100), {200}, {"leave_early": True}),
        "a refusal of the full queue": (message(n=NUM_CHOICES), {429},
                                        {"beside": message(n=NUM_CHOICES, stream=True, max_tokens=120)}),
        "an invalid field": (message(temperature=-1), {400}, {}),
        "a timeout": (message(timeout=0.0005), {504, 429}, {}),
    }
    for request, statuses, how in kinds.values():  # caches fill, threads start
        ask_often(server, REQUESTS, request, statuses, **how)
    kept_kib = REQUESTS * PROMPT_BYTES / 1024  # if the prompts were kept
    for kind, (request, statuses, how) in kinds.items():
        rounds = [private_kib(server)]
        # A heap may grow by chance, but what is kept makes it grow every time.
        while len(rounds) < 4:
            ask_often(server, REQUESTS, request, statuses, **how)
            rounds.append(private_kib(server))
            if all(kib - rounds[-2][process] < kept_kib / 4 for process, kib in rounds[-1].items()):
                break
        else:
            raise AssertionError(f"{kind}: KiB of private memory before, and after every {REQUESTS}: {rounds}")


def test_a_burst_gives_its_memory_back(start):
    server = start_small(start, max_queue_requests=BURST)
    ask_often(server, CLIENTS, message(), {200})
    calm = private_kib(server)["wintserve-api-server"]

    async def burst():
        connections = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(BURST)]
        for _, writer in connections:
            writer.write(message(stream=True, max_tokens=100))
        for _, writer in connections:
            await writer.drain()
        deadline = time.monotonic() + 30
        while server.metric("fastdeploy:num_requests_waiting") < BURST / 2:
            assert time.monotonic() < deadline, "the requests do not queue up"
            await asyncio.sleep(0.1)
        peak = private_kib(server)["wintserve-api-server"]
        for _, writer in connections:
            writer.transport.abort()
        return peak

    peak = asyncio.run(burst())
    assert peak - calm > BURST * PROMPT_BYTES / 1024, "the burst took no memory: a test of nothing"
    wait_for_no_request(server)
    wait_for(lambda: private_kib(server)["wintserve-api-server"] - calm < (peak - calm) / 2, PATIENCE_S,
             f"the memory of a burst, {calm} to {peak} KiB, goes back to the system")
