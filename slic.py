"""Sequence Likelihood Calibration (SLiC, arXiv:2305.10425): learn from preference pairs, offline.

    loss = max(0, 1 - beta h),
    h = [log pi(y_w|x) - log ref(y_w|x)] - [log pi(y_l|x) - log ref(y_l|x)]

    python slic.py --model runs/toy/sft --data data/toy/golden.jsonl --out runs/toy/slic

This is the form with a reference (GPO, arXiv:2402.05749). SLiC-HF as published is --no-reference
with --sft-weight, which adds -weight * log pi(y_w|x).

Copy this file anywhere: it imports nothing of ours (only with --gold gold_eval.py and reward.py).
The reference is the policy as it was at the start; log-probs are summed over response tokens, EOS
included. Dropout stays off. Shapes: B pairs, T tokens a row, N response tokens, V vocabulary.

MIT licence. `diff slic.py dpo.py` shows another loss, `diff slic.py online_rlhf.py` on-policy data.
"""

import argparse
import copy
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", required=True, help="start and reference: run folder, folder or hub")
    p.add_argument("--data", required=True, help="pairs, or a stream of token ids (jsonl[.gz])")
    p.add_argument("--out", required=True, help="run folder to write")
    p.add_argument("--steps", type=int, default=4000, help="gradient steps")
    p.add_argument("--batch-size", type=int, default=32, help="prompts (one pair each) a step")
    p.add_argument("--lr", type=float, default=1e-5, help="learning rate, constant after warm-up")
    p.add_argument("--warmup", type=int, default=100, help="steps of linear warm-up")
    p.add_argument("--beta", type=float, default=0.1, help="larger keeps closer to the reference")
    p.add_argument("--sft-weight", type=float, default=0.0, help="of the cross-entropy on chosen")
    p.add_argument("--no-reference", action="store_true", help="log-probs in place of log-ratios")
    p.add_argument("--order", choices=["shuffled", "kept"], default="shuffled",
                   help="order of the rows of --data")
    p.add_argument("--shuffle-window", type=int, default=0,
                   help="shuffle within windows of this many batches (0: the whole file, 1: kept)")
    p.add_argument("--max-prompt-tokens", type=int, default=896, help="the left is cut")
    p.add_argument("--max-response-tokens", type=int, default=128, help="the right is cut")
    p.add_argument("--tokens-per-microbatch", type=int, help="lower saves memory",
                   default=16384 if torch.cuda.is_available() else 1024)
    p.add_argument("--gold", help="golden preference model: evaluate against --baseline")
    p.add_argument("--baseline", help="file of baseline responses (gold_eval.py sample)")
    p.add_argument("--eval-data", help="pairs to classify in evaluation (default: --data)")
    p.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    p.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    p.add_argument("--seed", type=int, default=0, help="seed of the data order")
    p.add_argument("--trust-remote-code", action="store_true", help="run code that --model ships")
    return p.parse_args(argv)


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


# ---- data ----------------------------------------------------------------------------------------


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


# ---- model, log-probs, loss ----------------------------------------------------------------------


def load_policy(name, trust_remote_code, device):
    """Load (model in fp32, tokenizer) from a run folder, a model folder or the hub."""
    path = os.path.join(name, "final") if os.path.isdir(os.path.join(name, "final")) else name
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code)
    except Exception as e:  # many kinds; each means that this model is not to be had
        fail(f"cannot load a model from {name}: {str(e).strip().splitlines()[0][:200]}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        known = len(tokenizer)
    except Exception:
        known = 0
    if known < 2:
        fail(f"{name} has no tokenizer; save one beside the model (tokenizer.save_pretrained)")
    if known > model.get_input_embeddings().num_embeddings:
        fail(f"{name}: the tokenizer has {known} tokens, the model embeds only "
             f"{model.get_input_embeddings().num_embeddings}")
    if tokenizer.eos_token_id is None:
        fail(f"{name}: the tokenizer has no EOS token; set tokenizer.eos_token and save it")
    return model.to(device).eval(), tokenizer


def check_lengths(model, args):
    """Refuse lengths that the model's positions cannot hold."""
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    if args.max_prompt_tokens + args.max_response_tokens > limit:
        fail(f"--max-prompt-tokens {args.max_prompt_tokens} + --max-response-tokens "
             f"{args.max_response_tokens} exceed the model's {limit} positions; lower one")


# Logits of one chunk, whatever the vocabulary: 32 MB on CPU (near the caches), 256 MB on CUDA.
LOGITS_AT_ONCE = 1 << (26 if torch.cuda.is_available() else 23)


def pair_logps(model, pairs):
    """Summed response log-probs of B pairs as (2, B), chosen first; one shared row a pair.

    The vocabulary projection runs on response positions only. Its (N, V) logits never exist at
    once: they are made chunk by chunk, and in the backward pass again for all chunks but the last.
    """
    ids, positions, _, visible, sources, targets, owners = pack_pairs(pairs, model.device)
    hidden = model.base_model(input_ids=ids, attention_mask=visible, position_ids=positions,
                              use_cache=False).last_hidden_state.flatten(0, 1)[sources]  # (N, D)
    head = model.get_output_embeddings()

    def nll(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    size = max(1, LOGITS_AT_ONCE // len(head.weight))
    *chunks, last = zip(hidden.split(size), targets.split(size), strict=True)
    nlls = torch.cat([*(checkpoint(nll, *chunk, use_reentrant=False, preserve_rng_state=False)
                        for chunk in chunks), nll(*last)])
    return -nlls.new_zeros(2 * len(pairs)).index_add(0, owners, nlls).view(2, -1)


def plain_logits(model, rows):
    """Logits of R (prompt, response) rows the plain way: one row each, no mask tricks, no chunks.

    Prompts are padded on the left, responses on the right, to K tokens. Returns (logits (R, K, V)
    in fp32, as the model gives them; targets (R, K); real (R, K), 0 where a target is padding).
    """
    start, width = (max(len(row[side]) for row in rows) for side in (0, 1))
    ids = torch.tensor([[0] * (start - len(x)) + x + y + [0] * (width - len(y)) for x, y in rows])
    real = torch.tensor([[0] * (start - len(x)) + [1] * (len(x) + len(y)) + [0] * (width - len(y))
                         for x, y in rows])
    ids, real = ids.to(model.device), real.to(model.device)
    logits = model(input_ids=ids, attention_mask=real, use_cache=False, logits_to_keep=width + 1,
                   position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
    return logits[:, :-1].float(), ids[:, start:], real[:, start:]


def plain_logps(model, pairs):
    """The same as `pair_logps` from `plain_logits`: two rows a pair."""
    logits, targets, real = plain_logits(
        model, [(prompt, pair[side]) for side in (0, 1) for prompt, *pair in pairs])
    logps = logits.log_softmax(-1).gather(2, targets[:, :, None]).squeeze(2)
    return (logps * real).sum(1).view(2, -1)


@torch.no_grad()
def choose_logps(model, pairs):
    """`pair_logps` where it equals `plain_logps` but for rounding on a few pairs, else the latter.

    fp32 rounds the log-prob of a token, at 50,000 tokens of vocabulary, by up to 1e-5 nats and 1e-5
    of itself: ten times that is let pass. A mask that is not taken shows in whole nats.
    """
    pairs = [*pairs[:3], max(pairs, key=lambda pair: sum(map(len, pair)))]  # a window would show
    gap = 0.0
    try:
        for pair in pairs:
            plain, lengths = plain_logps(model, [pair]), torch.tensor([[len(y)] for y in pair[1:]])
            off = (pair_logps(model, [pair]) - plain).abs() / (plain.abs() + lengths.to(plain))
            gap = max(gap, off.max().item())
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the model takes no such mask
        gap = type(e).__name__
    if isinstance(gap, float) and gap < 1e-4:
        return pair_logps
    print(f"this model does not take one row a pair (gap {gap}): using plain rows")
    return plain_logps


def slic_loss(logps, ref_logps, beta, sft_weight=0.0):
    """SLiC: max(0, 1 - beta h) - sft_weight * log pi(y_w|x) a pair (arXiv:2402.05749, 2305.10425).

    logps, ref_logps: (2, B) summed log-probs, chosen first. Returns (B,).
    """
    h = (logps[0] - ref_logps[0]) - (logps[1] - ref_logps[1])
    return F.relu(1 - beta * h) - sft_weight * logps[0]


# ---- training ------------------------------------------------------------------------------------


def autocast(device):
    """bf16 on CUDA, over fp32 master weights; plain fp32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


@torch.no_grad()
def reference_logps(model, logps_of, pairs, tokens):
    """(2, B) summed log-probs of a batch under the reference, in the micro-batches of the step."""
    logps = torch.zeros(2, len(pairs))
    for rows in micro_batches(pairs, tokens):
        with autocast(model.device):
            logps[:, rows] = logps_of(model, [pairs[i] for i in rows]).cpu()
    return logps


def data_reference_logps(model, logps_of, pairs, batches, tokens, folder):
    """(2, pairs) log-probs under the reference, once a row, in the micro-batches of training.

    Kept in `folder` under a hash of all that they depend on: the next run on the same model, pairs
    and order finds them there. Rows that no batch holds are NaN.
    """
    digest = hashlib.sha256(json.dumps([
        logps_of.__name__, tokens, str(model.device), pairs, batches,
        model.config.to_json_string()]).encode())
    for weight in model.parameters():
        digest.update(weight.detach().cpu().numpy().data)
    path = os.path.join(folder, f"reference-{digest.hexdigest()[:16]}.safetensors")
    if os.path.exists(path):
        return load_file(path)["logps"]
    logps = torch.full((2, len(pairs)), torch.nan)
    for rows in tqdm(batches, "reference log-probs", disable=not sys.stderr.isatty()):
        if logps[0, rows].isnan().any():
            logps[:, rows] = reference_logps(model, logps_of, [pairs[i] for i in rows], tokens)
    save_file({"logps": logps}, f"{path}.{os.getpid()}.tmp")  # others may be writing it too
    os.replace(f"{path}.{os.getpid()}.tmp", path)
    return logps


def preference_step(policy, logps_of, loss_fn, pairs, ref_logps, beta, tokens):
    """Accumulate the gradient of the batch's mean loss, micro-batch by micro-batch.

    Returns the field's metrics. Implicit rewards are beta * (logps - ref_logps); Bo2 has none.
    """
    losses, logps = torch.zeros(len(pairs)), torch.zeros(2, len(pairs))
    for rows in micro_batches(pairs, tokens):
        with autocast(policy.device):
            batch_logps = logps_of(policy, [pairs[i] for i in rows])
        loss = loss_fn(batch_logps, ref_logps[:, rows].to(policy.device))  # (b,)
        (loss.sum() / len(pairs)).backward()
        losses[rows], logps[:, rows] = loss.detach().cpu(), batch_logps.detach().cpu()
    metrics = {"loss": losses.mean().item(), "logps/chosen": logps[0].mean().item()}
    if beta is not None:
        chosen, rejected = beta * (logps - ref_logps)
        metrics |= {"logps/rejected": logps[1].mean().item(),
                    "rewards/chosen": chosen.mean().item(),
                    "rewards/rejected": rejected.mean().item(),
                    "rewards/margins": (chosen - rejected).mean().item(),
                    "rewards/accuracies": (chosen > rejected).float().mean().item()}
    return metrics


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


# ---- run folder ----------------------------------------------------------------------------------


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


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    open_run(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, tokenizer = load_policy(args.model, args.trust_remote_code, device)
    check_lengths(policy, args)
    pairs = load_pairs(args.data, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    logps_of = choose_logps(policy, pairs)
    loss_fn = partial(slic_loss, beta=args.beta, sft_weight=args.sft_weight)
    judge = None
    if args.gold:
        import gold_eval
        judge = gold_eval.load_judge(args, args.eval_data or args.data, copy.deepcopy(policy),
                                     tokenizer, logps_of)
    window = 1 if args.order == "kept" else args.shuffle_window
    batches = make_batches(args.steps, args.batch_size, len(pairs), window, args.seed)
    quiet = not sys.stderr.isatty()
    if args.no_reference:
        ref_logps = torch.zeros(2, len(pairs))
    else:
        ref_logps = data_reference_logps(
            policy, logps_of, pairs, batches,
            args.tokens_per_microbatch, os.path.dirname(os.path.abspath(args.out)))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    state = training_state(policy, optimizer)
    save_path = f"{args.out}/checkpoint.safetensors"
    start = load_checkpoint(save_path, state)
    for name in ("metrics", "samples"):
        cut_jsonl(f"{args.out}/{name}.jsonl", start)
    caught = catch_signals()
    bar = tqdm(range(start, args.steps), "slic", args.steps, initial=start, disable=quiet)
    for step in bar:
        done, began, rows = step + 1, time.perf_counter(), batches[step]
        batch_pairs = [pairs[i] for i in rows]
        metrics = preference_step(policy, logps_of, loss_fn, batch_pairs, ref_logps[:, rows],
                                  args.beta, args.tokens_per_microbatch)
        lr = args.lr * min(1.0, done / max(args.warmup, 1))
        grad_norm = optimizer_step(policy, optimizer, lr, f"{args.out}: step {done}, rows {rows}")
        tokens_per_s = sum(map(len, sum(batch_pairs, ()))) / (time.perf_counter() - began)
        metrics = {"step": done, **metrics, "grad_norm": grad_norm, "lr": lr,
                   "tokens_per_s": round(tokens_per_s)}
        if judge and (done % args.eval_every == 0 or done == args.steps):
            gold, samples = gold_eval.evaluate(policy, judge)
            metrics.update(gold)
            append_jsonl(f"{args.out}/samples.jsonl", [{"step": done, **s} for s in samples])
        append_jsonl(f"{args.out}/metrics.jsonl", [metrics])
        bar.set_postfix({k: f"{metrics[k]:.3g}" for k in (
            "loss", "rewards/accuracies", "tokens_per_s", "gold/win_rate") if k in metrics})
        if done < args.steps and (caught or done % args.save_every == 0):
            save_checkpoint(save_path, state, done)
            if caught:
                print(f"{signal.Signals(caught[0]).name}: saved step {done} to {save_path}; "
                      "--resume goes on", file=sys.stderr)
                raise SystemExit(128 + caught[0])
    save_final(policy, tokenizer, args.out)
    print(f"{args.out}: {args.steps} steps, " + ", ".join(
        f"{k} {metrics[k]:.4g}" for k in metrics if k.startswith(("loss", "rewards/a", "gold/"))))


if __name__ == "__main__":
    guard(main, parse_args())
