"""Stands between a process and one of the instance's Unix sockets, and does to the bytes what a network can."""
import asyncio
import contextlib
import os
import threading
import time


class SocketProxy:
    """Takes over the socket at `path` (whoever connects from now on comes through here): start it as soon as the socket
    is there. Each direction of each connection keeps its order, as TCP does; what `hold` keeps back comes later."""

    def __init__(self, path, filters=None):
        """filters: called for each connection, returns two objects of bytes.feed(bytes), for what goes to the socket's
        owner and for what comes from it."""
        self.path = path
        self.num_connections = 0
        self.delay_s = 0.0
        self._filters = filters
        self._real = path.with_suffix(".real")
        self._holding = False
        self._writers = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        os.rename(path, self._real)
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(5)

    def hold(self, holding):
        """True: nothing gets through, on connections of now and later. False: all of it, late."""
        def change():
            self._holding = holding
            self._changed.set()
        self._loop.call_soon_threadsafe(change)

    def cut(self):
        """Ends every connection, as a reset does."""
        def abort():
            for writer in list(self._writers):
                writer.transport.abort()
        self._loop.call_soon_threadsafe(abort)

    def close(self):
        self.cut()
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._real, self.path)

    def _run(self, ready):
        asyncio.set_event_loop(self._loop)
        self._server = self._loop.run_until_complete(asyncio.start_unix_server(self._serve, str(self.path)))
        ready.set()
        self._loop.run_forever()

    async def _end_tasks(self):
        self._server.close()  # first, for whoever was cut off comes back
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader, writer):
        self.num_connections += 1
        try:
            peer_reader, peer_writer = await asyncio.open_unix_connection(str(self._real))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, peer_writer}
        there, back = self._filters() if self._filters else (None, None)
        await asyncio.gather(self._forward(reader, peer_writer, there), self._forward(peer_reader, writer, back))
        self._writers -= {writer, peer_writer}

    async def _forward(self, reader, writer, data_filter):
        queue = asyncio.Queue()
        await asyncio.gather(self._receive(reader, queue, data_filter), self._send(queue, writer))

    async def _receive(self, reader, queue, data_filter):
        while True:
            try:
                data = await reader.read(65536)
            except OSError:
                data = b""
            if not data:
                break
            if data_filter is not None:
                data = data_filter.feed(data)
            if data:
                queue.put_nowait((time.monotonic(), data))
        queue.put_nowait((time.monotonic(), b""))

    async def _send(self, queue, writer):
        while True:
            came, data = await queue.get()
            await asyncio.sleep(max(0.0, came + self.delay_s - time.monotonic()))
            while self._holding:
                self._changed.clear()
                await self._changed.wait()
            if not data:
                break
            try:
                writer.write(data)
                await writer.drain()
            except OSError:
                break
        with contextlib.suppress(OSError):
            writer.close()
