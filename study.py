"""The paper's experiments as commands over the other scripts: runs them, skips what is done, plots.

    python study.py --scale demo                  # toy data to a judged policy: table and figure
    python study.py --scale toy --jobs 2          # every figure, three seeds: hours on two cores
    python study.py --scale toy --only fig4       # one figure and what it needs
    python study.py --scale hard --jobs 2         # the main ones, of people whose taste is hard
    python study.py --scale worlds --jobs 2       # the main claim, everything drawn anew ten times
    python study.py --scale worlds --worlds 3 --only fig10 fig11 fig14  # policy sizes, in three
    python study.py --scale smol                  # the main claim on a real model: minutes, one GPU
    python study.py --scale gpu                   # the same on 0.5B and a real task: a night
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
from itertools import product

import numpy as np
from tqdm import tqdm

import plots

CORES = os.cpu_count() or 1
try:
    import fcntl
except ImportError:
    sys.exit("error: study.py needs Linux or macOS (fcntl); the other scripts run anywhere")


def figures(scale):
    """{figure: the runs that it draws}, each as the settings that `Study.train` takes.

    What a run does not say is the scale's own: IPO on D_golden. A list is an axis to cross.
    """
    seeds, betas, lrs, sizes = ([{setting: value} for value in scale[f"{setting}s"]]
                                for setting in ("seed", "beta", "lr", "size"))
    every = [{"every": steps} for steps in (*scale["every"], scale["steps"])]  # last: SFT's alone
    # IPO pulls h to 1 / (2 beta), the hinge stops at 1 / beta, DPO never stops: a beta of their own
    others = [{"loss": loss, "beta": beta} for loss in ("dpo", "slic") for beta in (0.1, 0.5)]
    low = {"beta": min(scale["betas"])}  # drifts furthest, so that order can matter
    long = {"steps": scale["long"]}  # its checkpoints are those of a short run, and more
    online, shuffled = {"pairs": "online"}, {"pairs": "shuffled", "window": 0}
    windows = [{"pairs": f"window{size}", "window": size} for size in (1, *scale["windows"])]
    # proxies of 1 / share of D_golden and so many steps; offline always has all of it. Each seed
    # has a proxy of its own, a draw: of other pairs, or of all of them in another order
    shares = scale.get("proxies", [(256, None), (16, None), (4, None), (1, None)])
    proxies = [online | {"seed": seed, "proxy": (share, steps, draw)}
               for share, steps in shares for draw, seed in enumerate(scale["seeds"])]
    sweep = each(seeds, betas, lrs, [long])
    fig1 = each(seeds, betas, [online]) + sweep
    fig4 = fig1 + each(seeds, betas, [shuffled])
    fig5 = fig1 + each(seeds, [{"pairs": "final-vs-final"}], betas)
    fig10 = each(sizes, seeds, [low], [online, shuffled]) + each(sizes, seeds, [low], lrs, [long])
    return {
        "main": each(betas, [online, long], seeds),
        "fig1": fig1, "fig4": fig4,
        "fig6": each(seeds, [{"policy": "online"}, {"policy": "offline"}]),  # to `Study.classify`
        "fig7": fig4, "fig8": fig4, "self": fig4, "gap": fig4, "utility": fig4, "logratio": fig4,
        "refresh": fig1 + each(every, seeds, betas, [online]),
        "fig9": each(seeds, [{"loss": "bo2"}], [online, shuffled, *lrs]),
        "fig13": each(seeds, [online | low]) + each(seeds, [low], [*windows, shuffled]),
        "tandem": each(seeds[:1], [low], [online, *windows[:2]]),
        "proxies": sweep + each(proxies, betas),
        "fig5": fig5,
        "fig12": fig5 + each([{"pairs": "sft-vs-early"}, {"pairs": "early-vs-final"}],
                             seeds, betas),
        "losses": each(seeds, others, [online, *lrs]),
        "worlds": each(seeds, betas, [online, long, shuffled]),
        "fig10": fig10, "fig11": fig10, "fig14": fig10}


def each(*axes):
    """Runs of every combination of one setting an axis; the last axis turns fastest."""
    return [{name: value for setting in settings for name, value in setting.items()}
            for settings in product(*axes)]


TOY = dict(
    tasks=["toy"], pairs=64_000, prompts=1024, seeds=[0, 1, 2],
    sizes={"-18k": dict(width=32, layers=1), "": {}, "-373k": dict(width=96, layers=3)},
    lengths=dict(max_prompt_tokens=32, max_response_tokens=64, tokens_per_microbatch=8192),
    sft=dict(steps=800, batch_size=64, lr=2e-3, warmup=20),
    gold=dict(kind="pointwise", steps=2000, batch_size=64, lr=1e-3, warmup=50),
    proxy=dict(kind="pointwise", steps=1200, batch_size=64, lr=1e-3, warmup=50),
    train=dict(batch_size=32, warmup=20, save_every=100), steps=400, long=1600, every=[4, 20, 100],
    lr=3e-4, lrs=[1e-4, 3e-4, 1e-3], beta=0.1, betas=[0.02, 0.1, 0.5], windows=[4, 40])
SCALES = {
    "demo": TOY | dict(
        figures=["main"], pairs=13_000, prompts=256, sizes={"": {}}, steps=120, long=120,
        evaluations=5, lr=6e-4, lrs=[6e-4], betas=[0.05], golden_steps=80,
        sft=TOY["sft"] | dict(steps=150, lr=3e-3),
        gold=TOY["gold"] | dict(steps=400, lr=7e-4, warmup=20, eval_every=100),
        proxy=TOY["proxy"] | dict(steps=200, lr=7e-4, warmup=20)),
    "toy": TOY,
    "hard": TOY | dict(  # fixed by classifiers' accuracies alone, before a policy: results/hard.md
        taste="hard", golden_size="-373k", proxy=TOY["proxy"] | dict(steps=120),
        proxies=[(1, None), (1, TOY["proxy"]["steps"])],
        figures=["fig1", "fig4", "fig6", "fig7", "fig8", "self", "gap", "utility", "logratio",
                 "fig9", "fig13", "proxies"]),
    "worlds": TOY | dict(  # everything drawn anew, ten times; fixed before: results/worlds.md
        worlds=range(1, 11), figures=["worlds"], prompts=512, seeds=[0],
        betas=[0.02, 0.03, 0.05, 0.1, 0.2]),
    "gpu": dict(  # a night on one GPU of 80 GB, by estimate: no run of it was made
        tasks=["helpful"], seeds=[0, 1, 2], sizes={"": {}}, pairs=43_000, prompts=512,
        windows=[4, 100], every=[4, 20, 100], policy=["Qwen/Qwen2.5-0.5B"],
        golden="Qwen/Qwen2.5-1.5B", figures=["fig1", "fig4", "fig6", "fig7", "fig8"],
        lengths=dict(max_prompt_tokens=384, max_response_tokens=128),
        sft=dict(steps=600, batch_size=64, lr=1e-5),
        gold=dict(steps=3000, batch_size=32, lr=1e-5, warmup=100),
        proxy=dict(steps=1500, batch_size=32, lr=1e-5, warmup=100),
        train=dict(batch_size=32), steps=800, long=800,
        lr=3e-6, lrs=[3e-6], beta=0.1, betas=[0.1, 0.5]),
    "smol": dict(  # a real model, in seven minutes on one GPU by estimate: no run of it was made
        tasks=["helpful"], seeds=[0], sizes={"": {}}, pairs=2_000, prompts=256, windows=[],
        every=[], policy=["HuggingFaceTB/SmolLM2-135M-Instruct"],
        golden="HuggingFaceTB/SmolLM2-135M-Instruct", figures=["fig1"], evaluations=2,
        lengths=dict(max_prompt_tokens=128, max_response_tokens=64),
        sft=dict(steps=100, batch_size=32, lr=1e-5, warmup=10),
        gold=dict(kind="pointwise", steps=200, batch_size=32, lr=3e-5, warmup=20, eval_every=100),
        proxy=dict(kind="pointwise", steps=150, batch_size=32, lr=3e-5, warmup=20, eval_every=75),
        train=dict(batch_size=32, warmup=10), steps=100, long=200, golden_steps=50,
        lr=1e-5, lrs=[1e-5], beta=0.1, betas=[0.1, 0.5]),
    "paper": dict(  # its hyper-parameters (section 4, appendix A); models are flags
        policy=["Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-3B"],
        golden="Qwen/Qwen2.5-7B", tasks=["tldr", "helpful", "harmless", "arena"], seeds=[0],
        sizes={"": {}, "-2": dict(train=dict(batch_size=16), sft=dict(steps=8000, lr=1e-5)),
               "-3": dict(train=dict(batch_size=8), sft=dict(steps=8000, lr=1e-5))},
        pairs=90_000, prompts=2048,
        lengths=dict(max_prompt_tokens=896, max_response_tokens=128),
        sft=dict(steps=4000, batch_size=128, lr=3e-5),
        gold=dict(steps=20_000, batch_size=16, lr=1e-4, warmup=1000),
        proxy=dict(steps=20_000, batch_size=32, lr=1e-4, warmup=1000),
        train=dict(batch_size=32), steps=4000, long=20_000, every=[4, 20, 100, 500],
        lr=1e-5, lrs=[3e-6, 1e-5, 3e-5], beta=0.1, betas=[0.1, 0.5, 1.0], windows=[4, 500])}
EXPERIMENTS = list(figures(TOY))


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--scale", choices=SCALES, default="demo", help="how large")
    p.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="FIGURE",
                   help=f"some of: {', '.join(EXPERIMENTS)} (default: all; demo: main)")
    p.add_argument("--jobs", type=int, help="commands at once, which share the cores (default: as "
                   "many as cores, at most 8; gpu, paper: 1)")
    p.add_argument("--seed", type=int, default=0, help="another draw of everything")
    p.add_argument("--worlds", type=int, help="of --scale worlds the first so many")
    p.add_argument("--list", type=int, nargs="?", const=0, metavar="WAVE",
                   help="print the commands, or those of one wave, and run nothing")
    p.add_argument("--policy", nargs="+", metavar="MODEL", help="all but toy: policies by size "
                   "(default: Qwen/Qwen2.5-0.5B, paper: also -1.5B and -3B, smol: SmolLM2-135M)")
    p.add_argument("--golden", metavar="MODEL", help="the golden model's backbone, of "
                   "the policies' tokenizer (default: Qwen/Qwen2.5-1.5B, paper: -7B, smol: theirs)")
    p.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # a rehearsal: few and small ones
    return p.parse_args(argv)


def scale_of(args, world=None):
    """The settings of args.scale, by the flags: with --steps few steps of two rows, a rehearsal.

    A world is a draw of everything, data included, in a folder of its own.
    """
    scale = SCALES[args.scale]
    if args.steps:
        short = {kind: scale[kind] | dict(steps=args.steps, batch_size=2)
                 for kind in ("sft", "gold", "proxy")}
        scale = scale | short | dict(
            seeds=[0], betas=[scale["beta"]], steps=args.steps, long=args.steps, prompts=4,
            golden_steps=args.steps, evaluations=1, train=scale["train"] | dict(batch_size=2))
    name = args.scale + (f"-s{args.seed}" if args.seed else "")
    name, seed = (name, args.seed) if world is None else (f"{name}/{world}", args.seed + world)
    folders = {task: f"{name}/{task}" if len(scale["tasks"]) > 1 else name
               for task in scale["tasks"]}  # in data/ and runs/
    return scale | dict(
        name=name, folders=folders, seed=seed, seeds=[seed + x for x in scale["seeds"]],
        policy=args.policy or scale.get("policy"), golden=args.golden or scale.get("golden"))


class Study:
    """The commands of one task in dependency order; what is asked for twice is there once."""

    def __init__(self, scale, task, stages):
        """Data, SFT, golden and proxy models, D_golden, the golden policy and its responses."""
        self.scale, self.toy, self.stages = scale, task == "toy", stages
        self.data, self.runs = (f"{top}/{scale['folders'][task]}" for top in ("data", "runs"))
        sft, initial = self.sft(), f"{self.data}/initial.jsonl"
        backbone = self.sft(scale.get("golden_size", "")) if self.toy else scale["golden"]
        self.gold = self.add("reward.py", "train", resume=True, out=f"{self.runs}/gold",
                             model=backbone, data=initial, **scale["gold"])
        self.d_golden = self.add("reward.py", "label", model=self.gold, data=initial,
                                 out=f"{self.data}/golden.jsonl")
        policy = self.add("online_rlhf.py", loss="ipo", model=sft, labeller=self.gold,
                          prompts=initial, resume=True, lr=scale["lr"],
                          out=f"{self.runs}/golden-policy",
                          steps=scale.get("golden_steps", scale["steps"]), beta=scale["beta"],
                          **scale["train"])
        self.proxy()
        self.baseline = self.add("gold_eval.py", "sample", model=policy, data=self.d_golden,
                                 out=f"{self.data}/golden-policy-baseline.jsonl",
                                 prompts=scale["prompts"])

    def add(self, script, *words, **flags):
        """One command, of its flags those that are not None; returns what it makes, its --out."""
        words, out = [script, *words], flags["out"]
        if script != "tasks.py":
            flags |= self.scale["lengths"]
        flags = {name: value for name, value in flags.items() if value is not None}
        if self.scale["seed"] and "label" not in words:
            flags.setdefault("seed", self.scale["seed"])
        for name, value in flags.items():
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words += map(str, value if isinstance(value, list) else [value])
        last = "initial.jsonl" if script == "tasks.py" else "final"  # shows a folder done
        self.stages.setdefault(out if out.endswith(".jsonl") else f"{out}/{last}", words)
        return out

    def sft(self, size=""):
        """The SFT policy of a size, on the pairs of all tasks; returns its run folder."""
        s, own = self.scale, self.scale["sizes"][size]
        if self.toy:  # a base of this size, and with it the same pairs once more
            folder = self.add("tasks.py", "toy", out=self.data + size.replace("-", "/"),
                              **own, pairs=s["pairs"], taste=s.get("taste"))
            model, folders = f"{folder}/base", [self.data]
        else:
            model = s["policy"][list(s["sizes"]).index(size)]
            folders = [self.add("tasks.py", task, out=f"data/{folder}", text=True)
                       for task, folder in s["folders"].items()]
        return self.add("sft.py", model=model, data=[f"{x}/initial.jsonl" for x in folders],
                        out=f"runs/{s['name']}/sft{size}", resume=True,
                        **s["sft"] | own.get("sft", {}))

    def proxy(self, share=1, steps=None, draw=0):
        """A preference model of the policy's size, on one in `share` of the golden labels."""
        s, pairs, data = self.scale, self.scale["pairs"] // share, self.d_golden
        name = "proxy" + (f"-{pairs}pairs" if share > 1 else "")
        name += (f"-{steps}steps" if steps else "") + (f"-draw{draw}" if draw else "")
        if share > 1:
            data = self.add("tasks.py", "file", file=self.d_golden, pairs=pairs,
                            out=f"{self.data}/{name}", skip=draw * pairs or None) + "/initial.jsonl"
        return self.add("reward.py", "train", model=self.sft(), data=data,
                        out=f"{self.runs}/{name}", resume=True,
                        **s["proxy"] | dict(steps=steps or s["proxy"]["steps"]),
                        seed=s["seeds"][draw] if draw else None)

    def train(self, seed, pairs="", loss="ipo", beta=None, lr=None, size="", steps=None,
              window=None, every=1, proxy=()):
        """A training run, judged along the way against the golden policy; returns its folder.

        Its `pairs` are those of D_golden where it names none, its own ("online"), two policies'
        ("sft-vs-early") or, with a window (0: all shuffled, 1: in order), its online twin's stream.
        """
        s, online = self.scale, pairs == "online"
        beta, lr = None if loss == "bo2" else beta or s["beta"], lr or s["lr"]
        strength = f"-b{beta}" if beta else ""
        if online:
            labeller = self.proxy(*proxy)
            flags = dict(loss=loss, lr=lr, labeller=labeller, prompts=self.d_golden,
                         refresh_every=every if every > 1 else None)
            name = f"online-{loss}{strength}" + labeller.removeprefix(f"{self.runs}/proxy")
            name += (f"-{steps}steps" if steps else "") + (f"-every{every}" if every > 1 else "")
        else:
            data = self.of_two(pairs, seed) if "-vs-" in pairs else self.d_golden
            if window is not None:
                data = self.train(seed, "online", loss, beta, size=size) + "/stream.jsonl"
            flags = dict(lr=lr, data=data, shuffle_window=window)
            name = (f"{loss}-{pairs}" if pairs else loss) + f"{strength}-lr{lr}"
        steps = steps or s["steps"]
        often = s.get("evaluations", 16 if steps > s["steps"] else 8)
        return self.add("online_rlhf.py" if online else f"{loss}.py", model=self.sft(size),
                        out=f"{self.runs}/{name}{size}-s{seed}", seed=seed, steps=steps, **flags,
                        beta=beta, eval_data=self.d_golden, gold=self.gold, baseline=self.baseline,
                        eval_every=max(1, steps // often), resume=True, **s["lengths"],
                        **s["train"] | s["sizes"][size].get("train", {}))

    def of_two(self, pairs, seed):
        """Pairs sampled from two policies and labelled by the golden model; returns their file."""
        s, early = self.scale, self.scale["steps"] // 5
        found = {"sft": self.sft(), "early": self.train(seed, "online", steps=early),
                 "final": self.train(seed, "online")}
        model, other = (found[policy] for policy in pairs.split("-vs-"))
        return self.add("gold_eval.py", "sample", model=model, other=other, gold=self.gold,
                        data=self.d_golden, out=f"{self.data}/{pairs}-s{seed}.jsonl", seed=seed,
                        prompts=s["steps"] * s["train"]["batch_size"])

    def classify(self, seed, policy):
        """Agreement of the proxy, an online or an offline run with the golden model on D_online."""
        online, offline = self.train(seed, "online"), self.train(seed, steps=self.scale["long"])
        return self.add("gold_eval.py", "classify", model=online if policy == "online" else offline,
                        out=f"{self.runs}/classify-{policy}-s{seed}.jsonl", reference=self.sft(),
                        gold=self.gold, data=f"{online}/stream.jsonl")


def experiments(args):
    """({path: its command}, in dependency order; {(task, figure): what it draws})."""
    stages, drawn = {}, {}
    for world in SCALES[args.scale].get("worlds", [None])[:args.worlds]:
        scale = scale_of(args, world)
        chosen = args.only or scale.get("figures", [n for n in EXPERIMENTS if n != "main"])
        for task in scale["tasks"]:
            study, runs = Study(scale, task, stages), figures(scale)
            for figure in chosen:
                make = study.classify if figure == "fig6" else study.train
                drawn.setdefault((task, figure), []).extend(
                    make(**settings) for settings in runs[figure])
    return stages, drawn


def main(args):
    scale, sizes = SCALES[args.scale], len(SCALES[args.scale]["sizes"])
    if args.policy and len(args.policy) != sizes:
        plots.stop(f"--policy: {args.scale} needs {sizes}, by size")
    jobs = args.jobs if args.jobs is not None else min(CORES, 8) if "toy" in scale["tasks"] else 1
    for name, value in (("jobs", jobs), ("worlds", args.worlds)):
        if value is not None and value < 1:
            plots.stop(f"--{name} {value} is out of range")
    stages, drawn = experiments(args)
    if args.list is not None:
        found = waves(stages)
        if not 0 <= args.list <= len(found):
            plots.stop(f"--list {args.list}: there are waves 1 to {len(found)}")
        for makes in found[args.list - 1] if args.list else sum(found, []):
            about = f"  # about {hours(stages[makes]):.1f} h" if args.scale == "gpu" else ""
            print(f"python {shlex.join(stages[makes])}{about}")
        if args.scale == "gpu":
            print(f"# about {sum(map(hours, stages.values())):.0f} hours in all on one H100: "
                  "reckoned, not measured")
        return
    folder = f"runs/{scale_of(args)['name']}"
    run(stages, jobs, folder)
    for (task, figure), runs in drawn.items():
        out = f"{folder}/figures" + (f"/{task}" if len(scale["tasks"]) > 1 else "")
        plots.main(plots.parse_args([*runs, "--figure", figure, "--out", f"{out}/{figure}.png"]))
        if figure == "main" and task == "toy":  # whose responses have a utility
            result = summary(runs)
            with open(f"{out}/main.md", "w", encoding="utf-8") as f:
                f.write(result)
            print(f"\n{result}{NEXT}")


# ---- machinery: what needs what, processes, the demo's words -------------------------------------
ABOUT = {  # what a command is for, by the name of what it makes, or its script
    "gold": "learns which response people prefer, and then stands for people",
    "golden.jsonl": "the pairs with the golden model's labels (D_golden): what all learn from",
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
                                env=env, pass_fds=[lock.fileno()])  # an orphan holds the lock


def hours(words):
    """About how long a command of --scale gpu takes on one H100: reckoned, not yet measured."""
    steps, made = int(value_of(words, "--steps", 0)), {"sample": 60, "classify": 300}
    step = {"online_rlhf.py": 3, "sft.py": 1.5, "reward.py": 1}.get(words[0], 0.8)
    judged = 1 + steps // int(value_of(words, "--eval-every", 1)) if "--gold" in words else 0
    return (60 + step * steps + 60 * judged + made.get(words[1], 1200 * ("label" in words))) / 3600


def run(stages, jobs, folder):
    """Run the stages, `jobs` at once, each when what it reads is made; stop at a failure."""
    os.makedirs(f"{folder}/logs", exist_ok=True)
    outs = {makes: value_of(words, "--out") for makes, words in stages.items()}
    logs = {makes: f"{folder}/logs/{out.replace('/', '-')}.log" if jobs > 1 else None
            for makes, out in outs.items()}
    costs = {makes: 60 + int(value_of(words, "--steps", 60)) * (  # about, in steps offline
        4 if words[0] == "online_rlhf.py" else 1) for makes, words in stages.items()}
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
        total = sum(costs[makes] for makes in todo)
        bar = tqdm(total=total, disable=not sys.stderr.isatty(), smoothing=0, bar_format=
                   "{percentage:3.0f}% |{bar}| {elapsed} gone, about {remaining} left")
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            while todo or running:
                for makes in todo:
                    if len(running) < jobs and not read[makes] & {*todo, *running}:
                        words, began[makes] = stages[makes], time.perf_counter()
                        about = ABOUT.get(os.path.basename(outs[makes]), ABOUT.get(words[0], ""))
                        bar.write(f"{outs[makes]}: {about}", sys.stdout)
                        running[makes] = start(words, threads[makes], lock, logs[makes])
                todo = [makes for makes in todo if makes not in running]
                time.sleep(0.05)
                for makes in [m for m in running if running[m].poll() is not None]:
                    if status := running.pop(makes).returncode:
                        log = f"; see {logs[makes]}" if logs[makes] else ""
                        print(f"error: `python {shlex.join(stages[makes])}` ended with status "
                              f"{status}{log}", file=sys.stderr)
                        raise SystemExit(status if status > 0 else 128 - status)
                    bar.update(costs[makes])
                    left, now = [*todo, *running], time.perf_counter()
                    ahead = sum(costs[m] for m in left)
                    bar.write(f"[{len(stages) - len(left)}/{len(stages)}] {outs[makes]} made in "
                              f"{now - began[makes]:.0f} s; about "
                              f"{(now - first) * ahead / (total - ahead) / 60:.1f} minutes left",
                              sys.stdout)
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:  # what still runs saves and stops
            for child in running.values():
                child.terminate()
            for child in running.values():
                child.wait()
            bar.close()


def summary(folders):
    """What the demo says at its end: a table, who wins at equal KL, and answers of first seeds."""
    runs = [plots.read_run(folder) | {"folder": folder} for folder in folders]
    sides = {f"{source}, beta {beta}": some for (source, beta), some in plots.grouped(
        runs, "source", "beta").items()}
    said = [at_equal_kl(*plots.grouped(some, "source").values())
            for some in plots.grouped(runs, "beta").values()]
    shown = {name: some[0]["folder"] for name, some in sides.items()}
    return "\n".join([table(sides), "", *said, examples(shown), ""])


def table(sides):
    """A Markdown table of SFT and {name: its runs}: a measure's mean, lowest and highest run."""
    columns = {"win rate against the golden policy": "gold/win_rate", "KL to SFT": "gold/kl",
               "hidden utility": "toy/utility", "accuracy on D_golden": "gold/accuracy_golden",
               "tokens a response": "gold/response_length"}
    lines = ["| policy | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows = {"SFT, where all start": [run["start"][0] for runs in sides.values() for run in runs]}
    for name, some in (rows | {name: [run["rows"][-1] for run in runs]
                               for name, runs in sides.items()}).items():
        values = [[row[key] for row in some] for key in columns.values()]
        lines.append(f"| {name} | " + " | ".join(
            f"{np.mean(x):.2f} ({min(x):.2f} to {max(x):.2f})" for x in values) + " |")
    return "\n".join(lines)


def at_equal_kl(online, offline):
    """A sentence on how much more online wins than offline where both sides have policies.

    Along the lines of the figure, from where all runs have a checkpoint to where the last but one
    run of a side ends: means over the seeds that get there, each joined from SFT on.
    """
    kls = [[sorted(row["gold/kl"] for row in run["rows"]) for run in runs]
           for runs in (online, offline)]
    low = max(some[0] for side in kls for some in side)
    high = min(sorted(some[-1] for some in side)[-2:][0] for side in kls)
    if low >= high:
        return "Online and offline did not drift equally far: they cannot be compared."
    first, second = (np.nanmean(plots.ways_at(runs, np.linspace(low, high, 200)), 0)
                     for runs in (online, offline))
    return (f"Where both have policies (KL {low:.1f} to {high:.1f}) online wins {first.mean():.0%} "
            f"on average and offline {second.mean():.0%} ({(first - second).mean():+.2f}); at the "
            f"highest {first[-1]:.0%} and {second[-1]:.0%} ({first[-1] - second[-1]:+.2f}).")


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


if __name__ == "__main__":
    main(parse_args())
