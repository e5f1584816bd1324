"""Changes single fields of gRPC messages on their way through a SocketProxy, and words of shared memory: what a broken
network card, a bad memory module or a stray write would do. Nothing that is changed gets longer or shorter."""
import mmap
import os
import struct
import threading
from pathlib import Path

HTTP2_PREFACE_BYTES = 24
HTTP2_FRAME_HEADER_BYTES = 9
HTTP2_DATA = 0
GRPC_PREFIX_BYTES = 5

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_varint(data, at):
    """(value, where it ends)"""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at


def fields(data, begin, end):
    """(number, wire type, where the value begins, where it ends) of each field of a protobuf message."""
    at = begin
    while at < end:
        tag, at = read_varint(data, at)
        kind = tag & 7
        if kind == VARINT:
            after = read_varint(data, at)[1]
        elif kind == BYTES:
            size, at = read_varint(data, at)
            after = at + size
        else:
            after = at + {FIXED64: 8, FIXED32: 4}[kind]
        yield tag >> 3, kind, at, after
        at = after


def find(data, *path):
    """(where its value begins, where it ends) of the field with these numbers, outermost first; None: not there."""
    begin, end = 0, len(data)
    for number in path:
        place = next(((b, e) for n, _, b, e in fields(data, begin, end) if n == number), None)
        if place is None:
            return None
        begin, end = place
    return begin, end


def number_at(data, *path):
    """Of a varint field; 0 when it is absent, as protobuf leaves it out then."""
    place = find(data, *path)
    return 0 if place is None else read_varint(data, place[0])[0]


class GrpcMessages:
    """The bytes of one direction of an HTTP/2 connection. Hands each gRPC message to `change`, which may change bytes of
    it in place, before it goes on. For streams of messages that fit into the peer's window, one stream a connection."""

    def __init__(self, from_client, change):
        self._change = change
        self._raw = bytearray()
        self._preface_left = HTTP2_PREFACE_BYTES if from_client else 0
        self._frames = []       # that wait for the end of a message
        self._message = bytearray()
        self._places = []       # (frame, offset, size) of what _message was put together from

    def feed(self, data):
        """What may go on now."""
        self._raw += data
        out = bytearray()
        if self._preface_left:
            out += self._raw[:self._preface_left]
            del self._raw[:len(out)]
            self._preface_left -= len(out)
        while len(self._raw) >= HTTP2_FRAME_HEADER_BYTES:
            size = HTTP2_FRAME_HEADER_BYTES + int.from_bytes(self._raw[:3], "big")
            if len(self._raw) < size:
                break
            self._take(self._raw[:size])
            del self._raw[:size]
        if not self._places:
            out += b"".join(self._frames)
            self._frames = []
        return bytes(out)

    def _take(self, frame):
        self._frames.append(frame)
        if frame[3] != HTTP2_DATA or len(frame) == HTTP2_FRAME_HEADER_BYTES:
            return
        assert not frame[4] & 0x8, "gRPC pads no frames"
        self._places.append((frame, HTTP2_FRAME_HEADER_BYTES, len(frame) - HTTP2_FRAME_HEADER_BYTES))
        self._message += frame[HTTP2_FRAME_HEADER_BYTES:]
        at = 0
        while len(self._message) - at >= GRPC_PREFIX_BYTES:
            compressed, size = struct.unpack_from(">BI", self._message, at)
            end = at + GRPC_PREFIX_BYTES + size
            if end > len(self._message):
                break
            if not compressed:
                message = self._message[at + GRPC_PREFIX_BYTES:end]
                self._change(message)
                assert len(message) == size
                self._message[at + GRPC_PREFIX_BYTES:end] = message
            at = end
        if at == 0:
            return
        # Back into the frames; what is left over begins the next message.
        done = 0
        left = []
        for frame, offset, size in self._places:
            frame[offset:offset + size] = self._message[done:done + size]
            if done + size > at:
                begin = max(done, at)
                left.append((frame, offset + begin - done, done + size - begin))
            done += size
        self._places = left
        del self._message[:at]


class SharedWords(threading.Thread):
    """Writes into a memfd that a process has open, again and again until told to end: a stray write that hits the right
    moment, whenever that is. offsets: a function of the memory's size."""

    def __init__(self, pid, name, offsets, value):
        super().__init__(daemon=True)
        fd = next(path for path in Path(f"/proc/{pid}/fd").iterdir()
                  if os.readlink(path).startswith(f"/memfd:{name} "))
        with open(fd, "r+b", buffering=0) as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._offsets = offsets(len(self._memory))
        self._value = value
        self._ending = threading.Event()
        self.start()

    def run(self):
        while not self._ending.is_set():
            for offset in self._offsets:
                self._memory[offset:offset + len(self._value)] = self._value

    def end(self):
        self._ending.set()
        self.join()
        self._memory.close()
