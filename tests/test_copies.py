"""Single files repeat each other by design: what has the same name has the same text."""

import ast
import re
from collections import defaultdict

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("*.py"))
OWN = {"main", "parse_args"}


def definitions():
    """{name: {text: [files]}} of top-level functions, classes and constants of every script."""
    found = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        source = path.read_text()
        for node in ast.parse(source).body:
            lines = source.splitlines()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                found[node.name]["\n".join(lines[first - 1:node.end_lineno])].append(path.name)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                text = "\n".join(lines[node.lineno - 1:node.end_lineno])
                found[node.targets[0].id][text].append(path.name)
    return found


def test_same_name_same_text():
    different = {name: list(texts.values()) for name, texts in definitions().items()
                 if len(texts) > 1 and name not in OWN}
    assert not different


def test_the_shared_blocks_are_there():
    copies = {name: next(iter(texts.values())) for name, texts in definitions().items()}
    offline = {"dpo.py", "ipo.py", "slic.py", "bo2.py"}
    for name in ("pack_pairs", "pair_logps", "preference_step", "micro_batches", "optimizer_step",
                 "load_pairs", "make_batches", "open_run", "training_steps", "guard"):
        assert offline | {"online_rlhf.py"} <= set(copies[name]), name
    for name in ("sample", "pick_tokens", "SlotLayer"):
        assert set(copies[name]) == {"online_rlhf.py", "gold_eval.py"}
    for loss in ("ipo", "dpo", "slic", "bo2"):
        assert set(copies[f"{loss}_loss"]) == {f"{loss}.py", "online_rlhf.py"}


def test_same_flag_same_help():
    """What stands in brackets may differ; the words before it may not."""
    found = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        if path.name in ("plots.py", "study.py", "tasks.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                helps = [k.value.value for k in node.keywords if k.arg == "help"]
                assert helps, f"{path.name}: {node.args[0].value} has no help"
                found[node.args[0].value][helps[0].split(" (")[0]].append(path.name)
    by_meaning = {"--model", "--data", "--out", "--batch-size", "--steps", "--seed", "--prompts",
                  "--gold"}  # these differ by script
    different = {k: dict(v) for k, v in found.items() if len(v) > 1 and k not in by_meaning}
    assert not different


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_flag_is_read(path):
    """By the script itself, or by the module that it hands its `args` to."""
    source = path.read_text()
    handed = {"baseline": "gold_eval.py", "trust_remote_code": "reward.py",
              "chat_kwargs": "reward.py", "skip_refused": "reward.py",
              "precision": "reward.py"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            name = node.args[0].value.lstrip("-").replace("-", "_")
            found = source + ((ROOT / handed[name]).read_text() if name in handed else "")
            assert f"args.{name}" in found, f"{path.name}: {name} is never read"


BUDGET = {  # lines of the file, of its lesson; to raise one is a decision: see first what can go
    "dpo.py": (751, 254), "ipo.py": (751, 254), "slic.py": (756, 259), "bo2.py": (729, 232),
    "sft.py": (696, 199), "online_rlhf.py": (1125, 408), "reward.py": (939, 298),
    "gold_eval.py": (680, 240), "tasks.py": (520, 520), "study.py": (538, 538),
    "plots.py": (874, 874)}


def test_no_script_outgrows_its_budget():
    """The file, and what a student reads of it: from its first line to the end of `main`."""
    for path in SCRIPTS:
        lines = path.read_text().splitlines()
        end = [i for i, line in enumerate(lines) if line.startswith("# ==== The lesson ends")]
        found = len(lines), end[0] - 2 if end else len(lines)
        assert all(a <= b for a, b in zip(found, BUDGET[path.name], strict=True)), (path, found)
    assert {path.name for path in SCRIPTS} == BUDGET.keys()


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic", "bo2", "sft", "online_rlhf", "reward"])
def test_the_lesson_comes_first_and_machinery_is_the_same_below(name):
    """Above the line the algorithm, `main` last; below it what every training script has."""
    lesson, _, machinery = (ROOT / f"{name}.py").read_text().partition("# ==== The lesson ends")
    defined = [re.findall(r"^def (\w+)", part, re.M) for part in (lesson, machinery)]
    assert defined[0][0] == "parse_args" and defined[0][-1] == "main"
    assert {"make_batches", "micro_batches", "optimizer_step"} <= set(defined[0])
    assert {"load_model", "load_pairs", "open_run", "training_steps", "shard", "fail",
            "guard"} <= set(defined[1])
    main = lesson[lesson.index("def main" if name != "reward" else "def train("):]
    assert "for step, metrics in training_steps(" in main


def test_the_difference_is_the_lesson():
    """diff dpo.py ipo.py shows the loss and little else: at most 20 changed lines."""
    import difflib

    a, b = ((ROOT / f).read_text().splitlines() for f in ("dpo.py", "ipo.py"))
    changed = [x for x in difflib.unified_diff(a, b, n=0, lineterm="")
               if x[0] in "+-" and x[:3] not in ("---", "+++")]
    assert 0 < len(changed) <= 20
