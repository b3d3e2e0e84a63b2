"""A whole client of stip.v1 in a hundred lines: a prompt goes up as permuted embeddings, an answer streams down.

python -m examples.websocket_demo.client OUT/device ws://127.0.0.1:8765 "The capital of France is" --frames

It uses no code of this project: websockets, msgspec, numpy, and for the files of the bundle onnxruntime, safetensors
and tokenizers. `device_app` is the client to use; this one shows what any other has to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from examples.websocket_demo import frames


class Device:
    """What the cloud must not have: the tokenizer, the embedding table and the key."""

    def __init__(self, folder: Path) -> None:
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._table = onnxruntime.InferenceSession(folder / "embedding.onnx", providers=["CPUExecutionProvider"])
        self._key = load_file(folder / "key.safetensors")

    def hidden(self, ids: Sequence[int], start: int) -> Any:
        """The embeddings of ids, as the cloud may see them: float32 [n, hidden_size]. start: of the first one."""
        inputs = {"ids": np.array(ids), "positions": np.arange(start, start + len(ids))}
        wanted = {one.name for one in self._table.get_inputs()}
        [rows] = self._table.run(None, {name: inputs[name] for name in wanted})
        secret = self._key["residual"]
        # A permutation, or a rotation: see section 7 of PROTOCOL.md.
        return rows[:, secret] if secret.ndim == 1 else (rows.astype(np.float64) @ secret).astype(np.float32)

    def plain(self, permuted: int) -> int:
        """The token that an id of the cloud's stands for."""
        return int(self._key["vocab"][permuted])


def answer(device: Device, url: str, prompt: str, most: int, token: str | None, show: bool) -> Iterator[str]:
    """The pieces of a greedy continuation of `prompt`, of at most so many tokens. Raises RuntimeError for an Error."""
    manifest = device.manifest
    with connect(url, subprotocols=[Subprotocol("stip.v1")], compression=None, max_size=2**24, proxy=None) as socket:
        # 1. Who asks, for which model, under which key. The answer has the limits.
        opening = {"type": "open", "model": manifest["served_name"], "key_id": manifest["key_id"], "dtype": "float32"}
        opened, _ = exchange(socket, show, opening | ({"token": token} if token else {}))
        if opened["hidden_size"] != manifest["hidden_size"] or opened["vocab_size"] != manifest["vocab_size"]:
            raise RuntimeError("the cloud serves another model than this bundle's, or one without a classifier")
        # 2. The prompt, in one Append. 3. Then each token in another: it builds on the `keep` positions before.
        new = manifest["prefix_ids"] + device.tokenizer.encode(prompt, add_special_tokens=False).ids
        keep, said, text = 0, [], ""
        for seq in range(most):
            append = {"type": "append", "seq": seq, "keep": keep, "rows": 1, "top_k": 1}
            header, [_, ids, _] = exchange(socket, show, append, device.hidden(new, keep))
            keep += len(new)
            # A cloud need not be honest: section 6 lists all that a client should check.
            if (header["seq"], header["kv_length"]) != (seq, keep) or ids[0, 0] >= manifest["vocab_size"]:
                raise RuntimeError("the cloud's answer cannot be true")
            new = [device.plain(ids[0, 0])]
            if new[0] in manifest["end_ids"] or keep == opened["context"]:
                return
            said += new
            whole = device.tokenizer.decode(said)
            if not whole.endswith("\ufffd"):  # inside a character of several bytes
                yield whole[len(text) :]
                text = whole


def exchange(
    socket: ClientConnection, show: bool, header: dict[str, Any], *tensors: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Sends a message and gives the reply. Raises RuntimeError for an Error."""
    frame = frames.write(header, *tensors)
    socket.send(frame)
    reply = socket.recv(decode=False)
    if show:
        print(frames.shown("\n▶", frame), frames.shown("◀", reply), sep="\n", file=sys.stderr)
    answered, results = frames.read(reply)
    if answered["type"] == "error":
        raise RuntimeError(f"{answered['code']}: {answered['message']!a}")
    return answered, results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT/device")
    parser.add_argument("url")
    parser.add_argument("prompt")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--token", help="the bearer token, where the cloud wants one")
    parser.add_argument("--frames", action="store_true", help="show every frame on stderr")
    options = parser.parse_args()
    device = Device(options.folder)
    for piece in answer(device, options.url, options.prompt, options.max_tokens, options.token, options.frames):
        # What a model writes, or a cloud that is not honest, must not steer the terminal.
        print("".join(one for one in piece if one.isprintable() or one == "\n"), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
