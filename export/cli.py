"""`stip-export`: export a model, look at a bundle."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from shared.command import debug_option, run
from shared.errors import AuditError
from shared.levels import SCHEMES, limit
from shared.manifest import DeviceManifest, check_files, read_manifest


def main() -> None:
    """Entry point of the `stip-export` command."""
    parser = argparse.ArgumentParser(prog="stip-export", description="The model developer: transform a model.")
    common = [debug_option()]
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    model = commands.add_parser(
        "model", help="write a transformed checkpoint for the cloud and a bundle for devices", parents=common
    )
    model.add_argument("model", metavar="MODEL", help="hub id, folder with safetensors, or .gguf file")
    model.add_argument("--out", required=True, type=Path, help="folder to make: OUT/cloud, OUT/device, OUT/export.json")
    model.add_argument("--scheme", choices=SCHEMES, default="permutation", help="see SECURITY.md")
    model.add_argument("--head", choices=("cloud", "device"), default="cloud", help="where the classifier runs")
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the stored weights; with --gguf, of what devices hold and send",
    )
    model.add_argument(
        "--gguf",
        choices=("f32", "f16", "bf16", "q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "source"),
        help="store the cloud's weights for llama.cpp, as this type; source: move the blocks of a quantised .gguf",
    )
    model.add_argument("--name", metavar="SERVED", help="what devices ask for; the cloud reads it (default: random)")
    model.add_argument(
        "--drafts", choices=("table", "none"), default="table", help="what devices draft from (see README)"
    )
    model.add_argument("--json", action="store_true", help="print the report as JSON")
    model.set_defaults(command=_model)

    inspect = commands.add_parser("inspect", help="what a device bundle is, secrets never shown", parents=common)
    inspect.add_argument("folder", type=Path, metavar="OUT/device")
    inspect.set_defaults(command=_inspect)

    families = commands.add_parser("families", help="which architectures can be exported", parents=common)
    families.add_argument("--json", action="store_true", help="print the list as JSON")
    families.set_defaults(command=_families)

    audit = commands.add_parser("audit", help="attack an export as the cloud would, and measure", parents=common)
    audit.add_argument("folder", type=Path, metavar="OUT", help="both halves of an export; the report goes there too")
    audit.add_argument("--model", metavar="MODEL", help="the public base model that the attacker has")
    audit.add_argument("--attack", action="append", default=[], metavar="NAME", help="run this one alone (repeatable)")
    audit.add_argument("--json", action="store_true", help="print the report as JSON")
    audit.set_defaults(command=_audit)
    run(parser)


def _quiet() -> None:
    import warnings

    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")  # nothing here normalises with it

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _model(arguments: argparse.Namespace) -> None:
    from export.bundle import export_model

    _quiet()
    report = export_model(
        arguments.model,
        arguments.out,
        scheme=arguments.scheme,
        head=arguments.head,
        dtype=arguments.dtype,
        gguf=arguments.gguf,
        name=arguments.name,
        drafts=arguments.drafts,
    )
    if arguments.json:
        print(msgspec.json.encode(report).decode())
        return
    check = report.check
    print(f"{report.served_name}: {report.family}, {report.scheme}, {report.dtype}, {report.seconds} s")
    print(f"  cloud      {arguments.out / 'cloud'}")
    print(f"  device     {arguments.out / 'device'} (holds the user key: give it to devices only)")
    if report.head == "device":
        print("  classifier on the device: the cloud has none, and answers with hidden states")
    print(f"  tokenizer  {report.tokenizer}: {report.tokenizer_proof}")
    only_permuted = [stream for stream, hidden in report.streams.items() if hidden != report.scheme]
    if only_permuted:
        print(f"  permuted   the {' and '.join(only_permuted)} stream: this family's norms allow no rotation of it")
    if report.quantisation is not None:
        print(f"  weights    GGUF, {report.quantisation}, for llama.cpp: stip-cloud serve --engine llama.cpp")
    cause = f"new values rounded to {report.quantisation or report.dtype}: " if check.rounded else "in float32: "
    print(
        f"  check      {check.positions} positions, {cause}results differ by at most {check.max_difference:.1e} "
        f"(mean {check.mean_difference:.1e}, largest {check.largest_logit:.1f}); "
        f"top entry the same in {check.same_top_token} of {check.positions}"
    )
    if report.log2_keys is not None:
        free = report.log2_keys_free
        blocks = "" if free is None else f" (2^{free:.0f} without blocks of quantised values that stay together)"
        print(f"  key space  2^{report.log2_keys:.0f} permutations{blocks}, which nobody has to search")
    print(f"  limit      {limit(report.scheme)}")
    for name, reason in list(report.unmoved.items())[:1]:
        print(f"  unmoved    {len(report.unmoved)} tensors such as {name}: {reason}")
    for name in report.unquantised[:1]:
        print(
            f"  float32    {len(report.unquantised)} matrices such as {name}: their columns do not fill blocks of "
            f"{report.quantisation}"
        )
    if report.warning:
        print(f"stip-export: warning: {report.warning}", file=sys.stderr)


def _inspect(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(arguments.folder, DeviceManifest)
    check_files(arguments.folder, manifest, contents=True)
    shown = msgspec.to_builtins(manifest)
    files = shown.pop("files")
    for key, value in shown.items():
        print(f"{key:<16} {value}")
    for name, entry in files.items():
        print(f"{name:<24} {entry['bytes']:>12,} bytes  sha256 {entry['sha256'][:16]}…  intact")


def _families(arguments: argparse.Namespace) -> None:
    from export.families import FAMILIES
    from export.gguf.layout import LAYOUTS

    rows = [
        {
            "family": family.name,
            "kind": family.kind,
            "model_types": family.model_types,
            "classes": sorted(set(family.classes.values())),
            "also_read": sorted(set(family.classes) - set(family.classes.values())),
            "gguf": [name for name in family.model_types if name in LAYOUTS],
            "proven_on": family.tried,
        }
        for family in FAMILIES
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['family']:<12} {row['kind']:<16} {', '.join(row['model_types'])}")
        print(f"{'':<12} {', '.join(row['classes'])}")
        if row["also_read"]:
            print(f"{'':<12} without their heads: {', '.join(row['also_read'])}")
        if row["gguf"]:
            print(f"{'':<12} as GGUF, for llama.cpp: {', '.join(row['gguf'])}")
        print(f"{'':<12} proven on: {row['proven_on']}")
    print(
        "\nEvery family is exported under both schemes. Proven: the function is unchanged under drawn secrets, a wrong "
        "space on any axis\nis caught, and the answers over the wire are those of the stock model. `make families` "
        "measures it at real sizes.\nAnother architecture needs a table: see export/families."
    )


def _audit(arguments: argparse.Namespace) -> None:
    from export.audit.report import table, to_json, warnings
    from export.audit.run import audit

    _quiet()
    report = audit(arguments.folder, arguments.model, arguments.attack)
    print(to_json(report).decode() if arguments.json else table(report))
    print(f"stip-export: written to {arguments.folder}/audit.json and audit.html", file=sys.stderr)
    if unsound := warnings(report):
        raise AuditError(unsound[0], hint="its figure says nothing; please report this")
