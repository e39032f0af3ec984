#!/usr/bin/env bash
# torch 2.13.0, transformers 5.24.0.
#
# Expected: two conversations packed into one row are kept apart by position_ids that start again
# at 0 together with a block-diagonal attention mask. A model that cannot do it says so.
#
# What happens: that holds for attention alone. The recurrent and convolution layers of Mamba 2,
# LFM2, Falcon H1 and Qwen3-Next carry their state over from the first conversation into the second,
# whatever mask and positions say. They take both arguments, and raise nothing.
#
# Seen:
#     second row of two packed ones: how far a token's log-prob is off, at most (nats)
#     Llama        0.0000
#     Mamba 2      1.1009
#     LFM2         0.9502
#     Falcon H1    2.5448
#     Qwen3-Next   1.5968
#
# Why it matters: packing is how preference trainers save padding, and "chosen" packed next to
# "rejected" is the natural pair. The rejected answer is then scored after having read the chosen
# one. Code that was right for Llama goes wrong by changing only the model's name.
#
# What to do: one conversation to a row for these families. Before packing for any new family,
# compare a packed row with the same row alone, as this script does.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import torch
import transformers
from transformers import (FalconH1Config, FalconH1ForCausalLM, Lfm2Config, Lfm2ForCausalLM,
                          LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM,
                          Qwen3NextConfig, Qwen3NextForCausalLM)

transformers.logging.set_verbosity_error()
size = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
heads = dict(intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
models = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**size, **heads)),
    "Mamba 2": lambda: Mamba2ForCausalLM(Mamba2Config(
        **size, num_heads=4, head_dim=16, expand=2, state_size=16, n_groups=1)),
    "LFM2": lambda: Lfm2ForCausalLM(Lfm2Config(
        **size, **heads, layer_types=["conv", "full_attention"])),
    "Falcon H1": lambda: FalconH1ForCausalLM(FalconH1Config(
        **size, **heads, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8)),
    "Qwen3-Next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(
        **size, **heads, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"])),
}
positions = torch.arange(9).repeat(2)[None]  # 0..8, 0..8
segment = torch.tensor([0] * 9 + [1] * 9)
mask = (segment[:, None] == segment) & torch.ones(18, 18, dtype=torch.bool).tril()
print("second row of two packed ones: how far a token's log-prob is off, at most (nats)")
gap = {}
for name, build in models.items():
    torch.manual_seed(0)
    model = build().eval()
    first, second = torch.randint(3, 64, (1, 9)), torch.randint(3, 64, (1, 9))
    score = lambda lg: lg.log_softmax(-1)[0, :-1].gather(1, second[0, 1:, None])
    both = torch.cat([first, second], 1)
    with torch.no_grad():
        alone = score(model(second, use_cache=False).logits)
        packed = score(model(both, position_ids=positions, attention_mask=mask[None, None],
                             use_cache=False).logits[:, 9:])
    gap[name] = (packed - alone).abs().max().item()
    print(f"{name:12} {gap[name]:.4f}")
assert gap.pop("Llama") < 1e-3, "the control is off: the test no longer means anything"
assert all(g > 0.1 for g in gap.values()), "behaviour has changed"
PY
