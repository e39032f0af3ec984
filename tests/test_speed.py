"""What a step costs: memory does not grow with the vocabulary, and grows linearly with tokens;
time a token is the same for few and for many pairs."""

import ctypes
import json
import resource
import threading
import time
from functools import partial

import pytest
import torch
import transformers
from conftest import Fork, load_model
from test_data import limits

import dpo


def print_peak(vocab, rows, response):
    """Freed blocks go back to the system at once (mallopt), so that it is what was alive."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
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
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * resource.getpagesize() / 1e6

    def watch():
        while True:
            seen.append(resident_mb())
            time.sleep(0.001)

    step(pairs[:1])  # weights, gradients and Adam's moments are there from here on
    seen = [resident_mb()]
    threading.Thread(target=watch, daemon=True).start()
    step(pairs)
    print(max(seen) - seen[0], flush=True)


def peak_mb(folder, *args):
    """MB that a DPO step of `rows` pairs in one micro-batch takes beyond a step of one pair."""
    return float(Fork(folder, print_peak, *args).succeed())


def test_memory_does_not_grow_with_the_vocabulary(tmp_path):
    """1,600 response tokens: all their logits would be 0.1 and 0.8 GB, and as much again for their
    softmax and its gradient."""
    small, large = (peak_mb(tmp_path, vocab, 8, 100) for vocab in (16_000, 128_000))
    assert large - small < 100, (small, large)


def test_memory_grows_linearly_with_tokens(tmp_path):
    """Twice the rows take twice the memory, beyond what does not depend on them."""
    one, two, four = (peak_mb(tmp_path, 512, rows, 100) for rows in (32, 64, 128))
    assert four - two == pytest.approx(2 * (two - one), rel=0.2), (one, two, four)
    assert two - one > 30  # or this test measures nothing


def test_cost_is_flat_from_1k_to_50k_pairs(toy, tmp_path):
    """Seconds a pair to read, order, batch and pack: the same for fifty times the pairs."""
    _, tokenizer = load_model(f"{toy}/sft")
    lines = (toy / "data" / "initial.jsonl").read_text().splitlines()

    def seconds_a_pair(count):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("\n".join(lines[i % len(lines)] for i in range(count)) + "\n")
        began = time.process_time()
        pairs = dpo.load_pairs(str(path), tokenizer, limits(32, 40))
        for rows in dpo.make_batches(count // 32, 32, count, 0, 0)[:30]:
            dpo.pack_pairs([pairs[i] for i in rows], "cpu")  # which does not see the other pairs
        json.dumps(pairs)
        return (time.process_time() - began) / count

    seconds_a_pair(1000)
    assert seconds_a_pair(50_000) < 2 * seconds_a_pair(1000)
