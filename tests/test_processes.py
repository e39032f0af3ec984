"""Several processes (torchrun) train what one does, with gloo on the CPU.

    PROCESSES=1 python -m pytest -s tests/test_processes.py      # the long forms
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, Fork, rows_of, script, weights_of
from test_faults import command
from test_scripts import timeless

LONG = "PROCESSES" in os.environ
SCRIPTS = ["dpo", "online_rlhf", "reward"] if not LONG else [
    "sft", "reward", "dpo", "ipo", "slic", "bo2", "online_rlhf"]


def one_rank(rank, ranks, port, gpus, target, *words):
    os.environ |= {} if gpus else {"CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    target(*words)


def start(folder, ranks, words, target=script, gpus=False):
    """The processes of a run, as torchrun starts them."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    folders = [folder / f"rank{rank}-{time.monotonic_ns()}" for rank in range(ranks)]
    for path in folders:
        path.mkdir()
    return [Fork(path, one_rank, rank, ranks, port, gpus, target, *words)
            for rank, path in enumerate(folders)]


def run(folder, ranks, words):
    """What `torchrun --nproc-per-node RANKS WORDS` does; the first process's output."""
    return [fork.succeed() for fork in start(folder, ranks, words)][0]


def close(out, whole, loss=1e-5, weight=1e-4):
    """Losses of two runs within 1e-5 relative, weights within 1e-4; how far they are."""
    a, b = ([row["loss"] for row in timeless(rows_of(f"{x}/metrics.jsonl"))] for x in (out, whole))
    assert len(a) == len(b)
    losses = max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))
    a, b = weights_of(out), weights_of(whole)
    assert a.keys() == b.keys()
    weights = max((a[k] - b[k]).abs().max().item() for k in a)
    assert losses < loss and weights < weight, (losses, weights)
    return f"losses within {losses:.1e}, weights within {weights:.1e}"


def sampled(out):
    """The stream of an online run, without its margins, which may round apart."""
    return [{**row, "margin": 0} for row in rows_of(f"{out}/stream.jsonl")]


@pytest.mark.parametrize("name", SCRIPTS)
def test_as_one_process(toy, tmp_path, name):
    """20 steps on 2 and 4 processes are those of one, and so is what an online run samples."""
    short = dict(steps=20, tokens_per_microbatch=400, **{"loss": "dpo"} if "online" in name else {})
    run(tmp_path, 1, command(name, toy, f"{tmp_path}/1", **short))
    for ranks in (2, 4) if LONG else (2,):
        run(tmp_path, ranks, command(name, toy, f"{tmp_path}/{ranks}", **short))
        print(name, ranks, close(f"{tmp_path}/{ranks}", f"{tmp_path}/1"))
        if name == "online_rlhf":
            assert sampled(f"{tmp_path}/{ranks}") == sampled(f"{tmp_path}/1")


def test_odd_shares(toy, tmp_path):
    """Three pairs a step, long and short, on 2 or 4 processes: some have none, none waits."""
    short = dict(steps=20, batch_size=3, tokens_per_microbatch=150)
    run(tmp_path, 1, command("dpo", toy, f"{tmp_path}/1", **short))
    for ranks in (2, 4) if LONG else (2,):
        run(tmp_path, ranks, command("dpo", toy, f"{tmp_path}/{ranks}", **short))
        print(ranks, close(f"{tmp_path}/{ranks}", f"{tmp_path}/1"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_micro_batches_are_dealt(ranks, monkeypatch):
    """Every row once; of lengths from 1 to 1,000 each process has as many lists, none too large."""
    import dpo

    g = torch.Generator().manual_seed(ranks)
    for trial in range(50):
        lengths = (10 ** (3 * torch.rand(1 + trial, generator=g))).int().tolist()
        rows, shares = [[[0] * n] for n in lengths], []
        for rank in range(ranks):
            monkeypatch.setattr(dpo, "RANK", rank)
            shares.append(dpo.micro_batches(rows, 1200, ranks=ranks))
        assert sorted(i for share in shares for group in share for i in group) == [
            *range(len(rows))]
        assert len({len(share) for share in shares}) == 1
        assert all(len(group) * max(lengths[i] for i in group) <= 1200
                   for share in shares for group in share if group)
        alone = dpo.micro_batches(rows, 1200, ranks=1)
        assert len(shares[0]) <= len(alone)  # one process computes what several do at once
    for rank in range(ranks):  # rows that are longer than all tokens: one for each process
        monkeypatch.setattr(dpo, "RANK", rank)
        shares = dpo.micro_batches([[[0] * 9]] * 2 * ranks, 5, ranks=ranks)
        assert shares == [[rank], [ranks + rank]]


def test_evaluation_as_one_process(toy, tmp_path):
    """Each process samples and judges its share of the prompts: the numbers of one process."""
    short = dict(steps=4, eval_every=2, gold=f"{toy}/gold", baseline=f"{toy}/baseline.jsonl")
    run(tmp_path, 1, command("dpo", toy, f"{tmp_path}/1", **short))
    run(tmp_path, 3, command("dpo", toy, f"{tmp_path}/3", **short))
    one, three = (rows_of(f"{tmp_path}/{n}/metrics.jsonl") for n in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a.keys() == b.keys()
        assert a.pop("outcomes", "") == b.pop("outcomes", "")
        for key in a.keys() - {"tokens_per_s", "seconds"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    texts = [[row["response"] for row in rows_of(f"{tmp_path}/{n}/samples.jsonl")] for n in (1, 3)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("words", [
    ["reward.py", "label", "--model", "gold", "--data", "data/initial.jsonl"],
    ["gold_eval.py", "sample", "--model", "sft", "--data", "data/golden.jsonl", "--prompts", "21"],
    ["gold_eval.py", "judge", "--model", "sft", "--reference", "sft", "--gold", "gold",
     "--baseline", "baseline.jsonl", "--data", "data/golden.jsonl"]])
def test_labels_samples_and_judgements(toy, tmp_path, words):
    """The file that two processes write is that of one."""
    words = [f"{ROOT}/{words[0]}", *(
        f"{toy}/{w}" if os.path.exists(f"{toy}/{w}") else w for w in words[1:]),
        "--max-prompt-tokens", "32", "--max-response-tokens", "40", "--out"]
    run(tmp_path, 1, [*words, f"{tmp_path}/one"])
    run(tmp_path, 2, [*words, f"{tmp_path}/two"])
    one, two = (rows_of(f"{tmp_path}/{name}") for name in ("one", "two"))
    assert one == two if "judge" not in words else one[0] == pytest.approx(two[0], abs=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox"] if not LONG else [
    "gpt_neox", "gpt2", "gemma2", "gemma3_text", "qwen3"])
def test_families(tmp_path, family):
    """Heads tied and not, soft-capped logits, plain rows; with layers computed again."""
    from test_families import make_model

    make_model(family, f"{tmp_path}/base")
    with open(f"{tmp_path}/pairs.jsonl", "w") as f:
        for i in range(24):
            f.write(json.dumps({"prompt": "the fox" * (1 + i % 3), "rejected": "sang" * (1 + i),
                                "chosen": "and the owl" * (i // 3)}) + "\n")
    words = command("dpo", tmp_path, "", steps=8, batch_size=6, lr=1e-4,
                    checkpoint_activations=True, model=f"{tmp_path}/base")
    words[words.index("--data") + 1] = f"{tmp_path}/pairs.jsonl"
    at = words.index("--out") + 1
    words[at] = f"{tmp_path}/1"
    run(tmp_path, 1, words)
    words[at] = f"{tmp_path}/2"
    run(tmp_path, 2, words)
    print(family, close(f"{tmp_path}/2", f"{tmp_path}/1"))


@pytest.mark.parametrize("name", ["online_rlhf"] if not LONG else SCRIPTS)
def test_resumed_on_other_numbers_of_processes(toy, tmp_path, name):
    """2 processes, then 4, then 1: a signal to one of them stops all, and loses nothing."""
    short = dict(steps=30, save_every=1000, **{"loss": "dpo"} if "online" in name else {})
    out, whole = f"{tmp_path}/r", f"{tmp_path}/whole"
    run(tmp_path, 1, command(name, toy, whole, **short))
    for ranks, steps in (2, 5), (4, 15):
        forks = start(tmp_path, ranks, command(name, toy, out, resume=True, **short))
        while not os.path.exists(f"{out}/metrics.jsonl") or len(
                open(f"{out}/metrics.jsonl").readlines()) < steps:
            assert forks[0].process.is_alive(), forks[0].end()
            time.sleep(0.01)
        os.kill(forks[-1].process.pid, signal.SIGTERM)
        ends = [fork.end() for fork in forks]
        assert all(status == 128 + signal.SIGTERM for status, _, _ in ends)
        assert "SIGTERM: saved step" in ends[0][2] and not any(err for *_, err in ends[1:])
    run(tmp_path, 1, command(name, toy, out, resume=True, **short))
    print(name, close(out, whole))
    assert [row["step"] for row in rows_of(f"{out}/metrics.jsonl")] == [*range(1, 31)]
    if name == "online_rlhf":
        assert sampled(out) == sampled(whole)


def test_a_killed_process_ends_the_run(toy, tmp_path):
    """The others say so in one line, at once, with a status that is not 0."""
    forks = start(tmp_path, 2, command("dpo", toy, f"{tmp_path}/r", steps=100_000))
    while not os.path.exists(f"{tmp_path}/r/checkpoint.safetensors"):
        assert forks[0].process.is_alive(), forks[0].end()
        time.sleep(0.01)
    forks[1].process.kill()
    began = time.monotonic()
    status, _, err = forks[0].end()
    assert status == 1 and time.monotonic() - began < 60
    assert "another process of the run has ended" in err and len(err.strip().splitlines()) == 1


def test_a_bad_input_is_said_once(toy, tmp_path):
    """All processes find it; the first says it, before the others would."""
    words = [*command("dpo", toy, f"{tmp_path}/r"), "--data", "missing.jsonl"]
    forks = start(tmp_path, 2, words)
    status, _, err = forks[0].end()
    forks[1].process.terminate()  # as torchrun does
    assert status == 2 and err.startswith("error: cannot read missing.jsonl")
    assert forks[1].end()[::2] == (-signal.SIGTERM, "")


@pytest.mark.skipif(not LONG, reason="the long form: PROCESSES=1")
def test_torchrun(toy, tmp_path):
    """The command itself: a run that ends, and one of which a process is killed."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*words, *command("dpo", toy, f"{tmp_path}/1")], check=True, env=env)
    assert len(rows_of(f"{tmp_path}/1/metrics.jsonl")) == 40
    run = subprocess.Popen([*words, *command("dpo", toy, f"{tmp_path}/2", steps=100_000)],
                           stderr=subprocess.PIPE, text=True, env=env)
    while not os.path.exists(f"{tmp_path}/2/checkpoint.safetensors"):
        time.sleep(0.1)
    children = subprocess.run(["ps", "--ppid", str(run.pid), "-o", "pid="], check=True,
                              capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)  # not the first, which speaks for all
    began = time.monotonic()
    assert run.wait() != 0 and time.monotonic() - began < 60
    assert "another process of the run has ended" in run.stderr.read()
