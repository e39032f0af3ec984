"""What people bring: models, preference models and judges. Right, or one line that says why not."""

import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ARGS, ROOT, load_model, random_pairs, rows_of, tiny, train
from safetensors.torch import load_file, save_file
from test_data import load, pair, tokenizer
from test_families import make_model, train_preferences
from transformers import AutoModelForSequenceClassification

import dpo
import reward


def refused(capsys, call, *args):
    """The one line on stderr of a call that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call(*args)
    line, = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith("error: ")
    return line


def folder(path, model):
    """A model and a tokenizer of its first ids, saved."""
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


# ---- models --------------------------------------------------------------------------------------


def change(path, how):
    """Change a folder's weights: a function of {name: tensor}."""
    file = f"{path}/model.safetensors"
    save_file(how(load_file(file)), file, {"format": "pt"})


def named(path, name, text):
    with open(f"{path}/{name}", "w") as f:
        f.write(text)


def without(word):
    return lambda path: change(path, lambda w: {k: v for k, v in w.items() if word not in k})


def prefixed(prefix):
    return lambda path: change(path, lambda w: {prefix + k: v for k, v in w.items()})


def quantised(path):
    config = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(path)


def stripped(path):
    """Int8 weights and their scales, without the config that says so: transformers casts them."""
    change(path, lambda w: {k: v.mul(40).to(torch.int8) if "up_proj" in k else v
                            for k, v in w.items()} | {
        k + "_scale": torch.ones(1) for k in w if "up_proj" in k})


def pickled(path):
    os.rename(f"{path}/model.safetensors", f"{path}/pytorch_model.bin")


def narrowed(path):
    change(path, lambda w: {k: v[:-1].clone() if "up_proj" in k else v for k, v in w.items()})


def adapter(path):
    os.remove(f"{path}/model.safetensors")
    named(path, "adapter_config.json", "{}")


@pytest.mark.parametrize("spoil, says", [
    (prefixed("module."), "21 weights are not there"), (prefixed("_orig_mod."), "21 weights"),
    (prefixed("base_model.model."), "as module. or base_model.model."),
    (without("layers.1."), "9 weights"), (without("lm_head"), "['lm_head.weight']"),
    (narrowed, "2 weights"), (quantised, "quantised"), (stripped, "it is quantised"),
    (adapter, "merge an adapter first"),
    (pickled, "a .bin, which can run code"),
    (lambda path: named(path, "model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
     "an LFS pointer"),
    (lambda path: os.remove(f"{path}/model.safetensors"), "no file named model.safetensors"),
    (lambda path: os.remove(f"{path}/tokenizer.json"), "and tokenizer files"),
])
def test_a_checkpoint_that_does_not_fit(tmp_path, capsys, spoil, says):
    path = folder(tmp_path, tiny())
    load_model(path)
    spoil(path)
    assert says in refused(capsys, load_model, path)


def test_a_tied_head_and_shards_are_not_missing(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **tiny().config.to_dict() | {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    tokenizer().save_pretrained(tmp_path)
    found = load_model(tmp_path)[0].state_dict()
    assert all(torch.equal(found[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["runs/toy/nowhere", "./nowhere", "tests/nowhere", "/nowhere"])
def test_a_mistyped_path_is_said_at_once(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(dpo, "AutoTokenizer", None)  # nothing is asked for
    assert refused(capsys, load_model, name) == f"error: {name}: no such folder"


def test_what_may_be_of_the_hub_is_asked_there(capsys):
    with pytest.raises(SystemExit):
        load_model("nobody/nothing")  # offline
    assert capsys.readouterr().out == "nobody/nothing: no such folder; asking the hub\n"


def test_a_cause_is_told_whole(tmp_path, capsys):
    """transformers' sentence on a folder without tokenizer is longer than 200 characters."""
    tiny().save_pretrained(tmp_path)
    assert "to convert a slow tokenizer to a fast one" in refused(capsys, load_model, tmp_path)


def both_ways(kind):
    """BERT as it is on the hub, and Gemma 3 as EmbeddingGemma has it."""
    torch.manual_seed(0)
    small = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, pad_token_id=0)
    config = transformers.BertConfig(**small, is_decoder=kind == "decoder")
    if kind == "gemma":
        config = transformers.Gemma3TextConfig(**small, num_key_value_heads=2, head_dim=8,
                                               use_bidirectional_attention=True)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["bert", "gemma"])
def test_models_that_read_both_ways_are_refused(tmp_path, capsys, kind):
    path = folder(tmp_path, both_ways(kind))
    assert "its tokens see later ones" in refused(capsys, load_model, path)
    line = refused(capsys, reward.load_preference_model, path, ARGS, "pairwise")
    assert "its tokens see later ones" in line


def test_bert_as_a_decoder_is_causal(tmp_path):
    load_model(folder(tmp_path, both_ways("decoder")))


def test_spare_tokens_are_fine_and_a_row_that_has_one_is_not(tmp_path, capsys):
    tok = tokenizer()
    tok.add_tokens([f"new{i}" for i in range(60)])  # 72 of them, 50 are embedded
    tiny().save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    tok = load_model(tmp_path)[1]
    assert len(tok) == 72 and tok.known == 50
    assert load(tmp_path, [pair(), pair(chosen="new37")], tok)[1][1] == [49, 1]
    line = refused(capsys, load, tmp_path, [pair(), pair(chosen="new38")], tok)
    assert "pairs.jsonl: pair 2 has a token that the model does not embed" in line
    row = {"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [50]}
    assert "pair 1 has a token" in refused(capsys, load, tmp_path, [row], tok)


# ---- preference models ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_folders_of_the_older_form_give_the_same_margins(tmp_path, kind):
    """transformers' own class, which older versions of reward.py saved."""
    config = transformers.LlamaConfig(**tiny().config.to_dict(), num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.config.preference_kind = kind
    path, pairs = folder(tmp_path, model), random_pairs(20)
    found, _ = reward.load_preference_model(path, ARGS)
    truth = reward.prefer(model, pairs)
    assert truth.abs().min() > 0 and torch.equal(reward.prefer(found, pairs), truth)
    reward.save_model(f"{path}/again", found, tokenizer())
    again = AutoModelForSequenceClassification.from_pretrained(f"{path}/again").eval()
    assert torch.equal(reward.prefer(again, pairs), truth)  # and transformers loads ours


def test_a_preference_model_without_its_score(tmp_path, capsys):
    path = folder(tmp_path, tiny())
    assert "not a preference model" in refused(capsys, reward.load_preference_model, path, ARGS)
    model, tok = reward.load_preference_model(path, ARGS, "pairwise")
    assert not model.score.weight.any() and not any("lm_head" in k for k in model.state_dict())
    reward.save_model(f"{path}/saved", model, tok)
    reward.load_preference_model(f"{path}/saved", ARGS)
    without("score")(f"{path}/saved")
    line = refused(capsys, reward.load_preference_model, f"{path}/saved", ARGS)
    assert "['score.weight']" in line


def test_a_classifier_of_two_labels(tmp_path, capsys):
    """A body to start from, but no preference model."""
    path = folder(tmp_path, AutoModelForSequenceClassification.from_config(
        transformers.LlamaConfig(**tiny().config.to_dict(), num_labels=2)))
    assert "not a preference model" in refused(capsys, reward.load_preference_model, path, ARGS)
    model, _ = reward.load_preference_model(path, ARGS, "pairwise")
    assert model.score.weight.shape == (1, 32) and not model.score.weight.any()


@pytest.mark.parametrize("family", ["granite", "olmoe"])
def test_a_family_without_sequence_classifier(tmp_path, monkeypatch, family):
    """Trained, it labels an online run; checkpointed layers are found; what is saved loads."""
    import test_families

    monkeypatch.setitem(test_families.FAMILIES, family, (test_families.LLAMA, False, False, False))
    base, data = f"{tmp_path}/base", f"{tmp_path}/pairs.jsonl"
    make_model(family, base)
    config = transformers.AutoConfig.from_pretrained(base)
    assert type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    with open(data, "w") as f:
        for i in range(24):
            f.write(json.dumps(pair("the fox" * (1 + i % 3), "sang" * (2 + i % 5), "river")) + "\n")
    short = dict(model=base, steps=2, batch_size=4, lr=1e-3, warmup=1)
    train_preferences(f"{tmp_path}/gold", data=data, checkpoint_activations=True, **short)
    assert reward.load_preference_model(f"{tmp_path}/gold", ARGS)[0].score.weight.any()
    train("online_rlhf", f"{tmp_path}/run", prompts=data, labeller=f"{tmp_path}/gold", **short)
    assert all(row["margin"] > 0 for row in rows_of(f"{tmp_path}/run/stream.jsonl")
               if row["chosen_ids"] != row["rejected_ids"])


def test_a_head_that_is_no_plain_matrix_is_left_out(tmp_path, capsys):
    """BERT's has a bias of its own, Electra's reads another width: used, and refused."""
    path, pairs = folder(tmp_path / "bert", both_ways("decoder")), random_pairs(5)
    model, tok = reward.load_preference_model(path, ARGS, "pointwise")
    torch.nn.init.normal_(model.score.weight)
    reward.save_model(f"{path}/saved", model, tok)
    again, _ = reward.load_preference_model(f"{path}/saved", ARGS)
    assert reward.prefer(model, pairs).any()
    assert torch.equal(reward.prefer(again, pairs), reward.prefer(model, pairs))
    electra = transformers.ElectraForCausalLM(transformers.ElectraConfig(
        vocab_size=50, hidden_size=32, embedding_size=16, num_hidden_layers=2, is_decoder=True,
        num_attention_heads=4, intermediate_size=48, pad_token_id=0))
    path = folder(tmp_path / "electra", electra)
    assert "cannot be multiplied" in refused(
        capsys, reward.load_preference_model, path, ARGS, "pointwise")


def test_a_margin_that_is_no_number_names_its_pair(tmp_path, capsys):
    model, _ = reward.load_preference_model(folder(tmp_path, tiny()), ARGS, "pointwise")
    model.get_input_embeddings().weight.data[7] = math.nan
    pairs = [([3], [4, 1], [5, 1]), ([3], [7, 1], [6, 1])]
    line = refused(capsys, reward.prefer, model, pairs)
    assert "margin is nan for (prompt, first, second) = ([3], [7, 1], [6, 1])" in line


@pytest.mark.parametrize("kind", ["pairwise", "pointwise"])
def test_ties_count_half_and_disagree_with_nobody(kind):
    """Of four pairs one is right, one wrong, one a tie of unlike responses, one of equal ones."""
    odds = {4: 2.0, 5: -2.0, 6: 0.0}
    found = reward.assess(
        SimpleNamespace(config=SimpleNamespace(preference_kind=kind)),
        [([2], [4], [3]), ([2], [5], [3]), ([2], [6], [3]), ([2], [7], [7])], 100,
        lambda model, pairs: torch.tensor([odds[a[0]] if a[0] in odds else -odds[b[0]]
                                           if b[0] in odds else 0.7 for _, a, b in pairs])
        if kind == "pairwise" else torch.tensor([odds.get(a[0], 0.0) for _, a, b in pairs]))
    assert found["accuracy"] == 0.5 and found["order_disagreement"] == 0


# ---- a judge of one's own ------------------------------------------------------------------------


def judge(path, text):
    path.write_text(text)
    return str(path)


def readme_judges():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    rule, hub = (block for block in blocks if "def prefer(" in block)
    assert max(rule.count("\n"), hub.count("\n")) <= 16
    return rule, hub


def test_a_rule_labels_and_judges(toy, tmp_path):
    """README's: on-policy, in evaluation, in gold_eval.py; the shorter sample is always chosen."""
    import gold_eval

    rule = judge(tmp_path / "shorter.py", readme_judges()[0])
    found = train("online_rlhf", f"{tmp_path}/run", prompts=f"{toy}/data/golden.jsonl", steps=2,
                  model=f"{toy}/sft", batch_size=8, labeller=rule, gold=rule, eval_every=1,
                  baseline=f"{toy}/baseline.jsonl")
    _, tok = load_model(f"{toy}/sft")

    def words(ids):
        return len(tok.decode(ids, skip_special_tokens=True).split())

    stream = rows_of(f"{tmp_path}/run/stream.jsonl")
    assert all(words(r["rejected_ids"]) - words(r["chosen_ids"]) == r["margin"] for r in stream)
    assert len(stream) == 16 and any(r["margin"] > 0 for r in stream)
    sample = rows_of(f"{tmp_path}/run/samples.jsonl")[0]
    assert sample["gold_margin"] == (
        len(sample["baseline"].split()) - len(sample["response"].split()))
    assert 0 < found[-1]["gold/win_rate"] < 1
    common = ["--gold", rule, "--max-prompt-tokens", "32", "--max-response-tokens", "40"]
    for words in (["judge", "--model", f"{tmp_path}/run", "--reference", f"{toy}/sft", "--data",
                   f"{toy}/data/golden.jsonl", "--baseline", f"{toy}/baseline.jsonl"],
                  ["sample", "--model", f"{tmp_path}/run", "--other", f"{toy}/sft", "--data",
                   f"{toy}/data/golden.jsonl", "--prompts", "8"],
                  ["classify", "--model", f"{tmp_path}/run", "--reference", f"{toy}/sft", "--data",
                   f"{tmp_path}/run/stream.jsonl"]):
        out = f"{tmp_path}/{words[0]}.jsonl"
        gold_eval.main(gold_eval.parse_args([*words, *common, "--out", out]))
        assert rows_of(out)
    assert all(row["accuracy_labeller" if "accuracy_labeller" in row else "gold/accuracy_labeller"]
               >= 0.5 for row in rows_of(f"{tmp_path}/classify.jsonl"))


def test_a_reward_model_of_the_hub(toy, tmp_path):
    """README's, on a tiny random classifier with a tokenizer and a template of its own."""
    make_model("llama", f"{tmp_path}/rm")
    AutoModelForSequenceClassification.from_pretrained(
        f"{tmp_path}/rm", num_labels=1).save_pretrained(f"{tmp_path}/rm")
    text = re.sub(r'^NAME = .*$', f'NAME = "{tmp_path}/rm"', readme_judges()[1], flags=re.M)
    path = judge(tmp_path / "hub.py", text)
    _, tok = load_model(f"{toy}/sft")
    labeller, ask = reward.load_labeller(path, tok, ARGS), tok.encode
    pairs = [(ask("two sad lines about a fox:"), ask("the fox wept."), ask("the owl sang.") + [1]),
             (ask("two sad lines"), ask("the owl sang."), ask("the fox wept.")),
             (ask("two sad lines"), ask("the owl."), ask("the owl."))]
    found = reward.prefer(labeller, pairs)
    assert found[:2].abs().min() > 0 and found[2] == 0
    assert torch.allclose(reward.prefer(labeller, reward.swap(pairs)), -found)


@pytest.mark.parametrize("text, says", [
    ("def prefer(:", "SyntaxError"), ("x = 1", "AttributeError"), ("import nowhere", "nowhere"),
    ("def prefer(prompts, first, second):\n    return [1.0]", "shape"),
    ("def prefer(prompts, first, second):\n    return 1 / 0", "ZeroDivisionError"),
    ("def prefer(prompts, first, second):\n    return ['a', 'b']", "prefer() of 2 pairs"),
    ("def prefer(prompts, first, second):\n    return [1, float('inf')]", "margin is inf for"),
])
def test_a_judge_that_fails_is_one_line(tmp_path, capsys, text, says):
    path = judge(tmp_path / "judge.py", text)
    pairs = [([4], [5], [6]), ([4], [6], [7])]
    line = refused(capsys, lambda: reward.prefer(
        reward.load_labeller(path, tokenizer(), ARGS), pairs))
    assert says in line and ("judge.py" in line or "margin" in says)


def test_each_of_several_processes_asks_for_its_share(tmp_path, monkeypatch):
    """What they find adds up to what one finds; one without a pair asks nothing."""
    path = judge(tmp_path / "judge.py", "def prefer(prompts, first, second):\n"
                 "    assert prompts\n    return [1.5 if x == 'c' else -2 for x in first]")
    labeller, found = reward.load_labeller(path, tokenizer(), ARGS), []
    pairs = [([4], [6], [5]), ([4], [5], [6]), ([4], [6], [7])]
    whole = reward.prefer(labeller, pairs)
    monkeypatch.setattr(reward, "RANKS", 4)
    monkeypatch.setattr(reward, "pooled", lambda x: x)
    for rank in range(4):
        monkeypatch.setattr(reward, "RANK", rank)
        found.append(reward.prefer(labeller, pairs))
    assert sum(found).tolist() == whole.tolist() == [1.5, -2, 1.5] and not found[3].any()


def test_no_judge_there(tmp_path, capsys):
    line = refused(capsys, reward.load_labeller, f"{tmp_path}/no.py", tokenizer(), ARGS)
    assert "cannot use" in line and "no.py" in line
