#!/usr/bin/env bash
# torch 2.13.0.
#
# Expected: under autocast a weight is cast to bf16 once and the copy is kept for as long as the
# autocast region lasts. So a head that is applied to eight chunks costs one cast, and checkpointing
# repeats at most that one.
#
# What happens: the backward runs outside of the region, and each chunk that a checkpoint recomputes
# opens a region of its own, with an empty store of copies. The whole weight is cast again for every
# chunk. (The plain run's second copy is the gradient's way back to fp32.)
#
# Seen:
#     plain       8 chunks: 1 cast(s) of the weight in the forward, 2 in forward and backward
#     checkpoint  8 chunks: 1 cast(s) of the weight in the forward, 10 in forward and backward
#     by hand     8 chunks: 2 in forward and backward
#
# Why it matters: log-probs over a large vocabulary are taken in checkpointed chunks, so that the
# logits of chosen and rejected need not be held at once. With 150,000 tokens and a width of 4096,
# one cast reads and writes 3.7 GB. The smaller the chunks, the more of the backward goes into it.
#
# What to do: cast the head's weight by hand before the chunks and hand the copy to each, or keep
# the weight in bf16. Count with the profiler, as here.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

CHUNKS, WIDTH, VOCABULARY = 8, 32, 1000
head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)


def chunk_loss(hidden, wanted):
    return torch.nn.functional.cross_entropy(head(hidden).float(), wanted)


def casts(function, backward):
    """Copies of the whole head's weight from one dtype to another, counted by the profiler."""
    hidden = [torch.randn(4, WIDTH, requires_grad=True) for _ in range(CHUNKS)]
    wanted = torch.randint(VOCABULARY, (CHUNKS, 4))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum(function(h, w) for h, w in zip(hidden, wanted))
        if backward:
            loss.backward()
    return sum(event.count for event in seen.key_averages(group_by_input_shape=True)
               if event.key == "aten::_to_copy"
               and list(event.input_shapes[0]) == [VOCABULARY, WIDTH])


recomputed = lambda h, w: checkpoint(chunk_loss, h, w, use_reentrant=False)
count = {}
for name, function in (("plain", chunk_loss), ("checkpoint", recomputed)):
    count[name] = casts(function, False), casts(function, True)
    print(f"{name:10}  {CHUNKS} chunks: {count[name][0]} cast(s) of the weight in the forward,"
          f" {count[name][1]} in forward and backward")


copies = []


def from_one_copy(hidden, wanted):
    """The way out: cast the weight by hand, once, and hand the copy to every chunk."""
    if not copies:
        copies.append(head.weight.to(torch.bfloat16))

    def loss(h, w, weight):
        logits = torch.nn.functional.linear(h.to(torch.bfloat16), weight)
        return torch.nn.functional.cross_entropy(logits.float(), w)
    return checkpoint(loss, hidden, wanted, copies[0], use_reentrant=False)


by_hand = casts(from_one_copy, True)
print(f"by hand     {CHUNKS} chunks: {by_hand} in forward and backward")
assert count["plain"] == (1, 2), "the control is off: the test no longer means anything"
assert count["checkpoint"] == (1, 2 + CHUNKS), "behaviour has changed"
assert by_hand == 2, "the way out no longer works"
PY
