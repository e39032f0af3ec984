#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0.
#
# Expected: a model with a sliding window (Mistral, Gemma 3) keeps its window when it is given an
# attention mask, as it does with the usual mask of one number a token.
#
# What happens: a mask of four dimensions replaces the window too. A plain causal mask of one's own
# turns a sliding-window layer into one that sees everything. Below the window all is equal; past it
# log-probs differ by nats. There is no warning and no line in the log.
#
# Seen (window of 8, row of 64 tokens, random weights):
#     Mistral: first 8 tokens off by 0.0000 nats at most, the rest by up to 4.62; window put into
#         the mask: 0.0000
#     Mistral: warnings 0, log lines 0
#     Gemma 3: first 8 tokens off by 0.0000 nats at most, the rest by up to 3.11; window put into
#         the mask: 0.0000
#     Gemma 3: warnings 0, log lines 0
#
# Why it matters: such masks are what one writes to pack pairs, or to put a chosen and a rejected
# answer behind one prompt. Tests with short rows pass. With long rows the policy is trained as a
# model that nobody serves, while generate() and the judge go by the window.
#
# What to do: put the window into the mask by hand. Where a model has both kinds of layers, pass a
# dict with one mask for "full_attention" and one for "sliding_attention". Test with a row that is
# longer than the window.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import logging
import warnings
import torch
import transformers
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig,
                          MistralForCausalLM)

said = []
catch = logging.Handler()
catch.emit = lambda record: said.append(record.getMessage())
transformers.logging.add_handler(catch)
size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, sliding_window=8,
            initializer_range=0.3)
torch.manual_seed(0)
mistral = MistralForCausalLM(MistralConfig(**size)).eval()
gemma = Gemma3ForCausalLM(Gemma3TextConfig(
    **size, head_dim=16, layer_types=["sliding_attention", "full_attention"])).eval()
row = torch.randint(3, 64, (1, 64))
causal = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
window = causal & torch.ones(64, 64, dtype=torch.bool).triu(-7)


def per_token(model, **kw):
    with torch.no_grad():
        logits = model(row, **kw).logits
    return logits.log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[:, 0]


said.clear()
for name, model, right in (
        ("Mistral", mistral, window),
        ("Gemma 3", gemma, {"full_attention": causal, "sliding_attention": window})):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own = per_token(model)
        given = per_token(model, attention_mask=causal)
        repaired = per_token(model, attention_mask=right)
    off = (given - own).abs()
    print(f"{name}: first 8 tokens off by {off[:7].max():.4f} nats at most, the rest by up to"
          f" {off[8:].max():.2f}; window put into the mask: {(repaired - own).abs().max():.4f}")
    print(f"{name}: warnings {len(caught)}, log lines {len(said)}")
    assert off[:7].max() < 1e-3 and off[8:].max() > 0.5, "behaviour has changed"
    assert (repaired - own).abs().max() < 1e-3, "the way out no longer works"
PY
