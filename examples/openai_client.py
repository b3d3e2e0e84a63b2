"""The openai package, unmodified, against `stip-device serve`: a streamed chat, and an answer that fits a schema.

stip-device serve OUT/device --url ws://127.0.0.1:8765        prints the key
OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=stip-… python -m examples.openai_client "Name a city in France."
"""

from __future__ import annotations

import argparse

from openai import OpenAI
from pydantic import BaseModel, Field


class City(BaseModel):
    """What the second answer must be: the device admits no token that does not fit."""

    name: str = Field(max_length=24)
    country: str = Field(max_length=24)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    client = OpenAI()  # OPENAI_BASE_URL and OPENAI_API_KEY
    model = client.models.list().data[0].id
    with client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": options.question}],
        max_completion_tokens=options.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as chunks:
        for chunk in chunks:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage is not None:
                print(f"\n[{chunk.usage.prompt_tokens} tokens read, {chunk.usage.completion_tokens} written]")
    city = client.chat.completions.parse(
        model=model,
        messages=[{"role": "user", "content": options.question}],
        temperature=0,
        response_format=City,
        max_completion_tokens=400,  # more than the longest that fits
    )
    print(city.choices[0].message.parsed or city.choices[0].message.refusal)


if __name__ == "__main__":
    main()
