#!/usr/bin/env bash
# torch 2.13.0 (gloo, CPU, two processes).
#
# Expected: .item() of the norm of a weight that FSDP2 has sharded is the norm of the whole weight.
# The tensor stands for the whole, and a product or a print of its shape behaves so.
#
# What happens: the norm is a DTensor that still waits for its sum over ranks, and .item() hands out
# this rank's part of it, without the sum. Each rank gets another number. So do mean and max, which
# stay plausible. Nothing is said. (clip_grad_norm_ returns a finished norm.)
#
# Seen:
#     norm     true +1.6093   .item() on rank 0 +1.1041, on rank 1 +1.1708
#         .full_tensor().item() +1.6093   _NormP(2)
#     mean     true -0.0210   .item() on rank 0 -0.0172, on rank 1 -0.0248
#         .full_tensor().item() -0.0210   P(avg)
#     largest  true +0.3515   .item() on rank 0 +0.3378, on rank 1 +0.3515
#         .full_tensor().item() +0.3515   P(max)
#
# Why it matters: the distance of the policy's weights from the reference's is logged, used as a
# penalty, or used to stop. The number that rank 0 logs is too small, and a decision made of it can
# go one way on one rank and another way on the next, so that they wait for each other for good.
#
# What to do: .full_tensor().item(), on all ranks at once. Print .placements of whatever is logged:
# anything but Replicate() is not finished.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
cat > seen.py <<'PY'
import os
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=rank, world_size=2)
torch.manual_seed(0)
layer = torch.nn.Linear(8, 8, bias=False)
start = layer.weight.detach().clone()
fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
weight = layer.weight.detach()
measures = {"norm": lambda w: w.norm(), "mean": lambda w: w.mean(),
            "largest": lambda w: w.abs().max()}
failed = []
for name, measure in measures.items():
    true, got = measure(start).item(), measure(weight)
    local, whole = got.item(), got.full_tensor().item()
    both = [None, None]
    dist.all_gather_object(both, local)
    if rank == 0:
        print(f"{name:8} true {true:+.4f}   .item() on rank 0 {both[0]:+.4f}, on rank 1"
              f" {both[1]:+.4f}   .full_tensor().item() {whole:+.4f}   {got.placements[0]}")
    if both[0] == both[1] or abs(whole - true) > 1e-5:
        failed.append(name)
dist.destroy_process_group()
if failed:
    sys.exit(f"behaviour has changed for {failed}")
PY
timeout 120 "$work/venv/bin/python" seen.py 1 &
other=$!
timeout 120 "$work/venv/bin/python" seen.py 0
wait "$other"
