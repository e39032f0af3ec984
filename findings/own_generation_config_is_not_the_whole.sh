#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0.
#
# Expected: a GenerationConfig that the caller builds and passes to generate() is what counts. With
# do_sample=False each token is then the likeliest by the model's logits.
#
# What happens: whatever the caller has not set is filled in from the model's own
# generation_config.json. A repetition penalty in that file reshapes the logits of a greedy search
# that never asked for one. There is no warning, and the caller's object shows no penalty.
#
# Seen:
#     own config                   15 of 24 tokens are the likeliest; log-prob of all -39.47
#     with repetition_penalty=1.0  24 of 24 tokens are the likeliest; log-prob of all -34.17
#     penalty that the caller's config holds: None
#
# Why it matters: online preference training lets the policy write its own pairs, then takes their
# log-probs from the raw logits. With a penalty (or a top_k, or a temperature) from the checkpoint's
# file the text comes from another distribution than the one that is scored, so KL and importance
# weights are wrong. Two checkpoints are also not compared under one rule.
#
# What to do: replace the model's config before generating, by
# model.generation_config = GenerationConfig(), or set each field by name: repetition_penalty=1.0,
# temperature=1.0, top_k=0, top_p=1.0. Check once that greedy text is the argmax of the logits.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
                     bos_token_id=None, eos_token_id=None, pad_token_id=0)
made = LlamaForCausalLM(config)
made.generation_config.repetition_penalty = 1.3  # many chat models come with such a line
made.save_pretrained("model")
model = LlamaForCausalLM.from_pretrained("model", dtype=torch.float32).eval()
prompt = torch.randint(3, 64, (1, 8))


def argmax_text():
    row = prompt
    for _ in range(24):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    return row[:, 8:]


def written(**kw):
    given = GenerationConfig(max_new_tokens=24, do_sample=False, **kw)
    row = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=given)
    return row[:, 8:]


with torch.no_grad():
    right = argmax_text()
    scores = lambda text: model(torch.cat([prompt, text], 1)).logits[0, 7:-1].log_softmax(-1)
    for name, kw in (("own config", {}),
                     ("with repetition_penalty=1.0", {"repetition_penalty": 1.0})):
        text = written(**kw)
        best = (scores(text).argmax(-1) == text[0]).sum().item()
        score = scores(text).gather(1, text[0, :, None]).sum().item()
        print(f"{name:28} {best} of 24 tokens are the likeliest; log-prob of all {score:.2f}")
        assert (best < 24) if not kw else torch.equal(text, right), "behaviour has changed"
print("penalty that the caller's config holds:",
      GenerationConfig(max_new_tokens=24, do_sample=False).repetition_penalty)
PY
