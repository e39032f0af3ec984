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
import json
import math
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer


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
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--seed", type=int, default=0, help="seed of the order of pairs and sides")
    label = commands.add_parser("label", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    label.add_argument("--model", required=True, help="preference model: run folder of `train`")
    label.add_argument("--data", required=True, help="pairs to label (jsonl, jsonl.gz)")
    label.add_argument("--out", required=True, help="file to write (jsonl)")
    for p in (train, label):
        p.add_argument("--max-prompt-tokens", type=int, default=896, help="the left is cut")
        p.add_argument("--max-response-tokens", type=int, default=128, help="the right is cut")
        p.add_argument("--tokens-per-microbatch", type=int, help="lower saves memory",
                       default=16384 if torch.cuda.is_available() else 1024)
        p.add_argument("--trust-remote-code", action="store_true",
                       help="run code that --model ships")
    return parser.parse_args(argv)


def fail(message):
    """Print one line on stderr and exit with status 2: the user's input is at fault."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def guard(main, args):
    """Run main(args); flags out of range and what the machine lacks are one line and status 2."""
    for name, value in vars(args).items():
        least = 0 if name in ("seed", "warmup", "shuffle_window", "sft_weight") else 1e-12
        if type(value) in (int, float) and not least <= value < 1 << 31:
            fail(f"--{name.replace('_', '-')} {value} is out of range")
    try:
        main(args)
    except KeyboardInterrupt:  # before the first step; from there on signals are caught
        print("interrupted; what was saved before is whole", file=sys.stderr)
        raise SystemExit(130) from None
    except (RuntimeError, MemoryError) as e:  # on CPU torch says "can't allocate memory"
        kinds = torch.OutOfMemoryError, MemoryError
        if not isinstance(e, kinds) and "allocate memory" not in str(e):
            raise
        fail("out of memory; lower --tokens-per-microbatch or --max-prompt-tokens")
    except (OSError, SafetensorError) as e:  # a full disk, say
        fail(f"{getattr(e, 'filename', None) or args.out}: {e}; what was saved before is whole")


def read_jsonl(path):
    """Yield ("path:line", object) of a .jsonl or .jsonl.gz file; what is malformed is an error."""
    number = 0
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8-sig") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"not a JSON object: {line.strip()[:40]!r}")
                    yield f"{path}:{number}", row
    except OSError as e:
        fail(f"cannot read {path}: {e.strerror or e}")
    except (EOFError, ValueError) as e:  # cut gzip, not JSON, not UTF-8
        fail(f"{path}:{number}: malformed line ({e}); mend or remove it")


def chat_text(tokenizer, messages, **options):
    """Messages through the chat template; its date (Llama 3.2 has one) is the same every day."""
    same_day = "{% macro strftime_now(form) %}26 Jul 2024{% endmacro %}\n"
    return tokenizer.apply_chat_template(
        messages, chat_template=same_day + tokenizer.get_chat_template(), tokenize=False, **options)


def turn_end(tokenizer):
    """Id of the token that ends a turn in the chat template (Gemma's <end_of_turn>), else EOS."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "answer"}]
    try:
        after = chat_text(tokenizer, turns).rpartition("answer")[2]
    except Exception:  # no template, or one that wants other messages
        after = ""
    ids = tokenizer(after, add_special_tokens=False).input_ids
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), tokenizer.eos_token_id)


def read_pairs(path, tokenizer, max_prompt, max_response):
    """Yield a file's pairs: (prompt, chosen, rejected, what ends a response), or a stream's ids.

    The first three are text, the last an id: the end of a turn where the prompt is a list of
    messages, else EOS. What is malformed is an error.
    """
    turn = turn_end(tokenizer)
    for where, row in read_jsonl(path):
        try:
            if "prompt_ids" in row:
                ids = row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
                if not all(side and all(type(i) is int and 0 <= i < len(tokenizer) for i in side)
                           for side in ids):
                    fail(f"{where}: ids must be lists of tokens that the tokenizer has")
                prompt, *responses = map(len, ids)
                if prompt > max_prompt or max(responses) > max_response:
                    fail(f"{where}: {prompt} + {max(responses)} ids exceed --max-prompt-tokens or "
                         "--max-response-tokens; a stream is never cut, so raise them")
                yield ids
                continue
            prompt, end = row["prompt"], tokenizer.eos_token_id
            if not isinstance(prompt, str):
                if not tokenizer.chat_template:
                    fail(f"{where}: the prompt is a list of messages and the tokenizer has no chat "
                         "template; use a chat model, or write text (tasks.py --text)")
                if not all(isinstance(m[key], str) for m in prompt for key in ("role", "content")):
                    raise TypeError("a message has a role and a content")
                prompt, end = chat_text(tokenizer, prompt, add_generation_prompt=True), turn
            texts = prompt, *(side if isinstance(side, str) else side[-1]["content"]
                              for side in (row["chosen"], row["rejected"]))
            "".join(texts).encode()
        except KeyError as key:
            fail(f"{where}: missing key {key}; expected prompt, chosen and rejected")
        except UnicodeEncodeError:
            fail(f"{where}: text with half a surrogate pair, which has no UTF-8; mend the row")
        except Exception as e:  # chat templates raise what they like: an unknown role, say
            fail(f"{where}: prompt, chosen and rejected must be strings or lists of messages that "
                 f"the chat template takes ({e})")
        yield *texts, end


def load_pairs(path, tokenizer, max_prompt, max_response):
    """Read pairs as token ids: a list of (prompt, chosen, rejected), each a list of ints.

    Prompt and response are tokenised apart; BOS at most once, EOS (of messages the token that ends
    a turn) exactly once. Over-long prompts lose tokens on the left, over-long responses on the
    right (and so their EOS): counted, printed. A stream's ids ("prompt_ids", ...) are kept.
    """
    bos, eos, turn = tokenizer.bos_token_id, tokenizer.eos_token_id, turn_end(tokenizer)
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    shared = list(range(len(tokenizer)))  # an id is one object wherever it stands: 8 bytes, not 36
    pairs, cut_prompts, cut_responses, kinds = [], 0, 0, set()
    rows = read_pairs(path, tokenizer, max_prompt, max_response)
    while some := list(islice(rows, 4096)):  # of more rows than these no text is held
        kinds.update(map(len, some))
        if kinds == {3}:  # a stream
            pairs += [tuple([shared[i] for i in side] for side in pair) for pair in some]
            continue
        if len(kinds) > 1:
            fail(f"{path}: text pairs and token ids are mixed")
        ids = tokenizer([text for *texts, _ in some for text in texts],
                        add_special_tokens=False).input_ids
        for i, (*_, end) in enumerate(some):
            prompt, *responses = ids[3 * i:3 * i + 3]
            start = [bos] if adds_bos or prompt[:1] == [bos] else []
            prompt = prompt[1:] if start and prompt[:1] == [bos] else prompt
            room = max_prompt - len(start)
            cut_prompts += len(prompt) > room
            prompt = [shared[i] for i in start + prompt[max(len(prompt) - room, 0):]]
            responses = [[shared[i] for i in response if i != eos and i != turn] + [end]
                         for response in responses]
            cut_responses += sum(len(response) > max_response for response in responses)
            pairs.append((prompt or [eos],  # something must come first
                          *(response[:max_response] for response in responses)))
    if not pairs:
        fail(f"{path}: no pairs in it")
    print(f"{path}: {len(pairs):,} pairs; cut {cut_prompts:,} prompts on the left and "
          f"{cut_responses:,} responses on the right")
    return pairs


def make_batches(steps, batch_size, rows, shuffle_window, seed):
    """Row numbers of each step's batch: epochs follow each other, no row is left out.

    Rows are shuffled within windows of so many batches: 0 is the whole file, 1 keeps the order.
    """
    window = 1 if shuffle_window == 1 else min(shuffle_window * batch_size or rows, rows)
    order = []
    for epoch in range(-(-steps * batch_size // rows)):
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for start in range(0, rows, window):
            size = min(window, rows - start)
            order += [start + i for i in torch.randperm(size, generator=generator).tolist()]
    return [order[i * batch_size:(i + 1) * batch_size] for i in range(steps)]


def micro_batches(rows, tokens, extra=0, padding=0.2):
    """Split a batch into lists of its indices, shortest rows first.

    A row is some lists of ids, its length theirs together and `extra`. Rows of one micro-batch are
    of similar lengths: at most `tokens` in all when padded, at most a share `padding` of it.
    """
    lengths = [sum(map(len, row)) + extra for row in rows]
    groups, group, real = [], [], 0
    for i in sorted(range(len(rows)), key=lengths.__getitem__):
        padded, real = (len(group) + 1) * lengths[i], real + lengths[i]
        if group and padded > min(tokens, real / (1 - padding)):
            groups.append(group)
            group, real = [], lengths[i]
        group.append(i)
    return [*groups, group] if group else []


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
    rows = []
    for prompt, chosen, rejected in pairs:
        p, c, r = len(prompt), len(chosen), len(rejected)
        rows.append(torch.tensor([prompt + chosen + rejected, [*range(p + c), *range(p, p + r)],
                                  [1] * p + [2] * c + [3] * r]).T)
    ids, positions, segments = pad_sequence(rows, batch_first=True).unbind(-1)  # each (B, T)
    query, key = segments[:, None, :, None], segments[:, None, None, :]
    causal = torch.ones(2 * ids.shape[1:], dtype=torch.bool).tril()
    visible = causal & ((key == 1) | (key == query))
    row, column = (segments > 1).nonzero(as_tuple=True)
    prompt = (segments == 1).sum(1)[row]
    before = torch.where(positions[row, column] == prompt, prompt, column) - 1
    sources = row * ids.shape[1] + before
    owners = row + len(pairs) * (segments[row, column] - 2)
    return [x.to(device) for x in (
        ids, positions, segments, visible, sources, ids[row, column], owners)]


def check_lengths(model, args):
    """Refuse lengths that the model's positions cannot hold."""
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if args.max_prompt_tokens + args.max_response_tokens > limit:
        fail(f"--max-prompt-tokens {args.max_prompt_tokens} + --max-response-tokens "
             f"{args.max_response_tokens} exceed the model's {limit} positions; lower one")


def autocast(device):
    """bf16 on CUDA, over fp32 master weights; plain fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def optimizer_step(model, optimizer, lr, what):
    """Clip the gradient to norm 1 and update; stop before the weights move if it is not finite."""
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if not torch.isfinite(grad_norm):
        fail(f"{what}: the loss or its gradient is not finite; neither the weights nor the last "
             "checkpoint were touched. Look at those rows, or start again with a lower --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm.item()


def open_run(args):
    """Make the run folder and args.json; refuse a finished run, and a started one unasked."""
    if os.path.exists(f"{args.out}/final"):
        fail(f"{args.out} is finished; choose another --out, or remove it")
    if os.path.exists(f"{args.out}/metrics.jsonl") and not args.resume:
        fail(f"{args.out} exists; go on with --resume, or choose another --out")
    record = {"script": os.path.basename(__file__), **vars(args)}
    if os.path.exists(f"{args.out}/metrics.jsonl"):
        (_, started), = read_jsonl(f"{args.out}/args.json")
        free = {"resume", "out", "save_every", "tokens_per_microbatch"}
        changed = [k for k, v in record.items() if k not in free and started.get(k) != v]
        if changed:
            fail(f"--resume: {args.out} was started with another {', '.join(changed)}")
    os.makedirs(args.out, exist_ok=True)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                cwd=os.path.dirname(os.path.abspath(__file__))).stdout.strip()
    except OSError:  # no git here
        commit = ""
    record |= {"commit": commit, "torch": torch.__version__,
               "transformers": transformers.__version__,
               "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    with open(f"{args.out}/args.json.tmp", "w") as f:
        f.write(json.dumps(record) + "\n")
    os.replace(f"{args.out}/args.json.tmp", f"{args.out}/args.json")


def training_state(model, optimizer):
    """All that a checkpoint holds, by name, in memory shared with the model and the optimizer.

    Nothing else needs saving: every random draw is seeded by the seed and its step or epoch.
    """
    state = {"done": torch.tensor(0)}
    for name, weight in model.named_parameters():
        moments = {"step": torch.zeros((), device=weight.device),
                   "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        optimizer.state[weight] = moments
        state |= {f"{k}.{name}": x for k, x in {"weight": weight.detach(), **moments}.items()}
    return state


def save_checkpoint(path, state, done):
    """Write a training state after `done` steps to one safetensors file, swapped in whole."""
    state["done"].fill_(done)
    save_file(state, path + ".tmp")
    os.replace(path + ".tmp", path)


def load_checkpoint(path, state):
    """Copy into a training state what was saved, if anything; returns the steps done so far."""
    try:
        if os.path.exists(path):
            with safe_open(path, "pt") as f:
                for name, tensor in state.items():
                    tensor.copy_(f.get_tensor(name))
    except (SafetensorError, RuntimeError) as e:
        fail(f"{path} is damaged or of another model ({e}); remove the run folder to start over")
    return int(state["done"])


def cut_jsonl(path, step):
    """Cut a file of {"step": ...} rows after `step`: a killed run wrote more than it saved."""
    kept = []
    with open(path, "ab+") as f:  # makes an empty one at the first start
        f.seek(0)
        try:
            for line in f:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                kept.append(len(line))
        except (ValueError, KeyError, TypeError):
            fail(f"{path}:{len(kept) + 1}: malformed line; mend it, or remove the run folder")
    os.truncate(path, sum(kept))


def append_jsonl(path, rows):
    """Append rows to a JSON-lines file."""
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def save_final(model, tokenizer, out):
    """Write final/, whole or not at all, and drop the checkpoint."""
    model.save_pretrained(f"{out}/final.tmp")
    tokenizer.save_pretrained(f"{out}/final.tmp")
    os.replace(f"{out}/final.tmp", f"{out}/final")
    if os.path.exists(f"{out}/checkpoint.safetensors"):
        os.remove(f"{out}/checkpoint.safetensors")


def catch_signals():
    """After SIGINT or SIGTERM the returned list is not empty: save and stop at the step's end."""
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: caught.append(number))
    return caught


# ---- the preference model ------------------------------------------------------------------------


def load_preference_model(name, device, trust_remote_code=False, kind=None):
    """Load (preference model in fp32, tokenizer); `kind` starts one from a language model.

    A saved one is a transformers sequence classifier with one label; its config holds the kind.
    """
    path = os.path.join(name, "final") if os.path.isdir(os.path.join(name, "final")) else name
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype=torch.float32, use_safetensors=True,
            trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as e:  # many kinds; each means that this model is not to be had
        fail(f"cannot load a model from {name}: {str(e).strip().splitlines()[0][:200]}")
    if len(tokenizer) < 2 or tokenizer.eos_token_id is None:
        fail(f"{name} has no tokenizer with an EOS token; save one beside the model")
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        fail(f"{name}: the tokenizer has {len(tokenizer)} tokens, the model embeds only "
             f"{model.get_input_embeddings().num_embeddings}")
    if kind:
        model.config.preference_kind = kind
        torch.nn.init.zeros_(model.score.weight)  # r = 1/2 before the first step
    elif not hasattr(model.config, "preference_kind"):
        fail(f"{name} is not a preference model; make one with `reward.py train`")
    return model.to(device).eval(), tokenizer


def load_labeller(name, tokenizer, device, trust_remote_code):
    """Load a trained preference model that reads a policy's token ids as they are."""
    model, own = load_preference_model(name, device, trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        fail(f"{name} has another tokenizer than the policy; token ids go to it as they are, so "
             "train it from a model of the same family")
    return halve(model)


def halve(model):
    """Freeze a model and hold its linear layers in what autocast casts them to (on CUDA bf16).

    The same bits come out at half the memory, with no fp32 weight beside its copy. What the
    embeddings share stays as it is.
    """
    device, embedding = model.device.type, model.get_input_embeddings().weight
    with autocast(model.device):
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    for module in model.modules() if dtype else ():
        if isinstance(module, torch.nn.Linear) and module.weight is not embedding:
            module.to(dtype)
    return model.requires_grad_(False)


SCORE_SCALE = 32  # a mean moves as many times slower than a sum: without it, 1 to 2% less accurate


def preference_logits(model, pairs):
    """Log-odds (B,) that the first response of each (prompt, first, second) is the better one."""
    ids, positions, segments, visible, *_ = pack_pairs(pairs, model.device)
    if model.config.preference_kind == "pairwise":
        visible = torch.ones_like(visible).tril()  # the second response also sees the first
    hidden = model.base_model(input_ids=ids, attention_mask=visible, position_ids=positions,
                              use_cache=False).last_hidden_state  # (B, T, D)
    scores = model.score(hidden).squeeze(-1).float()  # (B, T)
    first, second = ((scores * (segments == side)).sum(1) / (segments == side).sum(1).clamp(1)
                     for side in (2, 3))
    return SCORE_SCALE * (first - second)


def swap(pairs):
    """The same pairs with the two responses exchanged."""
    return [(prompt, second, first) for prompt, first, second in pairs]


@torch.no_grad()
def prefer(model, pairs, tokens=8192):
    """Margins (B,) in [-1, 1] = r(x, y1, y2) - r(x, y2, y1): y1 is preferred iff above 0.

    pairs: (prompt, y1, y2) token ids; `tokens` bounds a micro-batch. Swapping y1 and y2 flips the
    sign, so that no position bias is left; two equal responses have margin 0.
    """
    margins = torch.zeros(len(pairs), dtype=torch.float64)
    for rows in micro_batches(pairs, tokens):
        batch = [pairs[i] for i in rows]
        with autocast(model.device):
            first = preference_logits(model, batch).double().sigmoid()
            if model.config.preference_kind == "pointwise":
                second = 1 - first
            else:
                second = preference_logits(model, swap(batch)).double().sigmoid()
        margins[rows] = (first - second).cpu()
    return margins.masked_fill(torch.tensor([a == b for _, a, b in pairs], dtype=torch.bool), 0)


@torch.no_grad()
def check_mask(model, pairs):
    """Refuse a backbone whose attention does not take the mask of one row a pair.

    Scores by random weights of one row a pair against one row a response, on two pairs and the
    longest one, where a sliding window would show.
    """
    kind, weight = model.config.preference_kind, model.score.weight.data
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model.config.preference_kind = "pointwise"
    model.score.weight.data = noise.to(weight) / weight.shape[1] ** 0.5

    def alone(prompt, response):
        ids = torch.tensor([prompt + response], device=model.device)
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return SCORE_SCALE * model.score(hidden)[0, len(prompt):].mean()

    gap = 0.0
    try:
        for prompt, a, b in [*pairs[:2], max(pairs, key=lambda pair: sum(map(len, pair)))]:
            scores = alone(prompt, a), alone(prompt, b)
            off = (preference_logits(model, [(prompt, a, b)]) - (scores[0] - scores[1])).abs()
            gap = max(gap, (off / (1 + max(x.abs() for x in scores))).item())
    except Exception:  # the model takes no such mask
        gap = math.inf
    model.config.preference_kind, model.score.weight.data = kind, weight
    if gap > 1e-3:
        fail(f"this backbone's attention does not take one row a pair (gap {gap:.2g}); use another")


@torch.no_grad()
def assess(model, pairs, tokens):
    """How well the model predicts labelled pairs (prompt, chosen, rejected), and how sure it is.

    Accuracy judges both ways; ece is the expected calibration error of the probability of the
    preferred side over 10 bins; order_disagreement the share of pairs whose two orders disagree.
    """
    first, second = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for rows in micro_batches(pairs, tokens):
        batch = [pairs[i] for i in rows]
        with autocast(model.device):
            first[rows] = preference_logits(model, batch).sigmoid().cpu()  # r(x, y_w, y_l)
            second[rows] = preference_logits(model, swap(batch)).sigmoid().cpu()  # r(x, y_l, y_w)
    chosen = (first + 1 - second) / 2  # probability that the chosen side is better, both ways
    sure, right = torch.maximum(chosen, 1 - chosen), (chosen > 0.5).float()
    bins = ((sure - 0.5) * 20).long().clamp(max=9)
    ece = sum((bins == b).float().mean() * (sure[bins == b].mean() - right[bins == b].mean()).abs()
              for b in bins.unique())
    return {"accuracy": right.mean().item(), "ece": float(ece),
            "order_disagreement": ((first > 0.5) == (second > 0.5)).float().mean().item()}


def train(args):
    """Maximum likelihood on labelled pairs; stops where validation accuracy levels off."""
    open_run(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_preference_model(args.model, device, args.trust_remote_code, args.kind)
    check_lengths(model, args)
    pairs = load_pairs(args.data, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    held_out = max(1, min(2000, len(pairs) // 20))
    if args.validation:
        validation = load_pairs(args.validation, tokenizer, args.max_prompt_tokens,
                                args.max_response_tokens)
    elif len(pairs) > held_out:
        pairs, validation = pairs[:-held_out], pairs[-held_out:]
    else:
        fail(f"{args.data}: one pair cannot be split into training and validation")
    check_mask(model, pairs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    state = training_state(model, optimizer)
    weights = {k: x for k, x in state.items() if k == "done" or k.startswith("weight.")}
    batches = make_batches(args.steps, args.batch_size, len(pairs), 0, args.seed)
    save_path, best_path = f"{args.out}/checkpoint.safetensors", f"{args.out}/best.safetensors"
    start = load_checkpoint(save_path, state)
    cut_jsonl(f"{args.out}/metrics.jsonl", start)
    history = [row["validation/accuracy"] for _, row in read_jsonl(f"{args.out}/metrics.jsonl")
               if "validation/accuracy" in row]
    caught, quiet = catch_signals(), not sys.stderr.isatty()
    bar = tqdm(range(start, args.steps), "reward", args.steps, initial=start, disable=quiet)
    done = start
    for step in bar:
        if history and history[::-1].index(max(history)) >= args.patience:
            break  # it has levelled off
        done, began = step + 1, time.perf_counter()
        rows = batches[step]
        coin = torch.Generator().manual_seed(1_000_003 * args.seed + step)
        flip = torch.randint(2, (len(rows),), generator=coin).tolist()
        batch = [swap([pairs[i]])[0] if f else pairs[i] for i, f in zip(rows, flip, strict=True)]
        loss, right = 0.0, 0
        for group in micro_batches(batch, args.tokens_per_microbatch):
            sign = torch.tensor([1.0 - 2 * flip[i] for i in group], device=device)
            with autocast(device):
                logits = sign * preference_logits(model, [batch[i] for i in group])
            nll = F.softplus(-logits).sum() / len(batch)  # - log r of the right order
            nll.backward()
            loss, right = loss + nll.item(), right + (logits > 0).sum().item()
        lr = args.lr * min(1.0, done / max(args.warmup, 1))
        grad_norm = optimizer_step(model, optimizer, lr, f"{args.out}: step {done}, rows {rows}")
        tokens = sum(map(len, sum(batch, ())))
        metrics = {"step": done, "loss": loss, "accuracy": right / len(batch),
                   "grad_norm": grad_norm, "lr": lr,
                   "tokens_per_s": round(tokens / (time.perf_counter() - began))}
        if done % args.eval_every == 0 or done == args.steps:
            found = assess(model, validation, args.tokens_per_microbatch)
            metrics.update({f"validation/{k}": v for k, v in found.items()})
            if found["accuracy"] > max(history, default=-1):
                save_checkpoint(best_path, weights, done)
            history.append(found["accuracy"])
        append_jsonl(f"{args.out}/metrics.jsonl", [metrics])
        bar.set_postfix({k: f"{metrics[k]:.3g}" for k in ("loss", "accuracy", "validation/accuracy",
                                                         "tokens_per_s") if k in metrics})
        if done < args.steps and (caught or done % args.save_every == 0):
            save_checkpoint(save_path, state, done)
            if caught:
                print(f"{signal.Signals(caught[0]).name}: saved step {done} to {save_path}; "
                      "--resume goes on", file=sys.stderr)
                raise SystemExit(128 + caught[0])
    best = load_checkpoint(best_path, weights)
    found = {"step": best, **assess(model, validation, args.tokens_per_microbatch)}
    found["train_accuracy"] = assess(model, pairs[:2000], args.tokens_per_microbatch)["accuracy"]
    with open(f"{args.out}/assessment.json", "w") as f:
        json.dump(found, f)
    save_final(model, tokenizer, args.out)
    os.remove(best_path)
    print(f"{args.out}: {args.kind}, best at step {best} of {done}: validation accuracy "
          f"{found['accuracy']:.3f} (train {found['train_accuracy']:.3f}), ECE {found['ece']:.3f}, "
          f"the two orders disagree on {found['order_disagreement']:.1%}")


def label(args):
    """Write the pairs with chosen and rejected as the model prefers them; report the flips."""
    if os.path.exists(args.out):
        fail(f"{args.out} exists; choose another --out, or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_preference_model(args.model, device, args.trust_remote_code)
    halve(model)
    check_lengths(model, args)
    pairs = load_pairs(args.data, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    margins, chunk = [], 4096
    for i in tqdm(range(0, len(pairs), chunk), "label", disable=not sys.stderr.isatty()):
        margins += prefer(model, pairs[i:i + chunk], args.tokens_per_microbatch).tolist()
    flips, ties = sum(m < 0 for m in margins), sum(m == 0 for m in margins)
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".tmp", "w", encoding="utf-8") as f:
        for (_, row), margin in zip(read_jsonl(args.data), margins, strict=True):
            chosen, rejected = (s + "_ids" * ("chosen_ids" in row) for s in ("chosen", "rejected"))
            if margin < 0:
                row[chosen], row[rejected] = row[rejected], row[chosen]
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: {len(pairs):,} pairs, {flips:,} labels flipped ({flips / len(pairs):.1%}), "
          f"{ties:,} ties kept")


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train(args) if args.command == "train" else label(args)


if __name__ == "__main__":
    guard(main, parse_args())
