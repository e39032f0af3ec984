"""Where do the log-probs of chosen responses fall? log pi - log sft split over a response's tokens.

    python tests/logprobs.py runs/toy/online-ipo-b0.02-s0 runs/toy/ipo-b0.02-lr0.0003-s0 \\
        --reference runs/toy/sft --gold runs/toy/gold --data data/toy/golden.jsonl --out split.csv

For each run of the toy task: the sum of a response's log-ratios, split over kinds of words, as
means over 256 responses of each source: people's chosen and rejected ones of D_golden, samples of
SFT, and of the policy itself (where the sum estimates the KL of policy and SFT). Then, over the
golden model's score of people's responses (in log-odds): the slope of the log-ratio, its value at
the mean score of the chosen, and the share of its variance that the score explains.

"expected of a tilt" is what the best policy for its KL would have, SFT tilted by the golden score
(pi = sft * exp(a * score) / Z), were the scores of SFT's samples to a prompt normal. With standard
deviation s its KL is (a * s)^2 / 2, and the log-ratio of responses that lie z * s above SFT's mean
is a * z * s - (a * s)^2 / 2 = z * sqrt(2 * KL) - KL: below 0 from a KL of 2 * z^2 on.
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import plots
import tasks
from gold_eval import end_ids, sample
from reward import load_labeller, load_model, load_pairs, preference_logits

PLACE_WORDS = {word for place in tasks.PLACES for word in place.split()} - {"the"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("runs", nargs="+", help="run folders of finished policies")
    p.add_argument("--reference", required=True, help="the SFT policy")
    p.add_argument("--gold", required=True, help="golden preference model")
    p.add_argument("--data", required=True, help="D_golden")
    p.add_argument("--out", required=True, help="table to write (csv)")
    p.add_argument("--responses", type=int, default=256, help="responses of each source")
    p.set_defaults(max_prompt_tokens=32, max_response_tokens=64, tokens_per_microbatch=8192,
                   trust_remote_code=False, chat_kwargs="{}", skip_refused=False, precision="fp32")
    return p.parse_args(argv)


def kind_of(word, mood):
    """What a word of a response is for, where a mood was asked for."""
    if word in tasks.MOOD_OF:
        return "mood words that fit" if tasks.MOOD_OF[word] == mood else "other mood words"
    if word in tasks.ANIMALS:
        return "animals"
    if word in PLACE_WORDS:
        return "places"
    return {"<eos>": "EOS", ".": "full stops"}.get(word, "the, and")


@torch.no_grad()
def token_logps(model, rows):
    """Log-probs of the response tokens of (prompt, response) rows, a list of tensors."""
    found = []
    for start in range(0, len(rows), 64):
        some = rows[start:start + 64]
        ids = pad_sequence([torch.tensor(x + y) for x, y in some], True)
        logps = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        logps = logps.gather(2, ids[:, 1:, None])[..., 0]
        found += [logps[i, len(x) - 1:len(x) + len(y) - 1] for i, (x, y) in enumerate(some)]
    return found


def split(rows, logratios, tokenizer):
    """[{kind: sum of log-ratios}] of (prompt, response) rows."""
    found = []
    for (x, y), ratios in zip(rows, logratios, strict=True):
        mood, sums = tasks.WISH.search(tokenizer.decode(x))[2], {}
        for word, ratio in zip(tokenizer.convert_ids_to_tokens(y), ratios.tolist(), strict=True):
            kind = kind_of(word, mood)
            sums[kind] = sums.get(kind, 0) + ratio
        found.append(sums)
    return found


def main(args):
    reference, tokenizer = load_model(AutoModelForCausalLM, args.reference, args)
    gold = load_labeller(args.gold, tokenizer, args)
    pairs = load_pairs(args.data, tokenizer, args)
    pick = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:args.responses]
    pairs = [pairs[i] for i in pick.tolist()]
    prompts, lines = [x for x, *_ in pairs], []

    def draw(model, each=1):
        drawn = sample(model, prompts, each, args.max_response_tokens, end_ids(model, tokenizer),
                       torch.Generator().manual_seed(1), len(tokenizer),
                       args.tokens_per_microbatch)
        return list(zip([x for x in prompts for _ in range(each)], drawn, strict=True))

    @torch.no_grad()
    def score(rows):
        return preference_logits(gold, [(x, y, []) for x, y in rows]).numpy()

    sources = {"chosen": [(x, y) for x, y, _ in pairs], "rejected": [(x, y) for x, _, y in pairs],
               "samples of SFT": draw(reference)}
    several = score(draw(reference, 8)).reshape(-1, 8)  # of each prompt
    above = score(sources["chosen"]) - several.mean(1)
    z = above.mean() / several.var(1, ddof=1).mean() ** 0.5
    for folder in args.runs:
        run = plots.read_run(folder)
        policy, _ = load_model(AutoModelForCausalLM, folder, args)
        about = {"run": run["name"], "source": run["source"], "beta": run["beta"],
                 "kl": run["rows"][-1]["gold/kl"], "win_rate": run["rows"][-1]["gold/win_rate"]}
        scores, totals = {}, {}
        for source, rows in (sources | {"own samples": draw(policy)}).items():
            ratios = [a - b for a, b in zip(*(token_logps(model, rows) for model in (
                policy, reference)), strict=True)]
            totals[source] = np.array([ratio.sum().item() for ratio in ratios])
            scores[source] = score(rows)
            sums = split(rows, ratios, tokenizer)
            for kind in ["all", *sorted({kind for one in sums for kind in one})]:
                values = totals[source] if kind == "all" else np.array(
                    [one.get(kind, 0) for one in sums])
                lines.append(about | {
                    "of": source, "kind": kind, "mean": values.mean(),
                    "se": values.std(ddof=1) / len(values) ** 0.5})
        x, y = (np.concatenate([found["chosen"], found["rejected"]]) for found in (scores, totals))
        slope, at = np.polyfit(x - scores["chosen"].mean(), y, 1)
        for kind, value in (("slope", slope), ("at the chosen's mean score", at),
                            ("share explained", np.corrcoef(x, y)[0, 1] ** 2),
                            ("chosen's z", z),
                            ("expected of a tilt", z * (2 * about["kl"]) ** 0.5 - about["kl"]),
                            ("score of chosen", scores["chosen"].mean()),
                            ("score of own samples", scores["own samples"].mean())):
            lines.append(about | {"of": "by golden score", "kind": kind, "mean": value})
        print(*(f"{k} {v:.3f}" if isinstance(v, float) else v for k, v in about.items()))
    plots.write_csv(args.out, lines)


if __name__ == "__main__":
    main(parse_args())
