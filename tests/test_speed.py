"""What a step costs: memory does not grow with the vocabulary, and grows linearly with tokens;
time a token is the same for few and for many pairs."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, load_model

import dpo

STEP = """
import sys, threading, time, torch, transformers, dpo
from functools import partial
vocab, rows, response = map(int, sys.argv[1:])
torch.manual_seed(0)
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
    vocab_size=vocab, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
pairs = [([5] * 100, [7] * response, [8] * response)] * rows
def step(pairs):
    dpo.preference_step(model, dpo.pair_logps, partial(dpo.dpo_loss, beta=0.1), pairs,
                        torch.zeros(2, len(pairs)), 0.1, 1 << 20)
    dpo.optimizer_step(model, optimizer, 1e-5, "")
def resident_mb():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
def watch():
    while True:
        seen.append(resident_mb())
        time.sleep(0.001)
step(pairs[:1])  # weights, gradients and Adam's moments are there from here on
seen = [resident_mb()]
threading.Thread(target=watch, daemon=True).start()
step(pairs)
print(max(seen) - seen[0])
"""


def peak_mb(vocab, rows, response):
    """MB that a DPO step of `rows` pairs in one micro-batch takes beyond a step of one pair.

    Freed blocks go back to the system at once (the threshold), so that it is what was alive."""
    found = subprocess.run([sys.executable, "-c", STEP, *map(str, (vocab, rows, response))],
                           cwd=ROOT, check=True, capture_output=True, text=True,
                           env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    return float(found.stdout)


def test_memory_does_not_grow_with_the_vocabulary():
    """3,200 response tokens: all their logits would be 0.2 and 1.6 GB, and as much again for their
    softmax and its gradient."""
    small, large = peak_mb(16_000, 16, 100), peak_mb(128_000, 16, 100)
    assert large - small < 150, (small, large)


def test_memory_grows_linearly_with_tokens():
    """Twice the rows take twice the memory, beyond what does not depend on them."""
    one, two, four = (peak_mb(512, rows, 100) for rows in (32, 64, 128))
    assert four - two == pytest.approx(2 * (two - one), rel=0.2), (one, two, four)
    assert two - one > 30  # or this test measures nothing


def test_cost_is_flat_from_1k_to_100k_pairs(toy, tmp_path):
    """Seconds a pair to read, order, batch and pack: the same for a hundred times the pairs."""
    _, tokenizer = load_model(f"{toy}/sft")
    lines = (toy / "data" / "initial.jsonl").read_text().splitlines()

    def seconds_a_pair(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("\n".join(lines[i % len(lines)] for i in range(count)) + "\n")
        began = time.process_time()
        pairs = dpo.load_pairs(str(path), tokenizer, 32, 40)
        for rows in dpo.make_batches(count // 32, 32, count, 0, 0)[:30]:
            dpo.pack_pairs([pairs[i] for i in rows], "cpu")  # which does not see the other pairs
        json.dumps(pairs)
        return (time.process_time() - began) / count

    seconds_a_pair(1000)
    assert seconds_a_pair(100_000) < 2 * seconds_a_pair(1000)
