"""Several questions at once, from one process: a bundle is opened once, every question gets a session of its own.

python -m examples.async_chat OUT/device ws://127.0.0.1:8765 "Who wrote Faust?" "What is a prime?"
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path

from device_app import Assistant, AsyncAssistant
from device_app.bundle import Bundle
from device_app.connection import Address


async def ask(bundle: Bundle, url: str, question: str, max_tokens: int) -> str:
    """One question, one answer."""
    async with AsyncAssistant(Assistant(bundle, Address(url))) as assistant:
        answer = assistant.chat([{"role": "user", "content": question}], max_tokens=max_tokens)
        async for piece in answer:
            print(f"{question[:20]!r:24} {piece!r}")
        return answer.text


async def ask_all(folder: Path, url: str, questions: Sequence[str], max_tokens: int, seconds: float) -> list[str]:
    """All of them side by side. Raises TimeoutError where it takes longer: the cloud then drops what is left."""
    bundle = await asyncio.to_thread(Bundle.open, folder)
    asking = asyncio.gather(*(ask(bundle, url, question, max_tokens) for question in questions))
    return await asyncio.wait_for(asking, seconds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="OUT/device")
    parser.add_argument("url")
    parser.add_argument("questions", nargs="+", metavar="QUESTION")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    answers = asyncio.run(ask_all(options.folder, options.url, options.questions, options.max_tokens, options.seconds))
    for question, answer in zip(options.questions, answers, strict=True):
        print(f"\n> {question}\n{answer}")


if __name__ == "__main__":
    main()
