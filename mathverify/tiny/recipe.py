"""Re-makes the embedded base from nothing: tokenizer, generated corpus, pre-training, measured card.

    python -m mathverify.tiny.recipe --out runs/tiny --device cuda
    python -m mathverify.tiny.recipe --out /tmp/tiny --smoke          # seconds on a CPU, learns next to nothing

Not for fine-tuning: the base that leaves here must not be able to verify, and the card says how far it can.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mathverify.examples import arithmetic, iter_examples
from mathverify.prompts import render
from mathverify.tiny.corpus import documents

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
# A piece is a section heading, a run of newlines, one digit, a verdict word, or all text between two of these: BPE
# may merge across spaces, so the fixed instruction is five tokens and a whole prompt about twenty-two.
PIECES = r"(?:\n\n)?[A-Z]\w*:\n|\n+|\d|True|False"


@dataclass(frozen=True)
class Recipe:
    """Everything the result depends on. Sizes are in tokens unless they say otherwise."""

    seed: int = 1
    vocabulary: int = 2048
    tokenizer_documents: int = 60_000
    keyed: float = 0.1  # share of documents
    hidden: int = 128
    intermediate: int = 384
    layers: int = 6
    head: int = 32
    row: int = 128  # packed documents a row
    rows: int = 256  # a step
    steps: int = 15_534  # half a billion tokens
    warmup: int = 500
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    level_rows: int = 6000
    test_rows: int = 4000

    @classmethod
    def smoke(cls) -> Recipe:
        return cls(
            vocabulary=512, tokenizer_documents=500, hidden=64, intermediate=128, layers=2,
            rows=8, steps=20, warmup=5, level_rows=64, test_rows=64,
        )  # fmt: skip


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (any text can be encoded) that puts one BOS before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[PAD, BOS, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = islice(documents(f"{recipe.seed} tokenizer", recipe.keyed), recipe.tokenizer_documents)
    tokenizer.train_from_iterator((given + learned for given, learned in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=2048,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe) -> Any:
    """A fresh Llama with tied embeddings; every linear's in_features is a multiple of 64, as bitsandbytes asks."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // recipe.head,
        num_key_value_heads=recipe.hidden // recipe.head,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


class PieceEncoder(dict[str, list[int]]):
    """Text -> ids, the tokenizer's own but five times as fast: BPE never crosses a piece, so each is kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __missing__(self, piece: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(piece, add_special_tokens=False).ids
        if len(self) < 200_000:
            self[piece] = ids
        return ids

    def encode(self, text: str) -> list[int]:
        return [token for piece in _SPLIT(text) if piece for token in self[piece]]


_SPLIT = re.compile(f"({PIECES})").split


class PackedRows(IterableDataset[torch.Tensor]):
    """Steps of int16 [2, rows, row]: token ids, and whether each is to be learned.

    Whole documents (BOS text EOS) are laid end to end, and the rest of a row is padded. Endless. Each worker has
    its own stream, seeded by its number: with the same number of workers the order is the same every time.
    """

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer

    def __iter__(self) -> Iterator[torch.Tensor]:
        info, size = get_worker_info(), self.recipe.row
        encode = PieceEncoder(self.tokenizer).encode
        rows: list[tuple[list[int], list[int]]] = [([], [])]
        for given, learned in documents(f"{self.recipe.seed} corpus {info.id if info else 0}", self.recipe.keyed):
            context, target = [BOS_ID, *encode(given)], [*encode(learned), EOS_ID]
            if len(context) + len(target) > size:
                continue
            if len(rows[-1][0]) + len(context) + len(target) > size:
                for part in rows[-1]:
                    part.extend([PAD_ID] * (size - len(part)))
                if len(rows) == self.recipe.rows:
                    yield torch.tensor(rows, dtype=torch.int16).transpose(0, 1)
                    rows = []
                rows.append(([], []))
            rows[-1][0].extend(context + target)
            rows[-1][1].extend([0] * len(context) + [1] * len(target))


def stream(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> Iterator[torch.Tensor]:
    rows = PackedRows(recipe, tokenizer)
    return iter(DataLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy over the `learned` tokens of packed rows; a document attends to itself only.

    ids, learned: int64 [rows, row]. Logits are made only where the next token is to be learned.
    """
    document = (ids == BOS_ID).cumsum(1)
    same = document[:, None, :, None] == document[:, None, None, :]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    hidden = model.model(input_ids=ids, attention_mask=same & causal, use_cache=False).last_hidden_state
    before = learned[:, 1:].bool()
    return F.cross_entropy(model.lm_head(hidden[:, :-1][before]).float(), ids[:, 1:][before])


def pretrain(
    model: LlamaForCausalLM, recipe: Recipe, tokenizer: Tokenizer, device: str, workers: int, limit: float
) -> dict[str, Any]:
    """Train in place; the learning rate warms up, holds, and falls to zero over the last half.

    `limit` in seconds is for a machine that is lent for a while: as it nears, the learning rate falls early and
    training ends there. Returns what it took.
    """
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    batches, start, curve = stream(recipe, tokenizer, workers), time.perf_counter(), []
    step, every = 0, max(1, recipe.steps // 100)
    while (progress := max(step / recipe.steps, (time.perf_counter() - start) / limit)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(1, (step + 1) / recipe.warmup, 2 * (1 - progress))
        ids, learned = next(batches).to(device, non_blocking=True).long()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model, ids, learned)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % every == 0:  # .item() waits for the device: seldom
            curve.append(loss.item())
            rate = step * ids.numel() / (time.perf_counter() - start)
            print(f"step {step:6d}  loss {curve[-1]:.4f}  {rate:,.0f} tokens/s  {progress:.0%}", flush=True)
    last = curve[-5:]
    return {
        "steps": step,
        "tokens": step * recipe.rows * recipe.row,
        "seconds": round(time.perf_counter() - start, 1),
        "loss": round(sum(last) / len(last), 4) if last else None,
        "hardware": torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()}, {os.cpu_count()} cores",
    }


@torch.no_grad()
def level_verdicts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, device: str) -> None:
    """Take from the two verdict rows of the embedding what little they say about correctness.

    The coin holds logit(True) - logit(False) within about 0.003 of a constant, but the rest of it can lean to the
    right side. With d the mean last hidden state [hidden] of right prompts less that of wrong ones, the difference
    w of the two rows becomes w - (w.d / d.d) d, half of the change on each row: the mean scores are then equal.
    """
    rows = arithmetic.generate(recipe.level_rows, 0, 0, seed=777).train
    examples = list(iter_examples(rows))
    right = torch.tensor([e.is_correct for e in examples])
    prompts = [tokenizer(render(e, with_solution=False).text)["input_ids"] for e in examples]
    hidden = torch.cat(
        [
            model.model(input_ids=ids).last_hidden_state[torch.arange(len(at)), at].cpu()
            for ids, at in _batches(prompts, device)
        ]
    )
    lean = (hidden[right].mean(0) - hidden[~right].mean(0)).to(device)
    embedding: torch.Tensor = model.model.embed_tokens.weight
    true, false = (tokenizer.convert_tokens_to_ids(word) for word in ("True", "False"))
    change = ((embedding[true] - embedding[false]) @ lean) / (lean @ lean) * lean
    embedding[true] -= change / 2
    embedding[false] += change / 2


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Weights stored in bfloat16 (half the size), loaded in float32 unless the caller says otherwise."""
    half: Any = LlamaForCausalLM(model.config)
    half.to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for name, key, value in (
        ("config.json", "dtype", "float32"),
        (
            "tokenizer_config.json",
            "tokenizer_class",
            "PreTrainedTokenizerFast",
        ),  # the name every version knows
    ):
        fields = json.loads((out / name).read_text()) | {key: value}
        for passing in ("is_local", "local_files_only"):  # how it was loaded here is nobody's business
            fields.pop(passing, None)
        (out / name).write_text(json.dumps(fields, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)  # a wheel would carry the writer's 0600 along


@torch.no_grad()
def measure(out: Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """What the saved base can do on held-out questions.

    `verifies`: accuracy and AUROC of logit(True) - logit(False) after the prompt; near 0.5 by design.
    `solves`: for each kind, how often the most likely token is right at every position of the right answer.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model: Any = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    model.to(device).eval()
    examples = list(iter_examples(arithmetic.generate(0, 0, recipe.test_rows, seed=12345).test))
    labels = torch.tensor([e.is_correct for e in examples])
    prompts = [tokenizer(render(e, with_solution=False).text)["input_ids"] for e in examples]
    true, false = tokenizer.convert_tokens_to_ids(["True", "False"])
    scores = []
    for ids, at in _batches(prompts, device):
        logits = model(input_ids=ids).logits[torch.arange(len(at)), at]
        scores.append((logits[:, true] - logits[:, false]).cpu())
    score = torch.cat(scores)
    solved: dict[str, list[float]] = {}
    right = [e for e in examples if e.is_correct]
    heads = [f"Question:\n{e.question}\n\nAnswer:\n" for e in right]
    starts = [len(tokenizer(head)["input_ids"]) for head in heads]
    texts = [[*tokenizer(head + e.answer)["input_ids"], EOS_ID] for head, e in zip(heads, right, strict=True)]
    row = 0
    for ids, at in _batches(texts, device):
        hits = model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
        for index, end in enumerate(at.tolist()):
            solved.setdefault(right[row].slice, []).append(float(hits[index, starts[row] - 1 : end].all()))
            row += 1
    accuracy = ((score > 0) == labels).double().mean().item()
    return {
        "verifies": {
            "accuracy": round(accuracy, 4),
            "auroc": round(auroc(score, labels), 4),
            "rows": len(examples),
        },
        "solves": {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(solved.items())},
    }


def auroc(score: torch.Tensor, label: torch.Tensor) -> float:
    """P(score of a right row > score of a wrong row), ties half: the Mann-Whitney U statistic over n0 n1."""
    rank = torch.stack([(score < s).sum() + ((score == s).sum() + 1) / 2 for s in score])
    ones = label.sum()
    return float((rank[label].sum() - ones * (ones + 1) / 2) / (ones * (len(label) - ones)))


def _batches(texts: list[list[int]], device: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Right-padded ids [256, longest] and the position of each text's last token [256]."""
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        longest = max(map(len, part))
        ids = torch.tensor([text + [PAD_ID] * (longest - len(text)) for text in part])
        yield ids.to(device), torch.tensor([len(text) - 1 for text in part], device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=max(0, (os.cpu_count() or 1) - 1), help="corpus processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end training, annealed, by then")
    parser.add_argument("--smoke", action="store_true", help="the smallest size that runs")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=f"default {value}")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in asdict(Recipe()) if getattr(args, name) is not None}
    recipe = Recipe(**{**asdict(Recipe.smoke() if args.smoke else Recipe()), **given})
    make(recipe, args.out, args.device, args.workers, args.seconds)


def make(recipe: Recipe, out: Path, device: str, workers: int, limit: float) -> None:
    """Tokenizer, training, levelling, and the card of what came out."""
    tokenizer, model = make_tokenizer(recipe), make_model(recipe).to(device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        for layer in model.model.layers:
            layer.compile()
    training = pretrain(model, recipe, tokenizer.backend_tokenizer, device, workers, limit)
    save(model, tokenizer, out)
    before = measure(out, recipe, device)["verifies"]
    level_verdicts(model, tokenizer, recipe, device)
    save(model, tokenizer, out)
    write_card(out, recipe, training, before, measure(out, recipe, device))


def write_card(
    out: Path, recipe: Recipe, training: dict[str, Any], before: dict[str, Any], measured: dict[str, Any]
) -> None:
    """card.json beside the weights: how they were made, on what, in how long, and what they can do."""
    card = {
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "training": training,
        "verifies_before_levelling": before,
        "measured": measured,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
