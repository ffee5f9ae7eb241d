"""One table of everything that the programs before this one wrote; results.json holds all of it."""

from __future__ import annotations

import json
import os
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

WORK, OUT = Path(os.environ["GPU_CHECK_WORK"]), Path(os.environ["OUT"])


def load(name: str) -> Any:
    try:
        return json.loads((OUT / name).read_text())
    except (OSError, ValueError):
        return {}


def number(value: Any, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else "-"


def tests() -> dict:
    found = {}
    for path in sorted(WORK.glob("pytest-*.xml")):
        try:
            root = ET.parse(path).getroot()
        except (OSError, ET.ParseError) as error:
            found[path.stem] = {"unreadable": str(error)}
            continue
        cases = list(root.iter("testcase"))
        bad = [(c, x) for c in cases for x in c if x.tag in ("failure", "error")]
        lines = [
            f"{c.get('classname', '').removeprefix('tests.')}::{c.get('name')}: {(x.get('message') or '')[:160]}"
            for c, x in bad
        ]
        found[path.stem] = {"run": len(cases), "failed": len({id(c) for c, _ in bad}), "failures": lines}
    return found


def main() -> None:
    everything = load("results.json")
    everything["tests"], everything["baselines"] = tests(), load("baseline.json") or []
    (OUT / "results.json").write_text(json.dumps(everything, indent=1))
    micro, checks = everything.get("micro", {}), everything.get("checks", {})
    benches = {name: part for name, part in everything.items() if name.startswith("bench-")}
    lines: list[str] = []
    say = lines.append
    env, top = everything.get("machine", {}), micro.get("ceilings") or {}
    say(f"card {env.get('card', 'CPU')}  torch {env.get('torch')}  transformers {env.get('transformers')}")
    if "bf16" in top:
        say(
            f"ceilings: bf16 {top['bf16'] / 1e12:.0f} TFLOP/s, tf32 {top['tf32'] / 1e12:.0f}, float32 {top['float32'] / 1e12:.0f}, copy {top['traffic'] / 1e12:.2f} TB/s"
        )
    for key in ("launches", "norm", "adam", "projection", "projection_compiled", "drawing", "attention", "gae"):
        found = micro.get(key) or {}
        say(
            f"{key}: "
            + ", ".join(f"{k} {number(v, 3) if isinstance(v, float) else v}" for k, v in found.items() if k != "wall_s")
        )
    say("")
    counts: dict[str, int] = {}
    for line in checks.values():
        counts[line.get("status", "?")] = counts.get(line.get("status", "?"), 0) + 1
    say("checks: " + ", ".join(f"{n} {s}" for s, n in sorted(counts.items())))
    for name, line in checks.items():
        if line.get("status") != "ok" or "predicted" in line:
            say(
                f"  {line.get('status', '?'):7} {name}: {str(line.get('found', line.get('reason', '')))[:230]}"
                + (f"  [predicted: {line['predicted']}]" if "predicted" in line else "")
            )
    for name, line in everything["tests"].items():
        say(f"{name}: {line.get('run')} run, {line.get('failed')} failed")
        for text in line.get("failures", [])[:6]:
            say(f"  {text[:200]}")
    for name, bench in benches.items():
        if not bench:
            continue
        low = bench.get("bound") or {}
        say("")
        say(
            f"{name}: bound in s: sampling {number(low.get('sample'), 3)}, scoring {number(low.get('score'), 3)}, update {number(low.get('update'), 3)}"
        )
        say(f"  {'what':28}{'s':>9}{'tokens/s':>11}{'ms/token':>10}{'x bound':>9}{'peak GB':>9}")
        for key in (
            "sampling",
            "sampling_ragged",
            "sampling_without_graph",
            "sampling_as_train_asks",
            "generate_of_transformers",
            "graph_probe",
            "static_generate",
        ):
            f = bench.get(key) or {}
            if "seconds" in f:
                ratio = f["seconds"] / low["sample"] if low.get("sample") and "tokens" not in f else None
                say(
                    f"  {key:28}{number(f['seconds']):>9}{number(f.get('tokens_per_s'), 0):>11}{number(f.get('ms_per_token')):>10}{number(ratio, 1):>9}{number(f.get('peak_gb'), 1):>9}"
                )
            elif f:
                say(f"  {key:28} {str(f)[:120]}")
        for key in ("step", "step_ragged"):
            f = bench.get(key) or {}
            for part, least in (
                ("scoring", "score"),
                ("update", "update"),
                ("rewards", ""),
                ("rest", ""),
                ("step", ""),
            ):
                if part in f:
                    ratio = f[part] / low[least] if least and low.get(least) else None
                    say(
                        f"  {key + ' ' + part:28}{number(f[part]):>9}{'':>11}{'':>10}{number(ratio, 1):>9}{number(f.get('peak_gb'), 1) if part == 'step' else '':>9}"
                    )
            if f and "step" not in f:
                say(f"  {key:28} {str(f)[:120]}")
        whole = [(bench.get(k) or {}).get(v) for k, v in (("sampling", "seconds"), ("step", "step"))]
        if all(isinstance(x, int | float) for x in whole):
            least = sum(low.get(k, 0) for k in ("sample", "score", "update"))
            say(f"  {'whole cycle':28}{number(sum(whole)):>9}{'':>11}{'':>10}{number(sum(whole) / least, 1):>9}")
        for key in ("sampling_profile", "update_profile"):
            f = bench.get(key) or {}
            if f and "error" not in f and "skipped" not in f:
                say(f"  {key}: " + ", ".join(f"{k} {number(v, 1)}" for k, v in f.items() if isinstance(v, int | float)))
                most = f.get("most_ms") or {}
                for kernel, ms in list(most.items())[:8]:
                    say(f"    {number(ms, 2):>8} ms  {re.sub(r'<.*', '<', kernel)[:70]}")
            elif f:
                say(f"  {key}: {str(f)[:160]}")
    for row in everything["baselines"]:
        told = {name: number(x) if isinstance(x, float) else x for name, x in row.items() if x is not None}
        say("baseline: " + ", ".join(f"{name} {x}" for name, x in told.items()))
    text = "\n".join(lines)
    (OUT / "table.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
