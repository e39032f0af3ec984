"""Chat templates and shapes that people bring: what is trained on is what is sampled, and text
comes back as it was; or one line says why not. The templates are ours, with the traits of real
ones."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from conftest import ARGS, ROOT, Fork, flags, rows_of, script
from test_data import limits, load, pair
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dpo
import gold_eval
import tasks

SPECIAL = ["<eos>", "<pad>", "<|user|>", "<|bot|>", "<|end|>", "<|turn|>", "<|final|>"]
USER = [{"role": "user", "content": "What is two?"}]
HEAD = ("{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}<|end|>"
        "{% elif m['role'] == 'assistant' %}")  # a role that is neither is dropped
TAIL = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>"


def template(answer="<|bot|>{{ m['content'] }}<|end|>\n", opening=""):
    """A template that writes `answer` for an assistant's turn, and `opening` to sample one."""
    return HEAD + answer + TAIL + opening + "{% endif %}"


def byte_tokenizer(chat_template=None, more=(), **special):
    """Byte-level, one token a byte: its text comes back exactly."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    core.add_tokens(list(more))  # in the vocabulary, but not special
    return dressed(core, chat_template)


def dressed(core, chat_template):
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>",
                                   clean_up_tokenization_spaces=False)
    made.chat_template, made.chat_kwargs = chat_template, {}
    return made


def sentencepiece(chat_template=None, metaspace=False):
    """As Llama 2's: a space before every text, bytes for what has no piece."""
    pieces = ["<eos>", "<pad>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁",
              *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:?[]/|"]
    merges = [("▁", x) for x in "abHIA"]
    pieces += [a + b for a, b in merges]
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(pieces)}, merges, byte_fallback=True,
                                unk_token="<unk>", fuse_unk=True))
    if metaspace:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    core.add_special_tokens(["<eos>", "<pad>"])
    return dressed(core, chat_template)


def texts(tmp_path, tok, *rows, long=400):
    """[(prompt, chosen, rejected)] as they come back from their ids."""
    return [tuple(map(tok.decode, ids)) for ids in load(tmp_path, rows, tok, long, long)]


def refused(tmp_path, capsys, tok, row, **kwargs):
    """The one line that says why."""
    with pytest.raises(SystemExit) as stop:
        load(tmp_path, [pair(), row], tok, 400, 400, **kwargs)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and len(err.strip().splitlines()) == 1 and "pairs.jsonl:2" in err
    return err


# ---- what is trained on is what is sampled -------------------------------------------------------


def test_thinking_is_off_unless_asked_for(tmp_path):
    """As Qwen3: an empty thought before every answer, in the generation prompt if it is off."""
    hybrid = template("<|bot|><think></think>{{ m['content'] }}<|end|>",
                      "{% if enable_thinking is defined and not enable_thinking %}"
                      "<think></think>{% endif %}")
    tok = byte_tokenizer(hybrid)
    row = pair(USER, "2.", "3.")
    assert texts(tmp_path, tok, row) == [("<|user|>What is two?<|end|><|bot|><think></think>",
                                          "2.<|end|>", "3.<|end|>")]
    tok.chat_kwargs = {"enable_thinking": True}  # then the response begins with it
    assert texts(tmp_path, tok, row)[0][:2] == ("<|user|>What is two?<|end|><|bot|>",
                                                "<think></think>2.<|end|>")
    other = byte_tokenizer(template(opening="{% if thinking %}<think>{% endif %}"))
    assert texts(tmp_path, other, row)[0][0].endswith("<|bot|>")


def test_thoughts_in_an_answer_stand_as_the_template_writes_them(tmp_path):
    parsed = template("<|bot|>{% set parts = m['content'].split('</think>') %}<think>"
                      "{{ parts[0].replace('<think>', '') if parts|length > 1 else '' }}</think>"
                      "{{ parts[-1] }}<|end|>")
    row = pair(USER, "<think>1+1</think>2.", "3.")
    assert texts(tmp_path, byte_tokenizer(parsed), row)[0][1:] == (
        "<think>1+1</think>2.<|end|>", "<think></think>3.<|end|>")


@pytest.mark.parametrize("answer, opening, response", [
    ("<|bot|><|final|>{{ m['content'] }}<|end|>", "", "<|final|>2.<|end|>"),  # a channel's header
    ("<|bot|>all\n{{ m['content'] }}<|end|>", "", "all\n2.<|end|>"),
    ("<|bot|> {{ m['content'] }}<eos>", "", " 2.<eos>"),
    ("<|bot|>think\n</t>{{ m['content'] }}<|end|>", "think\n", "</t>2.<|end|>"),
    ("<|bot|>{{ m['content'] | trim }}<|end|>\n", "", "2.<|end|>"),
    ("<|bot|>{{ m['content'] }}<|final|><|turn|>", "", "2.<|final|><|turn|>"),  # two ends
    ("<|bot|>{{ m['content'] }}<|end|>\n<eos>", "", "2.<|end|>\n<eos>"),
    ("<|bot|>{{ m['content'] }}<|end|><eos><|user|><|final|>", "", "2.<|end|><eos>"),
    ("<|bot|>{{ m['content'] }}\n<|end|>\n<|end|>", "", "2.\n<|end|>"),  # sampling stops there
    ("<|bot|>{{ m['content'] }}", "", "2.<eos>"),  # the template writes none
])
def test_what_opens_and_ends_an_answer_belongs_to_it(tmp_path, capsys, answer, opening, response):
    tok = byte_tokenizer(template(answer, opening))
    (prompt, chosen, _), = texts(tmp_path, tok, pair(USER, "2.", "3."))
    assert chosen == response and prompt == "<|user|>What is two?<|end|><|bot|>" + opening
    assert "differ" not in capsys.readouterr().out
    ends = gold_eval.turn_end(tok)[2]
    ids = load(tmp_path, [pair(USER, "2.", "3.")], tok, 400, 400)[0][1]
    assert ids[-1] == ends and ids.index(ends) == len(ids) - 1  # sampling stops where it ends


@pytest.mark.parametrize("answer, opening, ours, theirs", [
    ("<|bot|>{{ m['content'] }}<|end|>", "<think>\n", "<think>\\n2.<", "2.<|end|>"),
    ("<|bot|>{{ m['content'].split('</think>')[-1] }}<|end|>", "", None, None),
    ("<|bot|>{{ m['content'] }}\n### Stop\n", "", "''", "\\n### Stop\\n"),
])
def test_where_they_part_is_said_once_a_file(tmp_path, capsys, answer, opening, ours, theirs):
    tok = byte_tokenizer(template(answer, opening))
    content = "2." if ours else "<think>1+1</think>2."
    found = texts(tmp_path, tok, *[pair(USER, content, content + "!")] * 3)
    out = capsys.readouterr().out
    assert found[0][1].startswith(content)  # nothing of the answer is lost
    assert out.count("whole conversation '") == 1 and "6 differ from the template" in out
    if ours:
        assert ours in out and theirs in out
    assert len(out.splitlines()[0]) < 200


def test_an_answer_within_a_thought_is_counted(tmp_path, capsys):
    """As Nemotron Nano v2: prompt and whole both open a thought, so that they do not differ."""
    opened = template("<|bot|><think>\n{{ m['content'] }}<|end|>", "<think>\n")
    assert texts(tmp_path, byte_tokenizer(opened), pair(USER, "2.", "3."))[0][1] == "2.<|end|>"
    assert "2 stand inside a thought" in capsys.readouterr().out
    texts(tmp_path, byte_tokenizer(opened), pair(USER, "1+1</think>2.", "</think>3."))
    assert "inside a thought" not in capsys.readouterr().out


def test_a_header_that_is_written_unasked_is_no_end(tmp_path):
    """As some of Command A's, on a tokenizer with another EOS."""
    always = HEAD + "{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}<|bot|>assistant\n"
    assert dpo.turn_end(byte_tokenizer(always))[1:3] == ("<|end|>", byte_tokenizer(
        always).convert_tokens_to_ids("<|end|>"))


def test_a_prompt_that_has_more_than_the_whole_is_kept(tmp_path, capsys):
    """As Gemma 4: an empty thought in the generation prompt alone."""
    tok = byte_tokenizer(template(opening="<|final|>"))
    assert texts(tmp_path, tok, pair(USER, "2.", "3."))[0] == (
        "<|user|>What is two?<|end|><|bot|><|final|>", "2.<|end|>", "3.<|end|>")
    assert ("after 'end|><|bot|>' what is sampled has '<|final|>2.<', the template's whole "
            "conversation '2.<|end|>\\n'") in capsys.readouterr().out


@pytest.mark.parametrize("form, day", [
    ("%d %b %Y", "26 Jul 2024"), ("%Y-%m-%d", "2024-07-26"), ("%B %d, %Y", "July 26, 2024"),
    ("%A, %d %B %Y", "Friday, 26 July 2024"), ("%H:%M", "00:00"), ("%F", "2024-07-26")])
def test_the_date_has_the_format_that_the_template_asks_for(form, day):
    tok = byte_tokenizer("{{ strftime_now('" + form + "') }}|{{ messages[0]['content'] }}")
    assert dpo.chat_text(tok, USER) == f"{day}|What is two?"
    tok = byte_tokenizer("{% set d = strftime_now('%Y-%m-%d').split('-') %}{{ d[1] }}"
                         "{{ messages[0]['content'] }}")
    assert dpo.chat_text(tok, USER) == "07What is two?"


def test_chat_kwargs_by_the_command_line(toy, tmp_path, capsys):
    """Every script that reads pairs has the flag; it reaches the template and args.json."""
    folder = tmp_path / "model"
    shutil.copytree(f"{toy}/sft/final", folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{{ mood | default('sad') }} ")
    data = tmp_path / "p.jsonl"
    data.write_text(json.dumps(pair([{"role": "user", "content": "write two"}], "fox.", "bear."))
                    + "\n")
    words = dict(model=folder, data=data, out=tmp_path / "r", steps=1, batch_size=1,
                 max_prompt_tokens=32, max_response_tokens=40)
    Fork(tmp_path, script, f"{ROOT}/dpo.py", *flags(
        **words, chat_kwargs='{"mood": "happy"}')).succeed()
    assert '{\\"mood\\"' in (tmp_path / "r/args.json").read_text()
    seen = {}
    for kwargs in ("{}", '{"mood": "happy"}'):
        out = tmp_path / f"{len(seen)}.jsonl"
        gold_eval.main(gold_eval.parse_args(["sample", *flags(
            model=folder, data=data, out=out, chat_kwargs=kwargs, max_prompt_tokens=32,
            max_response_tokens=4)]))
        seen[kwargs] = rows_of(out)[0]["prompt"].split()
    assert [x[-1] for x in seen.values()] == ["sad", "happy"]
    for wrong in ("[1]", "happy", '"a"', "1", "{", "null"):
        with pytest.raises(SystemExit) as stop:
            gold_eval.main(gold_eval.parse_args(["sample", *flags(
                model=folder, data=data, out=tmp_path / "no", chat_kwargs=wrong,
                max_prompt_tokens=32, max_response_tokens=4)]))
        err = capsys.readouterr().err
        assert stop.value.code == 2 and f"--chat-kwargs {wrong}" in err and err.count("\n") == 1


def test_mistral_common_is_named(monkeypatch, capsys):
    """Its tokenizer knows neither the model's chat template nor which tokens are special."""
    class MistralCommonBackend:
        pass

    monkeypatch.setattr(dpo, "AutoTokenizer", SimpleNamespace(
        from_pretrained=lambda *args, **kwargs: MistralCommonBackend()))
    kind = SimpleNamespace(from_pretrained=lambda *args, **kwargs: (None, {}))
    with pytest.raises(SystemExit):
        dpo.load_model(kind, "m", ARGS)
    err = capsys.readouterr().err
    assert "mistral-common hides its chat template" in err and err.count("\n") == 1


# ---- what ends a turn ----------------------------------------------------------------------------


def test_only_a_special_token_ends_a_turn(tmp_path):
    """As Gemma's tokenizer with a template of one's own: newlines are added, but not special."""
    tok = byte_tokenizer(template("<|bot|>{{ m['content'] }}\n"), more=[AddedToken("\n")])
    assert "\n" in tok.get_added_vocab()
    assert gold_eval.turn_end(tok)[2] == tok.eos_token_id
    assert texts(tmp_path, tok, pair(USER, "a\nb\n", "c"))[0][1:] == ("a\nb\n<eos>", "c<eos>")


def test_response_text_is_never_deleted_but_for_its_end(tmp_path, capsys):
    tok = byte_tokenizer(template())
    row = pair(USER, "a<eos>b<|end|>c<|end|>", "x<eos>")
    assert texts(tmp_path, tok, row, pair("p", "a<eos>b<eos>", "c")) == [
        ("<|user|>What is two?<|end|><|bot|>", "a<eos>b<|end|>c<|end|>", "x<|end|>"),
        ("p", "a<eos>b<eos>", "c<eos>")]
    assert "2 hold the text of special tokens" in capsys.readouterr().out
    texts(tmp_path, tok, pair(USER, "a", "b"))
    assert "special" not in capsys.readouterr().out
    texts(tmp_path, tok, pair([{"role": "user", "content": "say <|end|>"}], "a", "b"))
    assert "1 hold the text of special tokens" in capsys.readouterr().out


# ---- text comes back -----------------------------------------------------------------------------

LINES = ["Hello", " Hello", "  Hi", "", "\nHi", "\n", "a b", "É|x", " ", "[a]"]


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("prompt", ["A: b", "A:\n", "A: ", "b[/A]", ""])
def test_sentencepiece_puts_no_space_before_a_response(tmp_path, metaspace, prompt):
    tok = sentencepiece(metaspace=metaspace)
    assert tok.decode(tok("a").input_ids + tok("b").input_ids) == "a b"  # tokenised apart
    for line, ids in zip(LINES, load(tmp_path, [pair(prompt, x, "b") for x in LINES], tok, 99, 99),
                         strict=True):
        if prompt or not line.startswith(" "):  # of a whole text one leading space is stripped
            assert tok.decode(ids[0] + ids[1][:-1], skip_special_tokens=True) == prompt + line


def test_sentencepiece_with_a_template(tmp_path):
    """As Llama 2: the answer follows [/INST] and a space, which the generation prompt lacks."""
    tok = sentencepiece("{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
                        "{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} <eos>{% endif %}"
                        "{% endfor %}")
    prompt, chosen, _ = load(tmp_path, [pair(USER, "Hello", "b")], tok, 99, 99)[0]
    assert tok.decode(prompt + chosen) == "[INST] What is two? [/INST] Hello <eos>"
    assert tok.convert_ids_to_tokens(chosen)[0] == "▁H"  # one space, a part of its word


def test_a_newline_that_a_tokenizer_merges(tmp_path):
    """Where the newline before a response would be merged with its first, it is tokenised apart."""
    core = Tokenizer(models.BPE({x: i for i, x in enumerate(
        ["<eos>", "<pad>", "▁", "\n", "\n\n", "a", "▁\n"])}, [("\n", "\n")]))
    core.normalizer = normalizers.Prepend("▁")
    core.decoder = decoders.Replace("▁", " ")
    core.add_special_tokens(["<eos>", "<pad>"])
    tok = dressed(core, None)
    assert tok.convert_ids_to_tokens(load(tmp_path, [pair("a", "\na", "a")], tok)[0][1]) == [
        "▁", "\n", "a", "<eos>"]
    assert tok.convert_ids_to_tokens(load(tmp_path, [pair("a", "a", "a")], tok)[0][1]) == [
        "a", "<eos>"]


def test_byte_level_ids_are_those_of_a_text_alone(tmp_path):
    tok = byte_tokenizer()
    for line, (prompt, chosen, _) in zip(LINES, load(tmp_path, [
            pair("A: ", x, "b") for x in LINES], tok, 99, 99), strict=True):
        assert (prompt, chosen) == (tok("A: ").input_ids, [*tok(line).input_ids, tok.eos_token_id])


# ---- no turn and no row is lost in silence -------------------------------------------------------

ANSWER = {"role": "assistant", "content": "2."}
BAD = {
    "prompt text, message sides": pair("b", [ANSWER], [ANSWER]),
    "whole conversations": pair("b", [*USER, ANSWER], [*USER, ANSWER]),
    "prompt repeated": pair(USER, [*USER, ANSWER], [*USER, ANSWER]),
    "several turns": pair(USER, [ANSWER, *USER, ANSWER], [ANSWER]),
    "ends in a user's": pair(USER, USER, [ANSWER]),
    "no turn": pair(USER, [], [ANSWER]),
    "no prompt": pair([], "a", "b"),
    "prompt ends with the assistant": pair([*USER, ANSWER], "a", "b"),
    "a dropped role": pair([{"role": "critic", "content": "Be brief."}, *USER], "a", "b"),
    "null content": pair([{"role": "user", "content": None}], "a", "b"),
    "null reply": pair(USER, [{"role": "assistant", "content": None}], "b"),
    "an image": pair([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a", "b"),
    "parts": pair([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "a", "b"),
    "no role": pair([{"content": "x"}], "a", "b"),
    "a dict": pair({"role": "user", "content": "x"}, "a", "b"),
    "a number": pair(USER, 3, "b"),
}


@pytest.mark.parametrize("kind", BAD)
def test_shapes_that_would_lose_text_are_refused(tmp_path, capsys, kind):
    err = refused(tmp_path, capsys, byte_tokenizer(template()), BAD[kind])
    assert "a side: one reply" in err and "`tasks.py file`" in err


def test_a_reply_may_be_a_text_or_one_message(tmp_path):
    tok = byte_tokenizer(template("<|bot|>{{ m['thought'] }}{{ m['content'] }}<|end|>"))
    assert texts(tmp_path, tok, pair(USER, [ANSWER | {"thought": "1+1="}], "3."))[0][1:] == (
        "1+1=2.<|end|>", "3.<|end|>")


def test_thoughts_of_earlier_turns_may_go(tmp_path):
    drops = template("<|bot|>{{ m['content'].split('</think>')[-1].strip() }}<|end|>")
    earlier = [*USER, {"role": "assistant", "content": "<think>1+1</think> 2."}, *USER]
    found = texts(tmp_path, byte_tokenizer(drops), pair(earlier, "a", "b"))
    assert "<|bot|>2.<|end|>" in found[0][0]


@pytest.mark.parametrize("row, said", [
    ({"instruction": "a", "output": "b"}, "no prompt and no chosen and no rejected among its "
     "columns ['instruction', 'output']"),
    ({"prompt": "a", "chosen": "b", "score": 1}, "no rejected among its columns ['prompt', "
     "'chosen', 'score']"),
    ({"\ud800": "a"}, "among its columns ['\\ud800']"),  # which a terminal cannot show
])
def test_other_columns_are_named(tmp_path, capsys, row, said):
    assert said in refused(tmp_path, capsys, byte_tokenizer(), row)


@pytest.mark.parametrize("content", [b'[{"prompt": "a"}]', b'[\n {"prompt": "a"}\n]',
                                     b"prompt,chosen\na,b\n", b"PAR1\x15\x04\xff\xfe"])
def test_other_kinds_of_files_are_named(tmp_path, capsys, content):
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit):
        dpo.load_pairs(str(path), byte_tokenizer(), limits())
    err = capsys.readouterr().err
    assert "x.jsonl" in err and "(no array, CSV, parquet)" in err and err.count("\n") == 1


def test_refused_rows_are_left_out_and_counted(tmp_path, capsys):
    tok = byte_tokenizer(template("{% if m['content'] == 'no' %}{{ raise_exception('no') }}"
                                  "{% endif %}<|bot|>{{ m['content'] }}<|end|>"))
    good = pair(USER, "a", "b")
    path = tmp_path / "mixed.jsonl"
    rows = [good, BAD["several turns"], pair(USER, "no", "b"), {"x": 1}, good, BAD["null reply"]]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    taken = set()
    assert len(dpo.load_pairs(str(path), tok, limits(400, 400, skip=True), refused=taken)) == 2
    assert taken == {2, 3, 4, 6} and "4 were refused" in capsys.readouterr().out
    assert list(dpo.read_jsonl(str(path), refused=taken)) == [good, good]
    path.write_text(json.dumps({"x": 1}) + "\n")
    with pytest.raises(SystemExit):
        dpo.load_pairs(str(path), tok, limits(skip=True))
    assert "no pairs in it; 1 were refused" in capsys.readouterr().err


def test_labels_stay_with_their_rows(toy, tmp_path):
    """`reward.py label --skip-refused` writes the rows that were read, each with its own label."""
    import reward

    lines = (toy / "data/golden.jsonl").read_text().splitlines()[:6]
    out, words = {}, dict(model=f"{toy}/gold", max_prompt_tokens=32, max_response_tokens=40)
    for name, extra in (("whole", []), ("mixed", ['{"prompt": 3}', '{"x": 1}'])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join([*extra, *lines[:3], *extra, *lines[3:]]) + "\n")
        out[name] = tmp_path / f"{name}-out.jsonl"
        reward.main(reward.parse_args(["label", *flags(
            data=path, out=out[name], skip_refused=True, **words)]))
    assert out["whole"].read_bytes() == out["mixed"].read_bytes() != b""


def test_equal_responses_are_counted(tmp_path, capsys):
    load(tmp_path, [pair("a", "bbbc", "bbbd"), pair("a", "c", "d"), pair("a", "c", "c")],
         byte_tokenizer(), 9, 3)
    assert "2 have two equal responses" in capsys.readouterr().out


def test_prompts_alone_are_enough_to_sample(toy, tmp_path, capsys):
    """online_rlhf.py --prompts and gold_eval.py sample: the same run as with responses."""
    lines = [json.loads(x) for x in (toy / "data/golden.jsonl").read_text().splitlines()[:40]]
    only = tmp_path / "prompts.jsonl"
    only.write_text("".join(json.dumps({"prompt": x["prompt"]}) + "\n" for x in lines))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(x) + "\n" for x in lines))
    short = dict(model=f"{toy}/sft", max_prompt_tokens=32, max_response_tokens=40)
    import online_rlhf

    for path in (only, pairs):
        name = path.stem
        gold_eval.main(gold_eval.parse_args(["sample", *flags(
            data=path, out=tmp_path / f"{name}-samples", prompts=5, **short)]))
        online_rlhf.main(online_rlhf.parse_args(flags(
            prompts=path, labeller=f"{toy}/proxy", out=tmp_path / name, steps=2, batch_size=4,
            **short)))
    for a, b in (("prompts-samples", "pairs-samples"), ("prompts/stream.jsonl",
                                                         "pairs/stream.jsonl")):
        assert (tmp_path / a).read_bytes() == (tmp_path / b).read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        dpo.load_pairs(str(only), byte_tokenizer(), limits())
    assert "no chosen and no rejected among its columns ['prompt']" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dpo", "ipo", "slic", "bo2", "sft", "online_rlhf", "reward train",
                                  "reward label", "gold_eval judge", "gold_eval sample",
                                  "gold_eval classify"])
def test_every_script_that_reads_pairs_has_both_flags(name, capsys):
    module, *command = name.split()
    with pytest.raises(SystemExit):
        __import__(module).parse_args([*command, "--help"])
    out = capsys.readouterr().out
    assert "--chat-kwargs" in out and "--skip-refused" in out


# ---- tasks.py takes other people's columns -------------------------------------------------------

SYSTEM, REPLY = {"role": "system", "content": "s"}, [{"role": "assistant", "content": "4"}]
EARLIER = [{"role": "user", "content": "p"}, *REPLY]
TAKEN = [  # a row, its prompt, the roles and texts in order; 2. is chosen, 3. rejected
    ({"instruction": "What is", "input": "two?", "chosen": "2.", "rejected": "3.", "system": "s",
      "history": [["p", "4"]]},
     [SYSTEM, *EARLIER, {"role": "user", "content": "What is\ntwo?"}]),
    ({"instruction": "What is two?", "input": "", "output": ["2.", "3."]}, USER),
    ({"system": "", "question": "What is two?", "chosen": "2.", "rejected": "3."}, USER),
    ({"conversations": [{"from": "system", "value": "s"},
                        {"from": "human", "value": "What is two?"}],
      "chosen": {"from": "gpt", "value": "2."}, "rejected": {"from": "gpt", "value": "3."}},
     [SYSTEM, *USER]),
    ({"context": [*EARLIER, *USER], "response1": "2.", "response2": "3.",
      "overall_preference": -2}, [*EARLIER, *USER]),
    ({"context": USER, "response1": "3.", "response2": "2.", "overall_preference": 1}, USER),
    ({"prompt": "What is two?", "response_0": "3.", "response_1": "2.", "better_response_id": 1,
      "safer_response_id": 0}, USER),
    ({"prompt": "\n\nHuman: What is two?\n\nAssistant: ", "answers": [
        {"answer": "x", "rank": 2}, {"answer": "2.", "rank": 1}, {"answer": "3.", "rank": 7}]},
     USER),
    ({"instruction": "What is two?", "completions": [
        {"response": "3.", "overall_score": 1}, {"response": "2.", "overall_score": 8.5},
        {"response": "x", "overall_score": 4}]}, USER),
    ({"chosen": [*USER, ANSWER], "rejected": [*USER, ANSWER | {"content": "3."}],
      "source": "x"}, USER),  # Skywork
    ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "What is "},
                                              {"type": "text", "text": "two?"}]}],
      "chosen": [ANSWER | {"content": [{"type": "text", "text": "2."}]}], "rejected": "3."}, USER),
    ({"prompt": "What is two?", "chosen": [ANSWER], "rejected": "3."}, USER),
    ({"prompt": EARLIER[:1], "chosen": [*REPLY, *USER, ANSWER],
      "rejected": [*REPLY, *USER, ANSWER | {"content": "3."}]}, [*EARLIER, *USER]),
]


@pytest.mark.parametrize("row, prompt", TAKEN)
def test_other_layouts_are_converted(tmp_path, row, prompt):
    assert tasks.convert(row, False) == (prompt, "2.", "3.")
    tok = byte_tokenizer(template().replace("m['role'] == 'user'", "m['role'] in 'user system'"))
    taken = dict(zip(("prompt", "chosen", "rejected"), tasks.convert(row, False), strict=True))
    assert texts(tmp_path, tok, taken)[0][1:] == ("2.<|end|>", "3.<|end|>")


@pytest.mark.parametrize("row, reason", [
    ({"context": USER, "response1": "a", "response2": "b", "overall_preference": 0}, "tie"),
    ({"chosen": [*USER, ANSWER, *USER], "rejected": [*USER, ANSWER, *USER]}, "the assistant's"),
    (pair([*USER, ANSWER], "a", "b") | {"chosen": [ANSWER]}, "the assistant's"),
    (pair(USER, [*USER, ANSWER], [ANSWER, *USER, ANSWER]), "sides part before"),
])
def test_rows_without_one_pair_of_replies_are_dropped(row, reason):
    with pytest.raises(tasks.Drop, match=reason):
        tasks.convert(row, False)


def test_files_and_configurations(tmp_path, monkeypatch, capsys):
    for name, content, said in (
            ("a.jsonl", "[\n{}\n]", "JSON array"), ("b.jsonl", "[{}]", "'[{}]'"),
            ("c.csv", "prompt,chosen,rejected\na,b,c,d\n", ":2: more fields")):
        (tmp_path / name).write_text(content)
        with pytest.raises(SystemExit):
            tasks.main(tasks.parse_args(["file", *flags(file=tmp_path / name, out=tmp_path / "o")]))
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    asked = []
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=lambda *a, **k: asked.append((a, k)) or [pair("q", "x", "y")]))
    tasks.main(tasks.parse_args(["org/name", "--config", "c", "--out", f"{tmp_path}/n"]))
    assert asked == [(("org/name", "c"), {"split": "train"})]
