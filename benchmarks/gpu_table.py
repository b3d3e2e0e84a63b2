"""The table of `make bench-gpu`."""

from __future__ import annotations

from typing import Any


def table(figures: dict[str, Any]) -> str:
    """What is printed of the figures."""
    llama, gpt2, where = figures["llama"], figures["gpt2"], figures["machine"]
    single, many = llama["single"], llama["together"]
    batch = f"batch {many['devices']}"
    forward = f"GPT-2, {gpt2['sequences']} × {gpt2['tokens']} tokens, one forward"
    titles = {
        "s": "(s) STIP over loopback",
        "u": "(u) unprotected, in process",
        "t": "(t) unprotected, transformers alone",
        "w": f"(w) {llama['weight_bytes'] / 1e9:.2f} GB of weights at {figures['bandwidth'] / 1e12:.3f} TB/s",
    }
    lines = [
        f"\nLLaMA, {llama['parameters'] / 1e9:.2f} billion random weights, {llama['dtype']}, {where['card']}, torch "
        f"{where['torch']}; a prompt of {llama['prompt']}, {llama['rounds']} rounds of {llama['tokens']} tokens\n",
        f"{'batch 1':<48}{'ms a token':>12}{'× (w)':>10}",
    ]
    for name, title in titles.items():
        value = single["ms_per_token"][name]
        lines.append(f"{title:<48}{value:>12.3f}{value / single['ms_per_token']['w']:>10.2f}")
    lines += [
        f"STIP / unprotected {single['ratios']['s/u']:.3f}; STIP / (w) {single['ratios']['s/w']:.2f}, "
        f"aim {single['aim']}",
        f"STIP's token: {single['cloud_ms_per_token']:.3f} ms in a step, {single['queue_ms_per_token']:.3f} ms before "
        f"it, {single['device_cpu_ms_per_token']:.3f} ms of the device's processor; "
        f"{single['bytes_up_per_token']:.0f} bytes up, {single['bytes_down_per_token']:.0f} down",
        f"the same tokens as (u), up to the first other one: {single['same_tokens']} of {single['all_tokens']}\n",
        f"{batch:<48}{'tokens/s':>12}",
    ]
    lines += [f"{titles[name]:<48}{many['tokens_per_second'][name]:>12.0f}" for name in ("s", "u")]
    lines += [
        f"STIP / unprotected {many['ratio']:.3f}; processes of devices: {many['device_processes']}, the busiest "
        f"{100 * many['busiest_process']:.0f} % of a core; a step {many['cloud_ms_per_step']:.3f} ms",
        f"the same tokens as (u), up to the first other one: {many['same_tokens']} of {many['all_tokens']}\n",
        f"{forward:<48}{'tokens/s':>12}",
    ]
    lines += [f"{dtype:<48}{rate:>12,.0f}" for dtype, rate in gpt2["tokens_per_second"].items()]
    lines += [f"{'the paper, GPT-2 124m, 100 × 100':<48}{gpt2['paper']:>12,}\n"]
    peak, cloud = figures["card_peak_bytes"] / 2**30, llama["cloud_bytes"]
    lines.append(
        f"card: at most {peak:.1f} GiB in use by all processes; the cloud took {cloud['after_loading'] / 2**30:.1f} "
        f"GiB once it had loaded, {cloud['kv_budget'] / 2**30:.1f} of them for KV; {llama['graphs']} graphs captured; "
        f"the export took {llama['export_seconds']:.0f} s"
    )
    return "\n".join(lines)
