"""The layer as a part of a PyTorch program: shapes, dtypes, modes, copies, threads, processes."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layers import GROUPS, PARITY, SCORES, N, parity
from torch import Tensor, nn

from fairopt import (
    QP,
    DemographicParity,
    EqualizedOdds,
    FairnessLayer,
    FairoptError,
    MeanResidual,
    Status,
    project,
    residuals,
    solve,
)
from fairopt.backends import Numba

TARGETS = (torch.arange(N) // 2) % 2
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gap(x: Tensor, groups: Tensor = GROUPS) -> float:
    """Difference of the two groups' means, in float64."""
    x = x.detach().double().flatten()
    return float(x[groups == 0].mean() - x[groups == 1].mean())


# ---------------------------------------------------------------------------------------------
# Shapes and dtypes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vector_gives_a_vector(dtype: torch.dtype) -> None:
    scores = SCORES.to(dtype)
    fair = parity()(scores, GROUPS)
    assert (fair.shape, fair.dtype, fair.device) == (scores.shape, dtype, scores.device)


@pytest.mark.parametrize("companion", [(N,), (N, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_column_gives_a_column(dtype: torch.dtype, companion: tuple[int, ...]) -> None:
    """What a network with one output returns; groups, targets and weights may be columns too."""
    layer = parity(constraints=[PARITY, EqualizedOdds(tolerance=0.1)])
    weights = torch.linspace(0.5, 2, N)
    want = layer(SCORES.to(dtype), GROUPS, TARGETS, weights=weights)
    got = layer(
        SCORES.to(dtype).unsqueeze(1), GROUPS.view(companion), TARGETS.view(companion),
        weights=weights.view(companion),
    )  # fmt: skip
    assert (got.shape, got.dtype) == ((N, 1), dtype)
    assert got.squeeze(1).tolist() == want.tolist()


@pytest.mark.parametrize("shared", [True, False], ids=["groups shared", "groups of each"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_gives_a_batch(dtype: torch.dtype, shared: bool) -> None:
    scores = torch.stack([SCORES, SCORES.flip(0), SCORES**2]).to(dtype)
    groups = torch.stack([GROUPS, (torch.arange(N) > 3).long(), torch.arange(N) % 3])
    groups = GROUPS if shared else groups
    layer = parity()
    fair = layer(scores, groups)
    assert (fair.shape, fair.dtype) == (scores.shape, dtype)
    for b in range(3):
        alone = layer(scores[b], groups if shared else groups[b])
        # in bfloat16 one unit in the last place of 1 is 0.008
        torch.testing.assert_close(
            fair[b], alone, rtol=0, atol=1e-14 if dtype == torch.float64 else 1e-6
        )


def test_a_batch_of_one_is_not_a_column() -> None:
    fair = parity()(SCORES.unsqueeze(0), GROUPS)
    assert fair.shape == (1, N)
    assert abs(gap(fair)) == pytest.approx(0.05, abs=1e-12)


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
    ids=str,
)
def test_parity_holds_to_the_precision_of_the_dtype(dtype: torch.dtype, allowed: float) -> None:
    assert abs(gap(SCORES.to(dtype))) > 0.4
    assert abs(gap(parity()(SCORES.to(dtype), GROUPS))) <= 0.05 + allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_rounded_float32_result(dtype: torch.dtype) -> None:
    half = SCORES.to(dtype)
    want = parity()(half.float(), GROUPS).to(dtype)
    assert parity()(half, GROUPS).tolist() == want.tolist()


class Judged(Numba):
    """A backend whose answers ``solve`` judges: their residuals are computed in every call."""

    capabilities = replace(Numba.capabilities, certifies=False)


@pytest.mark.parametrize("backend", [Numba(), Judged()], ids=["certified", "judged"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_last_holds_what_was_returned(dtype: torch.dtype, backend: Numba) -> None:
    """Values, dtype and memory; its residuals are those of these values, also where they round."""
    layer = FairnessLayer(PARITY, bounds=(0.1, 0.9), backend=backend)
    fair = layer(SCORES.to(dtype, copy=True).requires_grad_(), GROUPS)
    last = layer.last
    assert last.x.dtype == fair.dtype == dtype
    assert last.x.tolist() == [fair.tolist()]
    assert last.x.data_ptr() == fair.data_ptr()
    again = residuals(last.problem, fair.detach().unsqueeze(0), last.row_dual, last.bound_dual)
    assert again.primal.item() == last.residuals.primal.item()
    assert again.worst == last.residuals.worst
    if dtype == torch.bfloat16:
        assert last.residuals.worst > 1e-5  # these scores do round


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("number", [0.1, 0.3, 0.7, 1 / 3, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bounds_that_the_dtype_cannot_hold_are_rounded_inwards(
    dtype: torch.dtype, number: float, sign: float
) -> None:
    low, high = sorted((sign * number, sign * (number + 0.2)))
    scores = torch.tensor([-9.0, 9.0, -9.0, 9.0], dtype=dtype)
    groups = torch.tensor([0, 0, 1, 1])
    tensors = (torch.tensor(low, dtype=torch.float64), torch.full((4,), high, dtype=torch.float64))
    for bounds in ((low, high), tensors):
        fair = parity(bounds=bounds)(scores, groups)
        assert low <= float(fair.double().min())
        assert float(fair.double().max()) <= high
        # The nearest values inside, not a step further.
        step = 2 * torch.finfo(dtype).eps
        assert float(fair.double().min()) <= low + step * abs(low)
        assert float(fair.double().max()) >= high - step * abs(high)
    for bound, side in ((low, 0), (high, 1)):
        nearest = float(torch.tensor(bound, dtype=torch.float64).to(dtype))
        if nearest == bound or (nearest > bound) == (side == 0):
            assert fair[side].item() == nearest


def test_bounds_that_the_dtype_holds_are_met_exactly() -> None:
    for dtype in DTYPES:
        scores = torch.tensor([-9.0, 9.0, -9.0, 9.0], dtype=dtype)
        fair = parity(bounds=(0.125, 0.75))(scores, torch.tensor([0, 0, 1, 1]))
        assert fair.tolist() == [0.125, 0.75, 0.125, 0.75]


@pytest.mark.parametrize("bounds", [None, (None, None), (0, None), (None, 0.5)], ids=repr)
def test_bounds_may_be_left_out(bounds: Any) -> None:
    scores = torch.tensor([-1.0, 3.0, 0.5, 0.25], dtype=torch.float64)
    fair = parity(bounds=bounds)(scores, torch.tensor([0, 1, 0, 1]))
    low, high = bounds or (None, None)
    assert float(fair.min()) == 0 if low == 0 else float(fair.min()) < 0
    assert float(fair.max()) == 0.5 if high == 0.5 else float(fair.max()) > 1


@pytest.mark.parametrize("shape", [(), (1,), (N,), (2, N)], ids=str)
def test_bounds_may_be_tensors(shape: tuple[int, ...]) -> None:
    if shape == (1,):
        with pytest.raises(FairoptError, match="upper bound: expected shape"):
            parity(bounds=(0, torch.full(shape, 0.6)))(SCORES, GROUPS)
        return
    scores = SCORES.repeat(2, 1)
    upper = torch.full(shape, 0.6, dtype=torch.float64)
    want = parity(bounds=(0, 0.6))(scores, GROUPS)
    got = parity(bounds=(0, upper))(scores, GROUPS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# Memory layouts and autograd's modes
# ---------------------------------------------------------------------------------------------


LAYOUTS = {
    "every other": lambda t: torch.stack([t, t + 7], 1).flatten()[::2],
    "column of a matrix": lambda t: torch.stack([t + 7, t, t + 7], 1)[:, 1],
    "transposed": lambda t: torch.stack([t, t]).T.contiguous().T[0],
    "reversed twice": lambda t: t.flip(0).flip(0),
    "offset": lambda t: torch.cat([t[:3], t])[3:],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_input_that_is_not_contiguous(layout: Any, dtype: torch.dtype) -> None:
    layer = parity(constraints=[PARITY, EqualizedOdds(tolerance=0.1)])
    scores, weights = SCORES.to(dtype), torch.linspace(0.5, 2, N, dtype=torch.float64)
    out = []
    for lay in (lambda t: t, layout):
        leaf = scores.clone().requires_grad_()
        fair = layer(lay(leaf), lay(GROUPS), lay(TARGETS), weights=lay(weights))
        (fair * torch.arange(N)).sum().backward()
        out.append((fair.tolist(), leaf.grad.tolist()))
    assert out[0] == out[1]


def test_a_transposed_batch() -> None:
    columns = torch.stack([SCORES, SCORES.flip(0)], 1)  # (N, 2), as a network with two heads
    fair = parity()(columns.T, GROUPS)
    want = parity()(columns.T.contiguous(), GROUPS)
    assert fair.tolist() == want.tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_expanded_input(dtype: torch.dtype) -> None:
    layer = parity()
    shared = SCORES.to(dtype, copy=True).requires_grad_()
    fair = layer(shared.expand(3, N), GROUPS.expand(3, N))
    alone = layer(shared, GROUPS)
    for b in range(3):
        torch.testing.assert_close(fair[b], alone, rtol=0, atol=1e-7)
    v = torch.arange(N, dtype=dtype)
    (fair @ v).sum().backward()
    (got,), shared.grad = (shared.grad,), None
    (alone @ v).backward()
    torch.testing.assert_close(got, 3 * shared.grad, rtol=1e-6, atol=1e-6)
    constant = torch.full((), 0.5, dtype=dtype).expand(N)
    assert layer(constant, GROUPS).tolist() == constant.tolist()


def test_a_graph_is_built_only_where_it_is_wanted() -> None:
    layer = parity()
    leaf = SCORES.clone().requires_grad_()
    assert layer(leaf, GROUPS).requires_grad
    assert not layer(SCORES, GROUPS).requires_grad
    with torch.no_grad():
        assert not layer(leaf, GROUPS).requires_grad
    with torch.inference_mode():
        fair = layer(leaf, GROUPS)
        assert fair.is_inference()
    assert fair.tolist() == layer(SCORES, GROUPS).tolist()


def test_a_tolerance_alone_can_be_trained() -> None:
    tolerance = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
    layer = parity(constraints=DemographicParity(tolerance=tolerance))
    fair = layer(SCORES, GROUPS)
    assert gap(fair) == pytest.approx(0.05, abs=1e-12)
    # raising the tolerance by d raises every sample of group 0 by d / 2 and lowers the others
    fair[0].backward()
    assert tolerance.grad.item() == pytest.approx(0.5, abs=1e-12)
    torch.optim.SGD([tolerance], lr=0.1).step()  # in place: the layer sees the new value
    assert gap(layer(SCORES, GROUPS)) == pytest.approx(-0.0, abs=1e-12)


def test_making_a_notion_of_a_parameter_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notion = DemographicParity(tolerance=nn.Parameter(torch.tensor(0.05)))
        project(SCORES, GROUPS, notion, bounds=(0, 1)).sum().backward()


def test_inference_first_then_training() -> None:
    """Nothing that is kept from a call in inference mode may spoil later training.

    The bounds and the tolerance occur nowhere else, so that nothing was kept before.
    """
    layer = parity(constraints=EqualizedOdds(tolerance=0.0312345), bounds=(0.0112345, 0.98912345))
    weights = torch.linspace(0.5, 2, N)
    with torch.inference_mode():
        first = layer(SCORES, GROUPS, TARGETS, weights=weights).tolist()
    leaf, w = SCORES.clone().requires_grad_(), weights.clone().requires_grad_()
    fair = layer(leaf, GROUPS, TARGETS, weights=w)
    fair.square().sum().backward()
    assert fair.tolist() == first
    assert leaf.grad.abs().sum() > 0
    assert w.grad.abs().sum() > 0


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_does_not_reach_into_the_layer(model_dtype: torch.dtype) -> None:
    """Under autocast matrix products round to bfloat16; the layer's must not."""
    layer = parity(constraints=[PARITY, MeanResidual(tolerance=0.05)])
    scores = SCORES.to(model_dtype, copy=True).requires_grad_()
    want = layer(scores, GROUPS, TARGETS)
    (want_grad,) = torch.autograd.grad(want.square().sum(), scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.eye(2) @ torch.eye(2)).dtype == torch.bfloat16  # autocast is at work
        got = layer(scores, GROUPS, TARGETS)
        (got_grad,) = torch.autograd.grad(got.square().sum(), scores)
        assert torch.is_autocast_enabled("cpu")
    assert got.dtype == model_dtype
    assert got.tolist() == want.tolist()
    assert got_grad.tolist() == want_grad.tolist()


def test_a_network_trains_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    layer = parity()
    inputs = torch.randn(40, 3)
    groups = (inputs[:, 0] > 0).long()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(inputs).sigmoid()
        fair = layer(scores, groups)
    assert fair.dtype == scores.dtype == torch.bfloat16
    assert fair.shape == (40, 1)
    fair.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_default_dtype_changes_nothing() -> None:
    want = parity()(SCORES, GROUPS, TARGETS).tolist()
    for dtype in (torch.float16, torch.float64):
        torch.set_default_dtype(dtype)
        layer = parity(constraints=DemographicParity(tolerance=0.05))
        assert layer(SCORES, GROUPS, TARGETS).tolist() == want


def test_gradients_have_the_dtype_of_their_input() -> None:
    for dtype in DTYPES:
        leaf = SCORES.to(dtype, copy=True).requires_grad_()
        weights = torch.linspace(0.5, 2, N, requires_grad=True)
        upper = torch.full((N,), 0.7, dtype=torch.float64, requires_grad=True)
        tolerance = torch.tensor(0.05, dtype=torch.float32, requires_grad=True)
        layer = parity(constraints=DemographicParity(tolerance=tolerance), bounds=(0, upper))
        layer(leaf, GROUPS, weights=weights).float().square().sum().backward()
        for tensor in (leaf, weights, upper, tolerance):
            assert tensor.grad.dtype == tensor.dtype
            assert tensor.grad.shape == tensor.shape
            assert tensor.grad.abs().sum() > 0


# ---------------------------------------------------------------------------------------------
# Backward, again and again
# ---------------------------------------------------------------------------------------------


def test_backward_twice_with_retain_graph() -> None:
    leaf = SCORES.clone().requires_grad_()
    loss = parity()(leaf, GROUPS).square().sum()
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward(retain_graph=True)
    assert leaf.grad.tolist() == (2 * first).tolist()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_calls_do_not_disturb_each_other_s_backward() -> None:
    layer = parity()
    a, b = SCORES.clone().requires_grad_(), SCORES.flip(0).clone().requires_grad_()
    (want,) = torch.autograd.grad(layer(a, GROUPS).square().sum(), a)
    first = layer(a, GROUPS)
    layer(b, 1 - GROUPS)
    (got,) = torch.autograd.grad(first.square().sum(), a)
    assert got.tolist() == want.tolist()


def test_a_layer_may_follow_a_layer() -> None:
    first, second = parity(), parity(constraints=EqualizedOdds(tolerance=0.2))
    leaf = SCORES.clone().requires_grad_()
    second(first(leaf, GROUPS), GROUPS, TARGETS).square().sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_double_backward_is_a_clear_error() -> None:
    leaf = SCORES.clone().requires_grad_()
    fair = parity()(leaf, GROUPS)
    (grad,) = torch.autograd.grad(fair.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


ALTERATIONS = ["groups", "scores", "weights", "upper", "tolerance", "fair"]


@pytest.mark.parametrize("code", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("altered", ALTERATIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
def test_a_change_in_place_never_yields_a_wrong_gradient(
    weighted: bool, altered: str, dtype: torch.dtype, code: torch.dtype
) -> None:
    """Either torch's own error, or the gradient as if nothing had been changed.

    Some inputs are copied, and then a change does no harm; none may be read again unnoticed.
    """
    upper = torch.full((N,), 0.7, dtype=dtype)
    cotangent = torch.arange(N, dtype=dtype)

    def forward() -> tuple[dict[str, Tensor], Tensor]:
        given = {
            "scores": SCORES.to(dtype, copy=True).requires_grad_(),
            "groups": GROUPS.to(code, copy=True),
            "weights": torch.linspace(0.5, 2, N, dtype=dtype),
            "upper": upper.clone(),
            "tolerance": torch.tensor(0.05, dtype=dtype),
        }
        notion = DemographicParity(tolerance=given["tolerance"])
        fair = project(
            given["scores"], given["groups"], notion, bounds=(0, given["upper"]),
            weights=given["weights"] if weighted else None,
        )  # fmt: skip
        return given, fair

    given, fair = forward()
    (want,) = torch.autograd.grad(fair, given["scores"], cotangent)
    given, fair = forward()
    with torch.no_grad():
        {**given, "fair": fair}[altered].zero_()
    try:
        (got,) = torch.autograd.grad(fair, given["scores"], cotangent)
    except RuntimeError as error:
        assert re.search("modified (by an )?inplace", str(error))
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_result_changed_in_place_is_torch_s_error() -> None:
    leaf = SCORES.clone().requires_grad_()
    fair = parity()(leaf, GROUPS)
    with pytest.raises(RuntimeError, match=r"modified inplace.*cloning the output"):
        fair.mul_(2)
    with torch.no_grad():
        fair.mul_(2)
    with pytest.raises(RuntimeError, match="modified inplace"):
        fair.sum().backward()


def test_a_problem_changed_in_place_is_an_error() -> None:
    q = torch.tensor([-1.0, 0.5], requires_grad=True)
    upper = torch.ones(2)
    x = solve(QP(torch.ones(2), q, torch.ones(1, 2), torch.zeros(1), torch.ones(1), 0.0, upper)).x
    upper.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation between"):
        x.sum().backward()


# ---------------------------------------------------------------------------------------------
# The module
# ---------------------------------------------------------------------------------------------


def test_last_is_the_last_solution_and_detached() -> None:
    layer = parity()
    assert layer.last is None
    leaf = SCORES.clone().requires_grad_()
    fair = layer(leaf, {"sex": GROUPS})
    last = layer.last
    assert last.x.tolist() == [fair.tolist()]
    assert not last.x.requires_grad
    assert not last.row_dual.requires_grad
    assert not any(tensor.requires_grad for tensor in last.problem.tensors)
    assert last.problem.row_names == ("sex: 0 vs 1",)
    assert last.skipped == ()
    assert last.status == (Status.SOLVED,)
    assert last.backend == "numba"
    assert last.residuals.worst <= 1e-12
    assert last.seconds > 0
    assert "sex" not in repr(layer)
    layer(SCORES.flip(0), GROUPS)
    assert layer.last is not last


def test_last_holds_no_graph() -> None:
    """Keeping a layer keeps no activations of the network before it."""
    layer = parity()
    leaf = SCORES.clone().requires_grad_()
    hidden = leaf * 1
    freed: list[int] = []
    fair = layer(hidden, GROUPS)
    weakref.finalize(hidden, freed.append, 1)
    weakref.finalize(fair, freed.append, 1)
    del hidden, fair
    gc.collect()
    assert freed == [1, 1]
    assert layer.last is not None


def test_repr_says_what_the_layer_does() -> None:
    layer = parity(constraints=[PARITY, EqualizedOdds(tolerance=0.1, on="sex")], backend="numba")
    text = repr(layer)
    for words in (
        "FairnessLayer(", "DemographicParity(tolerance=0.05", "EqualizedOdds(tolerance=0.1, on='se",
        "bounds=(0, 1)", "backend='numba'",
    ):  # fmt: skip
        assert words in text


def same(layer: FairnessLayer, other: FairnessLayer) -> None:
    """Both layers do the same, and the copy starts without a last solution."""
    assert other is not layer
    assert other.last is None
    assert repr(other) == repr(layer)
    assert other(SCORES, GROUPS, TARGETS).tolist() == layer(SCORES, GROUPS, TARGETS).tolist()
    assert other.last is not None


LAYERS = {
    "numbers": lambda: parity(),
    "tensors": lambda: parity(
        constraints=[
            DemographicParity(tolerance=torch.tensor(0.05)),
            EqualizedOdds(tolerance=nn.Parameter(torch.tensor(0.1)), compare="overall"),
        ],
        bounds=(torch.zeros(N, dtype=torch.float64), torch.tensor(0.8)),
    ),
    "options": lambda: parity(backend=Numba(threads=1), missing_group="raise"),
}


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_can_be_copied_pickled_and_saved(make: Any, used: bool, tmp_path: Path) -> None:
    layer = make()
    if used:
        layer(SCORES.clone().requires_grad_(), GROUPS, TARGETS)
    last = layer.last
    same(layer, copy.deepcopy(layer))
    same(layer, copy.copy(layer))
    same(layer, pickle.loads(pickle.dumps(layer)))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    same(layer, torch.load(file, weights_only=False))
    assert last is None or layer.last is not None


def test_copying_leaves_the_original_s_last_alone() -> None:
    layer = parity()
    layer(SCORES, GROUPS)
    last = layer.last
    copy.deepcopy(layer)
    pickle.dumps(layer)
    assert layer.last is last


def test_a_deep_copied_parameter_is_its_own() -> None:
    tolerance = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
    layer = parity(constraints=DemographicParity(tolerance=tolerance))
    other = copy.deepcopy(layer)
    with torch.no_grad():
        tolerance.fill_(0.2)
    assert gap(layer(SCORES, GROUPS)) == pytest.approx(0.2, abs=1e-12)
    assert gap(other(SCORES, GROUPS)) == pytest.approx(0.05, abs=1e-12)


def test_a_model_with_a_layer_saves_and_loads_its_state() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1)
            self.fair = parity()

        def forward(self, inputs: Tensor, groups: Tensor) -> Tensor:
            return self.fair(self.linear(inputs).sigmoid(), groups)

    model, other = Model(), Model()
    inputs = torch.randn(N, 3)
    want = model(inputs, GROUPS)
    state = model.state_dict()
    assert set(state) == {"linear.weight", "linear.bias"}
    other.load_state_dict(state)
    assert other(inputs, GROUPS).tolist() == want.tolist()
    model.eval()
    assert model(inputs, GROUPS).tolist() == want.tolist()  # no other behaviour in serving
    assert model.double()(inputs.double(), GROUPS).dtype == torch.float64


def test_the_function_does_what_the_layer_does() -> None:
    notions = [PARITY, EqualizedOdds(tolerance=0.1)]
    weights = torch.linspace(0.5, 2, N)
    fair = project(SCORES, GROUPS, notions, TARGETS, bounds=(0, 1), weights=weights)
    layer = parity(constraints=notions)
    assert fair.tolist() == layer(SCORES, GROUPS, TARGETS, weights=weights).tolist()


def test_samples_of_weight_zero_are_only_clipped() -> None:
    scores = torch.tensor([0.9, 0.1, 0.8, 0.3, 1.7, -0.4, 0.95, 0.5], dtype=torch.float64)
    groups = torch.arange(8) % 2
    weights = torch.tensor([1, 1, 2, 2, 0, 0, 0, 0], dtype=torch.float64)
    fair = parity()(scores, groups, weights=weights)
    assert fair[4:].tolist() == scores[4:].clamp(0, 1).tolist()
    alone = parity()(scores[:4], groups[:4], weights=weights[:4])
    torch.testing.assert_close(fair[:4], alone, rtol=0, atol=1e-14)
    assert not torch.equal(fair[:4], scores[:4])


def test_weights_that_are_all_zero_only_clip() -> None:
    layer = parity()
    fair = layer(SCORES + 0.3, GROUPS, weights=torch.zeros(N))
    assert fair.tolist() == (SCORES + 0.3).clamp(0, 1).tolist()
    assert layer.last.skipped == ("group: 0 vs 1: a group has no samples",)


def test_the_input_is_left_as_it_was() -> None:
    scores, groups, weights = SCORES.clone() + 0.3, GROUPS.clone(), torch.linspace(0, 2, N)
    kept = [t.clone() for t in (scores, groups, weights)]
    for _ in range(2):
        parity()(scores, groups, weights=weights)
    parity(constraints=DemographicParity(tolerance=9.0), bounds=None)(scores, groups)
    for now, before in zip((scores, groups, weights), kept, strict=True):
        assert torch.equal(now, before)


@pytest.mark.parametrize("bounds", [None, (0, 1)], ids=repr)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_shares_no_memory_with_the_input(dtype: torch.dtype, bounds: Any) -> None:
    """Also where there was nothing to do."""
    scores = SCORES.to(dtype)
    fair = parity(constraints=DemographicParity(tolerance=1.0), bounds=bounds)(scores, GROUPS)
    assert torch.equal(fair, scores)
    fair.zero_()
    assert scores.abs().sum() > 0
