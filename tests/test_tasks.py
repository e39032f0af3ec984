"""Data in every shape the hub has, counted drops, and the toy language with its utility."""

import gzip
import json
import math
import random
import sys
from collections import Counter

import pytest
from conftest import ROOT, SHARED, Fork, flags, rows_of, script

import tasks

P = "write two happy sentences about a fox:"


def test_utility_by_hand():
    u = tasks.utility
    assert u(P, "the merry fox danced. the fox sang gladly.") == 5  # all fits
    assert u(P, "the merry fox danced. the fox wept gladly.") == pytest.approx(2 + 3 * 3 / 4)
    assert u(P, "the merry fox danced. the bear sang gladly.") == 4  # half the focus
    assert u(P, "the merry fox danced.") == 4  # one sentence short
    assert u(P, "the merry fox danced. the merry fox sang.") == 4.5  # a repeated word
    assert u(P, "the fox sang by the river. the fox danced on the hill.") == 4  # two places
    assert u(P, "the merry fox danced. fox the sang.") == 4  # malformed
    assert u(P, "") == -5


def test_hard_utility_by_hand():
    """Half a share each of mood and animal; alliteration and growing lines please or displease."""
    def u(response, noun="rhymes", mood="happy"):
        return tasks.utility(f"write two {mood} {noun} about a fox:", response)

    grows = "the fox danced. the merry fox sang gladly."  # no two words begin alike
    assert u(grows) == u(grows, "verses") == 0.5 + 0.5 + 0 + 1.5
    assert u(grows, mood="sad") == 0 + 0.5 + 0 - 1.5
    alike = "the fox sang and skipped. the merry fox twirled."  # half alike; 5 and 4 words
    assert u(alike) == 0.5 + 0.5 + 1 - 1.5 and u(alike, "verses") == 0.5 + 0.5 - 1 - 1.5
    assert u(alike, "verses", "sleepy") == 0 + 0.5 - 1 + 1.5
    assert u("the fox danced. the fearless fox sang.") == pytest.approx(1 / 3 + 0.5 + 1 + 1.5)
    assert u("the fox danced. the bear sang.") == 0.5 + 0.25 + 0 + 0  # half the focus; as long
    assert u("the fox danced.") == 0.5 + 0.5 + 0 + 0 - 0.25  # alone, one short
    assert u("the fox sang. the fox danced by the river. the fox danced gladly on the hill.") == (
        0.5 + 0.5 + 0 + 1.5 - 0.25)  # a sentence too many; places, repeated words are no fault
    assert u("the fox danced. fox the sang gladly.") == 2.5 - 0.5  # malformed
    assert u("") == -5


def test_taste_changes_the_noun_and_the_choice_alone():
    easy, hard = (tasks.toy_pairs(200, 5, 0.5, taste) for taste in tasks.NOUNS)
    for one, other in zip(easy, hard, strict=True):
        number, mood, noun, animal = tasks.WISH.search(other["prompt"]).groups()
        as_easy = tasks.NOUNS["easy"][tasks.NOUNS["hard"].index(noun)]
        assert other["prompt"].replace(noun, as_easy) == one["prompt"]
        assert {one["chosen"], one["rejected"]} == {other["chosen"], other["rejected"]}
    assert 30 < sum(one["chosen"] != other["chosen"] for one, other in zip(
        easy, hard, strict=True)) < 100


def test_skill_is_mood_animal_number_and_grammar():
    """Writers of skill 1 keep the grammar and the number; at skill 0 a tenth of sentences slip."""
    rng = random.Random(7)
    utility, slips = {}, {}
    for skill in (0, 0.5, 1):
        made = [(x, tasks.toy_response(x, skill, rng)) for x in (
            tasks.toy_prompt(rng) for _ in range(1000))]
        sentences = [s for _, y in made for s in y.removesuffix(".").split(". ")]
        slips[skill] = sum(not tasks.SENTENCE.fullmatch(s) for s in sentences) / len(sentences)
        utility[skill] = sum(tasks.utility(x, y) for x, y in made) / len(made)
        if skill == 1:
            assert all(y.count(".") == tasks.NUMBERS[tasks.WISH.search(x)[1]] for x, y in made)
    assert slips[1] == 0 and 0.1 < slips[0] < 0.2 and slips[0] > slips[0.5] > 0.05
    assert utility[1] - 1 > utility[0.5] > utility[0] + 1


def test_sure_people_choose_the_higher_utility():
    for pair in tasks.toy_pairs(300, 7, 0):
        assert tasks.utility(pair["prompt"], pair["chosen"]) > tasks.utility(
            pair["prompt"], pair["rejected"])


@pytest.mark.parametrize("taste, documented", [("easy", 0.85), ("hard", 0.75)])
def test_people_are_as_noisy_as_documented(taste, documented):
    noise, _ = tasks.PEOPLE[taste]
    pairs = tasks.toy_pairs(4000, 0, noise, taste)
    gaps = [abs(tasks.utility(p["prompt"], p["chosen"]) - tasks.utility(p["prompt"], p["rejected"]))
            for p in pairs]
    sure = [1 / (1 + math.exp(-g / noise)) for g in gaps]
    agreement = sum(p * p + (1 - p) * (1 - p) for p in sure) / len(sure)
    assert agreement == pytest.approx(documented, abs=0.01)


def test_most_of_five_people_decide():
    """Each is right with chance p where U differs by g; of five at least three are."""
    one, five = (tasks.toy_pairs(4000, 0, 0.6, "hard", people) for people in (1, 5))
    right = {}
    for people, pairs in ((1, one), (5, five)):
        gaps = [tasks.utility(p["prompt"], p["chosen"]) - tasks.utility(p["prompt"], p["rejected"])
                for p in pairs]
        sure = [1 / (1 + math.exp(-abs(gap) / 0.6)) for gap in gaps if gap]
        due = sum(sum(math.comb(5, k) * p**k * (1 - p)**(5 - k) for k in (3, 4, 5))
                  if people == 5 else p for p in sure) / len(sure)
        right[people] = sum(gap > 0 for gap in gaps) / len(sure)
        assert right[people] == pytest.approx(due, abs=0.015)
    assert right[5] > right[1] + 0.05


def test_deterministic_by_seed():
    assert tasks.toy_pairs(50, 3, 0.5) == tasks.toy_pairs(50, 3, 0.5) != tasks.toy_pairs(50, 4, 0.5)


@pytest.mark.parametrize("taste", ["easy", "hard"])
def test_toy_files(tmp_path, monkeypatch, taste):
    """A tenth of initial.jsonl's labels are wrong, none of validation.jsonl's; no pair is in two
    files, of one seed or of two."""
    monkeypatch.setattr(tasks, "make_base", lambda *_, **__: None)
    pairs, u = set(), tasks.utility
    for seed, name, due in ((0, "initial", 0.1), (0, "validation", 0), (1, "initial", 0.1),
                            (1, "validation", 0)):
        if name == "initial":
            tasks.main(tasks.parse_args(["toy", "--out", f"{tmp_path}/{seed}", *flags(
                seed=seed, pairs=2000, taste=taste)]))
        rows = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows_of(
            f"{tmp_path}/{seed}/{name}.jsonl")]
        wrong = sum(u(x, chosen) < u(x, rejected) for x, chosen, rejected in rows)
        assert len(rows) == 2000 and wrong == pytest.approx(due * 2000, abs=due * 400)
        assert all(tasks.WISH.search(x)[3] in tasks.NOUNS[taste] for x, *_ in rows)
        assert pairs.isdisjoint(rows) and pairs.isdisjoint({(x, b, a) for x, a, b in rows})
        pairs |= set(rows)


def test_skip_takes_the_next_pairs(tmp_path):
    rows = [{"prompt": str(i), "chosen": "a", "rejected": "b"} for i in range(9)]
    tasks.write_jsonl(f"{tmp_path}/all.jsonl", rows)
    words = ["file", "--file", f"{tmp_path}/all.jsonl", "--out"]
    tasks.main(tasks.parse_args([*words, f"{tmp_path}/a", "--pairs", "3", "--skip", "3"]))
    tasks.main(tasks.parse_args([*words, f"{tmp_path}/b", "--skip", "7"]))
    assert rows_of(f"{tmp_path}/a/initial.jsonl") == rows[3:6]
    assert rows_of(f"{tmp_path}/b/initial.jsonl") == rows[7:]
    for wrong in (["toy", "--skip", "1"], [*words, f"{tmp_path}/c", "--skip", "9"]):
        with pytest.raises(SystemExit) as end:
            tasks.main(tasks.parse_args(wrong))
        assert end.value.code == 2


def test_toy_base_speaks_every_word(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tasks.main(tasks.parse_args(["toy", "--out", f"{tmp_path}/toy", "--pairs", "500"]))
    tokenizer = AutoTokenizer.from_pretrained(f"{tmp_path}/toy/base")
    model = AutoModelForCausalLM.from_pretrained(f"{tmp_path}/toy/base")
    assert len(tokenizer) == model.config.vocab_size
    assert all(0.05 < weight.std() < 0.075 for weight in model.parameters() if weight.dim() == 2)
    files = (f"{tmp_path}/toy/{name}.jsonl" for name in ("initial", "validation"))
    for row in (row for file in files for row in rows_of(file)):
        ids = tokenizer(row["chosen"]).input_ids
        assert tokenizer.unk_token_id not in ids and tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids) == row["chosen"]


def convert(rows, as_text=False):
    pairs, dropped = [], Counter()
    for row in rows:
        try:
            pairs.append(tasks.convert(row, as_text))
        except tasks.Drop as reason:
            dropped[str(reason)] += 1
    return pairs, dropped


def transcript(*turns):
    names = ["Human", "Assistant"] * len(turns)
    return "".join(f"\n\n{name}: {turn}" for name, turn in zip(names, turns, strict=False))


def test_transcripts_and_their_traps():
    rows = [{"chosen": transcript("a", "b", "c", x), "rejected": transcript("a", "b", "c", y)}
            for x, y in (("good", "bad"), ("same", "same"))]
    rows += [{"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "X", "c", "e")},
             {"chosen": transcript("a", "b"), "rejected": "\n\nHuman: a\n\nAssistant:"},
             {"chosen": transcript("a", "b\n\nHuman: oh"), "rejected": transcript("a", "c")}]
    pairs, dropped = convert(rows, as_text=True)
    assert pairs == [("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " good", " bad")]
    assert dropped == {"equal sides": 1, "sides part before the last turn": 1, "empty answer": 1,
                       "a human turn inside the answer": 1}
    pairs, again = convert(rows)
    assert pairs == [([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                       {"role": "user", "content": "c"}], "good", "bad")] and again == dropped


def test_turns_alternate():
    """Two turns of one speaker are one; what a human neither begins nor ends is dropped."""
    twice = "\n\nHuman: a\n\nHuman: b \n\nAssistant: c: Human: d\n\nHuman: e\n\nAssistant:"
    assert [(m["role"], m["content"]) for m in tasks.turns(twice)] == [
        ("user", "a\n\nb"), ("assistant", "c: Human: d"), ("user", "e")]
    for transcript in ("\n\nAssistant: a\n\nHuman: b\n\nAssistant:", "\n\nAssistant:",
                       "\n\nHuman: a\n\nAssistant: b\n\nAssistant:",
                       "hello\n\nHuman: a\n\nAssistant:"):
        with pytest.raises(tasks.Drop):
            tasks.turns(transcript)


def test_messages():
    user = {"role": "user", "content": "q"}
    reply = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    rows = [{"chosen": [user, reply("x")], "rejected": [user, reply("y")]},
            {"prompt": [user], "chosen": [reply("x")], "rejected": [reply("y")]},
            {"prompt": [user], "chosen": [user, reply("x")], "rejected": [user, reply("y")]},
            {"prompt": "q", "chosen": [user, reply("x")], "rejected": [user, reply("y")]},
            {"prompt": "q", "chosen": [reply("x")], "rejected": [reply("y")]}]
    pairs, _ = convert(rows)
    assert pairs == [([user], "x", "y")] * 5
    pairs, _ = convert(rows, as_text=True)
    assert pairs == [("\n\nHuman: q\n\nAssistant:", " x", " y")] * 5
    longer = [user, reply("z"), user]  # of which the prompt's text is but the beginning
    pairs, _ = convert([{"prompt": "q", "chosen": [*longer, reply("x")],
                         "rejected": [*longer, reply("y")]}])
    assert pairs == [(longer, "x", "y")]
    _, dropped = convert([{"prompt": "\ud800", "chosen": "a", "rejected": "b"}])
    assert dropped == {"half a surrogate pair": 1}


@pytest.mark.parametrize("kind", [str, int, float, bool])
def test_the_winner_of_an_arena_row(kind):
    """By columns of texts (CSV), numbers or truth values: the side that won is chosen."""
    turn, pairs = {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'}, []
    for a, b, tie in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        row = turn | {"winner_model_a": kind(a), "winner_model_b": kind(b), "winner_tie": kind(tie)}
        pairs.append(convert([row | {k: str(int(x)) for k, x in row.items() if kind is str
                                     and k.startswith("winner")}]))
    assert [[(c, r) for _, c, r in found] for found, _ in pairs] == [[("a", "b")], [("b", "a")], []]
    assert pairs[2][1] == {"tie": 1}


SAMPLES = {  # file of hub rows: (task, pairs left, dropped)
    "hh_rlhf.jsonl": ("helpful", 2, {}),
    "hh_rlhf.test.jsonl.gz": ("harmless", 2, {}),
    "summarize_from_feedback_comparisons.jsonl": ("tldr", 1, {"not a Reddit post": 1}),
    "vwxyzjn_oai_preprocessing.jsonl": ("tldr", 1, {}),
    "trl_tldr_preference.jsonl": ("tldr", 1, {}),
    "trl_hh_rlhf_helpful_base.jsonl": ("file", 1, {}),
    "trl_ultrafeedback_binarized.jsonl": ("file", 1, {}),
    "chatbot_arena_conversations.jsonl": ("arena", 1, {"other language": 1, "tie": 1,
                                                       "sides part before the last turn": 1}),
    "arena_human_preference_55k.csv": ("arena", 1, {"tie": 1,
                                                    "sides part before the last turn": 1}),
}


@pytest.mark.parametrize("file", SAMPLES)
def test_hub_shapes(file):
    if not (SHARED / "hub_samples" / file).exists():
        pytest.skip("the hub samples are not on this machine")
    name, left, drops = SAMPLES[file]
    pairs, dropped = tasks.real_pairs(name, str(SHARED / "hub_samples" / file), None, False)
    assert (len(pairs), dict(dropped)) == (left, drops)
    if name == "tldr":
        assert pairs[0]["prompt"].startswith("SUBREDDIT: r/relationships\n\nTITLE: Flatmate")
        assert pairs[0]["prompt"].endswith("\n\nTL;DR:")
        assert pairs[0]["chosen"].startswith(" flatmate ignores the dishes")
    if name == "arena":
        assert pairs[0]["prompt"][-1]["role"] == "user"


def test_from_the_hub_by_name(tmp_path, monkeypatch, capsys):
    """What is asked of the hub, by a local copy; what cannot be had is one line."""
    import huggingface_hub

    file = tmp_path / "train.jsonl.gz"
    with gzip.open(file, "wt") as f:
        f.write(json.dumps({"chosen": transcript("a", "b"), "rejected": transcript("a", "c")}))
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda *a, **k: asked.append((a, k)) or str(file))
    tasks.main(tasks.parse_args(["helpful", "--out", f"{tmp_path}/h"]))
    assert asked == [(("Anthropic/hh-rlhf", "helpful-base/train.jsonl.gz"),
                      {"repo_type": "dataset"})]
    assert rows_of(f"{tmp_path}/h/initial.jsonl") == [
        {"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}]

    def unreachable(*args, **kwargs):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for name, says in (("harmless", "--file"), ("tldr", "pip install datasets")):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(SystemExit) as stop:
            tasks.main(tasks.parse_args([name, "--out", f"{tmp_path}/{name}"]))
        assert stop.value.code == 2 and says in capsys.readouterr().err

    from types import SimpleNamespace  # parquet: the rows that `datasets` would give

    row = {"info": {"post": "p", "title": "t", "subreddit": "s"}, "choice": 1,
           "summaries": [{"text": " x"}, {"text": " y"}]}
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(
        load_dataset=lambda *a, **k: asked.append((a, k)) or [row]))
    tasks.main(tasks.parse_args(["tldr", "--out", f"{tmp_path}/tldr"]))
    assert asked[-1] == (("openai/summarize_from_feedback",), {
        "data_files": "comparisons/train/*.parquet", "revision": "refs/convert/parquet",
        "split": "train"})
    assert rows_of(f"{tmp_path}/tldr/initial.jsonl")[0]["chosen"] == " y"
    row = {"prompt": "q", "chosen": "x", "rejected": "y"}
    monkeypatch.chdir(tmp_path)
    tasks.main(tasks.parse_args(["trl-lib/tldr-preference", "--split", "validation"]))
    assert asked[-1] == (("trl-lib/tldr-preference",), {"split": "validation"})
    assert rows_of("data/tldr-preference/initial.jsonl") == [row]
    for words, says in ((["helpfull"], "no task helpfull"),
                        (["helpful", "--split", "test"], "--split test is for ORG/NAME")):
        with pytest.raises(SystemExit) as stop:
            tasks.main(tasks.parse_args(words))
        assert stop.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["helpful", "harmless"])
def test_real_anthropic_pairs(name):
    path = SHARED / "hh-rlhf" / f"{name}-base" / "test.jsonl.gz"
    if not path.exists():
        pytest.skip("the Anthropic pairs are not on this machine")
    pairs, dropped = tasks.real_pairs(name, str(path), None, False)
    parted, empty, equal = {"helpful": (9, 4, 2), "harmless": (5, 4, 0)}[name]
    assert len(pairs) == {"helpful": 2354, "harmless": 2312}[name] - parted - empty - equal
    assert dropped == Counter({"sides part before the last turn": parted, "empty answer": empty,
                               "equal sides": equal})
    assert all([m["role"] for m in p["prompt"]] == ["user", "assistant"] * (len(p["prompt"]) // 2)
               + ["user"] for p in pairs)
    texts, _ = tasks.real_pairs(name, str(path), None, True)
    assert all(p["prompt"].endswith("\n\nAssistant:") for p in texts)


def test_quiet_where_stderr_is_no_terminal(tmp_path):
    status, _, err = Fork(tmp_path, script, f"{ROOT}/tasks.py", "toy", "--pairs", "20", "--width",
                          "8", "--out", f"{tmp_path}/toy").end()
    assert (status, err) == (0, "")


def test_scratch_base_and_text(tmp_path):
    from transformers import AutoTokenizer

    file = tmp_path / "m.jsonl"
    file.write_text(json.dumps({"prompt": [{"role": "user", "content": "Grüße?"}],
                                "chosen": "Gut.", "rejected": "Nein."}) + "\n")
    tasks.main(tasks.parse_args(["file", "--file", str(file), "--out", f"{tmp_path}/m", "--scratch",
                                 "--width", "32", "--layers", "1", "--vocab", "300"]))
    tokenizer = AutoTokenizer.from_pretrained(f"{tmp_path}/m/base")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Grüße?"}], tokenize=False,
                                         add_generation_prompt=True)
    assert text == "\n\nHuman: Grüße?\n\nAssistant:"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
