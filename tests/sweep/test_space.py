"""Override syntax means what hydra-optuna-sweeper's users know, and every drawn point is a valid override again."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from mathverify.config import LoraConfig
from mathverify.errors import UserError
from mathverify.sweep import lora_scale
from mathverify.sweep.settings import read_settings
from mathverify.sweep.space import parse_space, value_text

FORMS: list[tuple[str, BaseDistribution]] = [
    ("x=choice(1,2,3)", CategoricalDistribution((1, 2, 3))),
    ("x=1,2,3", CategoricalDistribution((1, 2, 3))),
    ("x=choice(true,false)", CategoricalDistribution((True, False))),
    ("x=choice(0.5,1e-3)", CategoricalDistribution((0.5, 1e-3))),
    ("x=choice([1,2],[3])", CategoricalDistribution(("[1,2]", "[3]"))),
    ("lora=choice(r16,r32)", CategoricalDistribution(("r16", "r32"))),
    ("+x=a,b", CategoricalDistribution(("a", "b"))),
    ("x=range(1,10)", IntDistribution(1, 10)),
    ("x=range(2,10,step=2)", IntDistribution(2, 10, step=2)),
    ("x=range(0,1,step=0.25)", FloatDistribution(0, 1, step=0.25)),
    ("x=interval(0,1)", FloatDistribution(0, 1)),
    ("x=tag(log,interval(1e-5,1e-3))", FloatDistribution(1e-5, 1e-3, log=True)),
    ("x=int(interval(1,8))", IntDistribution(1, 8)),
    ("x=tag(log,int(interval(1,64)))", IntDistribution(1, 64, log=True)),
]


@pytest.mark.parametrize(("text", "distribution"), FORMS)
def test_each_form_is_its_distribution(text: str, distribution: BaseDistribution) -> None:
    ((key, dimension),) = parse_space({}, [text]).dimensions.items()
    assert key == text.partition("=")[0]
    assert dimension.distribution == distribution
    for value in dimension.values() or dimension.ends():
        again = OverridesParser.create().parse_override(dimension.override(value))
        assert not again.is_sweep_override()


def test_a_grid_leaves_out_the_end_of_a_range_as_hydra_does() -> None:
    ((_, d),) = parse_space({}, ["x=range(1,10,step=3)"], grid=True).dimensions.items()
    assert d.values() == [1, 4, 7]


def test_the_command_line_holds_over_params_and_fixes_what_they_search() -> None:
    space = parse_space({"x": "interval(0,1)", "y": "choice(1,2)"}, ["x=0.5", "~z", "+w=3"])
    assert list(space.dimensions) == ["y"]
    assert space.fixed == ("x=0.5", "~z", "+w=3")
    assert space.size == 2


def test_a_way_to_give_alpha_on_the_command_line_takes_the_place_of_the_studys() -> None:
    space = parse_space({"lora.alpha": "choice(16,32)", "x": "choice(1,2)"}, ["lora.alpha_per_rank=choice(1,2)"])
    assert list(space.dimensions) == ["x", "lora.alpha_per_rank"]
    both = parse_space({}, ["lora.alpha=1,2", "lora.alpha_per_rank=1,2"])
    with pytest.raises(UserError, match=r"lora\.alpha_per_rank and lora\.alpha are both searched"):
        lora_scale.searched(list(both.dimensions))


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_equal_ratios_are_equal_scales_at_every_rank(rank: int) -> None:
    def scale(key: str) -> float:
        plain = dict(o.split("=") for o in lora_scale.alpha_overrides(key, 2.0, rank))
        return LoraConfig(rank, float(plain["lora.alpha"]), rslora=plain.get("lora.rslora") == "true").scale

    assert scale(lora_scale.PER_RANK) == pytest.approx(2.0)
    assert scale(lora_scale.PER_SQRT_RANK) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("storage", "whole"),
    [
        ("sqlite:///study.db", "sqlite:////there/study.db"),
        ("sqlite:////abs/study.db", "sqlite:////abs/study.db"),
        ("journal://a/b.log", "journal:///there/a/b.log"),
        ("postgresql://host/db", "postgresql://host/db"),
        (None, None),
    ],
)
def test_a_storage_file_is_the_same_file_from_every_folder(storage: str | None, whole: str | None) -> None:
    keys = {"sampler": {"_target_": "optuna.samplers.TPESampler"}, "storage": storage}
    assert read_settings(keys, Path("/there")).storage == whole


@pytest.mark.parametrize("text", ["x=choice(1,1)", "x=tag(log,interval(0,1))", "x=interval(2,1)"])
def test_what_no_sampler_can_draw_from_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match="x="):
        parse_space({}, [text])


def test_the_older_search_space_key_says_the_same() -> None:
    space = {
        "a": {"type": "categorical", "choices": [1, 2]},
        "b": {"type": "int", "low": 1, "high": 8, "log": True},
        "c": {"type": "float", "low": 0.0, "high": 1.0, "step": 0.25},
        "d": {"type": "int", "low": 1, "high": 8},
    }
    settings = read_settings({"sampler": {"_target_": "optuna.samplers.TPESampler"}, "search_space": space})
    found = {key: d.distribution for key, d in parse_space(settings.params, []).dimensions.items()}
    assert found == {
        "a": CategoricalDistribution((1, 2)),
        "b": IntDistribution(1, 8, log=True),
        "c": FloatDistribution(0, 1, step=0.25),
        "d": IntDistribution(1, 8),
    }


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(
    st.characters(min_codepoint=32, max_codepoint=126), min_size=1)))  # fmt: skip
def test_every_value_is_read_back_as_it_was(value: str | float | bool | None) -> None:
    parsed = OverridesParser.create().parse_override(f"x={value_text(value)}").value()
    if not isinstance(value, str):
        assert parsed == value
    else:
        assert str(getattr(parsed, "text", parsed)).lower() == value.lower()
