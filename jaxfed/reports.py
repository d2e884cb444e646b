"""What a run says of itself: a report of each round, evaluations, and a history. Host side, NumPy."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxfed import checks


def less_is_better(metric: str) -> bool:
    """Whether a metric falls as a model improves, by its name: a loss or an error, also as :meth:`Evaluation.row` derives it.

    >>> less_is_better("loss_worst_decile"), less_is_better("rmse"), less_is_better("accuracy")
    (True, True, False)
    """
    return metric.removesuffix("_client_mean").removesuffix("_worst_decile").endswith(("loss", "error", "mse", "mae"))


@dataclasses.dataclass
class Evaluation:
    """Metrics of one model over federated data.

    Attributes:
        metrics: By name, the mean over all rows.
        by_client: By name ``[N]``, each client's mean; NaN for a client without rows.
        examples: ``[N]`` each client's rows.
    """

    metrics: dict[str, float]
    by_client: dict[str, np.ndarray]
    examples: np.ndarray

    @classmethod
    def from_sums(cls, sums: dict[str, Any], examples: np.ndarray) -> "Evaluation":
        """From the sums ``[N]`` of per-example values.

        >>> Evaluation.from_sums({"loss": [2.0, 9.0]}, np.array([2, 3])).metrics
        {'loss': 2.2}
        """
        sums = {name: np.asarray(x, float) for name, x in sums.items()}
        rows = np.where(examples > 0, examples, 1)
        by_client = {name: np.where(examples > 0, x / rows, np.nan) for name, x in sums.items()}
        return cls({name: float(x.sum() / examples.sum()) for name, x in sums.items()}, by_client, np.asarray(examples))

    def row(self) -> dict[str, float]:
        """Global means, and over clients the mean and the worst decile, as plain numbers.

        The worst decile is the value that a tenth of the clients do not reach: the 90th percentile of a loss or an error, the
        10th of anything else.
        """
        row = dict(self.metrics)
        for name, values in self.by_client.items():
            values = values[self.examples > 0]
            worst = 90 if less_is_better(name) else 10
            # Between two infinities NumPy warns that it cannot tell; the NaN says so.
            with np.errstate(invalid="ignore"):
                row[f"{name}_client_mean"] = float(values.mean()) if len(values) else float("nan")
                row[f"{name}_worst_decile"] = float(np.percentile(values, worst)) if len(values) else float("nan")
        return row

    def table(self) -> list[dict[str, float]]:
        """A row per client: its number, its rows, its metrics."""
        columns = {"client": np.arange(len(self.examples)), "examples": self.examples, **self.by_client}
        return [{name: x[i].item() for name, x in columns.items()} for i in range(len(self.examples))]


@dataclasses.dataclass
class RoundReport:
    """What happened in one round.

    Attributes:
        round: Rounds done after it, from 1.
        clients: ``[C]`` who was selected.
        counted: ``[C]`` whose upload counted.
        metrics: By name ``[C]``: ``examples``, ``steps``, ``loss`` and what a part asks for.
        update_norm: The Euclidean norm of the pseudo-gradient.
        evaluation: Of the new model, where one was asked for.
        selection: What the selector says of itself, by name.
    """

    round: int
    clients: np.ndarray
    counted: np.ndarray
    metrics: dict[str, np.ndarray]
    update_norm: float
    evaluation: Evaluation | None = None
    selection: dict[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def unstack(cls, infos: Any, rounds: int) -> list["RoundReport"]:
        """The first ``rounds`` of a stacked RoundInfo ``[chunk, ...]``."""
        return [cls._one(infos, i) for i in range(rounds)]

    @classmethod
    def _one(cls, infos: Any, i: int) -> "RoundReport":
        valid = infos.cohort.valid[i]
        metrics = {name: x[i][valid] for name, x in infos.metrics.items()}
        number, norm = int(infos.round[i]) + 1, float(infos.update_norm[i])
        selection = {name: float(x[i]) for name, x in infos.selection.items()}
        return cls(number, infos.cohort.ids[i][valid], infos.counts[i][valid], metrics, norm, selection=selection)

    @property
    def loss(self) -> float:
        """The training loss of the clients that counted, weighted by examples; NaN if none did."""
        examples = np.where(self.counted, self.metrics["examples"], 0.0)
        losses = np.where(self.counted, self.metrics["loss"], 0.0)
        return float((examples * losses).sum() / examples.sum()) if examples.sum() else float("nan")

    @property
    def excluded(self) -> list[int]:
        """Selected clients whose upload did not count: not finite, no rows, or no work."""
        return self.clients[~self.counted].tolist()

    def row(self) -> dict[str, Any]:
        """The round as plain numbers, for a table or a line of JSON; evaluated metrics begin with ``eval_``."""
        row: dict[str, Any] = {
            "round": self.round,
            "loss": self.loss,
            "clients": int(self.counted.sum()),
            "excluded": self.excluded,
            "examples": int(self.metrics["examples"][self.counted].sum(dtype=np.float64)),
            "steps": int(self.metrics["steps"][self.counted].sum(dtype=np.float64)),
            "update_norm": self.update_norm,
            **self.selection,
        }
        evaluated = {} if self.evaluation is None else self.evaluation.row()
        return row | {f"eval_{name}": value for name, value in evaluated.items()}


class History:
    """The reports of a run's rounds, in order.

    ``history[3]`` is a report, ``history["loss"]`` a column with NaN where a round has no such value.
    """

    def __init__(self, reports: Iterable[RoundReport] = ()):
        self._reports = list(reports)

    def extend(self, reports: Iterable[RoundReport]) -> None:
        """Adds reports at the end."""
        self._reports.extend(reports)

    def rows(self) -> list[dict[str, Any]]:
        """All rounds as plain data."""
        return [report.row() for report in self._reports]

    def by_client(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Learning curves of the clients: what each was evaluated at, over the rounds.

        Args:
            metric: A name in :attr:`Evaluation.metrics`.

        Returns:
            The evaluated rounds ``[E]``, and the values ``[E, N]``; NaN for a client without rows.

        Raises:
            ValueError: If nothing was evaluated, or it has no such metric.

        Example:
            >>> metrics = {"examples": np.ones(1), "steps": np.ones(1), "loss": np.ones(1)}
            >>> found = Evaluation.from_sums({"loss": [2.0, 9.0]}, np.array([2, 3]))
            >>> History([RoundReport(5, np.arange(1), np.ones(1, bool), metrics, 0.1, found)]).by_client("loss")
            (array([5]), array([[1., 3.]]))
        """
        evaluated = [(report.round, report.evaluation) for report in self._reports if report.evaluation is not None]
        if not evaluated:
            raise ValueError("No round of this history was evaluated. Run with eval_every=1 or more.")
        checks.known_name("evaluated metric", metric, evaluated[0][1].by_client)
        return np.array([round for round, _ in evaluated]), np.stack([found.by_client[metric] for _, found in evaluated])

    def __len__(self) -> int:
        return len(self._reports)

    def __iter__(self) -> Iterator[RoundReport]:
        return iter(self._reports)

    def __getitem__(self, item: int | str) -> Any:
        if not isinstance(item, str):
            return self._reports[item]
        rows = self.rows()
        known = dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list))
        checks.known_name("column", item, known)
        return np.array([row.get(item, np.nan) for row in rows], float)

    def __repr__(self) -> str:
        last = f", last loss {self._reports[-1].loss:.4g}" if self._reports else ""
        return f"History({len(self)} rounds{last})"
