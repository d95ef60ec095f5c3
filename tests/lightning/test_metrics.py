"""GradientVariance: no bias, sums over updates and ranks, kinds of parameters; the loop of VarianceTarget."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sus_lightning import (
    CosineSchedule,
    ExponentialSchedule,
    GradientVariance,
    LinearSchedule,
    StepSchedule,
    VarianceTarget,
)
from sus_lightning.parameter_kinds import classify
from sus_lightning.schedules import as_schedule, value_at

SIZE, BATCH = 40, 8
TRUE_G = torch.linspace(-1, 2, SIZE, dtype=torch.float64) * 2  # large enough for its square to be known to 0.3%
SCALES = torch.linspace(0.5, 2, SIZE, dtype=torch.float64)  # per-example standard deviations
NOISE = 0.3  # standard deviation that SUS adds to an entry


def gradient(generator: torch.Generator, examples: int) -> Tensor:
    return TRUE_G + SCALES * torch.randn(examples, SIZE, generator=generator, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("halves", [False, True])
def test_estimators_have_no_bias(halves: bool) -> None:
    """The mean over many updates is the known value, within five standard errors of itself."""
    generator = torch.Generator().manual_seed(0)
    metric, single = GradientVariance(), GradientVariance()
    values: dict[str, list[float]] = {"sus_variance": [], "batch_variance": [], "product": []}
    for _ in range(4000):
        single.reset()
        examples = BATCH // 2 if halves else BATCH
        pair = gradient(generator, examples), gradient(generator, examples)
        sus = pair[0] + NOISE * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        for m in (metric, single):
            m.update([pair[0]], sus=[sus])
            m.update([pair[0]], other=[pair[1]], halves=halves)
        computed = single.compute()
        values["sus_variance"].append(float(computed["sus_variance"]))
        values["batch_variance"].append(float(computed["batch_variance"]))
        values["product"].append(float(single.product.sum()))
    expected = {
        "sus_variance": NOISE**2 * SIZE,
        "batch_variance": float(SCALES.square().sum()) / BATCH,
        "product": float(TRUE_G @ TRUE_G),
    }
    for name, seen in values.items():
        error = float(torch.tensor(seen).std()) / len(seen) ** 0.5
        mean = sum(seen) / len(seen)
        assert abs(mean - expected[name]) < 5 * error, name
        assert abs(1.03 * mean - expected[name]) > 5 * error, f"{name}: a bias of 3% would not be seen"
    ratio = expected["sus_variance"] / expected["batch_variance"]
    # The ratio of averages; the average of ratios is larger.
    assert float(metric.compute()["relative_variance"]) == pytest.approx(ratio, rel=0.02)
    noise_scale = expected["batch_variance"] / expected["product"]
    assert float(metric.compute()["gradient_noise_scale"]) == pytest.approx(noise_scale, rel=0.05)


def random_updates(count: int) -> list[tuple[list[Tensor], dict[str, Any]]]:
    generator = torch.Generator().manual_seed(count)
    updates = []
    for i in range(count):
        first, second = ([torch.randn(s, generator=generator) for s in ((4, 4), (12, 4), (4,))] for _ in range(2))
        updates.append((first, {("sus" if i % 2 else "other"): second}))
    return updates


NAMES = [("layers.0.attn.q_proj.weight", torch.Size([4, 4])), ("layers.1.attn.qkv.weight", torch.Size([12, 4]))]
NAMES += [("head.bias", torch.Size([4]))]


def test_states_sum_over_ranks() -> None:
    """What distributed training does: sum the states of all ranks, then compute."""
    whole, ranks = GradientVariance(NAMES), [GradientVariance(NAMES) for _ in range(2)]
    for i, (first, second) in enumerate(random_updates(8)):
        whole.update(first, **second)
        ranks[i // 4].update(first, **second)
    merged = GradientVariance(NAMES)
    for name in merged._defaults:
        setattr(merged, name, sum(getattr(rank, name) for rank in ranks))
        assert merged._reductions[name] is whole._reductions[name] is not None
    assert merged.compute().keys() == whole.compute().keys()
    for name, value in whole.compute().items():
        assert torch.allclose(merged.compute()[name], value, rtol=1e-12), name


def test_groups_add_up_and_fused_weights_are_split() -> None:
    metric = GradientVariance(NAMES, per="layer")
    exact = [torch.zeros(4, 4), torch.zeros(12, 4), torch.zeros(4)]
    sus = [torch.full((4, 4), 1.0), torch.cat([torch.full((4, 4), x) for x in (2.0, 3.0, 4.0)]), torch.full((4,), 5.0)]
    metric.update(exact, sus=sus)
    metric.update(exact, other=[torch.ones_like(x) for x in exact])
    values = {name: float(value) for name, value in metric.compute().items()}
    # noise: 16 * (1, 4, 9, 16) and 4 * 25; spread: 16 each and 4, halved
    assert values["relative_variance_of/q"] == pytest.approx(2 * (16 + 64) / 32)
    assert values["relative_variance_of/k"] == pytest.approx(2 * 9)
    assert values["relative_variance_of/v"] == pytest.approx(2 * 16)
    assert values["relative_variance_of/rest"] == pytest.approx(2 * 25)
    assert values["relative_variance_of/layers.1"] == pytest.approx(2 * (4 + 9 + 16) / 3)
    assert values["worst_relative_variance"] == pytest.approx(2 * 16)
    assert values["relative_variance"] == pytest.approx(2 * (16 * 30 + 4 * 25) / (16 * 4 + 4))
    kinds = GradientVariance(NAMES)
    kinds.update(exact, sus=sus)
    kinds.update(exact, other=sus)
    assert kinds.compute().keys() == {name for name in values if "layers" not in name}


def test_an_unknown_per_is_named() -> None:
    with pytest.raises(ValueError, match=r"per must be one of 'kind', 'layer', but it is 'head'"):
        GradientVariance(NAMES, per="head")


def test_batches_per_step_scales_variances_and_not_their_ratio() -> None:
    one, four = GradientVariance(NAMES), GradientVariance(NAMES, batches_per_step=4)
    for first, second in random_updates(4):
        one.update(first, **second)
        four.update(first, **second)
    a, b = one.compute(), four.compute()
    assert torch.allclose(a["batch_variance"], 4 * b["batch_variance"])
    assert torch.allclose(a["sus_variance"], 4 * b["sus_variance"])
    assert torch.allclose(a["relative_variance"], b["relative_variance"])


def test_bf16_gradients_are_accumulated_in_float64() -> None:
    metric = GradientVariance()
    exact, other = torch.zeros(1000, dtype=torch.bfloat16), torch.full((1000,), 2**-8, dtype=torch.bfloat16)
    other[0] = 256
    metric.update([exact], other=[other])
    assert float(metric.compute()["batch_variance"]) == (256.0**2 + 999 * 2.0**-16) / 2


def test_missing_gradients_and_what_is_not_defined() -> None:
    metric = GradientVariance(NAMES)
    assert math.isnan(metric.compute()["relative_variance"])
    metric.update([None, torch.ones(12, 4), None], sus=[torch.ones(4, 4), None, None])
    assert float(metric.compute()["sus_variance"]) == 16 + 48
    metric.update([None] * 3, other=[None] * 3)
    assert math.isnan(metric.compute()["relative_variance"])


def test_bad_updates_are_named() -> None:
    metric, x = GradientVariance(NAMES), [torch.zeros(4, 4), torch.zeros(12, 4), torch.zeros(4)]
    with pytest.raises(ValueError, match="exactly one of sus and other"):
        metric.update(x)
    with pytest.raises(ValueError, match="exactly one of sus and other"):
        metric.update(x, sus=x, other=x)
    with pytest.raises(ValueError, match="expected 3 gradients per argument, but there are 2 and 2"):
        metric.update(x[:2], sus=x[:2])
    with pytest.raises(ValueError, match=r"gradient 2 has the shapes \(4,\) and \(5,\)"):
        metric.update(x, sus=[*x[:2], torch.zeros(5)])
    with pytest.raises(ValueError, match="batches_per_step must be at least 1, but it is 0"):
        GradientVariance(batches_per_step=0)


@pytest.mark.parametrize(
    ("name", "shape", "kinds"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (8, 8), ["q"]),
        ("model.layers.3.self_attn.o_proj.weight", (8, 8), ["o"]),
        ("transformer.h.0.attn.c_attn.weight", (8, 24), ["q", "k", "v"]),
        ("transformer.h.0.attn.c_proj.weight", (8, 8), ["o"]),
        ("transformer.h.0.mlp.c_proj.weight", (32, 8), ["rest"]),
        ("bert.encoder.layer.1.attention.self.query.bias", (8,), ["q"]),
        ("bert.encoder.layer.1.attention.output.dense.weight", (8, 8), ["o"]),
        ("bert.encoder.layer.1.output.dense.weight", (8, 32), ["rest"]),
        ("blocks.2.attn.qkv.weight", (24, 8), ["q", "k", "v"]),
        ("blocks.2.attn.proj.weight", (8, 8), ["o"]),
        ("gpt_neox.layers.0.attention.query_key_value.weight", (24, 8), ["qkv"]),
        ("model.layers.0.self_attn.qkv_proj.weight", (12, 8), ["qkv"]),
        ("_forward_module.layers.0._orig_mod.wk.weight", (8, 8), ["k"]),
        ("layers.0.attention_norm.weight", (8,), ["rest"]),
        ("embedding.weight", (8, 8), ["rest"]),
    ],
)
def test_kinds_of_parameters(name: str, shape: tuple[int, ...], kinds: list[str]) -> None:
    pieces = classify([(name, torch.Size(shape))])
    assert [piece.kind for piece in pieces] == kinds
    whole = torch.arange(math.prod(shape)).view(shape)
    assert sorted(int(x) for piece in pieces for x in piece.of(whole).flatten()) == list(range(math.prod(shape)))


def test_kinds_of_torchs_own_attention() -> None:
    module = nn.TransformerDecoderLayer(8, 2)
    pieces = classify((n, p.shape) for n, p in module.named_parameters())
    assert [p.kind for p in pieces[:8]] == ["q", "k", "v", "q", "k", "v", "o", "o"]


def relative(value: float) -> dict[str, float]:
    """What a probe reports; the scale of the gradient does not matter."""
    return {"sus_variance": 7 * value, "batch_variance": 7.0}


@settings(max_examples=50, deadline=None)
@given(
    exponent=st.floats(0.8, 2.5),
    scale=st.floats(0.5, 100),
    target=st.floats(0.002, 0.2),
    start=st.floats(4, 1000),
)
def test_variance_target_settles_for_any_power_law(exponent: float, scale: float, target: float, start: float) -> None:
    schedule = VarianceTarget(target, start=start, minimum=0.001, maximum=1e9)
    for _ in range(40):
        schedule.observe(relative(scale * schedule(0) ** -exponent))
    assert scale * schedule(0) ** -exponent == pytest.approx(target, rel=0.01)


def test_variance_target_follows_a_drift_within_a_factor_of_1_5() -> None:
    """The increase at a fixed c grows tenfold over 60 probes, as it does from a small LM to a pretrained one."""
    generator = torch.Generator().manual_seed(0)
    schedule = VarianceTarget(0.01, start=30)
    outside = 0
    for probe in range(60):
        scale = 1.6 * 10 ** (probe / 60)
        true = scale * schedule(probe) ** -1.5
        outside += probe > 2 and not 0.01 / 1.5 < true < 0.01 * 1.5
        schedule.observe(relative(true * math.exp(0.1 * float(torch.randn((), generator=generator)))))
    assert outside == 0
    assert schedule(60) > 100


def test_variance_target_is_brought_back_after_a_jump_and_bounded() -> None:
    schedule = VarianceTarget(0.01, start=64, minimum=8, maximum=256)
    for _ in range(20):
        schedule.observe(relative(500 * schedule(0) ** -1.5))
    assert schedule(0) == 256
    for _ in range(20):
        schedule.observe(relative(0.0))
    assert schedule(0) == 8
    schedule.observe(relative(math.nan))
    schedule.observe({})
    assert schedule(0) == 8


def test_variance_target_per_layer_finds_the_smallest_sum_of_c() -> None:
    """Layers whose variances are a_l c_l ** -1.5, twice as large in mid-run: c_l ~ a_l ** 0.4 at the target."""
    a = {"first": 30.0, "second": 1.0, "third": 0.3}
    schedule = VarianceTarget(0.01, per="layer", start=30, minimum=1)
    measured = []
    for probe in range(24):
        scale = 1 if probe < 8 else 2
        alone = {name: scale * a_l * schedule.c_of(name) ** -1.5 for name, a_l in a.items()}
        measured.append(schedule.measure(list(a)))
        total = {"sus_variance": sum(alone.values()), "batch_variance": 1.0}
        schedule.observe(total | {f"sus_variance_alone/{name}": alone[name] for name in measured[-1]})
    c = {name: schedule.c_of(name) for name in a}
    assert sum(scale * a[name] * c[name] ** -1.5 for name in a) == pytest.approx(0.01, rel=0.01)
    assert c["first"] / c["second"] == pytest.approx(30**0.4, rel=0.02)
    assert c["third"] / c["second"] == pytest.approx(0.3**0.4, rel=0.02)
    equal = (scale * sum(a.values()) / 0.01) ** (1 / 1.5)
    assert sum(c.values()) < 0.72 * 3 * equal
    assert measured[:5] == [list(a), ["second"], ["third"], ["first"], ["second"]]
    resumed = VarianceTarget(0.01, per="layer", start=30, minimum=1)
    resumed.load_state_dict(schedule.state_dict())
    assert {name: resumed.c_of(name) for name in a} == c
    assert resumed.measure([*a, "new"]) == ["new"]
    assert VarianceTarget(0.01).measure(list(a)) == []


def test_variance_target_on_the_worst() -> None:
    schedule = VarianceTarget(0.01, on="worst", start=30)
    schedule.observe({**relative(0.01), "worst_relative_variance": 0.08})
    assert schedule(0) == pytest.approx(120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0}, "target must be above 0.*0"),
        ({"per": "head"}, "per must be one of 'model', 'layer'.*'head'"),
        ({"on": "mean"}, "on must be one of 'total', 'worst'.*'mean'"),
        ({"start": 2}, r"start must be in \[minimum, maximum\].*2"),
        ({"maximum": 2}, "maximum must be at least minimum"),
        ({"maximum": math.inf}, "maximum must be finite"),
        ({"smoothing": 1.5}, r"smoothing must be in \(0, 1\].*1.5"),
        ({"largest_step": 1}, "largest_step must be above 1"),
    ],
)
def test_variance_target_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VarianceTarget(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearSchedule(0, 1, 5), "start must be above 0"),
        (lambda: CosineSchedule(1, math.inf, 5), "end must be finite"),
        (lambda: ExponentialSchedule(1, 2, 0), "steps must be at least 1"),
        (lambda: StepSchedule({0: -3}), r"milestones\[0\] must be above 0"),
        (lambda: StepSchedule({0: 3, -1: 3}), "a step in milestones must be at least 0"),
    ],
)
def test_schedule_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_callables_and_dicts_are_schedules() -> None:
    assert value_at(as_schedule(lambda step: torch.tensor(2.0 + step)), 3) == 5
    assert value_at(as_schedule({0: 8, 10: 4}), 10) == 4
    assert value_at(as_schedule(float("inf")), 0) == math.inf
