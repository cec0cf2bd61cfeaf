"""Problems whose solution is known, because it was chosen first.

Choose x, which rows and bounds hold it, and their multipliers y and w with the right signs. Then

    q = -(P x + A^T y + w),    side = a.x where the row holds x, further away where it does not

make x optimal: for a convex problem the conditions of Karush, Kuhn and Tucker suffice. Nonzero
multipliers and nonzero slacks keep a margin to the next active set, and a draw is repeated until
the equations of the active set are well conditioned. So x is unique, it moves smoothly with the
data, and ``reference`` finds where to by one linear solve. No other solver is asked.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from fairopt.backends import Capabilities
from fairopt.programs.problem import LP, QP, Problem
from fairopt.programs.rows.base import Rows
from fairopt.programs.rows.cells import CellRows
from fairopt.programs.rows.dense import DenseRows
from fairopt.programs.rows.sparse import SparseRows

# How the rows stand at the solution; "only" means that the other side is infinite.
ACTIVE = {"equal": 0, "upper": 1, "upper only": 1, "lower": -1, "lower only": -1}
SIDES = ("equal", "upper", "lower only", "inside", "inside only", "free")
SMALLEST = 0.05  # singular value of the scaled equations of the active set
CELLS = 4


@dataclass(frozen=True)
class Recipe:
    """The kind of problem to draw.

    Attributes:
        name: of the kind, for reports.
        quadratic: form of P; ``None`` for a linear program.
        rows: form of the rows.
        batch, n: sizes.
        sides: how each row stands at the solution.
        bounds: "none", "lower", "both", "mixed" (all sorts), "fixed" (some), "all fixed".
        dtype, device: of all data.
        scales: factors of the rows, in turn.
        links: rows that are sums of others: ``(row, (others, ...))``.
        shared: whether all problems of the batch have the same data, except q.
        singular: whether P is singular (the rows and bounds still make x unique).
        spread: ratio of the largest eigenvalue of P to the smallest.
        weak: whether a row and a bound touch x with a multiplier that is exactly zero.
    """

    name: str
    quadratic: str | None
    rows: str
    batch: int = 2
    n: int = 8
    sides: tuple[str, ...] = SIDES
    bounds: str = "mixed"
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    scales: tuple[float, ...] = (1.0,)
    links: tuple[tuple[int, tuple[int, ...]], ...] = ()
    shared: bool = False
    singular: bool = False
    spread: float = 10.0
    weak: bool = False

    @property
    def label(self) -> str:
        """The recipe in words."""
        kind = f"{self.quadratic} P" if self.quadratic else "LP"
        size = f"B={self.batch} n={self.n} m={len(self.sides)}"
        words = [self.name, kind, f"{self.rows} rows", size, str(self.dtype).removeprefix("torch.")]
        return ", ".join([*words, self.device] if self.device != "cpu" else words)

    @property
    def dependent(self) -> int:
        """How many active rows are sums of others."""
        return sum(self.sides[row] in ACTIVE for row, _ in self.links)

    @property
    def rank(self) -> int:
        """How many independent rows hold x."""
        return sum(s in ACTIVE and r not in dict(self.links) for r, s in enumerate(self.sides))


@dataclass(frozen=True, eq=False)
class Known:
    """A problem with its solution.

    Attributes:
        problem: on the device and in the dtype of the recipe.
        x, row_dual: ``(B, n)`` and ``(B, m)``, float64, CPU; row_dual is one of several possible
            where the recipe links rows.
        side, held: +1, -1 or 0: which side of each row and bound is active at x.
    """

    recipe: Recipe
    problem: Problem
    x: Tensor
    row_dual: Tensor
    side: Tensor
    held: Tensor


# ---------------------------------------------------------------------------------------------
# The kinds of problems
# ---------------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, object]] = {
    "one problem": {"batch": 1},
    "many problems": {"batch": 17},
    "no rows": {"sides": ()},
    "one variable and one row": {"n": 1, "sides": ("upper",)},
    "one variable without rows": {"n": 1, "sides": ()},
    "more rows than variables": {"n": 5, "sides": ("upper", "lower", *("inside",) * 14)},
    "no bounds": {"n": 3, "sides": ("equal", "upper", "lower only", "inside"), "bounds": "none"},
    "lower bounds": {"bounds": "lower"},
    "two-sided bounds": {"bounds": "both"},
    "fixed variables": {"bounds": "fixed"},
    "all variables fixed": {"sides": ("inside", "inside only"), "bounds": "all fixed"},
    "equalities": {"sides": ("equal",) * 3},
    "one-sided rows": {"sides": ("upper only", "lower only", "inside only", "inside only")},
    "rows without sides": {"sides": ("free",) * 3},
    "rows times 1e3": {"scales": (1e3,)},
    "rows times 1e-3": {"scales": (1e-3,)},
    "rows of many scales": {"scales": (1e3, 1.0, 1e-3)},
    "dependent equalities": {
        "sides": ("equal", "equal", "inside", "equal", "equal"),
        "links": ((3, (0, 1)), (4, (0,))),
    },
    "dependent inequalities": {
        "sides": ("upper", "equal", "inside", "upper only", "upper"),
        "links": ((3, (0, 1)), (4, (0,))),
    },
    "redundant rows": {
        "sides": ("upper", "equal", "inside", "inside", "inside"),
        "links": ((3, (0,)), (4, (2,))),
    },
    "data shared over the batch": {"batch": 4, "shared": True},
}
QUADRATIC_KINDS: dict[str, dict[str, object]] = {
    "condition 1e6": {"spread": 1e6},
    "singular P": {"singular": True},
    "weakly active": {"weak": True, "n": 4, "sides": ("upper only", "inside")},
}


def recipes(can: Capabilities, device: str = "cpu") -> tuple[Recipe, ...]:
    """All problems that a backend with these capabilities is asked to solve.

    One of each combination of forms, in both dtypes; and one of each kind for every form of P, with
    the forms of rows in turn.
    """
    forms: list[str | None] = [*sorted(can.quadratic), *([None] if can.linear else [])]
    turn = sorted(can.rows - {"blocks"})  # those say more of the problem than a drawn one has
    general = Recipe("general", None, "dense", batch=3, device=device)
    found = [
        replace(general, quadratic=form, rows=kind, dtype=dtype)
        for form in forms
        for kind in turn
        for dtype in (torch.float64, torch.float32)
    ]
    for form in forms:
        kinds = {**KINDS, **(QUADRATIC_KINDS if form is not None else {})}
        for index, (name, changes) in enumerate(kinds.items() if turn else ()):
            plain = Recipe(name, form, turn[index % len(turn)], device=device)
            found.append(replace(plain, **changes))  # type: ignore[arg-type]
    return tuple(found)


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """One problem of a batch, dense and in float64, beside what its form is made of."""

    P: Tensor
    A: Tensor
    body: Tensor
    cell: Tensor
    weight: Tensor
    x: Tensor
    y: Tensor
    w: Tensor
    l: Tensor
    u: Tensor
    lb: Tensor
    ub: Tensor
    side: Tensor
    held: Tensor
    q: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.q = -(self.P @ self.x + self.A.mT @ self.y + self.w)


class Source:
    """Random numbers of one recipe, the same on every machine."""

    def __init__(self, label: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(label.encode()))

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return low + (high - low) * draw

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def order(self, n: int) -> list[int]:
        order: list[int] = torch.randperm(n, generator=self.generator).tolist()
        return order


@cache
def draw(recipe: Recipe) -> Known:
    """The problem of a recipe: always the same one."""
    if recipe.weak:
        return weakly_active(recipe)
    source = Source(recipe.label)
    mask = source.uniform(0, 1, len(recipe.sides), recipe.n) < 0.5
    mask |= torch.eye(recipe.n, dtype=torch.bool).repeat(len(recipe.sides) + 1, 1)[: len(mask)]
    mask[:, 0] = True  # every row has an entry, most have several
    for row, others in recipe.links:
        mask[row] = mask[list(others)].any(0)
    if recipe.rows != "sparse":
        mask[:] = True
    drafts = [draft(recipe, source, mask)]
    while len(drafts) < recipe.batch:
        drafts.append(moved(drafts[0], source) if recipe.shared else draft(recipe, source, mask))
    return assembled(recipe, drafts, mask)


def draft(recipe: Recipe, source: Source, mask: Tensor) -> Draft:
    """One problem, drawn again until the equations of its active set are well conditioned."""
    for _ in range(10_000):
        found = attempt(recipe, source, mask)
        # A badly conditioned P is meant to be there: judge the rows alone.
        P = found.P if recipe.spread <= 100 else torch.eye(recipe.n).double()
        values = torch.linalg.svdvals(equations(P, found.A, found.side, found.held)[0])
        count = len(values) - recipe.dependent
        if count <= 0 or float(values[count - 1]) >= SMALLEST:
            return found
    raise RuntimeError(f"no well-conditioned problem found for: {recipe.label}")


def attempt(recipe: Recipe, source: Source, mask: Tensor) -> Draft:
    n, m, linked = recipe.n, len(recipe.sides), bool(recipe.links)
    sides = recipe.sides if linked else tuple(recipe.sides[i] for i in source.order(m))
    # Sums of rows must be exact in float32 too, or rows that depend would contradict each other.
    x = source.integers(-8, 9, n) / 8.0 if linked else source.uniform(-1, 1, n)
    x = x.double()

    cells = min(n, CELLS) if recipe.rows == "cells" else n
    body = source.integers(-2, 3, m, cells).double() if linked else source.normal(m, cells)
    cell = torch.tensor([i % cells for i in source.order(n)])
    weight = source.uniform(0.5, 1.5, n) if recipe.rows == "cells" and not linked else x * 0 + 1
    if recipe.rows != "cells":
        body = body * mask
    for row, others in recipe.links:
        body[row] = body[list(others)].sum(0)
    scale = torch.tensor([recipe.scales[r % len(recipe.scales)] for r in range(m)])
    body = body * scale.double().unsqueeze(-1)
    A = body[:, cell] * weight if recipe.rows == "cells" else body

    side = torch.zeros(m, dtype=torch.int64)
    y, l, u = torch.zeros(m).double(), A @ x, A @ x
    length = torch.linalg.vector_norm(A, dim=-1)
    away = source.uniform(0.5, 1.5, 2, m) * length
    push = source.uniform(0.5, 1.5, m) / length.clamp(min=1e-12)
    for r, name in enumerate(sides):
        if name == "equal":
            side[r] = 1 if source.uniform(-1, 1, 1) > 0 else -1
        elif name in ACTIVE:
            side[r] = ACTIVE[name]
        if side[r] <= 0 and name != "equal":
            u[r] += away[0, r]
        if side[r] >= 0 and name != "equal":
            l[r] -= away[1, r]
        if name in ("upper only", "inside only", "free"):
            l[r] = -torch.inf
        if name in ("lower only", "free"):
            u[r] = torch.inf
        y[r] = side[r] * push[r]
    held, w, lb, ub = drawn_bounds(recipe, source, x)
    return Draft(
        drawn_quadratic(recipe, source), A, body, cell, weight, x, y, w, l, u, lb, ub, side, held
    )


def drawn_bounds(
    recipe: Recipe, source: Source, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``held``, w, lb and ub."""
    n, rank, kind = recipe.n, recipe.rank, recipe.bounds
    free = max(rank + (n > rank + 1), n - n // 3 - 1)
    if recipe.quadratic is None:
        free = rank  # a vertex
    free = {"none": n, "all fixed": 0}.get(kind, free)
    held, w = torch.zeros(n, dtype=torch.int64), torch.zeros(n).double()
    away, push = source.uniform(0.5, 1.5, 2, n), source.uniform(0.5, 1.5, n)
    lb, ub = x - away[0], x + away[1]
    for place, i in enumerate(source.order(n)):
        if place < free:
            sort = {"none": "none", "lower": "lower", "mixed": ("none", "lower", "upper", "both")[
                place % 4]}.get(kind, "both")  # fmt: skip
        else:
            sort = {"lower": "lower", "both": "both", "mixed": ("lower", "both", "upper", "fixed")[
                place % 4]}.get(kind, "fixed")  # fmt: skip
            up = source.uniform(-1, 1, 1) > 0
            held[i] = {"lower": -1, "upper": 1}.get(sort, 1 if up else -1)
            w[i] = held[i] * push[i]
        if held[i] < 0 or sort == "fixed":
            lb[i] = x[i]
        if held[i] > 0 or sort == "fixed":
            ub[i] = x[i]
        if sort in ("none", "upper"):
            lb[i] = -torch.inf
        if sort in ("none", "lower"):
            ub[i] = torch.inf
    return held, w, lb, ub


def drawn_quadratic(recipe: Recipe, source: Source) -> Tensor:
    """P as a dense matrix."""
    n, spread = recipe.n, recipe.spread
    if recipe.quadratic is None:
        return torch.zeros(n, n).double()
    powers = torch.linspace(-0.5, 0.5, n, dtype=torch.float64)
    values = torch.pow(spread, powers)[source.order(n)]
    if recipe.singular:
        values[:2] = 0.0
    if recipe.quadratic == "dense":
        Q, _ = torch.linalg.qr(source.normal(n, n))
        P: Tensor = (Q * values) @ Q.mT
        return 0.5 * (P + P.mT)
    P = torch.diag(values)
    if recipe.quadratic == "sparse":  # beside it, at most half of what keeps it definite
        for i in range(n - 1):
            low = float(torch.minimum(values[i], values[i + 1]))
            P[i, i + 1] = P[i + 1, i] = 0.25 * low * float(source.uniform(-1, 1, 1))
    return P


def moved(first: Draft, source: Source) -> Draft:
    """Another linear term for the same data: x moves within the active set, multipliers change."""
    free, active = first.held == 0, first.side != 0
    A = first.A[active][:, free]
    step = source.uniform(-0.1, 0.1, int(free.sum()))
    step = step - torch.linalg.pinv(A) @ (A @ step) if len(A) else step
    x = first.x.clone()
    x[free] += step
    factor = source.uniform(0.7, 1.4, 2)
    return replace(first, x=x, y=factor[0] * first.y, w=factor[1] * first.w)


def assembled(recipe: Recipe, drafts: list[Draft], mask: Tensor) -> Known:
    """The batch in the form, dtype and device of the recipe, and its solution in that dtype."""

    def stacked(name: str) -> Tensor:
        first: Tensor = getattr(drafts[0], name)
        if recipe.shared and name != "q":
            whole = first.unsqueeze(0)
        else:
            whole = torch.stack([getattr(d, name) for d in drafts])
        if whole.is_floating_point():
            whole = whole.to(recipe.dtype)
        return whole.to(recipe.device)

    rows: Rows
    if recipe.rows == "cells":
        rows = CellRows(stacked("body"), stacked("cell"), stacked("weight"))
    elif recipe.rows == "sparse":
        row, column = mask.to(recipe.device).nonzero(as_tuple=True)
        matrix = stacked("A")
        rows = SparseRows(row, column, matrix[:, row, column], *matrix.shape[1:])
    else:
        rows = DenseRows(stacked("A"))
    sides = [stacked(name) for name in ("l", "u", "lb", "ub")]
    problem: Problem
    if recipe.quadratic is None:
        problem = LP(stacked("q"), rows, *sides)
    else:
        problem = QP(as_quadratic(stacked("P"), recipe.quadratic), stacked("q"), rows, *sides)
    side, held = (torch.stack([getattr(d, name) for d in drafts]) for name in ("side", "held"))
    x, row_dual = reference(problem, side, held)
    return Known(recipe, problem, x, row_dual, side, held)


def as_quadratic(P: Tensor, form: str) -> Tensor | SparseRows:
    """Dense matrices ``(B, n, n)`` in one of the forms of P."""
    if form == "diagonal":
        return P.diagonal(dim1=-2, dim2=-1).contiguous()
    return DenseRows(P).to_sparse() if form == "sparse" else P


def as_rows(A: Tensor, form: str) -> Rows:
    """Dense matrices ``(B, m, n)`` in one of the forms of rows."""
    if form == "cells":
        n = A.shape[-1]
        return CellRows(A, torch.arange(n, device=A.device), A.new_ones(n))
    return DenseRows(A).to_sparse() if form == "sparse" else DenseRows(A)


def weakly_active(recipe: Recipe) -> Known:
    """A row and a bound that touch the solution and do not push; all numbers exact in binary."""
    assert recipe.quadratic is not None
    x = torch.tensor([[0.5, -0.25, 0.75, 1.0], [2.0, 0.5, -0.25, -1.0]])[: recipe.batch].double()
    P = torch.diag(torch.tensor([1.0, 2.0, 1.0, 4.0])).double().expand(len(x), 4, 4)
    A = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 1.0, -1.0]]).double().expand(len(x), 2, 4)
    w = torch.tensor([0.0, 0.0, 0.0, 1.0]).double()  # the last bound does push
    q = -((P @ x.unsqueeze(-1)).squeeze(-1) + w)
    value = (A @ x.unsqueeze(-1)).squeeze(-1)
    far = torch.tensor([torch.inf, 1.0]).double()
    lb, ub = x - 1, x + 1
    lb[:, 2], ub[:, 3] = x[:, 2], x[:, 3]

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(recipe.device, recipe.dtype)

    problem = QP(
        as_quadratic(placed(P), recipe.quadratic), placed(q), as_rows(placed(A), recipe.rows),
        placed(value - far), placed(value + torch.tensor([0.0, 1.0])), placed(lb), placed(ub),
    )  # fmt: skip
    held = torch.tensor([0, 0, 0, 1]).expand(len(x), 4)
    side = torch.zeros(len(x), 2, dtype=torch.int64)
    return Known(recipe, problem, x, torch.zeros(len(x), 2).double(), side, held)


# ---------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------


def equations(P: Tensor, A: Tensor, side: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix [P_FF, A_WF^T; A_WF, 0] with unit rows A_WF, and the factors that made them so."""
    free, active = held == 0, side != 0
    rows = A[active][:, free]
    length = torch.linalg.vector_norm(rows, dim=-1)
    scale = torch.where(length > 0, 1 / length, 1.0)
    rows = rows * scale.unsqueeze(-1)
    zero = rows.new_zeros(len(rows), len(rows))
    top = torch.cat([P[free][:, free], rows.mT], 1)
    return torch.cat([top, torch.cat([rows, zero], 1)], 0), scale


def reference(problem: Problem, side: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """x and the row multipliers of an active set that is known: ``(B, n)``, ``(B, m)``, float64."""
    linear = problem.linear
    if isinstance(problem, LP):
        square = linear.new_zeros(*linear.shape, linear.shape[-1])
    else:
        square = problem.quadratic_tensor()
    # In float64 before cells and weights are multiplied, or the product would be rounded.
    A = problem.rows.with_tensors(*(t.double() for t in problem.rows.tensors)).to_tensor()
    P, A, q, l, u, lb, ub = (
        t.detach().cpu().double() for t in (square, A, linear, problem.l, problem.u, problem.lb,
                                            problem.ub)
    )  # fmt: skip
    x, y = torch.zeros_like(q), torch.zeros_like(l)
    for b in range(len(q)):
        free, active = held[b] == 0, side[b] != 0
        K, scale = equations(P[b], A[b], side[b], held[b])
        x[b] = torch.where(free, 0.0, torch.where(held[b] > 0, ub[b], lb[b]))
        aim = torch.where(side[b] > 0, u[b], l[b])[active] - A[b, active] @ x[b]
        right = torch.cat([-(q[b] + P[b] @ x[b])[free], aim * scale])
        inverse = torch.linalg.pinv(K, rtol=1e-11)
        z = inverse @ right
        z = z + inverse @ (right - K @ z)  # one step of refinement
        count = int(free.sum())
        x[b, free], y[b, active] = z[:count], z[count:] * scale
    return x, y
