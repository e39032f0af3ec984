"""What training does, by value and direction: each step against plain arithmetic of our own.

Tests that compare a run with its like pass where both are wrong: no warm-up, SFT on the chosen
response alone, the last model in place of the best. Here the numbers due come from one unpadded
float64 forward a response and from AdamW written out; no log-prob, loss or optimizer of the program
goes into them.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import flags, random_pairs, rows_of, tiny
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

import bo2
import dpo
import ipo
import online_rlhf
import reward
import sft
import slic
import tasks

SCRIPTS = {module.__name__: module for module in (dpo, ipo, slic, bo2, sft, online_rlhf, reward)}
BETA, LR, STEPS, BATCH, SEED = 0.5, 1e-2, 4, 3, 3
LEARNS = dict(lr=LR, steps=STEPS, batch_size=BATCH, warmup=2, seed=SEED, tokens_per_microbatch=40)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """8 pairs and 2 more as texts, whose words are the numbers of their ids; 8 times the first; a
    judge; a function that saves a policy, and how much larger its last hidden states are."""
    root, pairs = tmp_path_factory.mktemp("world"), random_pairs(10)
    words = ["<pad>", "<eos>", *map(str, range(2, 50))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")

    def save(kind, name, scale, **options):
        torch.manual_seed(0)
        model = kind(transformers.LlamaConfig(
            **tiny().config.to_dict() | {"num_hidden_layers": 1} | options))
        model.model.embed_tokens.weight.data.mul_(8)
        model.model.norm.weight.data.mul_(scale)
        model.config.preference_kind = "pointwise"  # the judge's
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        return str(root / name)

    for name, some in (("pairs", pairs[:8]), ("more", pairs[8:]), ("one", pairs[:1] * 8)):
        tasks.write_jsonl(f"{root}/{name}.jsonl", [{  # EOS is for the script to add
            "prompt": " ".join(map(str, x)), "chosen": " ".join(map(str, a[:-1])),
            "rejected": " ".join(map(str, b[:-1]))} for x, a, b in some])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model waits for a second one
    yield SimpleNamespace(
        **{name: f"{root}/{name}.jsonl" for name in ("pairs", "more", "one")}, rows=pairs,
        judge=save(transformers.LlamaForSequenceClassification, "judge", 1, num_labels=1),
        policy=lambda scale: save(transformers.LlamaForCausalLM, f"policy-{scale}", scale,
                                  eos_token_id=[*range(1, 12)]))  # its responses are short
    torch.set_num_threads(threads)


def run(script, out, *words, **kwargs):
    """Run a script's main in this process; its metrics rows."""
    module = SCRIPTS[script]
    module.main(module.parse_args([*["train"] * (script == "reward"), *words, *flags(
        out=out, max_prompt_tokens=32, max_response_tokens=12, **kwargs)]))
    return rows_of(f"{out}/metrics.jsonl")


# ---- one step after another, by hand -------------------------------------------------------------


def logp(model, prompt, response):
    """log pi(response | prompt): a token after another, EOS too."""
    rows = model(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
    return sum(rows[len(prompt) + i - 1, token] for i, token in enumerate(response))


def logps(model, pairs):
    """(2, B), chosen first."""
    return torch.stack([torch.stack([logp(model, pair[0], pair[side]) for pair in pairs])
                        for side in (1, 2)])


def preference(form, start, model, pairs):
    """(loss, metrics) of a batch, as the papers have it."""
    log_pi = logps(model, pairs)
    rewards = BETA * (log_pi - logps(start, pairs).detach())
    margins = rewards[0] - rewards[1]  # beta * h
    losses = {"dpo": -margins.sigmoid().log(), "ipo": (margins - 0.5) ** 2,
              "slic": (1 - margins).clamp(min=0), "bo2": -log_pi[0]}[form]
    metrics = {"logps/chosen": log_pi[0], "logps/rejected": log_pi[1], "rewards/chosen": rewards[0],
               "rewards/rejected": rewards[1], "rewards/margins": margins,
               "rewards/accuracies": (margins > 0).double()}
    return losses.mean(), {name: x.mean() for name, x in metrics.items()
                           if form != "bo2" or name == "logps/chosen"}


def maximum_likelihood(model, batch):
    """Over all response tokens of the batch, chosen or not, EOS too, and no prompt's."""
    rows = [(x, y) for x, *ys in batch for y in ys]
    return -sum(logp(model, x, y) for x, y in rows) / sum(len(y) for _, y in rows), {}


def log_odds(model, kind, prompt, a, b):
    """Of a being better: 32 times the mean score of its tokens minus that of b's."""
    def mean(ids, places, first):
        hidden = model.model(torch.tensor([ids]), position_ids=torch.tensor([places]),
                             attention_mask=torch.ones(1, len(ids))).last_hidden_state
        return model.score(hidden)[0, first:].mean()

    x_a, x_b = [*range(len(prompt + a))], [*range(len(prompt + b))]
    score_a = mean(prompt + a, x_a, len(prompt))
    if kind == "pairwise":  # b stands behind a, sees it, and has its places as if alone
        return 32 * (score_a - mean(prompt + a + b, x_a + x_b[len(prompt):], len(prompt + a)))
    return 32 * (score_a - mean(prompt + b, x_b, len(prompt)))


def swapped(pair):
    return pair[0], pair[2], pair[1]


def bradley_terry(kind, data, model, batch):
    """Of pairs in the order in which the model reads them; `data` says which side is chosen."""
    logits = torch.stack([log_odds(model, kind, *pair) * (1 if pair in data else -1)
                          for pair in batch])
    return -logits.sigmoid().log().mean(), {"accuracy": (logits > 0).double().mean()}


def train_by_hand(model, batches, loss_of):
    """AdamW in plain arithmetic, the gradient clipped to norm 1; the metrics of each step."""
    weights, rows = dict(model.named_parameters()), []
    m, v = ({k: torch.zeros_like(w) for k, w in weights.items()} for _ in range(2))
    for step, batch in enumerate(batches, 1):
        loss, metrics = loss_of(model, batch)
        grads = dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))
        norm = sum((g**2).sum() for g in grads.values()) ** 0.5
        lr = LR * min(1, step / 2)
        for k, w in weights.items():
            g = grads[k] / max(norm, 1)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
            w.data -= lr * m[k] / (1 - 0.9**step) / ((v[k] / (1 - 0.999**step)) ** 0.5 + 1e-8)
        metrics |= {"loss": loss, "grad_norm": norm}
        rows.append({"lr": lr, **{name: x.item() for name, x in metrics.items()}})
    return rows


CASES = {"dpo": 0.5, "ipo": 0.2, "slic": 0.193, "bo2": 0.14, "sft": 0.96, "online_rlhf ipo": 0.22,
         "reward pairwise": 0.025, "reward pointwise": 0.025}


@pytest.mark.skipif(torch.cuda.is_available(), reason="training is in bf16 there")
@pytest.mark.parametrize("case", CASES)  # some gradients are of a norm above 1, some below
def test_steps_by_hand(world, tmp_path, monkeypatch, case):
    """Loss, gradient norm, lr and rewards of every step, and the weights in the end.

    The reference is the start, also where the policy samples. Batches are of several micro-batches,
    the last ones of a second epoch.
    """
    (script, form), start = (case.split() * 2)[:2], world.policy(CASES[case])
    out, read, step = f"{tmp_path}/run", [], reward.preference_model_step
    pairs = world.rows[:{"sft": 10, "reward": 7}.get(script, 8)]  # a reward's last is held out
    before = load_file(f"{start}/model.safetensors")
    monkeypatch.setattr(reward, "preference_model_step",
                        lambda *args: read.append(args[2]) or step(*args))
    rows = run(script, out, "--model", start, *{
        "sft": ["--data", world.pairs, world.more], "bo2": ["--data", world.pairs],
        "reward": ["--data", world.pairs, "--kind", form],
        "online_rlhf": ["--prompts", world.pairs, "--labeller", world.judge, "--loss", form,
                        "--beta", str(BETA)],
    }.get(script, ["--data", world.pairs, "--beta", str(BETA)]), **LEARNS)

    model = transformers.LlamaForCausalLM.from_pretrained(start).double()
    batches = [[pairs[i] for i in batch] for batch in dpo.make_batches(
        STEPS, BATCH, len(pairs), 0, SEED)]
    assert any(len(dpo.micro_batches(batch, 40)) > 1 for batch in batches)
    if script == "online_rlhf":  # two responses of its own to these prompts
        own = [tuple(row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected"))
               for row in rows_of(f"{out}/stream.jsonl")]
        assert [x for x, *_ in own] == [x for batch in batches for x, *_ in batch]
        batches = [own[i:i + BATCH] for i in range(0, len(own), BATCH)]
    elif script == "reward":  # these pairs, some with the rejected response first
        assert [[pair if pair in pairs else swapped(pair) for pair in batch]
                for batch in read] == batches
        batches, model = read, transformers.LlamaForSequenceClassification.from_pretrained(
            start, num_labels=1).double()
        model.score.weight.data.zero_()  # r = 1/2 at first
    begin = copy.deepcopy(model)
    due = train_by_hand(model, batches, {
        "sft": maximum_likelihood, "reward": lambda *args: bradley_terry(form, pairs, *args),
    }.get(script, lambda *args: preference(form, begin, *args)))

    for row, expected in zip(rows, due, strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    after = load_file(f"{out}/final/model.safetensors")
    for name, weight in model.named_parameters():
        moved = (weight - begin.get_parameter(name)).norm()
        assert moved > 0 and (after[name] - weight).norm() < 1e-4 * moved, name
    now = load_file(f"{start}/model.safetensors")
    assert all(torch.equal(weight, now[name]) for name, weight in before.items())
    assert min(row["grad_norm"] for row in due) < 0.95 < 1.05 < max(row["grad_norm"] for row in due)


# ---- directions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["dpo", "ipo", "slic", "bo2", "sft"])
def test_the_policy_moves_towards_what_it_is_taught(world, tmp_path, script):
    """Of every pair h is above 0; Bo2 makes the chosen response likelier, SFT both."""
    start, out = world.policy(0.2), f"{tmp_path}/run"
    run(script, out, model=start, data=world.pairs, **LEARNS | dict(steps=12, batch_size=8))
    with torch.no_grad():
        after, before = (logps(transformers.LlamaForCausalLM.from_pretrained(x), world.rows[:8])
                         for x in (f"{out}/final", start))
    chosen, rejected = after - before
    if script in ("bo2", "sft"):
        assert chosen.min() > 0.5
    if script == "sft":
        assert rejected.min() > 0.5
    else:
        assert (chosen - rejected).min() > 0.5


# ---- the preference model ------------------------------------------------------------------------


def watched(monkeypatch, scores=None):
    """Let reward.train move its weights alone, and judge by a given series; what it asked for."""
    seen = SimpleNamespace(batches=[], assessed=[], weights=[])
    series = iter(scores or [])

    def step(model, logits_of, batch, flip, tokens):
        seen.batches.append((batch, flip))
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        return {"tokens": 1, "loss": 0.0, "accuracy": 0.0}

    def assess(model, pairs, *rest):
        seen.assessed.append(pairs)
        seen.weights.append(model.score.weight.detach().cpu().clone())
        count = len(seen.assessed)
        return {"accuracy": next(series, 0.125), "ece": count, "order_disagreement": count / 64}

    monkeypatch.setattr(reward, "preference_model_step", step)
    monkeypatch.setattr(reward, "assess", assess)
    return seen


def numbered(count):
    """Pairs that are all different."""
    return [([2 + i % 40, 2 + i // 40 % 40, 2 + i // 1600], [3, 1], [4, 1]) for i in range(count)]


@pytest.mark.parametrize("scores, evaluations, best", [
    ([0.5, 0.8, 0.6, 0.7, 0.75, 0.9], 5, 2), ([0.5, 0.8, 0.6, 0.7, 0.85, 0, 0, 0, 0.9], 8, 5),
    ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, 0.9, 0.5], 9, 7), ([x / 16 for x in range(9)], 9, 9),
    ([0.8, 0.8, 0.8, 0.8, 0.9], 4, 1),  # one that is as good is not better
])
def test_patience_and_the_best(world, tmp_path, monkeypatch, scores, evaluations, best):
    """It stops after 3 evaluations without a better one; the first of the best is kept and told."""
    seen, out = watched(monkeypatch, scores), f"{tmp_path}/run"
    monkeypatch.setattr(reward, "load_pairs", lambda *_: numbered(61))
    rows = run("reward", out, model=world.policy(1), data="pairs", steps=17, eval_every=2,
               patience=3, batch_size=4, warmup=1)
    evaluated = [2, 4, 6, 8, 10, 12, 14, 16, 17][:evaluations]
    assert {row["step"]: row["validation/accuracy"] for row in rows if "validation/ece" in row
            } == dict(zip(evaluated, scores, strict=False)) and len(rows) == evaluated[-1]
    kept = load_file(f"{out}/final/model.safetensors")["score.weight"]
    assert [i for i, w in enumerate(seen.weights, 1) if torch.equal(kept, w)] == [
        best, evaluations + 1]  # which is assessed on pairs of training
    assert seen.assessed[-1] == numbered(58)
    assert json.loads(open(f"{out}/assessment.json").read()) == {
        "step": evaluated[best - 1], "accuracy": scores[best - 1], "ece": best, "pairs": 3,
        "order_disagreement": best / 64, "train_accuracy": [*scores, 0.125][evaluations]}


@pytest.mark.parametrize("count, held_out, apart", [
    (2, 1, False), (61, 3, False), (41_000, 2000, False), (61, 7, True)])
def test_validation_pairs_are_never_trained_on(world, tmp_path, monkeypatch, count, held_out,
                                               apart):
    """The last twentieth of the pairs, at most 2000, or those of --validation."""
    seen, pairs = watched(monkeypatch), numbered(count + held_out if apart else count)
    files = {"pairs": pairs, "own": pairs[:-held_out], "others": pairs[-held_out:]}
    monkeypatch.setattr(reward, "load_pairs", lambda path, *_: files[path])
    given = dict(data="own", validation="others") if apart else dict(data="pairs")
    run("reward", f"{tmp_path}/run", model=world.policy(1), steps=3, eval_every=2, warmup=1,
        batch_size=len(pairs) - held_out, **given)
    for batch, flip in seen.batches:
        assert sorted(swapped(pair) if f else pair for pair, f in zip(
            batch, flip, strict=True)) == sorted(pairs[:-held_out])
    assert seen.assessed == [pairs[-held_out:]] * 2 + [pairs[:-held_out][:2000]]


def test_the_order_of_two_responses_is_drawn(world, tmp_path, monkeypatch):
    """By a fair coin a pair, at each step another, by the seed: no side is always the better."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        seen = watched(monkeypatch)
        monkeypatch.setattr(reward, "load_pairs", lambda *_: numbered(100))
        run("reward", f"{tmp_path}/{number}", model=world.policy(1), data="pairs", steps=6,
            batch_size=64, eval_every=6, seed=seed)
        assert all([b == [3, 1] for _, _, b in batch] == list(map(bool, flip))
                   for batch, flip in seen.batches)
        found.append([flip for _, flip in seen.batches])
    assert all(16 < sum(flip) < 48 for flip in found[0])
    assert found[0] == found[1] and len({tuple(flip) for flip in found[0] + found[2]}) == 12


def test_another_seed_samples_other_responses(world, tmp_path):
    """To 8 equal prompts, by the same policy."""
    for seed in (0, 1):
        run("online_rlhf", f"{tmp_path}/{seed}", model=world.policy(0.2), labeller=world.judge,
            prompts=world.one, **LEARNS | dict(steps=1, batch_size=8, seed=seed))
    a, b = ([(row["chosen_ids"], row["rejected_ids"]) for row in rows_of(
        f"{tmp_path}/{seed}/stream.jsonl")] for seed in (0, 1))
    assert a != b
