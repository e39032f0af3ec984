"""Tiny models and data, made once; each test sees copies of numbers it can check."""

import json
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny models: a second thread only waits
ARGS = SimpleNamespace(trust_remote_code=False, max_prompt_tokens=32, max_response_tokens=40,
                       chat_kwargs="{}", skip_refused=False, precision="fp32")
SHARED = Path(os.environ.get("PREFERENCE_DATA", ROOT.parent / "shared" / "data"))


def tiny(kind="llama", vocab=50, seed=0, dtype=torch.float32):
    """A random causal language model of 2 layers, of weights that make its logits differ."""
    small = dict(vocab_size=vocab, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    llama_like = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    config = {
        "llama": lambda: transformers.LlamaConfig(**llama_like, **small),
        "qwen": lambda: transformers.Qwen2Config(**llama_like, **small),
        "gemma": lambda: transformers.GemmaConfig(**llama_like, head_dim=8, **small),
        "gemma2": lambda: transformers.Gemma2Config(**llama_like, head_dim=8, **small),
        "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128,
                                                **small),
        "neox": lambda: transformers.GPTNeoXConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, **small),
    }[kind]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8)
    return model


def random_pairs(count, seed=0, vocab=50, low=2, shortest=1):
    """Pairs of random ids with prompts of 1-12 and responses of 1-9 tokens, EOS (1) at the end."""
    g = torch.Generator().manual_seed(seed)

    def ids(longest):
        n = int(torch.randint(shortest, longest + 1, (1,), generator=g))
        return torch.randint(low, vocab, (n,), generator=g).tolist()

    return [(ids(12), ids(8) + [1], ids(8) + [1]) for _ in range(count)]


FORKS = multiprocessing.get_context("forkserver")  # a start of Python with its imports takes 7 s
FORKS.set_forkserver_preload(["pytest", "transformers.models.llama.modeling_llama",
                              "transformers.models.auto.modeling_auto", "safetensors.torch"])


def script(*words):
    """What `python WORDS` does, in the process that calls."""
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


def _forked(out, err, target, *args):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method("fork", force=True)  # or a killed tqdm leaves its semaphore
    torch.set_num_threads(1)
    target(*args)


class Fork:
    """A process of one thread that calls `target`, with what it prints in files of `folder`.

    It is forked from a process that has imported torch and transformers.
    """

    def __init__(self, folder, target, *args):
        self.paths = f"{folder}/stdout", f"{folder}/stderr"
        self.process = FORKS.Process(target=_forked, args=(*self.paths, target, *args))
        self.process.start()

    def end(self):
        """Wait; its (status or negative signal, standard output, standard error)."""
        self.process.join()
        return self.process.exitcode, *(Path(path).read_text() for path in self.paths)

    def succeed(self):
        """Wait; its standard output. An error where it failed."""
        status, out, err = self.end()
        assert status == 0, err
        return out


@pytest.fixture(autouse=True)
def keep_signals():
    """Training loops catch SIGINT and SIGTERM; give them back."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def fused():
    """Attention by torch's fused kernel, as on CUDA, whatever the scripts have registered."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ours = ALL_ATTENTION_FUNCTIONS["sdpa"]
    transformers.AttentionInterface.register("sdpa", sdpa_attention_forward)
    yield
    transformers.AttentionInterface.register("sdpa", ours)


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A small toy pipeline: data, sft, gold (pointwise), proxy (pairwise), baseline."""
    import gold_eval
    import reward
    import sft
    import tasks

    root = tmp_path_factory.mktemp("toy")
    short = ["--max-prompt-tokens", "32", "--max-response-tokens", "40"]
    tasks.main(tasks.parse_args(["toy", "--out", f"{root}/data", "--pairs", "400", "--width",
                                 "32"]))
    sft.main(sft.parse_args(["--model", f"{root}/data/base", "--data", f"{root}/data/initial.jsonl",
                             "--out", f"{root}/sft", "--steps", "40", "--lr", "3e-3", *short]))
    for kind, data, out in (("pointwise", "initial", "gold"), ("pairwise", "golden", "proxy")):
        reward.main(reward.parse_args([
            "train", "--model", f"{root}/sft", "--data", f"{root}/data/{data}.jsonl",
            "--kind", kind, "--out", f"{root}/{out}", "--steps", "20", "--warmup", "5",
            "--lr", "1e-3", "--eval-every", "10", *short]))
        if out == "gold":
            reward.main(reward.parse_args([
                "label", "--model", f"{root}/gold", "--data", f"{root}/data/initial.jsonl",
                "--out", f"{root}/data/golden.jsonl", *short]))
    gold_eval.main(gold_eval.parse_args([
        "sample", "--model", f"{root}/sft", "--data", f"{root}/data/golden.jsonl",
        "--prompts", "24", "--out", f"{root}/baseline.jsonl", *short]))
    return root


def flags(**kwargs):
    """Command-line words of keyword arguments."""
    words = []
    for key, value in kwargs.items():
        words += [f"--{key.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(script, out, **kwargs):
    """Run a training script's main in this process; returns its metrics rows."""
    module = __import__(script)
    module.main(module.parse_args(flags(
        out=out, max_prompt_tokens=32, max_response_tokens=40, **kwargs)))
    return rows_of(f"{out}/metrics.jsonl")


def load_model(folder):
    """(model, tokenizer) of a folder, as the scripts load them."""
    import dpo

    return dpo.load_model(transformers.AutoModelForCausalLM, str(folder), ARGS)


def rows_of(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def weights_of(run):
    from safetensors.torch import load_file

    return load_file(f"{run}/final/model.safetensors")


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
