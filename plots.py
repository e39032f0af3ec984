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
from collections import namedtuple
from itertools import combinations, cycle, product
from types import SimpleNamespace

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from tasks import WISH, utility


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders, or files of checkpoints that this script "
                   "wrote (fig6: files of gold_eval.py classify)")
    p.add_argument("--figure", choices=FIGURES, default="main", help="which figure to draw")
    p.add_argument("--out", default="win_rate_kl.png", help="figure to write (png, pdf, svg)")
    p.add_argument("--steps", type=int, help="leave out checkpoints after so many steps")
    p.add_argument("--lr", type=float, help="leave out runs of another learning rate")
    p.add_argument("--title", default="", help="title instead of the figure's own")
    return p.parse_args(argv)


# ---- frontiers -----------------------------------------------------------------------------------


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
    """A list of (own, others) a seed: its {setting: row}, the other seeds' {setting: (KL, value)}.

    What is chosen by the others and judged by its own does not feed on the noise it is judged by.
    A seed chooses for itself where no other has any of its settings.
    """
    seeds, pairs = {}, []
    for run in sorted(runs, key=lambda run: run["seed"]):
        own = seeds.setdefault(run["seed"], {})
        for row in run["rows"]:
            at = run["beta"], run["lr"], row["step"]
            while at in own:  # two runs of one setting, on other data say
                at += ("again",)
            if row["gold/kl"] > 0:
                own[at] = row
    for own in filter(None, seeds.values()):
        rest = [rows for rows in seeds.values() if rows is not own and rows.keys() & own.keys()]
        points = {at: [(rows[at]["gold/kl"], rows[at][measure]) for rows in rest or [own]
                       if at in rows] for at in own}
        pairs.append((own, {at: tuple(np.mean(some, 0)) for at, some in points.items() if some}))
    return pairs


def frontiers(runs, log_kls, measure="gold/win_rate", by_prompt=False):
    """Each seed's frontier (seeds, G) at log KLs (G,), NaN outside the KL that it reaches.

    It runs through the seed's checkpoints of the settings on the hull of the others' means. By
    prompt it is how often each is won (seeds, prompts, G): a frontier is linear in its checkpoints'
    outcomes, so that these average to it.
    """
    lines = []
    for own, others in held_out(runs, measure):
        chosen = sorted((own[at] for at in hull(others)),
                        key=lambda row: (row["gold/kl"], row[measure]))
        kls = [row["gold/kl"] for row in chosen]
        shares = np.array([np.interp(np.exp(log_kls), kls, one, left=np.nan, right=np.nan)
                           for one in np.eye(len(kls))])  # (checkpoints, G)
        values = [(np.frombuffer(row["outcomes"].encode(), np.uint8) - 48) / 2  # 0, 1, 2 are kept
                  if by_prompt else row[measure] for row in chosen]
        lines.append(np.array(values).T @ shares)
    return np.array(lines)


def best_within(runs, kl):
    """(KL, win rate) of the best single checkpoint of at most this KL, as means over seeds."""
    found = []
    for own, others in held_out(runs):
        within = [at for at in others if others[at][0] <= kl]
        best = own[max(within, key=lambda at: others[at][1])] if within else {}
        found.append([best.get("gold/kl", np.nan), best.get("gold/win_rate", np.nan)])
    return np.mean(found, 0)


T_975 = (np.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student, 97.5%


def student(n):
    """97.5% quantile of Student's t of n - 1 degrees of freedom: a table, then Fisher's series."""
    if n <= len(T_975):
        return T_975[n - 1]
    z, v = 1.959964, n - 1
    return (z + (z ** 3 + z) / (4 * v) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * v ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * v ** 3))


def interval(values, chosen=True):
    """(mean, low, high), each (...), of values (seeds, ...): 95% over training seeds, or worlds.

    Student's t of as few seeds as there are. Where the settings of each were `chosen` on the
    others the values are not independent: the variance of the mean is not s^2 / n but
    s^2 (1 / n + 1 / (n - 1)) (Nadeau and Bengio 2003, with one part of n held out). What was not
    drawn again is not in it: in all but figure worlds golden model, data, prompts, and, but in
    figure proxies, the proxy.
    """
    n = len(values)
    with np.errstate(all="ignore"):  # of one seed: NaN
        half = student(n) * values.std(0, ddof=min(1, n - 1)) * (
            1 / n + chosen / max(n - 1, 1)) ** 0.5
    return values.mean(0), values.mean(0) - half, values.mean(0) + half


def over_prompts(gaps, draws=1000):
    """(low, high) of the means of each prompt's gaps (prompts, G): a bootstrap, 95% over prompts.

    Both sides answered the same prompts and a prompt is drawn with both: what makes it hard for
    both cancels. The checkpoints stay, though they were chosen on these prompts: it says how these
    would do on other prompts, not what other runs would do.
    """
    n = len(gaps)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)
    return np.quantile(counts @ gaps / n, [0.025, 0.975], axis=0)


Gap = namedtuple("Gap", "online other gap low high prompts_low prompts_high")


def matched_gap(online, other, kls):
    """Win rate of `online` minus `other` at equal KL, by the frontiers of the seeds they share.

    Returns {KL: Gap} where all seeds have values, with 95% intervals, first over seeds, then over
    prompts (NaN where outcomes were not kept, or of unlike numbers of prompts; of unlike prompts
    they mean nothing); KL "mean" is over the log KL that all frontiers cover.
    """
    shared = {r["seed"] for r in online} & {r["seed"] for r in other}
    if not shared:
        return {}
    sides = [[r for r in runs if r["seed"] in shared] for runs in (online, other)]
    rows = [row for runs in sides for r in runs for row in r["rows"]]
    reached = [row["gold/kl"] for row in rows]
    grid = np.linspace(np.log(max(min(reached), 1e-3)), np.log(max(reached)), 200)
    at = np.concatenate([np.log(kls), grid])
    lines = np.array([frontiers(runs, at) for runs in sides])  # (2, seeds, KLs)
    covered = np.flatnonzero(~np.isnan(lines).any((0, 1))).tolist()
    where = {kl: [i] for i, kl in enumerate(kls) if i in covered}
    if even := [i for i in covered if i >= len(kls)]:  # in log KL
        where["mean"] = even
    prompts = {len(row.get("outcomes", "")) for row in rows}
    ends = np.full((len(where), 2), np.nan)
    if where and len(prompts) == 1 and prompts != {0}:
        one, two = (frontiers(runs, at, by_prompt=True).mean(0) for runs in sides)
        means = [(one - two)[:, some].mean(1) for some in where.values()]  # (prompts,) each
        ends = over_prompts(np.stack(means, 1)).T
    found = {}
    for (kl, some), over in zip(where.items(), ends, strict=True):
        one, two = lines[:, :, some].mean(2)
        found[kl] = Gap(one.mean(), two.mean(), *interval(one - two), *over)
    return found


WORLD_KLS, NEAR = (1, 2, 3, 5, 8, 13), 1.25  # where worlds are compared, and how near is near


def nearest(runs, measure="gold/win_rate"):
    """(KL, value) of each world's checkpoint nearest to each of WORLD_KLS, (worlds, 6) each.

    Nearest in log KL, over all runs of the side; NaN where that is not within a factor of NEAR.
    Nothing is chosen by what it is judged by, and nothing is mixed.
    """
    found = []
    for one in grouped(runs, "seed").values():
        kl, value = columns(one, "gold/kl", measure)
        off = np.abs(np.log(np.maximum(kl, 1e-9)) - np.log(WORLD_KLS)[:, None])
        at = off.argmin(1)
        far = off.min(1) > np.log(NEAR)
        found.append([np.where(far, np.nan, kl[at]), np.where(far, np.nan, value[at])])
    return np.array(found).swapaxes(0, 1)


def world_gaps(online, other, measure="gold/win_rate"):
    """`online` minus `other` at equal KL, of worlds in which everything was drawn anew.

    Returns {(kind, KL): gaps (worlds,)}, without the worlds where a side has no policy there. Kind
    "single" is by `nearest`, "frontier" by `frontiers`, whose settings are those of the other
    worlds. KL "mean" is a world's mean over the KLs that it has; ("single", "mean") is the primary
    number, all others describe it.
    """
    worlds = sorted({r["seed"] for r in online} & {r["seed"] for r in other})
    sides = [[r for seed in worlds for r in runs if r["seed"] == seed] for runs in (online, other)]
    found = {}
    for kind, values in (("single", [nearest(runs, measure)[1] for runs in sides]),
                         ("frontier", [frontiers(runs, np.log(WORLD_KLS), measure)
                                       for runs in sides])):
        gaps = values[0] - values[1]  # (worlds, 6)
        gaps = gaps[~np.isnan(gaps).all(1)]
        every = zip((*WORLD_KLS, "mean"), (*gaps.T, np.nanmean(gaps, 1)), strict=True)
        found |= {(kind, kl): one[~np.isnan(one)] for kl, one in every}
    return found


# ---- panels: each is drawn on its axes and yields what it shows as rows for a CSV ----------------


def columns(runs, *keys):
    """Values (keys, checkpoints) of the judged checkpoints of these runs."""
    return np.array([[row[key] for run in runs for row in run["rows"]] for key in keys])


def band(axes, name, x, values, row, least=None, **style):
    """A line of the means of `values` (seeds, X) over `x`, a band from the lowest to the highest.

    Returns `row` with `name`, mean, low and high for every x at which all seeds have a value, or
    so many of them at `least`.
    """
    few = (~np.isnan(values)).sum(0) < (least or len(values))
    known = np.ma.masked_invalid(np.where(few, np.nan, values))
    mean, low, high = (some.filled(np.nan) for some in (known.mean(0), known.min(0), known.max(0)))
    axes.plot(x, mean, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
    return [row | {name: x[i], "mean": mean[i], "low": low[i], "high": high[i]}
            for i in np.flatnonzero(~np.isnan(mean))]


def way(axes, run, measure, row, **style):
    """A run's way from checkpoint to checkpoint, with standard errors; returns rows as `band`."""
    x, y, xerr, yerr = columns([run], "gold/kl", measure, "gold/kl_se", f"{measure}_se")
    axes.errorbar(x, y, yerr, xerr, markersize=4.5, elinewidth=0.8, **style)
    return [row | {"kl": kl, "mean": value} for kl, value in zip(x, y, strict=True)]


def ways_at(runs, kls, measure="gold/win_rate"):
    """Each run's way from SFT, checkpoint by checkpoint, at these KLs: (runs, G), NaN beyond it."""
    points = [sorted((row["gold/kl"], row[measure]) for row in run["start"] + run["rows"])
              for run in runs]
    return np.array([np.interp(kls, *zip(*some, strict=True), left=np.nan, right=np.nan)
                     for some in points])


def ways(axes, runs, measure):
    """The way from SFT of each side and beta: of several seeds mean and range, as far as two go."""
    shapes = shapes_of(r["beta"] for r in runs)
    lines = dict(zip(reversed(shapes), cycle(("-", "--", ":")), strict=False))  # solid: the largest
    for group in groups_of(runs):
        for (beta,), some in grouped(group.runs, "beta").items():
            label = group.label + f", beta {beta}" * (beta is not None)
            style = dict(color=group.colour, alpha=0.9)
            if len(some) == 1:
                run = some[0] | {"rows": some[0]["start"] + some[0]["rows"]}
                yield from way(axes, run, measure, {"run": run["name"]}, label=label,
                               fmt=shapes[beta] + lines[beta], **style)
                continue
            for run in some:
                axes.plot(*columns([run], "gold/kl", measure), shapes[beta], markersize=3.5,
                          alpha=0.4, color=group.colour)
            last = sorted(columns([run], "gold/kl").max() for run in some)[-2]
            kls = np.linspace(0, last, 100)
            yield from band(axes, "kl", kls, ways_at(some, kls, measure), {"run": label}, least=2,
                            label=f"{label}: mean and range of {len(some)} seeds",
                            linestyle=lines[beta], **style)


def over_kl(axes, runs, measure):
    """Points and frontiers of each group, or the way of its only run; a line where SFT is."""
    if not all(measure in row for r in runs for row in r["rows"]):
        stop("the hidden utility is known of toy samples only, and these runs have others")
    groups, by = groups_of(runs), "beta" if len(grouped(runs, "loss")) == 1 else "loss"
    shapes = shapes_of(r[by] for r in runs)
    in_order = [(g.loss, g.model) for g in groups if g.source == "in order"]
    for group in groups:
        style = dict(color=group.colour, label=group.label, linestyle=DASHES.get(group.loss, "-"))
        row = {"group": group.label, "loss": group.loss, "model": group.model, "measure": measure}
        for run in group.runs:
            axes.plot(*columns([run], "gold/kl", measure), shapes[run[by]], color=group.colour,
                      markersize=3, alpha=0.2)
        if len(group.runs) == 1:
            yield from way(axes, run, measure, row, marker=shapes[run[by]], **style)
            continue
        kl = columns(group.runs, "gold/kl")
        grid = np.linspace(np.log(kl[kl > 0].min()), np.log(kl.max()), 200)
        covered = group.source == "online" and (group.loss, group.model) in in_order  # by the same
        yield from band(axes, "kl", np.exp(grid), frontiers(group.runs, grid, measure), row,
                        linewidth=5 if covered else 1.6, **style)
        for own, others in held_out(group.runs, measure):
            for at in hull(others):
                axes.plot(own[at]["gold/kl"], own[at][measure],
                          shapes[at[0] if by == "beta" else group.loss], color=group.colour,
                          markersize=5, markeredgecolor="white", markeredgewidth=0.5)
    start = [row[measure] for r in runs for row in r["start"]]
    if start:
        axes.axhline(np.mean(start), color="0.4", linestyle=":", zorder=0,
                     label=f"SFT, where all start: {np.mean(start):.2f}")
    for value, shape in shapes.items() if len(shapes) > 1 else ():
        axes.plot([], [], shape, color="0.4", markersize=4, label=f"{by} {NAMES.get(value, value)}")
    if measure == "toy/utility":  # a few ruined policies would squeeze all others
        values = columns(runs, measure)
        low = min([np.quantile(values, 0.05, method="lower"), *start])
        axes.set_ylim(low - 0.1, values.max() + 0.1)
        if values.min() < low:
            axes.set_title(f"{np.mean(values < low):.0%} of the points lie lower", loc="right",
                           fontsize=8)


def gaps(axes, runs, measure):
    """The main claim: online minus others of its loss and model at matched KL.

    Of several proxies also minus online by the study's own. 95% intervals: thin, and in the legend,
    over training seeds, thick over prompts.
    """
    groups = groups_of(runs)
    pairs = [(online, other) for other in groups for online in groups
             if online.source == "online" and online.loss == other.loss
             and online.model == other.model
             and (other.source != "online" or other.proxy == "proxy" != online.proxy)]
    several = len({online.proxy for online, _ in pairs}) > 1
    for i, (online, other) in enumerate(pairs):
        found = matched_gap(online.runs, other.runs, [0.5, 1, 2, 3, 5, 8, 13, 20, 30])
        title, colour = f"{online.label} - {other.label}", (online if several else other).colour
        for kl, values in found.items():
            row = {"comparison": title, "model": other.model, "kl": kl} | values._asdict()
            for name, group in (("online", online), ("other", other)) if kl != "mean" else ():
                row[f"{name}_single_kl"], row[f"{name}_single"] = best_within(group.runs, kl)
            yield row
        if "mean" in found:
            title += ": mean {0.gap:+.3f} [{0.low:+.3f}, {0.high:+.3f}]".format(found.pop("mean"))
        gap, *ends = np.array([values[2:] for values in found.values()]).reshape(-1, 5).T
        at = np.array(list(found)) * 1.03 ** i
        axes.errorbar(at, gap, np.maximum([gap - ends[0], ends[1] - gap], 0), color=colour,
                      linestyle=":" if other.source == "online" else DASHES.get(online.loss, "-"),
                      marker="o", markersize=4, capsize=2, label=title)
        axes.vlines(at, *ends[2:], color=colour, linewidth=4, alpha=0.4)  # over prompts
    if np.isinf(axes.dataLim.width):
        stop("no KL at which online and another of its loss, model and seeds can be compared")
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)


def worlds(axes, runs, measure):
    """Each side minus another at equal KL, over worlds: means, 95% intervals, a dot a world."""
    measure = measure.removesuffix(" gap")
    groups = sorted(groups_of(runs), key=lambda group: group.source != "online")
    for i, (one, other) in enumerate(combinations(groups, 2)):
        title = f"{one.label} - {other.label}"
        colour = other.colour if one.source == "online" else "0.4"
        for (kind, kl), gaps in world_gaps(one.runs, other.runs, measure).items():
            if not len(gaps):
                continue
            mean, low, high = interval(gaps, chosen=kind == "frontier")
            yield {"comparison": title, "measure": measure, "kind": kind, "kl": kl, "mean": mean,
                   "low": low, "high": high, "worlds": len(gaps), "above": int((gaps > 0).sum()),
                   "least": gaps.min(), "most": gaps.max()}
            if kl == "mean":
                label = f"{title}, {kind}: mean {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
                axes.plot([], [], "o" if kind == "single" else "_", color=colour, label=label)
                continue
            x = kl * 1.04 ** (2 * i + (kind == "frontier"))
            ends = [[mean - low], [high - mean]] if len(gaps) > 2 else None  # of two: too long
            axes.errorbar(x, mean, ends, capsize=2, color=colour, markersize=5,
                          marker="o" if kind == "single" else "_")
            if kind == "single":
                axes.plot([x] * len(gaps), gaps, ".", color=colour, markersize=3, alpha=0.4)
    axes.axhline(0, color="0.5", linewidth=0.8, zorder=0)


def over_refresh(axes, runs, measure):
    """Win rate at equal KL over K, the steps whose responses are sampled at once; 95% intervals.

    Dotted: offline on D_golden. Where a KL is not reached by all seeds nothing is drawn. The CSV
    also has by how much online (K = 1) is ahead, seed by seed, with both intervals of `gaps`.
    """
    parts = by_refresh(runs)
    if offline := [r for r in runs if r["source"] == "offline"]:
        parts["offline"] = offline
    kls, ends = (1, 2, 4, 8, 16), ("gap", "gap_low", "gap_high", "prompts_low", "prompts_high")
    ahead = {k: matched_gap(parts.get(1, []), part, kls) for k, part in parts.items() if k != 1}
    for i, kl in enumerate(kls):
        found = {}
        for k, part in parts.items():
            mean, low, high = interval(frontiers(part, np.log([kl]), measure)[:, 0])
            if not np.isnan(mean):
                found[k] = mean, low, high
                yield {"kl": kl, "every": k, "mean": mean, "low": low, "high": high} | dict(
                    zip(ends, ahead.get(k, {}).get(kl, ())[2:], strict=False))
        level = found.pop("offline", None)
        if found:
            mean, low, high = np.array(list(found.values())).T
            line = axes.errorbar(np.array(list(found)) * 1.04 ** i, mean, [mean - low, high - mean],
                                 marker="o", markersize=4, capsize=2, label=f"KL {kl}")
            if level:
                axes.axhline(level[0], color=line[0].get_color(), linestyle=":", linewidth=1)


def step_seconds(axes, runs, measure):
    """Seconds a training step over K, of sampling, labelling and learning, not of evaluation.

    As the runs themselves were timed, with whatever ran beside them; older runs were not.
    """
    for k, some in by_refresh(runs).items():
        if each := [r["rows"][-1][measure] for r in some if measure in r["rows"][-1]]:
            mean, low, high = np.mean(each), min(each), max(each)
            axes.errorbar([k], [mean], [[mean - low], [high - mean]], marker="o", capsize=2,
                          color=COLOURS["online"])
            yield {"every": k, "seconds": mean, "low": low, "high": high}
    axes.set_ylim(0)


def peaks(axes, runs, measure):
    """The 90% quantile of win rate over all checkpoints, by policy size: means over seeds."""
    found = {}
    for group in groups_of(runs):
        tops = [np.quantile(columns(one, "gold/win_rate"), 0.9)
                for one in grouped(group.runs, "seed").values()]
        found[group.model, group.source] = np.array([np.mean(tops), min(tops), max(tops)])
    sizes, sources = (list(dict.fromkeys(r[key] for r in runs)) for key in ("model", "source"))
    if lacks := {*product(sizes, [*sources, *["online"] * ("gap" in measure)])} - found.keys():
        stop("no run of size {}, source {}: sizes cannot be compared".format(*min(lacks)))
    for i, source in enumerate(sources):
        rows = np.array([found[size, source] - (
            found[size, "online"][0] if measure == "peak gap" else 0) for size in sizes])
        mean, low, high = rows.T
        axes.bar(np.arange(len(sizes)) + 0.25 * (i - 1), mean, 0.22, yerr=[mean - low, high - mean],
                 color=COLOURS.get(source), label=source, error_kw={"linewidth": 0.8})
        for size, row in zip(sizes, rows, strict=True):
            yield {"model": size, "source": source, "mean": row[0], "low": row[1], "high": row[2]}
    axes.set_xticks(range(len(sizes)), sizes)


def scatter(axes, runs, measure):
    """Every checkpoint's win rate over its accuracy on D_golden; a shape a beta.

    Each correlation comes with the lowest and highest of the seeds'.
    """
    shapes = shapes_of(f"beta {r['beta']}" for r in runs)
    for group in groups_of(runs):
        parts = {"all": group.runs} | {f"beta {beta}": part for (beta,), part in sorted(
            grouped(group.runs, "beta").items(), key=str)}
        found, colour = {}, COLOURS.get(group.source)
        for name, part in parts.items():
            x, y = columns(part, "gold/accuracy_golden", measure)
            found[name] = np.corrcoef(x, y)[0, 1]
            seeds = [np.corrcoef(columns(one, "gold/accuracy_golden", measure))[0, 1]
                     for one in grouped(part, "seed").values()]
            yield {"group": group.source, "of": name, "checkpoints": len(x),
                   "correlation": found[name], "low": min(seeds), "high": max(seeds)}
            if name != "all":
                axes.plot(x, y, shapes[name], markersize=3, alpha=0.5, color=colour)
        axes.plot([], [], "o", color=colour, label=f"{group.label}: r " + ", ".join(
            f"{r:+.2f} ({name})" for name, r in found.items()))
    for beta, shape in shapes.items():
        axes.plot([], [], shape, color="0.4", markersize=4, label=beta)


def over_steps(axes, runs, measure):
    """Means over a group's runs by step, for the two smallest betas that all groups have.

    Up to the last step that all reach, at online's learning rate if a group has several. The band
    is the lowest and highest seed.
    """
    groups = groups_of(runs)
    shared = set.intersection(*({r["beta"] for r in group.runs} for group in groups))
    last = min(max(row["step"] for r in group.runs for row in r["rows"]) for group in groups)
    rate = next((group.runs[0]["lr"] for group in groups if group.source == "online"), None)
    lacks = "no beta that all groups have"
    for group in groups:
        some = [r for r in group.runs if r["lr"] == rate] or group.runs
        for beta, line in zip(sorted(shared, key=str)[:2], ("--", "-"), strict=False):
            tracks = [{row["step"]: row[measure] for row in r["start"] + r["rows"] if measure in row
                       and row["step"] <= last} for r in some if r["beta"] == beta]
            tracks = [track for track in tracks if track]  # own pairs may all be equal: no accuracy
            steps = sorted(set.intersection(*map(set, tracks or [()])))
            if not steps:
                lacks = f"no step at which all runs, {group.label}, beta {beta}, have {measure}"
                continue
            values = np.array([[track[step] for step in steps] for track in tracks])
            yield from band(axes, "step", steps, values,
                            {"group": group.source, "beta": beta, "measure": measure},
                            color=COLOURS.get(group.source), linestyle=line, marker=".",
                            label=f"{group.label}, beta {beta}")
    if not axes.lines:
        stop(lacks)


def logratio(axes, runs, measure):
    """By how much less likely people's chosen responses have become, over KL.

    A point is a checkpoint. A line joins means over the checkpoints of every doubling of KL, the
    band is the lowest and highest seed. Dashed: SFT tilted by a normal score, the best policy for
    its KL, under which the better of two samples changes by sqrt(2 KL / 3.14) - KL.
    """
    kl = columns(runs, "gold/kl")
    low, high = kl[kl > 0].min(), kl.max()
    edges = 2.0 ** np.arange(np.floor(np.log2(low)), np.log2(high) + 1)
    for group in groups_of(runs):
        values = []  # (seeds, doublings)
        for one in grouped(group.runs, "seed").values():
            x, y = columns(one, "gold/kl", measure)
            axes.plot(x, y, ".", color=group.colour, markersize=3, alpha=0.3)
            parts = [y[(edge <= x) & (x < 2 * edge)] for edge in edges]
            values.append([part.mean() if len(part) else np.nan for part in parts])
        yield from band(axes, "kl", edges * 2 ** 0.5, np.array(values),
                        {"group": group.source, "measure": measure}, marker="o", markersize=4,
                        color=group.colour, label=group.label)
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.sqrt(2 * x / np.pi) - x, "--", color="0.4", label="SFT tilted by a score")
    axes.set_xscale("log")  # first: limits depend on it
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(top=1)


def training_loss(axes, runs, measure):
    """The online run's loss, and that of offline runs on the pairs it made."""
    if not all("steps" in run for run in runs):
        stop("training losses are in run folders alone, not in files of checkpoints")
    online = next((run for run in runs if run["source"] == "online"), runs[0])
    for i, run in enumerate(runs):
        loss, first = (np.array([row[measure] for row in r["steps"]]) for r in (run, online))
        gap = np.abs(loss[:len(first)] - first[:len(loss)]).max()  # over the steps of both
        smooth = np.convolve(loss, np.ones(10) / 10, "valid")
        axes.plot(np.arange(len(smooth)) + 10, smooth, color=COLOURS.get(run["source"]),
                  linewidth=3 - i, label=run["source"] + (
                      "" if run is online else f": largest difference {gap:.2g}"))
        yield {"run": run["name"], "source": run["source"], "steps": len(loss),
               "largest_difference": gap}


def classifiers(axes, files, measure):
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


# ---- figures: a row of panels, each with its axes ------------------------------------------------

KL, STEP = "KL(policy, SFT) in nats a response", "gradient step"  # x axes
LOG_KL, REFRESH = f"{KL}, log scale", "steps whose responses are sampled at once"
MEASURES = {  # y axes
    "gold/win_rate": "win rate against the golden policy",
    "toy/utility": "hidden utility of a response, mean",
    "gold/accuracy_golden": "accuracy on D_golden", "gold/accuracy_self": "accuracy on own samples",
    "gold/chosen_logratio": "mean log-ratio of chosen, D_golden",
    "gap": "online minus other (above 0: better)",
    "gold/win_rate gap": "difference in win rate",
    "toy/utility gap": "difference in hidden utility",
    "peak": "90% quantile of win rate", "peak gap": "90% quantile of win rate, minus online's",
    "step_seconds": "seconds a step, mean and range of runs",
    "loss": "training loss, mean of 10 steps", "accuracy_online": "accuracy on D_online"}
WIN_RATES = over_kl, LOG_KL, "gold/win_rate"
GAPS = gaps, LOG_KL, "gap"
FIGURES = {  # name: what `draw` makes it of; win rate over KL where nothing else is said
    "main": dict(title="Online and offline from the same start",
                 panels=[(ways, KL, "gold/win_rate")], split=None),
    "fig1": dict(title="Online against offline at equal KL"),
    "fig4": dict(title="Is it coverage? Offline on the online run's own pairs, shuffled"),
    "fig5": dict(title="Is it quality? Offline on pairs of the final online policy"),
    "fig6": dict(title="Who agrees with the golden model along the online run", split=None,
                 panels=[(classifiers, "share of the online run", "accuracy_online")]),
    "fig7": dict(title="Does the better classifier win more?",
                 panels=[(scatter, MEASURES["gold/accuracy_golden"], "gold/win_rate")]),
    "fig8": dict(title="Fitting the fixed pairs of D_golden", width=6,
                 panels=[(over_steps, STEP, "gold/accuracy_golden"),
                         (over_steps, STEP, "gold/chosen_logratio")]),
    "fig9": dict(title="Is it the loss? Best-of-two has no rejected response"),
    "fig10": dict(title="Is it size? Larger policies, the same judge", split="model", width=4),
    "fig11": dict(title="Peaks by size, minus online's", panels=[(peaks, "policy", "peak gap")]),
    "fig12": dict(title="Quality or contrast? Offline on pairs of two policies"),
    "fig13": dict(title="How much order is needed? Shuffled within windows of batches"),
    "fig14": dict(title="Peaks by size", panels=[(peaks, "policy", "peak")]),
    "tandem": dict(title="The online run's pairs in its order",
                   panels=[(training_loss, STEP, "loss")]),
    "losses": dict(title="Do other losses behave alike?"),
    "gap": dict(title="Online minus others at equal KL, 95% intervals", panels=[GAPS]),
    "self": dict(title="Classifying one's own samples",
                 panels=[(over_steps, STEP, "gold/accuracy_self")]),
    "logratio": dict(title="What becomes of the chosen responses of D_golden",
                     panels=[(logratio, LOG_KL, "gold/chosen_logratio")]),
    "utility": dict(title="What the judge sees, and what people would feel",
                    panels=[WIN_RATES, (over_kl, LOG_KL, "toy/utility")]),
    "refresh": dict(title="How online is online enough? Responses sampled anew every K steps",
                    panels=[WIN_RATES, (over_refresh, REFRESH, "gold/win_rate"),
                            (step_seconds, REFRESH, "step_seconds")]),
    "worlds": dict(title="Everything drawn anew: who is ahead at equal KL", panels=[
        (worlds, LOG_KL, "gold/win_rate gap"), (worlds, LOG_KL, "toy/utility gap")], split=None),
    "proxies": dict(title="Online's proxy from fewer pairs", panels=[WIN_RATES, GAPS], width=5.6),
}


def draw(runs, title, panels=(WIN_RATES,), split="loss", width=5.2):
    """Each of the panels for each part of the runs; returns the figure and the rows of its CSV.

    A part is a model, or a loss where every loss has several sources, or all runs.
    """
    parts = grouped(runs, split) if split else {}
    if split != "model" and (len(parts) == 1 or any(
            len(grouped(some, "source")) == 1 for some in parts.values())):
        parts = {}
    drawn = list(product(parts.items() or [(("",), runs)], panels))
    wide, high = max(7, width * len(drawn)), 5 if len(drawn) == 1 else 4.4
    figure, alone = Figure(layout="constrained"), len(panels) == 1
    axes = figure.subplots(1, len(drawn), squeeze=False, sharex=alone, sharey=alone)
    lines, legend_rows = [], 2
    for ax, (((part,), some), (panel, x, measure)) in zip(axes[0], drawn, strict=True):
        lines += panel(ax, some, measure)
        ax.set(xlabel=x, ylabel=MEASURES[measure])
        if x == REFRESH:  # a tick at every K that was run
            ax.set_xscale("log")
            ax.set_xticks(list(by_refresh(some)), list(by_refresh(some)))
            ax.minorticks_off()
        if x == LOG_KL:
            ax.set_xscale("log")
            ax.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}",
                         minor_formatter="")
        if "accuracy" in measure:  # chance
            ax.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
        ax.set_title(f"policy: {part}" if split == "model" else NAMES.get(part, part))
        ax.grid(alpha=0.25)
        if labels := ax.get_legend_handles_labels()[1]:  # below, where it covers no point
            each = 0.53 + 0.061 * max(map(len, labels))  # inches
            across = max(1, int(wide / len(drawn) / each))
            ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15),
                      ncols=across)
            legend_rows = max(legend_rows, -(-len(labels) // across))
        if alone:
            ax.label_outer()
    figure.suptitle(title)
    figure.set_size_inches(wide, high + 0.17 * (legend_rows - 2))
    return figure, lines


def main(args):
    runs, given, checkpoints = args.runs, dict(FIGURES[args.figure]), []
    given["title"] = args.title or given["title"]
    if args.figure != "fig6":  # its panel reads the files
        runs = [run for path in dict.fromkeys(runs) for run in (
            read_checkpoints(path) if path.endswith(".csv") else [read_run(path)])]
        runs = [run for run in runs if args.lr in (None, run["lr"])]
        for run in runs:
            run["rows"] = [row for row in run["rows"] if row["step"] <= (args.steps or row["step"])]
        if not any(run["rows"] for run in runs):
            stop(f"no checkpoints of --lr {args.lr} up to --steps {args.steps}")
        runs = [run for run in runs if run["rows"]]
        checkpoints = [{"run": run["name"]} | {key: run[key] for key in SETTINGS}
                       | {key: row[key] for key in row if key.startswith(JUDGED)}
                       for run in runs for row in run["start"] + run["rows"]]
        given["title"] += (f"\n{len(runs)} runs, {sum(len(run['rows']) for run in runs)} points, "
                           f"seeds {', '.join(map(str, sorted({run['seed'] for run in runs})))}")
    figure, lines = draw(runs, **given)
    base = os.path.splitext(args.out)[0]
    try:
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        figure.savefig(args.out, dpi=150)
        write_csv(f"{base}.csv", lines)
        if checkpoints:
            write_csv(f"{base}-checkpoints.csv", checkpoints)
    except (OSError, ValueError) as e:  # a full disk, say, or no such format
        stop(f"--out {args.out}: {e}")
    print(f"{args.out} and {base}.csv: {len(runs)} runs")


# ---- the lesson ends here; machinery: groups, run folders, files of numbers, errors --------------

COLOURS = {"online": "#0072B2", "offline": "#D55E00", "shuffled": "#009E73", "in order": "#CC79A7",
           "windows of 4": "#E69F00", "windows of 40": "#56B4E9", "windows of 500": "#56B4E9",
           "final vs final": "#E69F00", "sft vs early": "#56B4E9", "early vs final": "#CC79A7",
           "proxy": "#000000"}  # Okabe and Ito: told apart by colour-blind readers too
PROXIES = ["#0072B2", "#CC79A7", "#009E73", "#000000"]  # online, where there are several
REFRESHED = ["#56B4E9", "#009E73", "#E69F00", "#CC79A7"]  # every K steps, by rising K
DASHES = {"ipo": "-", "dpo": "--", "slic": "-.", "bo2": ":"}
NAMES = {"ipo": "IPO", "dpo": "DPO", "slic": "SLiC", "bo2": "Bo2"}
GROUP = "source", "loss", "model", "proxy"  # what the runs of a group share


def grouped(runs, *keys):
    """{what runs share under `keys`: the runs}, in order of first appearance."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[key] for key in keys), []).append(run)
    return groups


def by_refresh(runs):
    """{K: its runs} by rising K: the responses of K steps were sampled at once; 1 is online."""
    found = {int((source.split() + ["1"])[1]): some for (source,), some in grouped(
        runs, "source").items() if source == "online" or source.startswith("every ")}
    return dict(sorted(found.items()))


def groups_of(runs):
    """The groups of a figure: each with what its runs share, the runs, a label and a colour.

    The label is the source and what tells the group from the others. The colour is the source's;
    each of several proxies, and of several K, has its own.
    """
    groups = [SimpleNamespace(**dict(zip(GROUP, shared, strict=True)), runs=some)
              for shared, some in grouped(runs, *GROUP).items()]
    losses = {group.loss for group in groups}
    proxies = dict(zip(dict.fromkeys(g.proxy for g in groups if g.source == "online"),
                       cycle(PROXIES), strict=False))
    every = [f"every {k} steps" for k in by_refresh(runs) if k > 1]
    colours = COLOURS | dict(zip(every, cycle(REFRESHED), strict=False))
    for group in groups:
        words, group.colour = [group.source], colours.get(group.source, "0.5")
        if len(losses) > 1:
            words.append(NAMES.get(group.loss, group.loss))
        if group.source == "online" and len(proxies) > 1:
            group.colour = proxies[group.proxy]
            found = {run["proxy_accuracy"] for run in group.runs} - {""}
            words.append(f"by {group.proxy}")
            words += [f"({' to '.join(sorted({min(found), max(found)}))})"] if found else []
        group.label = " ".join(words)
    return groups


def shapes_of(values):
    """{value: marker}, in order, so that it means the same in every figure of the same values."""
    return dict(zip(sorted(set(values), key=str), cycle("os^Dvp"), strict=False))


SETTINGS = *GROUP, "seed", "beta", "lr", "proxy_accuracy"
JUDGED = "step", "gold/", "toy/", "outcomes"  # how the names begin that a judged row has


def source_of(args):
    """Where a run's responses come from, in the words of the legend."""
    if args["script"] == "online_rlhf.py":
        every = args.get("refresh_every", 1)
        return f"every {every} steps" if every > 1 else "online"
    name = os.path.basename(args["data"])
    if "-vs-" in name:
        return " ".join(name.removesuffix(".jsonl").split("-")[:3])
    if not name.startswith("stream.jsonl"):
        return "offline"
    window = args["shuffle_window"]
    return {0: "shuffled", 1: "in order"}.get(window, f"windows of {window}")


def toy_utility(folder):
    """{step: mean and standard error} of the hidden utility of a run's samples; of toy prompts."""
    values = {}
    if os.path.exists(f"{folder}/samples.jsonl"):
        with open(f"{folder}/samples.jsonl", encoding="utf-8") as f:
            for row in (json.loads(line) for line in f if line.endswith("\n")):
                if WISH.search(row["prompt"]):
                    values.setdefault(row["step"], []).append(
                        utility(row["prompt"], row["response"]))
    return {step: {"toy/utility": np.mean(v), "toy/utility_se":
                   np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else np.nan}
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
            steps = [json.loads(line) for line in f if line.endswith("\n")]  # the last may be half
    except (OSError, ValueError) as e:
        stop(f"{folder} is not a run folder: {e}")
    rows, hidden = [row for row in steps if "gold/win_rate" in row], toy_utility(folder)
    if not any(row["step"] for row in rows):
        stop(f"{folder}/metrics.jsonl holds no gold evaluation of a trained policy; train with "
             "--gold and --baseline")
    for row in rows:
        if took := [r["seconds"] for r in steps if "seconds" in r and r["step"] <= row["step"]]:
            row["step_seconds"] = np.mean(took)
        row |= hidden.get(row["step"], {})
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
                numbers = {key: float(row[key]) if row[key] else None for key in ("beta", "lr")}
                run = runs.setdefault(row["run"], {key: row[key] for key in SETTINGS} | numbers | {
                    "name": row["run"], "seed": int(row["seed"]), "rows": [], "start": []})
                outcomes = {"outcomes": row.pop("outcomes")} if row.get("outcomes") else {}
                run["rows" if int(row["step"]) else "start"].append(
                    {key: float(value) for key, value in row.items()
                     if value and key.startswith(JUDGED)} | outcomes | {"step": int(row["step"])})
    except (OSError, ValueError, KeyError) as e:
        stop(f"{path} is no file of checkpoints: {e!r}")
    return list(runs.values())


def write_csv(path, rows):
    """Dicts as a CSV file, numbers to six digits."""
    keys = list(dict.fromkeys(k for row in rows for k in row))
    with open(path + ".tmp", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, keys, restval="")
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()
                          if v == v} for row in rows)  # what is not known stays empty
    os.replace(path + ".tmp", path)


def stop(message, status=2):
    """Print one line on stderr and exit; status 2 says that the user's input is at fault."""
    print("error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main(parse_args())
