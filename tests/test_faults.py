"""What goes wrong in the field: odd data, odd flags, a full disk, a kill at any moment.

    KILLS=30 python -m pytest -s tests/test_faults.py -k kill        # the long forms
    STEPS=5000 python -m pytest -s tests/test_faults.py -k memory_is
"""

import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Fork, flags, rows_of, same_weights, script, tiny
from test_data import limits, load, pair, tokenizer
from test_scripts import timeless

STEPS = int(os.environ.get("STEPS", 100))
KILLS = int(os.environ.get("KILLS", 0))
SCRIPTS = ["dpo", "online_rlhf"] if not KILLS else [
    "sft", "reward", "dpo", "ipo", "slic", "bo2", "online_rlhf"]


# ---- odd data ------------------------------------------------------------------------------------


def test_data_that_is_odd_but_right(tmp_path):
    tok = tokenizer()
    plain = load(tmp_path, [pair(), pair()], tok)  # duplicates are the user's affair
    assert len(plain) == 2 and len(load(tmp_path, [pair()], tok)) == 1
    path = tmp_path / "odd.jsonl"
    line = json.dumps(pair())
    for text in (f"\ufeff{line}\r\n{line}\r\n", f"\n{line}\n\n{line}", line + "\n" + line + "\n"):
        path.write_bytes(text.encode())
        import dpo

        assert dpo.load_pairs(str(path), tok, limits()) == plain
    long = load(tmp_path, [pair(prompt="a " * 500_000)], tok)
    assert long[0][0] == [4] * 10
    assert load(tmp_path, [pair(prompt="a\0b")], tok)[0][0] == [3]  # a null byte is a character


@pytest.mark.parametrize("row, says", [
    (pair(prompt="\ud800"), "surrogates not allowed; prompt, chosen"),
    (pair(chosen=None), "must be texts"),
    (pair(chosen=[]), "must be texts"),
    (pair(prompt={"role": "user"}), "must be texts"),
    ({"prompt_ids": [3], "chosen_ids": [99], "rejected_ids": [1]}, "ids must be the tokenizer's"),
    ({"prompt_ids": [], "chosen_ids": [4], "rejected_ids": [1]}, "ids must be the tokenizer's"),
    ({"prompt_ids": [3], "chosen_ids": [1.0], "rejected_ids": [1]}, "ids must be the tokenizer's"),
    ({"prompt_ids": [3], "chosen_ids": "ab", "rejected_ids": [1]}, "ids must be the tokenizer's"),
    ({"prompt_ids": 3, "chosen_ids": [1], "rejected_ids": [1]}, "must be"),
])
def test_data_that_is_wrong(tmp_path, capsys, row, says):
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, [row], tokenizer(template="{{ messages }}"))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and says in err and "pairs.jsonl:1" in err


def test_fuzzed_pairs(tmp_path, capsys):
    """10,000 mutations of a right file: its rows or one clean line, never a traceback or a drop."""
    import dpo

    rng, tok, path = random.Random(0), tokenizer(), tmp_path / "fuzz.jsonl"
    right = (json.dumps(pair()) + "\n" + json.dumps(pair("c", "d", "e f")) + "\n").encode()
    loaded = refused = 0
    for _ in range(10_000):
        text = bytearray(right)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(text))
            change = rng.choice(["flip", "cut", "insert", "double"])
            if change == "flip":
                text[at] = rng.randrange(256)
            elif change == "cut":
                del text[at:at + rng.randint(1, 9)]
            elif change == "insert":
                text[at:at] = rng.choice([b"\n", b'"', b"\\ud800", b"{", b"null", b"\xff", b"[1]"])
            else:
                text[at:at] = text[at:at + 9]
            text = text or bytearray(b" ")
        path.write_bytes(text)
        try:
            pairs = dpo.load_pairs(str(path), tok, limits())
            assert len(pairs) == sum(bool(x.strip()) for x in text.decode("utf-8-sig").replace(
                "\r\n", "\n").replace("\r", "\n").split("\n"))
            loaded += 1
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and len(err.strip().splitlines()) == 1 and str(path) in err
            refused += 1
    assert loaded > 100 and refused > 1000


@pytest.mark.parametrize("flag", ["--steps=0", "--lr=-1", "--lr=nan", "--batch-size=-4",
                                  "--seed=-1", "--beta=0", "--max-response-tokens=0"])
def test_flags_out_of_range(flag, capsys):
    import dpo

    args = dpo.parse_args(["--model", "m", "--data", "d", "--out", "o", flag])
    with pytest.raises(SystemExit) as stop:
        dpo.guard(dpo.main, args)
    assert stop.value.code == 2 and flag.split("=")[0] in capsys.readouterr().err


# ---- interruptions -------------------------------------------------------------------------------


def command(name, toy, out, **kwargs):
    given = dict(model=f"{toy}/sft", out=out, steps=40, batch_size=8, save_every=7, lr=1e-3,
                 warmup=2, max_prompt_tokens=32, max_response_tokens=40) | kwargs
    if name == "online_rlhf":
        given |= dict(labeller=f"{toy}/proxy", prompts=f"{toy}/data/golden.jsonl")
    else:
        given["data"] = f"{toy}/data/golden.jsonl"
    if name == "reward":
        given |= dict(kind="pairwise", eval_every=5)
    return [f"{ROOT}/{name}.py", *(["train"] if name == "reward" else []), *flags(**given)]


TINY = dict(pairs=300, prompts=16, seeds=[0], betas=[0.1], lrs=[1e-3], steps=24, long=24,
            golden_steps=24, train=dict(batch_size=8, warmup=2, save_every=3),
            sft=dict(steps=24, batch_size=8, save_every=3), **{kind: dict(
                kind="pointwise", steps=24, batch_size=8, lr=1e-3, warmup=2, eval_every=8,
                save_every=3) for kind in ("gold", "proxy")})
STUDY = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); import study\n"
         f"study.SCALES['demo'] |= {TINY}\n"
         "study.main(study.parse_args(['--jobs', '2', '--only', 'fig4', 'fig6']))"]


@pytest.mark.skipif(not KILLS, reason="the long form: KILLS=30")
def test_study_killed_at_random_moments(tmp_path):
    """A study, killed with its commands, or alone: then they go on, and the next study waits."""
    rng, env = random.Random("study"), os.environ | {"OMP_NUM_THREADS": "1"}

    def made(folder):
        """Every file of a study that has ended, by content; logs and clocks aside."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.suffix == ".safetensors" or name.startswith("data") and path.suffix == ".jsonl":
                found[name] = path.read_bytes()
            elif path.name in ("metrics.jsonl", "stream.jsonl"):
                found[name] = timeless(rows_of(path))
        return found

    whole, killed, times = tmp_path / "whole", 0, 0
    whole.mkdir()
    began = time.perf_counter()
    subprocess.run(STUDY, check=True, capture_output=True, env=env, cwd=whole)
    took = time.perf_counter() - began
    while killed < KILLS:
        folder, times = tmp_path / f"killed-{times}", times + 1
        folder.mkdir()
        while killed < KILLS:
            run = subprocess.Popen(STUDY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   env=env, cwd=folder, start_new_session=True)
            try:
                assert run.wait(rng.uniform(0, took / 3)) == 0, run.stderr.read().decode()
                break  # it has ended before the kill
            except subprocess.TimeoutExpired:
                (os.killpg if rng.random() < 0.7 else os.kill)(run.pid, signal.SIGKILL)
                run.wait()
                killed += 1
        subprocess.run(STUDY, check=True, capture_output=True, env=env, cwd=folder)
        assert made(folder) == made(whole)
    print(f"study: killed {killed} times over {times} studies of {took:.0f} s")


def kill_at_random(words, folder, moved, span, startup, rng):
    """Start a command and SIGKILL it at a random moment: one in five while it starts, else up to
    `span` seconds after the file `moved` was rewritten.
    True where it was killed, False where it had ended, with status 0, before.
    """
    def stamp():
        return os.stat(moved).st_mtime_ns if os.path.exists(moved) else 0

    before, run = stamp(), Fork(folder, script, *words)
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, startup))
    else:
        while stamp() == before and run.process.is_alive():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, span))
    run.process.kill()
    status, _, err = run.end()
    assert status in (0, -signal.SIGKILL), err
    return status != 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_random_moments(toy, tmp_path, name):
    """SIGKILL, resume, again and again: in the end the bits of the uninterrupted run."""
    rng = random.Random(name)
    short = dict(steps=200, save_every=3) if KILLS else dict(steps=30, save_every=4)
    whole, began = f"{tmp_path}/whole", time.time()
    Fork(tmp_path, script, *command(name, toy, whole, **short)).succeed()
    startup = os.stat(f"{whole}/args.json").st_mtime - began
    training = os.stat(f"{whole}/metrics.jsonl").st_mtime - began - startup
    killed, runs = 0, 0
    while killed < (KILLS or 2):  # where a run ends before its kills are spent, another begins
        out, runs = f"{tmp_path}/killed-{runs}", runs + 1
        words = command(name, toy, out, resume=True, **short)
        while not os.path.exists(f"{out}/final") and killed < (KILLS or 2):
            killed += kill_at_random(words, tmp_path, f"{out}/metrics.jsonl",
                                     2 * training / (KILLS or 2), startup, rng)
        if not os.path.exists(f"{out}/final"):
            Fork(tmp_path, script, *words).succeed()
        assert same_weights(out, whole)
        assert timeless(rows_of(f"{out}/metrics.jsonl")) == timeless(rows_of(
            f"{whole}/metrics.jsonl"))
        if name == "online_rlhf":
            assert rows_of(f"{out}/stream.jsonl") == rows_of(f"{whole}/stream.jsonl")
    print(f"{name}: killed {killed} times over {runs} runs of {training:.1f} s")


def frugal(*words):
    """A script whose freed blocks go back to the system at once."""
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD
    script(*words)


@pytest.mark.parametrize("name", ["dpo", "online_rlhf"])
def test_memory_is_flat(toy, tmp_path, name):
    """What is resident, over the steps of a run that also evaluates and saves: no slope."""
    out, seen = f"{tmp_path}/r", []
    run = Fork(tmp_path, frugal, *command(
        name, toy, out, steps=STEPS, batch_size=2, save_every=STEPS // 10,
        eval_every=STEPS // 5, gold=f"{toy}/gold", baseline=f"{toy}/baseline.jsonl"))
    while run.process.is_alive():
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{run.process.pid}/statm") as f:
                resident = int(f.read().split()[1]) * resource.getpagesize()
            seen.append((os.path.getsize(f"{out}/metrics.jsonl"), resident))
        time.sleep(0.02)
    run.succeed()
    whole = os.path.getsize(f"{out}/metrics.jsonl")
    steps, sizes = zip(*((STEPS * at / whole, size / 1e6) for at, size in seen
                         if whole / 4 < at < whole), strict=True)
    slope, _ = statistics.linear_regression(steps, sizes)
    print(f"{name}: {slope * 1000:+.2f} MB per 1,000 steps, {len(steps)} samples, "
          f"{min(sizes):.0f} to {max(sizes):.0f} MB")
    assert abs(slope) * STEPS < 5


def short_of_disk(*words):
    """A script that may write files of 60 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    script(*words)


def test_full_disk_loses_nothing(toy, tmp_path):
    """A file-size limit below the checkpoint's: one line, status 2; with room again it goes on."""
    out = f"{tmp_path}/r"
    words = command("dpo", toy, out, resume=True)
    status, _, err = Fork(tmp_path, short_of_disk, *words).end()
    assert status == 2 and len(err.strip().splitlines()) == 1, err
    assert "saved before is whole" in err
    assert len(rows_of(f"{out}/metrics.jsonl")) == 7
    Fork(tmp_path, script, *words).succeed()
    Fork(tmp_path, script, *command("dpo", toy, f"{tmp_path}/whole")).succeed()
    assert same_weights(out, f"{tmp_path}/whole")


def test_out_of_memory_names_the_flag(capsys):
    """CPU and GPU: one line and status 2; any other RuntimeError keeps its traceback."""
    import dpo

    args = dpo.parse_args(["--model", "m", "--data", "d", "--out", "o"])

    def too_large(_):
        torch.empty(1 << 60, dtype=torch.uint8)

    def out_of_cuda(_):
        raise torch.OutOfMemoryError

    def bug(_):
        raise RuntimeError("another")

    for main in (too_large, out_of_cuda):
        with pytest.raises(SystemExit) as stop:
            dpo.guard(main, args)
        assert stop.value.code == 2 and "--tokens-per-microbatch" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"):
        dpo.guard(bug, args)


def test_logs_are_cut_back_to_the_checkpoint(toy, tmp_path, capsys):
    """What was logged after it goes, half lines too; a log that has lost lines is named."""
    import dpo

    out = tmp_path / "r"
    words = flags(model=f"{toy}/sft", data=f"{toy}/data/golden.jsonl", out=out, steps=4,
                  batch_size=4, save_every=1, max_prompt_tokens=32, max_response_tokens=40)
    args = dpo.parse_args([*words, "--resume"])

    def two_steps():
        out.mkdir(exist_ok=True)
        model = tiny()
        steps = dpo.training_steps(args, model, torch.optim.AdamW(model.parameters()))
        for step, metrics in steps:
            if step == 3:
                return
            metrics |= {"tokens": 1, "loss": float(step)}

    two_steps()
    whole = (out / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in rows_of(out / "metrics.jsonl")] == [1, 2]
    for more in (b'{"st', '{"step": 3, "a": "é'.encode()[:-1], b'{"step": 3}\n', b""):
        (out / "metrics.jsonl").write_bytes(whole + more)
        two_steps()
        assert (out / "metrics.jsonl").read_bytes() == whole
    (out / "metrics.jsonl").write_bytes(whole[:-9])
    with pytest.raises(SystemExit) as stop:
        two_steps()
    assert stop.value.code == 2
    assert "metrics.jsonl is shorter than it was" in capsys.readouterr().err


def test_damaged_checkpoint_is_named(toy, tmp_path):
    out = tmp_path / "r"
    out.mkdir()
    (out / "checkpoint.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      cut")
    status, _, err = Fork(tmp_path, script, *command("dpo", toy, str(out), resume=True)).end()
    assert status == 2 and "checkpoint.safetensors is damaged" in err


# ---- no pickle -----------------------------------------------------------------------------------


def test_no_pickle_anywhere():
    for path in ROOT.glob("*.py"):
        text = path.read_text()
        for word in ("torch.load", "torch.save", "pickle", "eval(", "exec("):
            assert word not in text.replace("model.eval()", "").replace(".eval()", ""), (path, word)
        if "from_pretrained(" in text and path.name not in ("tasks.py",):
            assert "use_safetensors=True" in text
            assert '"trust_remote_code": args.trust_remote_code' in text


def test_pickled_weights_are_refused(toy, tmp_path):
    """A model folder whose weights are a pickle bomb: refused, not run."""
    import shutil

    shutil.copytree(f"{toy}/sft/final", tmp_path / "bomb")
    (tmp_path / "bomb/model.safetensors").unlink()
    target = tmp_path / "boom"
    (tmp_path / "bomb/pytorch_model.bin").write_bytes(
        b"cos\nsystem\n(S'touch " + str(target).encode() + b"'\ntR.")
    status, _, err = Fork(tmp_path, script, *command(
        "dpo", tmp_path, f"{tmp_path}/r", model=f"{tmp_path}/bomb")).end()
    assert status == 2 and "cannot load a model" in err
    assert not target.exists()
