"""Draw the paper's figures from run folders: win rate over KL, one point a checkpoint.

    python plots.py runs/demo/online-ipo-s0 runs/demo/ipo-s0 --out win_rate_kl.png

Reads args.json and metrics.jsonl of each run folder; writes the figure and, beside it, the numbers
it shows as CSV. Colour and legend tell the source of the responses and the loss;
what differs otherwise wants a figure of its own.

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

COLOURS = {"online": "#0072B2", "offline": "#D55E00", "shuffled": "#009E73", "kept": "#CC79A7",
           "golden": "#E69F00"}  # Okabe and Ito: told apart by colour-blind readers too
STYLES = {"ipo": ("o", "-"), "dpo": ("s", "--"), "slic": ("^", "-."), "bo2": ("D", ":"),
          "sft": ("*", "")}
NAMES = {"ipo": "IPO", "dpo": "DPO", "slic": "SLiC", "bo2": "Bo2"}


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders")
    p.add_argument("--out", default="win_rate_kl.png", help="figure to write (png, pdf, svg)")
    p.add_argument("--title", default="", help="title of the figure")
    return p.parse_args(argv)


def fail(message):
    """Print one line on stderr and exit with status 2: the user's input is at fault."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_run(folder):
    """A run as {"source", "loss", "seed", "rows"}: rows are its gold evaluations, in order."""
    try:
        with open(f"{folder}/args.json", encoding="utf-8") as f:
            args = json.load(f)
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]
    except (OSError, ValueError) as e:
        fail(f"{folder} is not a run folder: {e}")
    rows = [row for row in rows if "gold/win_rate" in row]
    if not rows:
        fail(f"{folder}/metrics.jsonl holds no gold evaluation; train with --gold and --baseline")
    script = args["script"].removesuffix(".py")
    if script == "online_rlhf":
        source, loss = "online", args["loss"]
    else:
        replay = os.path.basename(args["data"]).startswith("stream.jsonl")
        kept = args["order"] == "kept" or args["shuffle_window"] == 1
        source, loss = ("kept" if kept else "shuffled") if replay else "offline", script
    return {"source": source, "loss": loss, "seed": args["seed"], "rows": rows,
            "name": os.path.basename(os.path.normpath(folder))}


def legend_words(run):
    """The legend's words for a run."""
    words = {"online": "online", "offline": "offline", "shuffled": "offline on D_online, shuffled",
             "kept": "offline on D_online, in order"}
    return f"{words[run['source']]} {NAMES.get(run['loss'], run['loss'])}"


def plot_win_rate_kl(axes, runs):
    """Win rate over KL (log axis), each checkpoint with its standard errors, a line a run."""
    seen = set()
    for run in runs:
        rows = [row for row in run["rows"] if row["gold/kl"] > 0]
        marker, line = STYLES.get(run["loss"], ("o", "-"))
        words = legend_words(run)
        axes.errorbar(
            [row["gold/kl"] for row in rows], [row["gold/win_rate"] for row in rows],
            xerr=[row["gold/kl_se"] for row in rows],
            yerr=[row["gold/win_rate_se"] for row in rows], color=COLOURS[run["source"]],
            marker=marker, linestyle=line, markersize=5, linewidth=1.2, elinewidth=0.8,
            label=None if words in seen else words)
        seen.add(words)
    axes.set(xscale="log", xlabel="KL(policy, SFT) in nats a response, log scale",
             ylabel="win rate against the baseline")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.axhline(0.5, color="0.7", linewidth=0.8, zorder=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)


def write_csv(path, runs):
    """The numbers behind the figure, a line a checkpoint."""
    keys = {k for run in runs for row in run["rows"] for k in row if k.startswith("gold/")}
    keys = ["step", *sorted(keys)]
    with open(path + ".tmp", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["run", "source", "loss", "seed", *keys])
        for run in runs:
            for row in run["rows"]:
                writer.writerow([run["name"], run["source"], run["loss"], run["seed"],
                                 *(f"{row[k]:.6g}" if k in row else "" for k in keys)])
    os.replace(path + ".tmp", path)


def main(args):
    runs = [read_run(folder) for folder in args.runs]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    plot_win_rate_kl(axes, runs)
    axes.set_title(args.title)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    figure.savefig(args.out, dpi=150)
    write_csv(os.path.splitext(args.out)[0] + ".csv", runs)
    print(f"{args.out} and {os.path.splitext(args.out)[0]}.csv: {len(runs)} runs")


if __name__ == "__main__":
    main(parse_args())
