"""What every case of the fault suite needs: streams that remember when each piece came, deaths of processes by role
and rank, and the invariants that can be seen from outside."""
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from openai import OpenAI

from server import Server, wait_for

WORKER = "wintserve-engine-worker"
API_SERVER = "wintserve-api-server"
CACHE_MANAGER = "wintserve-cache-manager"

POEM = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"
END_OF_A_STREAM_S = 120  # I8: no stream may take longer, whatever dies


def cases(ids, *fast_ids):
    """For parametrize: of these the named ones are part of `make test`."""
    return [pytest.param(id_, marks=pytest.mark.fast) if id_ in fast_ids else id_ for id_ in ids]


def prompts(count):
    """Distinct from their first token on, with lengths from one block to several."""
    return [f"{i} " + POEM * (1 + i % 7) for i in range(count)]


def client_of(server):
    return OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY_API_KEY", max_retries=0, timeout=END_OF_A_STREAM_S)


def greedy(prompt, max_tokens):
    return {"model": "", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens,
            "extra_body": {"ignore_eos": True}}


def fault_free_texts(server, requests):
    """What each request answers when nothing happens; all at once, since a text depends on no neighbour."""
    streams = [Stream(server, request) for request in requests]
    return [stream.text() for stream in streams]


class StreamEnd:
    """What a stream that a thread reads has come to; both readers of streams are one."""

    longest_wait_s = END_OF_A_STREAM_S

    def wait(self, timeout_s=None):
        timeout_s = timeout_s or self.longest_wait_s
        self._thread.join(timeout_s)
        assert self.ended is not None, f"I8: a stream has not ended within {timeout_s} s: {self.request}"
        return self

    def text(self):
        """The whole text of a stream that must not fail. I1: as many tokens as were asked for."""
        self.wait()
        assert self.error is None, f"a stream failed: {self.error!r}"
        assert self.finish_reason == "length" and self.usage is not None
        assert self.usage["completion_tokens"] == self.request["max_tokens"], self.usage
        return self.text_so_far

    @property
    def text_so_far(self):
        return "".join(text for _, text in list(self.pieces))


class Stream(StreamEnd):
    """A streamed completion of the openai client, read by a thread of its own."""

    def __init__(self, server, request):
        self.request = request
        self.pieces = []    # (monotonic time, text)
        self.usage = None
        self.finish_reason = None
        self.error = None
        self.began = time.monotonic()
        self.ended = None
        self._client = client_of(server)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        try:
            for chunk in self._client.completions.create(
                    **self.request, stream=True, stream_options={"include_usage": True}):
                if chunk.usage is not None:
                    self.usage = chunk.usage.model_dump()
                for choice in chunk.choices:
                    if choice.text:
                        self.pieces.append((time.monotonic(), choice.text))
                    self.finish_reason = choice.finish_reason or self.finish_reason
        except Exception as error:  # whatever ended it is the test's to judge
            self.error = error
        finally:
            self.ended = time.monotonic()
            self._client.close()


def wait_for_tokens(streams, count, timeout_s=60):
    wait_for(lambda: all(len(stream.pieces) >= count or stream.ended for stream in streams), timeout_s,
             f"every stream has {count} pieces")


def longest_pause(streams, begin, end):
    """(seconds, when it ended): of the time without a token of any stream that ends after `begin`."""
    times = sorted(when for stream in streams for when, _ in list(stream.pieces) if when <= end)
    pauses = [(after - max(before, begin), after) for before, after in zip(times, times[1:]) if after > begin]
    return max(pauses, default=(0.0, begin))


def start_time(pid):
    """Tells a process from a later one with its number."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]


def worker_pid(server, rank):
    """The live engine worker of that rank: the last that has said so in the log."""
    alive = server.pids_of(WORKER)
    said = [int(pid) for pid in re.findall(rf"(?m) (\d+) engine_worker\.{rank}: ", server.log())
            if int(pid) in alive]
    return said[-1] if said else None


def wait_for_worker(server, rank, timeout_s=30):
    wait_for(lambda: worker_pid(server, rank) is not None, timeout_s, f"engine worker {rank} runs")
    return worker_pid(server, rank)


def end(pid, sig=signal.SIGKILL):
    """Returns when it was sent."""
    when = time.monotonic()
    os.kill(pid, sig)
    return when


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def assert_nothing_is_held(server, timeout_s=20):
    """I2 as the metrics tell it: no request is open, every block is free or only cached."""
    wait_for(lambda: server.metric("fastdeploy:num_requests_running") == 0
             and server.metric("fastdeploy:num_requests_waiting") == 0, timeout_s, "no request is open")
    wait_for(lambda: server.metric("fastdeploy:free_gpu_block_num") == server.metric("fastdeploy:max_gpu_block_num"),
             timeout_s, "every block can be had")


def open_descriptors(server):
    """{process: descriptors}; processes of one name add up."""
    found = {}
    for pid, name in server.processes().items():
        try:
            found[name] = found.get(name, 0) + len(list(Path(f"/proc/{pid}/fd").iterdir()))
        except OSError:
            continue
    return found


def stop_cleanly(server, code=0):
    """I9: exit code, processes, ports, sockets and files of the instance."""
    assert server.stop() == code, server.log()
    server.assert_nothing_left()
    server.assert_runtime_dir_empty()


__all__ = [name for name in dir() if not name.startswith("_")]
assert Server  # handed on to the tests
