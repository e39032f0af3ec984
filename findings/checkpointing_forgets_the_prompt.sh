#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0.
#
# Expected: a model that is given a KV cache holding the prompt scores an answer after that prompt,
# in train mode too, or refuses.
#
# What happens: with activation checkpointing on and the model in train mode, the cache is dropped,
# both when the prompt is read (the cache stays empty) and when the answer is. The answer is scored
# as if there had been no prompt. There is no error. Two lines in the log say so, once for each
# process, and with verbosity "error" nothing does. Gradients flow and the loss looks plausible.
#
# Seen:
#     prompt and answer in one row        -102.089
#     prompt in a cache                   -102.089
#     prompt in a cache, checkpointing    -111.926
#     answer with no prompt at all        -111.926
#     the last two have equal logits, bit for bit: True
#
# Why it matters: a chosen and a rejected answer share their prompt. Who reads the prompt once into
# a cache to save its cost, then turns checkpointing on for a larger model, trains on answers
# without their question. The reference, in eval mode, still sees the question, so the two sides
# of the DPO margin no longer speak of the same thing.
#
# What to do: feed prompt and answer in one row while checkpointing is on, or pack both answers
# behind one prompt with a mask. After reading the prompt, check cache.get_seq_length().

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
model = LlamaForCausalLM(config).train()  # no dropout: train mode alone changes nothing
prompt, answer = torch.randint(3, 64, (1, 10)), torch.randint(3, 64, (1, 20))


def score(logits):
    """Log-prob of the answer's tokens after its first."""
    picked = logits.log_softmax(-1)[0, :-1].gather(1, answer[0, 1:, None])
    return picked.sum().item()


def through_cache():
    cache = DynamicCache(config=config)
    model(prompt, cache=cache, use_cache=True)
    logits = model(answer, cache=cache, use_cache=True).logits
    return score(logits), logits


whole = score(model(torch.cat([prompt, answer], 1)).logits[:, 10:])
bare_logits = model(answer).logits
bare = score(bare_logits)
plain, _ = through_cache()
model.activation_checkpointing_enable()
saved, saved_logits = through_cache()
saved_logits.sum().backward()
print(f"prompt and answer in one row       {whole:9.3f}")
print(f"prompt in a cache                  {plain:9.3f}")
print(f"prompt in a cache, checkpointing   {saved:9.3f}")
print(f"answer with no prompt at all       {bare:9.3f}")
same = torch.equal(saved_logits, bare_logits)
print("the last two have equal logits, bit for bit:", same)
assert abs(whole - plain) < 1e-3, "the plain cache is off: the test no longer means anything"
assert same and abs(saved - whole) > 1, "behaviour has changed: the prompt is seen, or no error"
PY
