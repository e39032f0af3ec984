"""Real chat templates through the scripts' data path: is what is trained on what they write?

    python tests/chat_templates.py results/templates.md FOLDER_OR_FILE...

Of a folder: .jinja files, `chat_template` entries of .json, templates assigned in .py files, which
are never run. Name it as the package that was unpacked there, with its version. Truth is what
transformers renders of the raw template. A tokenizer is made for each, whose special tokens are
those that it writes, with each of its ends and with another as EOS: a verdict is the worst of all.
"""

import argparse
import ast
import contextlib
import io
import json
import os
import re
import tempfile
from collections import Counter
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import transformers
from conftest import ARGS
from test_templates import byte_tokenizer, sentencepiece
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

import dpo

chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime(2024, 7, 26))  # as chat_text
LIMITS = SimpleNamespace(**vars(ARGS) | dict(max_prompt_tokens=10**6, max_response_tokens=10**6))
SPECIAL = re.compile(r"</?[|｜]?[\w:▁./-]+[|｜]?>|[\[\]]/?\|?[\w~!/]+\|?[\[\]]")
PLAIN = re.compile("think|tool|func|param|arg_|reason|answer", re.I)  # tags of no token, as a rule
OPENS = (r"<(?:\w+:)?think\w*>|\[THINK\]|<\|START_THINKING\|>|<\|open\|>think|<\|channel\|>analysis"
         r"|<\|channel>thought|◁think▷|<thought>|<reasoning>|<judge>|my reasoning steps:")
CLOSES = (r"</(?:\w+:)?think\w*>|\[/THINK\]|<\|END_THINKING\|>|<\|close\|>think|<\|channel\|>final"
          r"|<channel\|>|◁/think▷|</thought>|</reasoning>|</judge>|\[BEGIN FINAL RESPONSE\]")
TURNS = [{"role": role, "content": text} for role, text in (
    ("user", "How many legs has a cow?"), ("assistant", "It has four of them."),
    ("user", "And a hen?"), ("assistant", "Only two of them."), ("user", "And both?"))]
CASES = {  # a prompt and its answer
    "one turn": (TURNS[:1], "Four legs."),
    "three turns": (TURNS, "Six legs."),
    "a system message": ([{"role": "system", "content": "Be very brief."}, *TURNS[:1]], "Four."),
    "spaces around": (TURNS[:1], " \nIn two lines,\n\nfour legs. \n"),
    "a thought in it": (TURNS, "<think>\nFour and two.\n</think>\n\nSix legs."),
}
READ = (
    '"Right": prompt and response are together the whole conversation as the template writes it, '
    'up to the end of the turn, and come back from their ids; "opened by" is what the response has '
    'before the answer. "Differs": they part from it at that place, and a line of ours said so; '
    '"refused": one turn alone ends with the line that follows, and nothing is trained. "WRONG" is '
    'a difference without a word, and a thought that the prompt leaves "opened" is one that the '
    "response must close.")


def templates(path):
    """(name, text, where its package stops sampling) of every template in a file or folder."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found = []
        if file.suffix == ".jinja":
            found = [(file.stem, file.read_text(), None)]
        elif file.suffix == ".json":
            entries = [json.loads(file.read_text())]
            for x in entries:  # it grows
                entries += x if isinstance(x, list) else x.values() if isinstance(x, dict) else []
            found = [(file.stem, x.get("chat_template"), x.get("stop")) for x in entries
                     if isinstance(x, dict)]
        elif file.suffix == ".py":
            found = [(f"{ast.unparse(x.targets[0]).split('.')[-1]}, line {x.lineno}",
                      x.value.value, None) for x in ast.walk(ast.parse(file.read_text()))
                     if isinstance(x, ast.Assign) and isinstance(x.value, ast.Constant)]
        yield from (x for x in found if "{%" in str(x[1]) and "messages" in x[1])


def tokenizer(template, special=(), bos="<s>", eos="</s>", make=byte_tokenizer):
    made = make(template)
    made.add_special_tokens({"bos_token": bos, "eos_token": eos})
    made.add_tokens(sorted(special), special_tokens=True)
    if make is byte_tokenizer:  # and it writes BOS before every text
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="B $A", special_tokens=[dict(id="B", ids=[made.bos_token_id], tokens=[bos])])
    return made


def rendered(tok, messages, generation=False, **options):
    """What the raw template writes; nothing where it refuses."""
    with contextlib.suppress(Exception):
        return tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation,
                                       **dict(enable_thinking=False, thinking=False) | options)
    return ""


def short(text, size=40):
    return repr(text[:size]) + "..." * (len(text) > size)


def judged(tok, path, header, prompt, answer):
    """(verdict, details) of a conversation that `load_pairs` reads; `header` is of a next turn."""
    row = {"prompt": prompt, "chosen": answer, "rejected": "None at all."}
    path.write_text(json.dumps(row))
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            pair, = dpo.load_pairs(str(path), tok, LIMITS)
            texts, end = dpo.read_pair(tok, dpo.turn_end(tok), ("chosen", "rejected"), (),
                                       Counter(), row)
    except SystemExit:
        return "refused", err.getvalue().partition(".jsonl:1: ")[2].partition("; prompt, ch")[0]
    except Exception as e:
        return "TRACEBACK", f"{type(e).__name__}: {e}"
    said = re.search("differ from the template's whole|inside a thought", out.getvalue())
    found, last = [], tok.convert_ids_to_tokens(end)
    before = rendered(tok, prompt, True)
    if tok.decode(pair[0]).removeprefix(tok.bos_token) != before.removeprefix(tok.bos_token):
        return "WRONG", "the prompt is not what the template writes"
    for content, text, ids in zip((answer, row["rejected"]), texts[1:], pair[1:], strict=True):
        whole = rendered(tok, [*prompt, {"role": "assistant", "content": content}])
        ours = texts[0] + text + last * (not text.endswith(last))
        written = ours if whole.startswith(ours) else ours.removesuffix(last)
        at = len(os.path.commonprefix([written, whole]))
        opening, _, ending = text.rpartition(content.strip().rpartition("\n\n")[2])
        marks = re.findall(f"({OPENS})|{CLOSES}", texts[0].rpartition(prompt[-1]["content"])[2]
                           + opening)
        if at < len(written) or written != ours and whole[at:].strip():
            parted = (x[at:].replace(content.strip(), "ANSWER") for x in (ours, whole))
            found.append("after {} we have {}, it has {}".format(
                short(ours[:at][-12:]), *(short(x, 30) for x in parted)))
        for wrong, why in (
                (tok.decode(pair[0] + ids) not in (ours, tok.bos_token + ours),
                 f"the text comes back as {short(tok.decode(ids))}"),
                (ids.index(end) < len(ids) - 1, f"its end {last} stands in it before"),
                (header and header in ending, "the header of a next turn is trained on"),
                (marks and marks[-1], "the answer stands inside a thought")):
            found += [why] * bool(wrong)
    if found or said:
        return "differs" if said else "WRONG", "; ".join(dict.fromkeys(found))
    return "right", ", ".join([f"opened by {short(opening)}"] * bool(opening)
                              + [f"{last} added"] * (written != ours))


def row(template, stops, path):
    """What becomes of a template: its verdict, and the other cells."""
    raw = tokenizer(template)
    opening, after, onwards = (
        rendered(raw, TURNS[:i], i == 1).rpartition(TURNS[min(i, 2) - 1]["content"])[2]
        for i in (1, 2, 3))
    header, first = "", SPECIAL.search(opening)
    if first and after.endswith(opening[first.end():]):  # written unasked, behind an answer
        header, after = opening[first.end():], after.removesuffix(opening[first.end():])
    header = "".join(SPECIAL.findall(header)[:1])
    text = "".join(rendered(raw, prompt + more, not more, enable_thinking=on, thinking=on)
                   for prompt, _ in CASES.values() for on in (False, True)
                   for more in ([TURNS[1]], []))
    special = {x for x in SPECIAL.findall(text) if not PLAIN.search(x)}
    ends = [*(x for x in SPECIAL.findall(after) if x in special)][::-1] or ["</s>"]
    bos = next((x for x in special if text.startswith(x) and "begin" in x), "<s>")
    tries = [(ends[0], byte_tokenizer), (ends[0], lambda x: sentencepiece(x, metaspace=True)),
             *((x, byte_tokenizer) for x in {*ends[1:], "</s>"} - {ends[0]})]
    if "▁" in text:  # of a special token; SentencePiece reads it as a space
        del tries[1]
    cells, worst = [], Counter()
    for eos, make in tries:
        tok = tokenizer(template, special, bos, eos, make)
        found = {name: judged(tok, path, header, *case) for name, case in CASES.items()}
        for name, (verdict, details) in found.items():
            worst[verdict] += verdict != "differs" or "thought" not in name
            if cells and verdict in ("WRONG", "TRACEBACK") and verdict not in "".join(cells):
                kind = "" if make is byte_tokenizer else ", SentencePiece"
                cells[-1] += f"; {verdict} with EOS {eos}{kind}: {details}"
        if not cells:
            _, tail, end, _ = dpo.turn_end(tok)
            marks = re.findall(f"({OPENS})|({CLOSES})", opening)
            goes_on = f"not written: EOS; a next turn begins with {short(onwards, 12)}"
            stop = f"; its package stops at {', '.join(stops)}"
            cells = [(short(tail) if tail else goes_on) + f" ({end})"
                     + stop * bool(stops and tail and not tail.endswith(tuple(stops))),
                     "none" if not marks else "opened" if marks[-1][0] else "closed",
                     *("the same" if i and x == found["one turn"] else ": ".join(filter(None, x))
                       for i, x in enumerate(found.values()))]
            alone = found["one turn"][0]
    worst = [x for x in ("TRACEBACK", "WRONG", "differs") if worst[x]]
    return [alone if alone == "refused" else worst[0] if worst else "right", *cells]


def main(args):
    transformers.logging.set_verbosity_error()
    found, rows = {}, []  # text: its name, where it is from, where those stop
    for path in args.paths:
        for name, text, stop in templates(path):
            _, places, stops = found.setdefault(text, (name, {}, {}))
            places[path.name] = True
            stops.update(dict.fromkeys(stop or ()))
    with tempfile.TemporaryDirectory() as folder:
        for text, (name, places, stops) in found.items():
            verdict, *cells = row(text, stops, Path(folder, "row.jsonl"))
            rows.append([name, ", ".join(places), verdict, *cells])
            print(*rows[-1], sep=" | ", flush=True)
    counts = Counter(x[2] for x in rows)
    head = ["template", "from", "verdict", "a turn ends", "the prompt's thought", *CASES]
    text = [
        "# Real chat templates through the scripts", "",
        f"`python tests/chat_templates.py {args.out} {' '.join(x.name for x in args.paths)}`, "
        f"transformers {transformers.__version__}, jinja2 {version('jinja2')}. Each folder is the "
        "package of that name and version (`pip download --no-deps`), unpacked and not run; the "
        "templates themselves stay there.", "",
        f"**{len(rows)} different templates: " + ", ".join(
            f"{counts[x]} {x}" for x in ("right", "differs", "refused", "WRONG", "TRACEBACK"))
        + ".**", "", READ, "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|",
        *("| " + " | ".join(x.replace("|", "\\|") for x in cells) + " |" for cells in rows)]
    args.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="page to write")
    parser.add_argument("paths", type=Path, nargs="+", help="folders or files with templates")
    main(parser.parse_args())
