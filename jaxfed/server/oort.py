"""Oort: guided selection of clients by how much there is to learn from them and how long they take."""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from jaxfed import checks, part
from jaxfed.messages import Cohort
from jaxfed.server.ranking import ALWAYS
from jaxfed.server.selection import Ranked, places

# Above every score: who is exploited comes before who is explored, and both before those that fill the cohort.
_EXPLOITED, _EXPLORED = 3.0, 2.0
_LEAST_RANGE = 1e-4
# Ten times 0.1 is one.
_ROUNDING = 1e-4
# The smallest utility lies a little above the bottom of the scale.
_BOTTOM = 0.999


class OortState(NamedTuple):
    """What is known of the clients.

    Attributes:
        utility: ``[N]`` of the last time that each took part.
        last: ``[N]`` the round of that, from 1; 0 for never.
        picks: ``[N]`` how often it took part.
        rounds: Rounds done.
        percentile: Of the clients' times, the one above which a client is slow.
        gain: The mean utility of exploited clients, summed over the rounds since the pacer last looked.
        gain_before: The same sum of the rounds before those.
    """

    utility: jax.Array
    last: jax.Array
    picks: jax.Array
    rounds: jax.Array
    percentile: jax.Array
    gain: jax.Array
    gain_before: jax.Array


class Oort(Ranked):
    r"""Most of a cohort is exploited: drawn in proportion to a score; the rest is explored among clients never seen.

    .. math::
        \mathrm{score}_i = \Big( \frac{\min(U_i, U^{(p)}) - U_{\min}}{U_{\max} - U_{\min}} + \sqrt{\frac{0.1 \ln t}{t_i}} \Big)
        \Big( \frac{T}{d_i} \Big)^{\alpha \, [d_i > T]}, \qquad
        U_i = n_i \sqrt{\tfrac{1}{n_i} \sum_j f(w_t; x_{ij})^2}

    with :math:`t` the round from 1, :math:`t_i` the client's last, :math:`U^{(p)}` a high percentile, :math:`d_i` the client's
    time and :math:`T` a percentile of all times, which a pacer moves: where the utility of exploited clients stays the same for
    ``pacer_step`` rounds, slower ones are let in. A client that was selected but did not finish is given the mean utility of
    those that did.

    In the first round all are drawn at random. Those to explore are drawn in proportion to their examples, slow ones less, among
    the ``window`` times as many with the most. The constants are FedScale's; :meth:`paper` has those of Oort's own program.

    Args:
        size: ``C``, clients per round.
        examples: ``[N]`` each client's rows: what an unseen client is worth.
        seconds: ``[N]`` each client's time for a round, or None: then nobody is slow.
        metric: A client's root mean square loss; with ``"loss"``, which always travels, the mean loss of its steps.
        explore: The share to explore in the first rounds.
        explore_decay: What it is multiplied by in each round.
        explore_least: What it stays above, while there are unseen clients.
        clip: The percentile, as a share, at which utilities are cut.
        penalty: The exponent of a slow client's score.
        cutoff: Clients of at least this share of the score of the last that would be taken can be drawn, and the ten times as
            many best.
        window: Of how many times as many as needed unseen clients are drawn.
        percentile: Of the times, in percent, where the pacer begins; from 100 on nobody is slow.
        pacer_step: Rounds between the pacer's moves.
        pacer_delta: By how many percent it moves.
        most_picks: A client that took part more often is left out, the most frequent first and no more than three of ten
            clients; None leaves nobody out.

    Example:
        >>> rule = Oort(2, examples=[10, 20, 30, 40], metric="loss")
        >>> rule.select(rule.init(4), jax.random.key(0), jnp.array(0), 4).ids.shape
        (2,)

    References:
        Lai et al., `Oort: Efficient Federated Learning <https://arxiv.org/abs/2010.06081>`_, 2021
    """

    name = "oort"
    presets = ("paper",)
    examples: Any = part.by_client(above=0)
    seconds: Any = part.by_client(default=None, above=0)
    metric: str = part.static(default="loss_rms")
    explore: float = part.number(default=0.9, at_least=0, at_most=1)
    explore_decay: float = part.number(default=0.98, above=0, at_most=1)
    explore_least: float = part.number(default=0.3, at_least=0, at_most=1)
    clip: float = part.number(default=0.9, above=0, at_most=1)
    penalty: float = part.number(default=2.0, at_least=0)
    cutoff: float = part.number(default=0.05, at_least=0, at_most=1)
    window: float = part.number(default=5.0, at_least=1)
    percentile: float = part.number(default=30.0, above=0)
    pacer_step: int = part.count(default=20, at_least=1)
    pacer_delta: float = part.number(default=5.0, at_least=0)
    most_picks: int | None = part.size(default=None, optional=True)

    @classmethod
    def paper(cls, size: int, examples: Any, **options: Any) -> Self:
        """The constants of Oort's own program: less exploration, cut at the 98th percentile, a pool of the nearly best."""
        own: dict[str, Any] = {"explore_decay": 0.95, "explore_least": 0.2, "clip": 0.98, "cutoff": 0.95}
        return cls(size, examples, **own | options)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The metric, unless it always travels."""
        return () if self.metric in ALWAYS else (self.metric,)

    def cohort_size(self, population: int) -> int:
        """``C``.

        Raises:
            ValueError: If an array has not a number for each client, or the population is smaller.
        """
        checks.a_row_for_each("Oort.examples", self.examples, population)
        if self.seconds is not None:
            checks.a_row_for_each("Oort.seconds", self.seconds, population)
        return super().cohort_size(population)

    def init(self, population: int) -> OortState:
        """Nobody has been seen."""
        clients, zero = jnp.zeros(population), jnp.zeros(())
        return OortState(clients, clients, clients, zero, jnp.asarray(self.percentile, float), zero, zero)

    def scores(self, state: OortState, key: jax.Array, round: jax.Array, population: int) -> jax.Array:
        """``[N]``: above 3 for those exploited, above 2 for those explored, below 1 for all others."""
        exploit_key, explore_key, rest_key = jax.random.split(key, 3)
        seen, barred = state.last > 0, self.barred(state)
        share = self.share_explored(round)
        unseen = (~seen & ~barred).sum()
        most = jnp.floor(self.size * jnp.where(unseen > 0, 1 - share, 1.0) + _ROUNDING)
        count = jnp.minimum(most, (seen & ~barred).sum())
        score = jnp.where(seen & ~barred, self.score(state, round), -jnp.inf)
        exploited = self._exploited(score, count, exploit_key)
        prior = jnp.where(seen | barred, -jnp.inf, self.examples * self.slowness(state))
        # In the first round nothing is known that would be better than chance.
        explored = self._explored(prior, jnp.where(round > 0, self.size - count, 0), explore_key)
        rest = jnp.where(barred, -jnp.inf, jax.random.uniform(rest_key, (population,)))
        return jnp.where(exploited, _EXPLOITED, jnp.where(explored, _EXPLORED, rest))

    def score(self, state: OortState, round: jax.Array) -> jax.Array:
        """``[N]`` of those that have been seen: what there is to learn, how long ago, how slow."""
        known = jnp.where(state.last > 0, state.utility, self.examples)
        positive = known > 0
        cut = _of_sorted(jnp.where(positive, known, jnp.inf), self.clip, positive.sum())
        least = _BOTTOM * jnp.where(positive, known, jnp.inf).min()
        most = jnp.where(positive, known, -jnp.inf).max()
        scaled = (jnp.minimum(known, cut) - least) / jnp.maximum(most - least, _LEAST_RANGE)
        waited = jnp.sqrt(0.1 * jnp.log(round + 1.0) / jnp.maximum(state.last, 1))
        return jnp.abs((scaled + waited) * self.slowness(state))

    def slowness(self, state: OortState) -> jax.Array:
        """``[N]`` what a score is multiplied by: ``(T / d_i) ** penalty`` where a client takes longer than ``T``, else 1."""
        if self.seconds is None:
            return jnp.ones_like(state.utility)
        limit = _of_sorted(self.seconds, state.percentile / 100, self.seconds.size)
        limit = jnp.where(state.percentile < 100, limit, jnp.inf)
        return jnp.where(self.seconds > limit, (limit / self.seconds) ** self.penalty, 1.0)

    def share_explored(self, round: jax.Array) -> jax.Array:
        """The share to explore in a round: it falls from the second on, in which Oort first chooses."""
        return jnp.maximum(self.explore * self.explore_decay ** jnp.maximum(round, 0), self.explore_least)

    def barred(self, state: OortState) -> jax.Array:
        """``[N]`` who took part too often."""
        if self.most_picks is None:
            return jnp.zeros(state.picks.size, bool)
        most = int(0.3 * state.picks.size)
        return (state.picks > self.most_picks) & (places(-state.picks) < most)

    def _exploited(self, score: jax.Array, count: jax.Array, key: jax.Array) -> jax.Array:
        """``[N]`` who is drawn for its score: ``count`` of those whose score nearly suffices and of the best."""
        best, where = jax.lax.top_k(score, min(10 * self.size + 1, score.size))
        enough = self.cutoff * jnp.take(best, count.astype(int), mode="clip")
        among_best = jnp.zeros(score.size, bool).at[where].set(jnp.arange(where.size) <= 10 * count)
        pool = (score > -jnp.inf) & (among_best | (score >= enough))
        return _drawn(jnp.where(pool, score, -jnp.inf), count, self.size, key)

    def _explored(self, prior: jax.Array, count: jax.Array, key: jax.Array) -> jax.Array:
        """``[N]`` who is drawn among the unseen: ``count`` of the ``window`` times as many that promise most."""
        pool = places(-prior) < jnp.floor(self.window * count)
        return _drawn(jnp.where(pool, prior, -jnp.inf), count, self.size, key)

    def observe(self, state: OortState, cohort: Cohort, metrics: dict[str, jax.Array]) -> OortState:
        """With the cohort's utilities; then the pacer moves."""
        found = metrics["examples"] * metrics[self.metric]
        good = cohort.valid & jnp.isfinite(found)
        # Whoever had been seen was taken for its score, but for the first round, in which nobody had.
        exploited = good & (state.last.at[cohort.ids].get(mode="fill", fill_value=0) > 0)
        now = state.rounds + 1
        state = state._replace(
            utility=state.utility.at[cohort.ids].set(jnp.where(good, found, _mean(found, good)), mode="drop"),
            last=state.last.at[cohort.ids].set(now, mode="drop"),
            picks=state.picks.at[cohort.ids].add(1, mode="drop"),
            rounds=now,
            gain=state.gain + _mean(found, exploited),
        )
        return self._paced(state)

    def _paced(self, state: OortState) -> OortState:
        """Lets slower clients in where utility stays as it is, and fewer where it changes much, every ``pacer_step`` rounds."""
        chosen = state.rounds + 1  # the round that is chosen next, from 1
        turn = chosen % self.pacer_step == 0
        change = jnp.abs(state.gain - state.gain_before)
        flat, sharp = change <= 0.1 * state.gain_before, change >= 5 * state.gain_before
        slower = jnp.minimum(state.percentile + self.pacer_delta, 100.0)
        faster = jnp.maximum(state.percentile - self.pacer_delta, self.pacer_delta)
        moved = jnp.where(flat, slower, jnp.where(sharp, faster, state.percentile))
        return state._replace(
            percentile=jnp.where(turn & (chosen >= 2 * self.pacer_step), moved, state.percentile),
            gain=jnp.where(turn, 0.0, state.gain),
            gain_before=jnp.where(turn, state.gain, state.gain_before),
        )


def _drawn(scores: jax.Array, count: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """``[N]`` bool: ``count`` of at most ``most`` clients, drawn one after another in proportion to their scores."""
    noisy = jnp.log(scores) + jax.random.gumbel(key, scores.shape)
    best, where = jax.lax.top_k(jnp.where(scores > 0, noisy, -jnp.inf), most)
    return jnp.zeros(scores.size, bool).at[where].set((jnp.arange(most) < count) & (best > -jnp.inf))


def _of_sorted(values: jax.Array, share: jax.Array | float, count: jax.Array | int) -> jax.Array:
    """The value at a share of the way through the ``count`` smallest, in their order."""
    place = jnp.minimum(jnp.floor(count * share).astype(int), count - 1)
    return jnp.sort(values)[place]


def _mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """The mean of some values; 0 of none."""
    return jnp.where(where, values, 0).sum() / jnp.maximum(where.sum(), 1)
