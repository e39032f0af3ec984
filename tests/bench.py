"""Time our training steps, sampler and evaluation on a model folder and a file of pairs.

    python tests/bench.py MODEL PAIRS                  # every measure, each in its own process
    python tests/bench.py MODEL PAIRS --only dpo ipo   # some of them
    python tests/bench.py MODEL PAIRS --only sft dpo --profile   # where the time of a step goes
    python tests/bench.py qwen-0.5b PAIRS              # a random model of Qwen2.5-0.5B's shape

One JSON line each: pairs/s or tokens/s after a warm-up, peak memory in GB and, for training, the
FLOP/s of its matrix products (unpadded tokens, recomputation not counted) as a share of the rate
measured on one large matrix product. `plain` is `dpo` with two rows a pair, `reward` trains a
pointwise preference model. The peers on the same work: `trl` is TRL's DPOTrainer (where installed),
`generate` and `generate-varied` are transformers' own sampling with fixed lengths, and with EOS at
random lengths.
"""

import argparse
import copy
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn.functional as F
import transformers

import dpo
import gold_eval
import ipo
import online_rlhf
import reward
import sft
import slic

MEASURES = ["sft", "reward", "dpo", "plain", "ipo", "slic", "trl", "online", "sample", "generate",
            "sample-varied", "generate-varied", "evaluate"]
KINDS = {"matrix products": ("mm", "addmm", "bmm"), "attention": ("attention",),
         "log-softmax": ("log_softmax", "nll_loss"),
         "optimizer and norm": ("adamw", "vector_norm")}
EOS_CHANCE = 1 / 32  # of ending at each token, where lengths vary


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("model", help="model folder, hub name, or qwen-0.5b")
    p.add_argument("data", help="pairs (jsonl)")
    p.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="what to time")
    p.add_argument("--profile", action="store_true", help="milliseconds of a step by operator")
    p.add_argument("--steps", type=int, default=5, help="timed steps, after one warm-up")
    p.add_argument("--batch-size", type=int, default=16, help="pairs a step")
    p.add_argument("--prompts", type=int, default=32, help="prompts to sample from, twice each")
    p.add_argument("--new-tokens", type=int, default=64, help="sampled tokens a row")
    p.add_argument("--max-prompt-tokens", type=int, default=448, help="the left is cut")
    p.add_argument("--max-response-tokens", type=int, default=512, help="the right is cut")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto",
                   help="of matrix products, ours and generate's")
    p.add_argument("--tokens-per-microbatch", type=int, help="lower saves memory",
                   default=16384 if torch.cuda.is_available() else 1024)
    return p.parse_args(argv)


def sync():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work, times):
    """Seconds of each call of `work(i)`, after one call to warm up."""
    found = []
    for i in range(times + 1):
        sync()
        began = time.perf_counter()
        work(i)
        sync()
        found.append(time.perf_counter() - began)
    return found[1:]


def matmul_rate(device):
    """FLOP/s of one large matrix product: fp32 on CPU, bf16 on CUDA."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / statistics.median(seconds(lambda i: a @ b, 8))


def training_flops(model, pairs):
    """Forward and backward matrix products of pairs in one row each, without padding: 6 a weight
    and token, 12 a layer, width and visible position; the vocabulary on response positions only."""
    config, head = model.config, model.get_output_embeddings().weight
    body = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    total = 0
    for prompt, chosen, rejected in pairs:
        p, c, r = len(prompt), len(chosen), len(rejected)
        seen = p * p / 2 + p * (c + r) + c * c / 2 + r * r / 2
        total += 6 * body * (p + c + r) + 6 * head.numel() * (c + r)
        total += 12 * config.num_hidden_layers * config.hidden_size * seen
    return total


def peak_gb():
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def end_at_random(model, eos):
    """Give the head a bias that makes EOS as likely as EOS_CHANCE where logits are flat."""
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0], device=model.device)
    bias[eos] = torch.tensor(len(bias) * EOS_CHANCE / (1 - EOS_CHANCE)).log()
    head.bias = torch.nn.Parameter(bias)


def make_qwen(data, folder):
    """A random model of Qwen2.5-0.5B's shape and a byte-level tokenizer of the pairs' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rows = list(dpo.read_jsonl(data))
    bpe.train_from_iterator((row["prompt"] + row["chosen"] for row in rows), trainers.BpeTrainer(
        vocab_size=16000, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )).save_pretrained(folder)


def timed(step, args, flops=None):
    """Pairs/s of a training step; its share of the machine's rate; or where its time goes."""
    took = seconds(step, args.steps)
    if args.profile:
        return where_time_goes(step, args.steps, statistics.mean(took))
    found = {"pairs_per_s": args.batch_size * args.steps / sum(took)}
    if flops:
        rate = flops / sum(took)
        found |= {"flop_per_s": rate, "share_of_matmul": rate / matmul_rate(dpo.DEVICE)}
    return found


def batches_of(args, pairs):
    """A batch to warm up and one a step."""
    size = args.batch_size
    return [[pairs[j % len(pairs)] for j in range(i * size, (i + 1) * size)]
            for i in range(args.steps + 1)]


def offline_step(name, args, policy, pairs):
    """A training step of dpo.py, ipo.py or slic.py, reference log-probs computed before."""
    loss_fn = partial({"ipo": ipo.ipo_loss, "slic": slic.slic_loss}.get(name, dpo.dpo_loss),
                      beta=0.1)
    batches = batches_of(args, pairs)
    logps_of = dpo.plain_logps if name == "plain" else dpo.choose_logps(policy, pairs, args)
    with dpo.autocast():
        refs = [dpo.batch_logps(policy, logps_of, b, args.tokens_per_microbatch) for b in batches]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step(i):
        dpo.preference_step(policy, logps_of, loss_fn, batches[i], refs[i], 0.1,
                            args.tokens_per_microbatch)
        dpo.optimizer_step(policy, optimizer, 1e-5, "bench")

    return timed(step, args, sum(training_flops(policy, b) for b in batches[1:]))


def likelihood_step(name, args, policy, pairs):
    """A training step of sft.py, or of `reward.py train --kind pointwise`."""
    model, batches = policy, batches_of(args, pairs)
    if name == "reward":
        model = reward.load_preference_model(args.model, args, "pointwise")[0].to(dpo.DEVICE)
    logps_of = dpo.choose_logps(policy, pairs, args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)

    def step(i):
        for rows in dpo.micro_batches(batches[i], args.tokens_per_microbatch):
            batch = [batches[i][j] for j in rows]
            with dpo.autocast():
                nll = (-logps_of(model, batch) if name == "sft" else
                       F.softplus(-reward.preference_logits(model, batch))).sum()
            nll.backward()
            nll.item()
        dpo.optimizer_step(model, optimizer, 1e-5, "bench")

    return timed(step, args)


def where_time_goes(step, steps, seconds_a_step):
    """Milliseconds of a step by kind of operator, and outside of all (Python, autograd)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for i in range(steps):
            step(i)
    operators = [x for x in profile.key_averages() if x.key.startswith("aten::")]
    found = dict.fromkeys(KINDS, 0.0) | {"other operators": 0.0}
    for x in operators:
        name = x.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names or any(
            len(n) > 4 and n in name for n in names)), "other operators")
        found[kind] += x.self_cpu_time_total / 1e3 / steps
    found["between operators"] = 1e3 * seconds_a_step - sum(found.values())
    return {"ms_a_step": 1e3 * seconds_a_step, **found,
            "operators": sum(x.count for x in operators) / steps}


def trl_step(args):
    """TRL's DPOTrainer, reference log-probs precomputed, as its users run it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    ends, cuda = [], torch.cuda.is_available()

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            sync()
            ends.append(time.perf_counter())

    rows = Dataset.from_list(list(dpo.read_jsonl(args.data)))
    with tempfile.TemporaryDirectory() as folder:
        DPOTrainer(
            model=transformers.AutoModelForCausalLM.from_pretrained(
                args.model, dtype=torch.float32),
            args=DPOConfig(
                output_dir=folder, per_device_train_batch_size=args.batch_size, max_length=512,
                max_steps=args.steps + 2, use_cpu=not cuda, bf16=cuda, beta=0.1,
                gradient_checkpointing=False, learning_rate=1e-5, loss_type=["sigmoid"],
                report_to=[], save_strategy="no", precompute_ref_log_probs=True, disable_tqdm=True,
                logging_steps=1000),
            train_dataset=rows, callbacks=[Clock()],
            processing_class=transformers.AutoTokenizer.from_pretrained(args.model)).train()
    return {"pairs_per_s": args.batch_size * args.steps / (ends[-1] - ends[1])}


def online_step(args, policy, pairs):
    """A whole step of online_rlhf.py, a fresh pairwise preference model as labeller."""
    labeller = reward.load_preference_model(args.model, args, "pairwise")[0].to(dpo.DEVICE)
    reference, size = copy.deepcopy(policy), args.batch_size
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    logps_of = dpo.choose_logps(policy, pairs, args)

    def step(i):
        prompts = [x for x, _, _ in pairs[i * size:(i + 1) * size]]
        with online_rlhf.autocast():
            responses = online_rlhf.sample(policy, prompts, 2, args.new_tokens, [-1],
                                           torch.Generator().manual_seed(i),
                                           tokens=args.tokens_per_microbatch)
        batch = list(zip(prompts, responses[::2], responses[1::2], strict=True))
        reward.prefer(labeller, batch, args.tokens_per_microbatch)
        with online_rlhf.autocast():
            ref = dpo.batch_logps(reference, logps_of, batch, args.tokens_per_microbatch)
        dpo.preference_step(policy, logps_of, partial(ipo.ipo_loss, beta=0.1), batch, ref, 0.1,
                            args.tokens_per_microbatch)
        dpo.optimizer_step(policy, optimizer, 1e-5, "bench")

    return timed(step, args)


def sampler(args, policy, tokenizer, pairs, varied):
    """Two samples a prompt, as in hf_generate.py's work; EOS never, or at random lengths."""
    eos, prompts = tokenizer.eos_token_id if varied else -1, [x for x, _, _ in pairs[:args.prompts]]
    counts = []
    if varied:
        end_at_random(policy, eos)

    def draw(i):
        with gold_eval.autocast():
            responses = gold_eval.sample(policy, prompts, 2, args.new_tokens, [eos],
                                         torch.Generator().manual_seed(i),
                                         tokens=args.tokens_per_microbatch)
        counts.append(sum(map(len, responses)))

    took = seconds(draw, 3)
    return {"tokens_per_s": sum(counts[1:]) / sum(took)}


def generate(args, policy, tokenizer, pairs, varied):
    """transformers' generate on the same prompts, left-padded and repeated twice."""
    prompts = [x for x, _, _ in pairs[:args.prompts] for _ in range(2)]
    width, eos, counts = max(map(len, prompts)), tokenizer.eos_token_id, []
    ids = torch.tensor([[0] * (width - len(x)) + x for x in prompts], device=policy.device)
    real = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in prompts],
                        device=policy.device)
    if varied:
        end_at_random(policy, eos)
    if args.precision == "bf16":
        policy.bfloat16()
    gold_eval.AttentionInterface.register("sdpa", reward.sdpa_attention_forward)  # its own

    def draw(i):
        torch.manual_seed(i)
        with torch.no_grad():
            out = policy.generate(
                ids, attention_mask=real, do_sample=True, temperature=1.0, top_k=0, pad_token_id=0,
                max_new_tokens=args.new_tokens, eos_token_id=eos,
                min_new_tokens=None if varied else args.new_tokens)[:, width:].tolist()
        counts.append(sum(r.index(eos) + 1 if eos in r else len(r) for r in out))

    took = seconds(draw, 3)
    return {"tokens_per_s": sum(counts[1:]) / sum(took)}


def evaluation(args, policy, tokenizer, pairs):
    """gold_eval.evaluate on --prompts prompts."""
    gold = reward.load_preference_model(args.model, args, "pairwise")[0].to(dpo.DEVICE)
    prompts = [x for x, _, _ in pairs[:args.prompts]]
    logps_of = gold_eval.choose_logps(policy, pairs, args)
    judge = gold_eval.Judge(
        gold, copy.deepcopy(policy), logps_of, tokenizer, [tokenizer.eos_token_id], prompts,
        [a for _, a, _ in pairs], pairs,
        gold_eval.batch_logps(policy, logps_of, pairs, args.tokens_per_microbatch),
        args.new_tokens, args.tokens_per_microbatch, 0)
    judge.baseline = judge.baseline[:len(prompts)]
    judge.pairs, judge.ref_logps = pairs[:32], judge.ref_logps[:, :32]
    return {"prompts_per_s": len(prompts) / statistics.median(
        seconds(lambda i: gold_eval.evaluate(policy, judge), 2))}


def measure(name, args):
    """One measure in this process, as one JSON line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args.trust_remote_code = args.skip_refused = False
    args.chat_kwargs = "{}"
    with open(os.devnull, "w") as quiet:
        sys.stdout, out = quiet, sys.stdout
        if name == "trl":
            found = trl_step(args)
        else:
            policy, tokenizer = dpo.load_model(transformers.AutoModelForCausalLM, args.model, args)
            policy.to(dpo.DEVICE)
            for module in (ipo, online_rlhf, reward, sft, slic):
                module.autocast.keywords["enabled"] = args.precision == "bf16"
            pairs = dpo.load_pairs(args.data, tokenizer, args)
            if name == "online":
                found = online_step(args, policy, pairs)
            elif name in ("sft", "reward"):
                found = likelihood_step(name, args, policy, pairs)
            elif name == "evaluate":
                found = evaluation(args, policy, tokenizer, pairs)
            elif name.startswith(("sample", "generate")):
                work = sampler if name.startswith("sample") else generate
                found = work(args, policy, tokenizer, pairs, name.endswith("varied"))
            else:
                found = offline_step(name, args, policy, pairs)
        sys.stdout = out
    name = {"trl": "TRL DPOTrainer"}.get(name, name.replace("generate", "transformers generate"))
    print(json.dumps({"measure": name, **{k: float(f"{v:.4g}") for k, v in found.items()},
                      "peak_gb": round(peak_gb(), 2)}), flush=True)


def main(args):
    if args.model == "qwen-0.5b":
        with tempfile.TemporaryDirectory() as folder:
            make_qwen(args.data, folder)
            return run_each(args, folder)
    if len(args.only) == 1:
        return measure(args.only[0], args)
    run_each(args, args.model)


def run_each(args, model):
    """Every measure in a process of its own, so that one's memory is not counted as another's."""
    rest = [f"--{k.replace('_', '-')}={v}" for k, v in vars(args).items()
            if k not in ("model", "data", "only", "profile")] + ["--profile"] * args.profile
    for name in args.only:
        if name == "trl" and not importlib.util.find_spec("trl"):
            print("trl: not installed", file=sys.stderr)
            continue
        subprocess.run([sys.executable, __file__, model, args.data, "--only", name, *rest],
                       check=True)


if __name__ == "__main__":
    main(parse_args())
