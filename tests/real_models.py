"""What tiny random models cannot show, on a real one: data, log-probs, sampling, replay, costs.

    python tests/real_models.py MODEL_FOLDER PAIRS.jsonl [--out FOLDER]

PAIRS: as tasks.py writes them. One should see a line a check, each `ok`; the status is 1 where one
is BROKEN. What the checks at a start cost is only told, and rough. It takes minutes.
"""
import contextlib
import copy
import io
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
from conftest import ROOT, load_model, rows_of, same_weights, script
from test_data import limits
from test_logps import brute_force

import dpo
import gold_eval
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


def check_precision(start, pairs, steps=20, size=4):
    """bf16 products beside fp32 and fp64: losses of DPO side by side, then what they are made of.

    h and the gradient are those of the policy that fp32 has trained, on pairs that it has not seen.
    """
    beta, trained, losses = 0.1, {}, {}
    batches = [pairs[i * size:][:size] for i in range(steps + 1)]
    last = batches.pop()
    for bf16 in (False, True):
        dpo.autocast.keywords["enabled"] = bf16
        policy = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
        with dpo.autocast():
            refs = [dpo.batch_logps(policy, dpo.pair_logps, some, 1024) for some in batches]
        rows = []
        for some, ref in zip(batches, refs, strict=True):
            rows.append(dpo.preference_step(policy, dpo.pair_logps, partial(
                dpo.dpo_loss, beta=beta), some, ref, beta, 1024))
            dpo.optimizer_step(policy, optimizer, 1e-5, "")
        trained[bf16], losses[bf16] = policy, torch.tensor([row["loss"] for row in rows])
        tell(rows[0]["rewards/margins"] == 0, f"first reward, {bf16=}", "0")
    dpo.autocast.keywords["enabled"], policy, found = False, trained[False], {}
    gap = (losses[True] - losses[False]).abs()
    beside = ", ".join(f"{a:.3f} {b:.3f}" for a, b in zip(*losses.values(), strict=True))
    tell(gap.mean() < 0.05, f"{steps} steps of {size} pairs", f"losses in fp32 and bf16: {beside}; "
         f"gap {gap.mean():.4f}, at most {gap.max():.4f}")
    for kind in ("fp64", "fp32", "bf16"):
        for model in (start, policy):
            model.double() if kind == "fp64" else model.float()
        policy.zero_grad()
        logps_of = brute_force if kind == "fp64" else dpo.pair_logps
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            with torch.no_grad():
                ref = logps_of(start, last)
            logps = logps_of(policy, last)
        dpo.dpo_loss(logps, ref, beta).mean().backward()
        h = (logps - ref)[0] - (logps - ref)[1]
        found[kind] = logps.detach(), h.detach(), torch.cat(
            [x.grad.flatten() for x in policy.parameters()]).double()
        if kind == "fp64":
            kl = [sum((p.exp() * (p - q)).sum() for p, q in zip(*(
                m(torch.tensor([x + y])).logits[0, len(x) - 1:-1].double().log_softmax(-1)
                for m in (policy, start)), strict=True)).item() for x, y, _ in last]
    (logps, h, gradient), head = found.pop("fp64"), start.get_output_embeddings().weight.shape
    for kind, some in found.items():
        off = (some[0] - logps).abs()
        cosine = torch.cosine_similarity(some[2], gradient, dim=0).item()
        tell(cosine > 0.98, f"{kind} beside fp64, head {[*head]}", f"log-probs of "
             f"{-logps.max():.0f} to {-logps.min():.0f} nats off by {off.mean():.1e}, at most "
             f"{off.max():.1e}; h of {h.abs().mean():.2f} by {(some[1] - h).abs().mean():.1e}, at "
             f"most {(some[1] - h).abs().max():.1e}; gradient's cosine {cosine:.5f}")
    rows = [pair[:2] for pair in last]
    found = gold_eval.response_kl(policy.float(), start.float(), rows, 1024)
    off = (found - torch.tensor(kl)).abs().max()
    tell(off < 1e-3, "exact KL beside fp64", f"of {min(kl):.3f} to {max(kl):.3f} nats off by at "
         f"most {off:.1e}")


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
    check_precision(model, quietly(dpo.load_pairs, small, tok, limits(128, 128))[0])
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
