"""The study's commands parse and fit together; plots show the numbers of the runs."""

import csv
import json
import shlex

import pytest
from conftest import ROOT

import plots
import study


@pytest.mark.parametrize("only", ["main", "losses"])
def test_every_command_parses_and_its_inputs_are_made_before(only):
    pipeline, names = study.experiment("demo", only)
    made = set()
    for words, makes in pipeline.stages:
        module = __import__(words[0].removesuffix(".py"))
        args = vars(module.parse_args(words[1:]))
        for key in ("model", "reference", "gold", "labeller", "baseline", "data", "prompts",
                    "validation", "eval_data"):
            value = args.get(key)
            for path in value if isinstance(value, list) else [value]:
                if not isinstance(path, str):
                    continue
                base = path in ("data/demo/base", "data/demo/initial.jsonl",
                                "data/demo/validation.jsonl")
                assert base or path in made or f"{path}/final" in made, f"{words[0]} --{key} {path}"
        made.add(makes)
    assert all(f"runs/demo/{name}/final" in made for name in names)
    assert len(names) == {"main": 3, "losses": 16}[only]


def test_done_stages_are_skipped_and_failures_stop(tmp_path, capfd):
    done = tmp_path / "done"
    done.write_text("")
    study.run([(["nonsense.py"], str(done))])
    assert "done" in capfd.readouterr().out
    with pytest.raises(SystemExit) as stop:
        study.run([(["dpo.py", "--nonsense"], str(tmp_path / "new"))])
    assert stop.value.code == 2


def write_run(folder, script, rows, **args):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"script": script, "seed": 0, **args}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


def gold(step, kl, win):
    return {"step": step, "loss": 1.0, "gold/kl": kl, "gold/kl_se": kl / 10, "gold/win_rate": win,
            "gold/win_rate_se": 0.01}


def test_plots_show_the_runs(tmp_path, capsys):
    rows = [{"step": 1, "loss": 1.0}, gold(2, 0.5, 0.25), gold(4, 4.0, 0.75)]
    kept = dict(order="kept", shuffle_window=0)
    runs = [write_run(tmp_path / "a", "online_rlhf.py", rows, loss="ipo"),
            write_run(tmp_path / "b", "ipo.py", rows, data="golden.jsonl", **kept),
            write_run(tmp_path / "c", "bo2.py", rows, data="x/stream.jsonl", **kept),
            write_run(tmp_path / "d", "dpo.py", rows, data="x/stream.jsonl", order="shuffled",
                      shuffle_window=0)]
    plots.main(plots.parse_args([*runs, "--out", f"{tmp_path}/f.png"]))
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "f.csv") as f:
        table = list(csv.DictReader(f))
    assert [r["source"] for r in table[::2]] == ["online", "offline", "kept", "shuffled"]
    assert [(r["step"], r["gold/kl"], r["gold/win_rate"]) for r in table[:2]] == [
        ("2", "0.5", "0.25"), ("4", "4", "0.75")]
    figure, axes = plots.plt.subplots()
    plots.plot_win_rate_kl(axes, [plots.read_run(r) for r in runs])
    x, y = axes.containers[0].lines[0].get_data()
    assert list(x) == [0.5, 4.0] and list(y) == [0.25, 0.75]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == [
        "online IPO", "offline IPO", "offline on D_online, in order Bo2",
        "offline on D_online, shuffled DPO"]
    plots.plt.close(figure)


def test_readme_commands_parse_and_paths_exist():
    """Every `python script.py ...` in README parses, and every file it links is there."""
    import re

    text = (ROOT / "README.md").read_text()
    commands = [line.strip() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S)
                for line in block.replace("\\\n", " ").split("\n")
                for line in line.split(" && ") if line.strip().startswith("python ")]
    assert len(commands) >= 8
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "-m":
            assert words[1] == "pytest"
            continue
        assert (ROOT / words[0]).exists(), command
        if words[0].startswith("tests/"):
            continue
        __import__(words[0].removesuffix(".py")).parse_args(words[1:])
    for path in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / path).exists(), path
    for script in ROOT.glob("*.py"):
        row = re.search(rf"^\| `{script.name}` \|.*\| (\d+) \|$", text, re.M)
        assert row, f"README has no line for {script.name}"
        assert abs(int(row[1]) - len(script.read_text().splitlines())) <= 15, script.name
