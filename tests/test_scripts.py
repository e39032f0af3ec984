"""Whole runs of the scripts: same seed same bits, tandem, resume, dpo.py alone, bad input."""

import gzip
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, Fork, flags, rows_of, same_weights, train
from conftest import script as run_script

LOSSES = ["ipo", "dpo", "slic", "bo2"]
SHORT = dict(steps=4, batch_size=8, warmup=2, lr=1e-2)


def timeless(rows):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in rows]


def offline(toy, script, out, **kwargs):
    given = dict(model=f"{toy}/sft", data=f"{toy}/data/golden.jsonl", **SHORT)
    return train(script, out, **given | kwargs)


def online(toy, out, **kwargs):
    given = dict(model=f"{toy}/sft", labeller=f"{toy}/proxy", prompts=f"{toy}/data/golden.jsonl")
    return train("online_rlhf", out, **given | SHORT | kwargs)


@pytest.mark.parametrize("script", LOSSES)
def test_same_seed_same_bits(toy, tmp_path, script):
    a, b, c = (timeless(offline(toy, script, f"{tmp_path}/{n}", seed=s))
               for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b != c
    assert same_weights(f"{tmp_path}/a", f"{tmp_path}/b")
    assert not same_weights(f"{tmp_path}/a", f"{tmp_path}/c")
    first = {"ipo": 0.25, "dpo": math.log(2), "slic": 1.0, "bo2": -a[0]["logps/chosen"]}[script]
    assert a[0]["loss"] == pytest.approx(first, abs=1e-5)


def test_a_log_that_is_not_the_runs_own_is_left_alone(toy, tmp_path, capsys):
    """A stream read from the folder that is to be written, say; a start with no args.json."""
    out = tmp_path / "r"
    out.mkdir()
    line = '{"prompt_ids": [5], "chosen_ids": [6, 1], "rejected_ids": [7, 1]}\n'
    (out / "stream.jsonl").write_text(line)
    for resume, hint in ((None, "--resume"), (True, "args.json")):
        with pytest.raises(SystemExit) as stop:
            offline(toy, "ipo", out, data=f"{out}/stream.jsonl", resume=resume)
        assert stop.value.code == 2 and hint in capsys.readouterr().err
    (out / "args.json").write_text("")
    with pytest.raises(SystemExit) as stop:
        offline(toy, "ipo", out, data=f"{out}/stream.jsonl", resume=True)
    assert stop.value.code == 2 and "was started with another" in capsys.readouterr().err
    assert (out / "stream.jsonl").read_text() == line


def test_the_folder_is_locked_from_its_opening_to_the_end(toy, tmp_path, monkeypatch):
    """Also while the model loads and final/ is written, though the log is closed by then."""
    import dpo

    found, ask = [], ("import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | "
                      "fcntl.LOCK_NB)")
    for name, usual in (("load_model", dpo.load_model), ("finish_run", dpo.finish_run)):
        def asked(*args, usual=usual):
            found.append(subprocess.run([sys.executable, "-c", ask, f"{tmp_path}/r/lock"],
                                        stderr=subprocess.PIPE, text=True).stderr)
            return usual(*args)

        monkeypatch.setattr(dpo, name, asked)
    offline(toy, "dpo", f"{tmp_path}/r", steps=1)
    assert len(found) == 2 and all("BlockingIOError" in err for err in found), found


def test_only_the_first_process_cuts_the_logs(tmp_path, monkeypatch):
    """It alone has the lock: a start that is refused takes nothing from the run that goes on."""
    import ipo

    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(ipo, "RANK", 1)
    model = torch.nn.Linear(1, 1)
    steps = ipo.training_steps(SimpleNamespace(out=str(tmp_path), steps=1), model,
                               torch.optim.AdamW(model.parameters()))
    assert next(steps)[0] == 1 and (tmp_path / "metrics.jsonl").stat().st_size == 12


def test_reference_log_probs_are_kept(toy, tmp_path, monkeypatch):
    """A resumed run has them from its checkpoint, and nothing is written beside the run folder."""
    import dpo

    whole = timeless(offline(toy, "dpo", f"{tmp_path}/whole"))
    step = dpo.optimizer_step
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dpo, "optimizer_step", lambda *args: (
            1 / 0 if "step 3," in args[-1] else step(*args)))
        offline(toy, "dpo", f"{tmp_path}/r", save_every=2)
    monkeypatch.setattr(dpo, "batch_logps", lambda *_: pytest.fail("computed again"))
    assert timeless(offline(toy, "dpo", f"{tmp_path}/r", save_every=2, resume=True)) == whole
    assert sorted(os.listdir(tmp_path)) == ["r", "whole"]


def test_online_bo2_keeps_no_reference(toy, tmp_path, monkeypatch):
    """Nothing reads one without --gold; ipo has its log-ratios from one."""
    import online_rlhf

    copied = online_rlhf.copy.deepcopy
    monkeypatch.setattr(online_rlhf.copy, "deepcopy", lambda x, *rest: pytest.fail("a reference")
                        if isinstance(x, torch.nn.Module) else copied(x, *rest))
    assert len(online(toy, f"{tmp_path}/a", loss="bo2")) == 4
    with pytest.raises(pytest.fail.Exception):
        online(toy, f"{tmp_path}/b", loss="ipo")


def test_the_cost_of_evaluation_is_said_before_the_first(toy, tmp_path, capsys):
    offline(toy, "dpo", f"{tmp_path}/a", gold=f"{toy}/gold", baseline=f"{toy}/baseline.jsonl")
    assert "an evaluation is of 24 prompts: up to 0." in capsys.readouterr().out


@pytest.mark.parametrize("loss", LOSSES)
def test_tandem(toy, tmp_path, loss):
    """Offline on D_online in kept order is the online run bit for bit; one batch swapped is not."""
    rows = online(toy, f"{tmp_path}/online", loss=loss)
    stream = f"{tmp_path}/online/stream.jsonl"
    replay = offline(toy, loss, f"{tmp_path}/kept", data=stream, shuffle_window=1)
    if torch.cuda.is_available():  # kernels may add up in another order: report, do not require
        gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(rows, replay, strict=True))
        print(f"tandem {loss} on CUDA: losses differ by at most {gap:.3g}")
        return
    assert [r["loss"] for r in rows] == [r["loss"] for r in replay]
    assert same_weights(f"{tmp_path}/online", f"{tmp_path}/kept")
    lines = open(stream).readlines()
    assert [json.loads(x)["step"] for x in lines] == [s for s in (1, 2, 3, 4) for _ in range(8)]
    with open(f"{tmp_path}/swapped.jsonl", "w") as f:
        f.writelines(lines[:8] + lines[16:24] + lines[8:16] + lines[24:])
    offline(toy, loss, f"{tmp_path}/swapped", data=f"{tmp_path}/swapped.jsonl",
            shuffle_window=1)
    assert not same_weights(f"{tmp_path}/online", f"{tmp_path}/swapped")


def test_equal_samples_are_counted_and_weightless(toy, tmp_path, monkeypatch):
    """Two equal samples: counted as ties; with a contrastive loss nothing moves."""
    import online_rlhf

    draw = online_rlhf.sample
    monkeypatch.setattr(online_rlhf, "sample",
                        lambda *a: [r for r in draw(*a)[::2] for _ in (0, 1)])
    rows = online(toy, f"{tmp_path}/o", steps=1)
    assert rows[0]["ties"] == 8 and rows[0]["loss"] == pytest.approx(0.25)
    assert rows[0]["grad_norm"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("script", [*LOSSES, "online_rlhf", "sft", "reward"])
def test_stopped_and_resumed_equals_uninterrupted(toy, tmp_path, script, monkeypatch, capsys):
    """A run stopped by SIGTERM after step 2 and resumed: same metrics, stream and weights."""
    kwargs = dict(model=f"{toy}/sft", save_every=3, **SHORT)
    if script == "online_rlhf":
        kwargs |= dict(labeller=f"{toy}/proxy", prompts=f"{toy}/data/golden.jsonl")
    else:
        kwargs |= dict(data=f"{toy}/data/golden.jsonl")
    if script == "reward":
        kwargs |= dict(kind="pairwise", eval_every=1)
    words = flags(max_prompt_tokens=32, max_response_tokens=40, **kwargs)
    words = (["train"] if script == "reward" else []) + words

    module = __import__(script)
    module.main(module.parse_args([*words, "--out", f"{tmp_path}/whole"]))
    update, out = module.optimizer_step, f"{tmp_path}/stopped"

    def optimizer_step(*args):
        if ": step 2, " in args[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(module, "optimizer_step", optimizer_step)
        module.main(module.parse_args([*words, "--out", out]))
    assert stop.value.code == 128 + 15
    assert "SIGTERM: saved step 2" in capsys.readouterr().err
    with open(f"{out}/metrics.jsonl", "a") as f:
        f.write('{"step": 3, "half a li')  # as a kill in mid-write leaves it
    module.main(module.parse_args([*words, "--out", out, "--resume"]))
    assert timeless(rows_of(f"{out}/metrics.jsonl")) == timeless(rows_of(
        f"{tmp_path}/whole/metrics.jsonl"))
    assert same_weights(out, f"{tmp_path}/whole")
    if script == "online_rlhf":
        assert rows_of(f"{out}/stream.jsonl") == rows_of(f"{tmp_path}/whole/stream.jsonl")


def test_a_signal_in_the_last_step_finishes(toy, tmp_path, monkeypatch):
    import dpo

    update = dpo.optimizer_step

    def optimizer_step(*args):
        if f": step {SHORT['steps']}, " in args[-1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(dpo, "optimizer_step", optimizer_step)
    offline(toy, "dpo", f"{tmp_path}/a")
    assert os.path.exists(f"{tmp_path}/a/final/model.safetensors")


def test_evaluation_never_shifts_training(toy, tmp_path):
    judged = dict(gold=f"{toy}/gold", baseline=f"{toy}/baseline.jsonl", eval_every=2)
    for script, run in (("dpo", offline), ("online_rlhf", online)):
        first = [toy, script] if script == "dpo" else [toy]
        run(*first, f"{tmp_path}/{script}-plain")
        rows = run(*first, f"{tmp_path}/{script}-judged", **judged)
        assert same_weights(f"{tmp_path}/{script}-plain", f"{tmp_path}/{script}-judged")
        assert [row["step"] for row in rows if "gold/win_rate" in row] == [0, 2, 4]
        assert len(rows_of(f"{tmp_path}/{script}-judged/samples.jsonl")) == 72
        start = rows[0]  # the policy is its own reference
        assert abs(start["gold/kl"]) < 1e-6
        assert (start["gold/accuracy_golden"], start["gold/accuracy_self"]) == (0.5, 0.5)
        out = f"{tmp_path}/{script}-judged"  # as if killed before the first checkpoint
        shutil.rmtree(f"{out}/final")
        again = run(*first, out, **judged, resume=True)
        assert timeless(again) == timeless(rows) and len(rows_of(f"{out}/samples.jsonl")) == 72
    assert rows[-1]["gold/kl"] > 0


def test_slic_hf(toy, tmp_path):
    """--no-reference --sft-weight: the published SLiC-HF, on log-probs in place of log-ratios."""
    row = offline(toy, "slic", f"{tmp_path}/s", no_reference=True, sft_weight=0.5, beta=1.0,
                  batch_size=1)[0]
    hinge = max(0.0, 1 - (row["logps/chosen"] - row["logps/rejected"]))
    assert row["loss"] == pytest.approx(hinge - 0.5 * row["logps/chosen"], rel=1e-5)


def alone(folder, block):
    os.chdir(folder)
    sys.path[:] = [folder, *(path for path in sys.path if path != str(ROOT))]
    exec(block, {})


def test_dpo_alone_in_an_empty_folder(toy, tmp_path):
    """README's section on copying one algorithm: the command, and the block that calls its loss."""
    shutil.copy(ROOT / "dpo.py", tmp_path)
    done = subprocess.run([sys.executable, "dpo.py", *flags(
        model=f"{toy}/sft", data=f"{toy}/data/golden.jsonl", out="run", max_prompt_tokens=32,
        max_response_tokens=40, **SHORT)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 steps, loss" in done.stdout
    block, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    loss = Fork(tmp_path, alone, str(tmp_path), block).succeed()
    assert float(loss) == pytest.approx(math.log(2))


def bad(tmp_path, toy):
    """(name, script, words, what the one line says)."""
    def file(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    good = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
    with gzip.open(tmp_path / "cut.jsonl.gz", "wt") as f:
        f.write(good * 1000)
    whole = (tmp_path / "cut.jsonl.gz").read_bytes()
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    shutil.copytree(f"{toy}/sft/final", tmp_path / "bare", dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    from transformers import AutoTokenizer

    for name, cut in (("cut_model", "model.safetensors"), ("cut_tokens", "tokenizer.json")):
        shutil.copytree(f"{toy}/sft/final", tmp_path / name, dirs_exist_ok=True)
        whole = (tmp_path / name / cut).read_bytes()
        (tmp_path / name / cut).write_bytes(whole[:len(whole) // 2])
    tokenizer = AutoTokenizer.from_pretrained(f"{toy}/sft/final")
    shutil.copytree(f"{toy}/sft/final", tmp_path / "endless", dirs_exist_ok=True)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    shutil.copytree(f"{toy}/gold/final", tmp_path / "other", dirs_exist_ok=True)
    words = (tmp_path / "other/tokenizer.json").read_text()
    (tmp_path / "other/tokenizer.json").write_text(words.replace('"fox"', '"dog"'))
    judged = dict(gold=f"{toy}/gold", max_prompt_tokens=32, max_response_tokens=40)
    (tmp_path / "started").mkdir(exist_ok=True)
    file("started/metrics.jsonl", '{"step": 1}\n')
    dpo = dict(model=f"{toy}/sft", data=f"{toy}/data/golden.jsonl", out=f"{tmp_path}/new")
    return [
        ("no file", "dpo", flags(**dpo | {"data": "nowhere.jsonl"}), "cannot read nowhere.jsonl"),
        ("not JSON", "dpo", flags(**dpo | {"data": file("a.jsonl", good + "{oops")}), "a.jsonl:2"),
        ("not an object", "dpo", flags(**dpo | {"data": file("b.jsonl", "[1]\n")}), "b.jsonl:1"),
        ("missing key", "dpo", flags(**dpo | {"data": file("c.jsonl", good + '{"prompt": "x"}\n')}),
         "c.jsonl:2: ValueError: no chosen and no rejected among"),
        ("not a string", "dpo", flags(**dpo | {"data": file(
            "d.jsonl", '{"prompt": 3, "chosen": "b", "rejected": "c"}\n')}), "d.jsonl:1"),
        ("empty", "dpo", flags(**dpo | {"data": file("e.jsonl", "\n")}), "no pairs"),
        ("cut gzip", "dpo", flags(**dpo | {"data": f"{tmp_path}/cut.jsonl.gz"}), "cut.jsonl.gz:"),
        ("no tokenizer", "dpo", flags(**dpo | {"model": f"{tmp_path}/bare"}), "its tokenizer"),
        ("cut model", "dpo", flags(**dpo | {"model": f"{tmp_path}/cut_model"}),
         "cannot load a model"),
        ("cut tokenizer", "dpo", flags(**dpo | {"model": f"{tmp_path}/cut_tokens"}),
         "its tokenizer"),
        ("no EOS", "dpo", flags(**dpo | {"model": f"{tmp_path}/endless"}), "EOS is None"),
        ("long stream", "dpo", flags(**dpo | {"data": file("s.jsonl", json.dumps(
            {"prompt_ids": [5] * 9, "chosen_ids": [6], "rejected_ids": [7]}) + "\n")},
            max_prompt_tokens=8), "s.jsonl:1: ValueError: ids must be the tokenizer's, and"),
        ("no model", "dpo", flags(**dpo | {"model": f"{tmp_path}/none"}), "no such folder"),
        ("run exists", "dpo", flags(**dpo | {"out": f"{tmp_path}/started"}), "--resume"),
        ("run finished", "sft", flags(**dpo | {"out": f"{toy}/sft"}), "finished"),
        ("too long", "dpo", flags(**dpo, max_prompt_tokens=4000), "positions"),
        ("gold alone", "dpo", flags(**dpo, gold=f"{toy}/gold"), "--baseline"),
        ("not a judge", "online_rlhf", flags(model=f"{toy}/sft", prompts=dpo["data"],
                                             labeller=f"{toy}/sft", out=dpo["out"]),
         "not a preference model"),
        ("labeller's tokenizer", "online_rlhf", flags(
            model=f"{toy}/sft", prompts=dpo["data"], labeller=f"{tmp_path}/other", out=dpo["out"]),
         "other has another tokenizer"),
        ("judge's tokenizer", "dpo", flags(**dpo | judged | {"gold": f"{tmp_path}/other"},
                                           baseline=f"{toy}/baseline.jsonl"),
         "other has another tokenizer"),
        *((f"baseline: {says}", "dpo", flags(**dpo | judged, baseline=file(
            f"{i}.jsonl", json.dumps({"prompt_ids": [5], "response_ids": [6], **row}) + "\n")),
           f"{i}.jsonl:1: ValueError: {says}") for i, (row, says) in enumerate([
               ({"prompt_ids": None}, "prompt_ids must be 1 to 32 tokens"),
               ({"prompt_ids": [5] * 33}, "prompt_ids must be 1 to 32 tokens"),
               ({"response_ids": []}, "response_ids must be 1 to 40 tokens"),
               ({"response_ids": [1 << 40]}, "response_ids must be 1 to 40 tokens")])),
        ("messages", "dpo", flags(**dpo | {"data": file("m.jsonl", json.dumps(
            {"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}) + "\n")}), "m.jsonl:1"),
        ("label exists", "reward", ["label", *flags(model=f"{toy}/gold", data=dpo["data"],
                                                    out=dpo["data"])], "exists"),
        ("unknown task", "tasks", ["nonsense"], "no task nonsense"),
        ("task file", "tasks", ["file", "--file", file("t.jsonl", good + "}\n"),
                                "--out", f"{tmp_path}/t"], "t.jsonl:2"),
        ("task key", "tasks", ["file", "--file", file("u.jsonl", '{"prompt": "x"}\n'),
                               "--out", f"{tmp_path}/t"], "missing key 'chosen'"),
        ("no runs", "plots", [f"{tmp_path}/none"], "not a run folder"),
    ]


def test_bad_input_is_one_line_and_status_2(toy, tmp_path, capsys):
    for name, script, words, says in bad(tmp_path, toy):
        module = __import__(script)
        with pytest.raises(SystemExit) as stop:
            module.main(module.parse_args(words))
        err = capsys.readouterr().err.strip()
        assert stop.value.code == 2, name
        assert says in err, f"{name}: {err}"
        if name != "unknown task":  # argparse adds its usage
            assert len(err.splitlines()) == 1 and err.startswith("error: "), f"{name}: {err}"


def test_resume_needs_the_same_flags(toy, tmp_path, capsys):
    out = f"{tmp_path}/r"
    offline(toy, "dpo", out)
    shutil.rmtree(f"{out}/final")
    with pytest.raises(SystemExit):
        offline(toy, "dpo", out, resume=True, beta=0.7)
    assert "another beta (0.1, now 0.7)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        offline(toy, "ipo", out, resume=True)
    assert "another script (dpo.py, now ipo.py)" in capsys.readouterr().err


def test_resume_needs_the_same_data(toy, tmp_path, capsys):
    """A file of the same name with other rows: refused, with both checksums."""
    data, out = f"{tmp_path}/pairs.jsonl", f"{tmp_path}/r"
    lines = open(f"{toy}/data/golden.jsonl").readlines()
    with open(data, "w") as f:
        f.writelines(lines[:40])
    offline(toy, "dpo", out, data=data)
    shutil.rmtree(f"{out}/final")
    offline(toy, "dpo", out, data=data, resume=True)
    shutil.rmtree(f"{out}/final")
    with open(data, "w") as f:
        f.writelines(lines[:39])
    with pytest.raises(SystemExit) as stop:
        offline(toy, "dpo", out, data=data, resume=True)
    assert stop.value.code == 2
    assert re.search(r"another checksum of \S+ \(\d+, now \d+\)", capsys.readouterr().err)


def test_one_run_a_folder_at_a_time(toy, tmp_path):
    """While a run trains, a second one into its folder is refused, and the first goes on."""
    words = [f"{ROOT}/dpo.py", *flags(
        model=f"{toy}/sft", data=f"{toy}/data/golden.jsonl", out=f"{tmp_path}/r", resume=True,
        max_prompt_tokens=32, max_response_tokens=40, save_every=5, **SHORT | dict(steps=9999))]
    for name in "ab":
        (tmp_path / name).mkdir()
    first = Fork(tmp_path / "a", run_script, *words)
    while not os.path.exists(f"{tmp_path}/r/checkpoint.safetensors"):
        assert first.process.is_alive(), first.end()
    status, _, err = Fork(tmp_path / "b", run_script, *words).end()
    assert status == 2 and "another process is training into" in err
    assert first.process.is_alive()
    first.process.terminate()
    assert first.end()[0] == 128 + signal.SIGTERM


def test_flags_that_do_nothing_are_said(toy, tmp_path, capsys):
    offline(toy, "dpo", f"{tmp_path}/a", warmup=5, baseline=f"{toy}/baseline.jsonl")
    out = capsys.readouterr().out
    assert "--warmup 5 is longer than the run" in out
    assert "--baseline has no effect without --gold" in out
    offline(toy, "dpo", f"{tmp_path}/b", warmup=4)
    assert "--warmup" not in capsys.readouterr().out
