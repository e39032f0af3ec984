"""What the program computes, by value and by direction, in a world that is known by hand.

A prompt is a word (fox, owl, cow), and so is a response (good, fair, bad; then it ends). A language
model is a table: how likely is each next word, given the last one. A preference model has a score
for each word, so that good beats fair, and fair beats bad, with probability 2/3 each, and good
beats bad with .8. In names, RAISED says good with .9 and bad with .1, LOWERED the other way round,
HALF each with .5; GOOD, FAIR and BAD say nothing else. Everything runs as on real models, by files,
folders and command lines; `world.py` makes them.
"""

from functools import partial
from math import log, sqrt
from types import SimpleNamespace

import pytest
import torch
from conftest import ARGS, flags, rows_of
from world import BAD, FAIR, GOOD, HALF, LOWERED, RAISED, World

import bo2
import dpo
import gold_eval
import ipo
import online_rlhf
import reward
import sft
import slic

near = partial(pytest.approx, abs=1e-5 if reward.DEVICE.type == "cpu" else 0.03)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # such small models wait for the second thread, on a busy machine long
    yield World(tmp_path_factory.mktemp("world"))
    torch.set_num_threads(threads)


# ---- log-probs, losses, training -----------------------------------------------------------------
@pytest.mark.parametrize("logps_of", [dpo.plain_logps, dpo.pair_logps])
def test_log_probs(world, logps_of):
    """A response's log-prob is the sum over its words and its end; the prompt's words are free."""
    model = world.load(world.writer({"good": 0.4, "bad": 0.6}, good={"<eos>": 0.3, "bad": 0.7}))
    found = logps_of(model, world.pairs("fox: good > bad", "cow owl fox: good bad > good"))
    chosen, rejected = found.tolist()
    assert chosen == near([log(0.4 * 0.3), log(0.4 * 0.7)])
    assert rejected == near([log(0.6), log(0.4 * 0.3)])


def test_losses(world):
    """A policy that says good with .9 and bad with .1, and a reference with .6 and .4."""
    pair = world.pairs("fox: good > bad")
    logps, ref = (dpo.plain_logps(world.load(world.writer(x)), pair)
                  for x in (RAISED, {"good": 0.6, "bad": 0.4}))
    h = log(0.9 / 0.6) - log(0.1 / 0.4)
    assert h == near(log(6))
    assert dpo.dpo_loss(logps, ref, 1.0).item() == near(-log(6 / (6 + 1)))  # - log sigmoid(h)
    assert ipo.ipo_loss(logps, ref, 0.1).item() == near((0.1 * h - 0.5) ** 2)
    assert slic.slic_loss(logps, ref, 0.1).item() == near(1 - 0.1 * h)
    assert slic.slic_loss(logps, ref, 1.0).item() == 0  # h is beyond the margin: nothing to learn
    assert slic.slic_loss(logps, ref, 1.0, 0.5).item() == near(-0.5 * log(0.9))
    assert bo2.bo2_loss(logps, ref).item() == near(-log(0.9))


def test_rewards(world):
    """An implicit reward is beta (log pi - log ref); a pair is right where the chosen's is more."""
    pairs = world.pairs(*["fox: good > bad"] * 3, "fox: bad > good")
    ref = dpo.plain_logps(world.load(world.writer(HALF)), pairs)
    found = dpo.preference_step(world.load(world.writer(RAISED)), dpo.pair_logps, partial(
        dpo.dpo_loss, beta=0.1), pairs, ref, 0.1, 1024)
    up, down = 0.1 * log(1.8), 0.1 * log(0.2)
    assert found["rewards/chosen"] == near((3 * up + down) / 4)
    assert found["rewards/rejected"] == near((3 * down + up) / 4)
    assert found["rewards/margins"] == near(0.1 * log(9) / 2)  # three right, one as much wrong
    assert found["rewards/accuracies"] == 0.75
    assert found["logps/chosen"] == near((3 * log(0.9) + log(0.1)) / 4)
    assert found["logps/rejected"] == near((3 * log(0.1) + log(0.9)) / 4)
    assert found["loss"] == near(0.75 * log(1 + 9 ** -0.1) + 0.25 * log(1 + 9 ** 0.1))


@pytest.mark.parametrize("module", [dpo, ipo, slic, bo2])
def test_training_raises_the_chosen(world, module):
    """From one half, on pairs where good is chosen, the policy learns to say good, not bad."""
    out, rows = world.trained(module, data=world.file(["fox: good > bad"] * 4), steps=4,
                              batch_size=4)
    good, bad = dpo.plain_logps(world.load(out), world.pairs("fox: good > bad"))
    assert rows[0]["logps/chosen"] == near(log(0.5)) and good > log(0.55) and bad < log(0.45)


def test_sft_learns_both_responses(world):
    """SFT makes the reference, which must be able to write both sides: bad is learnt as well."""
    out, rows = world.trained(sft, start={"good": 0.98, "bad": 0.02}, steps=4, batch_size=4,
                              data=world.file(["fox: good > bad"] * 4))
    assert rows[0]["loss"] == near(-(log(0.98) + log(0.02)) / 4)  # four tokens; <eos> is certain
    assert dpo.plain_logps(world.load(out), world.pairs("fox: good > bad"))[1] > log(0.03)


# ---- the preference model ------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_prefer(world, kind):
    """The margin r(x, y1, y2) - r(x, y2, y1) is .8 - .2 for good against bad; equal ones tie."""
    pairs = world.pairs("fox: good > bad", "fox: bad > good", "fox: fair > bad", "fox: fair > fair")
    assert reward.prefer(world.labeller(kind), pairs).tolist() == near([0.6, -0.6, 1 / 3, 0])


def test_prefer_asks_both_ways(world, monkeypatch):
    """What the place adds to both orders cancels; equal responses tie whatever rounding says."""
    monkeypatch.setattr(reward, "both_orders", lambda *_: torch.tensor([[0.9, 0.9], [0.3, 0.3]]))
    pairs = world.pairs("fox: good > bad", "fox: good > good")
    found = reward.prefer(SimpleNamespace(config=None), pairs)
    assert found.tolist() == near([0.6, 0])


def biased(model, pairs):
    """Odds of the first response three times too high: a preference for the place."""
    return reward.preference_logits(model, pairs) + log(3)


def test_both_orders(world):
    """r(x, y1, y2) and r(x, y2, y1), of odds 4 and 2; a pointwise model is asked but once."""
    pairs = world.pairs("fox: good > bad", "fox: good > fair")
    for kind, second in (("pairwise", [3 / 7, 3 / 5]), ("pointwise", [1 / 13, 1 / 7])):
        found = reward.both_orders(world.labeller(kind), pairs, 99, biased).tolist()
        assert found[0] == near([12 / 13, 6 / 7]) and found[1] == near(second)


def test_assess(world):
    """Two of three labels as the model has them; sure of .8, 2/3 and, wrongly, 2/3."""
    found = reward.assess(world.labeller(), world.pairs(
        "fox: good > bad", "fox: good > fair", "fox: bad > fair"), 99)
    assert found["accuracy"] == near(2 / 3) and found["order_disagreement"] == 0
    # calibration error: one pair at .8, all right; two at 2/3, half of them right
    assert found["ece"] == near(1 / 3 * (1 - 0.8) + 2 / 3 * (2 / 3 - 1 / 2))


def test_order_disagreement(world):
    """A biased model says "the first" in both orders where the odds are 2, not where they are 4.

    Judged both ways it is right all the same, and fair > good is still wrong.
    """
    lines = ["fox: good > bad", "fox: bad > good", "fox: good > fair", "fox: fair > good"]
    found = [reward.assess(world.labeller(), world.pairs(*some), 99, biased)
             for some in (lines[:3], lines[3:])]
    assert [x["order_disagreement"] for x in found] == near([1 / 3, 1])
    assert [x["accuracy"] for x in found] == near([2 / 3, 0])


def test_a_preference_model_learns_the_label(world):
    """The loss is - log r of the right order: log 5/4 where good, at .8, is chosen, else log 5.

    Trained on good > bad it prefers good, wherever it stands, and finds the held-out label.
    """
    pair, model = world.pairs("fox: good > bad"), world.labeller()
    right, wrong = (reward.preference_model_step(model, reward.preference_logits, pair, flip, 99)
                    for flip in ([0], [1]))
    assert (right["loss"], right["accuracy"]) == near((log(5 / 4), 1))
    assert (wrong["loss"], wrong["accuracy"]) == near((log(5), 0))
    out, rows = world.trained(reward, "train", data=world.file(["fox: good > bad"] * 40), steps=8,
                              batch_size=8, eval_every=4)
    model, _ = reward.load_preference_model(out, ARGS)
    assert rows[0]["loss"] == near(log(2))  # r = 1/2 at the start
    assert reward.prefer(model, pair).item() > 0.1 and rows[-1]["validation/accuracy"] == 1


@pytest.mark.parametrize("ids", [False, True])
def test_label(world, capsys, ids):
    """D_golden: chosen is the better response, of texts and of a stream's ids; ties stay."""
    given = ["good > bad", "bad > good", "fair > fair", "good bad > bad good", "bad > fair"]
    truth = ["good > bad", "good > bad", "fair > fair", "good bad > bad good", "fair > bad"]
    given, truth = (world.file([f"fox: {x}" for x in lines], ids) for lines in (given, truth))
    assert rows_of(world.run(reward, "label", model=world.pairwise, data=given)) == rows_of(truth)
    assert "5 pairs, 2 labels flipped (40.0%), 2 ties kept" in capsys.readouterr().out


# ---- judging a policy ----------------------------------------------------------------------------
@pytest.mark.parametrize("policy, rate", [(GOOD, 1), (BAD, 0), (FAIR, 0.5)])
def test_win_rate(world, policy, rate):
    """The share of prompts on which the policy's response is better; the baseline says fair."""
    found = world.judged(policy, ["fox: fair", "owl: fair"])
    assert found["gold/win_rate"] == rate and found["outcomes"] == f"{2 * rate:.0f}" * 2


@pytest.mark.parametrize("twice", [256, 1])
def test_outcomes_and_samples(world, monkeypatch, twice):
    """One prompt won, one lost, one tied: (1 + 0 + 1/2) / 3, and the same with their order kept
    where only the first prompts get two responses (for KL and self-classification)."""
    monkeypatch.setattr(gold_eval, "KL_PROMPTS", twice)
    policy = world.load(world.writer(GOOD, owl=BAD, cow=FAIR))
    args = gold_eval.parse_args(["judge", *flags(
        model="-", reference="-", gold=world.pairwise, data="-", out="-", max_prompt_tokens=8,
        baseline=world.file(["fox: fair", "owl: fair", "cow: fair"]), max_response_tokens=8)])
    judge = gold_eval.load_judge(args, world.file(["fox: good > bad"]),
                                 world.load(world.writer(HALF)), world.tokenizer)
    found, samples = gold_eval.evaluate(policy, judge)
    assert found["outcomes"] == "201" and found["gold/win_rate"] == near(0.5)
    assert found["gold/win_rate_se"] == near(0.5 / sqrt(3))  # of 1, 0, 1/2: deviation 1/2
    expected = [("fox", "good", 1 / 3), ("owl", "bad", -1 / 3), ("cow", "fair", 0)]
    assert samples == [{"prompt": prompt, "response": said, "baseline": "fair",
                        "gold_margin": near(margin)} for prompt, said, margin in expected][:twice]


def test_kl(world):
    """KL(policy, reference) is the mean of log(pi / ref) under the policy; the other way round it
    is another number. Of a table it is the same at any sample: standard error 0."""
    found = world.judged(RAISED, ["fox: fair"] * 8)
    assert found["gold/kl"] == near(0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5))  # .368
    assert found["gold/kl_se"] == near(0)
    found = world.judged(HALF, ["fox: fair"] * 8, reference=RAISED)
    assert found["gold/kl"] == near(0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1))  # .511


def test_kl_is_summed_over_the_response_alone(world):
    """Positions of the response add up; those of a long prompt and of padding do not count."""
    policy, reference = (world.load(world.writer(x, good={"<eos>": p, "bad": 1 - p}))
                         for x, p in ((RAISED, 0.8), (HALF, 0.4)))
    first = 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)  # after a prompt, and after <pad> as well
    second = 0.8 * log(0.8 / 0.4) + 0.2 * log(0.2 / 0.6)  # after good
    rows = [("fox", "good."), ("fox", "bad."), ("fox", "good bad."), ("cow fox", "good."),
            ("fox " * 24, "bad."), ("fox " * 25, "good.")]  # of 26 and 27 tokens: one is padded
    found = gold_eval.response_kl(policy, reference, [tuple(map(world.ids, x)) for x in rows], 99)
    both = first + second
    assert found.tolist() == near([both, first, both, both, first, both])


@pytest.mark.parametrize("policy, share", [(RAISED, 0.75), (LOWERED, 0.25), (HALF, 0.5)])
def test_accuracy_on_golden_pairs(world, policy, share):
    """The policy as a classifier says "chosen" where it raised the chosen response more (h > 0).

    Good is chosen in three of four pairs: to raise good is right on these. No opinion is 1/2.
    """
    data = [*["fox: good > bad"] * 3, "fox: bad > good"]
    found = world.judged(policy, ["fox: fair"], data)
    assert found["gold/accuracy_golden"] == share
    ratio = {word: log(policy[word] / 0.5) for word in policy}
    assert found["gold/chosen_logratio"] == near((3 * ratio["good"] + ratio["bad"]) / 4)


@pytest.mark.parametrize("policy, reference, share", [
    (RAISED, HALF, 1), (LOWERED, HALF, 0), (HALF, HALF, 0.5), (HALF, RAISED, 0)])
def test_accuracy_on_its_own_samples(world, policy, reference, share):
    """Two of the policy's own responses: does h prefer the one that the golden model prefers?"""
    found = world.judged(policy, ["fox: fair"] * 40, reference=reference)
    assert found["gold/accuracy_self"] == share


def test_response_length(world):
    """Tokens of the policy's response, its end included; the baseline's are four."""
    assert world.judged(GOOD, ["fox: fair fair fair"])["gold/response_length"] == 2


def test_golden_pairs_are_drawn_from_the_whole_file(world):
    """256 of 600 pairs: good is chosen in the first half of the file, bad in the second."""
    data = ["fox: good > bad"] * 300 + ["fox: bad > good"] * 300
    assert 0.4 < world.judged(RAISED, ["fox: fair"], data)["gold/accuracy_golden"] < 0.6


def test_the_seed_is_that_of_the_samples(world):
    """An evaluation has always the same noise; --seed gives it another."""
    a, b, c = (world.judged(HALF, ["fox: fair"] * 40, seed=seed)["outcomes"] for seed in (0, 0, 1))
    assert a == b != c and set(a) == set("02")


# ---- gold_eval.py sample, classify ---------------------------------------------------------------
def test_baseline_has_distinct_prompts(world):
    """The first three different prompts of the file, a response each."""
    prompts = ["fox", "fox", "owl", "fox", "cow", "owl cow"]
    out = world.run(gold_eval, "sample", model=world.writer(GOOD, owl=BAD), prompts=3,
                    data=world.file([f"{x}: fair > bad" for x in prompts]))
    assert rows_of(out) == [
        {"prompt_ids": world.ids(x), "response_ids": world.ids(f"{said}."), "prompt": x,
         "response": said} for x, said in (("fox", "good"), ("owl", "bad"), ("cow", "good"))]


def test_pairs_of_two_policies(world, capsys):
    """A response of each policy to each of the first rows; the better one is chosen."""
    model, other = world.writer(GOOD, cow=FAIR, owl=BAD), world.writer(FAIR)
    data = world.file([f"{x}: good > bad" for x in ("fox", "fox", "owl", "cow", "fox")])
    out = world.run(gold_eval, "sample", model=model, other=other, gold=world.pairwise, prompts=4,
                    data=data)
    assert rows_of(out) == rows_of(world.file(
        [*["fox: good > fair"] * 2, "owl: fair > bad", "cow: fair > fair"], ids=True))
    assert "on 2 of 4 pairs; 1 are equal" in capsys.readouterr().out


def test_classify(world):
    """In ten parts of a stream, who agrees with the golden model?

    The labeller does in the first five. The policy's log-probs are all the same: compared with its
    reference it raises good after fox (parts 1 to 3), and lowers it after owl (from part 6 on); of
    cow it has no opinion, which is 1/2. One pair of four is equal and does not count.
    """
    stream = [f"{'fox' if i < 12 else 'cow' if i < 20 else 'owl'}: " + (
        "fair > fair" if i % 4 == 0 else "good > bad" if i < 20 else "bad > good")
        for i in range(40)]
    out = world.run(gold_eval, "classify", model=world.writer(HALF), gold=world.pairwise,
                    reference=world.writer(LOWERED, owl=RAISED, cow=HALF),
                    data=world.file(stream))
    rows = rows_of(out)
    assert [row["gold/accuracy_labeller"] for row in rows] == [1] * 5 + [0] * 5
    assert [row["gold/accuracy_policy"] for row in rows] == [1] * 3 + [0.5] * 2 + [0] * 5
    assert [row["pairs"] for row in rows] == [3] * 10
    assert [row["share_of_stream"] for row in rows] == near([i / 10 for i in range(1, 11)])


# ---- online --------------------------------------------------------------------------------------
def online(world, lines=("fox: fair > bad",), start=HALF, **options):
    options = dict(steps=1, batch_size=16, labeller=world.pairwise) | options
    return world.trained(online_rlhf, prompts=world.file(lines), start=start, **options)


def test_online_step(world):
    """The policy samples good or bad; the labeller puts good first, with margin .8 - .2; the loss
    of the start is (0 - 1/2)^2; and then the policy says good more often."""
    out, (metrics,) = online(world)
    rows = rows_of(f"{out}/stream.jsonl")
    ties = sum(row["chosen_ids"] == row["rejected_ids"] for row in rows)
    assert 0 < ties == metrics["ties"] < 16 == len(rows)
    for row in rows:
        equal = row["chosen_ids"] == row["rejected_ids"]
        assert row["prompt_ids"] == world.ids("fox") and row["step"] == 1
        assert row["margin"] == near(0 if equal else 0.6)
        assert equal or row["chosen_ids"] == world.ids("good.")
    assert metrics["labeller_margin"] == near(0.6 * (16 - ties) / 16)
    assert metrics["loss"] == near(0.25) and metrics["rewards/margins"] == near(0)
    good, bad = dpo.plain_logps(world.load(out), world.pairs("fox: good > bad"))
    assert good > log(0.5) > bad


def test_online_evaluation(world):
    """KL 0 at the start, which is the reference; later steps are compared with it, not with
    themselves. --eval-data are the pairs that accuracy_golden is of."""
    _, rows = online(world, ["fox: good > bad"], steps=2, eval_every=1, gold=world.pairwise,
                     baseline=world.file(["fox: fair"]), eval_data=world.file(["fox: bad > good"]))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["gold/kl"] == near(0) and rows[0]["gold/accuracy_golden"] == 0.5
    assert rows[2]["gold/kl"] > rows[1]["gold/kl"] > 1e-4
    assert rows[2]["gold/accuracy_golden"] == 0  # it has learnt to say good


def streams(world, **options):
    return [rows_of(f"{online(world, seed=seed, **options)[0]}/stream.jsonl") for seed in (0, 0, 1)]


def test_another_seed_draws_other_prompts(world):
    a, b, c = streams(world, lines=[f"{x} {y}: fair > bad" for x in ("fox", "owl", "cow")
                                    for y in ("fox", "owl", "cow")], start=GOOD, batch_size=9)
    assert a == b != c and sorted(map(str, a)) == sorted(map(str, c))


def test_another_seed_samples_other_responses(world):
    a, b, c = streams(world)
    assert a == b != c
