"""Families of models on the hub, each as a tiny random folder with a tokenizer of its shape:
SFT, a preference model, DPO, online IPO and its replay, two steps each."""

import json

import pytest
import torch
import transformers
from conftest import flags, rows_of, same_weights, train
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import reward

WORDS = "the fox and the owl sang by the river, so we all laughed; what did you say? nothing. "
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True)
FAMILIES = {  # name: (config, does its tokenizer add BOS, is padding EOS, does it need plain rows)
    "llama": (LLAMA, True, True, False),
    "qwen2": (LLAMA, False, False, False),
    "qwen3": (LLAMA | dict(head_dim=8), False, False, False),
    "smollm3": (LLAMA | dict(no_rope_layer_interval=2), False, True, False),
    "olmo2": (LLAMA, False, False, False),
    "phi3": (LLAMA, False, True, False),
    "mistral": (LLAMA | dict(sliding_window=12), True, True, False),
    "gemma2": (LLAMA | dict(head_dim=8, final_logit_softcapping=3.0), True, False, True),
    "gemma3_text": (LLAMA | dict(head_dim=8, sliding_window=12), True, False, False),
    "gpt2": (dict(n_embd=32, n_layer=2, n_head=4, n_positions=128), False, True, False),
    "gpt_neox": (dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, max_position_embeddings=128), False, True, False),
}
SHORT = dict(steps=2, batch_size=4, lr=1e-3, warmup=1)


def make_model(family, folder):
    """A random model and a byte-level tokenizer in `folder`."""
    config, adds_bos, pads_with_eos, *_ = FAMILIES[family]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<eos>", "<pad>", "<bos>", "<|end|>", "<|user|>", "<|assistant|>"]
    core.train_from_iterator([WORDS], trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", bos_token="<bos>" if adds_bos else None,
        pad_token="<eos>" if pads_with_eos else "<pad>", chat_template=TEMPLATE)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(
        family, **config, vocab_size=len(tokenizer) + 9, eos_token_id=0, initializer_range=0.2,
        bos_token_id=2 if adds_bos else None, pad_token_id=0 if pads_with_eos else 1))
    model.generation_config.eos_token_id = [0, 3]
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_through_every_stage(tmp_path, family, capsys):
    _, adds_bos, _, plain = FAMILIES[family]
    data, base = f"{tmp_path}/pairs.jsonl", f"{tmp_path}/base"
    make_model(family, base)
    with open(data, "w") as f:
        for i in range(24):
            prompt = [{"role": "user", "content": WORDS[i:i + 20 + i]}]
            f.write(json.dumps({"prompt": prompt, "chosen": WORDS[:5 + i],
                                "rejected": WORDS[i:9 + i]}) + "\n")

    train("sft", f"{tmp_path}/sft", model=base, data=data, **SHORT)
    assert ("using plain rows" in capsys.readouterr().out) == plain
    start = dict(model=f"{tmp_path}/sft", **SHORT)
    first = train("dpo", f"{tmp_path}/dpo", data=data, **start)[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)  # the policy is its reference
    capsys.readouterr()
    for kind in ("pairwise", "pointwise"):
        train_preferences(f"{tmp_path}/{kind}", data=data, kind=kind, **start)
        assert "using plain rows" not in capsys.readouterr().out  # a body has no head of its own
    train("online_rlhf", f"{tmp_path}/online", loss="ipo", prompts=data,
          labeller=f"{tmp_path}/pairwise", **start)
    stream = rows_of(f"{tmp_path}/online/stream.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for row in stream:
        assert row["prompt_ids"][0] == (2 if adds_bos else 4)  # BOS, or <|user|>
        for ids in (row["chosen_ids"], row["rejected_ids"]):
            assert max(ids) < len(tokenizer)  # the model's head is larger
            ends = [i for i, token in enumerate(ids) if token in (0, 3)]
            assert ends == [len(ids) - 1] if len(ids) < 40 else ends in ([], [39])
    train("ipo", f"{tmp_path}/replay", data=f"{tmp_path}/online/stream.jsonl", shuffle_window=1,
          **start)
    assert same_weights(f"{tmp_path}/replay", f"{tmp_path}/online")


def train_preferences(out, **kwargs):
    reward.main(reward.parse_args(["train", *flags(
        out=out, max_prompt_tokens=32, max_response_tokens=40, eval_every=1, **kwargs)]))
