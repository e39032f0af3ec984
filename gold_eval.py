r"""Judge a policy as the paper does: win rate, exact KL, and the policy as a classifier.

    python gold_eval.py sample --model runs/toy/sft --data data/toy/golden.jsonl --out base.jsonl
    python gold_eval.py judge --model runs/toy/dpo --reference runs/toy/sft --gold runs/toy/gold \
        --baseline base.jsonl --data data/toy/golden.jsonl --out runs/toy/dpo/judged.json

gold/win_rate         share of the baseline's prompts on which the golden model prefers the policy's
                      response (temperature 1) to the baseline's; a tie counts half
gold/kl               KL(policy, reference) in nats a response: the exact KL of the two next-token
                      distributions, summed over the positions of a sampled response (appendix D)
gold/accuracy_golden  share of D_golden pairs on which h > 0, h as in dpo.py (appendix E)
gold/accuracy_self    the same on pairs of the policy's own samples, labelled by the golden model
gold/chosen_logratio  mean log pi(y_w|x) - log ref(y_w|x) on D_golden (figure 8)
Each comes with its standard error (.._se); `outcomes` has a digit a prompt: 2 the policy's response
wins, 1 a tie, 0 the baseline's wins.

`sample` writes responses to the first distinct prompts of --data (a baseline), or, with --other and
--gold, a pair for each of its first rows, sampled from two policies, labelled by the golden model
(figures 5, 12). `classify` follows a stream and asks who agrees with the golden model (figure 6).

MIT licence. Shared: `evaluator` is what the training scripts call.
"""

import argparse
import copy
import inspect
import json
import math
import os
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    LogitsProcessorList,
)
from transformers.cache_utils import DynamicLayer

from reward import (
    DEVICE,
    RANK,
    RANKS,
    add_flags,
    attend,
    autocast,
    fail,
    guard,
    load_labeller,
    load_model,
    load_pairs,
    mask_for,
    micro_batches,
    pack_pairs,
    pooled,
    prefer,
    read_jsonl,
    turn_end,
    whole,
)

KL_PROMPTS = 256  # prompts for the KL, pairs for each accuracy (appendices D and E)
LOGITS_AT_ONCE = 1 << (26 if DEVICE.type == "cuda" else 24)  # in fp32 256 MB; on CPU 64 MB


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    judge = commands.add_parser("judge", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    judge.add_argument("--reference", required=True, help="policy that training started from")
    judge.add_argument("--baseline", required=True, help="file of baseline responses (sample)")
    judge.add_argument("--gold", required=True, help="golden preference model, or judge.py")
    draw = commands.add_parser("sample", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    draw.add_argument("--other", help="second policy: write pairs, labelled by --gold")
    draw.add_argument("--gold", help="golden preference model, or judge.py (with --other)")
    draw.add_argument("--prompts", type=int, default=2048, help="prompts at the most")
    follow = commands.add_parser("classify", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    follow.add_argument("--reference", required=True, help="policy that training started from")
    follow.add_argument("--gold", required=True, help="golden preference model, or judge.py")
    for p in (judge, draw, follow):
        p.add_argument("--model", required=True, help="policy: run folder, folder or hub name")
        p.add_argument("--data", required=True, help="pairs (jsonl, jsonl.gz)")
        p.add_argument("--out", required=True, help="file to write")
        p.add_argument("--seed", type=int, default=0, help="seed of the sampling")
        add_flags(p, training=False)
    return parser.parse_args(argv)


def evaluate(policy, judge):
    """Judge a policy: ({"gold/...": number, "outcomes"}, 256 samples). Always the same noise."""
    generator = torch.Generator().manual_seed(judge.seed)
    draw = partial(sample, policy, max_tokens=judge.max_tokens, ends=judge.ends,
                   generator=generator, known=judge.tokenizer.known, tokens=judge.tokens)
    twice = judge.prompts[:KL_PROMPTS]
    with autocast():  # around all steps, so that the weights are cast once
        two = draw(twice, 2)  # two responses each, for the self-classification
        responses = two[::2] + draw(judge.prompts[KL_PROMPTS:], 1)

    margins = prefer(judge.gold, list(zip(judge.prompts, responses, judge.baseline, strict=True)),
                     judge.tokens)
    won = margins.sign() + 1
    metrics = mean_se("win_rate", won / 2) | {"outcomes": "".join(f"{x:.0f}" for x in won.tolist())}
    metrics |= mean_se("kl", response_kl(policy, judge.reference, list(zip(twice, two[::2],
                                         strict=True)), judge.tokens))

    logratios = batch_logps(policy, judge.logps_of, judge.pairs, judge.tokens) - judge.ref_logps
    h = logratios[0] - logratios[1]
    metrics |= mean_se("accuracy_golden", (h.sign() + 1) / 2)
    metrics |= mean_se("chosen_logratio", logratios[0])

    own = [pair for pair in zip(twice, two[::2], two[1::2], strict=True) if pair[1] != pair[2]]
    if own:
        first, second = (batch_logps(model, judge.logps_of, own, judge.tokens)
                         for model in (policy, judge.reference))
        h = (first - second)[0] - (first - second)[1]
        agree = h.sign() * prefer(judge.gold, own, judge.tokens).sign()
        metrics |= mean_se("accuracy_self", (agree + 1) / 2)
    metrics |= mean_se("response_length", torch.tensor([float(len(r)) for r in responses]))

    decode = partial(judge.tokenizer.decode, skip_special_tokens=True)
    samples = [{"prompt": decode(judge.prompts[i]), "response": decode(responses[i]),
                "baseline": decode(judge.baseline[i]), "gold_margin": margins[i].item()}
               for i in range(len(twice))]
    return metrics, samples


def mean_se(name, values):
    """{name: mean, name_se: its standard error} of a tensor of independent values."""
    values = values.double()
    se = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return {f"gold/{name}": values.mean().item(), f"gold/{name}_se": se.item()}


@torch.no_grad()
def response_kl(policy, reference, rows, tokens):
    """KL in nats (R,) of each (prompt, response): exact a position, summed over its positions.

    Averaged over responses sampled from the policy this is an unbiased estimate of the KL between
    the two policies' distributions of whole responses (paper, appendix D). The logits are those of
    the models themselves, in fp32: in bf16 a KL of .00004 nats read .067 at 39 tokens.
    """
    kls, vocabulary = torch.zeros(len(rows)), policy.get_output_embeddings().weight.shape[0]
    at_once = min(tokens, 2 * LOGITS_AT_ONCE // vocabulary)
    groups = micro_batches(rows, at_once, padding=0.05)  # logits of padding cost as well
    for group in filter(None, groups):
        some = [rows[i] for i in group]
        ids, real = (pad_sequence(x, True).to(policy.device) for x in (
            [torch.tensor(x + y) for x, y in some],
            [torch.tensor([0] * len(x) + [1] * len(y)) for x, y in some]))
        keep = ids.shape[1] - min(len(x) for x, _ in some) + 1  # no logits where all are prompt
        with torch.autocast(policy.device.type, enabled=False):
            logp, ref_logp = (
                model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, -keep:-1]
                .float().log_softmax(-1) for model in (policy, reference))
        kl = (logp.exp() * (logp - ref_logp)).sum(-1)  # (rows, positions)
        kls[group] = (kl * real[:, 1 - keep:]).sum(1).cpu()
    return pooled(kls)


def write_samples(args, policy, tokenizer):
    """Responses to the first distinct prompts of --data, or golden-labelled pairs of two."""
    pairs = load_pairs(args.data, tokenizer, args, sides=())
    prompts = [tuple(p) for p, _, _ in pairs]
    prompts = [*map(list, prompts if args.other else dict.fromkeys(prompts))][:args.prompts]
    generator = torch.Generator().manual_seed(args.seed)

    def draw(model):
        with autocast():
            return sample(model, prompts, 1, args.max_response_tokens, end_ids(model, tokenizer),
                          generator, tokenizer.known, args.tokens_per_microbatch)

    responses = draw(policy)
    if not args.other:
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        return [{"prompt_ids": p, "response_ids": r, "prompt": decode(p), "response": decode(r)}
                for p, r in zip(prompts, responses, strict=True)]
    if not args.gold:
        fail("--other needs --gold, which labels the pairs")
    other, gold = load_other(args.other, tokenizer, args), load_labeller(args.gold, tokenizer, args)
    pairs = list(zip(prompts, responses, draw(other), strict=True))
    margins = prefer(gold, pairs, args.tokens_per_microbatch).tolist()
    print(f"{args.model} is preferred to {args.other} on {sum(m > 0 for m in margins):,} of "
          f"{len(pairs):,} pairs; {sum(a == b for _, a, b in pairs):,} are equal")
    return [{"prompt_ids": p, "chosen_ids": a if m >= 0 else b, "rejected_ids": b if m >= 0 else a}
            for (p, a, b), m in zip(pairs, margins, strict=True)]


def follow_stream(args, policy, tokenizer, reference):
    """Agreement with the golden model in ten parts of a stream: of its labeller, of the policy."""
    gold, rows = load_labeller(args.gold, tokenizer, args), []
    pairs = load_pairs(args.data, tokenizer, args)
    logps_of = choose_logps(reference, pairs, args)
    for part in range(10):
        start, end = (len(pairs) * i // 10 for i in (part, part + 1))
        some = [pair for pair in pairs[start:end] if pair[1] != pair[2]][-2 * KL_PROMPTS:]
        if not some:
            fail(f"{args.data}: too few pairs to follow ({len(pairs)})")
        label = prefer(gold, some, args.tokens_per_microbatch).sign()
        logratios = (batch_logps(policy, logps_of, some, args.tokens_per_microbatch)
                     - batch_logps(reference, logps_of, some, args.tokens_per_microbatch))
        agree = (logratios[0] - logratios[1]).sign() * label
        rows.append({"share_of_stream": (part + 1) / 10, "pairs": len(some),
                     **mean_se("accuracy_labeller", (label + 1) / 2),
                     **mean_se("accuracy_policy", (agree + 1) / 2)})
    return rows


def main(args):
    if os.path.exists(args.out):
        fail(f"{args.out} exists; choose another --out, or remove it")
    policy, tokenizer = load_model(AutoModelForCausalLM, args.model, args)
    policy.to(DEVICE)
    if args.command == "sample":
        rows = write_samples(args, policy, tokenizer)
    else:
        reference = load_other(args.reference, tokenizer, args)
        if args.command == "classify":
            rows = follow_stream(args, policy, tokenizer, reference)
        else:
            metrics, samples = evaluate(policy, load_judge(args, args.data, reference, tokenizer))
            rows = [metrics]
            for s in samples[:2]:
                print(f"> {s['prompt'].strip()}\n  {s['response'].strip()}")
            for name in (n for n in metrics if f"{n}_se" in metrics):
                print(f"{name:22} {metrics[name]:8.4f} +- {metrics[name + '_se']:.4f}")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".tmp" if RANK == 0 else os.devnull, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if RANK == 0:
        os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: written")


# ==== The lesson ends here. Below: the judge, log-probs and sampling as in online_rlhf.py =========
@dataclass
class Judge:
    """What stays fixed while policies are judged: made once a run by `load_judge`."""

    gold: object  # a preference model, or a judge.py
    reference: torch.nn.Module
    logps_of: object  # pair_logps or plain_logps
    tokenizer: object
    ends: list  # ids that end a response
    prompts: list  # token ids, those of the baseline file
    baseline: list  # its response to each
    pairs: list  # of D_golden, sub-sampled
    ref_logps: torch.Tensor  # (2, pairs)
    max_tokens: int
    tokens: int  # of a micro-batch
    seed: int


def load_judge(args, data, reference, tokenizer, logps_of=None):
    """Read --gold, --baseline and the pairs of `data`; `reference` must not change from here on.

    `args` also gives max_prompt_tokens, max_response_tokens, tokens_per_microbatch and seed. Says
    what an evaluation will take, by one of the reference on 8 prompts.
    """
    if not args.baseline:
        fail("--gold needs --baseline, a file of responses (gold_eval.py sample)")
    limits = {"prompt_ids": args.max_prompt_tokens, "response_ids": args.max_response_tokens}

    def two_lists(row):
        for key, limit in limits.items():
            ids = row[key] or []
            if not (0 < len(ids) <= limit and all(
                    type(i) is int and 0 <= i < tokenizer.known for i in ids)):
                raise ValueError(f"{key} must be 1 to {limit} tokens that the tokenizer has")
        return [row[key] for key in limits]

    rows = list(read_jsonl(args.baseline, two_lists, "; write it with `gold_eval.py sample`"))
    if not rows:
        fail(f"{args.baseline}: no responses in it")
    gold = load_labeller(args.gold, tokenizer, args)
    pairs = load_pairs(data, tokenizer, args)
    pick = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:KL_PROMPTS]
    pairs = [pairs[i] for i in pick.tolist()]
    logps_of = logps_of or choose_logps(reference, pairs, args)
    ref_logps = batch_logps(reference, logps_of, pairs, args.tokens_per_microbatch)
    prompts, baseline = map(list, zip(*rows, strict=True))
    judge = Judge(gold, reference, logps_of, tokenizer, end_ids(reference, tokenizer), prompts,
                  baseline, pairs, ref_logps, args.max_response_tokens, args.tokens_per_microbatch,
                  args.seed)
    few, began = min(8, len(rows)), time.perf_counter()
    evaluate(reference, replace(judge, prompts=prompts[:few], baseline=baseline[:few],
                                pairs=pairs[:few], ref_logps=ref_logps[:, :few]))
    minutes = (time.perf_counter() - began) / 60 * len(rows) / few
    print(f"an evaluation is of {len(rows):,} prompts: up to {minutes:.1f} minutes here")
    return judge


def evaluator(args, data, policy, tokenizer, logps_of, reference=None, actor=None):
    """A function of the step that judges a policy in training and returns the metrics.

    Make it before training: without a `reference` that is the policy as it is now. Of one that is
    shared out over several processes it judges a whole copy, `actor`. Samples go to samples.jsonl.
    """
    judge = load_judge(args, data, reference or copy.deepcopy(policy), tokenizer, logps_of)
    actor = actor or (copy.deepcopy(policy) if RANKS > 1 else policy)

    def evaluate_run(step):
        metrics, samples = evaluate(refresh(actor, policy), judge)
        samples = [json.dumps({"step": step, **row}, ensure_ascii=False) for row in samples]
        with open(f"{args.out}/samples.jsonl" if RANK == 0 else os.devnull, "ab") as f:
            f.write("".join(f"{row}\n" for row in samples).encode())
        return metrics
    return evaluate_run


@torch.no_grad()
def refresh(actor, policy):
    """Copy the weights of a sharded policy into `actor`, a whole model that samples; return it."""
    if actor is not policy:
        for mine, weight in zip(actor.parameters(), policy.parameters(), strict=True):
            mine.copy_(whole(weight))
    return actor


def load_other(name, tokenizer, args):
    """Load a policy that is compared with another one: it must have the same tokenizer."""
    model, own = load_model(AutoModelForCausalLM, name, args)
    if own.get_vocab() != tokenizer.get_vocab() or own.known < tokenizer.known:
        fail(f"{name} has another tokenizer than {args.model}")
    return model.to(DEVICE)


def plain_logps(model, pairs):
    """Summed log-probs of the responses of B pairs as (2, B), chosen first: one row a response."""
    rows = [(x, c) for x, c, _ in pairs] + [(x, r) for x, _, r in pairs]
    ids = pad_sequence([torch.tensor(x + y) for x, y in rows], True).to(model.device)
    labels = pad_sequence([torch.tensor([-100] * len(x) + y) for x, y in rows], True, -100)
    keep = ids.shape[1] - min(len(x) for x, _ in rows) + 1  # no logits where all rows are prompt
    # padding is on the right, so that a causal model needs no mask; some ignore logits_to_keep
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=keep).logits[:, -keep:-1].float()
    nlls = F.cross_entropy(logits.flatten(0, 1), labels[:, 1 - keep:].flatten().to(model.device),
                           reduction="none")  # column t predicts t + 1; 0 where a label is -100
    return -nlls.view(2, len(pairs), -1).sum(-1)


def pair_logps(model, pairs):
    """The same as `plain_logps`, faster and in less memory: one row a pair, not two.

    The vocabulary projection runs on response positions only. Its (N, V) logits are made chunk by
    chunk, of LOGITS_AT_ONCE numbers, and in the backward pass again for all chunks but the last.
    """
    ids, positions, _, visible, sources, targets, owners = pack_pairs(pairs, model.device)
    hidden = model.base_model(
        input_ids=ids, attention_mask=mask_for(model, visible, positions), position_ids=positions,
        use_cache=False).last_hidden_state.flatten(0, 1)[sources]  # (N, D)
    head = model.get_output_embeddings()

    def nll(hidden, targets):
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    size = max(1, LOGITS_AT_ONCE // len(head.weight))  # positions at once
    *chunks, last = zip(hidden.split(size), targets.split(size), strict=True)
    nlls = torch.cat([*(checkpoint(nll, *chunk, use_reentrant=False, preserve_rng_state=False)
                        for chunk in chunks), nll(*last)])
    return -nlls.new_zeros(2 * len(pairs)).index_add(0, owners, nlls).view(2, -1)


@torch.no_grad()
def choose_logps(model, pairs, args):
    """`pair_logps` if it equals `plain_logps` but for rounding on a few pairs, else the latter.

    The last of these is as long as a row can be, so that no window shows later.
    """
    sizes = args.max_prompt_tokens, args.max_response_tokens, args.max_response_tokens
    pool = cycle(i for pair in pairs for ids in pair for i in ids)
    longest = [[*islice(pool, size)] for size in sizes]
    equal, why = torch.zeros(1), "other log-probs"  # fp32 loses 1e-5, a wrong mask whole nats
    try:
        equal += all(torch.allclose(
            pair_logps(model, [pair]), plain_logps(model, [pair]), rtol=1e-4,
            atol=1e-4 * min(map(len, pair[1:]))) for pair in [*pairs[:3], longest])
    except Exception as e:  # whatever a model raises at such a mask
        why = f"{type(e).__name__}: {e}"
    if pooled(equal) == RANKS:  # all processes find it
        return pair_logps
    print(f"this model does not take one row a pair ({why}): using plain rows")
    return plain_logps


@torch.no_grad()
def batch_logps(model, logps_of, pairs, tokens):
    """(2, B) summed log-probs of a batch, in its micro-batches; no gradients."""
    logps = torch.zeros(2, len(pairs))
    for group in micro_batches(pairs, tokens):
        if group or hasattr(model, "logps"):  # sharded: all processes must run it
            logps[:, group] = logps_of(model, [pairs[i] for i in group]).cpu()
    return pooled(logps)


def skip_padding(module, query, key, value, attention_mask, **kwargs):
    """Attention of one new token a row on CPU: in parts of the batch, each without its own padding.

    Decoding waits for keys and values to come from memory: what is not read costs nothing. Rows are
    left-padded and in order of length, so that the first part has most to leave out.
    """
    mask, size, parts = attention_mask, max(16, -(-len(query) // 4)), []
    if query.shape[2] > 1 or query.is_cuda or mask is not None and mask.dtype != torch.bool:
        return attend(module, query, key, value, mask, **kwargs)
    if value.dtype != torch.bfloat16 and (mask is None or len(query) * key.shape[2] < 1 << 12):
        return attend(module, query, key, value, mask, **kwargs)  # nothing to gain
    mask = torch.ones_like(key[:, :1, None, :, 0], dtype=torch.bool) if mask is None else mask
    for row in range(0, len(query), size):
        at = slice(row, row + size)
        slots = slice(int(mask[at, 0, 0].any(0).byte().argmax()), None)  # from the first real one
        parts.append(attend(module, query[at], key[at, :, slots], value[at, :, slots],
                            mask[at, ..., slots], **kwargs)[0])
    return torch.cat(parts), None


AttentionInterface.register("sdpa", skip_padding)


class SlotLayer(DynamicLayer):
    """One layer's KV cache with free slots: a step fills one of them, and copies nothing else.

    Static: all slots are returned at every step (the mask hides the free ones), so that a step has
    always the same shapes and addresses, as a CUDA graph needs them.
    """

    def __init__(self, slots, used, static):
        super().__init__()
        self.slots, self.used, self.static = slots, used, static  # keys, values: (B, heads, W, -)
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        """Write the new (B, heads, 1, width) keys and values; return all so far, as views."""
        for slots, new in zip(self.slots, (keys, values), strict=True):
            slots.index_copy_(2, self.used, new.to(slots.dtype))
        self.keys, self.values = (x[:, :, :self.get_mask_sizes(1)[0]] for x in self.slots)
        return self.keys, self.values

    def get_seq_length(self):
        return self.used if self.static else int(self.used)

    def get_mask_sizes(self, query_length):
        return (self.slots[0].shape[2] if self.static else int(self.used) + query_length), 0


@lru_cache
def cache_argument(kind):
    """What a model class calls its KV cache: "cache" from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def next_logits(model, ids, real, places, cache):
    """Next-token logits (B, V) after ids (B, T) at `places`; real (B, slots) hides padding."""
    real = real[:, :cache.get_mask_sizes(ids.shape[1], 0)[0]]
    return model(input_ids=ids, attention_mask=real, position_ids=places, use_cache=True,
                 logits_to_keep=1, **{cache_argument(type(model)): cache}).logits[:, -1]


def decode(model, prompts, rows, max_tokens, ends, choose, tokens, static):
    """Continue each prompt with our KV cache in len(rows) / len(prompts) rows, up to one of `ends`.

    `choose` gets what is left of rows (B,), the step t and its logits (B, V), and returns tokens
    (B,). Rows that have ended leave: at once, or, with `static` shapes (on CUDA), when they are
    half of the batch.
    """
    cache, used, logits, real = prefill(model, prompts, len(rows) // len(prompts), max_tokens,
                                        tokens, static)
    alive, step = torch.ones_like(rows, dtype=torch.bool), None
    places = real.sum(1, keepdim=True)  # of the first new token
    ids = torch.empty_like(places)
    for t in range(max_tokens):
        ids[:, 0] = new = choose(rows, t, logits)
        alive &= (new[:, None] != ends).all(1)
        left = int(alive.sum())
        if left == 0 or t + 1 == max_tokens:
            break
        if left <= (len(rows) // 2 if static else len(rows) - 1):
            cut = len(rows) - left  # the shortest rows move into the gaps of those that ended
            gaps, short = cut + (~alive[cut:]).nonzero()[:, 0], alive[:cut].nonzero()[:, 0]
            for x in (rows, alive, ids, real, places, *(
                    x for layer in cache.layers for x in layer.slots)):
                x[gaps] = x[short]
            rows, alive, ids, real, places = (x[cut:] for x in (rows, alive, ids, real, places))
            for layer in cache.layers:
                layer.slots = [x[cut:] for x in layer.slots]
            step = None
        real.index_fill_(1, used, 1)
        step = step or decoder(model, ids, real, places, cache)
        logits = step()
        places += 1
        used += 1


def generate(model, prompts, rows, max_tokens, ends, choose, *_):
    """The same by transformers' generate, with whatever cache a model has of its own: slower."""
    width, each = max(map(len, prompts)), len(rows) // len(prompts)
    ids, real = (torch.tensor(x, device=model.device).repeat_interleave(each, 0) for x in (
        [[0] * (width - len(x)) + x for x in prompts],
        [[0] * (width - len(x)) + [1] * len(x) for x in prompts]))

    def leave_one(ids, logits):
        new = choose(rows, ids.shape[1] - width, logits)
        return torch.full_like(logits, -torch.inf).scatter(1, new[:, None], 0.0)

    own, model.generation_config = model.generation_config, GenerationConfig()  # no penalties
    try:
        model.generate(ids, attention_mask=real, generation_config=GenerationConfig(
            max_new_tokens=max_tokens, eos_token_id=ends.tolist() or None, pad_token_id=0),
            logits_processor=LogitsProcessorList([leave_one]))
    finally:
        model.generation_config = own


def recompute(model, prompts, rows, max_tokens, ends, choose, *_):
    """Sample prompt by prompt, the whole text anew for every token: right for every causal model.

    choose(rows, t, logits) draws a token for each of these rows, and keeps it: nothing is returned.
    Rows that have ended go on until all have. `decode` is the same, faster.
    """
    for prompt, some in zip(prompts, rows.chunk(len(prompts)), strict=True):
        ids, alive = torch.tensor([prompt] * len(some), device=model.device), True
        for t in range(max_tokens):
            new = choose(some, t, model(input_ids=ids, use_cache=False).logits[:, -1])[:, None]
            ids, alive = torch.cat([ids, new], 1), alive & (new != ends).all(1)
            if not alive.any():
                break


def choose_decoding(model, static):
    """`decode` if its logits are those of plain rows, else `generate` if its are, or `recompute`.

    They are compared after two unequal prompts and after two tokens more.
    """
    prompts, more, seen = [[2, 1], [1, 2, 2, 1, 2]], [1, 2, 0], []
    fp32 = all(weight.dtype == torch.float32 for weight in model.parameters())

    def choose(rows, t, logits):
        seen.append(logits.float().clone())
        return torch.full_like(rows, more[t])

    with torch.autocast(model.device.type, torch.bfloat16, enabled=not fp32):
        plain = torch.cat([model(input_ids=torch.tensor([x + more[:t]], device=model.device),
                                 use_cache=False).logits[:, -1] for t in range(3) for x in prompts])
        for way in (decode, generate):
            seen.clear()
            with suppress(Exception):
                way(model, prompts, torch.arange(2, device=model.device), 3,
                    torch.tensor([], device=model.device), choose, 1024, static)
                gap = (torch.cat(seen) - plain).norm() / plain.float().norm()
                if gap < (1e-3 if fp32 else 0.3):  # bf16 alone may lose a tenth
                    break
        else:
            way = recompute
    if way is not decode:
        print(f"this model does not take our KV cache: sampling by {way.__name__}, slower")
    return way


def prefill(model, prompts, per_prompt, room, tokens, static):
    """Compute each prompt once and repeat it for its samples, B = len(prompts) * per_prompt rows.

    Prompts, given in order of length, are computed in groups of little padding, at most `tokens` at
    once, and written, left-padded to one width W, into a cache with `room` free slots behind.
    Returns (cache, used: W as a tensor, logits (B, V), real (B, W + room)).
    """
    end, layers, logits = len(prompts[-1]), [], []
    used = torch.tensor(end, device=model.device)
    real = torch.tensor([[0] * (end - len(x)) + [1] * len(x) + [0] * room for x in prompts])
    real = real.to(model.device).repeat_interleave(per_prompt, 0)
    for group in micro_batches([[x] for x in prompts], tokens, ranks=1):
        width, cache = len(prompts[group[-1]]), Cache(layer_class_to_replicate=DynamicLayer)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in group])
        rows = slice(group[0] * per_prompt, (group[-1] + 1) * per_prompt)
        mask = real[rows][::per_prompt, end - width:end]
        places = (mask.cumsum(1) - 1).clamp(0)
        logits.append(next_logits(model, ids.to(model.device), mask, places, cache))
        for i, part in enumerate(cache.layers):
            if len(layers) == i:  # values are of the dtype that attention reads, also in autocast
                layers.append(SlotLayer([part.values.new_zeros(
                    len(real), x.shape[1], real.shape[1], x.shape[3])
                    for x in (part.keys, part.values)], used, static))
            for slots, new in zip(layers[i].slots, (part.keys, part.values), strict=True):
                slots[rows, :, end - width:end] = new.repeat_interleave(per_prompt, 0)
    return Cache(layers=layers), used, torch.cat(logits).repeat_interleave(per_prompt, 0), real


def decoder(model, ids, real, places, cache):
    """A function () -> next-token logits (B, V) that reads these tensors anew at each call.

    On CUDA it replays a graph: a step is a thousand kernels, most of them shorter than their launch
    from Python, and a replay launches them all at once.
    """
    step = partial(next_logits, model, ids, real, places, cache)
    if model.device.type != "cuda" or getattr(model, "no_graph", False):
        return step
    step()  # warms up; autocast keeps its bf16 copies of the weights, which the graph then reads
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:  # torch.cuda.graph empties the allocator's cache, and where it fails keeps its stream
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            try:
                logits = step()
            finally:
                graph.capture_end()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as e:  # the model waits for the GPU in the middle of a step, say
        print(f"decoding without CUDA graphs, which this model does not take: {str(e)[:80]}")
        model.no_graph = True
        return step

    def replay():
        graph.replay()
        return logits
    return replay


def pick_tokens(logits, noise):
    """Draw one token a row from softmax(logits) (B, V) by inverting its CDF at noise (B,)."""
    cdf = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def end_ids(model, tokenizer):
    """Ids that end a response: EOS, the end of a turn, and those of model.generation_config."""
    said = model.generation_config.eos_token_id if model.generation_config else None
    said = said if isinstance(said, list) else [said]
    return sorted({tokenizer.eos_token_id, turn_end(tokenizer)[2], *said} - {None})


@torch.no_grad()
def sample(model, prompts, per_prompt, max_tokens, ends, generator, known=None, tokens=1024,
           greedy=False, static=None):
    """Sample `per_prompt` responses to each prompt at temperature 1, as lists of token ids.

    Those of one prompt stand side by side; each ends with one of the ids `ends` unless it reached
    `max_tokens`. Ids from `known` on, which pad the head and no tokenizer has, are never drawn.
    Prompts of not too unequal lengths go together: at most `tokens` are computed at once, in a KV
    cache of at most 8 * `tokens` slots if `static`, else of 32 * `tokens`. The noise of every (row,
    position) is drawn beforehand: neither the grouping nor rows that leave early change what a row
    draws. `generator`: one, or a list, each for an equal share of the prompts. `greedy`: the most
    likely token; `static`: fixed shapes, for CUDA graphs.
    Each of several processes samples its share, with a whole model; all get all.
    """
    device, count = model.device, len(prompts) * per_prompt
    static = device.type == "cuda" if static is None else static
    slots = tokens * (8 if static else 32)
    generators = generator if isinstance(generator, list) else [generator]
    noise = torch.cat([torch.rand(count // len(generators), max_tokens, generator=g,
                                  dtype=torch.float64) for g in generators]).to(device)
    drawn = torch.zeros(count, max_tokens, dtype=torch.long, device=device)

    def choose(rows, t, logits):
        logits = logits[:, :known]
        new = logits.argmax(-1) if greedy else pick_tokens(logits, noise[rows, t])
        drawn[rows, t] = new
        return new

    if not hasattr(model, "decode"):
        model.decode = choose_decoding(model, static)
    for group in filter(None, micro_batches([[x] for x in prompts], slots // per_prompt,
                                            extra=max_tokens, padding=0.7)):
        rows = torch.tensor([i * per_prompt + s for i in group for s in range(per_prompt)],
                            device=device)
        model.decode(model, [prompts[i] for i in group], rows, max_tokens,
                     torch.tensor(ends, device=device), choose, tokens, static)
    return [row[:next((t for t, i in enumerate(row) if i in ends), max_tokens) + 1]
            for row in pooled(drawn).tolist()]


if __name__ == "__main__":
    guard(main, parse_args())
