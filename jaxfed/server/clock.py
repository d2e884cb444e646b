"""A virtual clock: how long clients take, when they are there, and rounds that end when enough have finished."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed import checks, part
from jaxfed.base import Selector
from jaxfed.messages import Cohort
from jaxfed.part import Part
from jaxfed.server.ranking import ranks
from jaxfed.server.selection import Ranked, highest, places

# A backward pass takes about twice as long as a forward one.
_PASSES = 3.0


def completion_seconds(
    *, milliseconds: ArrayLike, kbit_per_second: ArrayLike, examples: ArrayLike, model_kbit: float
) -> jax.Array:
    r"""How long clients take for a round: to compute, and to load the model and send it back.

    .. math:: d_i = \frac{3 \, n_i \, c_i}{1000} + \frac{2 S}{b_i}

    Args:
        milliseconds: ``[N]`` ``c``, for the forward pass of an example.
        kbit_per_second: ``[N]`` ``b``, the link's speed.
        examples: ``[N]`` or a number, ``n``: those that are trained on in a round.
        model_kbit: ``S``.

    Returns:
        Seconds ``[N]``.

    Example:
        >>> speeds = jnp.array([10.0, 40.0])
        >>> print(completion_seconds(milliseconds=speeds, kbit_per_second=1000.0, examples=100, model_kbit=500).round(4))
        [ 4. 13.]

    References:
        Lai et al., `FedScale <https://arxiv.org/abs/2105.11367>`_, 2022
    """
    compute = _PASSES * jnp.asarray(examples, float) * jnp.asarray(milliseconds, float) / 1000
    return compute + 2 * model_kbit / jnp.asarray(kbit_per_second, float)


class Availability(Part, kind="availability"):
    """When clients are there."""

    def check_clients(self, population: int) -> None:
        """Raises ValueError unless it is of a population of that size."""

    def online(self, time: ArrayLike, ids: jax.Array) -> jax.Array:
        """Whether clients ``ids [C]`` are there at a time in seconds, or each at its own ``[C]``."""
        raise NotImplementedError(f"{type(self).__name__} defines no online(time, ids).")


class Windows(Availability):
    """Clients are there in windows of time that come again: a trace of devices that charge, or are on a free network.

    Args:
        begins: ``[N, W]`` seconds at which windows open, of each client's own period.
        ends: ``[N, W]`` at which they close; a client with fewer than W windows has some that end where they begin.
        period: ``[N]`` seconds after which a client's windows come again.

    Raises:
        ValueError: If the shapes differ, or a window ends before it begins or after the period.

    Example:
        >>> night = Windows(begins=[[0.0], [12.0]], ends=[[6.0], [24.0]], period=[24.0, 24.0])
        >>> print(night.online(jnp.array(50.0), jnp.arange(2)))
        [ True False]
    """

    name = "windows"
    begins: Any = part.by_client(ndim=2, at_least=0)
    ends: Any = part.by_client(ndim=2, at_least=0)
    period: Any = part.by_client(above=0)

    def check(self) -> None:
        """That windows are windows."""
        if checks.is_traced(self.begins):
            return
        if self.begins.shape != self.ends.shape or len(self.begins) != len(self.period):
            got = f"{self.begins.shape}, {self.ends.shape} and {self.period.shape}"
            raise ValueError(f"Windows: expected begins [N, W], ends [N, W] and period [N], got {got}.")
        if (self.begins > self.ends).any() or (self.ends > self.period[:, None]).any():
            raise ValueError("Windows: expected begins <= ends <= period, got a window that is none.")

    def check_clients(self, population: int) -> None:
        """Raises ValueError unless there is a row for each client."""
        checks.a_row_for_each("Windows.period", self.period, population)

    def online(self, time: ArrayLike, ids: jax.Array) -> jax.Array:
        """Whether that moment of a client's period is in a window of its own."""
        moment = (time % self.period[ids])[:, None]
        return ((self.begins[ids] <= moment) & (moment < self.ends[ids])).any(1)


class ClockState(NamedTuple):
    """The state of the selection inside, and seconds since the first round."""

    selector: Any
    clock: jax.Array


class FirstToFinish(Selector):
    """Selects more clients than it needs and takes the first that finish; a virtual clock moves on by the last of those.

    Clients are chosen among those that are there. One that is gone before it would finish drops out; of the others the ``keep``
    fastest count, and the rest are stragglers, which the selection inside is told. Where nobody finishes, the clock moves on by
    the slowest of all clients. Reports have the clock's time after the round as ``"clock"``.

    Args:
        selector: Whom to ask: a selection that ranks clients, of about 1.3 times as many as ``keep``.
        keep: How many uploads a round takes.
        seconds: ``[N]`` how long each client takes for all of its work: :func:`completion_seconds`.
        availability: When clients are there; None: always.

    Example:
        >>> rule = FirstToFinish(("uniform", {"size": 4}), keep=2, seconds=[9.0, 1.0, 4.0, 7.0])
        >>> cohort = rule.select(rule.init(4), jax.random.key(0), jnp.array(0), 4)
        >>> print(jnp.sort(jnp.where(cohort.valid, cohort.ids, 9)), rule.observe(rule.init(4), cohort, {}).clock)
        [1 2 9 9] 4.0
    """

    name = "first-to-finish"
    selector: Ranked = part.part("selector")
    keep: int = part.count(at_least=1)
    seconds: Any = part.by_client(above=0)
    availability: Availability | None = part.part("availability", default=None, optional=True)

    def check(self) -> None:
        """Only what ranks clients can be told who is there.

        Raises:
            TypeError: If the selection does not.
        """
        ranks("FirstToFinish.selector", self.selector)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the selection inside reads."""
        return self.selector.reads

    def init(self, population: int) -> ClockState:
        """At 0."""
        return ClockState(self.selector.init(population), jnp.zeros(()))

    def cohort_size(self, population: int) -> int:
        """That of the selection inside.

        Raises:
            ValueError: If it is below ``keep``, or an array has not a row for each client.
        """
        checks.a_row_for_each("FirstToFinish.seconds", self.seconds, population)
        if self.availability is not None:
            self.availability.check_clients(population)
        size = self.selector.cohort_size(population)
        if self.keep > size:
            raise ValueError(f"FirstToFinish.keep: expected at most the {size} clients that are asked, got {self.keep}.")
        return size

    def select(self, state: ClockState, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """Those asked, of whom the first that finish are valid."""
        score_key, tie_key = jax.random.split(key)
        scores = self.selector.scores(state.selector, score_key, round, population)
        here = self._online(state.clock, jnp.arange(population))
        cohort = highest(jnp.where(here, scores, -jnp.inf), self.selector.size, tie_key)
        seconds = self.seconds[cohort.ids]
        stays = cohort.valid & self._online(state.clock + seconds, cohort.ids)
        return cohort._replace(valid=stays & (places(jnp.where(stays, seconds, jnp.inf)) < self.keep))

    def observe(self, state: ClockState, cohort: Cohort, metrics: dict[str, jax.Array]) -> ClockState:
        """The clock moves on, and the selection inside learns; it does not hear of clients that were not there."""
        asked = self._online(state.clock, cohort.ids)
        seconds = jnp.where(cohort.valid, self.seconds[cohort.ids], 0).max()
        known = cohort._replace(ids=jnp.where(asked, cohort.ids, self.seconds.size))
        inner = self.selector.observe(state.selector, known, metrics)
        return ClockState(inner, state.clock + jnp.where(cohort.valid.any(), seconds, self.seconds.max()))

    def report(self, state: ClockState) -> dict[str, jax.Array]:
        """The clock, in seconds."""
        return {"clock": state.clock} | self.selector.report(state.selector)

    def _online(self, time: jax.Array, ids: jax.Array) -> jax.Array:
        """``[C]``."""
        return jnp.ones(ids.shape, bool) if self.availability is None else self.availability.online(time, ids)
