"""What STIP is compared with: the unprotected model behind the same kind of server.

Prompt ids go up, sampling happens in the cloud, ids are streamed down. Engine, KV cache, scheduler, sampler and
socket library are STIP's own, so that the difference is the protection's.
"""

from __future__ import annotations

import asyncio
import struct
import sys

import numpy as np
import torch
from websockets.asyncio.server import ServerConnection, serve

from benchmarks.plain import DTYPES, plain_model, smollm2_source
from cloud_backend.engine import AppendWork, LogitRows, Result, TorchEngine, Work
from cloud_backend.kv_cache import KVCache
from cloud_backend.scheduler import Scheduler
from device_app.sampler import Row, Sampler, Sampling

TOP_K = 256


class PlainEngine(TorchEngine):
    """The same engine fed plain weights and token ids."""

    @torch.inference_mode()
    def rows(self, cache: KVCache, ids: list[int]) -> LogitRows:
        """Appends `ids` and gives the row of the last one."""
        states = self.forward(cache, input_ids=torch.tensor([ids]))
        return self.logit_rows(self._classifier(states[0, -1:]), TOP_K, 1.0)

    def _run_one(self, work: Work) -> Result:
        return self.rows(work.cache, work.embeddings.tolist())


def plain_engine(dtype: str) -> PlainEngine:
    """SmolLM2, unprotected."""
    source = smollm2_source()
    model = plain_model(source, DTYPES[dtype])
    return PlainEngine(model, "bfloat16" if dtype == "bfloat16" else "float32", source.config.max_position_embeddings)


def row_of(rows: LogitRows) -> Row:
    """What the device's sampler takes."""
    return Row(rows.values[0].astype(np.float32), rows.ids[0].astype(np.int64), float(rows.log_sum_exp[0, 1]), False)


async def main(dtype: str) -> None:
    """Serves on a free loopback port, which it prints, until killed."""
    scheduler = Scheduler()
    engine = await scheduler.call(lambda: plain_engine(dtype))

    async def answer(socket: ServerConnection) -> None:
        async for request in socket:
            assert isinstance(request, bytes)
            (count,) = struct.unpack_from("<I", request)
            ids = np.frombuffer(request, "<u4", offset=4).astype(np.int64)
            cache, sampler = engine.new_cache(), Sampler(Sampling(), engine.vocab_size)
            for position in range(len(ids), len(ids) + count):
                work = AppendWork(cache, cache.length, ids, 1, "logits", TOP_K, 1.0, engine.dtype)
                timed = await scheduler.submit(engine, work)
                assert isinstance(timed.result, LogitRows)
                token = sampler.choose(row_of(timed.result), position)
                assert token is not None
                await socket.send(struct.pack("<I", token))
                ids = np.array([token])

    async with serve(answer, "127.0.0.1", 0, compression=None) as server:
        running = asyncio.create_task(scheduler.run())
        print("listening on", server.sockets[0].getsockname()[1], flush=True)
        await running


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
