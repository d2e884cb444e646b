"""Asynchronous rounds: clients train at their own pace, and the server steps whenever enough have finished."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxfed import checks, part, trees
from jaxfed.base import Selector
from jaxfed.messages import Cohort, CohortInfo, Params, Upload
from jaxfed.permutation import permute
from jaxfed.server.aggregators import WeightedAggregator, as_weighting, over_weight
from jaxfed.server.clock import Availability
from jaxfed.server.ranking import ranks
from jaxfed.server.selection import Ranked, places


class Training(NamedTuple):
    """The clients that are training, ``[M]``.

    Attributes:
        ids: Their numbers; N where there is none.
        start: When they began, in seconds.
        finish: When they will have finished; infinity where there is none.
        began: From the broadcast of which round.
    """

    ids: jax.Array
    start: jax.Array
    finish: jax.Array
    began: jax.Array


class AsynchronousState(NamedTuple):
    """The state of the selection inside, seconds since the first round, and who is training."""

    selector: Any
    clock: jax.Array
    training: Training


class Asynchronous(Selector):
    """A round is the next ``buffer`` clients to finish, each from the broadcast that it began with; others go on training.

    As many clients train at a time as the selection inside has for its ``size``. Whenever one finishes, another begins with the
    newest model, that of the server's step if it comes at this moment. A client begins only where it will still be there when it
    has finished, and not in the round in which it did. One that finishes ``versions`` rounds or more after it began is too late
    and does not count.

    A virtual clock says when all of that happens: it stands at the last upload of a round, and reports have it as ``"clock"``.
    Clients report ``"staleness"``, the rounds since they began; :class:`Buffered` weighs by it. With one time for all, and as
    many in the buffer as train, every client begins now, and a round is a synchronous one.

    Args:
        selector: Who begins: a selection that ranks clients, whose ``size`` is how many train at a time.
        buffer: ``C``, uploads for a step of the server, at most that ``size``.
        seconds: ``[N]`` how long each client takes for all of its work.
        availability: When clients are there; None: always.
        versions: ``T``, how many broadcasts are held, in as much memory as T models; at least 2.

    Example:
        >>> rule = Asynchronous(("uniform", {"size": 3}), buffer=1, seconds=[5.0, 2.0, 9.0])
        >>> state, found = rule.init(3), []
        >>> for round in range(4):
        ...     cohort = rule.select(state, jax.random.key(round), jnp.array(round), 3)
        ...     state = rule.observe(state, cohort, {})
        ...     found.append((int(cohort.ids[0]), int(cohort.age[0]), float(state.clock)))
        >>> found
        [(1, 0, 2.0), (1, 0, 4.0), (0, 2, 5.0), (1, 1, 6.0)]

    References:
        Nguyen et al., `Federated Learning with Buffered Asynchronous Aggregation <https://arxiv.org/abs/2106.06639>`_, 2022
    """

    name = "asynchronous"
    selector: Ranked = part.part("selector")
    buffer: int = part.size()
    seconds: Any = part.by_client(above=0)
    availability: Availability | None = part.part("availability", default=None, optional=True)
    versions: int = part.size(default=6, at_least=2)  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self) -> None:
        """Only what ranks clients can be told who trains already.

        Raises:
            TypeError: If the selection does not.
            ValueError: If the buffer waits for more clients than train.
        """
        ranks("Asynchronous.selector", self.selector)
        if self.buffer > self.selector.size:
            raise ValueError(
                f"Asynchronous.buffer: expected at most the {self.selector.size} clients that train at a time, got {self.buffer}."
            )

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the selection inside reads."""
        return self.selector.reads

    def init(self, population: int) -> AsynchronousState:
        """Nobody trains yet."""
        size = self.selector.size
        ids, began = jnp.full(size, population, jnp.int32), jnp.zeros(size, jnp.int32)
        nobody = Training(ids, jnp.zeros(size), jnp.full(size, jnp.inf, float), began)
        return AsynchronousState(self.selector.init(population), jnp.zeros(()), nobody)

    def cohort_size(self, population: int) -> int:
        """``C``.

        Raises:
            ValueError: If the population is smaller than those who train, or an array has not a row for each client.
        """
        checks.a_row_for_each("Asynchronous.seconds", self.seconds, population)
        if self.availability is not None:
            self.availability.check_clients(population)
        self.selector.cohort_size(population)
        return self.buffer

    def select(self, state: AsynchronousState, key: jax.Array, round: jax.Array, population: int) -> Cohort:
        """The next to finish, in their order."""
        score_key, tie_key = jax.random.split(key)
        scores = self.selector.scores(state.selector, score_key, round, population)
        free = jnp.ones(population, bool).at[state.training.ids].set(False, mode="drop")
        crowd = _Crowd(self, _without_ties(scores, tie_key), round)
        training, free = crowd.fill(state.training, free, state.clock)
        empty = jnp.zeros(self.buffer, jnp.int32)
        cohort = Cohort(empty, jnp.zeros(self.buffer, bool), jnp.ones(self.buffer), empty)
        carry = (training, free, state.clock, cohort)
        training, _, clock, cohort = jax.lax.fori_loop(0, self.buffer, crowd.arrive, carry)
        # Where nobody trains that could finish, time goes on.
        clock = jnp.where((cohort.ids < population).any(), clock, clock + self.seconds.max())
        # The server's step comes with the last upload.
        began = jnp.where(training.start == clock, round + 1, training.began)
        return cohort._replace(memo=(training._replace(began=began), clock))

    def stays(self, clock: jax.Array, population: int) -> jax.Array:
        """``[N]`` who is there, and still is when it would have finished."""
        if self.availability is None:
            return jnp.ones(population, bool)
        everyone = jnp.arange(population)
        return self.availability.online(clock, everyone) & self.availability.online(clock + self.seconds, everyone)

    def observe(self, state: AsynchronousState, cohort: Cohort, metrics: dict[str, jax.Array]) -> AsynchronousState:
        """The others go on, and the selection inside learns."""
        training, clock = cohort.memo
        return AsynchronousState(self.selector.observe(state.selector, cohort, metrics), clock, training)

    def report(self, state: AsynchronousState) -> dict[str, jax.Array]:
        """The clock, in seconds."""
        return {"clock": state.clock} | self.selector.report(state.selector)


class _Crowd(NamedTuple):
    """The clients of one round: the rule, whom it prefers ``[N]`` (minus infinity: nobody), and the round."""

    rule: Asynchronous
    preference: jax.Array
    round: jax.Array

    def fill(self, training: Training, free: jax.Array, clock: jax.Array) -> tuple[Training, jax.Array]:
        """Everywhere where none trains one begins, as far as there are any."""
        vacant = training.ids == free.size
        best, who = jax.lax.top_k(self._candidates(free, clock), vacant.size)
        place = jnp.cumsum(vacant) - 1
        return self._begin(training, free, vacant & (best[place] > -jnp.inf), who[place], clock)

    def arrive(self, place: jax.Array, carry: tuple) -> tuple:
        """The next one finishes, and another begins: ``(training, free, clock, cohort)``."""
        training, free, clock, cohort = carry
        lane = training.finish.argmin()
        finish, client, age = training.finish[lane], training.ids[lane], self.round - training.began[lane]
        came = finish < jnp.inf
        cohort = cohort._replace(
            ids=cohort.ids.at[place].set(client),
            valid=cohort.valid.at[place].set(came & (age < self.rule.versions)),
            age=cohort.age.at[place].set(jnp.clip(age, 0, self.rule.versions - 1)),
        )
        clock = jnp.where(came, finish, clock)
        training = training._replace(ids=training.ids.at[lane].set(free.size), finish=training.finish.at[lane].set(jnp.inf))
        candidates = self._candidates(free, clock)
        best = candidates.argmax()
        begins = (jnp.arange(training.ids.size) == lane) & (candidates[best] > -jnp.inf)
        training, free = self._begin(training, free, begins, best, clock)
        return training, free, clock, cohort

    def _candidates(self, free: jax.Array, clock: jax.Array) -> jax.Array:
        return jnp.where(free & self.rule.stays(clock, free.size), self.preference, -jnp.inf)

    def _begin(
        self, training: Training, free: jax.Array, where: jax.Array, who: jax.Array, clock: jax.Array
    ) -> tuple[Training, jax.Array]:
        """Clients ``who`` begin at the places ``where [M]``."""
        training = Training(
            jnp.where(where, who.astype(jnp.int32), training.ids),
            jnp.where(where, clock, training.start),
            jnp.where(where, clock + self.rule.seconds[who], training.finish),
            jnp.where(where, self.round, training.began),
        )
        return training, free.at[jnp.where(where, who, free.size)].set(False, mode="drop")


def _without_ties(scores: jax.Array, key: jax.Array) -> jax.Array:
    """``[N]`` numbers in the order of the scores; of equal ones, some are higher at random."""
    order = permute(key, jnp.arange(scores.size), scores.size)
    ranks = jnp.zeros(scores.size).at[order].set(places(scores[order]).astype(float))
    return jnp.where(scores > -jnp.inf, ranks, -jnp.inf)


class Buffered(WeightedAggregator):
    r"""The mean of the updates, late ones less: FedBuff's.

    .. math:: u = \frac{\sum_i n_i \, (1 + \tau_i)^{-a} \, u_i}{\sum_i n_i}

    with :math:`\tau_i` the rounds since client i began, its ``"staleness"``, 0 in a synchronous round. The weights are not made
    to add up to one: a round of late clients is a short step. Statistics and auxiliary variables are averaged by ``n_i``.

    Args:
        by: What a client weighs beside, ``n_i``: ``"examples"``, ``"steps"`` or ``"uniform"``, as in the paper.
        power: ``a``, at least 0.

    Example:
        >>> upload = Upload(jnp.array([6.0]), (), {}, {"examples": jnp.array(1.0), "staleness": jnp.array(3.0)})
        >>> print(Buffered().prepare(upload, ()))
        [3.]

    References:
        Nguyen et al., `Federated Learning with Buffered Asynchronous Aggregation <https://arxiv.org/abs/2106.06639>`_, 2022
    """

    name = "buffered"
    by: str = part.field(as_weighting, default="uniform", is_static=True)
    power: float = part.number(default=0.5, at_least=0)

    def prepare(self, upload: Upload, sent: Any) -> Params:
        """``n_i (1 + tau_i)^-a u_i``."""
        late = (1 + upload.metrics.get("staleness", jnp.zeros(()))) ** -self.power
        return trees.scale(self.weigh(upload.metrics) * late, trees.widen(upload.delta))

    def finalize(self, total: Params, state: Any, info: CohortInfo) -> tuple[Params, Any]:
        """Divides by the sum of the ``n_i``."""
        return over_weight(total, info.weight), state
