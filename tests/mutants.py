"""Break the program one line at a time: do the tests that concern the line notice?

    python tests/mutants.py --out mutants.jsonl            # all; goes on where it stopped
    python tests/mutants.py --out mutants.jsonl --only gold_eval.py
    python tests/mutants.py --out mutants.jsonl --survivors
    python tests/mutants.py --out a.jsonl --part 1/2        # every second, one process of two

tests/mutants.jsonl lists [file, text, what it becomes]. Each is tried in a copy of the tree by the
tests that concern it, quick ones first, until one fails: then it is killed. Outside CI: with
--quick 260 took nine minutes, in two parts on two cores. A mutant that changes nothing a test could
see says so in a fourth text.
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
    """[(file, old text, new text, why it is equivalent or "")]; the old text is there once."""
    with open(ROOT / "tests" / "mutants.jsonl", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [(file, old, new, "".join(why)) for file, old, new, *why in rows]


def copy_of(file, old, new, folder):
    """The tree with one place changed."""
    for name in ("tests", "results"):
        shutil.copytree(ROOT / name, f"{folder}/{name}",
                        ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*.txt")]:
        shutil.copy(path, folder)
    text = (ROOT / file).read_text()
    if text.count(old) != 1:
        raise SystemExit(f"error: {file} has {text.count(old)} times: {old}")
    (Path(folder) / file).write_text(text.replace(old, new))


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


def fate(mutant, names):
    """("killed" by which test, or "survived")."""
    file, old, new, _ = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy_of(file, old, new, folder)
        log = f"{folder}/log"
        process = multiprocessing.get_context("fork").Process(
            target=run, args=(folder, names, log))
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

        part, parts = map(int, args.part.split("/"))
        todo = [m for m in mutants()[part - 1::parts] if m[:3] not in done and args.only in m[0]]
        for i, mutant in enumerate(todo if not args.survivors else []):
            how, by = fate(mutant, TESTS[mutant[0]] + SLOW * (not args.quick))
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
    parser.add_argument("--part", default="1/1", help="of so many parts")
    parser.add_argument("--quick", action="store_true", help="without the slow tests")
    parser.add_argument("--only", default="", help="mutants of one file")
    parser.add_argument("--survivors", action="store_true", help="run nothing, print what survived")
    main(parser.parse_args())
