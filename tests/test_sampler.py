"""The sampler: greedy equals transformers' generate; its distribution is the model's own."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny

import gold_eval
import reward
from gold_eval import sample

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [18] * 9, [19]]


def noise(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen", "gemma", "gemma2", "neox"])
def test_greedy_equals_generate(kind, static):
    model = tiny(kind)
    ours = sample(model, PROMPTS, 1, 12, [1], noise(), greedy=True, static=static)
    for prompt, response in zip(PROMPTS, ours, strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                do_sample=False, eos_token_id=1, pad_token_id=0)
        assert response == theirs[0, len(prompt):].tolist()


def sequences(eos, vocab, longest):
    """Every response of up to `longest` tokens: ended by EOS, or cut."""
    for n in range(1, longest + 1):
        for ids in itertools.product(range(vocab), repeat=n):
            if eos not in ids[:-1] and (ids[-1] == eos or n == longest):
                yield ids


@torch.no_grad()
def probabilities(model, prompt, eos, vocab, longest):
    table = {}
    for ids in sequences(eos, vocab, longest):
        logp = model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        table[ids] = sum(logp[len(prompt) + j - 1, t] for j, t in enumerate(ids)).exp().item()
    assert sum(table.values()) == pytest.approx(1, abs=1e-6)
    return table


def chi_square_p(counts, expected):
    """Chance of a worse fit; cells expecting under 5 are pooled."""
    rare = [k for k in expected if expected[k] < 5]
    cells = [(counts.get(k, 0), e) for k, e in expected.items() if e >= 5]
    if rare:
        cells.append((sum(counts.get(k, 0) for k in rare), sum(expected[k] for k in rare)))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    freedom = torch.tensor((len(cells) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)).item()


@pytest.mark.parametrize("tokens", [4, 1 << 15])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_whole_sequences_follow_the_model(kind, tokens):
    """Frequencies against exact probabilities, EOS included, with prompts of unequal lengths in a
    group, two samples a prompt, and rows leaving as they end."""
    model = tiny(kind, vocab=4)
    for p in model.parameters():
        p.data.mul_(0.6)  # a mixed distribution
    prompts = [[2, 3, 2, 0, 3], [3], [0, 2, 3]]
    repeats = 2000 if tokens > 4 else 400
    drawn = sample(model, prompts * repeats, 2, 3, [1], noise(1), tokens=tokens)
    for i, prompt in enumerate(prompts):
        expected = {k: v * 2 * repeats
                    for k, v in probabilities(model, prompt, 1, 4, 3).items()}
        counts = {}
        for j in range(i, len(prompts) * repeats, len(prompts)):
            for response in drawn[2 * j:2 * j + 2]:
                counts[tuple(response)] = counts.get(tuple(response), 0) + 1
        assert set(counts) <= set(expected)
        assert chi_square_p(counts, expected) > 1e-3


def test_chi_square_would_notice():
    """The same test on a slightly wrong distribution fails: it can fail."""
    counts = {0: 4000, 1: 3800, 2: 2200}
    assert chi_square_p(counts, {0: 4000, 1: 4000, 2: 2000}) < 1e-3


def test_grouping_changes_no_sample():
    model = tiny()
    prompts = PROMPTS * 8
    apart = sample(model, prompts, 2, 12, [1], noise(), tokens=3)
    together = sample(model, prompts, 2, 12, [1], noise(), tokens=1 << 15)
    assert apart == together
    assert len({tuple(r) for r in apart}) > 20


@pytest.mark.parametrize("prompts", [PROMPTS * 8, [[3, 4, 5]] * 8])
def test_static_shapes_change_no_sample(prompts):
    """The path that CUDA graphs replay, on CPU: all slots at each step, rows leave by halves; also
    without padding, where a mask might be thought unnecessary."""
    model = tiny()
    static = sample(model, prompts, 2, 12, [1], noise(), static=True)
    assert static == sample(model, prompts, 2, 12, [1], noise(), static=False)
    assert len({len(r) for r in static}) > 5


def test_static_step_keeps_shapes_and_addresses(monkeypatch):
    """What a CUDA graph needs: between two decoders, the same tensors and the whole cache."""
    steps = []

    def watched(model, ids, real, places, cache):
        def step():
            logits = gold_eval.next_logits(model, ids, real, places, cache)
            seen = [ids, real, places, *cache.layers[0].slots]
            steps[-1].append([(x.data_ptr(), x.shape) for x in seen]
                             + [cache.layers[0].keys.shape])
            return logits
        steps.append([])
        return step
    monkeypatch.setattr(gold_eval, "decoder", watched)
    sample(tiny(vocab=8), [[3, 4, 5], [6]] * 20, 2, 24, [1], noise(), static=True)
    assert len(steps) > 2 and max(map(len, steps)) > 1
    for of_one_graph in steps:
        assert all(step == of_one_graph[0] for step in of_one_graph)


@pytest.mark.parametrize("heads", [4, 2])  # of keys and values, for 4 of queries
def test_attention_without_padding_is_attention(monkeypatch, heads):
    """40 left-padded rows in three parts, each cut where its first real slot stands."""
    g, lengths, cut = noise(), torch.arange(1, 41) * 3, []
    query = torch.randn(40, 4, 1, 8, generator=g)
    key, value = torch.randn(2, 40, heads, 130, 8, generator=g)
    mask = (torch.arange(130) >= 130 - lengths[:, None])[:, None, None]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4 // heads, True
    whole = reward.sdpa_attention_forward(module, query, key, value, mask)[0]

    def watched(module, query, key, *rest, **kwargs):
        cut.append((len(query), key.shape[2]))
        return attend(module, query, key, *rest, **kwargs)
    attend = reward.sdpa_attention_forward
    monkeypatch.setattr(reward, "sdpa_attention_forward", watched)
    parts = gold_eval.skip_padding(module, query, key, value, mask)[0]
    assert cut == [(16, 48), (16, 96), (8, 120)]
    assert torch.allclose(parts, whole, atol=1e-6)


def test_length_and_eos():
    responses = sample(tiny(), PROMPTS * 20, 2, 12, [1], noise())
    assert {len(r) for r in responses} >= {12}
    for r in responses:
        assert 1 not in r[:-1] and (r[-1] == 1 or len(r) == 12)


def test_first_tokens_chi_square():
    model, prompt = tiny(vocab=8), [3, 4, 5]
    for p in model.parameters():
        p.data.mul_(0.6)
    drawn = sample(model, [prompt] * 4000, 1, 1, [1], noise(2))
    with torch.no_grad():
        truth = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = {t: sum(r == [t] for r in drawn) for t in range(8)}
    assert chi_square_p(counts, {t: 4000 * truth[t].item() for t in range(8)}) > 1e-3


def test_pick_tokens_inverts_the_cdf():
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(5, 3)
    at = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999], dtype=torch.float64)
    assert gold_eval.pick_tokens(logits, at).tolist() == [0, 0, 1, 1, 2]
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert gold_eval.pick_tokens(never, ends).tolist() == [1, 1]


def test_the_cache_is_bounded_by_the_flag(monkeypatch):
    """At most 32 slots a token of --tokens-per-microbatch (8 with static shapes), and no more than
    these tokens computed at once, whatever there is to sample."""
    slots, widths, prefill, logits = [], [], gold_eval.prefill, gold_eval.next_logits

    def watched(model, prompts, per_prompt, room, tokens, static):
        cache, *rest = prefill(model, prompts, per_prompt, room, tokens, static)
        slots.append(cache.layers[0].slots[0].shape[0] * cache.layers[0].slots[0].shape[2])
        return cache, *rest

    def counted(model, ids, *rest):
        widths.append(ids.numel() * (ids.shape[1] > 1))  # of prefilling
        return logits(model, ids, *rest)
    monkeypatch.setattr(gold_eval, "prefill", watched)
    monkeypatch.setattr(gold_eval, "next_logits", counted)
    for static, least, most in ((False, 16 * 64, 32 * 64), (True, 4 * 64, 8 * 64)):
        slots.clear()
        sample(tiny(), PROMPTS * 40, 2, 12, [1], noise(), tokens=64, static=static)
        assert least < max(slots) <= most and max(widths) <= 64


# ---- models that do not take our cache -----------------------------------------------------------


def stateful():
    """A Mamba, whose state is no cache of keys and values."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(
        vocab_size=50, hidden_size=32, state_size=4, num_hidden_layers=2, pad_token_id=0,
        bos_token_id=None, eos_token_id=1)).eval()
    for weight in model.parameters():
        weight.data.mul_(4 if weight.dim() == 2 else 1)
    return model


@torch.no_grad()
def drawn_one_by_one(model, prompts, per_prompt, longest, end):
    """What the noise of `noise()` draws from the model's logits of single, unpadded rows."""
    found, u = [], torch.rand(len(prompts) * per_prompt, longest, generator=noise(),
                              dtype=torch.float64)
    for row, prompt in enumerate(x for x in prompts for _ in range(per_prompt)):
        ids = []
        while len(ids) < longest and end not in ids[-1:]:
            logits = model(torch.tensor([prompt + ids])).logits[:, -1, :45]
            ids += gold_eval.pick_tokens(logits, u[row, len(ids):len(ids) + 1]).tolist()
        found.append(ids)
    return found


@pytest.mark.parametrize("kind", ["llama", "state"])
def test_every_model_draws_what_its_noise_says(kind, capsys):
    """Our cache or the model's own: the tokens of single rows, to the last; the second is said."""
    model = tiny() if kind == "llama" else stateful()
    found = sample(model, PROMPTS, 2, 12, [1], noise(), known=45)
    assert found == drawn_one_by_one(model, PROMPTS, 2, 12, 1)
    said = "sampling by generate, slower" in capsys.readouterr().out
    assert said is (model.decode is gold_eval.generate) is (kind == "state")


def test_generation_settings_of_a_model_do_not_count(monkeypatch):
    """A repetition penalty in generation_config, as instruct models have it, changes no draw."""
    model = stateful()
    model.generation_config.repetition_penalty = 5.0
    assert sample(model, PROMPTS, 1, 12, [1], noise(), known=45) == drawn_one_by_one(
        model, PROMPTS, 1, 12, 1)
    assert model.generation_config.repetition_penalty == 5.0


def test_a_cache_that_is_wrong_is_not_used(monkeypatch, capsys):
    """Logits off by a little in decoding: generate; both ways off: without any cache."""
    model, right = tiny(), gold_eval.next_logits
    monkeypatch.setattr(gold_eval, "next_logits", lambda model, ids, *rest: right(
        model, ids, *rest) * (1 if ids.shape[1] > 1 else 1.01))
    found = sample(model, PROMPTS, 2, 12, [1], noise(), known=45)
    assert model.decode is gold_eval.generate
    monkeypatch.setattr(gold_eval, "generate", lambda *args: 1 / 0)
    model = tiny()
    assert sample(model, PROMPTS, 2, 12, [1], noise(), known=45) == found == drawn_one_by_one(
        model, PROMPTS, 2, 12, 1)
    assert model.decode is gold_eval.recompute
    assert "sampling by recompute, slower" in capsys.readouterr().out


# ---- attention as plain products, in bf16 on a CPU -----------------------------------------------


@pytest.mark.parametrize("heads, shared, length, slots", [
    (4, 4, 7, 7), (4, 2, 7, 7), (6, 1, 7, 7), (4, 2, 1, 9), (8, 4, 5, 12)])
def test_attention_as_products(heads, shared, length, slots):
    """Against fp64 for heads that share keys or not, and with gradients; a query that sees nothing
    (of padding) gives no NaN; a long row, a mask of numbers and fp32 go the library's way."""
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, h, n, 16, generator=g).bfloat16().requires_grad_()
                         for h, n in ((heads, length), (shared, slots), (shared, slots)))
    mask = torch.rand(3, 1, length, slots, generator=g) < 0.7
    mask[..., 0] = True
    module = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True, training=False)
    found, _ = gold_eval.attend(module, query, key, value, mask)
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    k_all, v_all = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    scores = (q @ k_all.mT / 4).masked_fill(~mask, -torch.inf)
    right = (scores.softmax(-1) @ v_all).transpose(1, 2)
    assert found.shape == right.shape and (found - right).abs().max() < 0.03
    for x, y in zip(torch.autograd.grad(found.float().square().sum(), (query, key, value)),
                    torch.autograd.grad(right.square().sum(), (q, k, v)), strict=True):
        assert (x - y).norm() < 0.02 * y.norm()
    mask[1, :, 0] = False
    assert gold_eval.attend(module, query, key, value, mask)[0].isfinite().all()
    usual = reward.sdpa_attention_forward
    for more in ((query.float(), key.float(), value.float(), mask),
                 (query, key, value, torch.zeros_like(mask, dtype=torch.bfloat16))):
        assert torch.equal(gold_eval.attend(module, *more)[0], usual(module, *more)[0])


def test_long_rows_keep_no_scores(monkeypatch):
    called = []
    monkeypatch.setattr(reward, "sdpa_attention_forward", lambda *args, **_: called.append(1))
    x = torch.ones(1, 1, 1281, 2, dtype=torch.bfloat16)
    gold_eval.attend(None, x, x, x, torch.ones(1, 1, 1281, 1281, dtype=torch.bool))
    assert called
