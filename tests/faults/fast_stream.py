"""A client that keeps up with a GPU: of eight streams of a small model come some ten thousand events a second, which
is more than the openai client reads in Python, so that what it sees would lag behind what happens."""
import http.client
import json
import threading
import time

from faults import StreamEnd, wait_for

LONGEST_WAIT_S = 60  # I8 on a GPU: for a whole stream, whatever dies


class FastStream(StreamEnd):
    """A streamed completion read by a thread of its own, with what the functions of faults.py look at."""

    longest_wait_s = LONGEST_WAIT_S

    def __init__(self, server, request):
        self.request = request
        self.pieces = []    # (monotonic time, text)
        self.usage = None
        self.finish_reason = None
        self.error = None
        self.ended = None
        self._port = server.port
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        body = {**self.request, **self.request.get("extra_body", {}), "stream": True,
                "stream_options": {"include_usage": True}}
        body.pop("extra_body", None)
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LONGEST_WAIT_S)
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise OSError(f"{response.status}: {response.read().decode()}")
            rest = b""
            while data := response.read1(1 << 16):
                *events, rest = (rest + data).split(b"\n\n")
                now = time.monotonic()
                for event in events:
                    if event.startswith(b"data: {"):
                        self._take(json.loads(event[6:]), now)
        except Exception as error:  # whatever ended it is the test's to judge
            self.error = error
        finally:
            self.ended = time.monotonic()
            connection.close()

    def _take(self, event, now):
        if "error" in event:
            raise OSError(f"an event says {event}")
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            if choice["text"]:
                self.pieces.append((now, choice["text"]))
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    @property
    def last_at(self):
        """When the last piece came; 0: none has."""
        return self.pieces[-1][0] if self.pieces else 0.0

    def gap_after(self, when):
        """(seconds without a piece, seconds from `when` to its end): the longest one that ends after `when`. None:
        there is none, since the stream was at its end."""
        times = [at for at, _ in self.pieces]
        gaps = [(after - max(before, when), after - when) for before, after in zip(times, times[1:]) if after > when]
        return max(gaps, default=None)


def wait_until_under_way(streams, pieces=10):
    wait_for(lambda: all(len(stream.pieces) >= pieces or stream.ended for stream in streams), LONGEST_WAIT_S,
             f"every stream has {pieces} pieces")
    ended = [stream.request for stream in streams if stream.ended]
    assert not ended, f"a stream ended before anything could happen to it: {ended}"


class Recoveries:
    """What the server's own metrics say of the group's recoveries since this was made: the clients' view of a kill
    may lag behind it, so that it alone does not tell whom the kill met."""

    def __init__(self, server):
        self._server = server
        self._before = self._now()

    def _now(self):
        metric = self._server.metric
        return {"count": metric("wintserve:recovery_seconds_count"), "seconds": metric("wintserve:recovery_seconds_sum"),
                "resumed": metric("wintserve:resumed_sequences_total")}

    def wait(self, count=1, timeout_s=LONGEST_WAIT_S):
        """{count, seconds, resumed} since then, of at least `count` recoveries."""
        def since():
            return {name: value - self._before[name] for name, value in self._now().items()}
        wait_for(lambda: since()["count"] >= count, timeout_s, f"{count} recoveries")
        return since()


def text_difference(got, wanted):
    """"": none. For messages: texts are too long to show."""
    if got == wanted:
        return ""
    at = next((i for i, pair in enumerate(zip(got, wanted)) if pair[0] != pair[1]), min(len(got), len(wanted)))
    return f"differs at {at} of {len(wanted)}: {got[at:at + 40]!r}, wanted {wanted[at:at + 40]!r}"
