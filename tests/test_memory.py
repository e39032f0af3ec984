"""What a model takes on a GPU: the formula of README's table, checked against small cases.

    python tests/test_memory.py        # prints the table
"""

import importlib
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT, Fork, random_pairs, rows_of, same_weights, script, tiny
from safetensors.torch import load_file, save_file
from test_faults import command
from test_processes import start
from test_scripts import timeless

import dpo

QWEN = dict(vocab_size=151936, max_position_embeddings=32768)
MODELS = {  # the shapes of Qwen2.5
    "0.5B": dict(QWEN, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                 num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "1.5B": dict(QWEN, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True),
    "7B": dict(QWEN, vocab_size=152064, hidden_size=3584, intermediate_size=18944,
               num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
               tie_word_embeddings=False)}


def layer_bytes(config, recompute):
    """What the backward pass keeps of a token in a layer: bf16 in, and fp32 between the layers."""
    return 4 * config.hidden_size if recompute else (
        34 * config.hidden_size + 8 * config.intermediate_size)


def memory(config, devices, online, tokens, recompute):
    """Bytes a device at the peak of dpo.py or online_rlhf.py on CUDA, without --gold.

    Trained are fp32 weights (4 bytes), gradients (4) and Adam's moments (8), shared out over the
    devices. Beside them stand bf16 copies of one device's weights, or what is gathered of the
    others': embeddings and head with gradients, and a layer on its way in and out. Online, a
    reference, a labeller of the same size and, on several devices, a whole copy to sample from are
    in bf16, their embeddings in fp32. While it samples, gradients and activations are not there,
    but the KV cache.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(w.numel() for w in model.parameters())
    layer = sum(w.numel() for w in model.model.layers[0].parameters())
    embedding, layers = model.get_input_embeddings().weight.numel(), config.num_hidden_layers
    outside = count - layers * layer
    gathered = 2 * count if devices == 1 else 10 * (outside + layer)
    frozen = (2 + (devices > 1)) * (2 * count + 2 * embedding) if online else 0
    kept = tokens * layers * layer_bytes(config, recompute)
    kept += recompute * tokens * layer_bytes(config, False) + 12 * (1 << 26)  # one layer; logits
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    cache = 8 * tokens * layers * 4 * width + 2 * count * (devices == 1) if online else 0
    found = 12 * count / devices + frozen + max(4 * count / devices + gathered + kept, cache)
    return max(found, 4 * count + kept / layers)  # at the start all is there in fp32, to be tried


def table():
    """README's table: GB a device."""
    rows = ["| GB a device | offline | offline, saving | online | online, saving |",
            "|---|---|---|---|---|"]
    for name, shape in MODELS.items():
        for devices in (1, 8):
            config = transformers.Qwen2Config(**shape)
            found = [memory(config, devices, online, *how) / 1e9 for online in (False, True)
                     for how in ((16384, False), (4096, True))]
            rows.append(f"| {name}, {devices} device{'s' * (devices > 1)} | " +
                        " | ".join(f"{x:.0f}" for x in found) + " |")
    return "\n".join(rows)


def test_readme_has_the_table():
    assert table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("width, inner, heads", [(256, 704, 2), (256, 2048, 4), (512, 704, 8)])
def test_a_token_keeps_what_the_formula_says(width, inner, heads, recompute, fused):
    """Bytes that autograd saves in bf16, of models of 2 and 4 layers, weights aside: within 3%."""
    saved, pairs = [], [([5] * 64, [6] * 16, [7] * 16)] * 2
    for layers in (2, 4):
        config = transformers.LlamaConfig(
            vocab_size=300, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=2)
        model = transformers.AutoModelForCausalLM.from_config(config)
        logps_of = dpo.shard(model, dpo.pair_logps, recompute)
        weights = {shape for w in model.parameters() for shape in (w.shape, w.shape[::-1])}
        found = {}

        def keep(x, found=found, weights=weights):
            if x.shape not in weights:  # neither a weight nor its bf16 copy
                found[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with (torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
              torch.autocast("cpu", torch.bfloat16)):
            logps_of(model, pairs)
        saved.append(sum(storage.nbytes() for storage in found.values()))
    each = (saved[1] - saved[0]) / 2 / (2 * 96)
    assert each == pytest.approx(layer_bytes(config, recompute), rel=0.03)


def held_after_a_step(folder):
    """Print the bytes of weights, gradients and moments that this process holds."""
    importlib.reload(dpo)  # it is one of several now
    args = SimpleNamespace(out=f"{folder}/saved", steps=1, save_every=1, precision="fp32")
    os.makedirs(args.out, exist_ok=True)

    def main(args):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model.register_buffer("kept", torch.tensor(3.0))
        logps_of = dpo.shard(model, dpo.plain_logps, True)
        optimizer = torch.optim.AdamW(model.parameters())
        next(dpo.training_steps(args, model, optimizer))
        logps_of(model, [([5, 6], [7], [8])]).sum().backward()
        optimizer.step()
        held = [x for w in model.parameters() for x in (
            w, w.grad, optimizer.state[w]["exp_avg"], optimizer.state[w]["exp_avg_sq"])]
        dpo.finish_run(args, model, SimpleNamespace(save_pretrained=lambda folder: None), {})
        print(sum(x.to_local().nbytes for x in held), file=sys.stderr)

    dpo.guard(main, args)


def test_what_is_trained_is_shared_out(tmp_path):
    """16 bytes a parameter over the processes; what is saved is whole, buffers too."""
    model = tiny()
    model.save_pretrained(tmp_path)
    ends = [fork.end() for fork in start(tmp_path, 2, [str(tmp_path)], held_after_a_step)]
    assert [status for status, *_ in ends] == [0, 0]
    held = [int(err.split()[-1]) for *_, err in ends]
    assert sum(held) == 16 * sum(w.numel() for w in model.parameters())
    assert held[0] == held[1]
    before, saved = (load_file(f"{folder}/model.safetensors")
                     for folder in (tmp_path, f"{tmp_path}/saved/final"))
    assert saved.pop("kept") == 3 and saved.keys() == before.keys()
    assert all(saved[name].shape == before[name].shape for name in saved)


def logps_and_gradient(folder):
    """Write what a process of a sharded model in bf16 finds, as on CUDA, or one process."""
    importlib.reload(dpo)
    dpo.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=True)

    def main(_):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        logps_of, pairs = dpo.shard(model, dpo.pair_logps, False), random_pairs(8)
        with dpo.autocast():
            logps = logps_of(model, pairs[dpo.RANK::dpo.RANKS])
        logps.sum().backward()
        gradient = torch.cat([dpo.whole(w.grad).flatten() for w in model.parameters()])
        found = torch.zeros(2, 8)
        found[:, dpo.RANK::dpo.RANKS] = logps.detach()
        if dpo.pooled(found) is found and dpo.RANK == 0:
            save_file({"logps": found, "gradient": gradient}, f"{folder}/{dpo.RANKS}")

    dpo.guard(main, SimpleNamespace(out=folder))


def test_sharded_in_bf16(tmp_path):
    """Layers gathered in bf16, as on CUDA, under autocast: one process's, but for rounding."""
    tiny().save_pretrained(tmp_path)
    for ranks in (1, 2):
        for fork in start(tmp_path, ranks, [str(tmp_path)], logps_and_gradient):
            fork.succeed()
    one, two = (load_file(f"{tmp_path}/{ranks}") for ranks in (1, 2))
    assert (one["logps"] - two["logps"]).abs().max() < 0.02 * one["logps"].abs().max()
    assert torch.cosine_similarity(one["gradient"], two["gradient"], dim=0) > 0.999
    assert two["gradient"].norm().item() == pytest.approx(one["gradient"].norm().item(), rel=0.01)


@pytest.mark.parametrize("name", ["dpo", "online_rlhf", "reward"])
def test_layers_computed_again_have_the_same_bits(toy, tmp_path, name):
    """--checkpoint-activations changes no weight and no sample, and evaluates as well."""
    words = command(name, toy, f"{tmp_path}/a", steps=4, eval_every=2, **(
        {} if name == "reward" else dict(gold=f"{toy}/gold", baseline=f"{toy}/baseline.jsonl")))
    Fork(tmp_path, script, *words).succeed()
    words[words.index("--out") + 1] = f"{tmp_path}/b"
    Fork(tmp_path, script, *words, "--checkpoint-activations").succeed()
    assert same_weights(f"{tmp_path}/a", f"{tmp_path}/b")
    assert timeless(rows_of(f"{tmp_path}/a/metrics.jsonl")) == timeless(
        rows_of(f"{tmp_path}/b/metrics.jsonl"))


if __name__ == "__main__":
    print(table())
