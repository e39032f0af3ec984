"""A world known by hand: models that are tables, a judge that scores words, one-word responses.

Its files and folders are what every command line takes. `test_answers.py` says what comes out.
"""

import itertools
import json
from math import log

import torch
from conftest import ARGS, flags, rows_of
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import gold_eval
import reward
import tasks

GOOD, FAIR, BAD = {"good": 1}, {"fair": 1}, {"bad": 1}  # policies that always say one word
HALF = {"good": 0.5, "bad": 0.5}  # most often the reference
RAISED, LOWERED = {"good": 0.9, "bad": 0.1}, {"good": 0.1, "bad": 0.9}
SCORES = {"good": log(4), "bad": -log(4)}  # halved by the end of a response, which scores 0


class World:
    def __init__(self, root):
        tasks.make_base(["fox owl cow good fair bad"], f"{root}/words", 16, 1, 0, 0, words=True)
        self.root, self.count = root, itertools.count()
        _, self.tokenizer = gold_eval.load_model(LlamaForCausalLM, f"{root}/words", ARGS)
        self.words = self.tokenizer.convert_ids_to_tokens(range(len(self.tokenizer)))
        self.pairwise, self.pointwise = map(self.judge, ("pairwise", "pointwise"))

    def path(self):
        return f"{self.root}/{next(self.count)}"

    def save(self, kind, head, **config):
        """Folder of a model whose logits are head[:, last token]: its layers add nothing."""
        size, folder = len(self.words), self.path()
        model = kind(LlamaConfig(
            vocab_size=size, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=1, bos_token_id=None, eos_token_id=1, pad_token_id=0, num_labels=1,
            max_position_embeddings=128, rms_norm_eps=1e-12, **config))
        for name, weight in model.named_parameters():
            weight.data.fill_("norm" in name)
        model.get_input_embeddings().weight.data[:] = torch.eye(size, 16)
        (model.lm_head if kind is LlamaForCausalLM else model.score).weight.data[:, :size] = (
            torch.tensor(head) / 4)  # the norm makes the 1 of an embedding 4
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def writer(self, first, **after):
        """Folder of a language model: `first` follows any prompt; what follows single words."""
        after = {word: {"<eos>": 1} for word in ("good", "fair", "bad")} | after
        return self.save(LlamaForCausalLM, [
            [log(after.get(last, first).get(word, 1e-13)) for last in self.words]
            for word in self.words])

    def judge(self, kind):
        """Folder of a preference model that scores words."""
        return self.save(LlamaForSequenceClassification, [
            [SCORES.get(word, 0.0) / reward.SCORE_SCALE for word in self.words]],
            preference_kind=kind)

    def load(self, folder):
        return gold_eval.load_model(LlamaForCausalLM, folder, ARGS)[0]

    def labeller(self, kind="pairwise"):
        return reward.load_labeller(getattr(self, kind), self.tokenizer, ARGS)

    def ids(self, text):
        """Ids of "fox", or of a response, which "." ends."""
        return self.tokenizer(text.replace(".", " <eos>")).input_ids

    def pairs(self, *lines):
        """(prompt, chosen, rejected) ids of lines as "fox: good > bad"."""
        return [(self.ids(x), self.ids(f"{a}."), self.ids(f"{b}.")) for x, a, b in map(cut, lines)]

    def file(self, lines, ids=False):
        """A .jsonl file of lines "fox: good > bad", or of a baseline's, "fox: fair"."""
        path = f"{self.path()}.jsonl"
        with open(path, "w") as f:
            for line in lines:
                prompt, *said = cut(line)
                names = ("chosen", "rejected") if said[1:] else ("response",)
                row = {"prompt": prompt, **dict(zip(names, said, strict=True))}
                if ids or not said[1:]:
                    row = {f"{k}_ids": self.ids(x + "." * (k != "prompt")) for k, x in row.items()}
                f.write(json.dumps(row) + "\n")
        return path

    def run(self, module, *command, **options):
        """What a command line of a script writes: its path."""
        out = self.path()
        module.main(module.parse_args([*command, *flags(
            out=out, max_prompt_tokens=8, max_response_tokens=8, **options)]))
        return out

    def judged(self, policy, baseline, data=("fox: good > bad",), reference=HALF, **options):
        """The metrics of `gold_eval.py judge`."""
        return rows_of(self.run(
            gold_eval, "judge", model=self.writer(policy), reference=self.writer(reference),
            gold=self.pairwise, baseline=self.file(baseline), data=self.file(data), **options))[0]

    def trained(self, module, *command, start=HALF, lr=0.03, **options):
        """(run folder, metrics) of a few steps of a training script."""
        out = self.run(module, *command, model=self.writer(start), lr=lr, warmup=1, **options)
        return out, rows_of(f"{out}/metrics.jsonl")


def cut(line):
    return line.replace(" > ", ": ").split(": ")
