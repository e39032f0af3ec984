#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0.
#
# Expected: from_pretrained(path, dtype=torch.bfloat16) and from_pretrained(path).to(torch.bfloat16)
# give the same model. Their weights are indeed equal, bit for bit.
#
# What happens: .to() also casts the table of rotary frequencies, which is a buffer and which
# from_pretrained keeps in fp32. A frequency in bf16 is off by up to 0.4%, and the angle is the
# frequency times the position, so the error grows along the row. Nothing is said.
#
# Seen (weights random, 4096 tokens, both against the fp32 model):
#     both bf16 models have the same weights: True
#     from_pretrained(dtype=bf16)  rotary table torch.float32   log-prob off by, on average: 0.029
#         nats (first 64 tokens), 0.032 (after 2048)
#     .to(bf16)                    rotary table torch.bfloat16  log-prob off by, on average: 0.025
#         nats (first 64 tokens), 0.339 (after 2048)
#
# Why it matters: if the policy comes from one call and the reference from the other, their
# log-probs differ before the first step, and by more for longer conversations. A length effect is
# then trained in. A policy cast by .to() is also judged and served by others as another model.
#
# What to do: give the dtype to from_pretrained, for policy and reference alike. Check that
# model.model.rotary_emb.inv_freq.dtype is torch.float32. Copies of a model made by .to() need the
# fp32 table put back.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
                     max_position_embeddings=4096)
exact = LlamaForCausalLM(config).eval()
exact.save_pretrained("model")
loaded = LlamaForCausalLM.from_pretrained("model", dtype=torch.bfloat16).eval()
moved = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32).to(torch.bfloat16).eval()
weights = all(torch.equal(a, b) for a, b in zip(loaded.parameters(), moved.parameters()))
print("both bf16 models have the same weights:", weights)
row = torch.randint(3, 64, (1, 4096))


def per_token(model):
    with torch.no_grad():
        logits = model(row).logits.float()
    return logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]


true = per_token(exact)
wrong = {}
for name, model in (("from_pretrained(dtype=bf16)", loaded), (".to(bf16)", moved)):
    off = (per_token(model) - true).abs()
    wrong[name] = off[2048:].mean().item()
    table = model.model.rotary_emb.inv_freq.dtype
    print(f"{name:28} rotary table {str(table):15} log-prob off by, on average:"
          f" {off[:64].mean():.3f} nats (first 64 tokens), {off[2048:].mean():.3f} (after 2048)")
assert weights, "the weights differ: the test no longer means anything"
assert wrong[".to(bf16)"] > 2 * wrong["from_pretrained(dtype=bf16)"], "behaviour has changed"
PY
