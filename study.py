"""The experiments as commands over the other scripts: prints each, runs it, skips what is done.

    python study.py --scale demo                 # toy data to a judged policy: table and figure
    python study.py --scale demo --only losses   # four losses, online and offline, two seeds
    python study.py --scale demo --list          # the commands, one a line, in order

Killed at any moment, it goes on from there when run again: every stage writes its result whole, and
training runs resume from their last checkpoint.

MIT licence. Reading order: tasks.py, sft.py, reward.py, dpo.py, gold_eval.py, online_rlhf.py.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time

import plots

# IPO pulls h to 1 / (2 beta), the hinge stops at 1 / beta; DPO never stops: it gets a larger beta.
BETAS = {"ipo": {"beta": 0.1}, "dpo": {"beta": 0.5}, "slic": {"beta": 0.2}, "bo2": {}}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--scale", choices=["demo"], default="demo", help="how large")
    p.add_argument("--only", choices=["main", "losses"], default="main",
                   help="main: IPO online and offline, DPO offline; losses: all, two seeds")
    p.add_argument("--list", action="store_true", help="print the commands and run nothing")
    return p.parse_args(argv)


def stage(script, makes, *positional, **flags):
    """One command and the path that shows it done."""
    words = [script, *positional]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words, makes


class Pipeline:
    """The toy pipeline's stages in dependency order, under data/NAME and runs/NAME."""

    def __init__(self, name):
        self.data, self.runs, self.stages = f"data/{name}", f"runs/{name}", []
        lengths = dict(max_prompt_tokens=32, max_response_tokens=96, tokens_per_microbatch=8192)
        self.lengths, data, runs = lengths, self.data, self.runs
        preference = dict(kind="pointwise", steps=1200, batch_size=64, lr=1e-3, warmup=50,
                          resume=True, **lengths)
        self.add("tasks.py", f"{data}/initial.jsonl", "toy", out=data)
        self.add("sft.py", f"{runs}/sft/final", model=f"{data}/base", data=f"{data}/initial.jsonl",
                 out=f"{runs}/sft", steps=800, batch_size=64, lr=2e-3, warmup=20, resume=True,
                 **lengths)
        self.add("reward.py", f"{runs}/gold/final", "train", model=f"{runs}/sft",
                 data=f"{data}/initial.jsonl", out=f"{runs}/gold", **preference)
        for split, labelled in (("initial", "golden"), ("validation", "golden-validation")):
            self.add("reward.py", f"{data}/{labelled}.jsonl", "label", model=f"{runs}/gold",
                     data=f"{data}/{split}.jsonl", out=f"{data}/{labelled}.jsonl", **lengths)
        self.add("reward.py", f"{runs}/proxy/final", "train", model=f"{runs}/sft",
                 data=f"{data}/golden.jsonl", validation=f"{data}/golden-validation.jsonl",
                 out=f"{runs}/proxy", **preference)
        self.training = dict(model=f"{runs}/sft", batch_size=32, lr=3e-4, warmup=20, resume=True,
                             save_every=50, **lengths)
        self.add("online_rlhf.py", f"{runs}/golden-policy/final", loss="ipo",
                 labeller=f"{runs}/gold", prompts=f"{data}/golden.jsonl",
                 out=f"{runs}/golden-policy", steps=300, beta=0.1, **self.training)
        for policy in ("golden-policy", "sft"):
            self.add("gold_eval.py", f"{data}/{policy}-baseline.jsonl", "sample",
                     model=f"{runs}/{policy}", data=f"{data}/golden.jsonl",
                     out=f"{data}/{policy}-baseline.jsonl", **lengths)
        self.judge("sft", ["golden-policy", "sft"])

    def add(self, script, makes, *positional, **flags):
        self.stages.append(stage(script, makes, *positional, **flags))

    def train(self, name, script, steps=300, **flags):
        """A training run, judged along the way against the golden policy, at its end also SFT."""
        source = "prompts" if script == "online_rlhf.py" else "data"
        labeller = {"labeller": f"{self.runs}/proxy"} if script == "online_rlhf.py" else {}
        data = {source: f"{self.data}/golden.jsonl", "eval_data": f"{self.data}/golden.jsonl"}
        self.add(script, f"{self.runs}/{name}/final", **{**data, **labeller, **flags},
                 out=f"{self.runs}/{name}", steps=steps, gold=f"{self.runs}/gold",
                 baseline=f"{self.data}/golden-policy-baseline.jsonl", eval_every=50,
                 **self.training)
        self.judge(name, ["sft"])

    def judge(self, name, baselines):
        """Judge a finished policy against the responses of these policies."""
        for policy in baselines:
            out = f"{self.runs}/{name}/judged-{policy}.json"
            self.add("gold_eval.py", out, "judge", model=f"{self.runs}/{name}",
                     reference=f"{self.runs}/sft", gold=f"{self.runs}/gold",
                     baseline=f"{self.data}/{policy}-baseline.jsonl",
                     data=f"{self.data}/golden.jsonl", out=out, seed=1, **self.lengths)


def experiment(scale, only):
    """The pipeline of an experiment and the names of its judged runs."""
    pipeline, names = Pipeline(scale), []
    if only == "main":
        for name, script, flags in (("online-ipo-s0", "online_rlhf.py", {"loss": "ipo"}),
                                    ("ipo-s0", "ipo.py", {}), ("dpo-s0", "dpo.py", {})):
            pipeline.train(name, script, **flags, **BETAS[name.split("-")[-2]])
            names.append(name)
    else:
        for seed in (0, 1):
            for loss in BETAS:
                beta = BETAS[loss]
                pipeline.train(f"online-{loss}-s{seed}", "online_rlhf.py", loss=loss, seed=seed,
                               **beta)
                pipeline.train(f"{loss}-s{seed}", f"{loss}.py", seed=seed, **beta)
                names += [f"online-{loss}-s{seed}", f"{loss}-s{seed}"]
    return pipeline, names


def run(stages):
    """Run the stages in order, each a command of its own; stop at the first that fails."""
    here = os.path.dirname(os.path.abspath(__file__))
    for i, (words, makes) in enumerate(stages, 1):
        command = f"python {shlex.join(words)}"
        if os.path.exists(makes):
            print(f"[{i}/{len(stages)}] done: {makes}", flush=True)
            continue
        print(f"[{i}/{len(stages)}] {command}", flush=True)
        began = time.perf_counter()
        script = os.path.join(here, words[0])
        child = subprocess.Popen([sys.executable, script, *words[1:]])
        for number in (signal.SIGINT, signal.SIGTERM):  # the stage saves and stops, then we do
            signal.signal(number, lambda number, _, child=child: child.send_signal(number))
        status = child.wait()
        if status:
            print(f"error: `{command}` ended with status {status}", file=sys.stderr)
            raise SystemExit(status if status > 0 else 128 - status)
        print(f"      {time.perf_counter() - began:.0f} s", flush=True)


def table(runs, names):
    """A Markdown table of the judged policies: value and standard error of each measure."""
    columns = {"win rate, golden policy": "win_rate", "win rate, SFT": "win_rate", "KL": "kl",
               "accuracy on D_golden": "accuracy_golden", "on own samples": "accuracy_self",
               "tokens": "response_length"}
    lines = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in ["sft", *names]:
        cells = []
        for title, key in columns.items():
            judged = "judged-sft.json" if title.endswith("SFT") else "metrics.jsonl"
            if name == "sft" and judged == "metrics.jsonl":
                judged = "judged-golden-policy.json"
            with open(f"{runs}/{name}/{judged}", encoding="utf-8") as f:
                found = json.loads(f.readlines()[-1])
            cells.append(f"{found[f'gold/{key}']:.3f} ± {found[f'gold/{key}_se']:.3f}"
                         if f"gold/{key}" in found else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args):
    pipeline, names = experiment(args.scale, args.only)
    if args.list:
        for words, _ in pipeline.stages:
            print(f"python {shlex.join(words)}")
        return
    run(pipeline.stages)
    result = table(pipeline.runs, names)
    with open(f"{pipeline.runs}/{args.only}.md", "w", encoding="utf-8") as f:
        f.write(result + "\n")
    print("\n" + result)
    plots.main(plots.parse_args([*(f"{pipeline.runs}/{name}" for name in names),
                                 "--out", f"{pipeline.runs}/{args.only}.png"]))


if __name__ == "__main__":
    main(parse_args())
