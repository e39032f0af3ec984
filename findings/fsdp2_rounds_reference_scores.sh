#!/usr/bin/env bash
# torch 2.13.0 (gloo, CPU, one process is enough).
#
# Expected: MixedPrecisionPolicy(param_dtype=torch.bfloat16) makes the layers compute in bf16.
# Numbers that are handed through forward() for the loss stay what they were, as under autocast.
#
# What happens: at the outermost module FSDP2 casts every floating tensor among forward's arguments,
# also those inside a dict or a dataclass. bf16 has a step of 2 between 256 and 512. Log-probs of
# whole answers lie there, so a margin of 1.3 nats becomes 0. Nothing is said.
#
# Seen:
#     autocast, no FSDP                          reference margin 1.3000  torch.float32
#     FSDP2, param_dtype=bf16, dict              reference margin 0.0000  torch.bfloat16
#     FSDP2, param_dtype=bf16, dataclass         reference margin 0.0000  torch.bfloat16
#     ... cast_forward_inputs=False, dict        reference margin 1.3000  torch.float32
#     ... cast_forward_inputs=False, dataclass   reference margin 1.3000  torch.float32
#
# Why it matters: a wrapper module that takes the batch and returns the DPO or IPO loss gets the
# stored reference scores, the rewards or the advantages as inputs. They arrive rounded, and the
# training goes on as if the reference had no opinion.
#
# What to do: take the loss outside of the sharded module, where the scores never pass through its
# forward(). Or set cast_forward_inputs=False on the outermost module, and cast what the layers need
# by hand.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import dataclasses
import os
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


@dataclasses.dataclass
class Reference:
    chosen: torch.Tensor
    rejected: torch.Tensor


class Policy(torch.nn.Module):
    """Scores a pair with a layer, then takes the reference's margin off (as DPO does)."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, features, reference):
        if isinstance(reference, dict):
            reference = Reference(**reference)
        self.layer(features)
        return reference.chosen - reference.rejected


dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store",
                        rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
features = torch.ones(1, 4)
pair = {"chosen": torch.tensor([-351.3]), "rejected": torch.tensor([-352.6])}
seen = {}
plain = Policy()
with torch.autocast("cpu", torch.bfloat16):
    seen["autocast, no FSDP"] = plain(features, pair)
bf16 = torch.bfloat16
policies = {"FSDP2, param_dtype=bf16": MixedPrecisionPolicy(param_dtype=bf16),
            "... cast_forward_inputs=False": MixedPrecisionPolicy(param_dtype=bf16,
                                                                  cast_forward_inputs=False)}
for name, mixed in policies.items():
    model = Policy()
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    own = features if mixed.cast_forward_inputs else features.to(bf16)
    for form, given in (("dict", pair), ("dataclass", Reference(**pair))):
        seen[f"{name}, {form}"] = model(own, given)
for name, margin in seen.items():
    print(f"{name:42} reference margin {margin.item():.4f}  {margin.dtype}")
dist.destroy_process_group()
for form in ("dict", "dataclass"):
    assert seen[f"FSDP2, param_dtype=bf16, {form}"].item() == 0, "behaviour has changed"
    kept = seen[f"... cast_forward_inputs=False, {form}"].item()
    assert abs(kept - 1.3) < 1e-3, "the way out no longer works"
PY
