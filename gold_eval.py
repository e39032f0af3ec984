"""Judge a policy as the paper does: win rate, exact KL, and the policy as a classifier.

    python gold_eval.py sample --model runs/toy/sft --data data/toy/golden.jsonl --out base.jsonl
    python gold_eval.py judge --model runs/toy/dpo --reference runs/toy/sft --gold runs/toy/gold \\
        --baseline base.jsonl --data data/toy/golden.jsonl --out runs/toy/dpo/judged.json

gold/win_rate         share of the baseline's prompts on which the golden model prefers the policy's
                      response (temperature 1) to the baseline's; a tie counts half
gold/kl               KL(policy, reference) in nats a response: the exact KL of the two next-token
                      distributions, summed over the positions of a sampled response (appendix D)
gold/accuracy_golden  share of D_golden pairs on which h > 0, h as in dpo.py (appendix E)
gold/accuracy_self    the same on pairs of the policy's own samples, labelled by the golden model
gold/chosen_logratio  mean log pi(y_w|x) - log ref(y_w|x) on D_golden (figure 8)
Each comes with its standard error (.._se).

`sample` writes responses to the first prompts of --data (a baseline), or, with --other and --gold,
pairs of token ids sampled from two policies and labelled by the golden model (figure 12).

MIT licence. Shared: `load_judge` and `evaluate` are what the training scripts call.
"""

import argparse
import json
import math
import os
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from transformers.cache_utils import DynamicLayer

from reward import (
    autocast,
    check_lengths,
    fail,
    guard,
    load_labeller,
    load_pairs,
    micro_batches,
    pack_pairs,
    prefer,
    read_jsonl,
)

KL_PROMPTS = 256  # prompts for the KL, pairs for each accuracy (appendices D and E)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    judge = commands.add_parser("judge", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    judge.add_argument("--reference", required=True, help="policy that training started from")
    judge.add_argument("--baseline", required=True, help="file of baseline responses (sample)")
    judge.add_argument("--gold", required=True, help="golden preference model")
    draw = commands.add_parser("sample", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    draw.add_argument("--other", help="second policy: write pairs, labelled by --gold")
    draw.add_argument("--gold", help="golden preference model (with --other)")
    draw.add_argument("--prompts", type=int, default=2048, help="distinct prompts at the most")
    for p in (judge, draw):
        p.add_argument("--model", required=True, help="policy: run folder, folder or hub name")
        p.add_argument("--data", required=True, help="pairs (jsonl, jsonl.gz)")
        p.add_argument("--out", required=True, help="file to write")
        p.add_argument("--max-prompt-tokens", type=int, default=896, help="the left is cut")
        p.add_argument("--max-response-tokens", type=int, default=128, help="the right is cut")
        p.add_argument("--tokens-per-microbatch", type=int, help="lower saves memory",
                       default=16384 if torch.cuda.is_available() else 1024)
        p.add_argument("--seed", type=int, default=0, help="seed of the sampling")
        p.add_argument("--trust-remote-code", action="store_true",
                       help="run code that --model ships")
    return parser.parse_args(argv)


# ---- sampling ------------------------------------------------------------------------------------


class SlotLayer(DynamicLayer):
    """One layer's KV cache with free places: a step writes one of them, and copies nothing."""

    def __init__(self, buffer, used):
        super().__init__()
        self.buffer, self.used, self.is_initialized = buffer, used, True  # (B, 2, heads, W, width)

    def update(self, keys, values, *args, **kwargs):
        """Write the new (B, heads, 1, width) keys and values; return all so far, as views."""
        self.buffer[:, :, :, self.used] = torch.stack([keys[:, :, 0], values[:, :, 0]], 1)
        self.used += 1
        self.keys, self.values = self.buffer[:, :, :, :self.used].unbind(1)
        return self.keys, self.values

    def get_seq_length(self):
        return self.used


def next_logits(model, ids, real, places, cache):
    """Next-token logits (B, V) after ids (B, T) at `places`; real (B, all so far) hides padding."""
    return model(input_ids=ids, attention_mask=real, position_ids=places, use_cache=True,
                 past_key_values=cache, logits_to_keep=1).logits[:, -1]


def prefill(model, prompts, per_prompt, room):
    """Compute each prompt once and repeat it for its samples, B = len(prompts) * per_prompt rows.

    Returns (cache, logits (B, V), real (B, W + room)): prompts, given in order of length, are
    computed in groups of little padding, then left-padded to one width W with `room` free places.
    """
    width, caches, logits, real = len(prompts[-1]), [], [], []
    for group in micro_batches([[x] for x in prompts], 1 << 14):
        pad = [len(prompts[group[-1]]) - len(prompts[i]) for i in group]
        ids = torch.tensor([[0] * n + prompts[i] for n, i in zip(pad, group, strict=True)])
        mask = torch.tensor([[0] * n + [1] * len(prompts[i])
                             for n, i in zip(pad, group, strict=True)]).to(model.device)
        caches.append(Cache(layer_class_to_replicate=DynamicLayer))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        logits.append(next_logits(model, ids.to(model.device), mask, places, caches[-1]))
        real.append(F.pad(F.pad(mask, (width - mask.shape[1], 0)), (0, room), value=1))
    layers = []
    for same in zip(*(cache.layers for cache in caches), strict=True):
        parts = [torch.stack([part.keys, part.values], 1) for part in same]
        buffer = torch.cat([F.pad(x, (0, 0, width - x.shape[3], room)) for x in parts])
        layers.append(SlotLayer(buffer.repeat_interleave(per_prompt, 0), width))
    logits, real = (torch.cat(x).repeat_interleave(per_prompt, 0) for x in (logits, real))
    return Cache(layers=layers), logits, real


def pick_tokens(logits, noise):
    """Draw one token a row from softmax(logits) (B, V) by inverting its CDF at noise (B,)."""
    cdf = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return tokens.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def sample(model, prompts, per_prompt, max_tokens, eos, generator, greedy=False, slots=1 << 15):
    """Sample `per_prompt` responses to each prompt at temperature 1, as lists of token ids.

    Returns len(prompts) * per_prompt lists, those of one prompt side by side; each ends with `eos`
    unless it reached `max_tokens`. A prompt is prefilled once for all its samples; prompts of
    similar lengths go together, left-padded, in at most `slots` places of KV cache; a row that has
    ended leaves the batch. The noise of every (row, position) is drawn beforehand, so that neither
    the grouping nor the leaving changes what a row draws.
    """
    device, count = model.device, len(prompts) * per_prompt
    noise = torch.rand(count, max_tokens, generator=generator, dtype=torch.float64).to(device)
    drawn = torch.full((count, max_tokens), eos, device=device)
    for group in micro_batches([[x] for x in prompts], slots // per_prompt, max_tokens, 0.7):
        cache, logits, real = prefill(model, [prompts[i] for i in group], per_prompt, max_tokens)
        rows = torch.tensor([i * per_prompt + s for i in group for s in range(per_prompt)])
        rows = rows.to(device)
        width = real.shape[1] - max_tokens
        places = real[:, :width].sum(1, keepdim=True)  # of the first new token
        for t in range(max_tokens):
            tokens = logits.argmax(-1) if greedy else pick_tokens(logits, noise[rows, t])
            drawn[rows, t] = tokens
            alive = tokens != eos
            left = int(alive.sum())
            if left == 0 or t + 1 == max_tokens:
                break
            if left < len(rows):
                gaps = (~alive[:left]).nonzero().squeeze(1)
                last = left + alive[left:].nonzero().squeeze(1)
                for x in (rows, tokens, real, places, *(layer.buffer for layer in cache.layers)):
                    x[gaps] = x[last]  # rows at the end move into the places of those that ended
                rows, tokens, real, places = (x[:left] for x in (rows, tokens, real, places))
                for layer in cache.layers:
                    layer.buffer = layer.buffer[:left]
            seen = real[:, :width + t + 1]
            logits = next_logits(model, tokens[:, None], seen, places + t, cache)
    responses = drawn.tolist()
    return [r[:r.index(eos) + 1] if eos in r else r for r in responses]


# ---- log-probs and KL ----------------------------------------------------------------------------

# Logits of one chunk, whatever the vocabulary: 16 MB on CPU (near the caches), 256 MB on CUDA.
LOGITS_AT_ONCE = 1 << (26 if torch.cuda.is_available() else 22)


def token_logps(head, hidden, targets):
    """Log-probs (n,) of `targets` (n,) under `head` of `hidden` (n, D), in fp32."""
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")


def response_hidden(model, packed):
    """Last hidden states (N, D) of packed pairs where the next token is a response token."""
    ids, positions, _, visible, sources, *_ = packed
    hidden = model.base_model(input_ids=ids, attention_mask=visible, position_ids=positions,
                              use_cache=False).last_hidden_state  # (B, T, D)
    return hidden.flatten(0, 1)[sources]


def pair_logps(model, pairs):
    """Summed response log-probs of B pairs as (2, B), chosen first; one shared row a pair.

    The vocabulary projection runs on response positions only, in chunks that are recomputed in the
    backward pass, so that the (tokens, V) logits never exist at once.
    """
    packed = pack_pairs(pairs, model.device)
    targets, owners = packed[-2:]
    hidden, head = response_hidden(model, packed), model.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    logps = torch.cat([
        checkpoint(token_logps, head, h, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)])  # (N,)
    return logps.new_zeros(2 * len(pairs)).index_add(0, owners, logps).view(2, -1)


def plain_logps(model, pairs):
    """The same as `pair_logps` the plain way: one row a response, full logits, no mask tricks."""
    rows = [(prompt, pair[side]) for side in (0, 1) for prompt, *pair in pairs]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    pad = [width - len(prompt) - len(response) for prompt, response in rows]
    ids = torch.tensor([p + r + [0] * n for (p, r), n in zip(rows, pad, strict=True)])
    real = torch.tensor([[1] * (width - n) + [0] * n for n in pad])
    asked = torch.tensor([[0] * len(p) + [1] * len(r) + [0] * n
                          for (p, r), n in zip(rows, pad, strict=True)])
    ids, real, asked = (x.to(model.device) for x in (ids, real, asked))
    logits = model(input_ids=ids, attention_mask=real, use_cache=False).logits[:, :-1].float()
    logps = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (logps * asked[:, 1:]).sum(1).view(2, -1)


@torch.no_grad()
def choose_logps(model, pairs):
    """`pair_logps` where it agrees with `plain_logps` in fp32 on a few pairs, else the latter."""
    pairs = [*pairs[:3], max(pairs, key=lambda pair: sum(map(len, pair)))]  # a window would show
    try:
        gap = max((pair_logps(model, [pair]) - plain_logps(model, [pair])).abs().max().item()
                  for pair in pairs)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the model takes no such mask
        gap = type(e).__name__
    if isinstance(gap, float) and gap < 1e-2:
        return pair_logps
    print(f"this model's attention does not take one row a pair (gap {gap}): using plain rows")
    return plain_logps


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


def token_kl(head, ref_head, hidden, ref_hidden):
    """Exact KL (n,) between the next-token distributions at n positions, over the vocabulary."""
    logp = head(hidden).float().log_softmax(-1)
    ref_logp = ref_head(ref_hidden).float().log_softmax(-1)
    return (logp.exp() * (logp - ref_logp)).sum(-1)


@torch.no_grad()
def response_kl(policy, reference, rows, tokens):
    """KL in nats (R,) of each (prompt, response): exact a position, summed over its positions.

    Averaged over responses sampled from the policy this is an unbiased estimate of the KL between
    the two policies' distributions of whole responses (paper, appendix D).
    """
    kls, pairs = torch.zeros(len(rows)), [(prompt, response, []) for prompt, response in rows]
    for group in micro_batches(pairs, tokens):
        batch = [pairs[i] for i in group]
        with autocast(policy.device):
            ids, positions, segments, _, *rest = pack_pairs(batch, policy.device)
            real = (segments < 3).long()  # one response a row needs no more of a mask
            packed = ids, positions, segments, real, *rest
            hidden, ref_hidden = (response_hidden(model, packed) for model in (policy, reference))
            head, ref_head = policy.get_output_embeddings(), reference.get_output_embeddings()
            chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
            kl = torch.cat([token_kl(head, ref_head, h, r) for h, r in zip(
                hidden.split(chunk), ref_hidden.split(chunk), strict=True)])
        kls[group] = torch.zeros(len(batch), device=kl.device).index_add(0, packed[-1], kl).cpu()
    return kls


# ---- the judge -----------------------------------------------------------------------------------


@dataclass
class Judge:
    """What stays fixed while policies are judged: made once a run by `load_judge`."""

    gold: torch.nn.Module
    reference: torch.nn.Module
    logps_of: object  # pair_logps or plain_logps
    tokenizer: object
    prompts: list  # token ids, those of the baseline file
    baseline: list  # its response to each
    pairs: list  # of D_golden, sub-sampled
    ref_logps: torch.Tensor  # (2, pairs)
    max_tokens: int
    tokens: int  # of a micro-batch
    seed: int


@torch.no_grad()
def batch_logps(model, logps_of, pairs, tokens):
    """(2, B) summed log-probs of any number of pairs, chosen first."""
    logps = torch.zeros(2, len(pairs))
    for rows in micro_batches(pairs, tokens):
        with autocast(model.device):
            logps[:, rows] = logps_of(model, [pairs[i] for i in rows]).cpu()
    return logps


def load_judge(args, data, reference, tokenizer, logps_of=None):
    """Read --gold, --baseline and the pairs of `data`; `reference` must not change from here on.

    `args` also gives max_prompt_tokens, max_response_tokens, tokens_per_microbatch and seed.
    """
    if not args.baseline:
        fail("--gold needs --baseline, a file of responses (gold_eval.py sample)")
    rows = list(read_jsonl(args.baseline))
    for number, row in rows:
        if not {"prompt_ids", "response_ids"} <= row.keys():
            fail(f"{args.baseline}:{number}: missing prompt_ids or response_ids; "
                 "write the file with `gold_eval.py sample`")
    if not rows:
        fail(f"{args.baseline}: no responses in it")
    gold = load_labeller(args.gold, tokenizer, reference.device, args.trust_remote_code)
    pairs = load_pairs(data, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    pick = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:KL_PROMPTS]
    pairs = [pairs[i] for i in pick.tolist()]
    logps_of = logps_of or choose_logps(reference, pairs)
    ref_logps = batch_logps(reference, logps_of, pairs, args.tokens_per_microbatch)
    return Judge(gold, reference, logps_of, tokenizer, [row["prompt_ids"] for _, row in rows],
                 [row["response_ids"] for _, row in rows], pairs, ref_logps,
                 args.max_response_tokens, args.tokens_per_microbatch, args.seed)


def mean_se(name, values):
    """{name: mean, name_se: its standard error} of a tensor of independent values."""
    values = values.double()
    se = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.tensor(math.nan)
    return {f"gold/{name}": values.mean().item(), f"gold/{name}_se": se.item()}


def evaluate(policy, judge):
    """Judge a policy: ({"gold/...": number}, a few samples). The same noise at every call."""
    generator = torch.Generator().manual_seed(judge.seed)
    draw = partial(sample, policy, max_tokens=judge.max_tokens, eos=judge.tokenizer.eos_token_id,
                   generator=generator)
    twice = judge.prompts[:KL_PROMPTS]
    with autocast(policy.device):  # around all steps, so that the weights are cast once
        two = draw(twice, 2)  # two responses each, for the self-classification
        responses = two[::2] + draw(judge.prompts[KL_PROMPTS:], 1)

    margins = prefer(judge.gold, list(zip(judge.prompts, responses, judge.baseline, strict=True)),
                     judge.tokens)
    metrics = mean_se("win_rate", (margins.sign() + 1) / 2)
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
               for i in range(min(4, len(responses)))]
    return metrics, samples


# ---- command line --------------------------------------------------------------------------------


def write_samples(args, policy, tokenizer, device):
    """Write responses to the first distinct prompts of --data, or golden-labelled pairs of two."""
    pairs = load_pairs(args.data, tokenizer, args.max_prompt_tokens, args.max_response_tokens)
    prompts = [list(p) for p in dict.fromkeys(tuple(p) for p, _, _ in pairs)][:args.prompts]
    generator = torch.Generator().manual_seed(args.seed)

    def draw(model):
        with autocast(device):
            return sample(model, prompts, 1, args.max_response_tokens, tokenizer.eos_token_id,
                          generator)

    responses = draw(policy)
    if not args.other:
        decode = partial(tokenizer.decode, skip_special_tokens=True)
        return [{"prompt_ids": p, "response_ids": r, "prompt": decode(p), "response": decode(r)}
                for p, r in zip(prompts, responses, strict=True)]
    if not args.gold:
        fail("--other needs --gold, which labels the pairs")
    other, own = load_policy(args.other, args.trust_remote_code, device)
    gold = load_labeller(args.gold, tokenizer, device, args.trust_remote_code)
    if own.get_vocab() != tokenizer.get_vocab():
        fail(f"{args.other} has another tokenizer than {args.model}")
    pairs = list(zip(prompts, responses, draw(other), strict=True))
    margins = prefer(gold, pairs, args.tokens_per_microbatch).tolist()
    print(f"{args.model} is preferred to {args.other} on {sum(m > 0 for m in margins):,} of "
          f"{len(pairs):,} pairs; {sum(a == b for _, a, b in pairs):,} are equal")
    return [{"prompt_ids": p, "chosen_ids": a if m >= 0 else b, "rejected_ids": b if m >= 0 else a}
            for (p, a, b), m in zip(pairs, margins, strict=True)]


def main(args):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if os.path.exists(args.out):
        fail(f"{args.out} exists; choose another --out, or remove it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy, tokenizer = load_policy(args.model, args.trust_remote_code, device)
    check_lengths(policy, args)
    if args.command == "sample":
        rows = write_samples(args, policy, tokenizer, device)
    else:
        reference, own = load_policy(args.reference, args.trust_remote_code, device)
        if own.get_vocab() != tokenizer.get_vocab():
            fail(f"{args.reference} has another tokenizer than {args.model}")
        metrics, samples = evaluate(policy, load_judge(args, args.data, reference, tokenizer))
        rows = [metrics]
        for s in samples[:2]:
            print(f"> {s['prompt'].strip()}\n  {s['response'].strip()}")
        for name in (n for n in metrics if not n.endswith("_se")):
            print(f"{name:22} {metrics[name]:8.4f} +- {metrics[name + '_se']:.4f}")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".tmp", "w", encoding="utf-8") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(args.out + ".tmp", args.out)
    print(f"{args.out}: written")


if __name__ == "__main__":
    guard(main, parse_args())
