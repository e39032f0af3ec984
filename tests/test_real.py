"""What only real models show: large vocabularies, bf16, heads and templates that are not plain.

    REAL_MODEL=path/to/a/model python -m pytest tests/test_real.py    # with a pretrained one too
"""

import copy
import json
import math
import os
import resource
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARGS, SHARED, Fork, load_model, random_pairs, tiny
from test_data import limits, load, pair, tokenizer
from test_logps import brute_force

import dpo
import gold_eval
import reward

REAL_MODEL = os.environ.get("REAL_MODEL")


def wide(vocab=49_152, seed=0):
    """A small model with a real vocabulary, and logits of a real spread."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=None, eos_token_id=1))
    model.lm_head.weight.data.mul_(20)
    return model.eval()


def long_pairs(count, vocab=49_152, length=128, prompt=40):
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(2, vocab, (n,), generator=g).tolist()

    return [(ids(prompt), ids(length), ids(length)) for _ in range(count)]


def bf16_everywhere(monkeypatch):
    """What CUDA does, on CPU: every autocast of the scripts is one to bf16."""
    for module in (dpo, gold_eval, reward):
        monkeypatch.setattr(module, "autocast",
                            lambda: torch.autocast("cpu", torch.bfloat16))


# ---- log-probs -----------------------------------------------------------------------------------


@torch.no_grad()
def test_logps_at_a_real_vocabulary_and_length(capsys):
    """128 response tokens, 49,152 ids: 2e-5 nats a token off fp64 both ways, shared rows kept."""
    model, pairs = wide(), long_pairs(3)
    truth = brute_force(copy.deepcopy(model).double(), pairs)
    for logps_of in (dpo.pair_logps, dpo.plain_logps):
        assert (logps_of(model, pairs) - truth).abs().max() < 128 * 2e-5, logps_of.__name__
    assert dpo.choose_logps(model, pairs, ARGS) is dpo.pair_logps
    assert capsys.readouterr().out == ""


def test_a_mask_that_one_layer_ignores_is_seen():
    """The tolerance is not so wide that a wrong row passes: a window of half the row's length."""
    model, pairs = tiny("llama"), random_pairs(4)
    attend = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, attention_mask=None, **kwargs: attend(
        *args, attention_mask=None, **kwargs)
    assert dpo.choose_logps(model, pairs, ARGS) is dpo.plain_logps


# ---- evaluation in bf16 surroundings -------------------------------------------------------------


def near(model, size, seed=1):
    """The model with every weight moved by a random share `size` of it."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.mul_(1 + size * torch.randn_like(p))
    return other


@pytest.mark.parametrize("size", [0.0, 0.003, 0.03])
def test_kl_and_h_are_good_to_a_thousandth_of_a_nat(monkeypatch, size):
    """Against fp64, at 39 tokens and 49,152 ids, with bf16 autocast wherever the scripts ask."""
    bf16_everywhere(monkeypatch)
    reference, pairs = wide(), long_pairs(4, length=39)
    policy, rows = near(reference, size), [(x, y) for x, y, _ in pairs]
    exact = [copy.deepcopy(model).double() for model in (policy, reference)]
    with torch.no_grad():
        for (x, y), kl in zip(rows, gold_eval.response_kl(policy, reference, rows, 1024),
                              strict=True):
            logp, ref_logp = (m(torch.tensor([x + y])).logits[0, len(x) - 1:-1].log_softmax(-1)
                              for m in exact)
            truth = (logp.exp() * (logp - ref_logp)).sum().item()
            assert kl.item() == pytest.approx(truth, abs=1e-3)
        assert (truth > 0.01) == (size == 0.03)
        logps, ref_logps = (gold_eval.batch_logps(model, gold_eval.pair_logps, pairs, 512)
                            for model in (policy, reference))
        truth = brute_force(exact[0], pairs) - brute_force(exact[1], pairs)
        assert (logps - ref_logps - truth).abs().max() < 1e-3


def test_frozen_models_are_halved_to_the_same_bits(monkeypatch):
    """Linear weights in bf16, the rest as it was, and every margin the same bit for bit."""
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0,
        num_attention_heads=4, num_labels=1)).eval()
    model.config.preference_kind = "pairwise"
    pairs = random_pairs(20)
    assert reward.halve(copy.deepcopy(model)).score.weight.dtype == torch.float32  # on CPU
    bf16_everywhere(monkeypatch)
    halved = reward.halve(copy.deepcopy(model))
    kinds = {name.split(".")[-2]: p.dtype for name, p in halved.named_parameters()}
    assert kinds["q_proj"] == kinds["down_proj"] == kinds["score"] == torch.bfloat16
    assert kinds["embed_tokens"] == kinds["norm"] == torch.float32
    before = reward.prefer(model, pairs)
    assert before.abs().min() > 0 and torch.equal(reward.prefer(halved, pairs), before)


def test_slots_hold_what_attention_reads(monkeypatch, fused):
    """Under autocast keys are kept in its dtype, not in the fp32 that RoPE gives; same samples."""
    model, prompts, drawn, prefill = tiny(), [[3, 4, 5], [6]] * 8, [], gold_eval.prefill
    dtypes = set()
    gold_eval.sample(model, prompts, 1, 1, [1], torch.Generator())  # the cache is tried, in fp32

    def watched(*args, dtype):
        cache, *rest = prefill(*args)
        for layer in cache.layers:
            dtypes.update(x.dtype for x in layer.slots)
            layer.slots = [x.to(dtype) for x in layer.slots]
        return cache, *rest

    for dtype in (torch.bfloat16, torch.float32):  # as they are; as if they were to hold it all
        monkeypatch.setattr(gold_eval, "prefill", partial(watched, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16):
            drawn.append(gold_eval.sample(model, prompts, 2, 12, [1],
                                          torch.Generator().manual_seed(0)))
    assert drawn[0] == drawn[1]
    if gold_eval.cache_argument(type(model)) == "cache":  # before 5.24 its cache made fp32 of bf16
        assert dtypes == {torch.bfloat16}


# ---- heads that are more than a matrix, or larger than the tokenizer -----------------------------


def scaled(kind, seed=0):
    """A model that changes its logits after the head: Cohere's scale, Gemma 2's cap, Granite's."""
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                 bos_token_id=None, eos_token_id=1, pad_token_id=0)
    config = {
        "cohere": lambda: transformers.CohereConfig(logit_scale=0.0625, **small),
        "granite": lambda: transformers.GraniteConfig(logits_scaling=8.0, **small),
        "gemma2": lambda: transformers.Gemma2Config(
            head_dim=8, final_logit_softcapping=0.5, **small)}[kind]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.mul_(8)
    return model


@pytest.mark.parametrize("kind", ["cohere", "granite", "gemma2"])
@torch.no_grad()
def test_kl_and_logps_of_heads_that_are_more_than_a_matrix(kind):
    policy, reference, pairs = scaled(kind), scaled(kind, 1), random_pairs(6)
    exact = [copy.deepcopy(m).double() for m in (policy, reference)]
    kls = gold_eval.response_kl(policy, reference, [(x, y) for x, y, _ in pairs], 64)
    for (x, y, _), kl in zip(pairs, kls, strict=True):
        logp, ref_logp = (m(torch.tensor([x + y])).logits[0, len(x) - 1:-1].log_softmax(-1)
                          for m in exact)
        assert kl.item() == pytest.approx((logp.exp() * (logp - ref_logp)).sum().item(), rel=1e-3)
    logps = dpo.choose_logps(policy, pairs, ARGS)(policy, pairs)
    assert (logps - brute_force(exact[0], pairs)).abs().max() < 1e-3


def test_ids_that_no_tokenizer_has_are_never_drawn():
    model, prompts = tiny(vocab=50), [[3, 4, 5]] * 200
    draw = partial(gold_eval.sample, model, prompts, 1, 12, [1])
    assert max(map(max, draw(torch.Generator().manual_seed(0)))) >= 20
    for greedy in (False, True):
        drawn = draw(torch.Generator().manual_seed(0), known=20, greedy=greedy)
        assert max(map(max, drawn)) < 20


# ---- what ends a response ------------------------------------------------------------------------

TURNS = ("{% for m in messages %}<turn> {{ m['content'] }} <end> {% endfor %}"
         "{% if add_generation_prompt %}<turn>{% endif %}")


def chat_tokenizer(template=TURNS):
    """EOS is <eos>, a turn ends with <end>, as in Gemma and Phi-3."""
    tok = tokenizer(template=template)
    tok.add_special_tokens({"additional_special_tokens": ["<turn>", "<end>"]})
    return tok


def test_responses_end_as_the_template_ends_a_turn(tmp_path):
    tok = chat_tokenizer()
    turn, end = tok.convert_tokens_to_ids(["<turn>", "<end>"])
    messages = pair(prompt=[{"role": "user", "content": "b"}], chosen="c <end>")
    assert load(tmp_path, [messages, pair()], tok) == [
        ([turn, 5, end, turn], [6, end], [8, end]), ([4, 5], [6, 7, 1], [8, 1])]
    model = tiny()
    assert gold_eval.end_ids(model, tok) == sorted([1, end])
    model.generation_config.eos_token_id = [1, 7]
    assert gold_eval.end_ids(model, tok) == sorted([1, 7, end])
    assert gold_eval.end_ids(model, tokenizer()) == [1, 7]  # no template: EOS
    refuses = chat_tokenizer("{{ raise_exception('no such turns') }}")
    assert gold_eval.turn_end(refuses)[2] == 1


def test_sampling_stops_at_any_of_them():
    model, prompts = tiny(vocab=12), [[3, 4, 5], [6]] * 50
    drawn = gold_eval.sample(model, prompts, 1, 12, [1, 7, 9], torch.Generator().manual_seed(0))
    assert {r[-1] for r in drawn if len(r) < 12} == {1, 7, 9}
    assert not any({1, 7, 9} & set(r[:-1]) for r in drawn)
    for prompt, response in zip(prompts[:2], gold_eval.sample(
            model, prompts[:2], 1, 12, [1, 7], torch.Generator(), greedy=True), strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                                do_sample=False, eos_token_id=[1, 7], pad_token_id=0)
        assert response == theirs[0, len(prompt):].tolist()


def test_a_template_with_a_date_gives_the_same_ids_every_day(tmp_path):
    template = "\n{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    tok = tokenizer(template=template)
    assert dpo.chat_text(tok, [{"role": "user", "content": "b"}]) == "\n26 Jul 2024 b"


# ---- resuming, memory ----------------------------------------------------------------------------


def test_resume_where_a_weight_never_had_a_gradient(tmp_path):
    """A vision tower, say: it is saved and loaded as the others, and stays as it was."""
    args, saved = SimpleNamespace(out=str(tmp_path), steps=9, save_every=1, precision="fp32"), []
    for model in (tiny(), tiny(seed=1)):
        model.tower = torch.nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        steps = dpo.training_steps(args, model, optimizer)
        step, metrics = next(steps)
        if not saved:
            before = model.tower.weight.clone()
            dpo.pair_logps(model, random_pairs(4)).sum().backward()
            optimizer.step()
            assert torch.equal(model.tower.weight, before)
            metrics["tokens"] = 1
            assert next(steps)[0] == 2  # saved after step 1
        else:
            assert step == 2
        moments = [x for p in model.parameters() for x in optimizer.state[p].values()]
        saved.append([*model.parameters(), *moments])
    assert len(saved[0]) == len(saved[1]) == 4 * len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*saved, strict=True))


def print_bytes_a_token(folder):
    import dpo

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dpo.load_pairs(f"{folder}/few.jsonl", tokenizer, limits(1000, 1000))
    before = peak()
    pairs = dpo.load_pairs(f"{folder}/many.jsonl", tokenizer, limits(1000, 1000))
    print((peak() - before) / sum(len(ids) for pair in pairs for ids in pair))


def test_pairs_take_few_bytes_a_token(tmp_path):
    """8 for its place in a list, and what 4,096 rows of text take while they are tokenised."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({str(i): i for i in range(5000)}, unk_token="1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="1", unk_token="1").save_pretrained(tmp_path)
    for name, count in (("few", 4096), ("many", 20_000)):
        with open(tmp_path / f"{name}.jsonl", "w") as f:
            for i in range(count):
                text = " ".join(str(300 + (i + j) % 4700) for j in range(50))
                f.write(json.dumps(pair(text, text + " 7", text + " 8")) + "\n")
    found = Fork(tmp_path, print_bytes_a_token, str(tmp_path)).succeed()
    assert float(found.splitlines()[-1]) < 28  # 36 and more where each id is an object of its own


# ---- the preference model's check ----------------------------------------------------------------


def classifier(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(8)
    torch.nn.init.zeros_(model.score.weight)
    model.config.preference_kind = "pairwise"
    return model


@pytest.mark.parametrize("kind", ["layernorm", "window"])
def test_choose_rows_sees(kind, capsys, monkeypatch):
    """A LayerNorm backbone that ignores the mask, at the start; a window that the mask does not
    know, though all pairs fit into it."""
    pairs, small = random_pairs(8), dict(vocab_size=50, pad_token_id=0, num_labels=1)
    llama_like = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, **small)
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **small)
    good = classifier(gpt2 if kind == "layernorm" else transformers.MistralConfig(
        sliding_window=64, **llama_like))
    reward.choose_rows(good, pairs, ARGS)
    assert not good.config.plain_rows and capsys.readouterr().out == ""
    assert good.score.weight.abs().sum() == 0 and good.config.preference_kind == "pairwise"
    if kind == "layernorm":
        bad = classifier(gpt2)
        for block in bad.transformer.h:
            attend = block.attn.forward
            block.attn.forward = lambda *args, attend=attend, attention_mask=None, **kwargs: attend(
                *args, attention_mask=None, **kwargs)
    else:
        bad = classifier(transformers.MistralConfig(sliding_window=24, **llama_like))
        monkeypatch.setattr(reward, "mask_for", lambda model, visible, positions: visible)
    reward.choose_rows(bad, pairs, ARGS)
    assert bad.config.plain_rows and "using plain rows" in capsys.readouterr().out


# ---- a pretrained model --------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_MODEL, reason="no REAL_MODEL")
def test_on_a_pretrained_model(tmp_path, capsys):
    """Real pairs at 128 response tokens: one row a pair, 1e-4 of fp64, KL of itself 0, first
    reward 0; greedy as generate."""
    helpful = SHARED / "hh-rlhf/helpful-base/test.jsonl.gz"
    if not helpful.exists():
        pytest.skip(f"no {helpful}")
    import tasks

    tasks.main(tasks.parse_args(["helpful", "--file", str(helpful), "--pairs", "300", "--text",
                                 "--out", str(tmp_path)]))
    policy, tok = load_model(REAL_MODEL)
    pairs = dpo.load_pairs(f"{tmp_path}/initial.jsonl", tok, limits(128, 128))
    pairs = [p for p in pairs if len(p[1]) == len(p[2]) == 128][:2]
    capsys.readouterr()
    assert dpo.choose_logps(policy, pairs, ARGS) is dpo.pair_logps and capsys.readouterr().out == ""
    with torch.no_grad():
        shared, plain = dpo.pair_logps(policy, pairs), dpo.plain_logps(policy, pairs)
        truth = brute_force(copy.deepcopy(policy).double(), pairs)
    assert ((shared - truth) / truth).abs().max() < 1e-4
    assert ((plain - truth) / truth).abs().max() < 1e-4
    assert dpo.dpo_loss(shared, shared, 0.1).mean().item() == pytest.approx(math.log(2), abs=1e-6)
    kl = gold_eval.response_kl(policy, policy, [(x, y) for x, y, _ in pairs], 1024)
    assert kl.abs().max() < 1e-6
    ends, prompt = gold_eval.end_ids(policy, tok), pairs[0][0][-20:]
    ours = gold_eval.sample(policy, [prompt], 1, 12, ends, torch.Generator(), len(tok), greedy=True)
    ids = torch.tensor([prompt])
    theirs = policy.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                             do_sample=False, eos_token_id=ends, pad_token_id=0)
    assert ours[0] == theirs[0, len(prompt):].tolist()
