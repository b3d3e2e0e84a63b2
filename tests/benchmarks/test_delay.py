"""The delaying line that drafts are measured on."""

from __future__ import annotations

import asyncio
import time

import pytest

from benchmarks.delay import relay

SIZE = 4 * 2**20


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while block := await reader.read(65_536):
        writer.write(block)
        await writer.drain()
    writer.close()


async def _timed(blocks: list[bytes], **line: float) -> tuple[list[float], bytes]:
    """Sends blocks through the line to an echo, each once the one before is back: seconds of each, and what came."""
    async with await asyncio.start_server(_echo, "127.0.0.1", 0) as echo:
        port = echo.sockets[0].getsockname()[1]
        async with await relay("127.0.0.1", port, **line) as server:  # type: ignore[arg-type]
            reader, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
            seconds, seen = [], b""
            for block in blocks:
                began = time.perf_counter()
                writer.write(block)
                seen += await reader.readexactly(len(block))
                seconds.append(time.perf_counter() - began)
            writer.close()
            await writer.wait_closed()
    return seconds, seen


@pytest.mark.alone
@pytest.mark.parametrize("delay", [0.0, 0.005, 0.025])
def test_a_round_trip_takes_the_delay_twice(delay: float) -> None:
    seconds, _ = asyncio.run(_timed([b"a"] * 20, delay=delay))
    assert 2 * delay <= min(seconds) < 2 * delay + 0.003  # the least: what else the machine does only adds to it


@pytest.mark.alone
def test_a_delay_does_not_slow_down_what_is_many_blocks_long() -> None:
    [fast], _ = asyncio.run(_timed([bytes(SIZE)], delay=0.0))
    [late], _ = asyncio.run(_timed([bytes(SIZE)], delay=0.1))
    assert 0.2 <= late < 0.2 + 2 * fast + 0.1


def test_a_thin_line_takes_its_time_for_what_goes_up() -> None:
    [seconds], _ = asyncio.run(_timed([bytes(50_000)], delay=0.0, up_bytes_a_second=250_000.0))
    assert seconds >= 0.2


def test_all_bytes_arrive_in_order() -> None:
    blocks = [bytes([number]) * (number * 1000 + 1) for number in range(50)]
    _, seen = asyncio.run(_timed(blocks, delay=0.001))
    assert seen == b"".join(blocks)
