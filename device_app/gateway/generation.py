"""How a request wants tokens chosen: checked, and in the words of the device's own API."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from device_app.bundle import Bundle
from device_app.gateway.errors import ApiError, refused_value
from device_app.gateway.openai_types import ChatRequest, CompletionRequest, Options
from device_app.grammar import Constraint
from device_app.sampler import Sampling
from shared.errors import UsageError

MOST_CHOICES = 128
MOST_STOPS = 64
MOST_TOP_LOGPROBS = 20
TEMPERATURE = 1.0  # OpenAI's default


@dataclass(frozen=True)
class Generation:
    """How the answers to one request are made. max_tokens: None is what the context takes."""

    sampling: Sampling
    max_tokens: int | None
    stop: tuple[str, ...]
    choices: int
    top_logprobs: int | None
    constraint: Callable[[], Constraint] | None = None  # a fresh one for each choice

    def sampling_of(self, choice: int) -> Sampling:
        """Choice i draws with the seed + i."""
        return replace(self.sampling, seed=(self.sampling.seed + choice) % 2**64)


def chat_generation(request: ChatRequest, bundle: Bundle) -> Generation:
    """How a chat completion is to be made. Raises ApiError (400) naming the field that cannot be served."""
    if request.max_completion_tokens is not None:
        most = _tokens("max_completion_tokens", request.max_completion_tokens)
    else:
        most = _tokens("max_tokens", request.max_tokens)
    if request.top_logprobs is not None and not request.logprobs:
        raise refused_value("top_logprobs", "a number without logprobs", "logprobs to be true")
    top = (request.top_logprobs or 0) if request.logprobs else None
    return _generation(request, bundle, most, top, "top_logprobs")


def completion_generation(request: CompletionRequest, bundle: Bundle, default_tokens: int) -> Generation:
    """How a completion is to be made. Raises ApiError (400) naming the field that cannot be served."""
    most = _tokens("max_tokens", request.max_tokens)
    return _generation(request, bundle, default_tokens if most is None else most, request.logprobs, "logprobs")


def _generation(request: Options, bundle: Bundle, most: int | None, top: int | None, top_name: str) -> Generation:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MOST_STOPS:
        raise refused_value("stop", f"{len(stops)} strings", f"at most {MOST_STOPS}")
    choices = 1 if request.n is None else request.n
    if not 1 <= choices <= MOST_CHOICES:
        raise refused_value("n", str(choices), f"1 to {MOST_CHOICES}")
    if top is not None and not 0 <= top <= MOST_TOP_LOGPROBS:
        raise refused_value(top_name, str(top), f"0 to {MOST_TOP_LOGPROBS}")
    return Generation(_sampling(request, bundle), most, tuple(stop for stop in stops if stop), choices, top)


def _sampling(request: Options, bundle: Bundle) -> Sampling:
    # 53 bits: programs that read numbers as JavaScript does can give it back exactly.
    seed = secrets.randbits(53) if request.seed is None else request.seed
    if not -(2**63) <= seed < 2**64:
        raise refused_value("seed", "a number of more than 64 bits", "-2^63 to 2^64 - 1")
    given = {
        "temperature": TEMPERATURE if request.temperature is None else request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "frequency_penalty": _within("frequency_penalty", request.frequency_penalty, 2),
        "presence_penalty": _within("presence_penalty", request.presence_penalty, 2),
    }
    try:
        return Sampling(
            seed=seed % 2**64,
            logit_bias=_bias(request.logit_bias or {}, bundle.manifest.vocab_size),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )
    except UsageError as error:  # it begins with the name of the field
        name = str(error).partition(":")[0]
        raise ApiError(400, str(error), param=name if name in given else None, code="unsupported_value") from None


def _bias(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    bias = {}
    for name, value in given.items():
        if not (name.isascii() and name.isdigit() and int(name) < vocab_size):
            raise refused_value("logit_bias", "a key that is no token id", f"ids below {vocab_size}, as text")
        bias[int(name)] = _within("logit_bias", value, 100) or 0.0
    return bias


def _within(name: str, value: float | None, most: float) -> float | None:
    if value is not None and not -most <= value <= most:
        raise refused_value(name, str(value), f"-{most} to {most}")
    return value


def _tokens(name: str, value: int | None) -> int | None:
    if value is not None and value < 1:
        raise refused_value(name, str(value), "at least 1")
    return value
