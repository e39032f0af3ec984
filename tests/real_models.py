"""What tiny random models cannot show, on a real one: data, log-probs, sampling, replay, costs.

    python tests/real_models.py MODEL_FOLDER PAIRS.jsonl [--out FOLDER]

PAIRS: as tasks.py writes them. One should see a line a check, each `ok`; the status is 1 where one
is BROKEN. What the checks at a start cost is only told, and rough. It takes minutes.
"""
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path
from timeit import timeit

import torch
from conftest import ROOT, load_model, rows_of, same_weights, script
from test_data import limits
from test_logps import brute_force

import dpo
import online_rlhf

FLAGS = "--max-prompt-tokens 128 --max-response-tokens 48 --steps 2 --batch-size 4 --warmup 1"
SHORTER = "def prefer(x, a, b): return [len(n.split()) - len(m.split()) for m, n in zip(a, b)]\n"
broken = []


def tell(ok, name, text):
    broken.extend([name] * (not ok))
    print(f"{'ok    ' if ok else 'BROKEN'} {name}: {text}", flush=True)


def quietly(work, *args):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return work(*args), said.getvalue().strip()


def check_data(tok, path):
    """Text comes back whole and is counted where it is cut. Returns (pairs, uncut pairs)."""
    whole, _ = quietly(dpo.load_pairs, path, tok, limits(10**6, 10**6))
    pairs, said = quietly(dpo.load_pairs, path, tok, limits(128, 48))
    same, bos = 0, tok.bos_token or ""
    for row, (prompt, *both) in zip(rows_of(path), whole, strict=True):
        for reply, ids in zip((row["chosen"], row["rejected"]), both, strict=True):
            text = row["prompt"] + reply + tok.eos_token if isinstance(row["prompt"], str) else \
                tok.apply_chat_template([*row["prompt"], {"role": "assistant", "content": reply}],
                                        tokenize=False)
            found = tok.decode(prompt + ids).removeprefix("" if text.startswith(bos) else bos)
            same += text.startswith(found) and not text[len(found):].strip()  # a turn's newline
    tell(same == 2 * len(whole), "data", f"{same} of {2 * len(whole)} decode to what is written")
    counts = sum(len(x) > 128 for x, *_ in whole), sum(len(y) > 48 for _, *ys in whole for y in ys)
    tell("cut {} prompts on the left and {} responses".format(*counts) in said, "cuts", said)
    return pairs, whole


def check_logps(model, pairs):
    """Both ways against fp64, one unpadded row at a time; the last pair is longer than a window."""
    config, longest = model.config.get_text_config(), sum(map(len, pairs[-1][:2]))
    window = getattr(config, "sliding_window", None)
    tell(dpo.choose_logps(model, pairs, limits(128, 48)) == dpo.pair_logps, "choose_logps", "")
    found = {"pair_logps": dpo.pair_logps(model, pairs), "plain_logps": torch.cat([
        dpo.plain_logps(model, [pair]) for pair in pairs], 1)}
    if window:
        config.sliding_window = 1 << 30  # pair_logps makes its mask of this
        found["a forgotten window shows"] = dpo.pair_logps(model, pairs)
        config.sliding_window = window
    truth = brute_force(model.double(), pairs)
    model.float()
    for name, logps in found.items():
        gap = ((logps - truth) / truth).abs().max()
        tell((gap < 1e-4) == name.endswith("logps"), name, f"{gap:.1e} off fp64, relative, of "
             f"{-truth.max():.0f} to {-truth.min():.0f} nats; up to token {longest}, {window=}")


def check_sampling(model, tok, prompts, new=24):
    """Greedy, in batches, against `generate` of each prompt alone; fp32 may part them at a tie."""
    ends, gaps = online_rlhf.end_ids(model, tok), []
    found, said = quietly(online_rlhf.sample, model, prompts, 1, new, ends, torch.Generator(),
                          tok.known, 1024, True)
    for x, ours in zip(prompts, found, strict=True):
        ids = torch.tensor([x])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                do_sample=False, eos_token_id=ends, pad_token_id=0)[0, len(x):]
        if ours != theirs.tolist():
            at = next(t for t, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
            logits = model(torch.tensor([x + ours[:at]])).logits[0, -1]
            gaps.append((logits.max() - logits[ours[at]]).item())
    tell(max([0, *gaps]) < 1e-3, "greedy", f"{len(found) - len(gaps)} of {len(found)} as generate, "
         f"prompts of {[*map(len, prompts)]} tokens, {[*map(len, found)]} new ones, {ends=}, gaps "
         f"of logits where they part: {gaps} {said}")


def check_training(name, path, out):
    """First rewards are 0, and a replay has the online run's weights. Returns a step's seconds."""
    Path(out, "judge.py").write_text(SHORTER)
    for run, words in (("offline", f"dpo.py --data {path}"), (
            "online", f"online_rlhf.py --loss dpo --prompts {path} --labeller {out}/judge.py"),
            ("replay", f"dpo.py --data {out}/online/stream.jsonl --shuffle-window 1")):
        quietly(script, *f"{ROOT}/{words} --model {name} --out {out}/{run} {FLAGS}".split())
        one, two = rows_of(f"{out}/{run}/metrics.jsonl")
        tell(one["rewards/margins"] == one["rewards/chosen"] == 0 != two["rewards/margins"], run,
             f"rewards/margins {one['rewards/margins']}, then {two['rewards/margins']:.4f}")
    tell(same_weights(f"{out}/online", f"{out}/replay"), "same bits", "online and its replay")
    return two["seconds"]


def main(name, path, out):
    began, small, ids = time.time(), f"{out}/pairs.jsonl", torch.arange(8)[None]
    Path(out).mkdir(parents=True, exist_ok=True)
    Path(small).write_text("\n".join(Path(path).read_text("utf-8").split("\n")[:200]), "utf-8")
    model, tok = load_model(name)
    pairs, whole = check_data(tok, small)
    long = [i for x, y, _ in whole for i in x + y][:640]  # conversations, one after the other
    with torch.no_grad():
        check_logps(model, [*pairs[:3], (long, *pairs[0][1:])])
        check_sampling(model, tok, [pairs[n][0][-n:] for n in (9, 30, 128)] + [long[40:], long])
    step = check_training(name, small, out)
    for check, work in {
            "load_model": lambda: [model(ids[:, :n], use_cache=False) for n in (8, 4)],
            "choose_logps": lambda: dpo.choose_logps(model, pairs, limits(128, 48)),
            "choose_decoding": lambda: online_rlhf.choose_decoding(model, False)}.items():
        print(f"cost   {check}: {(s := timeit(work, number=1)):.2f} s, {s / step:.0%} of one step")
    print(f"{name}: {time.time() - began:.0f} s; broken: {', '.join(broken) or 'nothing'}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(*([x for x in sys.argv[1:] if x != "--out"] + [folder])[:3])
    sys.exit(bool(broken))
