"""Every figure's numbers by hand, and every experiment's commands by what they read."""

import contextlib
import json
import os
import resource
import runpy
import sys
from collections import Counter
from itertools import product
from types import SimpleNamespace

import pytest
from conftest import ROOT
from matplotlib.figure import Figure
from test_study import table_of, write_run

import plots
import study

# ---- figures: each CSV from a handful of made-up checkpoints -------------------------------------

PROMPT = "write two happy lines about a fox:"
STREAM = "x/stream.jsonl"
READS = {"offline": ("golden.jsonl", 0), "shuffled": (STREAM, 0), "in order": (STREAM, 1),
         "windows of 4": (STREAM, 4), "windows of 40": (STREAM, 40)} | {  # data, --shuffle-window
    name: (f"{name.replace(' ', '-')}-s0.jsonl", 0)
    for name in ("final vs final", "sft vs early", "early vs final")}


def row(step, kl, win, accuracy=0.5, own=0.5, ratio=0.0, outcomes="20"):
    """A judged checkpoint; each measure has a standard error of its own."""
    values = dict(kl=kl, win_rate=win, accuracy_golden=accuracy, accuracy_self=own,
                  chosen_logratio=ratio, response_length=9.0)
    return {"step": step, "outcomes": outcomes} | {
        f"gold/{name}{se}": value for i, (name, mean) in enumerate(values.items(), 1)
        if mean is not None for se, value in (("", mean), ("_se", 0.01 * i))}


@pytest.fixture
def make(tmp_path):
    """Writes a run folder and returns its path."""
    def write(source, seed, *rows, loss="ipo", beta=0.1, texts=None, **args):
        folder = tmp_path / f"run{len(os.listdir(tmp_path))}"
        read = dict(loss=loss) if source == "online" else dict(zip(
            ("data", "shuffle_window"), READS[source], strict=True))
        write_run(folder, "online_rlhf.py" if source == "online" else f"{loss}.py", rows,
                  seed=seed, beta=beta, **read, **args)
        for step, answers in (texts or {}).items():
            with open(folder / "samples.jsonl", "a" if step else "w") as f:
                f.writelines(json.dumps({"step": step, "prompt": PROMPT, "response": text}) + "\n"
                             for text in answers)
        return str(folder)
    return write


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws as `python plots.py` does; returns the rows of the CSV and the axes."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))

    def main(figure, runs):
        plots.main(plots.parse_args([*runs, "--figure", figure, "--out", f"{tmp_path}/f.png"]))
        rows = table_of(tmp_path / "f.csv")
        for r in rows:
            for key, value in r.items():
                with contextlib.suppress(ValueError):
                    r[key] = float(value)
        return rows, figures[-1].axes
    return main


def near(*values):
    return pytest.approx(values, abs=2e-6)


def pick(rows, *keys):
    return [tuple(r[key] for key in keys) for r in rows]


def labels(axes):
    return axes.get_legend_handles_labels()[1]


@pytest.mark.parametrize("figure, sources", [
    ("fig1", ["offline"]), ("fig4", ["offline", "shuffled"]), ("fig9", ["offline", "shuffled"]),
    ("fig5", ["offline", "final vs final"]),
    ("fig12", ["offline", "final vs final", "sft vs early", "early vs final"]),
    ("fig13", ["in order", "windows of 4", "windows of 40", "shuffled"])])
def test_win_rate_over_kl(make, draw, figure, sources):
    """Source i wins .1 KL + .1 i, seed 1 .02 more: the line is the mean, the band both seeds.

    A checkpoint of beta .5 lies below it. Seed 1 ends at KL 3, but for online: so does the line.
    """
    runs, sources, loss = [], ["online", *sources], "bo2" if figure == "fig9" else "ipo"
    for i, source in enumerate(sources):
        for seed in (0, 1):
            level, far = 0.1 * i + 0.02 * seed, 3 if seed and i else 4
            runs += [make(source, seed, row(0, 0, 0.1 + 0.2 * seed), row(1, 1, 0.1 + level),
                          row(2, far, 0.1 * far + level), loss=loss),
                     make(source, seed, row(1, 2, 0.15 + level), loss=loss, beta=0.5)]
    rows, (axes,) = draw(figure, runs)
    for i, source in enumerate(sources):
        some = [r for r in rows if r["group"] == source]
        assert len(some) == (158 if i else 200)  # of 200 KLs, even in log KL
        for j, r in enumerate(some):
            kl = 4 ** (j / 199)
            line = 0.1 * kl + 0.1 * i
            assert pick([r], "kl", "mean", "low", "high")[0] == pytest.approx(
                (kl, line + 0.01, line, line + 0.02), rel=1e-5)
    assert {pick([r], "loss", "model", "measure")[0] for r in rows} == {
        (loss, "sft", "gold/win_rate")}
    shapes = [] if loss == "bo2" else ["beta 0.1", "beta 0.5"]
    assert labels(axes) == [*sources, "SFT, where all start: 0.20", *shapes]
    assert [line.get_color() for line in axes.get_legend().get_lines()[:len(sources)]] == [
        plots.COLOURS[source] for source in sources]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert "log scale" in axes.get_xlabel() and axes.get_ylabel().startswith("win rate")
    assert axes.figure.get_suptitle().split("\n")[1] == (
        f"{len(runs)} runs, {len(runs) * 3 // 2} points, seeds 0, 1")


def test_figure_10_and_the_losses_in_panels(make, draw):
    """A panel a policy, and a panel a loss where each has several sources; of one run its way."""
    runs = [make(source, 0, row(0, 0, 0.1), row(2, 1, win), model=f"runs/{model}", loss=loss)
            for model, loss, win in (("sft", "dpo", 0.3), ("sft-2", "slic", 0.5))
            for source, win in (("online", win), ("offline", win - 0.1))]
    for figure, titles in (("fig10", ["policy: sft", "policy: sft-2"]), ("losses", ["DPO", "SLiC"]),
                           ("fig1", ["DPO", "SLiC"])):
        rows, axes = draw(figure, runs)
        assert pick(rows, "group", "loss", "model", "kl", "mean") == [
            ("online", "dpo", "sft", 1, 0.3), ("offline", "dpo", "sft", 1, 0.2),
            ("online", "slic", "sft-2", 1, 0.5), ("offline", "slic", "sft-2", 1, 0.4)]
        assert [ax.get_title() for ax in axes] == titles
        assert [labels(ax)[:2] for ax in axes] == [["SFT, where all start: 0.10", "online"]] * 2
    rows, (axes,) = draw("losses", runs[:3])  # SLiC online alone: nothing to set beside it
    assert pick(rows, "group") == [("online DPO",), ("offline DPO",), ("online SLiC",)]


def test_main_follows_each_run(make, draw):
    """From SFT on, standard errors .01 of KL and .02 of win rate, linear KL."""
    runs = [make("online", 0, row(0, 0, 0.1), row(1, 2, 0.4), beta=0.5),
            make("offline", 0, row(0, 0, 0.1), row(1, 3, 0.2), beta=0.1),
            make("offline", 0, row(0, 0, 0.1), row(1, 1, 0.3), beta=0.5)]
    rows, (axes,) = draw("main", runs)
    names = [os.path.basename(run) for run in runs for _ in range(2)]
    assert pick(rows, "run", "kl", "mean") == list(zip(
        names, [0, 2, 0, 3, 0, 1], [0.1, 0.4, 0.1, 0.2, 0.1, 0.3], strict=True))
    assert labels(axes) == ["online, beta 0.5", "offline, beta 0.1", "offline, beta 0.5"]
    across, up = (bars.get_segments()[1] for bars in axes.containers[0][2])
    assert across.tolist() == [near(1.99, 0.4), near(2.01, 0.4)]
    assert up.tolist() == [near(2, 0.38), near(2, 0.42)]
    assert axes.get_xscale() == "linear" and not axes.get_title()
    marks = [(c[0].get_marker(), c[0].get_linestyle()) for c in axes.containers]
    assert marks == [("s", "-"), ("o", "--"), ("s", "-")]  # solid: the largest beta


def test_figure_6_reads_who_agrees(tmp_path, draw):
    """Seed 1 .02 below seed 0; the proxy's line is of all files."""
    files = []
    for policy, first, proxy in (("online", 0.6, 0.8), ("offline", 0.7, 0.9)):
        for seed in (0, 1):
            files.append(f"{tmp_path}/classify-{policy}-s{seed}.jsonl")
            (tmp_path / files[-1]).write_text("".join(json.dumps({
                "gold/accuracy_policy": first - 0.01 * part - 0.02 * seed,
                "gold/accuracy_labeller": proxy - 0.03 * part - 0.02 * seed}) + "\n"
                for part in range(10)))
    rows, (axes,) = draw("fig6", files)
    keys = "classifier", "share_of_stream", "mean", "low", "high"
    for name, first, falls, least, most in (
            ("online", 0.59, 0.01, 0.58, 0.6), ("offline", 0.69, 0.01, 0.68, 0.7),
            ("proxy", 0.84, 0.03, 0.78, 0.9)):
        found = pick([r for r in rows if r["classifier"] == name], *keys)
        assert [f[1:] for f in found] == [near((i + 1) / 10, *(
            value - falls * i for value in (first, least, most))) for i in range(10)]
    assert labels(axes) == ["online policy, last checkpoint", "proxy",
                            "offline policy, last checkpoint"]


def test_figure_7_correlates_with_accuracy_on_d_golden(make, draw):
    """r by hand of 1 2 3 with 1 3 2 and with 1 2 3, of beta .5 of 1 2 with 2 1; SFT is no point."""
    runs = []
    for seed, wins in enumerate(((1, 3, 2), (1, 2, 3))):
        for beta, won in ((0.1, wins), (0.5, (2, 1))):
            runs.append(make("online", seed, row(0, 0, 9, accuracy=-9), *(
                row(i, i, 0.1 * win, accuracy=0.1 * i, own=0.1 * (i - 2) ** 2, ratio=-win)
                for i, win in enumerate(won, 1)), beta=beta))
    rows, (axes,) = draw("fig7", runs)
    assert pick(rows, "group", "of", "checkpoints") == [
        ("online", "all", 10), ("online", "beta 0.1", 6), ("online", "beta 0.5", 4)]
    assert pick(rows, "correlation", "low", "high") == [
        near(13 / 28, 2 / 7, 9 / 14), near(0.75, 0.5, 1), near(-1, -1, -1)]
    assert labels(axes)[0] == "online: r +0.46 (all), +0.75 (beta 0.1), -1.00 (beta 0.5)"
    assert axes.lines[0].get_xydata()[:3].tolist() == [near(.1, .1), near(.2, .3), near(.3, .2)]
    assert (axes.get_xlabel(), axes.get_xscale()) == ("accuracy on D_golden", "linear")
    assert axes.get_ylabel().startswith("win rate")


@pytest.mark.parametrize("figure, measures", [
    ("fig8", ["accuracy_golden", "chosen_logratio"]), ("self", ["accuracy_self"])])
def test_curves_over_steps(make, draw, figure, measures):
    """Betas .1 and .5: the two smallest that both have; steps 0 to 2: those that both have; of
    offline the learning rate of online. Each measure has an offset, beta, step and seed add."""
    offset, runs = {"accuracy_golden": 0.1, "accuracy_self": 0.2, "chosen_logratio": 0.3}, []
    for source, betas, steps, rates in (("online", (0.02, 0.1, 0.5, 1.0), (0, 1, 2), (3e-4,)),
                                        ("offline", (0.1, 0.5, 1.0), (0, 1, 2, 4), (1e-4, 3e-4))):
        for seed, beta, lr in ((s, b, lr) for s in (0, 1) for b in betas for lr in rates):
            more = 0.1 * (source == "offline") + 0.1 * beta + 0.02 * seed + 5 * (lr == 1e-4)
            runs.append(make(source, seed, *(row(
                step, step, 0.9, *(offset[m] + more + 0.01 * step for m in (
                    "accuracy_golden", "accuracy_self", "chosen_logratio"))) for step in steps),
                beta=beta, lr=lr))
    rows, axes = draw(figure, runs)
    expected = [(source, beta, f"gold/{m}", step, *near(*(
        offset[m] + 0.1 * (source == "offline") + 0.1 * beta + 0.01 * step + seed
        for seed in (0.01, 0, 0.02))).expected) for m in measures
        for source in ("online", "offline") for beta in (0.1, 0.5) for step in (0, 1, 2)]
    found = pick(rows, "group", "beta", "measure", "step", "mean", "low", "high")
    assert [f[:4] for f in found] == [e[:4] for e in expected]
    assert [f[4:] for f in found] == [near(*e[4:]) for e in expected]
    assert [ax.get_ylabel() for ax in axes] == [plots.MEASURES[f"gold/{m}"] for m in measures]
    assert labels(axes[0]) == [f"{s}, beta {b}" for s in ("online", "offline") for b in (0.1, 0.5)]
    assert {ax.get_xscale() for ax in axes} == {"linear"}


@pytest.mark.parametrize("figure, less", [("fig11", (0.19, 0.09)), ("fig14", (0, 0))])
def test_peaks_by_size(make, draw, figure, less):
    """Of win rates x, x + .1 and x + .2 the 90% quantile is x + .18, of all runs of a seed; the
    larger size wins .1 less of online's. Figure 11 takes away online's mean at the same size."""
    runs, wins = [], {"online": (0.0, -0.1), "offline": (-0.2, 0.3), "shuffled": (0.4, 0.6)}
    for source, levels in wins.items():
        for model, x in zip(("sft", "sft-2"), levels, strict=True):
            for seed in (0, 1):
                y = x + 0.02 * seed
                runs += [make(source, seed, row(0, 0, 5), row(1, 1, y), row(2, 9, y + 0.2),
                              model=f"runs/{model}"),
                         make(source, seed, row(1, 2, y + 0.1), beta=0.5, model=f"runs/{model}")]
    rows, (axes,) = draw(figure, runs)
    assert pick(rows, "source", "model") == [(s, m) for s in wins for m in ("sft", "sft-2")]
    assert pick(rows, "mean", "low", "high") == [
        near(*(levels[i] + top - less[i] for top in (0.19, 0.18, 0.2)))
        for levels in wins.values() for i in (0, 1)]
    assert [round(bar.get_height(), 6) for bar in axes.patches] == [
        round(r["mean"], 6) for r in rows]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["sft", "sft-2"]
    assert ("minus online's" in axes.get_ylabel()) == (figure == "fig11")


def test_tandem_takes_the_largest_difference(make, draw):
    """Of 12 losses to online's, over the steps of both; the line is the mean of 10 steps."""
    def losses(values):
        return [row(0, 0, 0.1), *({"step": i, "loss": v} for i, v in enumerate(values[:-1], 1)),
                row(len(values), 1, 0.3) | {"loss": values[-1]}]

    first = [float(i) for i in range(1, 13)]
    apart, longer = [*first[:5], 6.25, 6.5, *first[7:]], [*first[:-1], 12.125, 99.0]
    runs = [make("in order", 0, *losses(apart)), make("online", 0, *losses(first)),
            make("windows of 4", 0, *losses(longer)), make("shuffled", 0, *losses(first[:10]))]
    rows, (axes,) = draw("tandem", runs)
    assert pick(rows, "source", "steps", "largest_difference") == [
        ("in order", 12, 0.5), ("online", 12, 0), ("windows of 4", 13, 0.125), ("shuffled", 10, 0)]
    assert labels(axes)[:2] == ["in order: largest difference 0.5", "online"]
    assert axes.lines[1].get_xydata().tolist() == [near(10, 5.5), near(11, 6.5), near(12, 7.5)]


def test_gaps_by_hand(make, draw):
    """Online - offline at KL 1, 2, 3: .2, .28, .36 of seed 0 and .3 of seed 1; t 12.71 of two.

    Prompt by prompt it is .5 and 1. Only what shares loss, model and seed is compared.
    """
    runs = [make(source, seed, *(row(step, kl, win, outcomes=won) for step, (kl, win) in enumerate(
        zip((1, 2, 4), wins, strict=True), 1))) for source, seed, won, wins in (
            ("online", 0, "22", (0.5, 0.6, 0.8)), ("online", 1, "22", (0.6, 0.7, 0.9)),
            ("offline", 0, "10", (0.3, 0.32, 0.36)), ("offline", 1, "10", (0.3, 0.4, 0.6)))]
    more = [make("online", 0, row(1, 1, 0.5), row(2, 4, 0.5), loss="dpo"),
            make("offline", 0, row(1, 1, 0.2), row(2, 4, 0.2), loss="dpo"),
            make("offline", 1, row(1, 1, 0.9), row(2, 4, 0.9), loss="dpo"),
            make("online", 0, row(1, 1, 0.9), row(2, 4, 0.9), model="runs/sft-2"),
            make("online", 0, row(1, 1, 0.9), row(2, 4, 0.9), loss="slic")]
    rows, (axes,) = draw("gap", [*runs, *more])
    ipo, dpo = "online IPO - offline IPO", "online DPO - offline DPO"
    assert pick(rows, "comparison", "kl") == [(c, kl) for c in (ipo, dpo)
                                              for kl in (1, 2, 3, "mean")]
    assert {r["model"] for r in rows} == {"sft"}  # sft-2 has nothing to be compared with
    ratio = 4 ** (1 / 199)
    mean = (ratio**200 - 1) / 200 / (ratio - 1)  # KL over even log KLs from 1 to 4
    for r, kl in zip(rows, (1, 2, 3, mean), strict=False):
        one = 0.2 + 0.08 * (kl - 1)
        half = 12.71 * abs(one - 0.3) / 2**0.5 * (1 / 2 + 1) ** 0.5
        assert pick([r], "online", "other", "gap", "low", "high", "prompts_low", "prompts_high"
                    )[0] == pytest.approx((0.45 + 0.1 * kl, 0.3 + 0.06 * (kl - 1), (one + 0.3) / 2,
                                           (one + 0.3) / 2 - half, (one + 0.3) / 2 + half, 0.5, 1),
                                          abs=2e-5)
    keys = [f"{side}_single{what}" for side in ("online", "other") for what in ("_kl", "")]
    assert pick(rows[:4], *keys) == [near(1, 0.55, 1, 0.3), near(2, 0.65, 2, 0.36),
                                     near(2, 0.65, 2, 0.36), ("",) * 4]
    assert {r["gap"] for r in rows if r["comparison"] == dpo} == {0.3}  # of the seed that both have
    up = axes.containers[0][2][0].get_segments()[2]  # thin: over seeds
    assert up[:, 1].tolist() == near(*pick(rows[2:3], "low", "high")[0])
    assert axes.collections[1].get_segments()[2][:, 1].tolist() == [0.5, 1]  # thick: over prompts
    assert labels(axes)[0] == f"{ipo}: mean +0.297 [+0.222, +0.371]"
    weak = [make("online", seed, row(1, 1, 0.4), row(2, 4, 0.4), labeller="runs/proxy-9pairs")
            for seed in (0, 1)]
    rows, axes = draw("proxies", [*weak, *runs])
    assert set(pick([r for r in rows if r["comparison"]], "comparison")) == {
        ("online by proxy-9pairs - offline",), ("online by proxy - offline",),
        ("online by proxy-9pairs - online by proxy",)}
    assert {r["gap"] for r in rows if r["kl"] == 1 and r["comparison"].endswith("by proxy")} == {
        -0.15}
    assert set(pick([r for r in rows if r["group"]], "group")) == {
        ("online by proxy-9pairs",), ("online by proxy",), ("offline",)}


def test_utility_of_the_samples(make, draw):
    """Two verbs 5, one 4: the mean by checkpoint, standard error of (5, 4) .5; the axis is cut at
    the second lowest of 21."""
    both, one = "the fox danced. the fox sang.", "the fox danced."
    texts = {step: [both, one] for step in range(22)} | {
        3: [one, one], 4: [both, both], 5: [one, one, one, both]}
    run = make("online", 0, *(row(step, step, 0.01 * step) for step in range(22)), texts=texts)
    rows, (wins, felt) = draw("utility", [run])
    means = {3: 4.0, 4: 5.0, 5: 4.25}
    assert pick(rows, "measure", "kl", "mean") == [
        ("gold/win_rate", kl, 0.01 * kl) for kl in range(1, 22)] + [
        ("toy/utility", kl, means.get(kl, 4.5)) for kl in range(1, 22)]
    up = felt.containers[0][2][1].get_segments()
    assert [up[i][:, 1].tolist() for i in (0, 2, 3)] == [[4, 5], [4, 4], [5, 5]]
    assert felt.get_ylim() == near(4.15, 5.1)
    assert felt.get_title("right") == "5% of the points lie lower"
    assert (wins.get_xscale(), felt.get_xscale()) == ("log", "log")


# ---- what cannot be drawn or written is one line, and status 2 -----------------------------------


def refused(capsys, main, *args):
    with pytest.raises(SystemExit) as end:
        main(*args)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def test_figures_of_runs_that_cannot_be_compared(make, draw, capsys):
    low, high = make("online", 0, row(1, 1, 0.5)), make("offline", 0, row(1, 9, 0.5))
    for figure, runs in (("gap", [low, high]), ("proxies", [low, high]), ("gap", [low])):
        assert "no KL at which online" in refused(capsys, draw, figure, runs)
    large = make("online", 0, row(1, 1, 0.5), model="runs/sft-2")
    for figure in ("fig11", "fig14"):
        assert "no run of size sft-2, source offline" in refused(capsys, draw, figure,
                                                                 [low, high, large])
    assert "source online" in refused(capsys, draw, "fig11", [high])
    assert draw("fig14", [high])[0][0]["mean"] == 0.5
    equal = row(1, 1, 0.5, own=None)  # all own pairs are equal: they cannot be classified
    assert "no step" in refused(capsys, draw, "self", [make("online", 0, equal)])
    rows, _ = draw("self", [make("online", seed, first, row(2, 2, 0.5, own=0.25))
                            for seed, first in enumerate((equal, row(1, 1, 0.5)))])
    assert pick(rows, "step", "mean") == [(2, 0.25)]
    rows, _ = draw("self", [make("online", 0, equal), make("offline", 0, row(1, 1, 0.5, own=0.75))])
    assert pick(rows, "group", "step", "mean") == [("offline", 1, 0.75)]  # one side cannot be

def test_where_nothing_can_be_written(make, tmp_path, capsys):
    run = make("online", 0, row(1, 1, 0.5))
    os.symlink("/dev/full", tmp_path / "full.png")
    os.symlink("/dev/full", tmp_path / "table.csv.tmp")
    for out, says in (("f.xyz", "'xyz' is not supported"), ("full.png", "No space left"),
                      ("table.png", "No space left"), (f"{run}/args.json/f.png", "File exists")):
        args = plots.parse_args([run, "--out", os.path.join(tmp_path, out)])
        assert says in refused(capsys, plots.main, args)


def test_pairs_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    """A folder that is a file, a disk that is full at the pairs and at the weights of base/."""
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    os.symlink("/dev/full", tmp_path / "full/validation.jsonl.tmp")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for out, says in (("file/x", "file"), ("full", "No space left"), ("base", "File too large")):
        words = ["tasks.py", "toy", "--pairs", "9", "--width", "256", "--out", f"{tmp_path}/{out}"]
        monkeypatch.setattr(sys, "argv", words)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
        try:
            assert says in refused(capsys, lambda: runpy.run_path(f"{ROOT}/tasks.py",
                                                                  run_name="__main__"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# ---- experiments: each command by what it reads, told by what made that and not by its name ------

TRAIN, JUDGED = "model steps batch_size lr warmup seed", "gold baseline eval_data eval_every"
FLAGS = {"tasks": "name pairs skip taste width layers file", "sft": f"{TRAIN} data",
         "train": f"{TRAIN} data", "label": "model data", "classify": "model reference gold data",
         "sample": "model other gold data prompts seed",
         "online_rlhf": f"{TRAIN} beta labeller prompts refresh_every loss {JUDGED}"}


def commands(scale, *figures):
    """(what(path): a command and its flags, for a path among them again what made it;
    {(task, figure): what it draws}; {path: its command's flags})."""
    stages, drawn = study.experiments(study.parse_args(["--scale", scale, "--only", *figures]))
    made = {}
    for script, *words in stages.values():
        args = __import__(script.removesuffix(".py")).parse_args(words)
        made[args.out] = args
        args.kind = getattr(args, "command", script.removesuffix(".py"))

    def what(value):
        if isinstance(value, list):
            return tuple(map(what, value))
        if value in made:
            names = FLAGS.get(made[value].kind, f"{TRAIN} beta data shuffle_window {JUDGED}")
            return made[value].kind, *(what(getattr(made[value], name, None))
                                       for name in names.split())
        folder, _, name = str(value).rpartition("/")
        return (name, what(folder)) if folder in made else value

    return what, {at: [what(run) for run in runs] for at, runs in drawn.items()}, made


def toy(width=None, layers=None):
    return "tasks", "toy", 64_000, 0, "easy", width, layers, None


TASKS = tuple(("initial.jsonl", ("tasks", name, None, 0, "easy", None, None, None))
              for name in ("tldr", "helpful", "harmless", "arena"))
TOY = SimpleNamespace(
    scale="toy", task="toy", seeds=(0, 1, 2), betas=(0.02, 0.1, 0.5), lrs=(1e-4, 3e-4, 1e-3),
    lr=3e-4, steps=400, long=1600, warmup=20, windows=(4, 40), every=(4, 20, 100, 400), base=1,
    backbone=None, gold=(2000, 64, 1e-3, 50), proxy=(1200, 64, 1e-3, 50), prompts=1024,
    pairs=64_000, initial=("initial.jsonl", toy()), batches=(32, 32, 32), sizes=[
        ("sft", ("base", toy(*size)), 800, 64, 2e-3, 20, 0, (("initial.jsonl", toy()),))
        for size in ((32, 1), (), (96, 3))])
PAPER = SimpleNamespace(  # section 4 and appendix A of the paper
    scale="paper", task="harmless", seeds=(0,), betas=(0.1, 0.5, 1.0), lrs=(3e-6, 1e-5, 3e-5),
    lr=1e-5, steps=4000, long=20_000, warmup=100, windows=(4, 500), base=0,
    every=(4, 20, 100, 500, 4000), backbone="Qwen/Qwen2.5-7B", gold=(20_000, 16, 1e-4, 1000),
    proxy=(20_000, 32, 1e-4, 1000), pairs=90_000, prompts=2048, initial=TASKS[2],
    batches=(32, 16, 8), sizes=[("sft", f"Qwen/Qwen2.5-{model}B", *train, 100, 0, TASKS) for
                                model, *train in ((0.5, 4000, 128, 3e-5), (1.5, 8000, 128, 1e-5),
                                                  (3, 8000, 128, 1e-5))])


@pytest.mark.parametrize("s", [TOY, PAPER], ids=lambda s: s.scale)
def test_each_experiment_reads_what_the_paper_says(s):
    figures = [name for name in study.EXPERIMENTS if name != "main"]
    what, drawn, made = commands(s.scale, *figures)
    sft = s.sizes[s.base]
    gold = "train", s.backbone or sft, *s.gold, 0, s.initial
    d_golden = "label", gold, s.initial
    proxy = "train", sft, *s.proxy, 0, d_golden
    golden_policy = ("online_rlhf", sft, s.steps, 32, s.lr, s.warmup, 0, 0.1, gold, s.initial, 1,
                     "ipo", None, None, None, 100)
    baseline = "sample", golden_policy, None, None, d_golden, s.prompts, 0

    def run(kind, seed, beta, *source, lr=s.lr, steps=s.steps, size=s.base):
        return (kind, s.sizes[size], steps, s.batches[size], lr, s.warmup, seed, beta, *source,
                gold, baseline, d_golden, steps // (16 if steps == s.long else 8))

    def online(seed, beta=0.1, loss="ipo", labeller=proxy, every=1, **more):
        return run("online_rlhf", seed, beta, labeller, d_golden, every, loss, **more)

    def offline(seed, beta=0.1, loss="ipo", data=d_golden, window=0, **more):
        return run(loss, seed, beta if loss != "bo2" else None, data, window, **more)

    def stream(seed, beta=0.1, loss="ipo", window=0, **more):
        data = "stream.jsonl", online(seed, beta, loss, **more)
        return offline(seed, beta, loss, data, window, **more)

    def two(one, other):
        return [offline(seed, beta, data=("sample", sides[one], sides[other], gold, d_golden,
                                          s.steps * 32, seed)) for seed, beta in settings
                for sides in [dict(sft=sft, early=online(seed, steps=s.steps // 5),
                                   final=online(seed))]]

    settings, low = [*product(s.seeds, s.betas)], min(s.betas)
    sweep = [offline(*at, lr=lr, steps=s.long) for at in settings for lr in s.lrs]
    fig1 = [online(*at) for at in settings] + sweep
    fig4 = fig1 + [stream(*at) for at in settings]
    fig5 = fig1 + two("final", "final")
    fig10 = [run for seed in s.seeds for size in range(3) for run in (
        online(seed, low, size=size), stream(seed, low, size=size),
        *(offline(seed, low, lr=lr, steps=s.long, size=size) for lr in s.lrs))]
    weak = [(seed, ("train", sft, *s.proxy, seed, d_golden if share == 1 else ("initial.jsonl", (
        "tasks", "file", s.pairs // share, s.pairs // share * seed, "easy", None, None, d_golden))))
        for share in (256, 16, 4, 1) for seed in s.seeds]
    expected = {
        "fig1": fig1, "fig5": fig5, "fig12": fig5 + two("sft", "early") + two("early", "final"),
        "fig6": [("classify", policy, sft, gold, ("stream.jsonl", online(seed)))
                 for seed in s.seeds for policy in (online(seed), offline(seed, steps=s.long))],
        "fig9": [run for seed in s.seeds for run in (
            online(seed, loss="bo2"), stream(seed, loss="bo2"),
            *(offline(seed, loss="bo2", lr=lr) for lr in s.lrs))],
        "fig13": [run for seed in s.seeds for run in (online(seed, low), *(
            stream(seed, low, window=window) for window in (0, 1, *s.windows)))],
        "tandem": [online(0, low), stream(0, low, window=1), stream(0, low, window=4)],
        "losses": [run for seed in s.seeds for loss in ("dpo", "slic") for beta in (0.1, 0.5)
                   for run in (online(seed, beta, loss), *(
                       offline(seed, beta, loss, lr=lr) for lr in s.lrs))],
        "worlds": [run for at in settings for run in (
            online(*at), offline(*at, steps=s.long), stream(*at))],
        "refresh": fig1 + [online(*at, every=every) for at in settings for every in s.every],
        "proxies": sweep + [online(seed, beta, labeller=labeller)
                            for seed, labeller in weak for beta in s.betas]}
    expected |= dict.fromkeys(("fig4", "fig7", "fig8", "self", "gap", "utility", "logratio"), fig4)
    expected |= dict.fromkeys(("fig10", "fig11", "fig14"), fig10)
    for figure in figures:
        assert Counter(drawn[s.task, figure]) == Counter(expected[figure]), figure
    policies = {"classify-online-s0.jsonl": online(0),  # figure 6 goes by the names of its files
                "classify-offline-s0.jsonl": offline(0, steps=s.long)}
    assert policies == {path.split("/")[-1]: what(args.model) for path, args in made.items()
                        if "classify" in path and "s0" in path and s.task in path}


def test_demo_stops_its_golden_policy_early():
    """And both sides have three seeds at one beta, and equally many steps."""
    what, drawn, made = commands("demo", "main")
    assert [(run[0], run[2], run[7], run[-1]) for run in drawn["toy", "main"]] == [
        (script, 120, 0.05, 24) for script in ("online_rlhf", "ipo") for _ in range(3)]
    assert [run[6] for run in drawn["toy", "main"]] == [0, 1, 2] * 2
    assert made[made["data/demo/golden-policy-baseline.jsonl"].model].steps == 80


@pytest.mark.parametrize("scale", study.SCALES)
def test_a_path_has_one_command(scale):
    """Experiments that share a run make it with the same flags, whichever of them is run first."""
    made = {}
    for figure in study.EXPERIMENTS:
        args = study.parse_args(["--scale", scale, "--only", figure])
        for path, words in study.experiments(args)[0].items():
            assert made.setdefault(path, words) == words


def test_what_the_demo_writes(make, draw, tmp_path, monkeypatch):
    """Mean and range of the last rows, and the first seeds' last answers beside SFT's first.

    Of real tasks, which have no utility, the figure alone."""
    monkeypatch.chdir(tmp_path)
    both, one = "the fox danced. the fox sang.", "the fox danced."
    texts = {0: [one, both], 1: ["a", "b"], 2: [both, one]}

    def run(stages, jobs, folder):
        for words in [words for words in stages.values() if "--eval-data" in words]:
            source = "online" if words[0] == "online_rlhf.py" else "offline"
            seed, less = int(study.value_of(words, "--seed")), 0.2 * (source == "offline")
            rows = (row(0, 0, 0.1, 0.2), row(1, 1, 0.3 - less / 2),
                    row(2, 4, 0.6 - less + 0.03 * seed, accuracy=0.7, own=0.8))
            os.renames(make(source, seed, *rows, beta=float(study.value_of(words, "--beta")),
                            texts=texts if seed < 1 else {}), study.value_of(words, "--out"))

    monkeypatch.setattr(study, "run", run)
    study.main(study.parse_args(["--scale", "demo"]))
    lines = (tmp_path / "runs/demo/figures/main.md").read_text().splitlines()
    names = "online, beta 0.05", "offline, beta 0.05"
    same = "{0:.2f} ({0:.2f} to {0:.2f})".format
    assert lines[2:5] == [
        f"| SFT, where all start | {same(0.1)} | {same(0)} | {same(4.5)} | {same(0.2)} | "
        f"{same(9)} |", *(
            f"| {name} | {wins} | {same(4)} | {same(4.5)} | {same(0.7)} | {same(9)} |"
            for name, wins in zip(names, ("0.63 (0.60 to 0.66)", "0.43 (0.40 to 0.46)"),
                                  strict=True))]
    assert lines[6] == ("Where both have policies (KL 1.0 to 4.0) online wins 46% on average and "
                        "offline 32% (+0.15); at the highest 63% and 43% (+0.20).")
    assert lines[7:] == [line for said, other, worth in ((one, both, 4), (both, one, 5)) for line in
                         ("", PROMPT, f"  {'SFT':18} (+{worth}.0) {said}", *(
                             f"  {name:18} (+{9 - worth}.0) {other}" for name in names))]
    study.main(study.parse_args(["--scale", "gpu", "--only", "main"]))
    assert sorted(os.listdir("runs/gpu/figures")) == ["main-checkpoints.csv", "main.csv"]
