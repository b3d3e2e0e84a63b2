"""`make bench-audit`: the audit at every level on SmolLM2-135M and of other kinds of models, and SECURITY.md's tables.

Every figure in SECURITY.md is written here, between two marks; `--tables` writes them again from the stored reports.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.family_cases import CASES
from benchmarks.plain import RESULTS
from benchmarks.process import run
from examples.smollm2 import smollm2_gguf
from export.audit import base, hidden, images, look_up
from export.audit.attack import Attack, Finding
from export.audit.report import Report, percent, read_json
from export.audit.run import ATTACKS as ALL
from shared.levels import SCHEMES

SECURITY = Path(__file__).resolve().parent.parent / "SECURITY.md"
QUANTISED_PATH = RESULTS / "audit-quantised.json"
BEGIN, END = "<!-- figures: make bench-audit -->\n", "<!-- end of figures -->\n"
LEVELS = {  # column: scheme, head, dtype
    "permutation": ("permutation", "cloud", "float32"),
    "rotation": ("rotation", "cloud", "float32"),
    "rotation, bf16": ("rotation", "cloud", "bfloat16"),
    "rotation, head on device": ("rotation", "device", "float32"),
}


# Where a level differs from another in its dtype alone, what a dtype may change: look-ups, alignments, hidden states.
ATTACKS = {"rotation, bf16": (*look_up.ATTACKS, *base.ATTACKS, *hidden.ATTACKS)}
# Models of other kinds, by the names of their cases, and what is tried on them.
QUICK = ("traffic-frequency", "known-text", *(one.name for one in look_up.ATTACKS), "base-sorted-entries", "base-norms")
KINDS: dict[str, tuple[str, tuple[Attack, ...]]] = {
    "minilm-23m": ("MiniLM-L6", tuple(one for one in ALL if one.name in QUICK)),
    "vit-86m": ("ViT-B, random weights", images.ATTACKS),
    "llava-173m": ("LLaVA, images, random weights", images.ATTACKS),
}

# The same model as a quantised GGUF, whose order keeps blocks together, and what is tried on it.
QUANTISED = (
    *("known-text", "tied-head", "table-sorted-entries", "table-gram", "table-blocks"),
    *("base-norms", "base-moments", "base-arrows", "base-singular-values", "hidden-vocabulary"),
)


def main() -> None:
    """Audits every level, one process after another, stores the reports and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true", help="write SECURITY.md's tables from the stored reports")
    parser.add_argument("--level", action="append", choices=LEVELS, help="audit this level alone (repeatable)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="audit this other model alone (repeatable)")
    parser.add_argument("--quantised", action="store_true", help="audit the quantised export alone")
    options = parser.parse_args()
    everything = not (options.tables or options.level or options.kind or options.quantised)
    for level in LEVELS if everything else options.level or ():
        audit(level)
    for kind in KINDS if everything else options.kind or ():
        audit_kind(kind)
    if everything or options.quantised:
        audit_quantised()
    before, _, rest = SECURITY.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    SECURITY.write_text(before + BEGIN + tables(stored()) + END + after, encoding="utf-8")


def audit(level: str) -> None:
    """One export, attacked; its report goes to benchmarks/results."""
    scheme, head, dtype = LEVELS[level]
    options = ["--scheme", scheme, "--head", head, "--dtype", dtype, "--name", "audited"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "smollm2"
        run([sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out, *options])
        chosen = [part for attack in ATTACKS.get(level, ()) for part in ("--attack", attack.name)]
        run([sys.executable, "-m", "export", "audit", out, "--model", smollm2_gguf(), *chosen])
        RESULTS.mkdir(exist_ok=True)
        path_of(level).write_bytes((out / "audit.json").read_bytes())


def audit_kind(kind: str) -> None:
    """The same for a model of another kind, under both schemes."""
    case = next(case for case in CASES if case.name == kind)
    chosen = [part for attack in KINDS[kind][1] for part in ("--attack", attack.name)]
    with tempfile.TemporaryDirectory() as scratch:
        model = case.checkpoint(Path(scratch) / "model")
        for scheme in SCHEMES:
            out = Path(scratch) / scheme
            options = ["--scheme", scheme, "--dtype", "float32", "--name", "audited"]
            run([sys.executable, "-m", "export", "model", model, "--out", out, *options])
            run([sys.executable, "-m", "export", "audit", out, "--model", model, *chosen])
            RESULTS.mkdir(exist_ok=True)
            path_of_kind(kind, scheme).write_bytes((out / "audit.json").read_bytes())


def audit_quantised() -> None:
    """The same of an export whose blocks are those of a quantised file."""
    chosen = [part for name in QUANTISED for part in ("--attack", name)]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "smollm2"
        options = ["--gguf", "source", "--name", "audited"]
        run([sys.executable, "-m", "export", "model", smollm2_gguf(), "--out", out, *options])
        run([sys.executable, "-m", "export", "audit", out, "--model", smollm2_gguf(), *chosen])
        RESULTS.mkdir(exist_ok=True)
        QUANTISED_PATH.write_bytes((out / "audit.json").read_bytes())


def path_of_kind(kind: str, scheme: str) -> Path:
    """Where the report on a model of another kind is stored."""
    return RESULTS / f"audit-{kind}-{scheme}.json"


def path_of(level: str) -> Path:
    """Where a level's report is stored."""
    return RESULTS / f"audit-{'-'.join(LEVELS[level])}.json"


def stored() -> dict[str, Report]:
    """The stored reports, by level."""
    return {level: read_json(path_of(level).read_bytes()) for level in LEVELS}


def tables(reports: dict[str, Report]) -> str:
    """SECURITY.md between its marks."""
    return "\n".join([_machines(reports), *_attacks(reports), "", *_details(reports), *_quantised(), *_kinds(), ""])


def _machines(reports: dict[str, Report]) -> str:
    first = next(iter(reports.values()))
    longest = max(report.seconds for report in reports.values())
    most = max(report.peak_memory_bytes for report in reports.values())
    return (
        f"Model: SmolLM2-135M-Instruct. A share is what the attack recovered; the control, the same attack on the "
        f"unprotected model, is the lowest of all columns. {first.machine.processor}, "
        f"{first.machine.threads} thread{'s' * (first.machine.threads > 1)}: "
        f"a whole audit took at most {longest / 60:.0f} min and {most / 2**30:.1f} GiB.\n"
    )


def _attacks(reports: dict[str, Report]) -> list[str]:
    names = [finding.name for finding in next(iter(reports.values())).findings]
    rows = [
        "| attack | beyond its own files and traffic the attacker knows | recovered are shares of | "
        + " | ".join(reports)
        + " | control |",
        "|---|---|---|" + "---:|" * (len(reports) + 1),
    ]
    for name in names:
        found = {
            level: _finding(report, name) if any(one.name == name for one in report.findings) else None
            for level, report in reports.items()
        }
        first = _finding(next(iter(reports.values())), name)
        controls = [finding.control for finding in found.values() if finding and finding.control is not None]
        cells = [percent(finding.recovered) if finding else "as beside" for finding in found.values()]
        lowest = percent(min(controls)) if controls else "–"
        rows.append(f"| {first.title} | {first.knows} | {first.after} | {' | '.join(cells)} | {lowest} |")
    rows += [
        "",
        "– : does not apply, as it is about a classifier that is elsewhere. As beside: the dtype has no bearing on it.",
    ]
    return rows


def _finding(report: Report, name: str) -> Finding:
    return next(finding for finding in report.findings if finding.name == name)


def _details(reports: dict[str, Report]) -> list[str]:
    plain, turned = reports["permutation"], reports["rotation"]
    return [
        *_curve(
            "Known prompt: share of later tokens read, by tokens known",
            "tokens known",
            "known-prompt",
            "tokens",
            {"permutation": plain, "rotation": turned},
        ),
        *_curve(
            "Traffic alone, no weights and no table: share of all tokens named, by tokens seen under one key",
            "tokens seen",
            "traffic-frequency",
            "tokens",
            {"permutation": plain, "rotation": turned},
        ),
        *_curve(
            "Fine-tuned victims: tokens read with a base that is off by noise, as a share of each matrix's spread",
            "off by",
            "base-fine-tuned",
            "strengths",
            {"permutation": plain, "rotation": turned},
        ),
        *_noise(plain),
        *_theft(plain, turned),
        *_measures(plain),
        *_rounding(reports),
    ]


def _figures(report: Report, name: str) -> dict[str, Any]:
    return _finding(report, name).figures


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return [f"**{title}**", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _curve(title: str, x: str, name: str, key: str, reports: dict[str, Report]) -> list[str]:
    figures = {level: _figures(report, name) for level, report in reports.items()}
    steps = next(iter(figures.values()))[key]
    shown = [f"{step:,}" if isinstance(step, int) else percent(step) for step in steps]
    rows = [[level, *(percent(share) for share in curve["recovered"])] for level, curve in figures.items()]
    return _table(title, [x, *shown], rows)


def _noise(report: Report) -> list[str]:
    figures = _figures(report, "noise")
    return _table(
        "Noise on embeddings, in spreads of the table: tokens read all the same, and the price",
        ["noise", *(f"{sigma:g}" for sigma in figures["sigma"])],
        [
            ["tokens read", *(percent(share) for share in figures["recovered"])],
            ["perplexity", *(f"{value:,.0f}" for value in figures["perplexity"])],
        ],
    )


def _theft(plain: Report, turned: Report) -> list[str]:
    used, own = _figures(plain, "unauthorized-use"), _figures(plain, "theft-own-table")
    logits, lengths = _figures(plain, "user-full-logits"), _figures(plain, "lengths-and-timing")
    trained = _figures(plain, "theft-fine-tuning")
    rows = [[label, *(f"{value:,.0f}" for value in curve)] for label, curve in trained["perplexity"].items()]
    top = {name.removeprefix("top_"): found for name, found in logits.items() if name.startswith("top_")}
    blocks = "; ".join(
        f"from top-{k} answers the largest block seen whole is {found['complete_block'][0]} × "
        f"{found['complete_block'][1]}, of rank {found['rank_in_it']}"
        for k, found in top.items()
    )
    return [
        *_table(
            f"Training a stolen model: perplexity of held-out text after steps of {trained['tokens_a_step']} tokens "
            "(`permutation`)",
            ["", *(f"{step} steps" for step in trained["steps"])],
            rows,
        ),
        f"- **Stolen and run as it is**, on plain embeddings: perplexity {used['perplexity_stolen']:,.0f} against the "
        f"original's {used['perplexity_original']:.1f}. The original: “{_line(used['text_original'])}”; the stolen "
        f"model: “{_line(used['text_stolen'])}”.",
        "- **Stolen and fed with its own classifier's rows**: perplexity "
        f"{own['perplexity_stolen_in_renamed_ids']:.1f} in renamed ids against "
        f"{own['perplexity_original']:.1f} (`rotation`: "
        f"{_figures(turned, 'theft-own-table')['perplexity_stolen_in_renamed_ids']:.1f}). With the names that traffic "
        f"gives away, {percent(own['same_in_plain_names'])} of its next tokens are the original's.",
        f"- **Full logit rows** have rank {logits['rank']} for a hidden size of {logits['hidden_size']}; {blocks}. A "
        f"device may ask for full rows, so this protects nothing; counting says what withholding them would take: with "
        f"k at most the hidden size never enough, with k = 1,024 {top['1024']['rows_needed']:,} rows.",
        f"- **Lengths** of prompts are read exactly from TLS record sizes. The prompt's length alone singles out "
        f"{percent(lengths['singled_out_by_prompt_length'])} of {lengths['candidates']:,} candidate paragraphs, both "
        f"lengths {percent(lengths['singled_out_by_both_lengths'])}.",
        "",
    ]


def _measures(report: Report) -> list[str]:
    entries, tokens = report.measures["entries"], report.measures["tokens"]
    rows = [
        [f"{kind}: {name}", *(f"{value:.3f}" for value in values)]
        for kind, curves in (
            ("entry by entry, Székely", entries["szekely"]),
            ("entry by entry, as printed", entries["printed"]),
            ("token by token, Székely", tokens["szekely"]),
            ("token by token, bias removed", tokens["corrected"]),
        )
        for name, values in curves.items()
        if name in ("permutation", "rotation", "random scaling", "nothing in common")
    ]
    return _table(
        "“Distance correlation” of vectors and their copies, by width (random normal vectors)",
        ["", *(f"{width:,}" for width in entries["widths"])],
        rows,
    )


def _kinds() -> list[str]:
    """Every attack that was tried on another kind of model."""
    columns = {
        f"{label}: {scheme}": read_json(path_of_kind(kind, scheme).read_bytes())
        for kind, (label, _) in KINDS.items()
        for scheme in SCHEMES
    }
    tried = {finding.name: finding.title for report in columns.values() for finding in report.findings}
    rows = []
    for name, title in tried.items():
        found = [next((one for one in report.findings if one.name == name), None) for report in columns.values()]
        controls = [one.control for one in found if one is not None and one.control is not None]
        cells = [percent(one.recovered) if one is not None else "–" for one in found]
        rows.append([title, *cells, percent(min(controls))])
    return _table(
        "Other kinds of models, in float32 (–: not about such a model)", ["attack", *columns, "control"], rows
    )


def _quantised() -> list[str]:
    """What quantised weights let through, and what their blocks add for who has a table that is off."""
    report = read_json(QUANTISED_PATH.read_bytes())
    rows = [[one.title, one.knows, percent(one.recovered), percent(one.control)] for one in report.findings]
    figures = _figures(report, "table-blocks")
    off = [
        [name, *map(percent, figures[key])]
        for name, key in (
            ("by blocks", "off_by_all_blocks"),
            ("by sorted entries, as without blocks", "off_by_all_entries_without_blocks"),
        )
    ]
    return [
        *_table(
            "The quantised file (Q4_1), moved in blocks of 32 (`--gguf source`)",
            ["attack", "the attacker knows", "recovered", "control"],
            rows,
        ),
        *_table(
            "The same, looked up in a table that is off by noise, in its spreads: tokens read",
            ["off by", *map(percent, figures["off"])],
            off,
        ),
    ]


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _rounding(reports: dict[str, Report]) -> list[str]:
    rows = []
    for level, report in reports.items():
        check = report.check
        rows.append(
            [
                level,
                report.dtype,
                f"{check['max_difference']:.1e}",
                f"{check['mean_difference']:.1e}",
                f"{check['same_top_token']} of {check['positions']}",
            ]
        )
    return _table(
        "What a level costs in exactness: logits against the original in the same dtype, computed in float32",
        ["level", "stored in", "greatest difference", "mean", "same top token"],
        rows,
    )


if __name__ == "__main__":
    main()
