"""Log-probs of shared rows against brute force; batching changes nothing."""

import copy
import math
from functools import partial

import pytest
import torch
from conftest import ARGS, random_pairs, tiny
from transformers import MistralConfig, MistralForCausalLM

import dpo

KINDS = ["llama", "gpt2", "qwen", "gemma", "neox"]


def brute_force(model, pairs):
    """(2, B): one unpadded forward a response in float64, log-softmax and a sum by hand."""
    out = torch.zeros(2, len(pairs), dtype=torch.float64)
    for i, (prompt, *responses) in enumerate(pairs):
        for side, response in enumerate(responses):
            logits = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
            out[side, i] = sum(logits[len(prompt) + j - 1, t] for j, t in enumerate(response))
    return out


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equal_brute_force_in_float64(kind):
    model, pairs = tiny(kind, dtype=torch.float64), random_pairs(9)
    truth = brute_force(model, pairs)
    assert truth.std() > 1  # the check has something to tell apart
    assert (dpo.pair_logps(model, pairs) - truth).abs().max() < 1e-5 * truth.abs().max()
    assert (dpo.plain_logps(model, pairs) - truth).abs().max() < 1e-5 * truth.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_shared_rows_equal_plain_rows(kind):
    """Loss and every gradient, in fp32, to 1e-5 of the largest."""
    pairs, grads = random_pairs(8, seed=1), []
    ref = torch.zeros(2, 8)
    for logps_of in (dpo.pair_logps, dpo.plain_logps):
        model = tiny(kind)
        loss = dpo.dpo_loss(logps_of(model, pairs), ref, 0.1).mean()
        loss.backward()
        grads.append([loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


def test_padding_changes_nothing():
    model, pairs = tiny(), random_pairs(6)
    alone = torch.cat([dpo.pair_logps(model, [pair]) for pair in pairs], 1)
    wide = dpo.pair_logps(model, [*pairs, ([3] * 30, [4] * 20, [5] * 20)])[:, :-1]
    assert torch.allclose(alone, wide, atol=1e-4)


def test_one_response_alone():
    """An empty second response (Bo2) leaves the first as it was."""
    model, pairs = tiny(), random_pairs(4)
    both = dpo.pair_logps(model, pairs)
    alone = dpo.pair_logps(model, [(x, chosen, []) for x, chosen, _ in pairs])
    assert torch.allclose(both[0], alone[0], atol=1e-4) and alone[1].eq(0).all()


def test_models_that_ignore_the_mask_get_plain_rows(capsys):
    pairs = random_pairs(4)
    assert dpo.choose_logps(tiny("llama"), pairs, ARGS) is dpo.pair_logps
    assert capsys.readouterr().out == ""
    gemma2 = tiny("gemma2")  # eager attention adds a boolean mask instead of applying it
    assert dpo.choose_logps(gemma2, pairs, ARGS) is dpo.plain_logps
    assert "using plain rows" in capsys.readouterr().out
    scaled = tiny("llama")  # a head that is more than a matrix, as adapters have it
    scaled.lm_head = torch.nn.Sequential(scaled.lm_head)
    assert dpo.choose_logps(scaled, pairs, ARGS) is dpo.plain_logps


@torch.no_grad()
def test_a_window_is_in_the_mask_or_seen_at_the_start(monkeypatch):
    """Rows beyond a sliding window are those of fp64; a window that the mask does not know shows
    on a row as long as one can be, though all pairs of the file fit into it."""
    fits = [([3, 4], [5, 1], [6, 1])] * 3 + [([3, 4], [5, 7, 9, 11], [6, 8, 10])]
    exceeds = [([3, 4], list(range(5, 19)), [9] * 3), (list(range(5, 25)), [5, 1], [7, 8, 1])]
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, sliding_window=12,
        num_attention_heads=4, num_key_value_heads=2)).eval()
    for weight in model.parameters():
        weight.data.mul_(8 if weight.dim() == 2 else 1)
    assert dpo.choose_logps(model, fits, ARGS) is dpo.pair_logps
    truth = brute_force(copy.deepcopy(model).double(), exceeds)
    assert torch.allclose(dpo.pair_logps(model, exceeds).double(), truth, atol=1e-3)
    monkeypatch.setattr(dpo, "mask_for", lambda model, visible, positions: visible)
    assert not torch.allclose(dpo.pair_logps(model, exceeds).double(), truth, atol=1e-1)
    assert dpo.choose_logps(model, fits, ARGS) is dpo.plain_logps


def test_rows_that_give_nan_are_not_chosen(monkeypatch):
    shared, bad = dpo.pair_logps, random_pairs(4)[1]
    monkeypatch.setattr(dpo, "pair_logps", lambda model, pairs: shared(model, pairs) * (
        math.nan if pairs == [bad] else 1))
    assert dpo.choose_logps(tiny(), random_pairs(4), ARGS) is dpo.plain_logps


@pytest.mark.parametrize("at_once", [1, 3 * 50, 1 << 20])  # one position, three, all of them
@pytest.mark.parametrize("kind", ["llama", "biased"])
def test_chunks_of_the_head_change_nothing(monkeypatch, at_once, kind):
    """Values and gradients in chunks against plain rows, whose logits exist at once."""
    monkeypatch.setattr(dpo, "LOGITS_AT_ONCE", at_once)
    pairs, g, found = random_pairs(6), torch.Generator().manual_seed(0), []
    scale = torch.randn(2, 6, generator=g)
    for logps_of in (dpo.pair_logps, dpo.plain_logps):
        model = tiny()
        if kind == "biased":
            model.lm_head.bias = torch.nn.Parameter(torch.arange(50) / 10)
        logps = logps_of(model, pairs)
        (logps * scale).sum().backward()
        found.append([logps.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


def test_accumulation_equals_the_whole_batch():
    """Micro-batches of any size give the gradient of the batch's mean: 2 x 4 = 1 x 8."""
    pairs, grads, sizes = random_pairs(8, shortest=8), [], []
    ref = dpo.batch_logps(tiny(seed=3), dpo.pair_logps, pairs, 10_000)
    loss_fn = partial(dpo.dpo_loss, beta=0.1)
    for tokens in (10_000, 4 * max(sum(map(len, p)) for p in pairs), 1):
        model = tiny()
        metrics = dpo.preference_step(model, dpo.pair_logps, loss_fn, pairs, ref, 0.1, tokens)
        sizes.append(len(dpo.micro_batches(pairs, tokens)))
        grads.append([p.grad for p in model.parameters()] + [torch.tensor(metrics["loss"])])
    assert sizes == [1, 2, 8]
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.allclose(a, b, atol=1e-5 * max(1, a.abs().max().item()))


def test_non_finite_gradient_leaves_the_weights(capsys):
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.nan)
    with pytest.raises(SystemExit) as stop:
        dpo.optimizer_step(model, torch.optim.AdamW(model.parameters()), 1e-3, "step 7, rows [1]")
    assert stop.value.code == 2 and "step 7, rows [1]" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_micro_batches_cover_the_batch():
    pairs = random_pairs(40)
    for tokens in (1, 60, 10_000):
        groups = dpo.micro_batches(pairs, tokens)
        assert sorted(i for g in groups for i in g) == list(range(40))
        for g in groups:
            assert len(g) == 1 or len(g) * max(sum(map(len, pairs[i])) for i in g) <= tokens


def test_pack_pairs_as_drawn():
    """The picture in its docstring, number by number."""
    packed = dpo.pack_pairs([([2, 3, 4], [5, 6, 1], [7, 1]), ([8], [1], [9, 1])], "cpu")
    ids, positions, segments, visible, sources, targets, owners = packed
    assert ids.tolist() == [[2, 3, 4, 5, 6, 1, 7, 1], [8, 1, 9, 1, 0, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4], [0, 1, 1, 2, 0, 0, 0, 0]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3], [1, 2, 3, 3, 0, 0, 0, 0]]
    assert visible[0, 0, 7].tolist() == [True] * 3 + [False] * 3 + [True] * 2  # 2nd reply, its EOS
    assert sources.tolist() == [2, 3, 4, 2, 6, 8, 8, 10]
    assert targets.tolist() == [5, 6, 1, 7, 1, 1, 9, 1]
    assert owners.tolist() == [0, 0, 0, 2, 2, 1, 3, 3]
