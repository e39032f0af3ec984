"""The judge and the preference model: numbers against enumeration and hand computation."""

import math

import pytest
import torch
from conftest import ARGS, load_model, random_pairs, tiny
from test_sampler import probabilities
from transformers import AutoModelForSequenceClassification, LlamaConfig

import gold_eval
import reward


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_kl_equals_enumeration(kind):
    """Three tokens, responses of up to three: sum over all responses of pi log(pi / ref)."""
    policy, reference, prompt = tiny(kind, vocab=3), tiny(kind, vocab=3, seed=1), [2, 0, 2]
    for model in (policy, reference):
        for p in model.parameters():
            p.data.mul_(0.6)
    pi, ref = (probabilities(m, prompt, 1, 3, 3) for m in (policy, reference))
    truth = sum(p * math.log(p / ref[ids]) for ids, p in pi.items())
    kls = gold_eval.response_kl(policy, reference, [(prompt, list(ids)) for ids in pi], 64)
    assert truth > 0.05
    assert sum(p * kl for p, kl in zip(pi.values(), kls.tolist(), strict=True)) == pytest.approx(
        truth, rel=1e-5)
    drawn = gold_eval.sample(policy, [prompt] * 4000, 1, 3, [1], torch.Generator().manual_seed(0))
    found = gold_eval.mean_se("kl", gold_eval.response_kl(
        policy, reference, [(prompt, r) for r in drawn], 8192))
    assert abs(found["gold/kl"] - truth) < 4 * found["gold/kl_se"]


def test_kl_in_chunks(monkeypatch):
    policy, reference = tiny(), tiny(seed=1)
    rows = [(x, a) for x, a, _ in random_pairs(6)]
    whole = gold_eval.response_kl(policy, reference, rows, 64)
    monkeypatch.setattr(gold_eval, "LOGITS_AT_ONCE", 3 * 50)
    assert torch.allclose(gold_eval.response_kl(policy, reference, rows, 8192), whole, rtol=1e-4)


def preference_model(kind, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, bos_token_id=None, eos_token_id=1, num_labels=1)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    model.config.preference_kind = kind
    return model


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_swapping_flips_prefer(kind):
    model, pairs = preference_model(kind), random_pairs(20)
    margins = reward.prefer(model, pairs, 100)
    assert torch.allclose(reward.prefer(model, reward.swap(pairs), 100), -margins, atol=1e-5)
    assert margins.abs().min() > 0 and margins.abs().max() <= 1
    assert torch.allclose(reward.prefer(model, pairs, 8192), margins, atol=1e-4)


def score(model, prompt, response):
    hidden = model.model(torch.tensor([prompt + response])).last_hidden_state
    return 32 * model.score(hidden)[0, len(prompt):].mean().item()


@torch.no_grad()
def test_pointwise_is_a_difference_of_two_scores():
    """Brute force: each response scored in a row of its own."""
    model, pairs = preference_model("pointwise"), random_pairs(8)
    truth = torch.tensor([score(model, x, a) - score(model, x, b) for x, a, b in pairs])
    assert torch.allclose(reward.preference_logits(model, pairs), truth, atol=1e-3)


@torch.no_grad()
def test_pairwise_sees_the_other_response():
    model = preference_model("pairwise")
    pairs = random_pairs(8)
    forward = reward.preference_logits(model, pairs)
    backward = reward.preference_logits(model, reward.swap(pairs))
    assert (forward + backward).abs().max() > 0.01  # a position bias, which `prefer` cancels
    margins = reward.prefer(model, pairs)
    assert torch.allclose(margins.float(), forward.sigmoid() - backward.sigmoid(), atol=1e-5)


@torch.no_grad()
def test_a_backbone_that_takes_no_mask_gets_plain_rows(capsys, monkeypatch):
    """Plain rows give the logits of shared ones; eager attention (Gemma 2) adds its mask, so that
    it gets numbers; where it gets none, plain rows are those of brute force."""
    from transformers import Gemma2Config

    for kind in ("pairwise", "pointwise"):
        good, pairs = preference_model(kind), random_pairs(8)
        before = good.score.weight.clone()
        reward.choose_rows(good, pairs, ARGS)
        assert not good.config.plain_rows and torch.equal(before, good.score.weight)
        shared = reward.preference_logits(good, pairs)
        good.config.plain_rows = True
        assert torch.allclose(reward.preference_logits(good, pairs), shared, atol=1e-4)

    assert capsys.readouterr().out == ""
    model = AutoModelForSequenceClassification.from_config(Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_labels=1),
        attn_implementation="eager").eval()  # adds a boolean mask instead of applying it
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    model.config.preference_kind = "pointwise"
    truth = torch.tensor([score(model, x, a) - score(model, x, b) for x, a, b in pairs])
    reward.choose_rows(model, pairs, ARGS)
    assert not model.config.plain_rows and capsys.readouterr().out == ""
    assert torch.allclose(reward.preference_logits(model, pairs), truth, atol=1e-3)
    monkeypatch.setattr(reward, "mask_for", lambda model, visible, positions: visible)
    wrong = reward.preference_logits(model, pairs)
    reward.choose_rows(model, pairs, ARGS)
    assert model.config.plain_rows and "using plain rows" in capsys.readouterr().out
    assert torch.allclose(reward.preference_logits(model, pairs), truth, atol=1e-3)
    assert not torch.allclose(wrong, truth, atol=1e-3)


def test_log_ratios_split_over_words_add_up(toy):
    """Every token has a kind, and the kinds' sums are the response's log-prob."""
    import logprobs

    model, tokenizer = load_model(f"{toy}/sft")
    rows = [(tokenizer(x).input_ids, tokenizer(y).input_ids + [tokenizer.eos_token_id])
            for x, y in (("write two sad lines about a fox:", "the merry fox wept in the forest."),
                         ("tell me four happy lines about a bear:", "the owl sang. the bear."))]
    logps = logprobs.token_logps(model, rows)
    sums = logprobs.split(rows, logps, tokenizer)
    truth = gold_eval.plain_logps(model, [(x, y, y) for x, y in rows])[0]
    assert torch.allclose(torch.tensor([sum(one.values()) for one in sums]), truth, atol=1e-4)
    assert sums[0].keys() == {"the, and", "other mood words", "animals", "mood words that fit",
                              "places", "full stops", "EOS"}
    words = tokenizer.convert_ids_to_tokens(rows[0][1])
    assert sums[0]["places"] == pytest.approx(sum(
        x.item() for word, x in zip(words, logps[0], strict=True) if word in ("in", "forest")))
    assert [logprobs.kind_of(word, "sad") for word in ("wept", "merry", "crow", "and")] == [
        "mood words that fit", "other mood words", "animals", "the, and"]


def test_evaluate_at_the_reference(toy):
    """policy = reference: KL 0, log-ratio 0, accuracy 1/2 (ties count half); twice the same
    numbers; against its own responses with the same noise every comparison is a tie."""
    args = gold_eval.parse_args([
        "judge", "--model", f"{toy}/sft", "--reference", f"{toy}/sft", "--gold", f"{toy}/gold",
        "--baseline", f"{toy}/baseline.jsonl", "--data", f"{toy}/data/golden.jsonl", "--out", "x",
        "--max-prompt-tokens", "32", "--max-response-tokens", "40"])
    policy, tokenizer = load_model(f"{toy}/sft")
    judge = gold_eval.load_judge(args, args.data, policy, tokenizer)
    metrics, samples = gold_eval.evaluate(policy, judge)
    assert metrics["gold/kl"] == 0 and metrics["gold/chosen_logratio"] == 0
    assert metrics["gold/accuracy_golden"] == 0.5 and metrics["gold/accuracy_self"] == 0.5
    assert (metrics, samples) == gold_eval.evaluate(policy, judge)
    won = "".join("012"[(s["gold_margin"] > 0) - (s["gold_margin"] < 0) + 1] for s in samples)
    assert metrics["outcomes"] == won and len(set(won)) > 1
    assert metrics["gold/win_rate"] == sum(map(int, won)) / 2 / 24
    assert len(judge.prompts) == 24 and len(samples) == 24
    judge.baseline = gold_eval.sample(policy, judge.prompts, 2, 40, judge.ends,
                                      torch.Generator().manual_seed(0))[::2]
    metrics, _ = gold_eval.evaluate(policy, judge)
    assert metrics["gold/win_rate"] == 0.5 and metrics["outcomes"] == "1" * 24
