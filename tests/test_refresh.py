"""Semi-online: the responses of K steps are sampled at once (online_rlhf.py --refresh-every K)."""

import pytest
from conftest import ARGS, load_model, rows_of, same_weights
from test_scripts import offline, online, timeless

import online_rlhf


def responses(run, *steps):
    return [(row["chosen_ids"], row["rejected_ids"]) for row in rows_of(f"{run}/stream.jsonl")
            if row["step"] in steps]


def test_a_window_is_sampled_from_the_policy_before_it(toy, tmp_path):
    """With K = all steps every response is SFT's own, by the noise of its step; with K = 2 those
    of steps 1 and 2 are, and step 3's come from a policy that has learned."""
    online(toy, f"{tmp_path}/1")
    online(toy, f"{tmp_path}/2", refresh_every=2)
    online(toy, f"{tmp_path}/4", refresh_every=4)
    one, two, all_ = (f"{tmp_path}/{k}" for k in (1, 2, 4))
    assert responses(one, 1) == responses(two, 1) == responses(all_, 1)
    assert responses(two, 2) == responses(all_, 2) != responses(one, 2)
    assert responses(two, 3) != responses(all_, 3)

    policy, tokenizer = load_model(f"{toy}/sft")
    ends = online_rlhf.end_ids(policy, tokenizer)
    for step in range(4):
        rows = [row for row in rows_of(f"{all_}/stream.jsonl") if row["step"] == step + 1]
        drawn = online_rlhf.sample(
            policy, [row["prompt_ids"] for row in rows], 2, ARGS.max_response_tokens, ends,
            online_rlhf.noise_of(0, step + 1), len(tokenizer))
        for row, first, second in zip(rows, drawn[::2], drawn[1::2], strict=True):
            assert sorted([row["chosen_ids"], row["rejected_ids"]]) == sorted([first, second])


@pytest.mark.parametrize("window", [1, 3])
def test_a_semi_online_stream_is_replayed(toy, tmp_path, window):
    online(toy, f"{tmp_path}/online", refresh_every=window)
    offline(toy, "ipo", f"{tmp_path}/replay", data=f"{tmp_path}/online/stream.jsonl",
            shuffle_window=1)
    assert same_weights(f"{tmp_path}/online", f"{tmp_path}/replay")


@pytest.mark.parametrize("dies_at", [2, 4, 6, 7])
def test_killed_inside_a_window(toy, tmp_path, monkeypatch, dies_at):
    """Windows of 4 of 10 steps, a checkpoint every 3: what was sampled is not sampled again."""
    long = dict(steps=10, refresh_every=4, save_every=3)
    whole, out = f"{tmp_path}/whole", f"{tmp_path}/r"
    online(toy, whole, **long)
    step = online_rlhf.optimizer_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(online_rlhf, "optimizer_step", lambda *args: (
            1 / 0 if f"step {dies_at + 1}," in args[-1] else step(*args)))
        online(toy, out, **long)
    online(toy, out, resume=True, **long)
    assert same_weights(out, whole)
    assert rows_of(f"{out}/stream.jsonl") == rows_of(f"{whole}/stream.jsonl")
    assert timeless(rows_of(f"{out}/metrics.jsonl")) == timeless(rows_of(f"{whole}/metrics.jsonl"))


def test_noise_is_seeded_by_the_run_and_the_step(toy, tmp_path, monkeypatch):
    """Two runs of two steps: four seeds. (That torch's CPU generator reads the low half of them
    only is what test_training expects to fail.)"""
    seeds, pairs_of = [], online_rlhf.sample_pairs

    def watched(*args):
        seeds.extend(generator.initial_seed() for generator in args[5])
        return pairs_of(*args)
    monkeypatch.setattr(online_rlhf, "sample_pairs", watched)
    for seed in (0, 1):
        online(toy, f"{tmp_path}/{seed}", seed=seed, steps=2)
    assert len(set(seeds)) == len(seeds) == 4
