"""What STIP is compared with: the unprotected model behind the same kind of server.

Prompt ids go up, sampling happens in the cloud, ids are streamed down. Engine, KV cache, scheduler, sampler and
socket library are STIP's own, so that the difference is the protection's.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from collections.abc import Sequence

import numpy as np
import torch
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.plain import DTYPES, plain_model, smollm2_source
from cloud_backend.decoder import DecoderEngine
from cloud_backend.engine import AppendWork, LogitRows
from cloud_backend.kv_cache import KVCache
from cloud_backend.scheduler import Scheduler
from cloud_backend.tensors import to_device
from device_app.sampler import Row, Sampler, Sampling
from shared.wire import Array

TOP_K = 256


class PlainEngine(DecoderEngine):
    """The same engine fed plain weights and token ids, [n, 1] where embeddings would be."""

    def _tensor(self, embeddings: Sequence[Array]) -> torch.Tensor:
        ids = to_device(np.concatenate(embeddings)[:, 0], self._model.device)
        embedded: torch.Tensor = self._model.get_input_embeddings()(ids)
        return embedded

    def rows(self, cache: KVCache, ids: Sequence[int]) -> LogitRows:
        """Appends `ids` and gives the row of the last one."""
        (result,) = self.run([self.work(cache, ids)])
        assert isinstance(result, LogitRows)
        return result

    def work(self, cache: KVCache, ids: Sequence[int]) -> AppendWork:
        """What appends `ids` and asks for the row of the last one."""
        return AppendWork(cache, cache.length, np.array(ids, np.int64)[:, None], 1, "logits", TOP_K, 1.0, self.dtype)


def plain_engine(dtype: str) -> PlainEngine:
    """SmolLM2, unprotected."""
    source = smollm2_source()
    model = plain_model(source, DTYPES[dtype])
    return PlainEngine(model, "bfloat16" if dtype == "bfloat16" else "float32", source.config.max_position_embeddings)


def row_of(rows: LogitRows) -> Row:
    """What the device's sampler takes."""
    at_one, at_temperature = rows.log_sum_exp[0].tolist()
    return Row(rows.values[0].astype(np.float32), rows.ids[0].astype(np.int64), at_temperature, at_one, full=False)


async def main(dtype: str) -> None:
    """Serves on a free loopback port, which it prints, until killed."""
    scheduler = Scheduler()
    engine = await scheduler.call(lambda: plain_engine(dtype))

    async def answer(socket: ServerConnection) -> None:
        async for request in socket:
            assert isinstance(request, bytes)
            (count,) = struct.unpack_from("<I", request)
            ids = list(np.frombuffer(request, "<u4", offset=4))
            cache, sampler = engine.new_cache(), Sampler(Sampling(), engine.vocab_size)
            for position in range(len(ids), len(ids) + count):
                timed = await scheduler.submit(engine, engine.work(cache, ids))
                assert isinstance(timed.result, LogitRows)
                token = sampler.choose(row_of(timed.result), position)
                assert token is not None
                await socket.send(struct.pack("<I", token))
                ids = [token]
            scheduler.release(engine, cache)

    async with serve(answer, "127.0.0.1", 0, compression=None) as server:
        running = asyncio.create_task(scheduler.run())
        print("listening on", server.sockets[0].getsockname()[1], flush=True)
        await running


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
