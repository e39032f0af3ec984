"""The study's commands parse and fit together; plots show the numbers of the runs."""

import csv
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import plots
import study


def args_of(*words):
    return study.parse_args(list(words))


@pytest.mark.parametrize("scale", study.SCALES)
def test_every_figure_has_its_runs_and_every_command_its_inputs(scale):
    stages, drawn = study.experiments(args_of("--scale", scale, "--only", *study.EXPERIMENTS))
    names, made = {"toy": ["toy"], "demo": ["toy"]}.get(scale, study.SCALES[scale]["tasks"]), set()
    assert drawn.keys() == {(task, figure) for task in names for figure in study.EXPERIMENTS}
    for makes, words in stages.items():
        module = __import__(words[0].removesuffix(".py"))
        args = vars(module.parse_args(words[1:]))
        for key in ("model", "reference", "gold", "labeller", "baseline", "data", "prompts",
                    "validation", "eval_data", "file", "other"):
            value = args.get(key)
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, str) and not path.startswith(("Qwen/", "HuggingFaceTB/")):
                    folder = path.removesuffix("/stream.jsonl")
                    base = path.endswith(("/base", "/validation.jsonl")) and any(
                        m.startswith(path.rsplit("/", 1)[0] + "/") for m in made)
                    assert base or {path, f"{folder}/final"} & made, f"{words[0]} --{key} {path}"
        made.add(makes)
    for runs in drawn.values():
        assert runs and all({run, f"{run}/final"} & made for run in runs)


def test_semi_online_runs_and_draws_of_proxies_by_name():
    """A run's name says what its command does: K, and which pairs and order its proxy has."""
    stages, _ = study.experiments(args_of("--scale", "toy", "--only", "refresh", "proxies"))
    for every in (4, 20, 100, 400):
        words = stages[f"runs/toy/online-ipo-b0.02-every{every}-s1/final"]
        assert study.value_of(words, "--refresh-every") == str(every)
    assert "--refresh-every" not in stages["runs/toy/online-ipo-b0.02-s1/final"]
    for draw, name in enumerate(("proxy-250pairs", "proxy-250pairs-draw1", "proxy-250pairs-draw2")):
        words = stages[f"data/toy/{name}/initial.jsonl"]
        assert int(study.value_of(words, "--skip", "0")) == 250 * draw
        words = stages[f"runs/toy/{name}/final"]
        assert study.value_of(words, "--data") == f"data/toy/{name}/initial.jsonl"
        assert study.value_of(words, "--seed", "0") == str(draw)
        words = stages[f"runs/toy/online-ipo-b0.1{name.removeprefix('proxy')}-s{draw}/final"]
        assert study.value_of(words, "--labeller") == f"runs/toy/{name}"
    stages, _ = study.experiments(args_of("--scale", "hard"))
    for name, steps in (("proxy", "120"), ("proxy-1200steps-draw2", "1200")):
        assert study.value_of(stages[f"runs/hard/{name}/final"], "--steps") == steps
    assert study.value_of(stages["runs/hard/gold/final"], "--model") == "runs/hard/sft-373k"
    assert study.value_of(stages["data/hard/initial.jsonl"], "--taste") == "hard"


def test_waves_hold_each_command_once_and_after_its_inputs(capsys):
    args = args_of("--scale", "toy")
    stages, _ = study.experiments(args)
    waves, read = study.waves(stages), study.needs(stages)
    assert sorted(makes for wave in waves for makes in wave) == sorted(stages)
    wave_of = {makes: i for i, wave in enumerate(waves) for makes in wave}
    assert all(wave_of[r] < wave_of[makes] for makes in stages for r in read[makes])
    assert read["data/toy/golden.jsonl"] == {"data/toy/initial.jsonl", "runs/toy/gold/final"}
    assert read["runs/toy/sft-18k/final"] == {  # not a base/ that may be half there
        "data/toy/initial.jsonl", "data/toy/18k/initial.jsonl"}
    shuffled = next(m for m in read if "/ipo-shuffled-b0.1" in m and m.endswith("-s1/final"))
    assert "runs/toy/online-ipo-b0.1-s1/final" in read[shuffled]
    study.main(args_of("--scale", "toy", "--list", "1"))
    assert capsys.readouterr().out.splitlines() == [
        f"python {shlex.join(stages[makes])}" for makes in waves[0]]


def test_done_stages_are_skipped_and_failures_stop(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").write_text("")
    toy = ["tasks.py", "toy", "--pairs", "20", "--width", "8", "--out", "data"]
    (tmp_path / "copy.py").write_text("import shutil, sys; shutil.copytree(sys.argv[2], 'copy')")
    (tmp_path / "fail.py").write_text("raise SystemExit(2)")
    stages = {"done": ["nonsense.py", "--out", "done"], "data/initial.jsonl": toy,
              "copy/initial.jsonl": [f"{tmp_path}/copy.py", "--file", "data", "--out", "copy"]}
    study.run(stages, 2, "runs")
    assert (tmp_path / "copy/initial.jsonl").read_bytes() == (
        tmp_path / "data/initial.jsonl").read_bytes()
    assert "20 pairs" in (tmp_path / "runs/logs/data.log").read_text()
    with pytest.raises(SystemExit) as stop:
        study.run({**stages, "new": [f"{tmp_path}/fail.py", "--out", "new"]}, 1, "runs")
    assert stop.value.code == 2
    assert "ended with status 2" in capfd.readouterr().err


def test_alone_in_its_wave_a_command_has_all_cores(tmp_path, monkeypatch):
    """Three commands, the last two at once, on 4 cores: 4 threads, then 2 and 2."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(study, "CORES", 4)
    show = f"{tmp_path}/show.py"
    (tmp_path / "show.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    study.run({"a": [show, "--out", "a"], "b": [show, "--data", "a", "--out", "b"],
               "c": [show, "--data", "a", "--out", "c"]}, 3, "runs")
    assert [(tmp_path / f"runs/logs/{x}.log").read_text().strip() for x in "abc"] == ["4", "2", "2"]


def test_threads_the_wait_and_windows(tmp_path, monkeypatch):
    """A user's OMP_NUM_THREADS stays; a second study says that it waits; no fcntl is one line."""
    monkeypatch.chdir(tmp_path)
    show = "import os; print(os.environ['OMP_NUM_THREADS'])"
    (tmp_path / "show.py").write_text(show)
    for given, seen in (("7", "7"), (None, "3")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with open("lock", "w") as lock:
            child = study.start([f"{tmp_path}/show.py", "--out", f"runs/{seen}"], 3, lock, "log")
            assert child.wait() == 0
        assert (tmp_path / "log").read_text().split()[-1] == seen
    hold = ("import fcntl, sys, time; f = open('runs/lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(1.5)")
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        again = subprocess.run([sys.executable, "-c", "import study; study.run({}, 1, 'runs')"],
                               capture_output=True, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert again.stderr.splitlines() == [
        "another study, or a command it left, still works in runs: waiting for it"]
    without = subprocess.run([sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; "
                              "import study"], capture_output=True, text=True, cwd=ROOT)
    assert without.returncode == 1 and without.stderr.splitlines() == [
        "error: study.py needs Linux or macOS (fcntl); the other scripts run anywhere"]


# ---- plots ---------------------------------------------------------------------------------------


def write_run(folder, script, rows, **args):
    folder.mkdir()
    given = {"script": script, "seed": 0, "beta": 0.1, "lr": 1e-3, "model": "runs/toy/sft",
             "labeller": "runs/toy/proxy"} | args
    (folder / "args.json").write_text(json.dumps(given))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompt, texts = "write two happy lines about a fox:", ("the fox danced. the fox sang.",
                                                           "the fox danced.")
    (folder / "samples.jsonl").write_text("".join(json.dumps(
        {"step": r["step"], "prompt": prompt, "response": text}) + "\n"
        for r in rows for text in texts))
    return str(folder)


def judged(step, kl, win):
    return {"step": step, "loss": 1.0 / max(step, 1), **({"seconds": 0.5} if step else {}), **{
        f"gold/{key}{se}": value for key, number in (
            ("kl", kl), ("win_rate", win), ("accuracy_golden", win / 2), ("accuracy_self", 0.5),
            ("chosen_logratio", -kl), ("response_length", 9.0))
        for se, value in (("", number), ("_se", 0.01))},
        "outcomes": "2" * round(10 * win) + "0" * round(10 * (1 - win))}


@pytest.fixture
def recorded(tmp_path):
    """Two seeds: online wins .1 more than offline at every KL; offline on its stream by order."""
    kept, runs = dict(shuffle_window=1), []
    for seed in (0, 1):
        start = judged(0, 0.0, 0.1) | {"loss": 9.0}, {"step": 1, "loss": 1.0, "seconds": 1.1}
        rows = [*start, judged(2, 1.0, 0.3), judged(4, 4.0, 0.5)]
        less = [*start, judged(2, 1.0, 0.2), judged(4, 4.0, 0.4)]
        stream = dict(data="x/stream.jsonl", seed=seed)
        runs += [
            write_run(tmp_path / f"a{seed}", "online_rlhf.py", rows, loss="ipo", seed=seed),
            write_run(tmp_path / f"b{seed}", "ipo.py", less, data="golden.jsonl", seed=seed,
                      **kept),
            write_run(tmp_path / f"c{seed}", "ipo.py", rows, **kept, **stream),
            write_run(tmp_path / f"d{seed}", "ipo.py", less, shuffle_window=0, **stream),
            write_run(tmp_path / f"e{seed}", "ipo.py", less, shuffle_window=4, **stream)]
    return runs


def table_of(path):
    with open(path) as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("figure", set(plots.FIGURES) - {"fig6"})
def test_every_figure_draws(recorded, tmp_path, figure):
    plots.main(plots.parse_args([*recorded, "--figure", figure, "--out", f"{tmp_path}/f.png"]))
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert table_of(tmp_path / "f.csv")
    table = table_of(tmp_path / "f-checkpoints.csv")
    assert [r["source"] for r in table[:15:3]] == ["online", "offline", "in order", "shuffled",
                                                   "windows of 4"]
    assert [(r["step"], r["gold/kl"], r["gold/win_rate"]) for r in table[:3]] == [
        ("0", "0", "0.1"), ("2", "1", "0.3"), ("4", "4", "0.5")]
    assert float(table[0]["toy/utility"]) == pytest.approx((5 + 4) / 2)


def test_proxies_are_named_with_their_accuracy(recorded, tmp_path):
    """The lowest and highest of their draws, where it was of 100 pairs or more."""
    out = f"{tmp_path}/f.png"
    for name, accuracy in (("proxy-250pairs", 0.6194), ("proxy-250pairs-draw1", 0.65)):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}/assessment.json").write_text(json.dumps({"accuracy": accuracy}))
    rows = [judged(2, 1.0, 0.15), judged(4, 4.0, 0.35)]
    weak = [write_run(tmp_path / f"w{seed}", "online_rlhf.py", rows, loss="ipo", seed=seed,
                      labeller=f"{tmp_path}/proxy-250pairs" + "-draw1" * seed) for seed in (0, 1)]
    plots.main(plots.parse_args([*recorded, *weak, "--figure", "proxies", "--out", out]))
    found = {(r["comparison"], r["kl"]): r["gap"] for r in table_of(tmp_path / "f.csv")}
    weak = found["online by proxy-250pairs (0.619 to 0.650) - offline", "mean"]
    assert float(weak) == pytest.approx(-0.05)
    assert float(found["online by proxy - offline", "mean"]) == pytest.approx(0.1)
    apart = found["online by proxy-250pairs (0.619 to 0.650) - online by proxy", "mean"]
    assert float(apart) == pytest.approx(-0.15)
    best_of_two = write_run(tmp_path / "bo2", "online_rlhf.py", rows, loss="bo2", seed=0, beta=0.1)
    assert plots.read_run(best_of_two)["beta"] is None  # a default that the loss does not read
    for pairs, shown in ((99, ""), (100, "1.000")):  # of so few pairs an accuracy says nothing
        (tmp_path / "proxy-250pairs/assessment.json").write_text(
            json.dumps({"accuracy": 1.0, "pairs": pairs}))
        assert plots.proxy_of(f"{tmp_path}/proxy-250pairs")["proxy_accuracy"] == shown


def test_refresh_by_hand(recorded, tmp_path):
    """Online at K = 1 and, .04 and .06 worse, at K = 4: win rates at equal KL, with the interval of
    two seeds (t 12.71, s .01 * 2^.5, (1/2 + 1)^.5), offline's, the gap of online, seconds."""
    less = [write_run(tmp_path / f"k{seed}", "online_rlhf.py", [
        judged(0, 0.0, 0.1), judged(1, 1.0, 0.26 - 0.02 * seed),
        judged(2, 4.0, 0.46 - 0.02 * seed)], loss="ipo", seed=seed, refresh_every=4)
        for seed in (0, 1)]
    plots.main(plots.parse_args([*recorded, *less, "--figure", "refresh", "--out",
                                 f"{tmp_path}/f.png"]))
    table = [r for r in table_of(tmp_path / "f.csv") if r["every"]]
    found = {(r["kl"], r["every"]): float(r["mean"]) for r in table if r["kl"]}
    assert found == pytest.approx({
        ("1", "1"): 0.3, ("1", "4"): 0.25, ("1", "offline"): 0.2, ("4", "1"): 0.5,
        ("4", "4"): 0.45, ("4", "offline"): 0.4, ("2", "1"): 0.3 + 0.2 / 3,
        ("2", "4"): 0.25 + 0.2 / 3, ("2", "offline"): 0.2 + 0.2 / 3}, abs=1e-6)
    half = 12.71 * 0.01 * 2**0.5 * 1.5**0.5
    (row,) = [r for r in table if (r["kl"], r["every"]) == ("1", "4")]
    assert [float(row[k]) for k in ("low", "high", "gap", "gap_low", "gap_high")] == pytest.approx(
        [0.25 - half, 0.25 + half, 0.05, 0.05 - half, 0.05 + half], abs=1e-6)
    assert float(row["prompts_low"]) < 0.05 < float(row["prompts_high"])
    took = {r["every"]: float(r["seconds"]) for r in table if r["seconds"]}
    assert took == pytest.approx({"1": (1.1 + 0.5 + 0.5) / 3, "4": 0.5})


def test_chosen_logratios_by_hand(tmp_path):
    """Means in doublings of KL, a line where both seeds have checkpoints; the dashed line is what
    brute force finds: a normal score tilts, and the better of two samples changes by so much."""
    runs = []
    for seed, kls in enumerate(((1.0, 1.5, 4.0), (1.2, 9.0))):
        rows = [judged(step + 1, kl, 0.3 + 0.1 * seed) for step, kl in enumerate(kls)]
        runs.append(plots.read_run(write_run(tmp_path / f"l{seed}", "ipo.py", rows, seed=seed,
                                             data="golden.jsonl")))
    figure, rows = plots.draw(runs, **plots.FIGURES["logratio"])
    assert [(r["group"], r["kl"], r["mean"], r["low"], r["high"]) for r in rows] == [
        ("offline", 2**0.5, pytest.approx(-1.225), pytest.approx(-1.25), pytest.approx(-1.2))]
    line = {name: line for line in figure.axes[0].lines if (name := line.get_label())}
    kls, changes = line["SFT tilted by a score"].get_data()
    score = np.linspace(-12, 12, 20_001)
    normal = np.exp(-score**2 / 2) / np.exp(-score**2 / 2).sum()
    better = 2 * normal * np.cumsum(normal)  # density of the larger of two, up to a tie
    for kl, change in zip(kls[::50], changes[::50], strict=True):
        tilt = (2 * kl) ** 0.5
        ratio = tilt * score - np.log((normal * np.exp(tilt * score)).sum())
        assert (normal * np.exp(ratio) * ratio).sum() == pytest.approx(kl, abs=1e-3)
        assert (better * ratio).sum() == pytest.approx(change, abs=2e-2)


def test_the_demo_says_who_wins_at_equal_kl(recorded):
    """From where all runs have a policy to where the last but one run of a side ends."""
    runs = [plots.read_run(run) for run in recorded]
    online, offline = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
    for pair in ((online, offline), (online[:1], offline[:1])):
        said = study.at_equal_kl(*pair)
        assert "policies (KL 1.0 to 4.0) online wins 40% on average and offline 30% (+0.10)" in said
        assert said.endswith("at the highest 50% and 40% (+0.10).")
    short = offline[0] | {"rows": [judged(2, 1.0, 0.1), judged(4, 2.0, 0.9)]}  # counts to its end
    said = study.at_equal_kl(online, [short, offline[1]])
    assert "(KL 1.0 to 2.0)" in said and said.endswith("at the highest 37% and 58% (-0.22).")
    said = study.at_equal_kl(online, [short, *offline])
    assert "(KL 1.0 to 4.0)" in said and said.endswith("at the highest 50% and 40% (+0.10).")
    beyond = offline[0] | {"rows": [judged(2, 9.0, 0.2), judged(4, 10.0, 0.2)]}
    assert study.at_equal_kl(online, [beyond]).endswith("cannot be compared.")


def test_the_demos_figure_by_hand(recorded):
    """Of two seeds the mean and the range, from SFT on to where the first of them ends."""
    runs = [plots.read_run(run) for run in recorded]
    online, offline = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
    online[1] = online[1] | {"rows": [judged(2, 1.0, 0.5), judged(4, 2.0, 0.7)]}
    figure, rows = plots.draw(online + offline[:1], **plots.FIGURES["main"])
    some = [r for r in rows if r["run"] == "online, beta 0.1"]
    assert [some[i]["kl"] for i in (0, -1)] == [0, 2]
    assert [[r[k] for k in ("mean", "low", "high")] for r in some[::99]] == [
        pytest.approx([0.1] * 3), pytest.approx([(0.7 + 0.3 + 0.2 / 3) / 2, 0.3 + 0.2 / 3, 0.7])]
    assert "online, beta 0.1: mean and range of 2 seeds" in [
        text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert [(r["kl"], r["mean"]) for r in rows if r["run"] == offline[0]["name"]] == [
        (0, 0.1), (1, 0.2), (4, 0.4)]


def test_a_run_that_is_judged_at_its_start_only(tmp_path, capsys):
    run = write_run(tmp_path / "a", "ipo.py", [judged(0, 0.0, 0.1), {"step": 1, "loss": 1.0}])
    with pytest.raises(SystemExit) as stop:
        plots.read_run(run)
    assert stop.value.code == 2 and "no gold evaluation of a trained" in capsys.readouterr().err


def test_hull_by_hand():
    """The upper concave hull over KL: a seed alone runs through it; none beyond the last."""
    runs = [{"seed": 0, "beta": beta, "lr": 1, "rows": rows} for beta, rows in (
        (1, [judged(1, 1.0, 0.2), judged(2, 4.0, 0.5), judged(3, 2.0, 0.3)]),
        (2, [judged(1, 1.0, 0.1), judged(2, 8.0, 0.1), judged(3, 5.0, 0.1)]))]
    found = plots.frontiers(runs, np.log([0.9, 1.0, 2.0, 4.0, 6.0, 8.0, 8.1]))
    assert np.allclose(found, [[np.nan, 0.2, 0.3, 0.5, 0.3, 0.1, np.nan]], equal_nan=True)
    g = np.random.default_rng(0)
    rows = [judged(i, *g.uniform(0.1, 1, 2)) for i in range(1, 41)]
    points = np.array([(r["gold/kl"], r["gold/win_rate"]) for r in rows])
    grid = np.log(np.sort(points[:, 0])[1:-1])
    brute = [max(a[1] + (b[1] - a[1]) * (x - a[0]) / (b[0] - a[0]) for a in points for b in points
                 if a[0] <= x <= b[0] and a[0] < b[0]) for x in np.exp(grid)]
    run = {"seed": 0, "beta": 1, "lr": 1, "rows": rows}
    assert np.allclose(plots.frontiers([run], grid), [brute])


def test_matched_gap_by_hand(recorded):
    """.1 at every KL of both seeds, and no doubt about it; of one seed no interval."""
    runs = [plots.read_run(r) for r in recorded]
    online, offline = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
    found = plots.matched_gap(online, offline, [1.0, 2.0, 8.0])
    assert found.keys() == {1.0, 2.0, "mean"}  # nothing is claimed where no run has been
    for first, second, gap, low, high, *over_prompts in found.values():
        assert first - second == pytest.approx(gap)
        assert (gap, low, high) == pytest.approx((0.1, 0.1, 0.1))
        assert over_prompts[0] < 0.1 < over_prompts[1]  # one prompt of ten makes the gap
    one = plots.matched_gap(online[:1], offline, [1.0])[1.0]
    assert one[2] == pytest.approx(0.1) and np.isnan(one[3:5]).all()
    assert plots.matched_gap(online, [], [1.0]) == {}


def test_sources_of_runs(tmp_path):
    rows = [judged(2, 1.0, 0.3)]
    free, stream = dict(shuffle_window=0), "runs/a/stream.jsonl"
    cases = [("golden.jsonl", free, "offline"), ("golden.jsonl", dict(shuffle_window=4), "offline"),
             ("data/sft-vs-early-s2.jsonl", free, "sft vs early"), (stream, free, "shuffled"),
             (stream, dict(shuffle_window=1), "in order"),
             (stream, dict(shuffle_window=4), "windows of 4")]
    for i, (data, order, source) in enumerate(cases):
        run = plots.read_run(write_run(tmp_path / str(i), "dpo.py", rows, data=data, **order))
        assert (run["source"], run["loss"]) == (source, "dpo")
    runs = [dict(source="online", loss="ipo", model="sft", proxy=proxy, proxy_accuracy="")
            for proxy in ("proxy-9pairs", "proxy")]
    assert [group.label for group in plots.groups_of(runs)] == ["online by proxy-9pairs",
                                                                "online by proxy"]
    assert [group.label for group in plots.groups_of(runs[:1])] == ["online"]
    args = dict(script="online_rlhf.py", refresh_every=20, steps=400)
    assert plots.source_of(args) == "every 20 steps"
    assert plots.source_of(args | {"refresh_every": 1}) == "online"


def test_gpu_scale_lists_its_hours_and_rehearses(capsys):
    study.main(args_of("--scale", "gpu", "--list"))
    *commands, total = capsys.readouterr().out.splitlines()
    each = [float(line.split("# about ")[1].split()[0]) for line in commands]
    assert abs(sum(each) - int(total.split()[2])) < 0.05 * len(each) + 1
    for scale in ("smol", "gpu"):
        stages, _ = study.experiments(args_of("--scale", scale, "--steps", "3", "--policy", "a"))
        assert {study.value_of(words, "--steps", "3") for words in stages.values()} == {"3"}
        assert {study.value_of(words, "--batch-size", "2") for words in stages.values()} == {"2"}
    assert study.value_of(stages["runs/gpu/sft/final"], "--model") == "a"
    with pytest.raises(SystemExit) as end:
        study.main(args_of("--scale", "gpu", "--policy", "a", "b"))
    assert end.value.code == 2 and "gpu needs 1" in capsys.readouterr().err


def test_readme_commands_parse_and_paths_exist():
    """Every command of a script in README parses, and every file it links is there."""
    import re

    text = (ROOT / "README.md").read_text()
    for name, words in re.findall(r"^(\w+)=\((.*?)\)$", text, re.S | re.M):
        text = text.replace(f'"${{{name}[@]}}"', " ".join(words.split()))  # a shell's array
    commands = [line.strip() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
                for line in block.replace("\\\n", " ").split("\n")
                for line in re.sub(r"^torchrun .*?(\w+\.py)", r"python \1", line).split(" && ")
                if line.strip().startswith("python ")]
    assert len(commands) >= 8
    for command in commands:
        if command.startswith("python -c"):  # over several lines: run below
            continue
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "-m":
            assert words[1] == "pytest"
            continue
        assert (ROOT / words[0]).exists(), command
        if words[0].startswith("tests/"):
            continue
        __import__(words[0].removesuffix(".py")).parse_args(words[1:])
    for block in re.findall(r"```bash\n(python -c .*?)```", text, re.S)[:1]:  # reads no run
        done = subprocess.run(block.replace("python", sys.executable, 1), shell=True, cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0 and "+3.5 the horse" in done.stdout, done.stderr
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for script in ROOT.glob("*.py"):
        row = re.search(rf"^\| `{script.name}` \|.*\| (?:\d+ of )?(\d+) \|$", text, re.M)
        assert row, f"README has no line for {script.name}"
        assert abs(int(row[1]) - len(script.read_text().splitlines())) <= 15, script.name


# ---- the comparison under its null ---------------------------------------------------------------


def simulated(rng, settings, per_setting, worse, seeds=3):
    """Runs whose checkpoints lie on one curve of win rate over KL, `worse` (settings,) below it.

    A run is off by .015, a checkpoint by its 1,024 prompts, a KL by 4%, as in the toy study.
    """
    kls = np.exp(rng.uniform(np.log(0.1), np.log(25), (settings, per_setting)))
    return [{"seed": seed, "beta": i, "lr": 0, "rows": [
        {"step": step, "gold/kl": kl * np.exp(0.04 * rng.normal()), "gold/win_rate":
            0.12 + 0.8 * (1 - np.exp(-kl / 10)) - worse[i] + off + 0.0145 * rng.normal()}
        for step, kl in enumerate(kls[i])]}
        for seed in range(seeds) for i in range(settings) for off in [0.015 * rng.normal()]]


@pytest.mark.parametrize("worse", [[0] * 9, [0, 0, 0, 0.02, 0.05, 0.1, 0.1, 0.15, 0.2]])
def test_no_gap_is_found_where_there_is_none(worse):
    """24 checkpoints a seed against 144, as online against offline: the gap of two equal sides is 0
    on average, and 0 lies within its interval 95 times in 100."""
    rng, kls, found = np.random.default_rng(0), [1, 3, 8], []
    for _ in range(300):
        found.append(plots.matched_gap(simulated(rng, 3, 8, [0] * 3), simulated(rng, 9, 16, worse),
                                       kls))
    for kl in (*kls, "mean"):
        _, _, gap, low, high, *_ = np.array([gaps[kl] for gaps in found if kl in gaps]).T
        assert len(gap) > 250 and abs(gap.mean()) < 0.006
        assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.985, kl


def test_that_test_would_notice():
    """Settings chosen on the seed that they are judged by: the side of more checkpoints wins."""
    rng, gaps = np.random.default_rng(0), []
    for _ in range(60):
        few, many = simulated(rng, 3, 8, [0] * 3), simulated(rng, 9, 16, [0] * 9)
        gaps += [plots.matched_gap([r for r in few if r["seed"] == seed],
                                   [r for r in many if r["seed"] == seed], [3])[3][2]
                 for seed in range(3)]
    assert np.mean(gaps) < -0.012


def test_interval_by_hand():
    """1, 2, 3: mean 2, s 1, t 4.303 of two degrees, and (1/3 + 1/2) for folds that share seeds."""
    mean, low, high = plots.interval(np.array([1.0, 2.0, 3.0]))
    assert (mean, low, high) == pytest.approx((2, 2 - 4.303 * (5 / 6) ** 0.5,
                                               2 + 4.303 * (5 / 6) ** 0.5))
    assert np.isnan(plots.interval(np.array([1.0]))[1])


def answered(rng, rates, prompts, seeds=3, kls=(1.0, 4.0)):
    """Two sides of the same prompts: rates[side] of them are won, the easiest, by each seed."""
    ease, sides = rng.uniform(size=prompts), []
    for rate in rates:
        won = "".join("2" if x < rate else "0" for x in ease)
        rows = [{"step": step, "gold/kl": kl, "outcomes": won, "gold/win_rate":
                 won.count("2") / prompts} for step, kl in enumerate(kls, 1)]
        sides.append([{"seed": seed, "beta": 1, "lr": 0, "rows": rows} for seed in range(seeds)])
    return sides


def test_bootstrap_over_prompts_where_the_variance_is_known():
    """Both sides win the easiest prompts, .3 and .4 of them: on a prompt the gap is 1 with chance
    .1, else 0, so that the mean of 256 has variance .1 * .9 / 256. Were prompts drawn for each side
    alone, it would be (.3 * .7 + .4 * .6) / 256: five times that. The true .1 lies in the interval
    in 95% of draws, and 0 where two sides that have nothing in common win .3."""
    rng, found = np.random.default_rng(1), []
    for _ in range(200):
        gap = plots.matched_gap(*answered(rng, (0.4, 0.3), prompts=256), [2.0])
        assert gap[2.0] == pytest.approx(gap["mean"])
        found.append(gap[2.0])
    *_, gap, low, high, prompts_low, prompts_high = np.array(found).T
    assert np.allclose(low, high)  # the seeds do not differ at all
    known = 2 * 1.96 * (0.1 * 0.9 / 256) ** 0.5
    assert (prompts_high - prompts_low).mean() == pytest.approx(known, rel=0.03)
    assert gap.std() == pytest.approx(known / 2 / 1.96, rel=0.15)
    assert 0.91 <= ((prompts_low <= 0.1) & (0.1 <= prompts_high)).mean() <= 0.985
    rng = np.random.default_rng(0)  # no gap, and outcomes that have nothing in common
    found = [plots.over_prompts((rng.uniform(size=256) < 0.3) - 1.0 * (
        rng.uniform(size=256) < 0.3)) for _ in range(300)]
    assert 0.92 <= np.mean([low <= 0 <= high for low, high in found]) <= 0.98


def test_prompts_average_to_the_frontier():
    rng, runs = np.random.default_rng(0), []
    for seed, beta in ((s, b) for s in range(3) for b in range(2)):
        outcomes = ["".join(map(str, rng.integers(0, 3, 50))) for _ in range(6)]
        runs.append({"seed": seed, "beta": beta, "lr": 0, "rows": [
            {"step": i, "gold/kl": rng.uniform(0.5, 9), "outcomes": won, "gold/win_rate": np.mean(
                [int(x) / 2 for x in won])} for i, won in enumerate(outcomes)]})
    grid = np.log(np.linspace(1, 6, 20))
    lines = plots.frontiers(runs, grid, by_prompt=True).mean(0)
    assert lines.shape == (50, 20) and np.isfinite(lines).any()
    assert np.allclose(lines.mean(0), plots.frontiers(runs, grid).mean(0), equal_nan=True)
    *_, low, high = plots.matched_gap(runs, runs, [3.0])[3.0]
    assert low == high == 0  # nothing but itself
    runs[0]["rows"][0]["outcomes"] += "2"  # other prompts: no interval
    assert np.isnan(plots.matched_gap(runs, runs, [3.0])[3.0][-2:]).all()
    del runs[0]["rows"][0]["outcomes"]  # an older run
    *_, low, high = found = plots.matched_gap(runs, runs, [3.0])[3.0]
    assert len(found) == 7 and np.isnan([low, high]).all() and np.isfinite(found[:5]).all()


def test_frontiers_choose_on_the_other_seeds():
    """Seed 0's lucky checkpoint is not its own choice; what seed 1 chooses is judged on seed 0."""
    values = {0: {1: (1.0, 0.2), 2: (2.0, 0.9), 3: (2.0, 0.4)},  # setting 2: luck on seed 0
              1: {1: (1.0, 0.2), 2: (2.0, 0.3), 3: (2.0, 0.5)}}
    runs = [{"seed": seed, "beta": 0.1, "lr": 1, "rows": [
        {"step": step, "gold/kl": kl, "gold/win_rate": win} for step, (kl, win) in points.items()]}
        for seed, points in values.items()]
    lines = plots.frontiers(runs, np.log([1.0, 1.5, 2.0, 3.0]))
    assert lines[0][:3] == pytest.approx([0.2, 0.3, 0.4])  # by seed 1's choice, setting 3
    assert lines[1][:3] == pytest.approx([0.2, 0.25, 0.3])  # by seed 0's, setting 2
    assert np.isnan(lines[:, 3]).all()
    assert plots.best_within(runs, 1.9) == pytest.approx([1.0, 0.2])
    assert plots.best_within(runs, 9.0) == pytest.approx([2.0, (0.4 + 0.3) / 2])
    assert np.isnan(plots.best_within(runs, 0.5)).all()
    runs[1]["beta"] = 0.5  # no setting in common: each seed chooses on itself
    assert plots.frontiers(runs, np.log([2.0]))[:, 0] == pytest.approx([0.9, 0.5])


def world(seed, online, offline, level=0.0):
    """Runs of one world: [(KL, win rate)] of one run of each side."""
    return [{"name": f"{source}{seed}", "seed": seed, "source": source, "loss": "ipo", "lr": 1.0,
             "model": "sft", "proxy": "proxy", "proxy_accuracy": "", "beta": 0.1, "start": [],
             "rows": [{"step": step, "gold/kl": kl, "gold/win_rate": win + level, "toy/utility":
                       win} for step, (kl, win) in enumerate(way, 1)]}
            for source, way in (("online", online), ("offline", offline))]


def test_worlds_by_hand():
    """At KL 1 the nearest within a quarter, of both worlds; at 8 of one; at 5 of none."""
    runs = [*world(1, [(0.9, 0.3), (2.0, 0.5), (8.1, 0.8)], [(1.2, 0.2), (2.4, 0.3), (9.0, 0.6)]),
            *world(2, [(1.0, 0.4), (2.1, 0.6), (30.0, 0.9)], [(1.1, 0.1), (1.9, 0.3), (8.0, 0.5)],
                   level=0.05)]
    online, offline = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
    kl, value = plots.nearest(online)
    assert np.allclose(kl, [[0.9, 2.0, np.nan, np.nan, 8.1, np.nan],
                            [1.0, 2.1, np.nan, np.nan, np.nan, np.nan]], equal_nan=True)
    assert np.allclose(value[:, 1], [0.5, 0.65])
    found = plots.world_gaps(online, offline)
    assert {kl: gaps.tolist() for (kind, kl), gaps in found.items() if kind == "single"} == {
        1: pytest.approx([0.1, 0.3]), 2: pytest.approx([0.2, 0.3]), 3: [], 5: [], 13: [],
        8: pytest.approx([0.2]), "mean": pytest.approx([0.5 / 3, 0.3])}
    shuffled = [run | {"source": "shuffled", "rows": [
        r | {"gold/win_rate": r["gold/win_rate"] - 0.05} for r in run["rows"]]} for run in offline]
    figure, rows = plots.draw(runs + shuffled, **plots.FIGURES["worlds"])
    found = {r["comparison"]: r for r in rows if (r["measure"], r["kind"], r["kl"]) == (
        "gold/win_rate", "single", 2)}
    row = found["online - offline"]
    assert (row["worlds"], row["above"]) == (2, 2)  # s = .05 * 2^.5, independent: s / 2^.5
    assert [row[k] for k in ("mean", "low", "high")] == pytest.approx(
        [0.25, 0.25 - 12.71 * 0.05, 0.25 + 12.71 * 0.05])
    assert {name: r["mean"] for name, r in found.items()} == pytest.approx(
        {"online - offline": 0.25, "online - shuffled": 0.3, "offline - shuffled": 0.05})
    assert {len(axes.lines) > 0 for axes in figure.axes} == {True}


def draw_world(rng, seed, gap, spread):
    """Both sides on one curve of win rate over KL, online `gap` + spread above: five betas, runs
    that are off by .015, checkpoints by their 512 prompts; a curve of its own for each world."""
    sides, top, bend = [], rng.uniform(0.6, 0.9), rng.uniform(4, 12)
    gap += spread * rng.normal()
    for source, checkpoints in (("online", 8), ("offline", 16)):
        for beta in (0.02, 0.03, 0.05, 0.1, 0.2):
            last, off = 0.3 / beta * rng.uniform(0.8, 1.2), 0.015 * rng.normal()
            kls = last * (1 - np.exp(-3 * np.arange(1, checkpoints + 1) / checkpoints))
            wins = 0.15 + top * (1 - np.exp(-kls / bend)) + off + 0.022 * rng.normal(
                size=checkpoints) + gap * (source == "online")
            (run,) = [r for r in world(seed, *[list(zip(kls, wins, strict=True))] * 2)
                      if r["source"] == source]
            sides.append(run | {"beta": beta})
    return sides


@pytest.mark.parametrize("gap, spread", [(0, 0), (0, 0.05), (0.05, 0.03)])
def test_the_interval_over_worlds_covers_what_is_so(gap, spread):
    """Ten worlds, 200 times: the mean gap of single policies and of frontiers is the true one, and
    lies within its interval 95 times in 100. A gap of .05 is seen in nearly all."""
    rng, found = np.random.default_rng(0), {"single": [], "frontier": []}
    for _ in range(200):
        runs = [run for seed in range(10) for run in draw_world(rng, seed, gap, spread)]
        sides = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
        gaps = plots.world_gaps(*sides)
        for kind, some in found.items():
            some.append(plots.interval(gaps[kind, "mean"], chosen=kind == "frontier"))
    for kind, some in found.items():
        mean, low, high = np.array(some).T
        assert abs(mean.mean() - gap) < 0.005, kind
        assert 0.92 <= ((low <= gap) & (gap <= high)).mean() <= (0.985 if kind == "single" else 1)
        if gap:
            assert (low > 0).mean() > (0.9 if kind == "single" else 0.7)  # chosen: a wider interval


def test_no_gap_at_the_kls_of_the_worlds_that_were_run():
    """The same null with the checkpoints' KLs of results/worlds: where one side's nearest policies
    lie at higher KLs than the other's, a rising curve alone makes a gap. Here it is one of .01."""
    rng, found = np.random.default_rng(0), []
    runs = plots.read_checkpoints(ROOT / "results/worlds/worlds-checkpoints.csv")
    online, offline = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
    for _ in range(200):
        curves = {r["seed"]: (rng.uniform(0.6, 0.9), rng.uniform(4, 12)) for r in runs}
        for run in online + offline:
            (top, bend), off = curves[run["seed"]], 0.015 * rng.normal()
            for row in run["rows"]:
                row["gold/win_rate"] = 0.1 + off + 0.022 * rng.normal() + top * (
                    1 - np.exp(-row["gold/kl"] / bend))
        found.append(plots.interval(plots.world_gaps(online, offline)["single", "mean"], False))
    mean, low, high = np.array(found).T
    so = mean.mean()
    assert 0 < so < 0.012  # results/worlds.md says .009
    assert 0.92 <= ((low <= so) & (high >= so)).mean() <= 0.985


def test_a_chord_looks_like_a_gap_and_single_policies_do_not_compare_there():
    """Both sides on one concave curve, that of the toy study's online runs; offline has policies at
    its KLs alone, 1.9 and 8. Its frontier is a mixture at KL 3, .07 below policies that are no
    better; `nearest` finds no policy of it there, and no gap where it does."""
    curve = lambda kl: np.interp(kl, (1, 2, 3, 5, 8, 13), (.18, .30, .42, .52, .61, .73))  # noqa: E731
    runs = [run for seed in range(3) for run in world(
        seed, [(kl, curve(kl)) for kl in (1, 2, 3, 5, 8)], [(kl, curve(kl)) for kl in (1.9, 8)])]
    sides = ([r for r in runs if r["source"] == s] for s in ("online", "offline"))
    found = plots.world_gaps(*sides)
    assert found["frontier", 3].mean() > 0.05 and len(found["single", 3]) == 0
    assert abs(found["single", 2].mean()) < 0.02 and found["single", 8].mean() == 0


def test_student_by_its_table():
    """Published 97.5% quantiles of 10, 14, 19 and 29 degrees of freedom."""
    assert [plots.student(n) for n in (11, 15, 20, 30)] == pytest.approx(
        [2.228, 2.145, 2.093, 2.045], abs=1e-3)
    assert plots.student(10) == 2.262


def test_runs_and_files_of_runs_are_of_one_kind(recorded, tmp_path):
    """A seed that comes from a folder and one from a file choose for each other."""
    plots.main(plots.parse_args([recorded[0], "--figure", "fig1", "--out", f"{tmp_path}/f.png"]))
    kept = plots.read_checkpoints(f"{tmp_path}/f-checkpoints.csv")
    other = plots.read_run(recorded[5]) | {"rows": [judged(2, 1.0, 0.7), judged(4, 4.0, 0.9)]}
    assert [(r["beta"], r["lr"]) for r in (*kept, other)] == [(0.1, 0.001)] * 2
    assert [[win for _, win in others.values()] for _, others in plots.held_out(
        [*kept, other])] == [[0.7, 0.9], [0.3, 0.5]]


def test_equal_budgets_by_flags(recorded, tmp_path, capsys):
    """--steps leaves out later checkpoints, --lr other runs; where nothing is left, one line."""
    fast = write_run(tmp_path / "fast", "ipo.py", [judged(2, 1.0, 0.9)], data="golden.jsonl", lr=.1)
    words = [*recorded[:2], fast, "--figure", "fig1", "--out", f"{tmp_path}/f.png"]
    for more, found in (([], [2, 4, 2, 4, 2]), (["--steps", "3"], [2, 2, 2]),
                        (["--lr", "1e-3"], [2, 4, 2, 4]), (["--lr", ".1", "--steps", "2"], [2])):
        plots.main(plots.parse_args([*words, *more]))
        table = table_of(tmp_path / "f-checkpoints.csv")
        assert [int(r["step"]) for r in table if r["step"] != "0"] == found
    with pytest.raises(SystemExit):
        plots.main(plots.parse_args([*words, "--lr", "5"]))
    assert "no checkpoints of --lr 5.0" in capsys.readouterr().err


def test_worlds_share_nothing(capsys):
    """Ten worlds of 22 commands: each draws by its own seed, and reads and writes its own alone."""
    stages, drawn = study.experiments(args_of("--scale", "worlds"))
    assert len(stages) == 220 and len(drawn["toy", "worlds"]) == 150
    three = study.experiments(args_of("--scale", "worlds", "--worlds", "3"))[0]
    assert list(three) == list(stages)[:66]
    with pytest.raises(SystemExit):
        study.main(args_of("--scale", "worlds", "--worlds", "0"))
    assert "--worlds 0 is out of range" in capsys.readouterr().err
    for makes, words in stages.items():
        world = makes.split("/")[2]
        paths = [w for w in words if w.startswith(("data/", "runs/"))]
        assert {path.split("/")[2] for path in paths} == {world}
        assert study.value_of(words, "--seed", world if "label" in words else None) == world
    assert {makes.split("/")[2] for makes in stages} == {str(i) for i in range(1, 11)}


def test_figures_from_stored_checkpoints(recorded, tmp_path):
    """What a figure wrote can be drawn from again, number by number."""
    first, again = f"{tmp_path}/f.png", f"{tmp_path}/g.png"
    plots.main(plots.parse_args([*recorded, "--figure", "gap", "--out", first]))
    plots.main(plots.parse_args([f"{tmp_path}/f-checkpoints.csv", "--figure", "gap", "--out",
                                 again]))
    assert table_of(tmp_path / "f.csv") == table_of(tmp_path / "g.csv") != []
    assert table_of(tmp_path / "f-checkpoints.csv") == table_of(tmp_path / "g-checkpoints.csv")
    lines = (tmp_path / "f-checkpoints.csv").read_text().splitlines(keepends=True)
    step = lines[0].split(",").index("step")
    assert "outcomes" in lines[0] and "step_seconds" in lines[0]
    older = [line for line in lines if line.split(",")[step] != "0"]  # not judged at step 0
    (tmp_path / "older.csv").write_text("".join(older))
    plots.main(plots.parse_args([f"{tmp_path}/older.csv", "--figure", "utility", "--out", again]))
    with pytest.raises(SystemExit):
        plots.main(plots.parse_args([f"{tmp_path}/f-checkpoints.csv", "--figure", "tandem"]))
    with pytest.raises(SystemExit):
        plots.main(plots.parse_args([f"{tmp_path}/f.csv", "--figure", "gap"]))
