#!/usr/bin/env bash
# torch 2.13.0.
#
# Expected: torch.Generator takes a seed of 64 bits, reports it back from initial_seed(), and so
# gives different streams for different seeds.
#
# What happens: the CPU generator starts from the low 32 bits only. Seeds that differ in the high
# half give the same stream, and initial_seed() still reports the whole number.
#
# Seen:
#     seed 1            order of eight pairs [5, 4, 2, 6, 7, 3, 1, 0]
#     seed 4294967297   order of eight pairs [5, 4, 2, 6, 7, 3, 1, 0]
#     seed 4294967298   order of eight pairs [0, 4, 7, 2, 6, 5, 1, 3]
#     seeds (step << 32) | 7, for 1000 steps: 1 different stream(s)
#     seeds (7 << 32) | step, for 1000 steps: 1000 different stream(s)
#     initial_seed() all the same reports: 4294967297
#
# Why it matters: a seed for each step and rank is often made by shifting one of them into the high
# half. On a CPU every step then shuffles the pairs in the same order, flips the same labels, or
# samples the same answers, and "three seeds" of a study may be one.
#
# What to do: mix the parts into 32 bits before seeding, by a hash for example, and check that a
# few seeds give different first draws.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch


def order(seed):
    return torch.randperm(8, generator=torch.Generator().manual_seed(seed)).tolist()


for seed in (1, 1 + 2**32, 2 + 2**32):
    print(f"seed {seed:<12} order of eight pairs {order(seed)}")
draw = lambda seed: torch.rand(4, generator=torch.Generator().manual_seed(seed))
high = {tuple(draw((step << 32) | 7).tolist()) for step in range(1000)}
low = {tuple(draw((7 << 32) | step).tolist()) for step in range(1000)}
print(f"seeds (step << 32) | 7, for 1000 steps: {len(high)} different stream(s)")
print(f"seeds (7 << 32) | step, for 1000 steps: {len(low)} different stream(s)")
kept = torch.Generator().manual_seed(1 + 2**32).initial_seed()
print("initial_seed() all the same reports:", kept)
assert order(1) == order(1 + 2**32) and len(high) == 1, "behaviour has changed"
assert kept == 1 + 2**32 and len(low) == 1000
PY
