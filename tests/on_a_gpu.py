"""What to run when a GPU is at hand for a quarter of an hour: two commands, nothing to decide.

    python tests/on_a_gpu.py four OUT PAIRS            # numerics, then speed at 0.5B: four minutes
    python tests/on_a_gpu.py seven OUT PAIRS GGUF...   # speed and the main claim on SmolLM2: seven
    python tests/on_a_gpu.py seven OUT PAIRS FOLDER --rehearse   # here, on a CPU, tiny

PAIRS is a file of preference pairs as the hub has them (hh-rlhf's, .jsonl.gz). GGUF is that of
SmolLM2-135M, whole or in parts (`split -b 55M`); FOLDER a model's. A step that fails or runs out of
time is reported and the next one begins: what it printed, the JSON lines of the benchmark, metrics,
samples and the figure are in OUT. Reckoned, not yet run on a GPU.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEEP = ("metrics.jsonl", "samples.jsonl", "args.json", "assessment.json")


def step(out, name, limit, *words, **env):
    """Run a command at most `limit` seconds; what it prints goes to OUT/NAME.txt."""
    began = time.perf_counter()
    with open(f"{out}/{name}.txt", "w") as f:
        try:
            status = subprocess.run([sys.executable, *map(str, words)], stdout=f, timeout=limit,
                                    stderr=subprocess.STDOUT, env=os.environ | env).returncode
        except subprocess.TimeoutExpired:
            status = "out of time"
    print(f"{name}: status {status} after {time.perf_counter() - began:.0f} s", flush=True)


def smollm2(files, folder):
    """SmolLM2 as a model folder, from its GGUF in parts; or the folder that is given."""
    if os.path.isdir(files[0]):
        return files[0]
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/whole.gguf", "wb") as whole:
        for path in sorted(files):
            whole.write(Path(path).read_bytes())
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="whole.gguf",
                                                 dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="whole.gguf")
    del model.config.quantization_config
    model.save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    return f"{folder}/model"


def main(args):
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    tasks, bench, study = (f"{ROOT}/{x}.py" for x in ("tasks", "tests/bench", "study"))
    pairs, data = Path(args.pairs).resolve(), f"{out}/data/smol"
    step(out, "pairs", 60, tasks, "helpful", "--file", pairs, "--text", "--out", data,
         *(["--pairs", 40] if args.rehearse else []))
    short = ["--steps", 1, "--batch-size", 2, "--prompts", 2, "--new-tokens", 4,
             "--max-prompt-tokens", 64, "--max-response-tokens", 16] if args.rehearse else []
    if args.part == "four":
        step(out, "test_cuda", 110, "-m", "pytest", "-q", f"{ROOT}/tests/test_cuda.py")
        model = args.model[0] if args.model else "qwen-0.5b"
        step(out, "bench", 110, bench, model, f"{data}/initial.jsonl", "--only", "dpo", "online",
             "sample", "generate", "evaluate", "trl", *short)
        return
    model = smollm2([os.path.abspath(x) for x in args.model], f"{out}/smollm2")
    step(out, "bench", 75, bench, model, f"{data}/initial.jsonl", "--only", "dpo", "sample",
         "generate", "trl", "--max-prompt-tokens", 256, "--max-response-tokens", 128, *short)
    os.chdir(out)  # data/smol is made: the study goes on from there
    step(out, "study", 600 if args.rehearse else 300, study, "--scale", "smol", "--jobs", 3,
         "--policy", model, "--golden", model, *(["--steps", 1] if args.rehearse else []))
    for path in out.glob("runs/*/*"):  # a few MB to take away; weights stay
        for name in [name for name in KEEP if (path / name).exists()]:
            os.makedirs(f"{out}/kept/{path.name}", exist_ok=True)
            shutil.copy(path / name, f"{out}/kept/{path.name}")
    if os.path.isdir("runs/smol/figures"):
        shutil.copytree("runs/smol/figures", "kept/figures", dirs_exist_ok=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("part", choices=["four", "seven"])
    p.add_argument("out", help="folder for what comes of it")
    p.add_argument("pairs", help="preference pairs as the hub has them")
    p.add_argument("model", nargs="*", help="SmolLM2's GGUF or its parts, or a model folder")
    p.add_argument("--rehearse", action="store_true", help="tiny sizes, to try it without a GPU")
    main(p.parse_args())
