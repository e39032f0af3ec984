"""The paper's experiments as commands over the other scripts: runs them, skips what is done, plots.

    python study.py --scale demo                  # toy data to a judged policy: table and figure
    python study.py --scale toy --jobs 2          # every figure, three seeds: hours on two cores
    python study.py --scale toy --only fig4       # one figure and what it needs
    python study.py --scale hard --jobs 2         # the main ones, of people whose taste is hard
    python study.py --scale gpu                   # the main claim on a real task: a night, one GPU
    python study.py --scale paper --list          # the commands, in order, on real data and models
    python study.py --scale paper --list 3        # of these the third wave: all can run at once

Each command makes one file or run folder and goes on from its checkpoint when it is run again: the
study can be killed at any moment. On a cluster run wave after wave (xargs -P, a job array). Needs
Linux or macOS; commands that can run at once share the cores, unless OMP_NUM_THREADS is set.

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
from contextlib import nullcontext

import numpy as np
from tqdm import tqdm

import plots

CORES = os.cpu_count() or 1
try:
    import fcntl
except ImportError:
    sys.exit("error: study.py needs Linux or macOS (fcntl); the other scripts run anywhere")

TOY_SIZES = {"-18k": (32, 1), "-373k": (96, 3)}  # width, layers; tasks.py's own are 64 and 2
TOY = dict(
    tasks=["toy"], pairs=64_000, prompts=1024, seeds=[0, 1, 2], sizes=["-18k", "", "-373k"],
    lengths=dict(max_prompt_tokens=32, max_response_tokens=64, tokens_per_microbatch=8192),
    sft=dict(steps=800, batch_size=64, lr=2e-3, warmup=20),
    gold=dict(kind="pointwise", steps=2000, batch_size=64, lr=1e-3, warmup=50),
    proxy=dict(kind="pointwise", steps=1200, batch_size=64, lr=1e-3, warmup=50),
    train=dict(batch_size=32, warmup=20, save_every=100), steps=400, long=1600,
    lr=3e-4, lrs=[1e-4, 3e-4, 1e-3], beta=0.1, betas=[0.02, 0.1, 0.5], windows=[4, 40],
    every=[4, 20, 100], larger={})
SCALES = {
    "demo": TOY | dict(
        figures=["main"], pairs=20_000, prompts=512, seeds=[0], sizes=[""], steps=200, long=200,
        evaluations=8, lrs=[3e-4], betas=[0.02, 0.05], golden_steps=120,
        sft=TOY["sft"] | dict(steps=150, lr=3e-3),
        gold=TOY["gold"] | dict(steps=400, lr=7e-4, warmup=20, eval_every=50),
        proxy=TOY["proxy"] | dict(steps=200, lr=7e-4, warmup=20)),
    "toy": TOY,
    "hard": TOY | dict(  # fixed by classifiers' accuracies alone, before a policy: results/hard.md
        taste=dict(taste="hard"), golden_size="-373k", proxy=TOY["proxy"] | dict(steps=120),
        proxies=[(1, None), (1, TOY["proxy"]["steps"])],
        figures=["fig1", "fig4", "fig6", "fig7", "fig8", "self", "gap", "utility", "logratio",
                 "fig9", "fig13", "proxies"]),
    "gpu": dict(  # a night on one GPU of 80 GB, by estimate: no run of it was made
        tasks=["helpful"], seeds=[0, 1, 2], sizes=[""], pairs=43_000, prompts=512, windows=[4, 100],
        every=[4, 20, 100],
        policy=["Qwen/Qwen2.5-0.5B"], golden="Qwen/Qwen2.5-1.5B",
        figures=["fig1", "fig4", "fig6", "fig7", "fig8"],
        lengths=dict(max_prompt_tokens=384, max_response_tokens=128),
        sft=dict(steps=600, batch_size=64, lr=1e-5),
        gold=dict(steps=3000, batch_size=32, lr=1e-5, warmup=100),
        proxy=dict(steps=1500, batch_size=32, lr=1e-5, warmup=100),
        train=dict(batch_size=32), steps=800, long=800,
        lr=3e-6, lrs=[3e-6], beta=0.1, betas=[0.1, 0.5]),
    "paper": dict(  # its hyper-parameters (section 4, appendix A); models are flags
        policy=["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B"],
        golden="Qwen/Qwen2.5-7B",
        tasks=["tldr", "helpful", "harmless", "arena"], seeds=[0], sizes=["", "-2", "-3"],
        pairs=90_000, prompts=2048,
        lengths=dict(max_prompt_tokens=896, max_response_tokens=128),
        sft=dict(steps=4000, batch_size=128, lr=3e-5),
        gold=dict(steps=20_000, batch_size=16, lr=1e-4, warmup=1000),
        proxy=dict(steps=20_000, batch_size=32, lr=1e-4, warmup=1000),
        train=dict(batch_size=32), steps=4000, long=20_000,
        larger={"-2": dict(train=dict(batch_size=16), sft=dict(steps=8000, lr=1e-5)),
                "-3": dict(train=dict(batch_size=8), sft=dict(steps=8000, lr=1e-5))},
        lr=1e-5, lrs=[3e-6, 1e-5, 3e-5], beta=0.1, betas=[0.1, 0.5, 1.0], windows=[4, 500],
        every=[4, 20, 100, 500]),
}
# IPO pulls h to 1 / (2 beta), the hinge stops at 1 / beta, DPO never stops: a beta of their own
OTHER_BETAS = {"dpo": [0.1, 0.5], "slic": [0.1, 0.5]}
PROXY_SHARES = [(256, None), (16, None), (4, None), (1, None)]  # 1 / share of the pairs, steps
ABOUT = {  # what a command is for, by the name of what it makes, or its script
    "gold": "learns which response people prefer, and then stands for people",
    "golden.jsonl": "the pairs with the golden model's labels (D_golden): what all learn from",
    "golden-validation.jsonl": "the same for held-out pairs, whose noise-free labels are known",
    "golden-policy": "the opponent: an online run that is labelled by the golden model itself",
    "golden-policy-baseline.jsonl": "the opponent's responses, against which all are judged",
    "tasks.py": "pairs of responses with people's choices, and an untrained model",
    "sft.py": "where all policies start: imitates the responses, good and bad",
    "reward.py": "learns from D_golden to label the online run's responses",
    "online_rlhf.py": "online: learns from its own responses, labelled by the proxy",
    "ipo.py": "offline: learns from the fixed pairs of D_golden",
    "dpo.py": "offline, with DPO's loss", "slic.py": "offline, with SLiC's loss",
    "bo2.py": "offline, imitates the better response of each pair",
    "gold_eval.py": "samples or judges"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--scale", choices=SCALES, default="demo", help="how large")
    p.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="FIGURE",
                   help=f"some of: {', '.join(EXPERIMENTS)} (default: all; demo: main)")
    p.add_argument("--jobs", type=int, help="commands at once, which share the cores (default: as "
                   "many as cores, at most 8; gpu, paper: 1)")
    p.add_argument("--seed", type=int, default=0, help="another draw of everything")
    p.add_argument("--list", type=int, nargs="?", const=0, metavar="WAVE",
                   help="print the commands, or those of one wave, and run nothing")
    p.add_argument("--policy", nargs="+", metavar="MODEL", help="gpu, paper: policies by size "
                   "(default: Qwen/Qwen2.5-0.5B, paper: also -1.5B and -3B)")
    p.add_argument("--golden", metavar="MODEL", help="gpu, paper: backbone of the golden model, of "
                   "the policies' tokenizer (default: Qwen/Qwen2.5-1.5B, paper: -7B)")
    p.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # a rehearsal: few and small ones
    return p.parse_args(argv)


def scale_of(args):
    """The settings of args.scale; with --steps those of a rehearsal, so many steps of two rows."""
    scale = SCALES[args.scale]
    short = dict(steps=args.steps, batch_size=2)
    return scale if not args.steps else scale | dict(
        seeds=[0], betas=[scale["beta"]], steps=args.steps, long=args.steps, prompts=4,
        evaluations=1, train=scale["train"] | dict(batch_size=2),
        **{kind: scale[kind] | short for kind in ("sft", "gold", "proxy")})


class Study:
    """Stages of one task in dependency order; a stage that is asked for twice is there once."""

    def __init__(self, args, task, stages):
        self.scale, self.args, self.task, self.stages = scale_of(args), args, task, stages
        self.betas, self.lengths = self.scale["betas"], self.scale["lengths"]
        self.seeds = [args.seed + seed for seed in self.scale["seeds"]]
        self.name = name_of(args)
        folders = {task: f"{self.name}/{task}" if len(self.scale["tasks"]) > 1 else self.name
                   for task in self.scale["tasks"]}
        self.initial = {name: f"data/{folder}/initial.jsonl" for name, folder in folders.items()}
        self.data, self.runs = f"data/{folders[task]}", f"runs/{folders[task]}"
        self.d_golden, self.gold = f"{self.data}/golden.jsonl", f"{self.runs}/gold"
        self.pipeline()

    def add(self, script, makes, *positional, **flags):
        """One command and the path that shows it done."""
        words = [script, *positional]
        if self.args.seed and "label" not in positional:
            flags.setdefault("seed", self.args.seed)
        for name, value in flags.items():
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words += map(str, value if isinstance(value, list) else [value])
        self.stages.setdefault(makes, words)

    def pipeline(self):
        """Data, SFT, golden and proxy models, D_golden, the golden policy and its responses."""
        s, data, runs, toy = self.scale, self.data, self.runs, self.task == "toy"
        for task, initial in self.initial.items():
            self.add("tasks.py", initial, task, out=os.path.dirname(initial),
                     **({"pairs": s["pairs"]} | s.get("taste", {}) if toy else {"text": True}))
        sft, initial = self.sft(""), self.initial[self.task]
        self.add("reward.py", f"{self.gold}/final", "train", resume=True, out=self.gold,
                 model=self.sft(s.get("golden_size", "")) if toy else self.args.golden
                 or s["golden"], data=initial, **s["gold"], **self.lengths)
        self.label(initial, self.d_golden)
        self.add("online_rlhf.py", f"{runs}/golden-policy/final", loss="ipo", model=sft,
                 labeller=self.gold, prompts=initial, resume=True, lr=s["lr"],
                 out=f"{runs}/golden-policy", steps=s.get("golden_steps", s["steps"]),
                 beta=s["beta"], **s["train"], **self.lengths)
        self.proxy("proxy", self.d_golden)
        out = f"{data}/golden-policy-baseline.jsonl"
        self.add("gold_eval.py", out, "sample", model=f"{runs}/golden-policy", data=self.d_golden,
                 out=out, prompts=s["prompts"], **self.lengths)

    def label(self, pairs, out):
        """Pairs with the golden model's labels."""
        self.add("reward.py", out, "label", model=self.gold, data=pairs, out=out, **self.lengths)

    def sft(self, size):
        """The SFT policy of a size, on the pairs of all tasks; returns its run folder."""
        s, out = self.scale, f"runs/{self.name}/sft{size}"
        if self.task == "toy":
            base = f"{self.data}{size.replace('-', '/')}/base"
            if size:
                width, layers = TOY_SIZES[size]
                self.add("tasks.py", base, "toy", out=os.path.dirname(base), width=width,
                         layers=layers, pairs=s["pairs"], **s.get("taste", {}))
        else:
            base = (self.args.policy or s["policy"])[s["sizes"].index(size)]
        self.add("sft.py", f"{out}/final", model=base, data=list(self.initial.values()), out=out,
                 resume=True, **s["sft"] | s.get("larger", {}).get(size, {}).get("sft", {}),
                 **self.lengths)
        return out

    def proxy(self, name, pairs, **flags):
        """A preference model of the policy's size, trained on golden labels."""
        out = f"{self.runs}/{name}"
        self.add("reward.py", f"{out}/final", "train", model=self.sft(""), data=pairs, out=out,
                 resume=True, **self.scale["proxy"] | flags, **self.lengths)

    def train(self, name, script, seed, size="", beta=None, steps=None, **flags):
        """A training run, judged along the way against the golden policy; returns its name."""
        s, out = self.scale, f"{self.runs}/{name}{size}-s{seed}"
        steps = steps or s["steps"]
        if beta:
            flags["beta"] = beta
        self.add(script, f"{out}/final", model=self.sft(size), out=out, seed=seed, steps=steps,
                 **flags, eval_data=self.d_golden, gold=self.gold,
                 baseline=f"{self.data}/golden-policy-baseline.jsonl",
                 eval_every=max(1, steps // s.get("evaluations", 16 if steps > s["steps"] else 8)),
                 resume=True, **self.lengths,
                 **s["train"] | s.get("larger", {}).get(size, {}).get("train", {}))
        return out

    def online(self, seed, loss="ipo", beta=None, size="", proxy="proxy", lr=None, steps=None,
               every=1):
        beta = None if loss == "bo2" else beta or self.scale["beta"]
        name = f"online-{loss}" + (f"-b{beta}" if beta else "") + proxy.removeprefix("proxy")
        if steps:
            name += f"-{steps}steps"
        if every > 1:  # semi-online
            name += f"-every{every}"
        return self.train(name, "online_rlhf.py", seed, size, beta, steps, loss=loss,
                          lr=lr or self.scale["lr"], labeller=f"{self.runs}/{proxy}",
                          prompts=self.d_golden,
                          **({"refresh_every": every} if every > 1 else {}))

    def offline(self, seed, loss="ipo", beta=None, size="", lr=None, steps=None, data=None, tag="",
                **flags):
        """On D_golden, or on `data`, a file that another stage makes."""
        beta, lr = None if loss == "bo2" else beta or self.scale["beta"], lr or self.scale["lr"]
        name = loss + tag + (f"-b{beta}" if beta else "") + f"-lr{lr}"
        return self.train(name, f"{loss}.py", seed, size, beta, steps, lr=lr,
                          data=data or self.d_golden, **flags)

    def shuffled(self, seed, loss="ipo", beta=None, size="", window=0):
        """Offline on the stream of the online run of the same settings (1: in its exact order)."""
        stream = f"{self.online(seed, loss, beta, size)}/stream.jsonl"
        return self.offline(seed, loss, beta, size, data=stream, shuffle_window=window,
                            tag=f"-window{window}" if window else "-shuffled")

    # each figure returns the run folders that it draws, made by stages which it adds

    def main(self):
        if self.task == "toy":  # how often the golden model is right, by people without noise
            self.label(f"{self.data}/validation.jsonl", f"{self.data}/golden-validation.jsonl")
        return [self.online(self.seeds[0], beta=max(self.betas))] + [
            self.offline(self.seeds[0], beta=beta) for beta in self.betas]

    def fig1(self):
        return [self.online(seed, beta=beta) for seed in self.seeds for beta in self.betas
                ] + self.sweep()

    def sweep(self):
        """Offline over learning rates and betas; a long run holds the checkpoints of a short."""
        return [self.offline(seed, beta=beta, lr=lr, steps=self.scale["long"])
                for seed in self.seeds for beta in self.betas for lr in self.scale["lrs"]]

    def fig4(self):
        return self.fig1() + [self.shuffled(seed, beta=beta)
                              for seed in self.seeds for beta in self.betas]

    def refresh(self):
        """Semi-online: sampled anew every so many steps; at the end of the row from SFT alone."""
        return self.fig1() + [self.online(seed, beta=beta, every=every)
                              for every in (*self.scale["every"], self.scale["steps"])
                              for seed in self.seeds for beta in self.betas]

    def fig5(self):
        return self.fig1() + self.of_two("final", "final")

    def of_two(self, first, second):
        """Offline on pairs sampled from two policies and relabelled by the golden model."""
        s, runs = self.scale, []
        for seed in self.seeds:
            policies = {"sft": self.sft(""), "early": self.online(seed, steps=s["steps"] // 5),
                        "final": self.online(seed)}
            data = f"{self.data}/{first}-vs-{second}-s{seed}.jsonl"
            self.add("gold_eval.py", data, "sample", model=policies[first],
                     other=policies[second], gold=self.gold, data=self.d_golden, out=data,
                     seed=seed, prompts=s["steps"] * s["train"]["batch_size"], **self.lengths)
            runs += [self.offline(seed, beta=beta, data=data, tag=f"-{first}-vs-{second}")
                     for beta in self.betas]
        return runs

    def fig6(self):
        """Agreement with the golden model along D_online: the proxy, an online, an offline run."""
        outs = []
        for seed in self.seeds:
            online, offline = self.online(seed), self.offline(seed, steps=self.scale["long"])
            for name, policy in (("online", online), ("offline", offline)):
                outs.append(f"{self.runs}/classify-{name}-s{seed}.jsonl")
                self.add("gold_eval.py", outs[-1], "classify", model=policy, out=outs[-1],
                         reference=self.sft(""), gold=self.gold, data=f"{online}/stream.jsonl",
                         **self.lengths)
        return outs

    def fig9(self):
        return [run for seed in self.seeds for run in (
            self.online(seed, "bo2"), self.shuffled(seed, "bo2"),
            *(self.offline(seed, "bo2", lr=lr) for lr in self.scale["lrs"]))]

    def fig10(self):
        return [run for size in self.scale["sizes"] for seed in self.seeds for run in (
            self.online(seed, size=size), self.shuffled(seed, size=size),
            self.offline(seed, size=size, steps=self.scale["long"]))]

    def fig12(self):
        return self.fig5() + self.of_two("sft", "early") + self.of_two("early", "final")

    def fig13(self):
        beta = min(self.betas)  # drifts furthest, so that order can matter
        return [self.online(seed, beta=beta) for seed in self.seeds] + [
            self.shuffled(seed, beta=beta, window=window)
            for seed in self.seeds for window in (1, *self.scale["windows"], 0)]

    def tandem(self):
        beta = min(self.betas)
        return [self.online(self.seeds[0], beta=beta)] + [
            self.shuffled(self.seeds[0], beta=beta, window=window)
            for window in (1, self.scale["windows"][0])]

    def losses(self):
        return [run for seed in self.seeds for loss, betas in OTHER_BETAS.items() for beta in betas
                for run in (self.online(seed, loss, beta), *(
                    self.offline(seed, loss, beta, lr=lr) for lr in self.scale["lrs"]))]

    def proxies(self):
        """Proxies of fewer pairs of D_golden, or of other steps; offline always has all of it.

        Each training seed has a proxy of its own: of other pairs, and all in another order.
        """
        runs = self.sweep()
        for share, steps in self.scale.get("proxies", PROXY_SHARES):
            pairs = self.scale["pairs"] // share
            for draw, seed in enumerate(self.seeds):
                name = "proxy" + (f"-{pairs}pairs" if share > 1 else "")
                name += (f"-{steps}steps" if steps else "") + (f"-draw{draw}" if draw else "")
                flags = ({"steps": steps} if steps else {}) | ({"seed": seed} if draw else {})
                data = self.d_golden if share == 1 else f"{self.data}/{name}/initial.jsonl"
                if share > 1:
                    self.add("tasks.py", data, "file", file=self.d_golden, pairs=pairs,
                             out=f"{self.data}/{name}", **({"skip": draw * pairs} if draw else {}))
                self.proxy(name, data, **flags)
                runs += [self.online(seed, beta=beta, proxy=name) for beta in self.betas]
        return runs


EXPERIMENTS = {  # name: the method that lists its runs
    "main": Study.main, "fig1": Study.fig1, "fig4": Study.fig4, "fig6": Study.fig6,
    "fig7": Study.fig4, "fig8": Study.fig4, "self": Study.fig4, "gap": Study.fig4,
    "utility": Study.fig4, "logratio": Study.fig4, "refresh": Study.refresh, "fig9": Study.fig9,
    "fig13": Study.fig13, "tandem": Study.tandem, "proxies": Study.proxies, "fig5": Study.fig5,
    "fig12": Study.fig12, "losses": Study.losses, "fig10": Study.fig10, "fig11": Study.fig10,
    "fig14": Study.fig10,
}


def name_of(args):
    """Name of the study's folders in data/ and runs/."""
    return args.scale + (f"-s{args.seed}" if args.seed else "")


def experiments(args):
    """({path: its command}, in dependency order; {(task, figure): what it draws})."""
    stages, drawn = {}, {}
    figures = args.only or SCALES[args.scale].get(
        "figures", [name for name in EXPERIMENTS if name != "main"])
    for task in SCALES[args.scale]["tasks"]:
        study = Study(args, task, stages)
        for figure in figures:
            drawn[task, figure] = EXPERIMENTS[figure](study)
    return stages, drawn


def value_of(words, flag, default=None):
    return words[words.index(flag) + 1] if flag in words else default


def needs(stages):
    """For each stage the set of earlier ones that make what it reads: files under their --out."""
    before, found = {}, {}
    for makes, words in stages.items():
        read = [w for w, flag in zip(words[1:], words, strict=False) if flag != "--out"]
        found[makes] = {path for path, out in before.items()
                        if any(w == out or w.startswith(out + "/") for w in read)}
        before[makes] = value_of(words, "--out")
    return found


def waves(stages):
    """The stages in lists of what they make: those of one list need only what earlier ones make."""
    wave = {}
    for makes, read in needs(stages).items():
        wave[makes] = max((wave[r] + 1 for r in read), default=0)
    return [[m for m in wave if wave[m] == i] for i in range(max(wave.values(), default=-1) + 1)]


def start(words, threads, lock, log=None):
    """Start one command on so many threads, its output to the file `log` or to the screen."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), words[0])
    env = {"OMP_NUM_THREADS": str(threads)} | os.environ
    os.makedirs(os.path.dirname(value_of(words, "--out")) or ".", exist_ok=True)
    with open(log, "a") if log else nullcontext() as file:
        return subprocess.Popen([sys.executable, script, *words[1:]], stdout=file, stderr=file,
                                env=env,
                                pass_fds=[lock.fileno()])  # an orphan keeps the next study waiting


def cost(words):
    """About how long a command takes, in gradient steps of an offline run."""
    return 60 + int(value_of(words, "--steps", 60)) * (4 if words[0] == "online_rlhf.py" else 1)


def hours(words):
    """About how long a command of --scale gpu takes on one H100: reckoned, not yet measured."""
    steps, made = int(value_of(words, "--steps", 0)), {"sample": 60, "classify": 300}
    each = {"online_rlhf.py": 3, "sft.py": 1.5, "reward.py": 1}.get(words[0], 0.8)
    judged = 1 + steps // int(value_of(words, "--eval-every", 1)) if "--gold" in words else 0
    return (60 + each * steps + 60 * judged + made.get(words[1], 1200 * ("label" in words))) / 3600


def run(stages, jobs, folder):
    """Run the stages, `jobs` at once, each when what it reads is made; stop at a failure."""
    os.makedirs(f"{folder}/logs", exist_ok=True)
    logs = {makes: f"{folder}/logs/{value_of(words, '--out').replace('/', '-')}.log" if jobs > 1
            else None for makes, words in stages.items()}
    costs = {makes: cost(words) for makes, words in stages.items()}
    threads = {makes: max(1, CORES // min(jobs, len(wave)))  # alone in its wave: all cores
               for wave in waves(stages) for makes in wave}
    read, running, began, first = needs(stages), {}, {}, time.perf_counter()
    with open(f"{folder}/lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another study, or a command it left, still works in {folder}: waiting for it",
                  file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        todo = [makes for makes in stages if not os.path.exists(makes)]
        done, gone, total = len(stages) - len(todo), 0, sum(costs[makes] for makes in todo)
        bar = tqdm(total=total, disable=not sys.stderr.isatty(), smoothing=0, bar_format=
                   "{percentage:3.0f}% |{bar}| {elapsed} gone, about {remaining} left")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            while todo or running:
                for makes in todo:
                    if len(running) < jobs and not read[makes] & {*todo, *running}:
                        words, began[makes] = stages[makes], time.perf_counter()
                        out = value_of(words, "--out")
                        about = ABOUT.get(os.path.basename(out), ABOUT.get(words[0], ""))
                        bar.write(f"{out}: {about}", sys.stdout)
                        running[makes] = start(words, threads[makes], lock, logs[makes])
                todo = [makes for makes in todo if makes not in running]
                time.sleep(0.05)
                for makes in [m for m in running if running[m].poll() is not None]:
                    words = stages[makes]
                    if status := running.pop(makes).returncode:
                        log = f"; see {logs[makes]}" if logs[makes] else ""
                        print(f"error: `python {shlex.join(words)}` ended with status {status}"
                              f"{log}", file=sys.stderr)
                        raise SystemExit(status if status > 0 else 128 - status)
                    done += 1
                    bar.update(costs[makes])
                    gone, now = gone + costs[makes], time.perf_counter()
                    bar.write(f"[{done}/{len(stages)}] {value_of(words, '--out')} made in "
                              f"{now - began[makes]:.0f} s; about "
                              f"{(now - first) * (total / gone - 1) / 60:.1f} minutes left",
                              sys.stdout)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:  # what still runs saves and stops
            for child in running.values():
                child.terminate()
            for child in running.values():
                child.wait()
            bar.close()


def table(runs):
    """A Markdown table of SFT and {name: finished run}: value and standard error a measure."""
    columns = {"win rate against the golden policy": "gold/win_rate", "KL to SFT": "gold/kl",
               "hidden utility": "toy/utility", "accuracy on D_golden": "gold/accuracy_golden",
               "tokens a response": "gold/response_length"}
    lines = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    start = next(iter(runs.values()))["start"][0]
    ends = {name: run["rows"][-1] for name, run in runs.items()}
    for name, row in ({"SFT, where all start": start} | ends).items():
        cells = (f"{round(row[key], 3) + 0:.3f} ± {row[f'{key}_se']:.3f}"  # no -0.000
                 for key in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def at_equal_kl(online, *offline):
    """A sentence on how much more online wins than the better of offline where both passed.

    Along the lines of the figure: each run's checkpoints, joined from SFT on.
    """
    ways = [sorted((row["gold/kl"], row["gold/win_rate"]) for row in run["start"] + run["rows"])
            for run in (online, *offline)]
    low = max(ways[0][1][0], min(way[1][0] for way in ways[1:]))  # the first that was trained
    high = min(ways[0][-1][0], max(way[-1][0] for way in ways[1:]))
    if low >= high:
        return "Online and offline did not drift equally far: they cannot be compared."
    kls = np.linspace(low, high, 200)
    first, *others = (np.interp(kls, *zip(*way, strict=True), right=-1) for way in ways)
    second = np.max(others, 0)
    return (f"At the KLs that both passed ({low:.1f} to {high:.1f}) online wins {first.mean():.0%} "
            f"on average and the better of offline {second.mean():.0%} "
            f"({(first - second).mean():+.2f}); at the highest {first[-1]:.0%} and "
            f"{second[-1]:.0%} ({first[-1] - second[-1]:+.2f}).")


def examples(folders, count=2):
    """What SFT and {name: run folder} answer to the same prompts, each with its hidden utility."""
    answers = {}  # name: rows of samples
    for name, folder in folders.items():
        with open(f"{folder}/samples.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        answers.setdefault("SFT", [row for row in rows if row["step"] == 0])
        answers[name] = [row for row in rows if row["step"] == rows[-1]["step"]]
    lines, width = [], max(map(len, answers))
    for i in range(count):
        lines += ["", answers["SFT"][i]["prompt"]]
        for name, rows in answers.items():
            utility = plots.utility(rows[i]["prompt"], rows[i]["response"])
            lines.append(f"  {name:{width}} ({utility:+.1f}) {rows[i]['response']}")
    return "\n".join(lines)


NEXT = """
Three things to try next:
  diff dpo.py ipo.py                     # what tells one loss from another
  python study.py --scale demo --list    # the commands that were just run, to run one by one
  README.md, "Seven lessons"             # each a command, and what to look for in its output"""


def main(args):
    toy, sizes = SCALES[args.scale]["tasks"] == ["toy"], SCALES[args.scale]["sizes"]
    if args.policy and len(args.policy) != len(sizes):
        plots.stop(f"--policy: {args.scale} needs {len(sizes)}, by size")
    jobs = args.jobs if args.jobs is not None else min(CORES, 8) if toy else 1
    if jobs < 1:
        plots.stop(f"--jobs {jobs} is out of range")
    stages, drawn = experiments(args)
    if args.list is not None:
        found = waves(stages)
        if not 0 <= args.list <= len(found):
            plots.stop(f"--list {args.list}: there are waves 1 to {len(found)}")
        for wave in [found[args.list - 1]] if args.list else found:
            for makes in wave:
                about = f"  # about {hours(stages[makes]):.1f} h" if args.scale == "gpu" else ""
                print(f"python {shlex.join(stages[makes])}{about}")
        if args.scale == "gpu":
            print(f"# about {sum(map(hours, stages.values())):.0f} hours in all on one H100: "
                  "reckoned, not measured")
        return
    run(stages, jobs, f"runs/{name_of(args)}")
    for (task, figure), runs in drawn.items():
        folder = f"runs/{name_of(args)}/figures" + (
            f"/{task}" if len(SCALES[args.scale]["tasks"]) > 1 else "")
        plots.main(plots.parse_args([*runs, "--figure", figure, "--out", f"{folder}/{figure}.png"]))
        if figure == "main":
            read = [plots.read_run(run) for run in runs]
            names = [f"{run['source']}, beta {run['beta']}" for run in read]
            result = "\n".join([table(dict(zip(names, read, strict=True))), "", at_equal_kl(*read),
                                examples(dict(zip(names, runs, strict=True))), ""])
            with open(f"{folder}/main.md", "w", encoding="utf-8") as f:
                f.write(result)
            print(f"\n{result}{NEXT}")


if __name__ == "__main__":
    main(parse_args())
