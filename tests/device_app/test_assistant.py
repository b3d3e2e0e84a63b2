"""The Python API against a real server: text in, text out, streamed, stopped, cut to the context."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import device_app
from cloud_backend.tokens import Tokens, add_token
from device_app import Answer, Assistant, Sampling
from device_app.connection import Address
from shared.errors import BundleError, Cancelled, RefusedError, UnreachableError, UsageError
from tests.conftest import RunningCloud, open_assistant, run_cloud

ON_BOTH_ENGINES = True
CONTEXT = 256
QUESTION = [{"role": "user", "content": "the cat sat on the mat"}]
WARM = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture
def assistant(tiny: Path, cloud: RunningCloud) -> Iterator[Assistant]:
    with open_assistant(tiny, cloud.url) as opened:
        yield opened


@pytest.fixture
def fresh(tiny: Path, cloud: RunningCloud) -> Iterator[Callable[..., Answer]]:
    """Whole answers, each of an assistant of its own: what an undisturbed run gives."""

    def answer(messages: list[dict[str, str]] = QUESTION, **options: object) -> Answer:
        with open_assistant(tiny, cloud.url) as other:
            return other.chat(messages, **options).finish()  # type: ignore[arg-type]

    yield answer


def test_the_api_is_a_few_names() -> None:
    names = [
        "Answer",
        "Assistant",
        "AsyncAnswer",
        "AsyncAssistant",
        "Drafting",
        "Encoder",
        "Prediction",
        "Sampling",
        "Stats",
    ]
    assert device_app.__all__ == names
    assert [getattr(device_app, name).__name__ for name in names] == names


# --- answers ---


@pytest.mark.parametrize("way", ["chat", "complete"])
def test_an_answer_comes_in_pieces_that_are_its_text(assistant: Assistant, way: str) -> None:
    answer = (
        assistant.chat(QUESTION, sampling=WARM, max_tokens=30)
        if way == "chat"
        else assistant.complete("the cat", sampling=WARM, max_tokens=30)
    )
    pieces = list(answer)
    assert len(pieces) > 5 and all(pieces)
    assert "".join(pieces) == answer.text
    assert answer.finish_reason in ("length", "stop")


def test_text_grows_while_the_answer_is_made(assistant: Assistant) -> None:
    answer = assistant.complete("the cat", max_tokens=20)
    assert (answer.text, answer.ids, answer.finish_reason) == ("", [], None)
    for piece in answer:
        assert answer.text.endswith(piece)
        assert len(answer.ids) == answer.stats.tokens
        assert answer.finish_reason is None or piece


def test_open_makes_an_assistant_of_a_folder_and_a_url(tiny: Path, cloud: RunningCloud) -> None:
    with Assistant.open(tiny / "device", cloud.url) as assistant:
        assert len(assistant.complete("the", max_tokens=3).finish().ids) == 3


def test_nothing_is_sent_before_an_answer_is_iterated_over(tiny: Path) -> None:
    assistant = open_assistant(tiny, "ws://127.0.0.1:1")  # nothing listens there
    answer = assistant.chat(QUESTION)
    with pytest.raises(UnreachableError):
        next(answer)


@pytest.mark.parametrize("sampling", [Sampling(), WARM, Sampling(temperature=1.5, top_p=0.9, seed=1)], ids=str)
def test_the_same_question_gets_the_same_answer(
    assistant: Assistant, fresh: Callable[..., Answer], sampling: Sampling
) -> None:
    one = assistant.chat(QUESTION, sampling=sampling, max_tokens=25).finish()
    again = assistant.chat(QUESTION, sampling=sampling, max_tokens=25).finish()
    assert one.ids == again.ids == fresh(sampling=sampling, max_tokens=25).ids


def test_another_seed_gives_another_answer(assistant: Assistant) -> None:
    answers = [
        assistant.chat(QUESTION, sampling=Sampling(temperature=1.0, seed=seed), max_tokens=20).finish().ids
        for seed in range(3)
    ]
    assert len({tuple(ids) for ids in answers}) == 3


def test_a_conversation_goes_on_where_the_cloud_has_it(assistant: Assistant, fresh: Callable[..., Answer]) -> None:
    first = assistant.chat(QUESTION, max_tokens=10).finish()
    messages = [*QUESTION, {"role": "assistant", "content": "the dog"}, {"role": "user", "content": "and then?"}]
    second = assistant.chat(messages, max_tokens=10).finish()
    assert second.ids == fresh(messages, max_tokens=10).ids
    assert first.stats.cached_tokens == 0 < second.stats.cached_tokens
    for stats in (first.stats, second.stats):
        drafted_in_vain = stats.counters.drafted - stats.counters.accepted
        sent = stats.prompt_tokens - stats.cached_tokens + 9 + drafted_in_vain  # the last token is not sent
        assert stats.counters.vectors_up == sent


@pytest.mark.parametrize("tokens", [1, 2, 17])
def test_an_answer_has_at_most_max_tokens(assistant: Assistant, tokens: int) -> None:
    answer = assistant.complete("the cat", max_tokens=tokens).finish()
    assert (len(answer.ids), answer.finish_reason) == (tokens, "length")


def test_an_answer_ends_with_the_end_token_which_is_not_shown(assistant: Assistant) -> None:
    end = assistant.bundle.manifest.end_ids
    for seed in range(40):
        answer = assistant.chat(QUESTION, sampling=Sampling(temperature=1.5, seed=seed), max_tokens=60).finish()
        if answer.finish_reason == "stop":
            break
    assert answer.finish_reason == "stop", "no seed ended an answer"
    assert answer.ids[-1] in end and not set(answer.ids[:-1]) & set(end)
    assert "<|end|>" not in answer.text


def test_a_stop_string_ends_the_answer_before_it(assistant: Assistant) -> None:
    whole = assistant.complete("the cat", sampling=WARM, max_tokens=60).finish()
    words = [whole.text[at : at + 3] for at in range(20, len(whole.text) - 3)]
    stop = next(word for word in words if word.isascii() and word.isprintable())
    cut = assistant.complete("the cat", sampling=WARM, max_tokens=60, stop=["never met", stop]).finish()
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.ids == whole.ids[: len(cut.ids)] and len(cut.ids) < len(whole.ids)


def test_figures_of_an_answer_add_up(assistant: Assistant) -> None:
    answer = assistant.chat(QUESTION, max_tokens=20).finish()
    stats, counters = answer.stats, answer.stats.counters
    rendered = assistant.bundle.template.render(QUESTION)  # type: ignore[union-attr]
    assert stats.prompt_tokens == len(assistant.bundle.tokenizer.encode(rendered))
    assert stats.tokens == len(answer.ids) == 20
    assert counters.round_trips == 20 - counters.accepted + counters.full_rows
    in_vain = counters.drafted - counters.accepted
    assert counters.vectors_up == stats.prompt_tokens + 19 + in_vain + counters.full_rows
    assert counters.bytes_up > counters.vectors_up * assistant.bundle.manifest.hidden_size * 4
    assert counters.bytes_down > 20 * 256 * 8
    assert counters.replays == 0
    assert 0 < stats.first_token_seconds < stats.seconds
    assert stats.tokens_per_second > 0


def test_figures_stay_as_they_were_when_the_assistant_is_closed(tiny: Path, cloud: RunningCloud) -> None:
    with open_assistant(tiny, cloud.url) as assistant:
        answer = assistant.complete("the", max_tokens=3).finish()
        before = dataclasses.replace(answer.stats.counters)
    assert answer.stats.counters == before


# --- the context ---


def turns(count: int) -> list[dict[str, str]]:
    """A conversation of so many turns of about 40 tokens, the last a question."""
    messages = []
    for number in range(count):
        messages.append({"role": "user", "content": f"turn {number}: the cat sat on the mat"})
        messages.append({"role": "assistant", "content": "and the dog sang in the rain"})
    return messages[:-1]


@pytest.mark.parametrize("with_system", [True, False])
def test_the_oldest_turns_go_and_the_system_prompt_stays(
    assistant: Assistant, fresh: Callable[..., Answer], with_system: bool
) -> None:
    system = [{"role": "system", "content": "the rain"}] if with_system else []
    messages = turns(9)
    answer = assistant.chat([*system, *messages], max_tokens=20).finish()
    dropped = answer.stats.dropped_turns
    assert 1 <= dropped < 8
    kept = fresh([*system, *messages[2 * dropped :]], max_tokens=20)
    assert kept.stats.dropped_turns == 0
    assert (answer.ids, answer.stats.prompt_tokens) == (kept.ids, kept.stats.prompt_tokens)
    assert answer.stats.prompt_tokens + 20 <= CONTEXT
    # Not one turn more than had to go.
    more = assistant.bundle.template.render([*system, *messages[2 * dropped - 2 :]])  # type: ignore[union-attr]
    assert len(assistant.bundle.tokenizer.encode(more)) + 20 > CONTEXT


def test_a_conversation_that_fits_is_left_whole(assistant: Assistant) -> None:
    assert assistant.chat(turns(2), max_tokens=5).finish().stats.dropped_turns == 0


@pytest.mark.parametrize("before", [0, 2])
def test_a_last_turn_that_does_not_fit_alone_is_refused(assistant: Assistant, before: int) -> None:
    messages = [*turns(before), {"role": "user", "content": "secret " * 200}]
    answer = assistant.chat(messages, max_tokens=20)
    with pytest.raises(RefusedError, match=rf"wanted at most {CONTEXT - 20} of {CONTEXT}") as raised:
        answer.finish()
    assert raised.value.code == "context_full"
    assert raised.value.hint and "secret" not in str(raised.value)


def test_a_prompt_that_does_not_fit_is_refused(assistant: Assistant) -> None:
    with pytest.raises(RefusedError) as raised:
        assistant.complete("secret " * 200, max_tokens=20).finish()
    assert raised.value.code == "context_full"


def test_after_a_refusal_the_next_question_is_answered(assistant: Assistant, fresh: Callable[..., Answer]) -> None:
    assistant.chat(QUESTION, max_tokens=5).finish()
    with pytest.raises(RefusedError):
        assistant.chat([{"role": "user", "content": "secret " * 200}]).finish()
    assert assistant.chat(QUESTION, max_tokens=15).finish().ids == fresh(max_tokens=15).ids


def test_an_answer_that_reaches_the_end_of_the_context_is_cut_there(assistant: Assistant) -> None:
    answer = assistant.complete("the cat sat " * 40, max_tokens=500).finish()
    assert answer.finish_reason == "length"
    assert answer.stats.prompt_tokens > 100
    assert answer.stats.prompt_tokens + len(answer.ids) == CONTEXT + 1  # the last token needs no position


# --- stopping ---


@pytest.mark.parametrize("pieces", [1, 4])
def test_an_answer_that_was_stopped_leaves_the_next_one_right(
    assistant: Assistant, fresh: Callable[..., Answer], pieces: int
) -> None:
    answer = assistant.chat(QUESTION, sampling=WARM, max_tokens=50)
    for _ in range(pieces):
        next(answer)
    answer.stop()
    assert answer.finish_reason == "cancelled"
    assert list(answer) == []
    assert (
        assistant.chat(QUESTION, sampling=WARM, max_tokens=15).finish().ids == fresh(sampling=WARM, max_tokens=15).ids
    )


def test_a_loop_that_was_left_leaves_the_next_answer_right(assistant: Assistant, fresh: Callable[..., Answer]) -> None:
    for _ in assistant.chat(QUESTION, sampling=WARM, max_tokens=50):
        break
    other = [{"role": "user", "content": "and the dog?"}]
    assert assistant.chat(other, max_tokens=15).finish().ids == fresh(other, max_tokens=15).ids


def test_an_answer_that_nobody_holds_any_more_is_cancelled_in_the_cloud(assistant: Assistant) -> None:
    for _ in assistant.chat(QUESTION, sampling=WARM, max_tokens=50):
        break
    assert assistant._session._question is None


def test_dropping_an_answer_that_was_left_disturbs_no_other(assistant: Assistant, fresh: Callable[..., Answer]) -> None:
    left = assistant.chat(QUESTION, sampling=WARM, max_tokens=50)
    next(left)
    other = assistant.chat(QUESTION, max_tokens=15)
    next(other)
    del left
    assert other.finish().ids == fresh(max_tokens=15).ids


def test_an_answer_that_was_never_begun_can_be_stopped(assistant: Assistant) -> None:
    answer = assistant.chat(QUESTION)
    answer.stop()
    assert list(answer) == []


def test_an_answer_is_cancelled_from_another_thread(assistant: Assistant, fresh: Callable[..., Answer]) -> None:
    answer = assistant.chat(QUESTION, max_tokens=200)
    next(answer)
    threading.Timer(0.05, answer.cancel).start()
    with pytest.raises(Cancelled):
        answer.finish()
    assert answer.finish_reason == "cancelled" and len(answer.ids) < 200
    again = assistant.chat(QUESTION, max_tokens=10).finish()
    assert again.ids == fresh(max_tokens=10).ids


def test_an_answer_that_is_cancelled_before_it_begins_asks_nothing(assistant: Assistant) -> None:
    answer = assistant.chat(QUESTION)
    answer.cancel()
    with pytest.raises(Cancelled):
        next(answer)
    assert (answer.finish_reason, answer.stats.counters.bytes_up) == ("cancelled", 0)


def test_cancelling_an_answer_that_is_over_disturbs_no_other(assistant: Assistant) -> None:
    over = assistant.chat(QUESTION, max_tokens=3).finish()
    running = assistant.chat(QUESTION, max_tokens=10)
    next(running)
    over.cancel()
    assert len(running.finish().ids) == 10


def test_an_answer_is_cancelled_while_the_cloud_is_away(tiny: Path) -> None:
    with run_cloud(tiny) as going:
        assistant = open_assistant(tiny, going.url)
        answer = assistant.chat(QUESTION, max_tokens=200)
        next(answer)
    threading.Timer(0.5, answer.cancel).start()
    started = time.monotonic()
    with pytest.raises(Cancelled):
        answer.finish()
    assert time.monotonic() - started < 5


def test_which_stop_string_ended_an_answer_is_known(assistant: Assistant) -> None:
    whole = assistant.complete("the cat", max_tokens=20).finish().text
    stop = whole[len(whole) // 2 :][:3]
    answer = assistant.complete("the cat", max_tokens=20, stop=["never seen", stop]).finish()
    assert (answer.finish_reason, answer.stop_text) == ("stop", stop)
    assert assistant.complete("the cat", max_tokens=5).finish().stop_text is None


def test_stopping_an_answer_that_is_over_changes_nothing(assistant: Assistant) -> None:
    answer = assistant.complete("the", max_tokens=4).finish()
    answer.stop()
    assert answer.finish_reason == "length"


def test_an_older_answer_that_is_thrown_away_does_not_end_a_newer_one(
    assistant: Assistant, fresh: Callable[..., Answer]
) -> None:
    old = assistant.chat(QUESTION, max_tokens=30)
    next(old)
    new = assistant.chat(QUESTION, max_tokens=15)
    next(new)
    old.stop()
    assert new.finish().ids == fresh(max_tokens=15).ids


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupt_while_embedding_leaves_the_next_answer_right(
    assistant: Assistant, fresh: Callable[..., Answer], at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, calls = assistant._session, []
    embed = session._embed

    def struck(ids: object, start: int) -> object:
        calls.append(ids)
        if len(calls) == at:
            raise KeyboardInterrupt
        return embed(ids, start)  # type: ignore[arg-type]

    monkeypatch.setattr(session, "_embed", struck)
    with pytest.raises(KeyboardInterrupt):
        assistant.chat(QUESTION, max_tokens=20).finish()
    assert assistant.chat(QUESTION, max_tokens=15).finish().ids == fresh(max_tokens=15).ids


# --- who may ask, and whom ---


@pytest.mark.parametrize("token", [None, "", "stip_wrong", "stip_wrong\n"])
def test_a_wrong_token_is_refused(tiny: Path, tmp_path: Path, token: str | None) -> None:
    add_token(tmp_path / "tokens.txt", "somebody")
    with run_cloud(tiny, tokens=Tokens(tmp_path / "tokens.txt")) as cloud:
        assistant = open_assistant(tiny, cloud.url, token=token)
        with pytest.raises(RefusedError, match="unauthorized") as raised:
            assistant.complete("the").finish()
    assert raised.value.code == "unauthorized"
    assert raised.value.hint and "--token-file" in raised.value.hint
    assert not token or token.strip() not in str(raised.value)


def test_the_right_token_is_let_in(tiny: Path, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens.txt", "device")
    with (
        run_cloud(tiny, tokens=Tokens(tmp_path / "tokens.txt")) as cloud,
        open_assistant(tiny, cloud.url, token=token) as assistant,
    ):
        assert len(assistant.complete("the", max_tokens=3).finish().ids) == 3


def test_a_model_that_is_not_served_is_named_as_the_reason(
    cloud: RunningCloud, tiny_exports: Callable[[str], Path]
) -> None:
    with pytest.raises(RefusedError, match="unknown_model") as raised:
        open_assistant(tiny_exports("llama-tied"), cloud.url).complete("the").finish()
    assert raised.value.hint


def test_the_cloud_half_of_another_export_is_named_as_the_reason(
    tiny: Path, tiny_checkpoints: Callable[[str], Path], tmp_path: Path
) -> None:
    from export.bundle import export_model

    export_model(str(tiny_checkpoints("llama")), tmp_path / "again", name="llama")
    with run_cloud(tmp_path / "again") as cloud, pytest.raises(RefusedError, match="wrong_key") as raised:
        open_assistant(tiny, cloud.url).complete("the").finish()
    assert raised.value.hint


# --- what cannot be asked ---


def test_a_chat_without_a_template_is_refused(assistant: Assistant, cloud: RunningCloud) -> None:
    bare = Assistant(dataclasses.replace(assistant.bundle, template=None), Address(cloud.url))
    with pytest.raises(BundleError, match="no chat template") as raised:
        bare.chat(QUESTION).finish()
    assert raised.value.hint
    assert len(bare.complete("the", max_tokens=2).finish().ids) == 2


@pytest.mark.parametrize("tokens", [0, -1])
def test_an_answer_of_no_tokens_cannot_be_asked_for(assistant: Assistant, tokens: int) -> None:
    with pytest.raises(UsageError, match=f"max_tokens: seen {tokens}"):
        assistant.complete("the", max_tokens=tokens)
    with pytest.raises(UsageError, match=f"max_tokens: seen {tokens}"):
        assistant.chat(QUESTION, max_tokens=tokens)


def test_nothing_cannot_be_continued(assistant: Assistant) -> None:
    with pytest.raises(UsageError, match="prompt: seen nothing"):
        assistant.complete("")


def test_a_damaged_bundle_is_refused_before_anything_is_sent(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny / "device", tmp_path / "device"))
    (folder / "embedding.onnx").unlink()
    with pytest.raises(BundleError, match=r"embedding\.onnx: missing"):
        Assistant.open(folder, "ws://127.0.0.1:1")
