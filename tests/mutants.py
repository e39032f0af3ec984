"""Break the program one line at a time: do the tests that concern the line notice?

    python tests/mutants.py --out mutants.jsonl            # all; goes on where it stopped
    python tests/mutants.py --out mutants.jsonl --only gold_eval.py
    python tests/mutants.py --out mutants.jsonl --survivors

MUTANTS lists (file, line, what it becomes). Each is run in a copy of the tree, by the quick tests
of TESTS, in order, until one fails: then it is killed. What survives there is run by the tests of
SLOW. Outside CI: about an hour on two cores. A mutant that changes nothing a test could see has a
third text: why.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # by file: quick ones first
    "gold_eval.py": ["answers", "sampler", "eval"],
    "reward.py": ["answers", "training", "eval"],
    "online_rlhf.py": ["answers", "training", "refresh"],
    "dpo.py": ["answers", "logps", "training", "data"],
    "ipo.py": ["answers", "training"], "slic.py": ["answers", "training"],
    "bo2.py": ["answers", "training"], "sft.py": ["training"],
    "tasks.py": ["tasks", "training"], "plots.py": ["figures", "study"],
    "study.py": ["figures", "study"]}
SLOW = ["scripts", "real", "memory"]


def mutants():
    """The lists of tests/mutants.tsv: file, old line, new line, and for an equivalent one why."""
    with open(ROOT / "tests" / "mutants.tsv", encoding="utf-8") as f:
        rows = [line.rstrip("\n").split("\t") for line in f if line.strip()]
    return [(file, old, new, "".join(why)) for file, old, new, *why in rows]


def copy_of(file, old, new, folder):
    """The tree with one line changed in every script that has it: a block is one text."""
    shutil.copytree(ROOT / "tests", f"{folder}/tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "requirements.txt", "ruff.toml"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "results", f"{folder}/results")
    found = 0
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        hits = text.count(old)
        if path.name == file and hits != 1:
            raise SystemExit(f"error: {file} has {hits} times: {old}")
        found += hits
        (Path(folder) / path.name).write_text(text.replace(old, new))
    return found


def run(folder, names, out):
    """In a process of its own: pytest until the first failure."""
    for number in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import pytest
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    sys.path[:0] = [folder, f"{folder}/tests"]
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider",
                          *(f"tests/test_{name}.py" for name in names)]))


def fate(mutant):
    """("killed" by which test, or "survived")."""
    file, old, new, _ = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy_of(file, old, new, folder)
        log = f"{folder}/log"
        process = multiprocessing.get_context("fork").Process(
            target=run, args=(folder, TESTS[file] + SLOW, log))
        process.start()
        process.join(900)
        if process.is_alive():
            process.kill()
            return "killed", "it hangs"
        failed = [line for line in open(log, errors="replace") if line.startswith("FAILED")]
        by = failed[0].split()[1] if failed else ""
        return ("killed" if process.exitcode else "survived"), by


def main(args):
    with open(args.out, "a+") as f:
        f.seek(0)
        done = {tuple(row["mutant"]): row for row in map(json.loads, f)}
        import pytest  # noqa: F401  what every child needs is imported once
        import torch  # noqa: F401
        import transformers.models.llama.modeling_llama  # noqa: F401

        todo = [m for m in mutants() if m[:3] not in done and args.only in m[0]]
        for i, mutant in enumerate(todo if not args.survivors else []):
            how, by = fate(mutant)
            done[mutant[:3]] = {"mutant": mutant[:3], "fate": how, "by": by}
            f.write(json.dumps(done[mutant[:3]]) + "\n")
            f.flush()
            print(f"{i + 1}/{len(todo)} {how} {by} | {mutant[0]}: {mutant[1].strip()[:60]}")
    known = {m[:3]: m[3] for m in mutants()}
    rows = [row for key, row in done.items() if key in known]
    killed = sum(row["fate"] == "killed" for row in rows)
    print(f"{len(rows)} of {len(known)} tried, {killed} killed, survivors:")
    for row in rows:
        if row["fate"] == "survived":
            file, old, new = row["mutant"]
            print(f"  {file}: {old.strip()}  ->  {new.strip()}  {known[file, old, new]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="results, a line a mutant")
    parser.add_argument("--only", default="", help="mutants of one file")
    parser.add_argument("--survivors", action="store_true", help="run nothing, print what survived")
    main(parser.parse_args())
