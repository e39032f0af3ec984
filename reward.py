"""The preference model r(x, y1, y2): golden, trained on people's labels, or proxy, on the golden's.

    python reward.py train --model runs/toy/sft --data data/toy/initial.jsonl --out runs/toy/gold
    python reward.py label --model runs/toy/gold --data data/toy/initial.jsonl --out golden.jsonl

A language model with a linear score at every response token; the log-odds that y1 is better are the
mean score of y1 minus that of y2 (a sum would pay length). Both kinds read one row, [x, y1, y2]:
  pairwise   y2 sees y1 (the paper's form); order randomised in training, judged both ways in use
  pointwise  y2 does not see y1, so that the log-odds are r(x, y1) - r(x, y2): Bradley-Terry
The paper (2405.08448, appendix A) uses the pairwise form and names the point-wise one as the more
carefully controlled alternative.

MIT licence. Shared: `prefer` is what gold_eval.py and online_rlhf.py call.
"""

import argparse
import gzip
import importlib.util
import json
import math
import os
import re
import signal
import sys
import time
import timeit
import zlib
from collections import Counter
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun
# products in bf16, over fp32 master weights, where `load_model` finds --precision bf16
autocast = partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda")
SCORE_SCALE = 32  # a mean moves as many times slower than a sum: without it, 1 to 2% less accurate


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = train
    p.add_argument("--model", required=True, help="backbone: run folder, folder or hub name")
    p.add_argument("--data", required=True, help="pairs (jsonl, jsonl.gz)")
    p.add_argument("--validation", help="held-out pairs (default: the last 5%% of --data, <= 2000)")
    p.add_argument("--kind", choices=["pairwise", "pointwise"], default="pairwise",
                   help="does y2 see y1?")
    p.add_argument("--out", required=True, help="run folder to write")
    p.add_argument("--steps", type=int, default=4000, help="gradient steps at the most")
    p.add_argument("--batch-size", type=int, default=32, help="pairs a step")
    p.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant after warm-up")
    p.add_argument("--warmup", type=int, default=1000, help="steps of linear warm-up")
    p.add_argument("--patience", type=int, default=5,
                   help="stop after this many evaluations without a better validation accuracy")
    p.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    label = commands.add_parser("label", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    label.add_argument("--model", required=True, help="preference model: run folder of `train`")
    label.add_argument("--data", required=True, help="pairs to label (jsonl, jsonl.gz)")
    label.add_argument("--out", required=True, help="file to write (jsonl)")
    add_flags(train)
    add_flags(label, training=False)
    return parser.parse_args(argv)


def pack_pairs(pairs, device):
    """Lay out B pairs as B rows: the prompt once, both responses behind it.

        tokens    p p p | c c c | r r | .     right-padded to T
        segment   1 1 1 | 2 2 2 | 3 3 | 0
        position  0 1 2 | 3 4 5 | 3 4 | 0     the rejected response restarts at the prompt's end
        source        * | * *   | *           predicts the next token (the last p predicts two)

    A token sees the prompt and its own segment up to itself: each response stands as if alone.
    Returns (ids (B, T), positions (B, T), segments (B, T), visible (B, 1, T, T),
    sources, targets, owners (N,)): source is an index into B*T, owner into 2*B, chosen first.
    """
    rows = [torch.tensor([x + c + r, [*range(len(x + c)), *range(len(x), len(x + r))],
                          [1] * len(x) + [2] * len(c) + [3] * len(r)]).T for x, c, r in pairs]
    ids, positions, segments = pad_sequence(rows, batch_first=True).unbind(-1)  # each (B, T)
    length = ids.shape[1]
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = causal & ((key == 1) | (key == query))
    row, column = (segments > 1).nonzero(as_tuple=True)  # of every target
    prompt_length = (segments == 1).sum(1)[row]
    is_first = positions[row, column] == prompt_length  # of a response: the last p predicts it
    sources = row * length + torch.where(is_first, prompt_length, column) - 1
    owners = row + len(pairs) * (segments[row, column] - 2)
    return [x.to(device) for x in (
        ids, positions, segments, visible, sources, ids[row, column], owners)]


def preference_logits(model, pairs):
    """Log-odds (B,) that the first response of each (prompt, first, second) is the better one.

    With `plain_rows` (see `choose_rows`) the model gets no mask but that of padding; a pointwise
    one reads each response in a row of its own.
    """
    pairwise = model.config.preference_kind == "pairwise"
    plain = getattr(model.config, "plain_rows", False)
    alone = plain and not pairwise
    rows = [(x, ys[side], []) for side in (0, 1) for x, *ys in pairs] if alone else pairs
    ids, positions, segments, mask, *_ = pack_pairs(rows, model.device)
    if pairwise:
        mask = torch.ones_like(mask).tril()  # the second response also sees the first
    mask = (segments > 0).long() if plain else mask_for(model, mask, positions)
    positions = None if alone else positions  # a model may count them in its own way
    hidden = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                              use_cache=False).last_hidden_state  # (rows, T, D)
    scores = model.score(hidden).squeeze(-1).float()  # (rows, T)
    first, second = ((scores * (segments == side)).sum(1) / (segments == side).sum(1).clamp(1)
                     for side in (2, 3))
    if alone:
        first, second = first.chunk(2)
    return SCORE_SCALE * (first - second)


def swap(pairs):
    """The same pairs with the two responses exchanged."""
    return [(prompt, second, first) for prompt, first, second in pairs]


@torch.no_grad()
def both_orders(model, pairs, tokens, logits_of=preference_logits):
    """Probabilities (2, B) r(x, y1, y2) and r(x, y2, y1); a pointwise model is asked but once.

    pairs: (prompt, y1, y2) token ids; `tokens` bounds a micro-batch.
    """
    found = torch.zeros(2, len(pairs), dtype=torch.float64)
    for rows in micro_batches(pairs, tokens):
        batch = [pairs[i] for i in rows]
        if batch or hasattr(model, "logps"):  # what is shared out all processes run
            with autocast():
                first = logits_of(model, batch).double().sigmoid()
                second = (1 - first if model.config.preference_kind == "pointwise" else
                          logits_of(model, swap(batch)).double().sigmoid())
            found[:, rows] = torch.stack([first, second]).cpu()
    return pooled(found)


def prefer(model, pairs, tokens=8192):
    """Margins (B,) in [-1, 1] = r(x, y1, y2) - r(x, y2, y1), or a judge.py's: y1 wins above 0.

    Swapping y1 and y2 flips the sign, so that no position bias is left; two equal responses have
    margin 0.
    """
    first, second = (both_orders if hasattr(model, "config") else ask_judge)(model, pairs, tokens)
    equal = torch.tensor([a == b for _, a, b in pairs], dtype=torch.bool)
    return finite((first - second).masked_fill(equal, 0), pairs)


def make_batches(steps, batch_size, rows, shuffle_window, seed):
    """Row numbers of each step's batch: no row comes again before all have come once.

    Rows are shuffled within windows of so many batches: 0 is the whole file, 1 keeps its order.
    """
    window = 1 if shuffle_window == 1 else shuffle_window * batch_size or rows  # in rows
    order = []
    for epoch in range(-(-steps * batch_size // rows)):
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        order += [start + i for start in range(0, rows, window)
                  for i in torch.randperm(min(window, rows - start), generator=generator).tolist()]
    return [order[i * batch_size:(i + 1) * batch_size] for i in range(steps)]


def micro_batches(rows, tokens, extra=0, padding=0.2, ranks=RANKS):
    """Split a batch into lists of its indices, shortest rows first.

    A row is some lists of ids; its length is the sum of theirs, plus `extra`. Padded to its longest
    row, a micro-batch is one row or at most `tokens` tokens, at most a share `padding` unreal.
    Each of several processes gets its share of every list, perhaps an empty one: all get as many.
    """
    lengths = [sum(map(len, row)) + extra for row in rows]
    groups, group, real_tokens = [], [], 0
    for i in sorted(range(len(rows)), key=lengths.__getitem__):
        count, real_tokens = len(group) + 1, real_tokens + lengths[i]
        fits = count <= max(tokens // lengths[i], 1) * ranks
        dense = count * lengths[i] <= real_tokens / (1 - padding)
        if not (group and fits and dense):
            group, real_tokens = [], lengths[i]
            groups.append(group)
        group.append(i)
    return groups if ranks == 1 else [group[RANK::ranks] for group in groups]


def preference_model_step(model, logits_of, batch, flip, tokens):
    """Accumulate the gradient of - log r of the right order, averaged over the batch.

    batch: (prompt, first, second); flip: 1 where the second is the chosen one. Returns metrics.
    """
    loss, right = 0.0, 0
    for group in micro_batches(batch, tokens):
        sign = torch.tensor([1.0 - 2 * flip[i] for i in group], device=DEVICE)
        with autocast():
            logits = sign * logits_of(model, [batch[i] for i in group])
        nll = F.softplus(-logits).sum() / len(batch)
        nll.backward()
        loss, right = loss + nll.item(), right + (logits > 0).sum().item()
    loss, right = pooled(torch.tensor([loss, right], dtype=torch.float64)).tolist()
    return {"tokens": sum(map(len, sum(batch, ()))), "loss": loss, "accuracy": right / len(batch)}


def optimizer_step(model, optimizer, lr, where):
    """Clip the gradient to norm 1 and update; stop before the weights move if it is not finite."""
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if not torch.isfinite(grad_norm):
        fail(f"{where}: the loss or its gradient is not finite; neither the weights nor the last "
             "checkpoint were touched. Look at those rows, or start again with a lower --lr")
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return {"grad_norm": grad_norm.item(), "lr": lr}


def train(args):
    """Maximum likelihood on labelled pairs; stops where validation accuracy levels off."""
    open_run(args)
    model, tokenizer = load_preference_model(args.model, args, args.kind)
    pairs, *validation = (load_pairs(path, tokenizer, args)
                          for path in (args.data, args.validation) if path)
    held_out = max(1, min(2000, len(pairs) // 20))
    if validation:
        validation = validation[0]
    elif len(pairs) > held_out:
        pairs, validation = pairs[:-held_out], pairs[-held_out:]
    else:
        fail(f"{args.data}: one pair cannot be split into training and validation")
    choose_rows(model.to(DEVICE), pairs, args)
    logits_of = shard(model, preference_logits, args.checkpoint_activations)
    batches = make_batches(args.steps, args.batch_size, len(pairs), 0, args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    # of every evaluation its accuracy, ece and order disagreement; a checkpoint holds them
    found = torch.full((-(-args.steps // args.eval_every), 3), -1.0, dtype=torch.float64)
    for step, metrics in training_steps(args, model, optimizer, found=found):
        scores = found[:(step - 1) // args.eval_every, 0].tolist()  # validation accuracies so far
        if scores and len(scores) - 1 - scores.index(max(scores)) >= args.patience:
            break  # it has levelled off
        rows, coin = batches[step - 1], torch.Generator()
        coin.manual_seed(1_000_003 * args.seed + step - 1)
        flip = torch.randint(2, (len(rows),), generator=coin).tolist()  # the order of the two
        batch = [swap([pairs[i]])[0] if f else pairs[i] for i, f in zip(rows, flip, strict=True)]
        metrics.update(preference_model_step(
            model, logits_of, batch, flip, args.tokens_per_microbatch))
        lr = args.lr * min(1.0, step / max(args.warmup, 1))
        where = f"{args.out}: step {step}, rows {rows}"
        metrics.update(optimizer_step(model, optimizer, lr, where))
        if step % args.eval_every == 0 or step == args.steps:
            assessed = assess(model, validation, args.tokens_per_microbatch, logits_of)
            metrics |= {f"validation/{k}": v for k, v in assessed.items()}
            found[len(scores)] = torch.tensor([*assessed.values()], dtype=torch.float64)
            if assessed["accuracy"] > max(scores, default=-1):
                save_model(f"{args.out}/best", model, tokenizer)
    finish(args, found, pairs, len(validation))


def label(args):
    """Write the pairs with chosen and rejected as the model prefers them; report the flips."""
    if os.path.exists(args.out):
        fail(f"{args.out} exists; choose another --out, or remove it")
    model, tokenizer = load_preference_model(args.model, args)
    halve(model)
    refused = set()
    pairs = load_pairs(args.data, tokenizer, args, refused=refused)
    margins, chunk = [], 4096
    for i in tqdm(range(0, len(pairs), chunk), "label", disable=RANK > 0 or None):
        margins += prefer(model, pairs[i:i + chunk], args.tokens_per_microbatch).tolist()
    flips, ties = sum(m < 0 for m in margins), sum(m == 0 for m in margins)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".tmp" if RANK == 0 else os.devnull, "w", encoding="utf-8") as f:
        for row, margin in zip(read_jsonl(args.data, refused=refused), margins, strict=True):
            chosen, rejected = (s + "_ids" * ("chosen_ids" in row) for s in ("chosen", "rejected"))
            if margin < 0:
                row[chosen], row[rejected] = row[rejected], row[chosen]
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    if RANK == 0:
        os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {len(pairs):,} pairs, {flips:,} labels flipped ({flips / len(pairs):.1%}), "
          f"{ties:,} ties kept")


def main(args):
    train(args) if args.command == "train" else label(args)


# ==== The lesson ends here. Below is machinery, most of it the same in every script ===============
def add_flags(p, training=True):
    """Add the flags of machinery, the same in every script, to the parser `p`; returns it."""
    p.add_argument("--max-prompt-tokens", type=int, default=896, help="longer: cut at left")
    p.add_argument("--max-response-tokens", type=int, default=128, help="longer: cut at right")
    p.add_argument("--chat-kwargs", default="{}", help="JSON: arguments of the chat template")
    p.add_argument("--skip-refused", action="store_true", help="leave out rows that are refused")
    p.add_argument("--tokens-per-microbatch", type=int, help="lower saves memory",
                   default=16384 if DEVICE.type == "cuda" else 1024)
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="of matrix products; weights are fp32 (auto: bf16 where it is faster)")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that --model ships")
    if training:
        p.add_argument("--seed", type=int, default=0, help="seed of all that is drawn by chance")
        p.add_argument("--checkpoint-activations", action="store_true",
                       help="recompute layers in the backward pass: less memory, 1/3 more work")
        p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
        p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    return p


@torch.no_grad()
def load_model(kind, name, args, new=()):
    """(fp32 model, tokenizer) of a run folder, folder or the hub; it may lack the weights `new`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = f"{name}/final" if os.path.isdir(f"{name}/final") else name
    remote = {"trust_remote_code": args.trust_remote_code}
    if not os.path.isdir(path):  # at once: the hub's retries take half a minute
        if path.count("/") > 1 or os.path.isdir(os.path.dirname(path)):
            fail(f"{name}: no such folder")
        print(f"{name}: no such folder; asking the hub")
    try:
        model, found = kind.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, **remote)
        tokenizer = AutoTokenizer.from_pretrained(path, **remote)
        if "MistralCommon" in type(tokenizer).__name__:
            raise ValueError("the package mistral-common hides its chat template: uninstall that")
        ids, rows = torch.arange(8)[None], model.get_input_embeddings().num_embeddings
        long, start = (model.eval()(input_ids=ids[:, :n] % rows, use_cache=False)[0][:, :4]
                       for n in (8, 4))
        lost = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])} - {*new}
        tokenizer.known = min(len(tokenizer), rows)  # the ids that it has and the model embeds
        for wrong, why in (
                (os.path.exists(f"{path}/adapter_config.json"), "it is an adapter"),
                (getattr(model.config, "quantization_config", None) or any(  # or its config is lost
                    "weight_scale" in key or key.endswith(("SCB", "absmax"))
                    for key in found["unexpected_keys"]), "it is quantised"),
                (lost, f"{len(lost)} weights are not there in their shape and by their name (is "
                 f"there a prefix, as module. or base_model.model.?): {sorted(lost)[:2]}"),
                (not (long - start).norm() <= 1e-4 * start.norm(), "its tokens see later ones"),
                (tokenizer.known < 2 or tokenizer.eos_token_id not in range(tokenizer.known),
                 f"of {len(tokenizer)} tokens (the model embeds {rows}) EOS is "
                 f"{tokenizer.eos_token}")):
            if wrong:
                raise ValueError(why)
    except Exception as e:  # many kinds; each means that this model is not to be had
        fail(f"cannot load a model and its tokenizer from {name}: {e}; needed are a causal model, "
             "all its weights as safetensors (a .bin, which can run code, an LFS pointer and "
             "quantised ones are refused; merge an adapter first) and tokenizer files")
    try:
        tokenizer.chat_kwargs = {**json.loads(args.chat_kwargs)}
    except (TypeError, ValueError):
        fail(f"--chat-kwargs {args.chat_kwargs} is not a JSON object")
    choose_precision(model, args)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and args.max_prompt_tokens + args.max_response_tokens > limit:
        fail(f"--max-prompt-tokens + --max-response-tokens exceed the {limit} positions of {name}")
    return model.eval(), tokenizer


def choose_precision(model, args):
    """Decide --precision auto: bf16 on CUDA, and on a CPU that is measured to be faster in it."""
    def seconds(dtype):
        a, b = (torch.ones(n, width, dtype=dtype) for n in (1024, 4 * width))
        return min(timeit.repeat(lambda: a @ b.T, number=1, repeat=4))

    width = getattr(model.config.get_text_config(), "hidden_size", 0)
    if args.precision == "auto" and (DEVICE.type == "cuda" or width < 512):  # casts cost as well
        args.precision = "bf16" if DEVICE.type == "cuda" else "fp32"
    elif args.precision == "auto":
        gain = pooled(torch.tensor(seconds(torch.float32) / seconds(torch.bfloat16))).item() / RANKS
        args.precision = "bf16" if gain > 1.5 else "fp32"
        print(f"bf16 takes 1/{gain:.1f} of the time of fp32 here: --precision {args.precision}")
    autocast.keywords["enabled"] = args.precision == "bf16"


def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention in bf16 on a CPU, as plain products: half the time of the fused kernel there.

    The scores of a row, T x T a head, are kept for the backward pass: not of rows that are long.
    """
    mask, (rows, heads, length, width) = attention_mask, query.shape
    plain = value.dtype == torch.bfloat16 and not value.is_cuda and length <= 1280
    if not plain or mask is None or mask.dtype != torch.bool:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    with torch.autocast("cpu", enabled=False):
        q, k = (x.to(value.dtype) for x in (query, key))  # rotary positions made them fp32
        q = q.reshape(rows, key.shape[1], -1, width)  # of heads that share keys and values
        scores = (q @ k.mT * (scaling or width ** -0.5)).view(rows, heads, length, -1)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
        found = weights.view(*q.shape[:3], -1) @ value
    return found.view(query.shape).transpose(1, 2), None


if AttentionInterface()["sdpa"] is sdpa_attention_forward:
    AttentionInterface.register("sdpa", attend)


def read_jsonl(path, parse=dict, hint="", refused=None):
    """Yield parse(object) of each line of a .jsonl or .jsonl.gz file; what fails is an error, or
    the number of its line joins the set `refused`, whose lines are left out."""
    where = path
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                where = f"{path}:{number}"
                if line.strip() and number not in (refused or ()):
                    try:
                        yield parse(json.loads(line))
                    except Exception:
                        if refused is None:
                            raise
                        refused.add(number)
    except Exception as e:  # no file, a cut gzip, not JSON, whatever a chat template raises
        fail(f"cannot read {where}: {type(e).__name__}: {e}{hint}")


def load_pairs(path, tokenizer, args, sides=("chosen", "rejected"), refused=None):
    """Read pairs as token ids: a list of (prompt, chosen, rejected), each a list of ints.

    Prompt and response are tokenised apart. Over-long prompts lose tokens on the left, over-long
    responses on the right (and so their EOS): counted, printed. Without `sides` the prompt stands
    for them. The numbers of the lines that --skip-refused leaves out join the set `refused`.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    limits = args.max_prompt_tokens, args.max_response_tokens, args.max_response_tokens
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    encode = partial(tokenizer, add_special_tokens=False)
    # SentencePiece puts a space before a text: a response gets a newline instead, which is cut off
    lead = "\n" if tokenizer.tokenize("a")[0][0] in "▁Ġ" else ""
    mark = encode(lead).input_ids
    known = list(range(getattr(tokenizer, "known", len(tokenizer))))  # one object an id: 8 bytes
    pairs, cut_prompts, cut_responses, seen = [], 0, 0, Counter()
    refused = set() if refused is None else refused
    rows = read_jsonl(path, partial(read_pair, tokenizer, turn_end(tokenizer), sides, limits, seen),
                      "; prompt, chosen, rejected of a JSON object a line (no array, CSV, parquet) "
                      "must be texts (tasks.py --text), messages that the chat template takes (a "
                      "side: one reply), or ids of a stream; `tasks.py file` converts some others",
                      refused if args.skip_refused else None)
    while some := list(islice(rows, 4096)):  # the text of no more rows is held
        texts = [lead * (i > 0) + text for pair, end in some if end is not None
                 for i, text in enumerate(pair)]
        encoded = iter(encode(texts).input_ids if texts else [])
        for pair, end in some:
            if end is not None:
                prompt, *responses = islice(encoded, len(pair))
                prompt = [bos, *prompt] if adds_bos and prompt[:1] != [bos] else prompt
                over, kept = max(len(prompt) - limits[0], 0), int(prompt[:1] == [bos])
                prompt = prompt[:kept] + prompt[kept + over:] or [eos]  # to predict from something
                responses = [x[len(mark):] if x[:len(mark)] == mark else encode(text).input_ids
                             for text, x in zip(pair[1:], responses, strict=True)]
                responses = [ids if ids[-1:] == [end] else [*ids, end] for ids in responses]
                cut_prompts += over > 0
                cut_responses += sum(len(ids) > limits[1] for ids in responses)
                pair = prompt, *(ids[:limits[1]] for ids in responses or [prompt] * 2)
            if max(map(max, pair)) >= len(known):
                fail(f"{path}: pair {len(pairs) + 1} has a token that the model does not embed")
            pairs.append(tuple([known[i] for i in ids] for ids in pair))
            seen["have two equal responses"] += pair[1] == pair[2] and bool(sides)
    seen["were refused"] = len(refused)
    if not pairs:
        fail(f"{path}: no pairs in it; {len(refused):,} were refused")
    print(f"{path}: {len(pairs):,} pairs; cut {cut_prompts:,} prompts on the left and "
          f"{cut_responses:,} responses on the right",
          *(f"{count:,} {what}" for what, count in seen.items() if count), sep="; ")
    return pairs


def read_pair(tokenizer, turn, sides, limits, seen, row):
    """Texts of a row, and the id that ends its responses; a stream's ids, and None."""
    if "prompt_ids" in row:
        pair, known = [row[f"{x}_ids"] for x in ("prompt", "chosen", "rejected")], len(tokenizer)
        if not all(0 < len(ids) <= limit and all(type(i) is int and 0 <= i < known for i in ids)
                   for ids, limit in zip(pair, limits, strict=True)):
            raise ValueError("ids must be the tokenizer's, and at most --max-prompt-tokens and "
                             "--max-response-tokens: a stream is never cut")
        return pair, None
    if missing := [x for x in ("prompt", *sides) if x not in row]:
        raise ValueError(f"no {' and no '.join(missing)} among its columns {[*row]}")
    prompt, *replies = pair = [row[x] for x in ("prompt", *sides)]
    (after, tail, end, special), eos = turn, tokenizer.eos_token
    text = json.dumps(pair, ensure_ascii=False).encode().decode()  # no half of a surrogate pair
    seen["hold the text of special tokens"] += bool(special.search(text))
    if isinstance(prompt, str):
        return [prompt, *(x.removesuffix(eos) for x in replies)], tokenizer.eos_token_id
    replies = [[{"role": "assistant", "content": x}] if isinstance(x, str) else x for x in replies]
    if [m for m in sum(replies, prompt[-1:]) if m["role"] == "assistant"] != sum(replies, []):
        raise ValueError("the assistant ends the prompt, or another speaks in a side")
    pair = [chat_text(tokenizer, prompt, add_generation_prompt=True)]
    for reply, in replies:
        answer = reply["content"].removesuffix(tail).removesuffix(eos)
        full = chat_text(tokenizer, [*prompt, {**reply, "content": answer}])
        text = full.removeprefix(pair[0]).removesuffix(after)  # the answer, and what opens it
        if (full != pair[0] + text + after or answer.strip() not in text
                or after.strip() and not tail):
            ours, text = pair[0] + answer + tail, answer
            at = len(os.path.commonprefix([ours, full]))
            if not seen["differ from the template's whole"]:
                print(f"after {ours[:at][-12:]!r} what is sampled has {ours[at:][:12]!r}, the "
                      f"template's whole conversation {full[at:][:12]!r}; see --chat-kwargs")
            seen["differ from the template's whole"] += 1
        thought = (pair[0] + text).rpartition(answer.rpartition("</think>")[2].strip())[0]
        seen["stand inside a thought"] += thought.rfind("<think>") > thought.rfind("</think>")
        pair.append(text + tail)
    return pair, end


def chat_text(tokenizer, messages, **options):
    """Messages through the chat template: none is lost, no thinking, each day 26 July 2024."""
    day = time.strftime("".join(f".replace('%%{c}', '%{c}')" for c in "FdmbBYyAaHMSIpj"),
                        time.gmtime(1721952000))
    same_day = f"{{% macro strftime_now(form) %}}{{{{ form{day} }}}}{{% endmacro %}}\n"
    options = {"enable_thinking": False, "thinking": False} | tokenizer.chat_kwargs | options
    text = tokenizer.apply_chat_template(  # the date by a macro: it takes no function as an option
        messages, chat_template=same_day + tokenizer.get_chat_template(), tokenize=False, **options)
    for m in messages:  # of earlier turns some templates drop the thoughts
        if m["content"].rpartition("</think>")[2].strip() not in text:
            raise ValueError(f"the chat template loses text of the {m['role']}'s message")
    return text


def turn_end(tokenizer):
    """(What the chat template writes after an answer, so much of it as belongs to the response,
    the id that ends it: EOS, else the last special token in it; a pattern of special tokens)."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "forty-two"}]
    special = {i: x.content for i, x in tokenizer.added_tokens_decoder.items() if x.special}
    pattern = re.compile("|".join(map(re.escape, special.values())) or "(?!)")
    after, header, end = "", "", tokenizer.eos_token_id
    with suppress(Exception):  # no template, or one that wants other messages
        after = chat_text(tokenizer, turns).rpartition("forty-two")[2]
        opening = chat_text(tokenizer, turns[:1], add_generation_prompt=True).rpartition("?")[2]
        header = opening[pattern.search(opening).end():]  # some write it unasked, behind an answer
    written = after.removesuffix(header) if header.strip() else after
    found = [i for i in tokenizer(written, add_special_tokens=False).input_ids if i in special]
    end = end if end in found or not found else found[-1]
    tail = "".join(after.partition(special[end])[:2]) if found else ""
    return after, tail, end, pattern


class Scored:
    """A causal model, of whatever family, with a linear score of each token in its head's place."""

    _tied_weights_keys, can_generate = None, classmethod(lambda cls: False)  # without its head

    def __init__(self, config):
        super().__init__(config)
        self.score = torch.nn.Linear(self.get_output_embeddings().in_features, 1, bias=False)
        with suppress(AttributeError):  # BERT's kin also want its bias
            self.set_output_embeddings(None)

    def forward(self, **inputs):
        return self.score(self.base_model(**inputs).last_hidden_state),


def load_preference_model(name, args, kind=None):
    """Load (preference model in fp32, tokenizer); `kind` starts one from a language model.

    A saved one has the weights of a transformers sequence classifier; its config holds the kind.
    """
    def load(path, trust_remote_code, **options):
        remote = {"trust_remote_code": trust_remote_code}
        config = AutoConfig.from_pretrained(path, num_labels=1, **remote)
        config.preference_kind = kind or getattr(config, "preference_kind", None)
        if not config.preference_kind:
            fail(f"{name} is not a preference model; make one with `reward.py train`")
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config, **remote)
        body, causal = plain.base_model_prefix, type(plain)
        return type(causal.__name__, (Scored, causal), {
            "__module__": causal.__module__, "base_model_prefix": body if hasattr(plain, body) else
            "model"}).from_pretrained(path, config=config, **options)  # Llama 4 has another prefix

    model, tokenizer = load_model(SimpleNamespace(from_pretrained=load), name, args,
                                  ["score.weight"] if kind else [])
    if kind:
        torch.nn.init.zeros_(model.score.weight)  # r = 1/2 before the first step
    return model, tokenizer


def load_labeller(name, tokenizer, args):
    """Load a trained preference model that reads a policy's token ids as they are, or a judge.

    That is a user's Python file with a function prefer(prompts, first, second) of lists of texts
    (decoded without special tokens): a finite number a pair, above 0 where the first is better.
    """
    if name.endswith(".py"):
        try:
            spec = importlib.util.spec_from_file_location("judge", name)
            judge = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(judge)
            autocast.keywords["enabled"] = args.precision == "bf16"
            return name, judge.prefer, tokenizer
        except Exception as e:  # anything may happen there
            fail(f"cannot use {name}: {type(e).__name__}: {e}")
    model, own = load_preference_model(name, args)
    if own.get_vocab() != tokenizer.get_vocab() or own.known < tokenizer.known:
        fail(f"{name} has another tokenizer than the policy; token ids go to it as they are, so "
             "train it from a model of the same family, or ask it in a judge.py (README)")
    return halve(model)


@torch.no_grad()
def ask_judge(judge, pairs, _):
    """Margins (B,) by a judge file, and 0; each of several processes asks for a share of them."""
    name, function, tokenizer = judge
    margins, mine = torch.zeros(len(pairs), dtype=torch.float64), pairs[RANK::RANKS]
    texts = [tokenizer.batch_decode(x, skip_special_tokens=True) for x in zip(*mine, strict=True)]
    try:
        margins[RANK::RANKS] = torch.as_tensor(function(*texts) if mine else []).view(len(mine))
    except Exception as e:
        fail(f"{name}: prefer() of {len(mine)} pairs: {type(e).__name__}: {e}")
    return pooled(margins), 0


def finite(margins, pairs):
    """The margins, if they are numbers: NaN would prefer the second."""
    for margin, pair in zip(margins.tolist(), pairs, strict=True):
        if not math.isfinite(margin):
            fail(f"the preference model's margin is {margin} for (prompt, first, second) = {pair}")
    return margins


def halve(model):
    """Move a model to the device, its linear layers in what autocast casts them to (on CUDA bf16).

    The same bits come out at half the memory, with no fp32 weight beside its copy. What the
    embeddings share stays as it is. Such a model is not to be trained.
    """
    embedding, one = model.get_input_embeddings().weight, torch.ones(1, 1, device=DEVICE)
    with autocast():
        dtype = (one @ one).dtype
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            module.to(dtype)
    return model.to(DEVICE)


def mask_for(model, visible, positions):
    """`visible` (B, 1, T, T) as the model takes it: cut to its window, numbers where it adds them.

    Where layers differ it is a dict of their kinds.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else ""]
    masks = {kind: visible for kind in kinds}
    if "sliding_attention" in masks:
        near = positions[:, :, None] - positions[:, None] < window
        masks["sliding_attention"] = visible & near[:, None]
    if config._attn_implementation == "eager":
        masks = {kind: torch.zeros(mask.shape, device=mask.device).masked_fill(
            ~mask, torch.finfo(torch.float32).min) for kind, mask in masks.items()}
    return masks if len(masks) > 1 else masks.popitem()[1]


@torch.no_grad()
def choose_rows(model, pairs, args):
    """Use plain rows where the backbone's attention does not take the mask of one row a pair.

    It does if its hidden states of one row a pair are those of one row a response, on two pairs
    and on a row as long as one can be, so that no window shows later. Its config keeps the choice.
    """
    def hidden(ids, mask=None, positions=None):
        return model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                use_cache=False).last_hidden_state[0]

    sizes, gaps = (args.max_prompt_tokens, args.max_response_tokens, args.max_response_tokens), []
    pool = cycle(i for pair in pairs for ids in pair for i in ids)
    longest = [[*islice(pool, size)] for size in sizes]
    try:
        for prompt, a, b in [*pairs[:2], longest]:
            ids, positions, _, visible, *_ = pack_pairs([(prompt, a, b)], model.device)
            first, second = (hidden(torch.tensor([prompt + y], device=model.device))
                             for y in (a, b))
            alone = torch.cat([first, second[len(prompt):]])
            mask = mask_for(model, visible, positions)
            gaps.append((hidden(ids, mask, positions) - alone).norm() / alone.norm())
        gap = torch.stack(gaps).max().item()  # NaN, if there is one
    except Exception:  # the model takes no such mask
        gap = math.inf
    model.config.plain_rows = bool(pooled(torch.tensor(int(not gap <= 1e-3))))  # all agree
    if model.config.plain_rows:
        print(f"this backbone does not take one row a pair (gap {gap:.2g}): using plain rows")


def assess(model, pairs, tokens, logits_of=preference_logits):
    """How well the model predicts labelled pairs (prompt, chosen, rejected), and how sure it is.

    Accuracy judges both ways (a tie is half right); ece is the expected calibration error of the
    preferred side's probability over 10 bins; order_disagreement the share of unlike pairs whose
    two orders disagree.
    """
    first, second = both_orders(model, pairs, tokens, logits_of)
    chosen = (first + 1 - second) / 2  # probability that the chosen side is better, both ways
    sure, right = torch.maximum(chosen, 1 - chosen), ((first - second).sign() + 1) / 2
    differ = (first - 0.5) * (second - 0.5) * torch.tensor([a != b for _, a, b in pairs]) > 0
    bins = ((sure - 0.5) * 20).long().clamp(max=9)
    ece = sum((bins == b).double().mean() * (sure[bins == b].mean() - right[bins == b].mean()).abs()
              for b in bins.unique())
    return {"accuracy": right.mean().item(), "ece": float(ece),
            "order_disagreement": differ.double().mean().item()}


def finish(args, found, pairs, held_out):
    """The best model becomes final/; assessment.json says how good it is, on how many pairs.

    found: (evaluations, 3) accuracy, ece, order_disagreement on validation pairs; -1: not made.
    """
    pooled(torch.zeros(1))  # none reads the best before it is written
    scores = [score for score in found[:, 0].tolist() if score >= 0]
    best = scores.index(max(scores))  # of equals the first
    done, step = (min(i * args.eval_every, args.steps) for i in (len(scores), best + 1))
    model = load_preference_model(f"{args.out}/best", args)[0].to(DEVICE)
    trained = assess(model, pairs[:2000], args.tokens_per_microbatch)["accuracy"]
    accuracy, ece, disagreement = found[best].tolist()
    if RANK == 0:
        with open(f"{args.out}/assessment.json", "w") as f:
            json.dump({"step": step, "accuracy": accuracy, "ece": ece,
                       "order_disagreement": disagreement, "train_accuracy": trained,
                       "pairs": held_out}, f)
        os.replace(f"{args.out}/best", f"{args.out}/final")
        with suppress(FileNotFoundError):
            os.remove(f"{args.out}/checkpoint.safetensors")
    print(f"{args.out}: {args.kind}, best at step {step} of {done}: validation accuracy "
          f"{accuracy:.3f} of {held_out} pairs (train {trained:.3f}), ECE {ece:.3f}, the two "
          f"orders disagree on {disagreement:.1%}")


# ---- run folder ----------------------------------------------------------------------------------
def open_run(args):
    """Make the run folder; refuse a finished run, and a started one unasked or with other flags."""
    for value in [*vars(args).values()]:  # what a file holds is as much a flag as its name
        for path in filter(os.path.isfile, map(str, value if isinstance(value, list) else [value])):
            with open(path, "rb") as f:
                vars(args)[f"checksum of {path}"] = zlib.crc32(f.read())
    args.script = os.path.basename(__file__)
    os.makedirs(args.out, exist_ok=True)
    if RANK == 0 and os.name == "posix":
        import fcntl
        lock = os.open(f"{args.out}/lock", os.O_RDWR | os.O_CREAT)  # held to the process's end
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"another process is training into {args.out}")
    if os.path.exists(f"{args.out}/final"):
        fail(f"{args.out} is finished; choose another --out, or remove it")
    logs = [f"{args.out}/{name}.jsonl" for name in ("metrics", "samples", "stream")]
    if any(os.path.exists(log) and os.path.getsize(log) for log in logs):
        if not args.resume:
            fail(f"{args.out} exists; go on with --resume, or choose another --out")
        started = next(read_jsonl(f"{args.out}/args.json"), {})
        if args.precision == "auto":  # as it was decided then
            args.precision = started.get("precision")
        free = {"resume", "out", "save_every", "tokens_per_microbatch", "checkpoint_activations"}
        changed = [f"{k} ({started.get(k)}, now {v})" for k, v in vars(args).items()
                   if k not in free and started.get(k) != v]
        if changed:
            fail(f"--resume: {args.out} was started with another {', '.join(changed)}")
    if args.warmup > args.steps:
        print(f"--warmup {args.warmup} is longer than the run: --lr will not be reached")
    if getattr(args, "baseline", None) and not args.gold:
        print("--baseline has no effect without --gold")


def training_steps(args, model, optimizer, evaluate=None, **kept):
    """Yield (step, a dict for its metrics) from the last checkpoint on; log, evaluate and save.

    A checkpoint holds weights, Adam's moments, the tensors of `kept` and the lengths of the logs,
    and no generator: every random draw is seeded by the seed and its step or epoch.
    """
    path, state, saved = f"{args.out}/checkpoint.safetensors", dict(kept), {"done": 0}
    for name, weight in model.named_parameters():
        optimizer.state[weight] = moments = {
            "step": torch.zeros((), device=weight.device),
            "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state |= {f"{k}.{name}": x for k, x in {"weight": weight.detach(), **moments}.items()}
    if os.path.exists(path):
        try:
            with safe_open(path, "pt") as f:
                saved = {name: int(value) for name, value in f.metadata().items()}
                for name, tensor in state.items():
                    found = f.get_tensor(name)
                    if hasattr(tensor, "placements"):  # this process has a share of it
                        found = dist.tensor.distribute_tensor(
                            found, tensor.device_mesh, tensor.placements, src_data_rank=None)
                    tensor.copy_(found)
        except (SafetensorError, RuntimeError, AttributeError) as e:
            fail(f"{path} is damaged or of another model ({e}); remove {args.out} to start over")
    logs = {name: f"{args.out}/{name}.jsonl" for name in ("metrics", "samples", "stream")}
    log = open(logs["metrics"] if RANK == 0 else os.devnull, "a", buffering=1)
    if RANK == 0 and not saved["done"]:  # all that decides the run, also what `auto` became
        device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
        with open(f"{args.out}/args.json.tmp", "w") as f:
            json.dump(vars(args) | {"torch": torch.__version__, "device": device,
                                    "transformers": transformers.__version__}, f)
        os.replace(f"{args.out}/args.json.tmp", f"{args.out}/args.json")
    for name in [x for x in logs if RANK == 0 and os.path.exists(logs[x])]:
        if os.path.getsize(logs[name]) < saved.get(name, 0):
            fail(f"{logs[name]} is shorter than it was; mend it, or remove {args.out}")
        os.truncate(logs[name], saved.get(name, 0))  # a killed run wrote more than it saved
    pooled(torch.zeros(1))  # the others may read them now
    if evaluate and not saved["done"]:  # where training starts from: KL 0, accuracies 1/2
        log.write(json.dumps({"step": 0, **evaluate(0)}) + "\n")
    caught = []  # SIGINT or SIGTERM: the step is finished and saved first
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    bar = tqdm(range(1, args.steps + 1)[saved["done"]:], args.out, args.steps,
               initial=saved["done"], disable=RANK > 0 or None)
    for step in bar:
        metrics, began = {"step": step}, time.perf_counter()
        yield step, metrics
        metrics["seconds"] = time.perf_counter() - began
        metrics["tokens_per_s"] = round(metrics.pop("tokens") / metrics["seconds"])
        if evaluate and (step % args.eval_every == 0 or step == args.steps):
            metrics |= evaluate(step)
        log.write(json.dumps(metrics) + "\n")
        bar.set_postfix({k: f"{metrics[k]:.3g}" for k in metrics if k.endswith((
            "loss", "accuracy", "accuracies", "ties", "win_rate", "tokens_per_s"))})
        stop = int(pooled(torch.tensor(len(caught))))  # one process may be the first to know
        if step < args.steps and (stop or step % args.save_every == 0):
            tensors, sizes = gathered(state), {"done": step}
            sizes |= {x: os.path.getsize(logs[x]) for x in logs if os.path.exists(logs[x])}
            if RANK == 0:
                save_file(tensors, f"{path}.tmp", {name: str(size) for name, size in sizes.items()})
                os.replace(f"{path}.tmp", path)  # swapped in whole
            pooled(torch.zeros(1))  # were another to end now, torchrun would end the first
            if stop:
                number = max(caught, default=signal.SIGTERM)
                fail(f"{signal.Signals(number).name}: saved step {step} to {path}; --resume goes "
                     "on", 128 + number)


def save_model(folder, model, tokenizer):
    """Write a plain Hugging Face folder; of several processes the first writes."""
    state = {k: v for k, v in model.state_dict().items() if not hasattr(v, "full_tensor")}
    weights = gathered(dict(model.named_parameters()) | state)  # what is tied comes once
    if RANK == 0:
        model.save_pretrained(folder, state_dict=weights if RANKS > 1 else None)
        tokenizer.save_pretrained(folder)


# ---- many processes: torchrun --nproc-per-node 8 dpo.py ... --------------------------------------
def shard(model, logps_of, recompute):
    """Share a model out (FSDP2): a layer is whole only while it runs. Returns its logps_of.

    All processes must call that equally often: one without pairs computes a stand-in. `recompute`:
    of a layer keep only what goes into it, and run it again in the backward pass.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)][::-1]
    for layer in layers if recompute else ():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                preserve_rng_state=False)
    if RANKS == 1:
        return logps_of
    from torch.distributed import fsdp  # takes half a second
    mesh = dist.init_device_mesh(DEVICE.type, (RANKS,))
    for module in [*layers, model]:  # what is inside another comes first
        dtype = torch.bfloat16 if autocast.keywords["enabled"] and module is not model else None
        fsdp.fully_shard(module, mesh=mesh, reshard_after_forward=True,
                         mp_policy=fsdp.MixedPrecisionPolicy(
                             dtype, torch.float32, cast_forward_inputs=False))
        module.set_gradient_divide_factor(1.0)  # gradients are summed over the processes
        module.set_force_sum_reduction_for_comms(True)
    model.logps = partial(logps_of, model)
    fsdp.register_fsdp_forward_method(model, "logps")
    return lambda model, pairs: model.logps(pairs or [([0], [0], [0])])[..., :len(pairs)]


def pooled(tensor):
    """Sum a tensor, in place, over the processes, each of which has filled in what is its share."""
    if RANKS > 1:
        dist.all_reduce(tensor)
    return tensor


def whole(tensor):
    """A tensor of a sharded model or its optimizer, gathered: all processes must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors):
    """The tensors of a dict, whole; of several processes the first has them, on the CPU."""
    every = ((name, whole(tensor)) for name, tensor in tensors.items())
    return tensors if RANKS == 1 else {name: x.cpu() for name, x in every if RANK == 0}


# ---- errors --------------------------------------------------------------------------------------
def fail(message, status=2):
    """Print one line on stderr and exit; status 2 says that the user's input is at fault."""
    if RANK > 0 and status < 128:  # what all find out the first says, whose end ends the others
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
    if RANK == 0 or status < 128:  # a signal is said once
        print("error:", *str(message).split(), file=sys.stderr)
    raise SystemExit(status)


def guard(main, args):
    """Run main(args); flags out of range and what the machine lacks are one line and status 2."""
    for name, value in vars(args).items():  # a new flag that may be 0 has to be named here
        least = 0 if name in ("seed", "warmup", "shuffle_window", "sft_weight") else 1e-12
        if type(value) in (int, float) and not least <= value < 1 << 31:
            fail(f"--{name.replace('_', '-')} {value} is out of range")
    try:
        if RANKS > 1:
            if DEVICE.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo")
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        main(args)
        if RANKS > 1:
            dist.barrier()  # none leaves before the first has written all
            dist.destroy_process_group()
    except KeyboardInterrupt:  # before the first step; from there on signals are caught
        fail("interrupted; what was saved before is whole", 130)
    except (OSError, SafetensorError) as e:  # a full disk, say
        fail(f"{getattr(e, 'filename', None) or args.out}: {e}; what was saved before is whole")
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(e):
            fail("out of memory; lower --tokens-per-microbatch or --max-prompt-tokens")
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            fail("another process of the run has ended; --resume goes on from the checkpoint", 1)
        raise


if __name__ == "__main__":
    guard(main, parse_args())
