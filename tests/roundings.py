"""The demo of ten seeds under two roundings: does its message hold on another processor?

    python tests/roundings.py /tmp/roundings results/demo/seeds.csv

Digits differ between processors, and after some hundred steps so does every model. Here one
processor is held to an older one's instructions (no AVX), which rounds nearly every product and
sum otherwise. Each demo goes into a folder of its own; what is done is skipped. Minutes a demo: it
is no part of the tests.
"""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDINGS = {"its own": {},
             "no AVX": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}}
SAID = (r"policies \(KL ([\d.]+) to ([\d.]+)\) online wins (\d+)% on average and offline (\d+)% "
        r"\(([+-][\d.]+)\); at the highest (\d+)% and (\d+)% \(([+-][\d.]+)\)")
NAMES = ("kl_from", "kl_to", "online", "offline", "gap", "online_at_highest",
         "offline_at_highest", "gap_at_highest")


def main(folder, out, seeds=10):
    rows = []
    for seed in range(seeds):
        for name, variables in ROUNDINGS.items():
            inside = Path(folder, name.replace(" ", "-"))
            inside.mkdir(parents=True, exist_ok=True)
            ran = f"demo-s{seed}" if seed else "demo"
            result = inside / "runs" / ran / "figures" / "main.md"
            if not result.exists():
                with open(inside / f"{ran}.log", "w") as log:
                    subprocess.run([sys.executable, ROOT / "study.py", "--scale", "demo", "--seed",
                                    str(seed)], cwd=inside, env=os.environ | variables, check=True,
                                   stdout=log, stderr=log)
            text = result.read_text()
            found = re.search(SAID, text)
            rows.append({"seed": seed, "rounding": name} | dict(
                zip(NAMES, found.groups() if found else (), strict=False)))
            for line in text.splitlines()[2:5]:  # the table: SFT, online, offline
                cells = [cell.strip() for cell in line.strip("| ").split("|")]
                side = cells[0].partition(",")[0].lower()
                rows[-1] |= {f"{side}_{key}": cell.split()[0] for key, cell in zip(
                    ("win_rate", "kl", "utility"), cells[1:], strict=False)}
            print(rows[-1], flush=True)
            with open(out, "w", newline="") as f:
                writer = csv.DictWriter(f, list(dict.fromkeys(k for row in rows for k in row)))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:]))
