"""Draw the paper's figures from run folders, each with the numbers it shows as CSV.

    python plots.py runs/demo/online-* runs/demo/ipo-* --out win_rate_kl.png
    python plots.py runs/toy/online-ipo-b* runs/toy/ipo-b* --figure fig7 --out fig7.png
    python plots.py results/easy/fig4-checkpoints.csv --figure gap --out gap.png

Reads args.json, metrics.jsonl and samples.jsonl, or the checkpoints that it wrote itself. A group
is what shares a source of responses, a loss, a model and a labeller; it pools hyper-parameters and
seeds. In a figure over KL a point is a checkpoint of a run. A line is the mean over seeds of their
frontiers, where every seed has one, the band their lowest and highest. A frontier is made of the
settings (hyper-parameters and step) that do best **on the other seeds**, and drawn through this
seed's checkpoints of them (the large points): the best of many noisy values is too good, the more
so the more there are, but what is chosen on one seed and judged on another is not. Between two
large points it is what a mixture reaches, which answers with one or the other by chance, at no more
than the KL drawn (KL is convex); no single policy may have been there. Of a single run the line is
its way from checkpoint to checkpoint.

MIT licence.
"""

import argparse
import csv
import json
import os
import re
import sys
from functools import partial
from itertools import cycle, product

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tasks import WISH, utility

COLOURS = {"online": "#0072B2", "offline": "#D55E00", "shuffled": "#009E73", "in order": "#CC79A7",
           "windows of 4": "#E69F00", "windows of 40": "#56B4E9", "windows of 500": "#56B4E9",
           "final vs final": "#E69F00", "sft vs early": "#56B4E9", "early vs final": "#CC79A7",
           "proxy": "#000000"}  # Okabe and Ito: told apart by colour-blind readers too
PROXIES = ["#0072B2", "#CC79A7", "#009E73", "#000000"]  # online, where there are several
REFRESHED = ["#56B4E9", "#009E73", "#E69F00", "#CC79A7"]  # every K steps, by rising K
DASHES = {"ipo": "-", "dpo": "--", "slic": "-.", "bo2": ":"}
LABELS = {
    "gold/win_rate": "win rate against the golden policy",
    "toy/utility": "hidden utility of a response, mean",
    "gold/accuracy_golden": "accuracy on D_golden", "gold/accuracy_self": "accuracy on own samples",
    "gold/chosen_logratio": "mean log-ratio of chosen, D_golden",
}
NAMES = {"ipo": "IPO", "dpo": "DPO", "slic": "SLiC", "bo2": "Bo2"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders, or files of checkpoints that this script "
                   "wrote (fig6: files of gold_eval.py classify)")
    p.add_argument("--figure", choices=FIGURES, default="main", help="which figure to draw")
    p.add_argument("--out", default="win_rate_kl.png", help="figure to write (png, pdf, svg)")
    p.add_argument("--title", default="", help="title instead of the figure's own")
    return p.parse_args(argv)


def stop(message, status=2):
    """Print one line on stderr and exit; status 2 says that the user's input is at fault."""
    print("error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(status)


# ---- runs ----------------------------------------------------------------------------------------

GROUP = "source", "loss", "model", "proxy"  # what the runs of a group share
SETTINGS = *GROUP, "seed", "beta", "lr", "proxy_accuracy"


def source_of(args):
    """Where a run's responses come from, in the words of the legend."""
    if args["script"] == "online_rlhf.py":
        every = args.get("refresh_every", 1)
        return f"every {every} steps" if every > 1 else "online"
    name = os.path.basename(args["data"])
    if name.startswith("stream.jsonl"):
        window = args["shuffle_window"]
        if args["order"] == "kept" or window == 1:
            return "in order"
        return f"windows of {window}" if window else "shuffled"
    if "-vs-" in name:
        return " ".join(name.removesuffix(".jsonl").split("-")[:3])
    return "offline"


def toy_utility(folder):
    """{step: (mean, standard error)} of the hidden utility of a run's samples; toy prompts only."""
    values = {}
    if os.path.exists(f"{folder}/samples.jsonl"):
        with open(f"{folder}/samples.jsonl", encoding="utf-8") as f:
            for row in (json.loads(line) for line in f if line.endswith("\n")):
                if WISH.search(row["prompt"]):
                    values.setdefault(row["step"], []).append(
                        utility(row["prompt"], row["response"]))
    return {step: (np.mean(v), np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else np.nan)
            for step, v in values.items()}


def proxy_of(labeller):
    """A preference model's name, of any draw, and accuracy, if that was of 100 pairs or more."""
    name, accuracy = re.sub(r"-draw\d+$", "", os.path.basename(labeller.rstrip("/"))), ""
    if os.path.exists(f"{labeller}/assessment.json"):
        with open(f"{labeller}/assessment.json", encoding="utf-8") as f:
            found = json.load(f)
        if found.get("pairs", 100) >= 100:
            accuracy = f"{found['accuracy']:.3f}"
    return {"proxy": name, "proxy_accuracy": accuracy}


def read_run(folder):
    """A run as its name, settings and rows.

    `steps` has all rows of training, `rows` the judged among them, `start` that of step 0, if any.
    A judged row's "step_seconds" is the mean over the steps up to it.
    """
    try:
        with open(f"{folder}/args.json", encoding="utf-8") as f:
            args = json.load(f)
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as f:
            steps = [json.loads(line) for line in f if line.endswith("\n")]
    except (OSError, ValueError) as e:
        stop(f"{folder} is not a run folder: {e}")
    rows, hidden = [row for row in steps if "gold/win_rate" in row], toy_utility(folder)
    if not any(row["step"] for row in rows):
        stop(f"{folder}/metrics.jsonl holds no gold evaluation of a trained policy; train with "
             "--gold and --baseline")
    for row in rows:
        if took := [r["seconds"] for r in steps if "seconds" in r and r["step"] <= row["step"]]:
            row["step_seconds"] = np.mean(took)
        if row["step"] in hidden:
            row["toy/utility"], row["toy/utility_se"] = hidden[row["step"]]
    loss = args.get("loss") or args["script"].removesuffix(".py")
    return {"name": os.path.basename(os.path.normpath(folder)), "source": source_of(args),
            "loss": loss, "seed": args["seed"], "lr": args.get("lr"),
            "beta": None if loss == "bo2" else args.get("beta"),  # it has none
            "model": os.path.basename(os.path.normpath(args.get("model", ""))),
            **proxy_of(args.get("labeller", "")),
            "rows": [row for row in rows if row["step"]], "steps": [r for r in steps if r["step"]],
            "start": [row for row in rows if not row["step"]]}


def read_checkpoints(path):
    """The runs of a file of checkpoints; they have no rows but the judged ones."""
    runs = {}
    try:
        with open(path, newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                if "proxy_accuracy" not in row:  # an older file has it behind the name
                    row["proxy"], _, found = row["proxy"].partition(" (")
                    row["proxy_accuracy"] = found.removesuffix(")")
                run = runs.setdefault(row["run"], {"name": row["run"], "rows": [], "start": []} | {
                    k: int(row[k]) if k == "seed" else row[k] for k in SETTINGS})
                run["rows" if int(row["step"]) else "start"].append(
                    {k: float(v) for k, v in row.items()
                     if v and k.startswith(("gold/", "toy/", "step"))}
                    | {k: row[k] for k in ["outcomes"] if row.get(k)} | {"step": int(row["step"])})
    except (OSError, ValueError, KeyError) as e:
        stop(f"{path} is no file of checkpoints: {e!r}")
    return list(runs.values())


def grouped(runs, *keys):
    """{what runs share under `keys` (default: GROUP): the runs}, in order of first appearance."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys or GROUP), []).append(run)
    return groups


def legend(group, groups):
    """A group's name: its source and what tells it from the others of the figure, {group: runs}."""
    source, loss, _, proxy = group
    words = [source]
    if len({g[1] for g in groups}) > 1:
        words.append(NAMES.get(loss, loss))
    if source == "online" and len({g[3] for g in groups if g[0] == "online"}) > 1:
        words.append(f"by {proxy}")
        found = {run["proxy_accuracy"] for run in groups[group]} - {""}
        words += [f"({' to '.join(sorted({min(found), max(found)}))})"] if found else []
    return " ".join(words)


def colour_of(group, groups):
    """A colour a source; each of several proxies, and of several K, has its own."""
    proxies = [g[3] for g in groups if g[0] == "online"]
    if group[0] == "online" and len(set(proxies)) > 1:
        return PROXIES[list(dict.fromkeys(proxies)).index(group[3]) % 4]
    if group[0].startswith("every "):
        rank = sorted({int(g[0].split()[1]) for g in groups if g[0].startswith("every ")})
        return REFRESHED[rank.index(int(group[0].split()[1])) % 4]
    return COLOURS.get(group[0], "0.5")


def shapes_of(values):
    """{value: marker}, in order, so that it means the same in every figure of the same values."""
    return dict(zip(sorted(set(values), key=str), cycle("os^Dvp"), strict=False))


# ---- frontiers -----------------------------------------------------------------------------------


def checkpoints_of(runs, measure="gold/win_rate"):
    """{setting: (KL, value)} of the judged checkpoints of one seed's runs."""
    points = {}
    for run in runs:
        for row in run["rows"]:
            at = run["beta"], run["lr"], row["step"]
            while at in points:  # two runs of one setting, on other data say
                at += ("again",)
            if row["gold/kl"] > 0:
                points[at] = row["gold/kl"], row[measure]
    return points


def hull(points):
    """Settings of {setting: (KL, value)} on the upper concave hull, from low to high KL.

    It starts at the lowest KL and goes on to where the way is steepest.
    """
    found = [min(points, key=lambda at: (points[at][0], -points[at][1]))]
    while True:
        kl, value = points[found[-1]]
        slopes = {at: ((y - value) / (x - kl), x) for at, (x, y) in points.items() if x > kl}
        if not slopes:
            return found
        found.append(max(slopes, key=slopes.get))  # of equal slopes the farthest


def held_out(runs, measure="gold/win_rate"):
    """A list of (own, others) a seed: {setting: (KL, value)}, its own and the other seeds' means.

    What is chosen by the others and judged by its own does not feed on the noise it is judged by.
    """
    found = [checkpoints_of(some, measure) for _, some in sorted(grouped(runs, "seed").items())]
    pairs = []
    for own in filter(None, found):
        rest = [points for points in found if points is not own]
        others = {at: tuple(np.mean([points[at] for points in rest if at in points], 0))
                  for at in own if any(at in points for points in rest)}
        pairs.append((own, others or own))  # no seed besides, or none of these settings
    return pairs


def mixtures(own, others, log_kls):
    """The settings S on the hull of `others`, and the shares (S, G) of their checkpoints in a
    seed's frontier at log KLs (G,); NaN outside the KL that they reach."""
    chosen = sorted(hull(others), key=own.get)
    kls = [own[at][0] for at in chosen]
    return chosen, np.array([np.interp(np.exp(log_kls), kls, one, left=np.nan, right=np.nan)
                             for one in np.eye(len(kls))])


def frontiers(runs, log_kls, measure="gold/win_rate"):
    """Each seed's frontier (seeds, G) at log KLs (G,), NaN outside the KL that it reaches.

    It runs through the seed's checkpoints of the settings on the hull of the others' means.
    """
    lines = []
    for own, others in held_out(runs, measure):
        chosen, shares = mixtures(own, others, log_kls)
        lines.append([own[at][1] for at in chosen] @ shares)
    return np.array(lines)


def best_within(runs, kl):
    """(KL, win rate) of the best single checkpoint of at most this KL, as means over seeds."""
    found = []
    for own, others in held_out(runs):
        within = [at for at in others if others[at][0] <= kl]
        found.append(own[max(within, key=lambda at: others[at][1])] if within else (np.nan,) * 2)
    return np.mean(found, 0)


T_975 = (np.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student, 97.5%


def interval(values):
    """(mean, low, high), each (...), of held-out values (seeds, ...): 95% over training seeds.

    Student's t of as few seeds as there are. Their values are not independent, since the settings
    of each were chosen on the others, so that the variance of the mean is not s^2 / n but
    s^2 (1 / n + 1 / (n - 1)) (Nadeau and Bengio 2003, with one part of n held out). What was not
    drawn again is not in it: golden model, data, prompts, and, but in figure proxies, the proxy.
    """
    n = len(values)
    t = T_975[n - 1] if n <= len(T_975) else 1.96
    with np.errstate(all="ignore"):  # of one seed: NaN
        half = t * values.std(0, ddof=min(1, n - 1)) * (1 / n + 1 / max(n - 1, 1)) ** 0.5
    return values.mean(0), values.mean(0) - half, values.mean(0) + half


def by_prompt(runs, log_kls):
    """`frontiers` prompt by prompt, as means over seeds (prompts, G): how often each is won.

    A frontier is linear in its checkpoints' outcomes, so that these average to the frontiers' mean.
    """
    lines = []
    seeds = [some for _, some in sorted(grouped(runs, "seed").items()) if checkpoints_of(some)]
    for some, (own, others) in zip(seeds, held_out(runs), strict=True):
        chosen, shares = mixtures(own, others, log_kls)
        points = checkpoints_of(some, "outcomes")
        won = [np.frombuffer(points[at][1].encode(), np.uint8) - 48 for at in chosen]  # 0, 1, 2
        lines.append(np.array(won).T / 2 @ shares)
    return np.mean(lines, 0)


def over_prompts(gaps, draws=1000):
    """(low, high) of the means of each prompt's gaps (prompts, G): a bootstrap, 95% over prompts.

    Both sides answered the same prompts and a prompt is drawn with both: what makes it hard for
    both cancels. The checkpoints stay, though they were chosen on these prompts: it says how these
    would do on other prompts, not what other runs would do.
    """
    n = len(gaps)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)
    return np.quantile(counts @ gaps / n, [0.025, 0.975], axis=0)


def matched_gap(first, second, kls):
    """Win rate of `first` minus `second` at equal KL, by the frontiers of the seeds they share.

    Returns {"kl": (first, second, gap, low, high, low, high)} where all seeds have values, with 95%
    intervals, first over seeds, then over prompts (NaN where outcomes were not kept, or of unlike
    numbers of prompts; of unlike prompts they mean nothing); KL "mean" is over the log KL that all
    frontiers cover.
    """
    shared = {r["seed"] for r in first} & {r["seed"] for r in second}
    sides = [[r for r in runs if r["seed"] in shared] for runs in (first, second)]
    if not shared:
        return {}
    reached = [row["gold/kl"] for runs in sides for r in runs for row in r["rows"]]
    even = np.linspace(np.log(max(min(reached), 1e-3)), np.log(max(reached)), 200)
    at = np.concatenate([np.log(kls), even])
    lines = np.array([frontiers(runs, at) for runs in sides])  # (2, seeds, KLs)
    covered = ~np.isnan(lines).any((0, 1))
    where = {kl: [i] for i, kl in enumerate(kls) if covered[i]}
    covered[:len(kls)] = False  # what is left is even in log KL
    if covered.any():
        where["mean"] = np.flatnonzero(covered)
    ends = np.full((2, len(where)), np.nan)
    prompts = {len(row.get("outcomes", "")) for runs in sides for r in runs for row in r["rows"]}
    if where and len(prompts) == 1 and prompts != {0}:
        gaps = by_prompt(sides[0], at) - by_prompt(sides[1], at)  # (prompts, KLs)
        ends = over_prompts(np.stack([gaps[:, some].mean(1) for some in where.values()], 1))
    found = {}
    for (kl, some), over in zip(where.items(), ends.T, strict=True):
        one, other = lines[:, :, some].mean(2)
        found[kl] = one.mean(), other.mean(), *interval(one - other), *over
    return found


# ---- panels: each is drawn on its axes and yields what it shows as rows for a CSV ----------------


def band(axes, name, x, values, row, **style):
    """A line of the means of `values` (seeds, X) over `x`, a band from the lowest to the highest.

    Returns `row` with `name`, mean, low and high for every x at which all seeds have a value.
    """
    mean, low, high = values.mean(0), values.min(0), values.max(0)
    axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return [row | {name: x[i], "mean": mean[i], "low": low[i], "high": high[i]}
            for i in np.flatnonzero(~np.isnan(mean))]


def ways(axes, runs):
    """Each run's way from SFT, checkpoint by checkpoint, with standard errors."""
    groups, shapes = grouped(runs), shapes_of(r["beta"] for r in runs)
    lines = dict(zip(reversed(shapes), cycle(("-", "--", ":")), strict=False))  # solid: the largest
    for run in runs:
        group = tuple(run[key] for key in GROUP)
        rows, name = run["start"] + run["rows"], legend(group, groups)
        x, y, xerr, yerr = ([row[key] for row in rows] for key in (
            "gold/kl", "gold/win_rate", "gold/kl_se", "gold/win_rate_se"))
        axes.errorbar(x, y, yerr, xerr, shapes[run["beta"]] + lines[run["beta"]], markersize=4.5,
                      elinewidth=0.8, color=colour_of(group, groups), alpha=0.9,
                      label=name if run["beta"] is None else f"{name}, beta {run['beta']}")
        yield from ({"run": run["name"], "kl": kl, "mean": v} for kl, v in zip(x, y, strict=True))
    axes.set(xlabel="KL(policy, SFT) in nats a response", ylabel=LABELS["gold/win_rate"])


def log_kl(axes, ylabel):
    axes.set(xlabel="KL(policy, SFT) in nats a response, log scale", ylabel=ylabel, xscale="log")
    axes.xaxis.set(major_locator=matplotlib.ticker.LogLocator(subs=(1, 2, 5)),
                   major_formatter="{x:g}", minor_formatter="")


def over_kl(axes, runs, measure="gold/win_rate"):
    """Points and frontiers of each group, or the way of its only run; a line where SFT is."""
    if not all(measure in row for r in runs for row in r["rows"]):
        stop("the hidden utility is known of toy samples only, and these runs have others")
    groups, by = grouped(runs), "beta" if len(grouped(runs, "loss")) == 1 else "loss"
    shapes = shapes_of(r[by] for r in runs)
    for group, some in groups.items():
        colour, title = colour_of(group, groups), legend(group, groups)
        style = dict(color=colour, label=title, linestyle=DASHES.get(group[1], "-"))
        row = {"group": title, "loss": group[1], "model": group[2], "measure": measure}
        for run in some:
            x, y = ([r[key] for r in run["rows"]] for key in ("gold/kl", measure))
            axes.plot(x, y, shapes[run[by]], color=colour, markersize=3, alpha=0.2)
        if len(some) == 1:
            error = dict(xerr=[r["gold/kl_se"] for r in some[0]["rows"]],
                         yerr=[r[f"{measure}_se"] for r in some[0]["rows"]])
            axes.errorbar(x, y, **error, **style, marker=shapes[some[0][by]], markersize=4.5,
                          elinewidth=0.8)
            yield from (row | {"kl": kl, "mean": value} for kl, value in zip(x, y, strict=True))
            continue
        reached = [r["gold/kl"] for run in some for r in run["rows"] if r["gold/kl"] > 0]
        grid = np.linspace(np.log(min(reached)), np.log(max(reached)), 200)
        lines = frontiers(some, grid, measure)
        covered = group[0] == "online" and ("in order", *group[1:3], "") in groups  # by the same
        yield from band(axes, "kl", np.exp(grid), lines, row, linewidth=5 if covered else 1.6,
                        **style)[::4]
        for own, others in held_out(some, measure):
            for at in hull(others):
                axes.plot(*own[at], shapes[at[0] if by == "beta" else group[1]], color=colour,
                          markersize=5, markeredgecolor="white", markeredgewidth=0.5)
    start = [row[measure] for r in runs for row in r["start"]]
    if start:
        axes.axhline(np.mean(start), color="0.4", linestyle=":", zorder=0,
                     label=f"SFT, where all start: {np.mean(start):.2f}")
    for value, shape in shapes.items() if len(shapes) > 1 else ():
        axes.plot([], [], shape, color="0.4", markersize=4, label=f"{by} {NAMES.get(value, value)}")
    if measure == "toy/utility":  # a few ruined policies would squeeze all others
        values = [row[measure] for r in runs for row in r["rows"]]
        low = min([np.quantile(values, 0.05, method="lower"), *start])
        axes.set_ylim(low - 0.1, max(values) + 0.1)
        if min(values) < low:
            axes.set_title(f"{np.mean(np.array(values) < low):.0%} of the points lie lower",
                           loc="right", fontsize=8)
    log_kl(axes, LABELS[measure])


def gaps(axes, runs):
    """The main claim: online minus others of its loss and model at matched KL.

    Of several proxies also minus online by the study's own. 95% intervals: thin, and in the legend,
    over training seeds, thick over prompts.
    """
    groups = grouped(runs)
    pairs = [(online, other) for other in groups for online in groups if online[0] == "online"
             and online[1:3] == other[1:3] and (other[0] != "online" or (
                 other[3] == "proxy" != online[3]))]
    several = len({online[3] for online, _ in pairs}) > 1  # proxies
    columns = ["comparison", "kl", "online", "other", "gap", "low", "high", "prompts_low",
               "prompts_high", "online_single_kl", "online_single", "other_single_kl",
               "other_single"]
    for i, (online, other) in enumerate(pairs):
        found = matched_gap(groups[online], groups[other], [0.5, 1, 2, 3, 5, 8, 13, 20, 30])
        title = f"{legend(online, groups)} - {legend(other, groups)}"
        for kl, row in found.items():
            best = [] if kl == "mean" else [*best_within(groups[online], kl),
                                            *best_within(groups[other], kl)]
            yield dict(zip(columns, [title, kl, *row, *best], strict=False))
        if "mean" in found:
            title += ": mean {2:+.3f} [{3:+.3f}, {4:+.3f}]".format(*found.pop("mean"))
        gap, *ends = np.array([row[2:] for row in found.values()]).reshape(-1, 5).T
        at, colour = np.array(list(found)) * 1.03 ** i, colour_of(online if several else other,
                                                                  groups)
        axes.errorbar(at, gap, np.maximum([gap - ends[0], ends[1] - gap], 0), color=colour,
                      linestyle=":" if other[0] == "online" else DASHES.get(online[1], "-"),
                      marker="o", markersize=4, capsize=2, label=title)
        axes.vlines(at, *ends[2:], color=colour, linewidth=4, alpha=0.4)  # over prompts
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    log_kl(axes, "online minus other (above 0: better)")


def by_refresh(runs):
    """[(K, its runs)]: the responses of K steps were sampled at once; 1 is online."""
    return sorted((int((source.split() + ["1"])[1]), some) for (source,), some in grouped(
        runs, "source").items() if source == "online" or source.startswith("every "))


def over_every(axes, runs, ylabel):
    """An x axis of K, with a tick at every K that was run."""
    axes.set(xlabel="steps whose responses are sampled at once", xscale="log", ylabel=ylabel)
    axes.set_xticks(*[[k for k, _ in by_refresh(runs)]] * 2)
    axes.minorticks_off()


def over_refresh(axes, runs):
    """Win rate at equal KL over K, the steps whose responses are sampled at once; 95% intervals.

    Dotted: offline on D_golden. Where a KL is not reached by all seeds nothing is drawn. The CSV
    also has by how much online (K = 1) is ahead, seed by seed, with both intervals of `gaps`.
    """
    some = dict(by_refresh(runs)) | {"offline": [r for r in runs if r["source"] == "offline"]}
    kls, ends = (1, 2, 4, 8, 16), ("gap", "gap_low", "gap_high", "prompts_low", "prompts_high")
    behind = {k: matched_gap(some.get(1, []), some[k], kls) for k in some if k != 1}
    for i, kl in enumerate(kls):
        found = {k: interval(frontiers(part, np.log([kl]))[:, 0]) for k, part in some.items()
                 if part}
        found = {k: three for k, three in found.items() if not np.isnan(three[0])}
        for k, (mean, low, high) in found.items():
            yield {"kl": kl, "every": k, "mean": mean, "low": low, "high": high} | dict(
                zip(ends, behind.get(k, {}).get(kl, ())[2:], strict=False))
        level = found.pop("offline", [None])[0]
        if not found:
            continue
        mean, low, high = np.array(list(found.values())).T
        line = axes.errorbar(np.array(list(found)) * 1.04 ** i, mean, [mean - low, high - mean],
                             marker="o", markersize=4, capsize=2, label=f"KL {kl}")
        if level is not None:
            axes.axhline(level, color=line[0].get_color(), linestyle=":", linewidth=1)
    over_every(axes, runs, LABELS["gold/win_rate"])


def step_seconds(axes, runs):
    """Seconds a training step over K, of sampling, labelling and learning, not of evaluation.

    As the runs themselves were timed, with whatever ran beside them; older runs were not.
    """
    for k, some in by_refresh(runs):
        each = [r["rows"][-1]["step_seconds"] for r in some if "step_seconds" in r["rows"][-1]]
        if not each:
            continue
        mean, low, high = np.mean(each), min(each), max(each)
        axes.errorbar([k], [mean], [[mean - low], [high - mean]], marker="o", capsize=2,
                      color=COLOURS["online"])
        yield {"every": k, "seconds": mean, "low": low, "high": high}
    over_every(axes, runs, "seconds a step, mean and range of runs")
    axes.set_ylim(0)


def peaks(axes, runs, relative):
    """The 90% quantile of win rate over all checkpoints, by policy size: means over seeds."""
    found = {}
    for (source, _, size, _), some in grouped(runs).items():
        tops = [np.quantile([row["gold/win_rate"] for r in one for row in r["rows"]], 0.9)
                for one in grouped(some, "seed").values()]
        found[size, source] = np.array([np.mean(tops), min(tops), max(tops)])
    sizes, sources = (list(dict.fromkeys(r[key] for r in runs)) for key in ("model", "source"))
    for i, source in enumerate(sources):
        rows = np.array([found[size, source] - (found[size, "online"][0] if relative else 0)
                         for size in sizes])
        mean, low, high = rows.T
        axes.bar(np.arange(len(sizes)) + 0.25 * (i - 1), mean, 0.22, yerr=[mean - low, high - mean],
                 color=COLOURS.get(source), label=source, error_kw={"linewidth": 0.8})
        for size, row in zip(sizes, rows, strict=True):
            yield {"model": size, "source": source, "mean": row[0], "low": row[1], "high": row[2]}
    axes.set_xticks(range(len(sizes)), sizes)
    axes.set(xlabel="policy", ylabel="90% quantile of win rate" + (
        ", minus online's" if relative else ""))


def scatter(axes, runs):
    """Every checkpoint's win rate over its accuracy on D_golden; a shape a beta.

    Each correlation comes with the lowest and highest of the seeds'.
    """
    def points(part):
        return np.array([[row[key] for r in part for row in r["rows"]]
                         for key in ("gold/accuracy_golden", "gold/win_rate")])

    groups, shapes = grouped(runs), shapes_of(str(r["beta"]) for r in runs)
    for group, some in groups.items():
        parts = {"all": some} | {f"beta {beta}": part for (beta,), part in sorted(
            grouped(some, "beta").items(), key=str)}
        found = {}
        for name, part in parts.items():
            x, y = points(part)
            found[name] = np.corrcoef(x, y)[0, 1]
            seeds = [np.corrcoef(points(one))[0, 1] for one in grouped(part, "seed").values()]
            yield {"group": group[0], "of": name, "checkpoints": len(x),
                   "correlation": found[name], "low": min(seeds), "high": max(seeds)}
            if name != "all":
                axes.plot(x, y, shapes[name.removeprefix("beta ")], markersize=3, alpha=0.5,
                          color=COLOURS.get(group[0]))
        axes.plot([], [], "o", color=COLOURS.get(group[0]), label=f"{legend(group, groups)}: r " + (
            ", ".join(f"{r:+.2f} ({name})" for name, r in found.items())))
    for beta, shape in shapes.items():
        axes.plot([], [], shape, color="0.4", markersize=4, label=f"beta {beta}")
    axes.set(xlabel=LABELS["gold/accuracy_golden"], ylabel=LABELS["gold/win_rate"])


def over_steps(axes, runs, measure):
    """Means over a group's runs by step, for the two smallest betas that all groups have.

    Up to the last step that all reach, at online's learning rate if a group has several. The band
    is the lowest and highest seed.
    """
    groups = grouped(runs)
    shared = set.intersection(*({r["beta"] for r in some} for some in groups.values()))
    last = min(max(row["step"] for r in some for row in r["rows"]) for some in groups.values())
    for group, some in groups.items():
        rate = next((online[0]["lr"] for g, online in groups.items() if g[0] == "online"), None)
        some = [r for r in some if r["lr"] == rate] or some
        for beta, line in zip(sorted(shared, key=str)[:2], ("--", "-"), strict=False):
            tracks = [{row["step"]: row[measure] for row in r["start"] + r["rows"]
                       if row["step"] <= last} for r in some if r["beta"] == beta]
            steps = sorted(set.intersection(*map(set, tracks)))
            values = np.array([[track[step] for step in steps] for track in tracks])
            yield from band(axes, "step", steps, values,
                            {"group": group[0], "beta": beta, "measure": measure},
                            color=COLOURS.get(group[0]), linestyle=line, marker=".",
                            label=f"{legend(group, groups)}, beta {beta}")
    axes.set(xlabel="gradient step", ylabel=LABELS[measure])
    if "accuracy" in measure:
        axes.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)


def logratio(axes, runs):
    """By how much less likely people's chosen responses have become, over KL.

    A point is a checkpoint. A line joins means over the checkpoints of every doubling of KL, the
    band is the lowest and highest seed. Dashed: SFT tilted by a normal score, the best policy for
    its KL, under which the better of two samples changes by sqrt(2 KL / 3.14) - KL.
    """
    measure, groups = "gold/chosen_logratio", grouped(runs)
    kl = np.array([row["gold/kl"] for r in runs for row in r["rows"] if row["gold/kl"] > 0])
    edges = 2.0 ** np.arange(np.floor(np.log2(kl.min())), np.log2(kl.max()) + 1)
    for group, some in groups.items():
        values = []  # (seeds, doublings)
        for one in grouped(some, "seed").values():
            x, y = np.array([(row["gold/kl"], row[measure]) for r in one for row in r["rows"]]).T
            axes.plot(x, y, ".", color=colour_of(group, groups), markersize=3, alpha=0.3)
            parts = [y[(low <= x) & (x < 2 * low)] for low in edges]
            values.append([part.mean() if len(part) else np.nan for part in parts])
        yield from band(axes, "kl", edges * 2 ** 0.5, np.array(values),
                        {"group": group[0], "measure": measure}, marker="o", markersize=4,
                        color=colour_of(group, groups), label=legend(group, groups))
    x = np.geomspace(kl.min(), kl.max(), 200)
    axes.plot(x, np.sqrt(2 * x / np.pi) - x, "--", color="0.4", label="SFT tilted by a score")
    log_kl(axes, LABELS[measure])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(top=1)


def training_loss(axes, runs):
    """The online run's loss, and that of offline runs on the pairs it made."""
    if not all("steps" in run for run in runs):
        stop("training losses are in run folders alone, not in files of checkpoints")
    online = next((r for r in runs if r["source"] == "online"), runs[0])
    for i, run in enumerate(runs):
        loss = np.array([row["loss"] for row in run["steps"]])
        gap = np.abs(loss - [row["loss"] for row in online["steps"]][:len(loss)]).max()
        smooth = np.convolve(loss, np.ones(10) / 10, "valid")
        axes.plot(np.arange(len(smooth)) + 10, smooth, color=COLOURS.get(run["source"]),
                  linewidth=3 - i, label=run["source"] + (
                      "" if run is online else f": largest difference {gap:.2g}"))
        yield {"run": run["name"], "source": run["source"], "steps": len(loss),
               "largest_difference": gap}
    axes.set(xlabel="gradient step", ylabel="training loss, mean of 10 steps")


def classifiers(axes, files):
    """Who agrees with the golden model along D_online, from gold_eval.py classify."""
    curves = {}
    for path in files:
        try:
            with open(path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
            kind = os.path.basename(path).split("-")[1]
            curves.setdefault(kind, []).append([r["gold/accuracy_policy"] for r in rows])
            curves.setdefault("proxy", []).append([r["gold/accuracy_labeller"] for r in rows])
        except (OSError, ValueError, KeyError, IndexError) as e:
            stop(f"{path} is no file of gold_eval.py classify: {e}")
    for kind, values in curves.items():
        yield from band(axes, "share_of_stream", np.arange(1, 11) / 10, np.array(values),
                        {"classifier": kind}, color=COLOURS.get(kind), marker=".",
                        label=kind if kind == "proxy" else f"{kind} policy, last checkpoint")
    axes.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axes.set(xlabel="share of the online run", ylabel="accuracy on D_online")


# ---- figures: a row of panels --------------------------------------------------------------------


def by_loss(runs):
    """{title: runs}: a panel a loss where every loss has several sources, else one for all."""
    losses = grouped(runs, "loss")
    if len(losses) == 1 or any(len(grouped(some, "source")) == 1 for some in losses.values()):
        return {"": runs}
    return {NAMES.get(loss, loss): some for (loss,), some in losses.items()}


def by_size(runs):
    """{title: runs}: a panel a policy size; the judge and the proxy are the same."""
    return {f"policy: {size}": some for (size,), some in grouped(runs, "model").items()}


FIGURES = {  # name: what `draw` makes it of; win rate over KL where nothing else is said
    "main": dict(title="Online and offline from the same start", panels=[ways], split=None),
    "fig1": dict(title="Online against offline at equal KL"),
    "fig4": dict(title="Is it coverage? Offline on the online run's own pairs, shuffled"),
    "fig5": dict(title="Is it quality? Offline on pairs of the final online policy"),
    "fig6": dict(title="Who agrees with the golden model along the online run",
                 panels=[classifiers], split=None),
    "fig7": dict(title="Does the better classifier win more?", panels=[scatter]),
    "fig8": dict(title="Fitting the fixed pairs of D_golden", width=6,
                 panels=[partial(over_steps, measure="gold/accuracy_golden"),
                         partial(over_steps, measure="gold/chosen_logratio")]),
    "fig9": dict(title="Is it the loss? Best-of-two has no rejected response"),
    "fig10": dict(title="Is it size? Larger policies, the same judge", split=by_size, width=4),
    "fig11": dict(title="Peaks by size, minus online's", panels=[partial(peaks, relative=True)]),
    "fig12": dict(title="Quality or contrast? Offline on pairs of two policies"),
    "fig13": dict(title="How much order is needed? Shuffled within windows of batches"),
    "fig14": dict(title="Peaks by size", panels=[partial(peaks, relative=False)]),
    "tandem": dict(title="The online run's pairs in its order", panels=[training_loss]),
    "losses": dict(title="Do other losses behave alike?"),
    "gap": dict(title="Online minus others at equal KL, 95% intervals", panels=[gaps]),
    "self": dict(title="Classifying one's own samples",
                 panels=[partial(over_steps, measure="gold/accuracy_self")]),
    "logratio": dict(title="What becomes of the chosen responses of D_golden", panels=[logratio]),
    "utility": dict(title="What the judge sees, and what people would feel",
                    panels=[over_kl, partial(over_kl, measure="toy/utility")]),
    "refresh": dict(title="How online is online enough? Responses sampled anew every K steps",
                    panels=[over_kl, over_refresh, step_seconds]),
    "proxies": dict(title="Online's proxy from fewer pairs", panels=[over_kl, gaps], width=5.6),
}


def draw(runs, title, panels=(over_kl,), split=by_loss, width=5.2):
    """Each of the panels for each part of the runs; returns the figure and the rows of its CSV."""
    drawn = list(product((split(runs) if split else {"": runs}).items(), panels))
    wide, high = max(7, width * len(drawn)), 5 if len(drawn) == 1 else 4.4
    figure, axes = plt.subplots(1, len(drawn), layout="constrained", squeeze=False,
                                sharex=len(panels) == 1, sharey=len(panels) == 1)
    lines, legend_rows = [], 2
    for ax, ((name, some), panel) in zip(axes[0], drawn, strict=True):
        lines += panel(ax, some)
        ax.set_title(name)
        ax.grid(alpha=0.25)
        if labels := ax.get_legend_handles_labels()[1]:  # below, where it covers no point
            each = 0.53 + 0.061 * max(map(len, labels))  # inches
            columns = max(1, int(wide / len(drawn) / each))
            ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15),
                      ncols=columns)
            legend_rows = max(legend_rows, -(-len(labels) // columns))
        if len(panels) == 1:
            ax.label_outer()
    figure.suptitle(title)
    figure.set_size_inches(wide, high + 0.17 * (legend_rows - 2))
    return figure, lines


def write_csv(path, rows):
    """Dicts as a CSV file, numbers to six digits."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    with open(path + ".tmp", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, keys, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()
                          if v == v} for row in rows)  # what is not known stays empty
    os.replace(path + ".tmp", path)


def main(args):
    runs, given = args.runs, dict(FIGURES[args.figure])
    given["title"] = args.title or given["title"]
    if args.figure != "fig6":
        runs = [run for path in dict.fromkeys(runs) for run in (
            read_checkpoints(path) if path.endswith(".csv") else [read_run(path)])]
        given["title"] += (f"\n{len(runs)} runs, {sum(len(run['rows']) for run in runs)} points, "
                           f"seeds {', '.join(map(str, sorted({run['seed'] for run in runs})))}")
    figure, lines = draw(runs, **given)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    figure.savefig(args.out, dpi=150)
    plt.close(figure)
    base = os.path.splitext(args.out)[0]
    write_csv(f"{base}.csv", lines)
    if args.figure != "fig6":
        write_csv(f"{base}-checkpoints.csv", [
            {"run": run["name"]} | {key: run[key] for key in SETTINGS}
            | {key: row[key] for key in row if key.startswith(("step", "gold/", "toy/",
                                                               "outcomes"))}
            for run in runs for row in run["start"] + run["rows"]])
    print(f"{args.out} and {base}.csv: {len(runs)} runs")


if __name__ == "__main__":
    main(parse_args())
