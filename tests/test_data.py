"""Tokenisation and order: BOS at most once, EOS exactly once, no row lost, ids never touched."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import dpo

WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefgh"]


def tokenizer(adds_bos=False, adds_eos=False, template=None, **special):
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos or adds_eos:
        single = ("<bos> " if adds_bos else "") + "$A" + (" <eos>" if adds_eos else "")
        core.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", **special}
    made = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    made.chat_template, made.chat_kwargs = template, {}
    return made


def limits(prompt=10, response=10, skip=False):
    """What `load_pairs` reads of a script's flags."""
    return SimpleNamespace(max_prompt_tokens=prompt, max_response_tokens=response,
                           skip_refused=skip)


def load(tmp_path, rows, tok, max_prompt=10, max_response=10):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return dpo.load_pairs(str(path), tok, limits(max_prompt, max_response))


def pair(prompt="a b", chosen="c d", rejected="e"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("special", [{}, {"pad_token": "<eos>"}])
def test_eos_once(tmp_path, special):
    pairs = load(tmp_path, [pair(), pair(chosen="c <eos>")], tokenizer(**special))
    assert pairs == [([4, 5], [6, 7, 1], [8, 1]), ([4, 5], [6, 1], [8, 1])]


def test_bos_once(tmp_path):
    rows = [pair(), pair(prompt="<bos> a")]
    for tok in (tokenizer(True, bos_token="<bos>"), tokenizer(True, True, bos_token="<bos>")):
        assert load(tmp_path, rows, tok) == [([2, 4, 5], [6, 7, 1], [8, 1]), ([2, 4], [6, 7, 1],
                                                                             [8, 1])]
    not_added = load(tmp_path, rows, tokenizer(bos_token="<bos>"))  # as GPT-2: has one, adds none
    assert [p for p, _, _ in not_added] == [[4, 5], [2, 4]]


def test_cut_left_and_right_and_said(tmp_path, capsys):
    rows = [pair(prompt="a b c d e"), pair(chosen="a b c d", rejected="a b")]
    pairs = load(tmp_path, rows, tokenizer(True, bos_token="<bos>"), max_prompt=3, max_response=3)
    assert pairs[0][0] == [2, 7, 8]  # BOS stays, the left goes
    assert pairs[1][1:] == ([4, 5, 6], [4, 5, 1])  # no EOS where it was cut
    assert "cut 1 prompts on the left and 1 responses on the right" in capsys.readouterr().out


def test_empty_prompt_has_something_to_predict_from(tmp_path):
    assert load(tmp_path, [pair(prompt="")], tokenizer())[0][0] == [1]


def test_messages_go_through_the_template(tmp_path, capsys):
    rows = [pair(prompt=[{"role": "user", "content": "b"}], chosen=[{"role": "assistant",
                                                                     "content": "c"}])]
    template = "{% for m in messages %}a {{ m['content'] }} {% endfor %}h"
    assert load(tmp_path, rows, tokenizer(template=template)) == [([4, 5, 11], [6, 1], [8, 1])]
    with pytest.raises(SystemExit):
        load(tmp_path, rows, tokenizer())
    err = capsys.readouterr().err
    assert all(word in err for word in ("pairs.jsonl:1: ", "chat_template is not set", "--text"))


def test_stream_ids_are_kept(tmp_path):
    row = {"step": 1, "prompt_ids": [9] * 9, "chosen_ids": [5, 1], "rejected_ids": [1]}
    assert load(tmp_path, [row], tokenizer()) == [([9] * 9, [5, 1], [1])]


def order(steps, rows, window=0, seed=0):
    batches = dpo.make_batches(steps, 4, rows, window, seed)
    assert [len(batch) for batch in batches] == [4] * steps
    return sum(batches, [])


def test_epochs_and_windows():
    """No row comes twice before all have come; none leaves its window, and all move within it."""
    flat = order(5, 10)
    first, second = flat[:10], flat[10:]
    assert sorted(first) == sorted(second) == list(range(10))
    assert list(range(10)) != first != second != list(range(10))
    assert order(2, 10) == flat[:8]  # a longer run begins as a shorter one
    assert max(abs(i - j) for i, j in enumerate(order(6, 24))) > 8  # over the whole file
    flat = order(9, 18, window=2)  # of 8, 8 and 2 rows, twice
    for at in (0, 8, 18, 26):
        rows = list(range(at % 18, at % 18 + 8))
        assert sorted(flat[at:at + 8]) == rows != flat[at:at + 8]
    assert sorted(flat[16:18]) == sorted(flat[34:]) == [16, 17] and flat[:18] != flat[18:]
    assert order(3, 10, window=1) == [*range(10), 0, 1]  # as they stand
    assert order(5, 10, window=3) == order(5, 10)  # a window that holds the file
    other = order(5, 10, seed=1)
    assert other[:10] not in (first, second) and other[10:] != second
