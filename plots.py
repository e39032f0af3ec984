"""Draw the paper's figures from run folders, each with the numbers it shows as CSV.

    python plots.py runs/demo/online-* runs/demo/ipo-* --out win_rate_kl.png
    python plots.py runs/toy/online-ipo-b* runs/toy/ipo-b* --figure fig7 --out fig7.png

Reads args.json, metrics.jsonl and samples.jsonl. A group is what shares a source of responses, a
loss, a model and a labeller; it pools hyper-parameters and seeds. In a figure over KL a point is a
checkpoint of a run. A seed's frontier is the upper concave hull of its checkpoints over KL: what a
policy reaches that answers with one checkpoint or another by chance, at no more than their mean KL
(KL is convex). The line is the mean over seeds, where every seed has a frontier, the band their
lowest and highest. Each group shows the best of its runs in this way, which favours a group of more
runs and checkpoints: in figure 1 offline has six times as many as online.

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
    p.add_argument("runs", nargs="+", help="run folders (fig6: files of gold_eval.py classify)")
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


def frontier(runs, grid, values="gold/win_rate", noise=None):
    """Upper concave hull over KL of all checkpoints of runs, at each log KL of `grid` (G,).

    NaN outside the KL they reach. `noise` replaces the values' own: a list of arrays, one a run.
    """
    x = np.concatenate([[row["gold/kl"] for row in run["rows"]] for run in runs])
    y = np.concatenate(noise or [[row[values] for row in run["rows"]] for run in runs])
    hull = []
    for c in sorted(zip(x, y, strict=True)):
        while hull and (hull[-1][0] == c[0] or len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (
                c[1] - hull[-2][1]) >= (c[0] - hull[-2][0]) * (hull[-1][1] - hull[-2][1])):
            hull.pop()  # it lies under the line from the one before it to c
        hull.append(c)
    return np.interp(np.exp(grid), *zip(*hull, strict=True), left=np.nan, right=np.nan)


def by_seed(runs):
    """Runs as {seed: its runs}."""
    return {seed: [r for r in runs if r["seed"] == seed] for seed in sorted(
        {r["seed"] for r in runs})}


def seed_frontiers(runs, values="gold/win_rate"):
    """(log KL (G,), frontiers (seeds, G)) over the KL that the runs reach."""
    kls = [row["gold/kl"] for run in runs for row in run["rows"] if row["gold/kl"] > 0]
    grid = np.linspace(np.log(min(kls)), np.log(max(kls)), 200)
    return grid, np.array([frontier(some, grid, values) for some in by_seed(runs).values()])


def matched_gap(first, second, kls, draws=1000):
    """Win rate of `first` minus `second` at equal KL, with a bootstrap over seeds and prompts.

    A draw takes seeds with replacement (the same for both) and moves every checkpoint's win rate by
    its standard error over prompts. The two share prompts and noise, which would make the interval
    narrower: it is on the wide side. Returns {"kl": (first, second, gap, low, high)}, KL "mean" for
    the mean over the log KL that all frontiers cover; 95% intervals.
    """
    sides, rng = [by_seed(first), by_seed(second)], np.random.default_rng(0)
    seeds = sorted(sides[0].keys() & sides[1].keys())
    if not seeds:
        return {}
    ends = [[np.log([max(row["gold/kl"], 1e-6) for r in side[seed] for row in r["rows"]])
             for seed in seeds] for side in sides]
    low = max(x.min() for side in ends for x in side)
    high = min(x.max() for side in ends for x in side)
    if low >= high:
        return {}
    grid = np.concatenate([np.log(kls), np.linspace(low, high, 41)])

    def means(noisy):
        lines = [[frontier(side[seed], grid, noise=[np.array([
            row["gold/win_rate"] + noisy * rng.normal() * row["gold/win_rate_se"]
            for row in r["rows"]]) for r in side[seed]]) for seed in seeds] for side in sides]
        return np.array(lines)  # (2, seeds, grid)

    def summary(lines):
        at = lines.mean(1)  # NaN where a seed has no value: no claim there
        covered = ~np.isnan(at[:, len(kls):]).any(0)
        mean = at[:, len(kls):][:, covered].mean(1)
        return np.concatenate([at[:, :len(kls)], mean[:, None]], 1)  # (2, KLs + 1)

    point = summary(means(0))
    drawn = np.array([np.subtract(*summary(means(1)[:, rng.integers(len(seeds), size=len(seeds))]))
                      for _ in range(draws)])
    found = {}
    for i, kl in enumerate([*kls, "mean"]):
        if not np.isnan(point[:, i]).any():
            a, b = point[:, i]
            found[kl] = (a, b, a - b, *np.nanpercentile(drawn[:, i], [2.5, 97.5]))
    return found


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
        lines += [{"comparison": title, "kl": kl, **dict(zip(
            ("online", "other", "gap", "low", "high"), values, strict=True))}
            for kl, values in found.items()]
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
    return [{"run": r["name"], **{k: r[k] for k in ("source", "loss", "seed", "beta", "lr")},
             **{k: row[k] for k in row if k == "step" or k.startswith(("gold/", "toy/"))}}
            for r in runs for row in r["rows"]]


def main(args):
    runs = args.runs if args.figure == "fig6" else [read_run(f) for f in dict.fromkeys(args.runs)]
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
