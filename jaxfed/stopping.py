"""Whether a run should stop, and which of its models was the best: what a loop over rounds asks after each of them."""

import math

import jax

from jaxfed import checks
from jaxfed.messages import RunState
from jaxfed.reports import RoundReport, less_is_better


class BestModel:
    """The best evaluation so far, and the state of which it was.

    An evaluation that is not finite is never the best; of equal ones the first is.

    Args:
        metric: A name in :meth:`Evaluation.row`, such as ``"loss"``, ``"accuracy"`` or ``"accuracy_worst_decile"``.
        decrease: Whether less of it is better; None takes it so for a loss or an error, and for nothing else.

    Attributes:
        round: Rounds done by the best, None as long as nothing was evaluated.
        value: Its metric, NaN as long as nothing was evaluated.
        state: Its state, if given. What clients keep is copied, because later rounds write over it; weights are not.

    Example:
        >>> import jax.numpy as jnp, jaxfed
        >>> data = jaxfed.FederatedData.from_arrays({"x": [[1.0], [3.0]]}, [0, 1])
        >>> algorithm = jaxfed.fedavg(lambda w, batch, key: jnp.abs(batch["x"] @ w - 1), lrate=0.3, batch_size=None)
        >>> simulation, best = jaxfed.Simulation(algorithm, data), jaxfed.BestModel("loss")
        >>> for state, report in simulation.rounds(simulation.init(jnp.zeros(1), key=jax.random.key(0)), rounds=6, eval_every=1):
        ...     if best.update(report, state):
        ...         print(report.round, f"{best.value:.2f}")
        1 0.60
        2 0.40
    """

    def __init__(self, metric: str, *, decrease: bool | None = None):
        self.metric = checks.instance("BestModel.metric", metric, str)
        self.decrease = less_is_better(metric) if decrease is None else checks.instance("decrease", decrease, bool)
        self.round: int | None = None
        self.value = math.nan
        self.state: RunState | None = None

    def update(self, report: RoundReport, state: RunState | None = None) -> bool:
        """Takes what ``rounds`` yields, or the last report of what ``chunks`` yields.

        Returns:
            Whether this evaluation is the best so far; False for a round without one.

        Raises:
            TypeError: If it is no report.
            ValueError: If the evaluation has no such metric.
        """
        value = _value_of(report, self.metric)
        if value is None or not self.observe(report.round, value):
            return False
        self.state = None if state is None else _outliving(state)
        return True

    def observe(self, round: int, value: float) -> bool:
        """The same from numbers, as a stored history has them."""
        if not self.gain(value) > 0:
            return False
        self.round, self.value = round, value
        return True

    def gain(self, value: float) -> float:
        """By how much a value is better than the best so far; infinite for the first one, and ``-inf`` if it is not finite."""
        if not math.isfinite(value):
            return -math.inf
        if self.round is None:
            return math.inf
        return self.value - value if self.decrease else value - self.value


class EarlyStopping:
    r"""Stops when ``patience`` evaluations one after the other were no better than the best before them.

    With :math:`b` the best of all evaluations before, one of value :math:`m` counts as better where

    .. math:: b - m > \text{tolerance} \quad\text{or, if relative,}\quad b - m > \text{tolerance} \cdot |b|,

    and :math:`m - b` in place of :math:`b - m` where more is better. An evaluation that is not finite is not better.

    Args:
        metric: A name in :meth:`Evaluation.row`.
        patience: How many evaluations, at least 1. These are evaluations, not rounds: ``eval_every`` says how far apart they are.
        tolerance: By how much one must be better, at least 0.
        relative: Whether that is a fraction of the best.
        decrease: As in :class:`BestModel`.

    Attributes:
        best: A :class:`BestModel` of the same evaluations; the tolerance plays no part in it.
        stuck: How many evaluations in a row were not better.

    Example:
        >>> stopping = EarlyStopping("loss", patience=2, tolerance=0.1)
        >>> [stopping.observe(round, loss) for round, loss in enumerate([1.0, 0.5, 0.45, 0.4], 1)]
        [False, False, False, True]
        >>> stopping.best.round, stopping.best.value, stopping.reason
        (4, 0.4, 'loss has not improved by more than 0.1 for 2 evaluations')

    References:
        Prechelt, `Early Stopping - But When? <https://doi.org/10.1007/3-540-49430-8_3>`_, 1998; the rule is declearn's, whose
        relative tolerance is a fraction of the new best instead of the one before.
    """

    def __init__(
        self, metric: str, *, patience: int = 1, tolerance: float = 0.0, relative: bool = False, decrease: bool | None = None
    ):
        self.metric, self.best = metric, BestModel(metric, decrease=decrease)
        self.patience = checks.count("EarlyStopping.patience", patience, checks.Bounds(at_least=1))
        self.tolerance = checks.number("EarlyStopping.tolerance", tolerance, checks.Bounds(at_least=0))
        self.relative = checks.instance("EarlyStopping.relative", relative, bool)
        self.stuck = 0

    def update(self, report: RoundReport, state: RunState | None = None) -> bool:
        """Takes what ``rounds`` yields, or the last report of what ``chunks`` yields; the state, if given, is for :attr:`best`.

        Returns:
            Whether to stop.

        Raises:
            TypeError: If it is no report.
            ValueError: If the evaluation has no such metric.
        """
        if (value := _value_of(report, self.metric)) is not None:
            self._count(value)
            self.best.update(report, state)
        return self.stopped

    def observe(self, round: int, value: float) -> bool:
        """The same from numbers, as a stored history has them."""
        self._count(value)
        self.best.observe(round, value)
        return self.stopped

    @property
    def stopped(self) -> bool:
        """Whether to stop."""
        return self.stuck >= self.patience

    @property
    def reason(self) -> str:
        """How long nothing has improved, as a part of a sentence."""
        relative = " of the best" if self.relative else ""
        by = f" by more than {self.tolerance:g}{relative}" if self.tolerance else ""
        return f"{self.metric} has not improved{by} for {self.stuck} evaluation{'s' if self.stuck != 1 else ''}"

    def _count(self, value: float) -> None:
        scale = abs(self.best.value) if self.relative and self.best.round is not None else 1.0
        self.stuck = 0 if self.best.gain(value) > self.tolerance * scale else self.stuck + 1


def _value_of(report: RoundReport, metric: str) -> float | None:
    remedy = "Give what rounds(...) yields, or the last of what chunks(...) yields."
    checks.instance("report", report, RoundReport, remedy)
    if report.evaluation is None:
        return None
    row = report.evaluation.row()
    checks.known_name("evaluated metric", metric, row)
    return row[metric]


def _outliving(state: RunState) -> RunState:
    """The state with tables of its own, on the host or the devices as they were."""
    kept, seen = jax.tree.map(lambda x: x.copy(), (state.kept, state.seen))
    return state._replace(kept=kept, seen=seen)
