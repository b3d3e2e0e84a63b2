"""A line with a delay, for measuring: a TCP relay that passes everything on some milliseconds later.

`python -m benchmarks.delay 127.0.0.1:8765 --round-trip 50` prints the address that it listens on. The delay does not
limit what is on its way at once; --up does limit what leaves a second.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
from contextlib import suppress

BLOCK = 65_536


class Line:
    """One way of a connection: bytes leave at most so fast, and arrive `delay` seconds later."""

    def __init__(self, delay: float, bytes_a_second: float | None = None) -> None:
        self._delay = delay
        self._bytes_a_second = bytes_a_second
        self._free = 0.0  # when the last byte has left
        self._under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the sender ends its side; then so does the receiver's."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take(reader))
            group.create_task(self._give(writer))

    async def _take(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        block = b"-"
        while block:
            try:
                block = await reader.read(BLOCK)
            except ConnectionError:
                block = b""
            leaves = loop.time()
            if self._bytes_a_second is not None:
                leaves = self._free = max(leaves, self._free) + len(block) / self._bytes_a_second
            self._under_way.put_nowait((leaves + self._delay, block))
            # A sender is held up by a line that is full, as by a real one: what has not left waits with it.
            await asyncio.sleep(max(0.0, leaves - loop.time()))

    async def _give(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with suppress(ConnectionError):
            while True:
                arrives, block = await self._under_way.get()
                await asyncio.sleep(max(0.0, arrives - loop.time()))
                if not block:
                    writer.write_eof()
                    return
                writer.write(block)
                await writer.drain()


async def relay(
    host: str, port: int, *, delay: float, up_bytes_a_second: float | None = None, listen: int = 0
) -> asyncio.Server:
    """A server on loopback that relays to host:port with `delay` seconds each way; its socket says on which port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        except OSError:
            writer.close()
            return
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.gather(
                Line(delay, up_bytes_a_second).carry(reader, far_writer), Line(delay).carry(far_reader, writer)
            )
        except asyncio.CancelledError:
            pass  # the relay ends, and asyncio would say of every connection that it was open
        finally:
            for one in (writer, far_writer):
                one.close()

    return await asyncio.start_server(serve, "127.0.0.1", listen)


async def _run(to: str, round_trip: float, up: float | None) -> None:
    host, _, port = to.rpartition(":")
    up_bytes = None if up is None else up * 1e6 / 8
    async with await relay(host, int(port), delay=round_trip / 2000, up_bytes_a_second=up_bytes) as server:
        name, number = server.sockets[0].getsockname()[:2]
        print(f"listening on {name}:{number}", flush=True)
        await server.serve_forever()


def main() -> None:
    """Relays until it is killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("to", metavar="HOST:PORT")
    parser.add_argument("--round-trip", type=float, default=0.0, metavar="MS")
    parser.add_argument("--up", type=float, metavar="MBIT", help="megabits a second towards HOST")
    options = parser.parse_args()
    asyncio.run(_run(options.to, options.round_trip, options.up))


if __name__ == "__main__":
    main()
