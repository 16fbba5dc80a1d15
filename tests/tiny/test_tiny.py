"""The embedded base as shipped: its tokenizer keeps the promises of the token doctor, and it can't verify yet."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from mathverify import tiny
from mathverify.examples.arithmetic import generate, held_out
from mathverify.examples.schema import iter_examples
from mathverify.prompts import render


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.path())


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.path()).eval()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return [render(e, with_solution=i % 2 == 0).text for i, e in enumerate(iter_examples(generate(0, 0, 200, 7).test))]


def test_the_checkpoint_is_small_and_complete() -> None:
    names = {file.name for file in tiny.path().iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "card.json",
    } <= names
    assert sum(file.stat().st_size for file in tiny.path().iterdir()) <= 8 * 2**20


def test_every_linear_can_be_quantized_and_long_rows_fit(model: Any) -> None:
    import torch

    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert linears and all(linear.in_features % 64 == 0 for linear in linears)
    assert model.config.max_position_embeddings >= 2048
    assert {p.dtype for p in model.parameters()} == {torch.float32}, "float32 unless asked for less"


def test_special_tokens_are_distinct_and_one_bos_leads(tokenizer: Any, prompts: list[str]) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert None not in ids and len(set(ids)) == 4
    for prompt in prompts:
        tokens = tokenizer(prompt)["input_ids"]
        assert tokens[0] == tokenizer.bos_token_id and tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("verdict", ["True", "False"])
def test_the_verdict_is_one_token_after_the_prompts_own(tokenizer: Any, prompts: list[str], verdict: str) -> None:
    for prompt in prompts:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(prompt + verdict)["input_ids"]
        assert after[:-1] == before and tokenizer.convert_ids_to_tokens(after[-1]) == verdict


def test_a_default_prompt_is_short(tokenizer: Any) -> None:
    rows = list(iter_examples(generate(0, 0, 400, 8).test))
    lengths = [len(tokenizer(render(e, with_solution=False).text)["input_ids"]) for e in rows]
    assert sum(lengths) / len(lengths) < 30


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x\ty  z",
        "∫₀¹ x² dx = ⅓ \\boxed{\\frac{1}{3}}",
        "Ωmega 數學 🙂",
        "Falsehood\n\n\nTrue.",
        "a\r\nb\x00",
    ],
)
def test_any_text_can_be_encoded_and_comes_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_each_digit_is_a_token(tokenizer: Any) -> None:
    assert tokenizer.tokenize("90412") == list("90412")


def test_the_base_solves_but_cannot_verify() -> None:
    from mathverify.tiny.recipe import Recipe, measure

    measured = measure(tiny.path(), Recipe(test_rows=2000), "cpu")
    assert 0.45 <= measured["verifies"]["accuracy"] <= 0.55
    assert 0.45 <= measured["verifies"]["auroc"] <= 0.55
    assert min(measured["solves"].values()) > 0.9
    card = json.loads((tiny.path() / "card.json").read_text())
    assert abs(card["measured"]["verifies"]["accuracy"] - measured["verifies"]["accuracy"]) < 0.05


def test_the_corpus_never_judges_an_answer_and_never_asks_a_held_out_question() -> None:
    from mathverify.tiny.corpus import documents

    judged = []
    for given, learned in islice(documents("test", keyed=0.1), 20_000):
        text = given + learned
        if "Question:\n" in text:
            question = text.split("Question:\n")[1].split("\n\n")[0]
            assert not held_out(question)
        if learned.endswith(("True", "False")):
            judged.append(learned.endswith("True"))
        else:
            assert "True" not in text and "False" not in text
    assert len(judged) > 3000 and abs(sum(judged) / len(judged) - 0.5) < 0.04


def test_the_recipe_reads_text_as_the_tokenizer_does(tokenizer: Any) -> None:
    from mathverify.tiny.corpus import documents
    from mathverify.tiny.recipe import PieceEncoder

    encode = PieceEncoder(tokenizer.backend_tokenizer).encode
    for given, learned in islice(documents("test", keyed=0.1), 500):
        assert [tokenizer.bos_token_id, *encode(given), *encode(learned)] == tokenizer(given + learned)["input_ids"]


def test_packed_documents_do_not_see_each_other(model: Any) -> None:
    import torch

    from mathverify.tiny.recipe import loss_of

    first, second = [1, 40, 41, 42, 2], [1, 50, 51, 2]
    learned = [0, 1, 1, 1, 1], [0, 0, 1, 1]
    with torch.no_grad():
        packed = loss_of(model, torch.tensor([first + second]), torch.tensor([[*learned[0], *learned[1]]]))
        alone = [
            loss_of(model, torch.tensor([i]), torch.tensor([k])) for i, k in zip((first, second), learned, strict=True)
        ]
    assert packed.item() == pytest.approx((4 * alone[0].item() + 2 * alone[1].item()) / 6, abs=1e-4)


@pytest.mark.slow
def test_the_recipe_runs_from_nothing_and_twice_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "base", tmp_path / "two" / "base"]
    for folder in folders:
        command = [
            sys.executable,
            "-m",
            "mathverify.tiny.recipe",
            "--smoke",
            "--device",
            "cpu",
            "--workers",
            "0",
        ]
        subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True)
    one, two = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == two
    card = json.loads((folders[0] / "card.json").read_text())
    assert card["training"]["steps"] == card["recipe"]["steps"]
    assert card["measured"]["verifies"]["rows"] == 64
