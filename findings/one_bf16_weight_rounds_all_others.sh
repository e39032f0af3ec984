#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0, safetensors 0.8.0.
#
# Expected: save_pretrained followed by from_pretrained, above all with dtype="auto", gives back
# each weight in the precision it was saved in.
#
# What happens: the config records one dtype for the whole model, that of its first weight, which is
# the embedding. Loading casts all others to it. A model whose embedding was frozen in bf16 and
# whose other weights were trained in fp32 is saved in full, and comes back in bf16 altogether.
# Nothing is said.
#
# Seen:
#     loss before training 4.170811
#     loss after it        4.170475
#     in the file, all but the embedding: {'torch.float32'}
#     no dtype given       head torch.bfloat16  off by up to 2.4e-04  loss 4.170416
#     dtype="auto"         head torch.bfloat16  off by up to 2.4e-04  loss 4.170416
#     dtype=torch.float32  head torch.float32   off by up to 0.0e+00  loss 4.170479
#     training had moved the head by 1.0e-05
#     lines in the log: 0
#
# Why it matters: preference training uses tiny learning rates (5e-7 is common for DPO). What twenty
# steps moved is here 20 times smaller than what the loading rounds off. A run that is resumed, or a
# policy that becomes the next round's reference, is then not the one that was trained.
#
# What to do: name the dtype when loading, torch.float32 if any weight was trained in it, and cast
# the frozen part down again afterwards. Compare one tensor of the file with the loaded one.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6 safetensors==0.8.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging
import torch
import transformers
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

said = []
catch = logging.Handler()
catch.emit = lambda record: said.append(record.getMessage())
torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config)
model.model.embed_tokens.to(torch.bfloat16).requires_grad_(False)  # frozen, so kept small
row = torch.randint(3, 64, (4, 32))


def loss(model):
    return model(row, labels=row).loss


start = model.lm_head.weight.detach().clone()
print(f"loss before training {loss(model).item():.6f}")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-7)
for _ in range(20):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()
print(f"loss after it        {loss(model).item():.6f}")
model.save_pretrained("model")
tensors = load_file("model/model.safetensors")
print("in the file, all but the embedding:",
      {str(t.dtype) for name, t in tensors.items() if "embed" not in name})
transformers.logging.add_handler(catch)
got = {}
for name, kw in (("no dtype given", {}), ('dtype="auto"', {"dtype": "auto"}),
                 ("dtype=torch.float32", {"dtype": torch.float32})):
    again = LlamaForCausalLM.from_pretrained("model", **kw)
    got[name] = again.lm_head.weight
    off = (again.lm_head.weight.float() - model.lm_head.weight).abs().max()
    print(f"{name:20} head {str(got[name].dtype):15} off by up to {off:.1e}"
          f"  loss {loss(again).item():.6f}")
print(f"training had moved the head by {(model.lm_head.weight - start).abs().max():.1e}")
print("lines in the log:", len(said))
assert got["no dtype given"].dtype == got['dtype="auto"'].dtype == torch.bfloat16, "changed"
assert torch.equal(got["dtype=torch.float32"], model.lm_head.weight), "way out no longer works"
assert not said, "behaviour has changed: the loader now says something"
PY
