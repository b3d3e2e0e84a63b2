"""An audit from an export to its report: what runs, what is written, and what a failed one leaves alone."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from export import cli
from export.audit import base, blocks, fine_tuning, hidden, images, lengths, look_up, noise, run, scene, theft, traffic
from export.audit.attack import Attack, Outcome
from export.audit.corpus import Text, read_text
from export.audit.measures import measure
from export.audit.page import page
from export.audit.report import Report, read_json, to_json
from export.audit.run import ATTACKS, audit
from shared.errors import AuditError
from shared.key import UserKey
from tests.export.audit.pages import assert_nothing_is_loaded_or_run

THEFTS = (*theft.ATTACKS, *fine_tuning.ATTACKS)
FAST = ("table-sorted-entries", "table-norms")
REPORTS = {"audit.json", "audit.html"}
Checkpoints = Callable[[str], Path]


@pytest.fixture(scope="module")
def text(tiny: Path) -> Text:
    whole = read_text(tiny / "device" / "tokenizer.json")
    return replace(whole, secret=whole.secret[:3_000], public=whole.public[:3_000], paragraphs=whole.paragraphs[:50])


@pytest.fixture(scope="module", autouse=True)
def a_short_text(text: Text) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene, "read_text", lambda tokenizer: text)
        yield


@pytest.fixture
def out(tiny_exports: Callable[..., Path], tmp_path: Path) -> Path:
    """An export to write a report into."""
    return shutil.copytree(tiny_exports("llama-tied"), tmp_path / "out")


@pytest.fixture
def model(tiny_checkpoints: Checkpoints) -> str:
    return str(tiny_checkpoints("llama-tied"))


@dataclass
class Audited:
    """What one audit left."""

    out: Path
    report: Report
    said: str  # on stderr

    @property
    def written(self) -> str:
        return "".join((self.out / name).read_text() for name in sorted(REPORTS))


@pytest.fixture(scope="module")
def whole(
    tiny_exports: Callable[..., Path], tiny_checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory
) -> Audited:
    """Every attack there is, on little text and in few rounds: what they get is the business of other tests."""
    out = shutil.copytree(tiny_exports("llama-tied"), tmp_path_factory.mktemp("audited") / "out")
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(base, "STRENGTHS", (0.0, 0.1))
        patch.setattr(hidden, "PREFIX", 2)
        patch.setattr(noise, "SIGMAS", (0.0, 1.0))
        patch.setattr(fine_tuning, "STEPS", (0, 1))
        patch.setattr(run, "measure", lambda seen: measure(seen, widths=(128,)))
        report = audit(out, str(tiny_checkpoints("llama-tied")))
    return Audited(out, report, said.getvalue())


# --- what is in a report ---


def test_every_attack_of_every_file_is_in_the_report_once_and_in_order(whole: Audited) -> None:
    names = [attack.name for attack in ATTACKS]
    assert [finding.name for finding in whole.report.findings] == names
    assert len(set(names)) == len(names)
    files = (traffic, lengths, look_up, blocks, base, hidden, noise, theft, fine_tuning, images)
    assert set(ATTACKS) == {one for file in files for one in file.ATTACKS}
    skipped = {finding.name for finding in whole.report.findings if finding.skipped}
    of_images = {attack.name for attack in images.ATTACKS}
    # the others are for exports with no classifier in the cloud, and for quantised weights
    assert skipped == {"classifier-from-traffic", "table-blocks"} | of_images
    assert whole.said.count("\n") == len(names) and f"{len(names)}/{len(names)}" in whole.said


def test_the_report_is_written_as_json_and_as_a_page(whole: Audited) -> None:
    assert (whole.out / "audit.json").read_bytes() == to_json(whole.report)
    assert (whole.out / "audit.html").read_bytes() == page(whole.report).encode()
    assert {path.name for path in whole.out.iterdir()} == {"cloud", "device", "export.json"} | REPORTS
    assert whole.report.measures and whole.report.check["positions"] == 128


def test_the_page_of_a_whole_audit_loads_nothing_and_runs_nothing(whole: Audited) -> None:
    assert_nothing_is_loaded_or_run((whole.out / "audit.html").read_text())


def test_no_prompt_key_or_path_is_in_the_report_or_on_stderr(
    whole: Audited, text: Text, tiny_checkpoints: Checkpoints
) -> None:
    told = whole.written + whole.said
    key = UserKey.load(whole.out / "device" / "key.safetensors")
    assert key.vocab is not None
    bare = re.sub(r"<[^>]*>|\s", "", told)
    for numbers in (text.secret, text.public, text.prompt, key.vocab, key.residual):
        for start in range(0, len(numbers) - 5, 3):
            assert ",".join(map(str, np.asarray(numbers[start : start + 5]).tolist())) not in bare
    assert key.key_id not in told
    assert not any(passage[:40] in told for passage in text.passages if len(passage) > 40)
    assert str(tiny_checkpoints("llama-tied").parent) not in told and str(whole.out) not in told
    assert whole.report.model == "llama-tied"


# --- what runs ---


def test_named_attacks_run_alone_and_in_the_order_of_the_list(out: Path) -> None:
    report = audit(out, names=[*reversed(FAST), "table-norms"])
    assert [finding.name for finding in report.findings] == list(FAST)
    assert report.measures == {}
    assert read_json((out / "audit.json").read_bytes()) == report


def test_an_unknown_attack_is_named_with_all_there_are(out: Path, model: str) -> None:
    with pytest.raises(AuditError, match=r"seen 'table-norm', wanted one of: ") as error:
        audit(out, model, ["table-norms", "table-norm"])
    assert all(attack.name in str(error.value) for attack in ATTACKS)
    assert not REPORTS & {path.name for path in out.iterdir()}


def test_without_a_model_the_attacks_of_who_has_one_are_skipped_with_the_reason(out: Path) -> None:
    names = [attack.name for attack in (*base.ATTACKS, *hidden.ATTACKS, *noise.ATTACKS, *THEFTS)]
    report = audit(out, names=[*names, *FAST])
    tried = {finding.name: finding for finding in report.findings}
    for name in names:
        assert tried[name].recovered is None and "--model" in str(tried[name].skipped)
    assert tried["table-norms"].recovered == 1.0
    assert report.model is None


def test_a_classifier_on_the_device_leaves_nothing_of_it_to_attack(
    tiny_exports: Callable[..., Path], tmp_path: Path, model: str
) -> None:
    out = shutil.copytree(tiny_exports("llama-tied", "rotation", "device"), tmp_path / "out")
    names = ["tied-head", *(attack.name for attack in THEFTS if attack is not theft.NO_CLASSIFIER)]
    report = audit(out, model, [*names, "base-norms", *FAST])
    tried = {finding.name: finding for finding in report.findings}
    assert (report.scheme, report.head) == ("rotation", "device")
    assert all("classifier is on the device" in str(tried[name].skipped) for name in names)
    assert tried["base-norms"].recovered == 1.0 and tried["base-norms"].control == 1.0


# --- what cannot be audited ---


@pytest.mark.parametrize(
    ("export", "other", "seen"),
    [
        ("llama-tied", "llama-odd-heads", r"seen \(\d+,( \d+)?\), wanted \(\d+,( \d+)?\)"),
        ("llama-biases", "llama", r"seen no such tensor, wanted \(\d+,\)"),
    ],
)
def test_a_model_of_other_shapes_is_refused_by_its_first_tensor_that_does_not_fit(
    export: str,
    other: str,
    seen: str,
    tiny_exports: Callable[..., Path],
    tiny_checkpoints: Checkpoints,
    tmp_path: Path,
) -> None:
    out = shutil.copytree(tiny_exports(export), tmp_path / "out")
    with pytest.raises(AuditError, match=rf": (model|lm_head)\.[\w.]+: {seen}") as error:
        audit(out, str(tiny_checkpoints(other)), FAST)
    assert "fine-tune" in str(error.value.hint)
    assert not REPORTS & {path.name for path in out.iterdir()}


def test_halves_of_two_exports_are_refused(out: Path, tiny_exports: Callable[..., Path]) -> None:
    shutil.rmtree(out / "device")
    shutil.copytree(tiny_exports("llama-tied", "rotation") / "device", out / "device")
    with pytest.raises(AuditError, match="two halves are of different exports"):
        audit(out, names=FAST)
    assert not REPORTS & {path.name for path in out.iterdir()}


def _attack_fails(out: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(found: object) -> Outcome:
        raise AuditError("this attack cannot go on")

    patch.setattr(run, "ATTACKS", [_by_name("table-sorted-entries"), replace(_by_name("table-norms"), run=fail)])


def _page_fails(out: Path, patch: pytest.MonkeyPatch) -> None:
    def fail(report: Report) -> str:
        raise AuditError("this page cannot be made")

    patch.setattr(run, "page", fail)


def _disk_fails(out: Path, patch: pytest.MonkeyPatch) -> None:
    write = Path.write_bytes

    def fail(path: Path, contents: bytes) -> int:
        if "html" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, contents)

    patch.setattr(Path, "write_bytes", fail)


@pytest.mark.parametrize("fails", [_attack_fails, _page_fails, _disk_fails])
def test_a_failed_audit_leaves_the_report_before_it_as_it_was(
    fails: Callable[[Path, pytest.MonkeyPatch], None], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    audit(out, names=["table-norms"])
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert before.keys() >= REPORTS
    fails(out, monkeypatch)
    with pytest.raises(AuditError, match=r"cannot|No space left"):
        audit(out, names=FAST)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


# --- the command ---


def _by_name(name: str) -> Attack:
    [attack] = [attack for attack in ATTACKS if attack.name == name]
    return attack


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """`stip-export audit …` in this process; gives its exit status."""
    monkeypatch.setattr(sys, "argv", ["stip-export", "audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_the_command_prints_a_table(
    out: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, out, "--attack", "table-norms", "--model", model) == 0
    shown = capsys.readouterr()
    assert "Look-up by norm" in shown.out and "100 %" in shown.out and "broken" in shown.out
    assert f"written to {out}/audit.json and audit.html" in shown.err
    assert model not in shown.out + shown.err + (out / "audit.json").read_text() + (out / "audit.html").read_text()
    assert {path.name for path in out.iterdir()} >= REPORTS


def test_json_is_alone_on_stdout(out: Path, model: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "export", "audit", out, "--attack", "table-norms", "--model", model, "--json"],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0
    assert [finding.name for finding in read_json(done.stdout).findings] == ["table-norms"]
    assert done.stdout.strip() == (out / "audit.json").read_bytes().strip()
    assert b"Traceback" not in done.stderr and model.encode() not in done.stderr


def test_a_control_that_fails_fails_the_command_and_leaves_its_report(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weak = replace(_by_name("table-norms"), control=lambda found: Outcome(0.5))
    monkeypatch.setattr(run, "ATTACKS", [weak])
    assert command(monkeypatch, out, "--attack", "table-norms") == 1
    shown = capsys.readouterr()
    assert re.search(r"stip-export: error: .*control failed \(50\.0 %\)", shown.err)
    assert "control failed" in shown.out
    assert read_json((out / "audit.json").read_bytes()).findings[0].control == 0.5
    assert (out / "audit.html").exists()


def test_a_command_that_cannot_be_carried_out_says_why_in_one_line(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, out, "--attack", "no-such") == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("stip-export: error: attack: seen 'no-such', wanted one of: ")
