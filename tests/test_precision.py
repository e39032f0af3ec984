"""--precision: decided once and said, kept by --resume; in bf16 the exact things stay exact."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import rows_of, same_weights, weights_of
from test_scripts import offline, online, timeless

import dpo
import ipo
import online_rlhf
import reward


@pytest.fixture(autouse=True)
def keep_precision():
    """autocast is of the module: what a test switches on must not reach the next."""
    yield
    for module in (dpo, ipo, online_rlhf, reward):
        module.autocast.keywords["enabled"] = torch.cuda.is_available()


def decided(monkeypatch, width, seconds, precision="auto"):
    """What a model of this width gets where its products take so long (fp32, bf16)."""
    took = iter(seconds)
    monkeypatch.setattr(dpo.timeit, "repeat", lambda work, **_: work() is None or [next(took), 9.0])
    config = SimpleNamespace(hidden_size=width)
    args = SimpleNamespace(precision=precision)
    dpo.choose_precision(SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: config)), args)
    assert dpo.autocast.keywords["enabled"] == (args.precision == "bf16")
    return args.precision


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU")
def test_auto_is_bf16_where_it_is_measured_to_be_faster(monkeypatch, capsys):
    assert decided(monkeypatch, 576, [3.0, 1.0]) == "bf16"
    assert "1/3.0 of the time of fp32 here: --precision bf16" in capsys.readouterr().out
    assert decided(monkeypatch, 576, [1.4, 1.0]) == "fp32"
    assert "--precision fp32" in capsys.readouterr().out
    assert decided(monkeypatch, 128, []) == "fp32"  # a small model: nothing is measured or said
    assert decided(monkeypatch, 128, [], "bf16") == "bf16"
    assert decided(monkeypatch, 4096, [], "fp32") == "fp32" and not capsys.readouterr().out


def test_a_run_in_bf16_starts_at_zero_and_goes_on_in_it(toy, tmp_path, capsys):
    """Reward 0 at the first step, other weights than in fp32; killed and resumed, the same bits,
    though --resume says nothing of the precision."""
    rows = offline(toy, "dpo", f"{tmp_path}/bf16", precision="bf16", steps=4)
    assert rows[0]["rewards/margins"] == 0 and rows[0]["rewards/accuracies"] == 0
    offline(toy, "dpo", f"{tmp_path}/fp32", steps=4)
    assert not same_weights(f"{tmp_path}/bf16", f"{tmp_path}/fp32")
    assert {w.dtype for w in weights_of(f"{tmp_path}/bf16").values()} == {torch.float32}
    out, step = f"{tmp_path}/killed", dpo.optimizer_step
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(dpo, "optimizer_step", lambda *args: (
            1 / 0 if "step 3," in args[-1] else step(*args)))
        offline(toy, "dpo", out, precision="bf16", steps=4, save_every=2)
    with pytest.raises(SystemExit):
        offline(toy, "dpo", out, precision="fp32", steps=4, save_every=2, resume=True)
    assert "precision (bf16, now fp32)" in capsys.readouterr().err
    offline(toy, "dpo", out, steps=4, save_every=2, resume=True)
    assert same_weights(out, f"{tmp_path}/bf16")
    assert timeless(rows_of(f"{out}/metrics.jsonl")) == timeless(rows)


def test_args_hold_what_auto_decided(toy, tmp_path):
    offline(toy, "ipo", f"{tmp_path}/r", steps=1)
    with open(f"{tmp_path}/r/args.json") as f:
        assert json.load(f)["precision"] == ("bf16" if torch.cuda.is_available() else "fp32")


def test_args_are_written_whole_and_by_the_first_process(toy, tmp_path, monkeypatch):
    """Where they could not be written, the run begins anew without --resume."""
    with monkeypatch.context() as m:
        m.setattr(ipo.json, "dump", lambda given, f: f.write("{") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            offline(toy, "ipo", f"{tmp_path}/r", steps=1)
    assert not (tmp_path / "r/args.json").exists()
    offline(toy, "ipo", f"{tmp_path}/r", steps=1)
    (args,) = rows_of(f"{tmp_path}/r/args.json")
    assert args["script"] == "ipo.py" and args["steps"] == 1 and "torch" in args
    monkeypatch.setattr(ipo, "RANK", 1)
    model = torch.nn.Linear(1, 1)
    steps = ipo.training_steps(SimpleNamespace(out=f"{tmp_path}/none", precision="fp32", steps=1),
                               model, torch.optim.AdamW(model.parameters()))
    assert next(steps)[0] == 1 and not (tmp_path / "none").exists()


def test_a_stream_of_bf16_is_replayed_to_the_bit(toy, tmp_path):
    """Sampler, labeller, reference and policy in bf16; and the first reward is 0 online too."""
    rows = online(toy, f"{tmp_path}/online", precision="bf16")
    assert rows[0]["rewards/margins"] == 0 and reward.autocast.keywords["enabled"]
    offline(toy, "ipo", f"{tmp_path}/replay", data=f"{tmp_path}/online/stream.jsonl",
            shuffle_window=1, precision="bf16")
    assert same_weights(f"{tmp_path}/online", f"{tmp_path}/replay")
