"""Every causal language model of the installed transformers, tiny, through what the scripts do.

    python tests/families.py results/families.md            # all: some minutes
    python tests/families.py results/families.md llama qwen3_5_text   # some

Truth is the model's own logits, one unpadded row at a time, in fp64 where the model runs in it.
Sliding windows are of 8 tokens, rows are longer. A cell says how it is done where it is right, what
is wrong, or the line with which it is refused.
"""

import contextlib
import copy
import io
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from types import SimpleNamespace

import torch
import transformers
from conftest import ARGS
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import dpo
import gold_eval
import reward

HEADS = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head",
                       "decoder_attention_heads", "encoder_attention_heads"), 4)
LAYERS = dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "decoder_layers",
                        "encoder_layers"), 2)
WIDE = dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 32)
INNER = dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim",
                       "encoder_ffn_dim", "n_inner"), 48)
EXPERTS = dict(num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
               moe_intermediate_size=16, first_k_dense_replace=1, n_group=1, topk_group=1)
SMALL = HEADS | LAYERS | WIDE | INNER | EXPERTS | dict(
    vocab_size=160, unpadded_vocab_size=160, vocab_size_per_layer_input=160, head_dim=8,
    rotary_dim=4, max_position_embeddings=128, n_positions=128,
    state_size=8, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
    v_head_dim=8, sliding_window=8, num_nextn_predict_layers=0, pad_token_id=0, bos_token_id=1,
    eos_token_id=1, initializer_range=0.3, is_decoder=True)
OF_ONE = {  # what a type wants beside; BERT as the hub has it reads both ways
    "bert": dict(is_decoder=False),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=8),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8, expand=2),
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8, attn_layer_indices=[1], mamba_d_state=8),
    "granitemoehybrid": dict(mamba_n_heads=8, layer_types=["mamba", "attention"]),
    "falcon_h1": dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_d_state=8),
    "recurrent_gemma": dict(block_types=["recurrent", "attention"]),
    "reformer": dict(axial_pos_embds_dim=(16, 16)),
    "zaya": dict(num_experts_per_tok=1),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "nemotron_h": dict(layers_block_type=["linear_attention", "full_attention"]),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"], num_hidden_layers=2,
                   hybrid_layer_ids=[1], attention_head_dim=16, mamba_headdim=8),
    "mimo_v2_flash": dict(head_dim=16),
    "dots1": dict(n_shared_experts=1),
    "gemma3n_text": dict(num_kv_shared_layers=0),
    "gemma4_text": dict(num_kv_shared_layers=0, hidden_size_per_layer_input=0)}


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, 160)}
    core = Tokenizer(models.WordLevel(words, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>",
                                                pad_token="<pad>")


def small(base, kind, leave):
    """The settings of a configuration that make it tiny, also of those inside it."""
    fixed = {k for c in type(base).__mro__ for k, v in vars(c).items() if isinstance(v, property)}
    fixed |= set(getattr(base, "per_layer_attributes", None) or ())  # of Gemma 4
    given = {k: v for k, v in SMALL.items() if k not in fixed | leave and hasattr(base, k)}
    kinds = [*dict.fromkeys(getattr(base, "layer_types", None) or [])]
    if kinds and not {"layer_types", "layers_block_type"} & (fixed | leave):
        given["layer_types"] = [kinds[0], kinds[-1]]
    return given | OF_ONE.get(kind, {}) | {
        k: small(v, kind, leave) for k, v in vars(base).items()
        if isinstance(v, transformers.PreTrainedConfig)}


def make(kind, folder):
    """A tiny random model of a type, with a tokenizer, in `folder`."""
    auto, why = transformers.AutoModelForCausalLM, []
    for leave in ({}, {"head_dim"}, {"layer_types"}, {"layer_types", "head_dim"},
                  {"max_position_embeddings", "n_positions"}, {*EXPERTS}):
        try:
            config = transformers.AutoConfig.for_model(
                kind, **small(transformers.AutoConfig.for_model(kind), kind, {*leave}))
            with torch.device("meta"):
                size = sum(w.numel() for w in auto.from_config(config).parameters())
            if size > 3e7:
                raise ValueError(f"{size / 1e6:.0f} million weights by the settings above")
            torch.manual_seed(0)
            auto.from_config(config).eval().save_pretrained(folder)
            return tokenizer().save_pretrained(folder)
        except Exception as e:
            why.append(e)
    raise why[0]


def ids(count, seed):
    return torch.randint(5, 150, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


PAIRS = [(ids(9 + i, i), ids(12 - i, 10 + i), ids(14 + 2 * i, 20 + i)) for i in range(3)]


@torch.no_grad()
def log_softmax(model, prompt, response):
    """(tokens, V) of a response, from one unpadded row."""
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
    return logits[0, len(prompt) - 1:-1].double().log_softmax(-1)


def exact(model):
    """The model in fp64, if it runs so."""
    try:
        double = copy.deepcopy(model).double()
        log_softmax(double, *PAIRS[0][:2])
        return double
    except Exception:  # a type is written into its code
        return model


@torch.no_grad()
def logps(model, truth):
    logps_of = dpo.choose_logps(model, PAIRS, ARGS)
    right = torch.tensor([[log_softmax(truth, x, y).gather(1, torch.tensor(y)[:, None]).sum()
                           for x, *ys in PAIRS for y in [ys[side]]] for side in (0, 1)])
    gap = (logps_of(model, PAIRS) - right).abs().max().item()
    way = "one row a pair" if logps_of is dpo.pair_logps else "plain rows"
    return way if gap < 0.02 else f"WRONG by {gap:.2g} nats ({way})"


@torch.no_grad()
def kl(model, truth):
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.mul_(0.9)
    rows = [(x, y) for x, y, _ in PAIRS]
    found = gold_eval.response_kl(model, other, rows, 1024)
    double = exact(other)
    for (x, y), value in zip(rows, found.tolist(), strict=True):
        p, q = log_softmax(truth, x, y), log_softmax(double, x, y)
        right = (p.exp() * (p - q)).sum().item()
        if not math.isclose(value, right, rel_tol=5e-3, abs_tol=5e-3):
            return f"WRONG: {value:.4g} for {right:.4g}"
    return "right"


@torch.no_grad()
def sampling(model, truth):
    prompts = [x for x, *_ in PAIRS]
    found = gold_eval.sample(model, prompts, 1, 12, [1], torch.Generator(), 150, greedy=True)
    way = {gold_eval.decode: "our cache", gold_eval.generate: "its own cache",
           gold_eval.recompute: "no cache"}[model.decode]
    for prompt, response in zip(prompts, found, strict=True):
        for t, token in enumerate(response):
            logits = model(input_ids=torch.tensor([prompt + response[:t]]), use_cache=False).logits
            top = logits[0, -1, :150]
            if top[token] < top.max() - 1e-3:
                return f"WRONG at token {t} ({way})"
    return way


@torch.no_grad()
def preferences(folder):
    model, tok = reward.load_preference_model(folder, ARGS, "pointwise")
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(0))
    reward.choose_rows(model, PAIRS, ARGS)
    found = reward.preference_logits(model, PAIRS)

    def score(x, y):
        hidden = model.base_model(input_ids=torch.tensor([x + y]), use_cache=False)[0]
        return reward.SCORE_SCALE * model.score(hidden)[0, len(x):].mean()

    right = torch.stack([score(x, a) - score(x, b) for x, a, b in PAIRS])
    reward.save_model(f"{folder}/preference", model, tok)
    again = reward.load_preference_model(f"{folder}/preference", ARGS)[0]
    way = "plain rows" if model.config.plain_rows else "one row a pair"
    if (found - right).norm() > 1e-2 * right.norm():
        return f"WRONG by {(found - right).abs().max():.2g} ({way})"
    gap = (reward.preference_logits(again, PAIRS) - found).norm()  # where weights lie in memory
    return way if gap <= 1e-5 * found.norm() else "WRONG once saved"  # may change a rounding


def saved(model, folder):
    """Does what finish_run writes load again, with the same log-probs?"""
    args = SimpleNamespace(out=f"{folder}/run", steps=1)
    os.makedirs(args.out)
    dpo.finish_run(args, model, tokenizer(), {})
    again, _ = dpo.load_model(transformers.AutoModelForCausalLM, args.out, ARGS)
    same = torch.equal(log_softmax(again, *PAIRS[0][:2]), log_softmax(model, *PAIRS[0][:2]))
    return "yes" if same else "WRONG"


def said(check, *args):
    """What a check returns, or the line with which it is refused, or the error: a traceback."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            return check(*args)
    except SystemExit:
        line = " ".join(err.getvalue().split("error: ")[-1].split())
        line = line.split(tempfile.gettempdir())[-1].partition(": ")[2]
        return "refused: " + line.partition("; needed are")[0][:90]
    except TimeoutError:
        return "not tried: too slow here"
    except Exception as e:
        return f"TRACEBACK {type(e).__name__}: {' '.join(str(e).split())[:80]}"


def row(kind):
    """One line of the table: what becomes of a model type."""
    with tempfile.TemporaryDirectory() as folder:
        signal.alarm(60)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(
                    io.StringIO()):
                make(kind, folder)
        except Exception as e:
            return [kind, f"not built here: {type(e).__name__}: {' '.join(str(e).split())[:60]}"]
        finally:
            signal.alarm(0)
        cells = [kind]
        signal.alarm(100)
        model = said(lambda: dpo.load_model(transformers.AutoModelForCausalLM, folder, ARGS)[0])
        if isinstance(model, str):
            cells += [model]
        else:
            truth = exact(model)
            cells += [said(logps, model, truth), said(kl, model, truth),
                      said(sampling, model, truth), said(preferences, folder),
                      said(saved, model, folder)]
        signal.alarm(0)
        shutil.rmtree(folder, ignore_errors=True)
        return cells


def late(*_):
    raise TimeoutError


HEAD = ["model type", "log-probs", "KL", "sampling", "preference model", "saved and loaded"]


def main(out, *kinds):
    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))  # one that is not tiny: an error
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for kind in kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        rows.append(row(kind))
        print(*rows[-1], sep=" | ", flush=True)
    full = [r for r in rows if len(r) == len(HEAD)]
    counts = [f"- {name}: " + ", ".join(f"{count} {what}" for what, count in Counter(
        r[i].split(" by ")[0].split(":")[0] for r in full).most_common())
        for i, name in enumerate(HEAD) if i]
    text = [
        "# Every causal language model of transformers through the scripts", "",
        f"transformers {transformers.__version__}, torch {torch.__version__}; "
        f"`python tests/families.py results/families.md`. {len(rows)} model types, each a tiny "
        "random model; truth is one unpadded row at a time, in fp64 where the model runs in it; "
        "windows of 8 tokens are shorter than the rows. Nothing may be WRONG or a TRACEBACK: what "
        "is not right is refused with the line that is quoted. `one row a pair` and `our cache` "
        "are the fast ways; `plain rows`, `its own cache` (transformers' generate) and `no cache` "
        "(every token computes its row anew) are right and slower, and said at the start.", "",
        *counts,
        f"- refused at the start: {sum('refused' in r[1] for r in rows if len(r) == 2)}; "
        f"not built here: {sum('not built' in r[1] for r in rows if len(r) == 2)}", "",
        "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|",
        *("| " + " | ".join(cell.replace("|", "/") for cell in r + [""] * (len(HEAD) - len(r)))
          + " |" for r in rows)]
    with open(out, "w", encoding="utf-8") as f:
        f.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
