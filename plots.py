"""Draw the paper's figures from run folders, each with the numbers it shows as CSV.

    python plots.py runs/demo/online-* runs/demo/ipo-* --out win_rate_kl.png
    python plots.py runs/toy/online-ipo-b* runs/toy/ipo-b* --figure fig7 --out fig7.png
    python plots.py results/toy/fig4-checkpoints.csv --figure gap --out gap.png

Reads args.json, metrics.jsonl and samples.jsonl, or the checkpoints that it wrote itself. A group
is what shares a source of responses, a loss, a model and a labeller; it pools hyper-parameters and
seeds. In a figure over KL a point is a checkpoint of a run. A line is the mean over seeds of their
frontiers, where every seed has one, the band their lowest and highest. A frontier is made of the
settings (hyper-parameters and step) that do best **on the other seeds**, and drawn through this
seed's checkpoints of them: the best of many noisy values is too good, the more so the more there
are, but what is chosen on one seed and judged on another is not. Between two checkpoints it is
what a mixture reaches, which answers with one or the other by chance, at no more than the KL drawn
(KL is convex); no single policy may have been there. One seed alone is chosen on itself.

MIT licence.
"""

import argparse
import csv
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tasks import WISH, utility

COLOURS = {"online": "#0072B2", "offline": "#D55E00", "shuffled": "#009E73", "in order": "#CC79A7",
           "windows of 4": "#E69F00", "windows of 40": "#56B4E9", "windows of 500": "#56B4E9",
           "final vs final": "#E69F00", "sft vs early": "#56B4E9", "early vs final": "#CC79A7",
           "proxy": "#000000"}  # Okabe and Ito: told apart by colour-blind readers too
STYLES = {"ipo": ("o", "-"), "dpo": ("s", "--"), "slic": ("^", "-."), "bo2": ("D", ":")}
NAMES = {"ipo": "IPO", "dpo": "DPO", "slic": "SLiC", "bo2": "Bo2"}
KL = "KL(policy, SFT) in nats a response"


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders, or files of checkpoints that this script "
                   "wrote (fig6: files of gold_eval.py classify)")
    p.add_argument("--figure", choices=FIGURES, default="main", help="which figure to draw")
    p.add_argument("--out", default="win_rate_kl.png", help="figure to write (png, pdf, svg)")
    p.add_argument("--title", default="", help="title of the figure")
    return p.parse_args(argv)


def fail(message):
    """Print one line on stderr and exit with status 2: the user's input is at fault."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- runs ----------------------------------------------------------------------------------------


def source_of(args):
    """Where a run's responses come from, in the words of the legend."""
    if args["script"] == "online_rlhf.py":
        return "online"
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


def read_run(folder):
    """A run as its name, settings and rows: `steps` has all metrics rows, `rows` the judged."""
    try:
        with open(f"{folder}/args.json", encoding="utf-8") as f:
            args = json.load(f)
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as f:
            steps = [json.loads(line) for line in f if line.endswith("\n")]
    except (OSError, ValueError) as e:
        fail(f"{folder} is not a run folder: {e}")
    rows, hidden = [row for row in steps if "gold/win_rate" in row], toy_utility(folder)
    if not rows:
        fail(f"{folder}/metrics.jsonl holds no gold evaluation; train with --gold and --baseline")
    for row in rows:
        if row["step"] in hidden:
            row["toy/utility"], row["toy/utility_se"] = hidden[row["step"]]
    loss = args.get("loss") or args["script"].removesuffix(".py")
    return {"name": os.path.basename(os.path.normpath(folder)), "source": source_of(args),
            "loss": loss, "seed": args["seed"], "beta": args.get("beta"), "lr": args.get("lr"),
            "model": os.path.basename(os.path.normpath(args.get("model", ""))),
            "proxy": os.path.basename(os.path.normpath(args.get("labeller", ""))),
            "rows": rows, "steps": steps}


def read_checkpoints(path):
    """The runs of a file that `checkpoints` wrote; they have no rows but the judged ones."""
    runs = {}
    try:
        with open(path, newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                run = runs.setdefault(row["run"], {
                    "name": row["run"], **{k: row[k] for k in ("source", "loss", "model", "proxy")},
                    "seed": int(row["seed"]), "beta": row["beta"], "lr": row["lr"], "rows": []})
                run["rows"].append({k: float(v) for k, v in row.items()
                                    if v and k.startswith(("gold/", "toy/"))}
                                   | {"step": int(row["step"])})
    except (OSError, ValueError, KeyError) as e:
        fail(f"{path} is no file of checkpoints: {e!r}")
    return list(runs.values())


def group_of(run):
    """What a group of runs shares: hyper-parameters and seeds are pooled."""
    return run["source"], run["loss"], run["model"], run["proxy"]


def grouped(runs):
    """{group: its runs}, in the order of first appearance."""
    groups = {}
    for run in runs:
        groups.setdefault(group_of(run), []).append(run)
    return groups


def legend(group, groups):
    """A group's name: its source and what tells it from the other groups of the figure."""
    source, loss, _, proxy = group
    words = [source]
    if len({g[1] for g in groups}) > 1:
        words.append(NAMES.get(loss, loss))
    if source == "online" and len({g[3] for g in groups if g[0] == "online"}) > 1:
        share = proxy.removeprefix("proxy")
        words.append(f"(1/{share})" if share.isdigit() else f"({proxy})" if share else
                     "(all of D_golden)")
    return " ".join(words)


# ---- frontiers -----------------------------------------------------------------------------------


def by_seed(runs):
    """Runs as {seed: its runs}."""
    return {seed: [r for r in runs if r["seed"] == seed] for seed in sorted(
        {r["seed"] for r in runs})}


def checkpoints_of(runs, values="gold/win_rate"):
    """{seed: {setting: (KL, value)}} of the judged checkpoints of a group."""
    found = {}
    for run in runs:
        points = found.setdefault(run["seed"], {})
        for row in run["rows"]:
            at = run["beta"], run["lr"], row["step"]
            while at in points:  # two runs of one setting, on other data say
                at += ("again",)
            if values in row and row["gold/kl"] > 0:
                points[at] = row["gold/kl"], row[values]
    return {seed: points for seed, points in found.items() if points}


def hull(points):
    """Settings of {setting: (KL, value)} on the upper concave hull, from low to high KL."""
    found = []
    for at, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        while found and (x == points[found[-1]][0] or len(found) > 1 and lies_under(
                points[found[-1]], points[found[-2]], (x, y))):
            found.pop()
        found.append(at)
    return found


def lies_under(point, left, right):
    """Whether a point is not above the line between two others."""
    return (point[0] - left[0]) * (right[1] - left[1]) >= (right[0] - left[0]) * (
        point[1] - left[1])


def held_out(runs, values="gold/win_rate"):
    """A list of (own, others) a seed: {setting: (KL, value)}, its own and the other seeds' means.

    What is chosen by the others and judged by its own does not feed on the noise it is judged by.
    """
    found, pairs = checkpoints_of(runs, values), []
    for seed, own in found.items():
        rest = [points for other, points in found.items() if other != seed]
        others = {at: tuple(np.mean([points[at] for points in rest if at in points], 0))
                  for at in own if any(at in points for points in rest)}
        pairs.append((own, others or own))  # no seed besides, or none of these settings
    return pairs


def frontiers(runs, log_kls, values="gold/win_rate"):
    """Each seed's frontier (seeds, G) at log KLs (G,), NaN outside the KL that it reaches.

    It runs through the seed's checkpoints of the settings on the hull of the others' means.
    """
    lines = []
    for own, others in held_out(runs, values):
        x, y = zip(*sorted(own[at] for at in hull(others)), strict=True)
        lines.append(np.interp(np.exp(log_kls), x, y, left=np.nan, right=np.nan))
    return np.array(lines)


def best_within(runs, kl):
    """(KL, win rate) of the best single checkpoint of at most this KL, as means over seeds."""
    found = []
    for own, others in held_out(runs):
        within = [at for at in others if others[at][0] <= kl]
        found.append(own[max(within, key=lambda at: others[at][1])] if within else (np.nan,) * 2)
    return np.mean(found, 0)


def seed_frontiers(runs, values="gold/win_rate"):
    """(log KL (G,), frontiers (seeds, G)) over the KL that the runs reach."""
    kls = [row["gold/kl"] for run in runs for row in run["rows"] if row["gold/kl"] > 0]
    grid = np.linspace(np.log(min(kls)), np.log(max(kls)), 200)
    return grid, frontiers(runs, grid, values)


T_975 = (np.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student, 97.5%


def interval(values):
    """(mean, low, high), each (...), of held-out values (seeds, ...): 95% over training seeds.

    Student's t of as few seeds as there are. Their values are not independent, since the settings
    of each were chosen on the others, so that the variance of the mean is not s^2 / n but
    s^2 (1 / n + 1 / (n - 1)) (Nadeau and Bengio 2003, with one part of n held out). What was not
    drawn again is not in it: the golden model, the proxy, the data, the prompts.
    """
    n = len(values)
    t = T_975[n - 1] if n <= len(T_975) else 1.96
    with np.errstate(all="ignore"):  # of one seed: NaN
        half = t * values.std(0, ddof=min(1, n - 1)) * (1 / n + 1 / max(n - 1, 1)) ** 0.5
    return values.mean(0), values.mean(0) - half, values.mean(0) + half


def matched_gap(first, second, kls):
    """Win rate of `first` minus `second` at equal KL, by the frontiers of the seeds they share.

    Returns {"kl": (first, second, gap, low, high)} with 95% intervals, where all seeds have values;
    KL "mean" is over the log KL that all frontiers cover.
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
    found = {kl: lines[:, :, i] for i, kl in enumerate(kls) if covered[i]}
    if covered[len(kls):].any():
        found["mean"] = lines[:, :, len(kls):][:, :, covered[len(kls):]].mean(2)
    return {kl: (*sides.mean(1), *interval(sides[0] - sides[1])) for kl, sides in found.items()}


# ---- figures -------------------------------------------------------------------------------------


def finish(axes, **words):
    """Labels, grid and legend, the same on every figure."""
    axes.set(**words)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def log_kl(axes):
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def draw_frontiers(axes, runs, values="gold/win_rate", ylabel="win rate, golden policy"):
    """Points and frontiers of each group; returns the lines as rows for a CSV."""
    groups, lines, proxies = grouped(runs), [], {}
    for group, some in groups.items():
        source, loss, _, proxy = group
        marker, line = STYLES.get(loss, ("o", "-"))
        if source == "online":  # of several proxies each has a line of its own
            line = ["-", "--", ":", "-."][proxies.setdefault(proxy, len(proxies)) % 4] \
                if len({g[1] for g in groups}) == 1 else line
        colour = COLOURS.get(source, "0.5")
        rows = [row for run in some for row in run["rows"] if row["gold/kl"] > 0 and values in row]
        x, y = [row["gold/kl"] for row in rows], [row[values] for row in rows]
        single = len(some) == 1  # one run: its errors can be seen
        axes.errorbar(x, y, xerr=[row["gold/kl_se"] for row in rows] if single else None,
                      yerr=[row[f"{values}_se"] for row in rows] if single else None,
                      color=colour, marker=marker, linestyle="", markersize=4 if single else 2.5,
                      alpha=1 if single else 0.3, elinewidth=0.8)
        grid, fronts = seed_frontiers(some, values)
        covered = ~np.isnan(fronts).any(0)
        mean = np.where(covered, fronts.sum(0) / len(fronts), np.nan)
        axes.plot(np.exp(grid), mean, color=colour, linestyle=line, linewidth=1.6,
                  label=legend(group, groups))
        if len(fronts) > 1:
            axes.fill_between(np.exp(grid), np.where(covered, fronts.min(0), np.nan),
                              np.where(covered, fronts.max(0), np.nan), color=colour, alpha=0.15,
                              linewidth=0)
        lines += [{"group": legend(group, groups), "loss": loss, "model": group[2],
                   "measure": values, "kl": np.exp(grid[i]), "mean": mean[i],
                   "low": fronts[:, i].min(), "high": fronts[:, i].max()}
                  for i in np.flatnonzero(covered)[::4]]
    log_kl(axes)
    finish(axes, xlabel=KL + ", log scale", ylabel=ylabel)
    return lines


def figure_of(panels, width=5.2, height=3.9):
    return plt.subplots(1, panels, figsize=(max(7, width * panels), height + 0.6 * (panels == 1)),
                        layout="constrained", squeeze=False)


def over_kl(runs):
    """Figures 1, 4, 5, 9, 12, 13, losses: win rate over KL."""
    sources = {}
    for run in runs:
        sources.setdefault(run["loss"], set()).add(run["source"])
    several = len(sources) > 1 and all(len(found) > 1 for found in sources.values())
    panels = list(sources) if several else [None]
    figure, axes = figure_of(len(panels))
    lines = []
    for ax, loss in zip(axes[0], panels, strict=True):
        lines += draw_frontiers(ax, [r for r in runs if loss in (None, r["loss"])])
        if loss:
            ax.set_title(NAMES.get(loss, loss))
    return figure, lines


def over_kl_by_size(runs):
    """Figure 10: a panel a policy size, the judge and the proxy the same."""
    sizes = list(dict.fromkeys(r["model"] for r in runs))
    figure, axes = figure_of(len(sizes), 4)
    lines = []
    for ax, size in zip(axes[0], sizes, strict=True):
        lines += draw_frontiers(ax, [r for r in runs if r["model"] == size])
        ax.set_title(f"policy: {size}")
    return figure, lines


def hidden_utility(runs):
    """Beyond the paper: the same checkpoints by the golden model and by the hidden utility."""
    if not all("toy/utility" in row for r in runs for row in r["rows"]):
        fail("the hidden utility is known of toy samples only, and these runs have others")
    figure, axes = figure_of(2)
    return figure, draw_frontiers(axes[0, 0], runs) + draw_frontiers(
        axes[0, 1], runs, "toy/utility", "hidden human utility, mean")


def quantiles(runs):
    """90% quantile of win rate over all checkpoints, per (model, source): means over seeds."""
    found = {}
    for group, some in grouped(runs).items():
        tops = [np.quantile([row["gold/win_rate"] for r in one for row in r["rows"]], 0.9)
                for one in by_seed(some).values()]
        found[group[2], group[0]] = (np.mean(tops), min(tops), max(tops))
    return found


def peaks(runs, relative):
    """Figures 14 and 11: the 90% quantile over all checkpoints, by policy size."""
    found = quantiles(runs)
    sizes = list(dict.fromkeys(r["model"] for r in runs))
    sources = list(dict.fromkeys(r["source"] for r in runs))
    figure, axes = figure_of(1)
    lines = []
    for i, source in enumerate(sources):
        rows = [np.array(found[size, source]) - (found[size, "online"][0] if relative else 0)
                for size in sizes]
        x, y = np.arange(len(sizes)) + 0.25 * (i - 1), np.array([row[0] for row in rows])
        error = np.array([[row[0] - row[1], row[2] - row[0]] for row in rows]).T
        axes[0, 0].bar(x, y, 0.22, yerr=error, color=COLOURS.get(source), label=source,
                       error_kw={"linewidth": 0.8})
        lines += [{"model": size, "source": source, "mean": row[0], "low": row[1], "high": row[2]}
                  for size, row in zip(sizes, rows, strict=True)]
    axes[0, 0].set_xticks(range(len(sizes)), sizes)
    finish(axes[0, 0], xlabel="policy", ylabel="90% quantile of win rate" + (
        ", minus online's" if relative else ""))
    return figure, lines


def scatter(runs):
    """Figure 7: every checkpoint's win rate over its accuracy on D_golden."""
    figure, axes = figure_of(1)
    lines = []
    for group, some in grouped(runs).items():
        rows = [row for r in some for row in r["rows"]]
        x, y = ([row[k] for row in rows] for k in ("gold/accuracy_golden", "gold/win_rate"))
        r = np.corrcoef(x, y)[0, 1]
        axes[0, 0].plot(x, y, "o", markersize=3, alpha=0.5, color=COLOURS.get(group[0]),
                        label=f"{legend(group, grouped(runs))}: r = {r:+.2f}")
        lines.append({"group": group[0], "checkpoints": len(rows), "correlation": r})
    finish(axes[0, 0], xlabel="accuracy on D_golden", ylabel="win rate, golden policy")
    return figure, lines


def over_steps(runs, *measures):
    """Means over a group's runs that reach a step, of one setting: that with a run in each group.

    The band is the lowest and highest seed.
    """
    figure, axes = figure_of(len(measures))
    lines, groups = [], grouped(runs)
    shared = set.intersection(*({r["beta"] for r in some} for some in groups.values()))
    beta = sorted(shared, key=str)[len(shared) // 2] if shared else None  # the middle one
    for group, some in groups.items():
        rates = {r["lr"] for r in some}
        base = groups.get(("online", *group[1:3], "proxy"), some)[0]["lr"]
        some = [r for r in some if r["beta"] == beta and (r["lr"] == base or base not in rates)]
        for ax, (key, _) in zip(axes[0], measures, strict=True):
            steps = sorted(set.intersection(*({row["step"] for row in r["rows"]} for r in some)))
            values = np.array([[row[key] for row in r["rows"] if row["step"] in steps]
                               for r in some])
            ax.plot(steps, values.mean(0), color=COLOURS.get(group[0]), marker=".",
                    label=f"{legend(group, groups)}, beta {beta}")
            ax.fill_between(steps, values.min(0), values.max(0), color=COLOURS.get(group[0]),
                            alpha=0.15, linewidth=0)
            lines += [{"group": group[0], "beta": beta, "measure": key, "step": step,
                       "mean": v.mean(), "low": v.min(), "high": v.max()}
                      for step, v in zip(steps, values.T, strict=True)]
    for ax, (_, words) in zip(axes[0], measures, strict=True):
        finish(ax, xlabel="gradient step", ylabel=words)
        if "accuracy" in words:
            ax.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    return figure, lines


def training_loss(runs):
    """Appendix F: the online run's loss, and that of offline runs on the pairs it made."""
    if not all("steps" in run for run in runs):
        fail("training losses are in run folders alone, not in files of checkpoints")
    figure, axes = figure_of(1)
    online = next((r for r in runs if r["source"] == "online"), runs[0])
    lines = []
    for i, run in enumerate(runs):
        loss = np.array([row["loss"] for row in run["steps"]])
        gap = np.abs(loss - [row["loss"] for row in online["steps"]][:len(loss)]).max()
        smooth = np.convolve(loss, np.ones(10) / 10, "valid")
        axes[0, 0].plot(np.arange(len(smooth)) + 10, smooth, color=COLOURS.get(run["source"]),
                        linewidth=3 - i, label=run["source"] + (
                            "" if run is online else f": largest difference {gap:.2g}"))
        lines.append({"run": run["name"], "source": run["source"], "steps": len(loss),
                      "largest_difference": gap})
    finish(axes[0, 0], xlabel="gradient step", ylabel="training loss, mean of 10 steps")
    return figure, lines


def classifiers(files):
    """Figure 6: who agrees with the golden model along D_online, from gold_eval.py classify."""
    curves = {}
    for path in files:
        try:
            with open(path, encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
            kind = os.path.basename(path).split("-")[1]
            curves.setdefault(kind, []).append([r["gold/accuracy_policy"] for r in rows])
            curves.setdefault("proxy", []).append([r["gold/accuracy_labeller"] for r in rows])
        except (OSError, ValueError, KeyError, IndexError) as e:
            fail(f"{path} is no file of gold_eval.py classify: {e}")
    figure, axes = figure_of(1)
    lines, share = [], np.arange(1, 11) / 10
    for kind, values in curves.items():
        v = np.array(values)
        axes[0, 0].plot(share, v.mean(0), color=COLOURS[kind], marker=".",
                        label=kind if kind == "proxy" else f"{kind} policy, last checkpoint")
        axes[0, 0].fill_between(share, v.min(0), v.max(0), color=COLOURS[kind], alpha=0.15,
                                linewidth=0)
        lines += [{"classifier": kind, "share_of_stream": s, "mean": x.mean(), "low": x.min(),
                   "high": x.max()} for s, x in zip(share, v.T, strict=True)]
    axes[0, 0].axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    finish(axes[0, 0], xlabel="share of the online run", ylabel="accuracy on D_online")
    return figure, lines


def draw_gaps(axes, groups, pairs):
    """Win rate of one group minus another's at matched KL with 95% intervals, for (first, second).

    Returns what it draws as rows for a CSV.
    """
    lines, kls = [], [0.5, 1, 2, 3, 5, 8, 13, 20, 30]
    proxies = list(dict.fromkeys(first[3] for first, _ in pairs))
    for i, (first, second) in enumerate(pairs):
        found = matched_gap(groups[first], groups[second], kls)
        title = f"{legend(first, groups)} - {legend(second, groups)}"
        for kl, row in found.items():
            lines.append({"comparison": title, "kl": kl} | dict(zip(
                ("online", "other", "gap", "low", "high"), row, strict=True)))
            if kl != "mean":
                for side, group in (("online", first), ("other", second)):
                    lines[-1] |= dict(zip((f"{side}_single_kl", f"{side}_single"),
                                          best_within(groups[group], kl), strict=True))
        at = [kl for kl in found if kl != "mean"]
        y = np.array([found[kl][2:] for kl in at]).reshape(-1, 3)
        if "mean" in found:
            title += ": mean {2:+.3f} [{3:+.3f}, {4:+.3f}]".format(*found["mean"])
        colour = COLOURS.get(first[0] if len(proxies) > 1 else second[0])
        axes.errorbar(np.array(at, float) * 1.03 ** i, y[:, 0],
                      np.maximum([y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]], 0), color=colour,
                      linestyle=["-", "--", ":", "-."][proxies.index(first[3]) % 4], marker="o",
                      markersize=4, capsize=2, label=title)
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)
    log_kl(axes)
    finish(axes, xlabel=KL + ", log scale", ylabel="win rate, online minus the other")
    return lines


def against_online(groups):
    """(online group, other group) for all of one loss and model."""
    return [(first, second) for second in groups for first in groups if first[0] == "online"
            and second[0] != "online" and first[1:3] == second[1:3]]


def gap(runs):
    """The main claim: online minus the others at matched KL."""
    groups = grouped(runs)
    figure, axes = figure_of(1)
    return figure, draw_gaps(axes[0, 0], groups, against_online(groups))


def by_proxy(runs):
    """Beyond the paper: online with proxies of several qualities, and each one's gap to offline."""
    groups = grouped(runs)
    figure, axes = figure_of(2, 5.6)
    lines = draw_frontiers(axes[0, 0], runs)
    return figure, lines + draw_gaps(axes[0, 1], groups, against_online(groups))


ACCURACY = ("gold/accuracy_golden", "accuracy on D_golden")
FIGURES = {
    **dict.fromkeys(["main", "fig1", "fig4", "fig5", "fig9", "fig12", "fig13", "losses"], over_kl),
    "fig6": classifiers, "fig7": scatter, "fig10": over_kl_by_size,
    "fig8": lambda runs: over_steps(runs, ACCURACY, (
        "gold/chosen_logratio", "mean log-ratio of chosen, D_golden")),
    "fig11": lambda runs: peaks(runs, relative=True), "tandem": training_loss,
    "fig14": lambda runs: peaks(runs, relative=False), "utility": hidden_utility, "gap": gap,
    "proxies": by_proxy,
    "self": lambda runs: over_steps(runs, ("gold/accuracy_self", "accuracy on own samples")),
}


def write_csv(path, rows):
    """Dicts as a CSV file, numbers to six digits."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    with open(path + ".tmp", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, keys, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                         for row in rows)
    os.replace(path + ".tmp", path)


def checkpoints(runs):
    """The judged checkpoints of runs, as rows for a CSV."""
    return [{"run": r["name"], **{
        k: r[k] for k in ("source", "loss", "model", "proxy", "seed", "beta", "lr")},
             **{k: row[k] for k in row if k == "step" or k.startswith(("gold/", "toy/"))}}
            for r in runs for row in r["rows"]]


def main(args):
    runs = args.runs
    if args.figure != "fig6":
        runs = [run for path in dict.fromkeys(runs) for run in (
            read_checkpoints(path) if path.endswith(".csv") else [read_run(path)])]
    figure, lines = FIGURES[args.figure](runs)
    if args.title:
        figure.suptitle(args.title)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    figure.savefig(args.out, dpi=150)
    plt.close(figure)
    base = os.path.splitext(args.out)[0]
    write_csv(f"{base}.csv", lines)
    if args.figure != "fig6":
        write_csv(f"{base}-checkpoints.csv", checkpoints(runs))
    print(f"{args.out} and {base}.csv: {len(runs)} runs")


if __name__ == "__main__":
    main(parse_args())
