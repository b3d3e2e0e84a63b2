"""Questions and commands of a talk, over a real cloud: what is said, what is kept, and what a failure leaves."""

from __future__ import annotations

import base64
import io
import json
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from device_app.assistant import Assistant
from device_app.bundle import Bundle
from device_app.connection import Address
from device_app.conversation import Conversation
from device_app.history import History
from device_app.printing import PlainScreen
from device_app.sampler import Sampling
from device_app.talk import PlainKeyboard, Talk
from device_app.talk_commands import COMMANDS
from shared.errors import HistoryError
from tests.conftest import RunningCloud, open_assistant, run_cloud


@pytest.fixture(scope="module")
def cloud(tiny: Path) -> Iterator[RunningCloud]:
    with run_cloud(tiny) as running:
        yield running


@pytest.fixture(scope="module")
def assistant(tiny: Path, cloud: RunningCloud) -> Iterator[Assistant]:
    with open_assistant(tiny, cloud.url) as opened:
        yield opened


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.open(tmp_path / "data" / "history.sqlite3") as opened:
        yield opened


@dataclass
class Talker:
    """A talk by lines on stdin; `say` gives what was printed for them: answers and notes."""

    talk: Talk
    lost: list[HistoryError]
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]

    def say(self, *lines: str) -> str:
        with self.monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
            self.talk.run()
        return "".join(self.capsys.readouterr())

    @property
    def messages(self) -> list[tuple[str, object]]:
        return [(said.role, said.content) for said in self.talk.conversation.messages]


@pytest.fixture
def talker(
    assistant: Assistant, history: History, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Talker]:
    def start(assistant: Assistant = assistant, system: str | None = None, **sampling: float) -> Talker:
        lost: list[HistoryError] = []
        conversation = Conversation(history, model="tiny", system=system, on_lost=lost.append)
        talk = Talk(assistant, conversation, PlainKeyboard(), PlainScreen, Sampling(**sampling), 8)  # type: ignore[arg-type]
        return Talker(talk, lost, monkeypatch, capsys)

    return start


Talkers = Callable[..., Talker]


def stored(history: History) -> list[list[tuple[str, object]]]:
    return [[(message.role, message.content) for message in history.messages(chat.id)] for chat in history.chats()]


def test_what_is_said_is_kept_as_it_is_said(talker: Talkers, history: History) -> None:
    one = talker(system="Be a cat.")
    one.say("the cat", "", "and the dog")
    assert [role for role, _ in one.messages] == ["user", "assistant"] * 2
    assert stored(history) == [one.messages]
    [chat] = history.chats()
    assert (chat.title, chat.settings) == ("the cat", {"system": "Be a cat."})
    assert history.messages(chat.id)[1].details["tokens"] == 8


def test_the_assistant_reads_the_system_prompt_and_all_that_was_said(talker: Talkers, assistant: Assistant) -> None:
    one = talker(system="Be a cat.")
    one.say("the cat", "the dog")
    asked = [{"role": "system", "content": "Be a cat."}] + [
        {"role": role, "content": content} for role, content in one.messages[:3]
    ]
    assert assistant.chat(asked, max_tokens=8).finish().text == one.messages[3][1]


def test_an_unknown_command_is_one_clear_line_and_a_path_is_a_question(talker: Talkers) -> None:
    one = talker()
    shown = one.say("/regnerate now", "/etc/passwd is what?", " /help")
    assert "error: /regnerate: seen no command of this name\nhint: /help lists them" in shown
    assert [content for _, content in one.messages[::2]] == ["/etc/passwd is what?", " /help"]


def test_help_lists_every_command(talker: Talkers) -> None:
    shown = talker().say("/help")
    assert all(re.search(rf"^/{name} ", shown, re.MULTILINE) for name in COMMANDS)


def test_another_answer_replaces_the_last_one_and_is_drawn_anew(talker: Talkers, history: History) -> None:
    one = talker(temperature=1.5, seed=1)
    answers = []
    for line in ("the cat", "/regenerate", "/regenerate"):
        one.say(line)
        answers.append(one.messages[1][1])
    assert len(set(answers)) == 3
    assert stored(history) == [one.messages] and len(one.messages) == 2


def test_the_user_is_told_where_another_answer_would_be_the_same(talker: Talkers) -> None:
    one = talker()
    assert "temperature 0" in one.say("the cat", "/regenerate")
    assert len(one.messages) == 2


def test_an_edited_question_replaces_the_last_one(talker: Talkers, history: History) -> None:
    one = talker()
    one.say("the cat", "the dog", "/edit the dogs sing")
    assert [content for _, content in one.messages[::2]] == ["the cat", "the dogs sing"]
    assert stored(history) == [one.messages]


@pytest.mark.parametrize("command", ["/regenerate", "/edit the dogs"])
def test_a_command_without_a_question_before_it_says_so(talker: Talkers, command: str) -> None:
    assert "error: chat: seen no question yet" in talker().say(command)


@pytest.mark.parametrize("line", ["too long " * 300, "/edit " + "too long " * 300])
def test_a_question_that_fails_leaves_what_was_said_as_it_was(talker: Talkers, history: History, line: str) -> None:
    one = talker()
    one.say("the cat")
    before = one.messages
    assert "error: prompt: the last turn alone takes" in one.say(line)
    assert one.messages == before and stored(history) == [before]


def test_a_first_question_that_fails_leaves_no_chat(talker: Talkers, history: History) -> None:
    talker().say("too long " * 300)
    assert history.chats() == []


def test_a_template_that_raises_is_told_and_the_talk_goes_on(
    talker: Talkers, tiny: Path, cloud: RunningCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny / "device")
    assert bundle.template is not None
    render = bundle.template._template.environment.from_string(
        "{% for m in messages %}{% if 'dog' in m.content %}{{ raise_exception('no dogs') }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    )
    monkeypatch.setattr(bundle.template, "_template", render)
    monkeypatch.setattr(bundle.template, "_source", "no dogs")
    with Assistant(bundle, Address(cloud.url)) as assistant:
        one = talker(assistant)
        shown = one.say("the dog", "the cat")
    assert "error: chat template: no dogs\nhint: does this model take these roles" in shown
    assert [content for _, content in one.messages[::2]] == ["the cat"]


def test_a_chat_is_found_opened_gone_on_with_and_deleted(talker: Talkers, history: History) -> None:
    talker(system="Be a cat.").say("the mat", "/new", "the dog sang")
    one = talker()
    shown = one.say("/chats MAT", "/open 1", "/system", "and the dog")
    assert re.search(r"^  1  \d{4}-\d\d-\d\d \d\d:\d\d  the mat$", shown, re.MULTILINE) and "dog sang" not in shown
    assert "> the mat\n" in shown and "Be a cat." in shown
    assert [len(messages) for messages in stored(history)] == [4, 2]
    assert "Deleted: the mat" in one.say("/delete 1")
    assert [messages[0] for messages in stored(history)] == [("user", "the dog sang")]
    assert one.messages == []
    assert "error: /open: seen '7', wanted a number from 1 to 1" in one.say("/open 7")


def test_a_chat_that_another_window_deleted_is_told_and_the_talk_goes_on(talker: Talkers, history: History) -> None:
    one = talker()
    one.say("the cat")
    history.delete_all()
    one.say("the dog", "the mat")
    assert [str(error) for error in one.lost] == ["chat: it is not there"]
    assert len(one.messages) == 6 and history.chats() == []
    one.say("/new", "the bird")
    assert [len(messages) for messages in stored(history)] == [2]


def test_the_system_prompt_is_set_told_and_removed(talker: Talkers, history: History) -> None:
    one = talker()
    assert "There is no system prompt." in one.say("the cat", "/system")
    one.say("/system Be a dog.")
    assert one.talk.conversation.prompt(one.talk.conversation.again())[0] == {"role": "system", "content": "Be a dog."}
    assert history.chats()[0].settings == {"system": "Be a dog."}
    one.say("/system off")
    assert one.talk.conversation.system is None


def test_a_saved_chat_is_the_owners_alone_and_overwrites_nothing(talker: Talkers, tmp_path: Path) -> None:
    one = talker(system="Be a cat.")
    assert "error: /save: seen nothing that was said" in one.say(f"/save {tmp_path}/none.md")
    shown = one.say(
        "the cat", f"/save {tmp_path}/chat.md", f"/save '{tmp_path}/my chat.json'", f"/save {tmp_path}/chat.md"
    )
    assert "File exists" in shown
    assert (tmp_path / "chat.md").read_text().startswith("## system\n\nBe a cat.\n\n## user\n\nthe cat\n\n## assistant")
    messages = json.loads((tmp_path / "my chat.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert stat.S_IMODE((tmp_path / "chat.md").stat().st_mode) == 0o600


def test_stats_add_up_the_answers(talker: Talkers) -> None:
    shown = talker().say("the cat", "the dog", "/stats")
    assert re.search(r"^2 answers, 16 tokens in [\d.]+ s, \d+ round trips \([\d.]+ a token\)$", shown, re.MULTILINE)
    assert re.search(r"left the device: \d+ permuted vectors, \d+ KiB; no text", shown)


def test_an_image_goes_with_the_next_question_and_stays_in_the_chat(
    talker: Talkers, history: History, tiny_exports: Callable[[str], Path], tmp_path: Path
) -> None:
    file = tmp_path / "a red wall.png"
    Image.new("RGB", (40, 30), "red").save(file)
    export = tiny_exports("llava")
    with run_cloud(export) as cloud, open_assistant(export, cloud.url) as assistant:
        one = talker(assistant)
        shown = one.say(f"/image {tmp_path}/none.png", f"/image {file}", "what is it", "and now")
        assert "none.png: No such file" in shown and "goes with the next question" in shown
        url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        assert [content for _, content in one.messages[::2]] == [
            [image, {"type": "text", "text": "what is it"}],
            "and now",
        ]
        other = talker(assistant)
        other.say("/open 1", "/regenerate")
        assert other.messages == one.messages == stored(history)[0]
        one.say("/new", f"/image {file}", "what is it", "/edit what was it")
        assert [part["type"] for part in one.messages[0][1]] == ["image_url", "text"]  # type: ignore[attr-defined]


def test_an_image_for_a_model_that_takes_none_is_refused(talker: Talkers) -> None:
    assert "error: /image: seen a bundle of the kind 'decoder'" in talker().say("/image a.png")
