"""Sparse-to-Dense training of a stock Hugging Face BERT to guess the next character, compared with its dense baseline.

Under a minute on one core:

    python examples/hf_bert_s2d.py

The text is the documentation inside Python's standard library, which every installation has; the vocabulary is its
characters. Nothing is downloaded. One seed: this shows how it is done, not which of the two is better.
"""

import argparse
import copy
import importlib
import inspect
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertLMHeadModel

from s2d3d import EWA, MoFConfig, convert_to_mof_, merge_experts

MODULES = """
    argparse ast collections configparser contextlib csv datetime decimal difflib email fractions functools heapq
    inspect itertools json logging math os pathlib pickle random re shutil socket statistics string subprocess tarfile
    tempfile textwrap threading time tokenize typing unittest urllib uuid zipfile
"""
LENGTH = 64
CHARACTERS = ["", "\n", *map(chr, range(32, 127))]  # the first one is padding


def load_text() -> Tensor:
    """The documentation of some modules as token ids (num_characters,)."""
    texts = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        members = [member for _, member in sorted(vars(module).items()) if getattr(member, "__module__", None) == name]
        texts += [inspect.getdoc(part) or "" for part in (module, *members) if part is module or callable(part)]
    ids = {character: index for index, character in enumerate(CHARACTERS)}
    return torch.tensor([ids[character] for character in "\n".join(texts) if character in ids])


def build_model() -> BertLMHeadModel:
    return BertLMHeadModel(
        BertConfig(
            vocab_size=len(CHARACTERS),
            is_decoder=True,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=LENGTH,
            pad_token_id=0,
        )
    )


def draw_passages(text: Tensor, size: int) -> Tensor:
    """Draw token ids (size, LENGTH) from random places of the text."""
    starts = torch.randint(len(text) - LENGTH, (size, 1))
    return text[starts + torch.arange(LENGTH)]


def train(model: BertLMHeadModel, text: Tensor, steps: int, ewa: EWA | None = None) -> None:
    """Train in place; the only line that knows of experts is `ewa.step()`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        passages = draw_passages(text, 16)
        logits = model(input_ids=passages).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), passages[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if ewa:
            ewa.step()  # 2. after every optimizer step, pull the experts towards their mean


@torch.no_grad()
def accuracy(model: BertLMHeadModel, text: Tensor) -> float:
    """Share of next characters guessed, on the same 128 passages for every model."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        passages = draw_passages(text, 128)
    guesses = model.eval()(input_ids=passages).logits.argmax(-1)
    return float((guesses[:, :-1] == passages[:, 1:]).float().mean())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="optimizer steps of each training (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    arguments = parser.parse_args(argv)
    text = load_text()
    train_text, test_text = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    torch.manual_seed(arguments.seed)
    dense = build_model()
    sparse = copy.deepcopy(dense)  # both start from the same weights
    # 1. before the optimizer. In BERT the FFN is spread over `intermediate` and `output`: the target is the layer.
    names = convert_to_mof_(sparse, MoFConfig(num_experts=4, targets=("*.encoder.layer.*",), every=2))
    print(f"experts in {', '.join(names)}")

    torch.manual_seed(arguments.seed)
    train(dense, train_text, arguments.steps)
    torch.manual_seed(arguments.seed)
    ewa = EWA(sparse, share_rate=0.3, total_steps=arguments.steps)
    train(sparse, train_text, arguments.steps, ewa)
    before = accuracy(sparse, test_text)
    merged = merge_experts(sparse)  # 3. at the end, dense again; merged.save_pretrained(...) writes a stock BERT

    stock = build_model()
    stock.load_state_dict(merged.state_dict(), strict=True)  # the class that transformers ships, no trace of experts
    for title, value in (
        ("dense baseline", accuracy(dense, test_text)),
        ("S2D before merge", before),
        ("S2D merged", accuracy(stock, test_text)),
    ):
        print(f"{title:<26}{100 * value:6.2f} % of next characters")
    for title, model in (("while training", sparse), ("after", stock)):
        print(f"{'parameters ' + title:<26}{sum(p.numel() for p in model.parameters()):,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
