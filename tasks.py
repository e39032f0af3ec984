"""Preference data as JSON lines of pairs: the paper's tasks, a file of your own, or a toy.

    python tasks.py toy                                      # built in: no network, a minute
    python tasks.py helpful                                  # from the hub
    python tasks.py helpful --file test.jsonl.gz --scratch   # a local copy, and a small base model
    python tasks.py trl-lib/ultrafeedback_binarized          # any data set of the hub in TRL's form
    python tasks.py file --file my_pairs.jsonl

Writes `initial.jsonl` (the paper's D_initial: {"prompt", "chosen", "rejected"}) to --out. `toy`
also writes `validation.jsonl` (pairs labelled without noise) and `base/`, a tiny random Llama with
its tokenizer; for real data --scratch makes such a base. Every dropped row is counted by its
reason. Shapes are told apart by their keys; conversations become messages, for the model's own chat
template, with --text one text.

MIT licence. Next: sft.py.
"""

import argparse
import csv
import gzip
import json
import math
import os
import random
import re
import sys
from collections import Counter

from safetensors import SafetensorError


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("name", help=f"which pairs: toy, {', '.join(HUB)}, file, or ORG/NAME on the hub")
    p.add_argument("--split", default="train", help="split of ORG/NAME")
    p.add_argument("--config", help="configuration of ORG/NAME, where it has several")
    p.add_argument("--file", help="read this local copy (jsonl, jsonl.gz, csv) instead of the hub")
    p.add_argument("--out", help="folder to write (default: data/NAME)")
    p.add_argument("--pairs", type=int, help="at most this many pairs (toy: 64000 by default)")
    p.add_argument("--taste", choices=list(NOUNS), default="easy",
                   help="toy: what the simulated people like, easy or hard to tell (hard: verses "
                   "and rhymes, and five people a pair)")
    p.add_argument("--skip", type=int, default=0, help="usable pairs to leave out at first")
    p.add_argument("--text", action="store_true",
                   help="write messages as text, for models without a chat template")
    p.add_argument("--scratch", action="store_true",
                   help="also make base/: a byte-level BPE tokenizer and a random Llama")
    p.add_argument("--width", type=int, help="hidden size of base/ (default: toy 64, scratch 256)")
    p.add_argument("--layers", type=int, help="layers of base/ (default: toy 2, scratch 4)")
    p.add_argument("--vocab", type=int, default=8000, help="vocabulary of a --scratch base")
    p.add_argument("--seed", type=int, default=0, help="seed of toy data and of base/")
    return p.parse_args(argv)


# ---- the toy language: everything visible, nothing downloaded ------------------------------------
MOODS = {mood: [words.split() for words in parts] for mood, parts in {
    "happy": ("merry jolly cheerful bright sunny playful",  # adjectives, verbs, adverbs
              "danced sang laughed skipped twirled clapped", "gladly brightly joyfully warmly"),
    "sad": ("gloomy lonely tearful weary mournful grey",
            "wept sighed moped sobbed drooped grieved", "sadly bitterly heavily quietly"),
    "angry": ("furious grumpy fierce cross bitter stormy",
              "growled stamped shouted snarled raged hissed", "angrily loudly sharply wildly"),
    "sleepy": ("drowsy tired dreamy cosy yawning lazy",
               "napped dozed snored rested yawned slept", "softly slowly deeply gently"),
    "brave": ("bold daring valiant mighty fearless proud",
              "charged climbed leapt fought marched explored", "boldly proudly firmly bravely"),
}.items()}
ANIMALS = "fox bear owl hare cat wolf duck goat mouse horse frog crow".split()
PLACES = ["in the forest", "by the river", "on the hill", "at the market", "under the bridge",
          "near the mill", "behind the barn", "inside the cave"]
NOUNS = {"easy": ["sentences", "lines"], "hard": ["verses", "rhymes"]}  # the taste of who asks
WISH = re.compile(rf"(\w+) (\w+) ({'|'.join(sum(NOUNS.values(), []))}) about a (\w+)")
NUMBERS = {"two": 2, "three": 3, "four": 4}
MOOD_OF = {word: mood for mood, parts in MOODS.items() for part in parts for word in part}
ADJECTIVES, VERBS, ADVERBS = ("|".join(sum(part, [])) for part in zip(*MOODS.values(), strict=True))
SENTENCE = re.compile(
    rf"the (?:(?:{ADJECTIVES}) )?(?:{'|'.join(ANIMALS)}) (?:{VERBS})(?: and (?:{VERBS}))?"
    rf"(?: (?:{ADVERBS}))?(?: (?:{'|'.join(PLACES)}))?")
# taste: noise in units of U, and people a pair. Two people agree on 85% and on 75% of the pairs;
# two panels of five, which decide on the hard pairs, on 85%
PEOPLE = {"easy": (0.5, 1), "hard": (0.6, 5)}


def toy_prompt(rng, taste="easy"):
    """Ask for some sentences of a mood about an animal, in one of 16 phrasings."""
    ask = rng.choice(["write", "tell me", "give me", "say"])
    number, mood, animal = rng.choice(list(NUMBERS)), rng.choice(list(MOODS)), rng.choice(ANIMALS)
    noun, end = rng.choice(NOUNS[taste]), rng.choice(["", " please"])
    return f"{ask} {number} {mood} {noun} about a {animal}{end}:"


def toy_response(prompt, skill, rng):
    """Sentences by a writer of `skill` in [0, 1]: how often each wish and the grammar is met."""
    number, mood, _, animal = WISH.search(prompt).groups()
    count = NUMBERS[number] if rng.random() < 0.4 + 0.6 * skill else rng.randint(1, 5)
    home, used, sentences = rng.choice(PLACES), set(), []

    def pick(part):
        while True:
            of = mood if rng.random() < 0.1 + 0.7 * skill else rng.choice(list(MOODS))
            word = rng.choice(MOODS[of][part])
            if word not in used or rng.random() < 0.5 * (1 - skill):
                used.add(word)
                return word

    for _ in range(count):
        words = ["the"] + ([pick(0)] if rng.random() < 0.75 else [])
        words.append(animal if rng.random() < 0.4 + 0.6 * skill else rng.choice(ANIMALS))
        words.append(pick(1))
        if rng.random() < 0.4:
            words += ["and", pick(1)]
        if rng.random() < 0.5:
            words.append(pick(2))
        if rng.random() < 0.45:
            words.append(home if rng.random() < 0.2 + 0.8 * skill else rng.choice(PLACES))
        if rng.random() < 0.2 * (1 - skill):  # a slip: two words change places
            at = rng.randrange(len(words) - 1)
            words[at:at + 2] = words[at + 1], words[at]
        sentences.append(" ".join(words) + ".")
    return " ".join(sentences)


def utility(prompt, response):
    """The hidden human utility of a toy response, a pure function of two strings; about -5 to 5.

    U = 3 * (share of mood words that fit the asked mood) + 2 * (share of sentences about the asked
    animal) - 1 for every place after the first - 0.5 for every repeated mood word
    - 1 for every sentence too many or too few - 1 for every sentence the grammar does not know.

    Who asks for verses or rhymes has a harder taste: what pleases one displeases the other.
    U = 0.5 * (the first share) + 0.5 * (the second)
    + 2 * (share of sentences that alliterate: two of animal and mood words, or one of them twice,
      begin with one letter), for verses - 2 * (this share)
    + 1.5 * (share of sentences after the first that have more words than the one before, minus the
      share that have fewer), where sad or sleepy ones are asked for - 1.5 * (this)
    - 0.25 for every sentence too many or too few
    - 0.5 for every sentence the grammar does not know.
    """
    number, mood, noun, animal = WISH.search(prompt).groups()
    sentences = [s.strip() for s in response.split(".") if s.strip()]
    if not sentences:
        return -5.0
    moods = [w for s in sentences for w in s.split() if w in MOOD_OF]
    fit = sum(MOOD_OF[w] == mood for w in moods) / max(len(moods), 1)
    focus = sum(set(s.split()) & set(ANIMALS) == {animal} for s in sentences) / len(sentences)
    places = sum(place in response for place in PLACES)
    malformed = sum(not SENTENCE.fullmatch(s) for s in sentences)
    if noun in NOUNS["hard"]:
        lines = [s.split() for s in sentences]
        starts = [[w[0] for w in line if w in MOOD_OF or w in ANIMALS] for line in lines]
        alike = sum(len(set(x)) < len(x) for x in starts) / len(lines)
        rises = sum((len(b) > len(a)) - (len(b) < len(a)) for a, b in zip(
            lines, lines[1:], strict=False)) / max(len(lines) - 1, 1)
        return (0.5 * (fit + focus) + (-2 if noun == "verses" else 2) * alike
                + (-1.5 if mood in ("sad", "sleepy") else 1.5) * rises
                - 0.25 * abs(len(lines) - NUMBERS[number]) - 0.5 * malformed)
    return (3 * fit + 2 * focus - max(places - 1, 0) - 0.5 * (len(moods) - len(set(moods)))
            - abs(len(sentences) - NUMBERS[number]) - malformed)


def toy_pairs(count, seed, noise, taste="easy", people=1):
    """Pairs by two writers of random skill; a person picks a over b with chance
    sigmoid((U_a - U_b) / noise) (Bradley-Terry), or the one of higher U where noise is 0. Of
    several people most decide."""
    rng = random.Random(f"toy-{seed}")
    pairs = []
    while len(pairs) < count:
        prompt = toy_prompt(rng, taste)
        a, b = (toy_response(prompt, rng.random(), rng) for _ in range(2))
        gap = utility(prompt, a) - utility(prompt, b)
        if a == b or (noise == 0 and gap == 0):
            continue
        votes = sum(rng.random() < 1 / (1 + math.exp(-gap / noise)) if noise else gap > 0
                    for _ in range(people))
        chosen, rejected = (a, b) if votes > people / 2 else (b, a)
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


# ---- real data: one function a shape; each returns a pair or raises Drop -------------------------
class Drop(Exception):
    """A row that carries no usable preference; the message is its reason, as counted."""


def need(holds, reason):
    """Drop the row for this reason where something does not hold."""
    if not holds:
        raise Drop(reason)


def from_conversations(row):
    """Two whole conversations; the prompt is all but the last turn. They are messages
    (ultrafeedback), or transcripts (hh-rlhf), whose last turn begins at the last "Assistant:"."""
    if isinstance(row["chosen"], list):
        (*prompt, chosen), (*other, rejected) = row["chosen"], row["rejected"]
        need(prompt == other, "sides part before the last turn")
        need([m["role"] == "assistant" for m in (*prompt[-1:], chosen, rejected)] == [0, 1, 1],
             "the last turn, and only that, must be the assistant's")
        return prompt, chosen["content"], rejected["content"]
    (*prompt, chosen), (*other, rejected) = (
        row[side].rpartition("\n\nAssistant:") for side in ("chosen", "rejected"))
    need(prompt == other and any(prompt), "sides part before the last turn")
    need("\n\nHuman:" not in chosen + rejected, "a human turn inside the answer")
    return "".join(prompt), chosen, rejected


def messages(*turns):
    """Messages of (role, text); an empty system prompt is none."""
    return [{"role": role, "content": x} for role, x in turns if x or role != "system"]


def from_pair(row):
    """Explicit prompt, chosen, rejected: texts or messages; a side may repeat the prompt."""
    prompt, *sides = (row[key] for key in ("prompt", "chosen", "rejected"))
    if all(isinstance(x, str | None) for x in (prompt, *sides)):
        return prompt, *sides
    asked = prompt if isinstance(prompt, list) else messages(("user", prompt))
    sides = [x if isinstance(x, list) else [{"role": "assistant", "content": x}] for x in sides]
    chosen, rejected = (x if x[:len(asked)] == asked or isinstance(prompt, str) and len(x) > 1
                        else [*asked, *x] for x in sides)
    return from_conversations({"chosen": chosen, "rejected": rejected})


def from_columns(row):
    """Alpaca's and Intel/orca_dpo_pairs' columns; `output` may be a list of both answers."""
    asked = "\n".join(filter(None, (row.get("question") or row["instruction"], row.get("input"))))
    earlier = [x for pair in row.get("history") or []
               for x in zip(("user", "assistant"), pair, strict=True)]
    chosen, rejected = row["output"] if "output" in row else (row["chosen"], row["rejected"])
    return messages(("system", row.get("system")), *earlier, ("user", asked)), chosen, rejected


def from_sharegpt(row):
    """ShareGPT: "from" and "value" for role and content."""
    names = {"human": "user", "gpt": "assistant"}
    return from_conversations({side: messages(*(
        (names.get(m["from"], m["from"]), m["value"]) for m in [*row["conversations"], row[side]]))
        for side in ("chosen", "rejected")})


def from_scores(row):
    """The best and the worst of scored answers: HelpSteer3, PKU-SafeRLHF, Nectar, UltraFeedback."""
    prompt = row["context"] if "context" in row else row.get("prompt") or row["instruction"]
    if "overall_preference" in row:
        scored = [(0, row["response1"]), (row["overall_preference"], row["response2"])]
    elif "better_response_id" in row:
        scored = [(row["better_response_id"] == i, row[f"response_{i}"]) for i in (0, 1)]
    elif "answers" in row:
        prompt, scored = turns(prompt), [(-x["rank"], x["answer"]) for x in row["answers"]]
    else:
        scored = [(x["overall_score"], x["response"]) for x in row["completions"]]
    (low, rejected), *_, (high, chosen) = sorted(scored, key=lambda x: x[0])
    if low == high:
        raise Drop("tie")
    return prompt if isinstance(prompt, list) else messages(("user", prompt)), chosen, rejected


def turns(transcript):
    """Anthropic's transcript, which ends with "Assistant:", as messages. Two turns in a row of one
    speaker become one: chat templates want them to alternate."""
    first, *parts = re.split(r"\n\n(Human|Assistant):", transcript)
    messages = []
    for name, text in zip(parts[:-2:2], parts[1:-2:2], strict=True):
        role = {"Human": "user", "Assistant": "assistant"}[name]
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    need(messages and not first.strip() and messages[0]["role"] == messages[-1]["role"] == "user",
         "a transcript that a human neither begins nor ends")
    return messages


def from_comparison(row):
    """openai/summarize_from_feedback: a Reddit post with two summaries and a choice."""
    info = row["info"]
    need(info.get("post"), "not a Reddit post")
    prompt = (f"SUBREDDIT: r/{info['subreddit']}\n\nTITLE: {info['title']}\n\n"
              f"POST: {info['post']}\n\nTL;DR:")
    texts = [s["text"] and " " + s["text"].strip() for s in row["summaries"]]
    return prompt, texts[row["choice"]], texts[1 - row["choice"]]


def from_arena_conversations(row):
    """lmsys/chatbot_arena_conversations: two conversations, a winner, a language."""
    need(row["language"] == "English", "other language")
    need(row["winner"] in ("model_a", "model_b"), "tie")
    a, b = row["conversation_a"], row["conversation_b"]
    chosen, rejected = (a, b) if row["winner"] == "model_a" else (b, a)
    return from_conversations({"chosen": chosen, "rejected": rejected})


def from_arena_55k(row):
    """lmarena-ai/arena-human-preference-55k: JSON-encoded turns a side, 0/1 winner columns."""
    a_wins, b_wins = (float(row[f"winner_model_{side}"]) for side in "ab")  # "1", 1 or True
    need(a_wins != b_wins, "tie")
    users, a, b = (json.loads(row[k]) for k in ("prompt", "response_a", "response_b"))
    need(len(users) == len(a) == len(b), "turns without a reply")
    a, b = ([message for user, reply in zip(users, side, strict=True)
             for message in ({"role": "user", "content": user},
                             {"role": "assistant", "content": reply})] for side in (a, b))
    chosen, rejected = (b, a) if b_wins else (a, b)
    return from_conversations({"chosen": chosen, "rejected": rejected})


SHAPES = {  # a key that only this shape has: the function that reads it
    "winner_model_a": from_arena_55k, "conversation_a": from_arena_conversations,
    "summaries": from_comparison, "conversations": from_sharegpt,
    **dict.fromkeys(("overall_preference", "better_response_id", "answers", "completions"),
                    from_scores), "instruction": from_columns, "question": from_columns,
    "prompt": from_pair,
}


def joined(content):
    """The text of a content in parts of text."""
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def convert(row, as_text):
    """Bring one raw row of any known shape to (prompt, chosen, rejected), or raise Drop."""
    shape = next((SHAPES[key] for key in SHAPES if key in row), from_conversations)
    prompt, chosen, rejected = shape(row)
    chosen, rejected = joined(chosen), joined(rejected)
    if isinstance(prompt, list):
        prompt = [{**m, "content": joined(m["content"])} for m in prompt]
    need(None not in (prompt, chosen, rejected) and not (
        isinstance(prompt, list) and any(m["content"] is None for m in prompt)), "null")
    text = json.dumps([prompt, chosen, rejected], ensure_ascii=False)
    need(text == text.encode(errors="ignore").decode(), "half a surrogate pair")
    need(chosen.strip() and rejected.strip(), "empty answer")
    need(chosen != rejected, "equal sides")
    if not as_text and shape is from_conversations and isinstance(prompt, str):
        prompt, chosen, rejected = turns(prompt), chosen.strip(), rejected.strip()
    if as_text and isinstance(prompt, list):
        names = {"user": "Human", "assistant": "Assistant", "system": "System"}
        prompt = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in prompt)
        prompt += "\n\nAssistant:"
        chosen, rejected = f" {chosen.strip()}", f" {rejected.strip()}"
    return prompt, chosen, rejected


def real_pairs(name, file, limit, as_text, split="train", config=None):
    """Read real preference data; returns (pairs, Counter of drop reasons)."""
    pairs, dropped = [], Counter()
    for number, row in raw_rows(file) if file else hub_rows(name, split, config):
        try:
            prompt, chosen, rejected = convert(row, as_text)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        except Drop as reason:
            dropped[str(reason)] += 1
        except KeyError as key:
            stop(f"{file or name}:{number}: missing key {key}; found {sorted(map(str, row))}")
        except (TypeError, ValueError, AttributeError, IndexError) as e:
            stop(f"{file or name}:{number}: a row of unknown shape ({e})")
        if limit and len(pairs) == limit:
            break
    return pairs, dropped


def main(args):
    out, toy = args.out or f"data/{os.path.basename(args.name)}", args.name == "toy"
    if args.name not in ("toy", *HUB, "file") and args.name.count("/") != 1:
        stop(f"no task {args.name}: give toy, {', '.join(HUB)}, file, or ORG/NAME on the hub")
    if (args.split != "train" or args.config) and "/" not in args.name:
        stop(f"--split {args.split} is for ORG/NAME on the hub, and so is --config")
    for flag in ("pairs", "width", "layers", "vocab"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            stop(f"--{flag} {getattr(args, flag)} is out of range")
    if args.skip < 0 or args.skip and toy:
        stop(f"--skip {args.skip}: must be 0 or more, and is for real data")
    if args.taste != "easy" and not toy:
        stop(f"--taste {args.taste} is for toy")
    if args.width and args.width % (2 * max(args.width // 64, 4)):
        stop(f"--width {args.width}: must be a multiple of {2 * max(args.width // 64, 4)}")
    if args.name == "file" and not args.file:
        stop("`tasks.py file` needs --file PAIRS.jsonl")
    if os.path.exists(os.path.join(out, "initial.jsonl")):
        stop(f"{out}/initial.jsonl exists; choose another --out or remove it")
    if toy:
        noise, people = PEOPLE[args.taste]
        pairs = toy_pairs(args.pairs or 64_000, args.seed, noise, args.taste, people)
    else:
        pairs, dropped = real_pairs(args.name, args.file, args.pairs and args.skip + args.pairs,
                                    args.text, args.split, args.config)
        pairs = pairs[args.skip:]
        if dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
            print(f"dropped {sum(dropped.values()):,} rows: {reasons}")
        if not pairs:
            stop(f"{args.file or args.name}: no usable pair is left")
    os.makedirs(out, exist_ok=True)
    if toy:
        write_jsonl(f"{out}/validation.jsonl", toy_pairs(
            2_000, f"{args.seed}-validation", 0, args.taste))
    if toy or args.scratch:
        texts = [t if isinstance(t, str) else "".join(f"\n\nHuman: {m['content']}" for m in t)
                 for pair in pairs for t in pair.values()]
        make_base(texts, f"{out}/base", args.width or (64 if toy else 256),
                  args.layers or (2 if toy else 4), args.vocab, args.seed, words=toy)
    write_jsonl(f"{out}/initial.jsonl", pairs)
    print(f"{out}/initial.jsonl: {len(pairs):,} pairs")


# ---- machinery: files, the hub, base models, errors ----------------------------------------------
HUB = {  # name: (data set, its file; of parquet alone None, and what `load_dataset` has to know)
    "tldr": ("openai/summarize_from_feedback", None, {  # the branch has no configs
        "data_files": "comparisons/train/*.parquet", "revision": "refs/convert/parquet"}),
    "helpful": ("Anthropic/hh-rlhf", "helpful-base/train.jsonl.gz", {}),
    "harmless": ("Anthropic/hh-rlhf", "harmless-base/train.jsonl.gz", {}),
    "arena": ("lmarena-ai/arena-human-preference-55k", "train.csv", {})}
CHAT_TEMPLATE = (  # for --scratch bases: the transcript form of Anthropic's data
    "{% for m in messages %}{{ '\n\nHuman: ' if m['role'] == 'user' else '\n\nAssistant: ' "
    "if m['role'] == 'assistant' else '\n\nSystem: ' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}")


def raw_rows(path):
    """Yield (line number, row) of a jsonl, jsonl.gz or csv file; a malformed line is an error."""
    opener = gzip.open if path.endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as f:
            if path.endswith(".csv"):
                csv.field_size_limit(2**31 - 1)
                for number, row in enumerate(csv.DictReader(f), 2):
                    if None in row:
                        stop(f"{path}:{number}: more fields than columns: {row[None]}")
                    yield number, row
                return
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        stop(f"{path}:{number}: not a JSON object, but {line.strip()[:40]!r}")
                    yield number, row
    except OSError as e:
        stop(f"cannot read {path}: {e.strerror or e}; check --file")
    except (EOFError, ValueError) as e:  # cut gzip, not JSON, not UTF-8
        stop(f"{path}:{number}: no JSON object a line: is it a JSON array, or parquet? ({e})")


def hub_rows(name, split, config=None):
    """(row number, row) of a hub data set: its own file, or parquet through `datasets`."""
    from huggingface_hub import hf_hub_download

    repo, file, options = HUB.get(name, (name, None, {}))
    if not file:
        try:
            from datasets import load_dataset
        except ImportError:
            stop(f"{repo} is parquet: `pip install datasets`, or pass a local copy by --file")
    try:
        if file:
            return raw_rows(hf_hub_download(repo, file, repo_type="dataset"))
        rows = load_dataset(repo, *filter(None, [config]), split=split, **options)
        return enumerate(rows, 1)
    except Exception as e:  # the hub's many errors all mean: not to be had from here
        what = f"{repo}/{file}" if file else repo
        stop(f"cannot download {what} ({type(e).__name__}: {str(e)[:200]}); check its name and "
             "--split and --config, or pass a local copy by --file")


def make_base(texts, out, width, layers, vocab, seed, words):
    """Write a random Llama of `width` and `layers` to `out`, with a tokenizer made from `texts`:
    one token a word (`words`, the toy language), or byte-level BPE of at most `vocab` tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    specials = ["<pad>", "<eos>"]
    if words:
        known = sorted({w for t in texts for w in re.findall(r"\w+|[^\w\s]", t)})
        ids = {w: i for i, w in enumerate([*specials, "<unk>", *known])}
        core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.Whitespace()
        core.decoder = decoders.WordPiece()  # joins words, no space before a full stop
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        core.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=specials, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>",
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=max(width // 64, 4),
        max_position_embeddings=2048, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=None, eos_token_id=1,
        initializer_range=0.5 / width**0.5))  # the usual .02 suits a width of 600
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: a random Llama, {model.num_parameters():,} parameters, "
          f"{len(tokenizer):,} tokens")


def write_jsonl(path, rows):
    """Write rows to a temporary name, then rename: a reader never sees half a file."""
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(path + ".tmp", path)


def stop(message, status=2):
    """Print one line on stderr and exit; status 2 says that the user's input is at fault."""
    print("error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    try:
        main(parse_args())
    except (OSError, SafetensorError) as e:  # a full disk, say
        stop(f"{getattr(e, 'filename', None) or 'cannot write'}: {e}")
