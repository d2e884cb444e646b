"""Clients that misbehave, to try robust aggregation on. Nothing here is needed to train.

Who misbehaves is a property of the client, not of its place in a cohort, and travels with its rows: an array ``"attacker"`` of
the data, not 0 on attackers' rows. :class:`Malicious` wraps what a client does, reads that array, spoils the uploads of attackers
and marks them with the metric ``"attacker"``; all other clients do bit for bit what they do without it. An attack that must see
the other clients' uploads wraps the aggregator instead. False labels are a matter of data: :func:`flip_labels`.

Example:
    >>> import jax, jax.numpy as jnp, numpy as np, jaxfed
    >>> def loss(params, batch, key):
    ...     return jnp.square(batch["x"] - params)
    >>> owners = np.repeat(np.arange(5), 4)
    >>> arrays = {"x": np.ones(20, np.float32), "attacker": owners == 2}
    >>> data = jaxfed.FederatedData.from_arrays(arrays, owners)
    >>> algorithm = jaxfed.fedavg(loss, lrate=0.1, batch_size=4).replace(aggregator=jaxfed.Median())
    >>> attacked = algorithm.replace(client=Malicious(algorithm.client, SignFlip(100.0)))
    >>> simulation = jaxfed.Simulation(attacked, data)
    >>> state, history = simulation.run(simulation.init(jnp.zeros(()), key=jax.random.key(0)), rounds=30)
    >>> print(jnp.round(state.params, 2), history[-1].metrics["attacker"])
    1.0 [0. 0. 1. 0. 0.]
"""

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxfed import part, trees
from jaxfed.base import Aggregator, Model
from jaxfed.client.batches import ATTACK
from jaxfed.messages import Broadcast, CohortInfo, Params, Upload
from jaxfed.part import Part
from jaxfed.personal.wrapper import Wrapper

MARK = "attacker"
"""The key of the data and the metric that says who attacks."""


class Attack(Part, kind="attack"):
    """What an attacker sends in place of its upload, written for one client."""

    def __call__(self, upload: Upload, key: jax.Array) -> Upload:
        """The false upload, of the same structure."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(upload, key).")


class SignFlip(Attack):
    """The update in the opposite direction, ``-scale`` times as long.

    Args:
        scale: How many times as long.

    Example:
        >>> upload = Upload(jnp.array([1.0, -2.0]), {}, {}, {})
        >>> print(SignFlip(3.0)(upload, jax.random.key(0)).delta)
        [-3.  6.]
    """

    name = "sign-flip"
    scale: float = part.number(default=1.0, above=0)

    def __call__(self, upload: Upload, key: jax.Array) -> Upload:
        """Turns the update around."""
        return upload._replace(delta=trees.scale(-self.scale, upload.delta))


class Scaling(Attack):
    """The update many times as long: with ``scale`` as the number of clients, a mean takes on the attacker's model.

    Args:
        scale: How many times as long.

    References:
        Bagdasaryan et al., `How To Backdoor Federated Learning <https://arxiv.org/abs/1807.00459>`_, 2020
    """

    name = "scaling"
    scale: float = part.number(default=10.0, above=0)

    def __call__(self, upload: Upload, key: jax.Array) -> Upload:
        """Stretches the update."""
        return upload._replace(delta=trees.scale(self.scale, upload.delta))


class GaussianUpload(Attack):
    """Noise in place of the update, drawn anew by every attacker in every round.

    Args:
        std: The standard deviation of each coordinate.

    References:
        Blanchard et al., `Machine Learning with Adversaries <https://arxiv.org/abs/1703.02757>`_, 2017
    """

    name = "gaussian-upload"
    std: float = part.number(default=1.0, above=0)

    def __call__(self, upload: Upload, key: jax.Array) -> Upload:
        """Draws the noise."""
        noise = optax.tree.random_like(key, upload.delta, jax.random.normal)
        return upload._replace(delta=trees.scale(self.std, noise))


class Malicious(Wrapper):
    """A client update that some clients keep to and attackers spoil.

    Args:
        client: What honest clients do, and attackers before they attack.
        attack: What attackers then send; None only marks them, for an attack that sees all uploads.

    Raises:
        ValueError: While tracing, if the data have no array ``"attacker"``.
    """

    name = "malicious"
    attack: Attack | None = part.part("attack", default=None, optional=True)

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return self.client.model  # type: ignore[attr-defined]

    @property
    def aux_reductions(self) -> dict[str, Any]:
        """Those of the wrapped client."""
        return self.client.aux_reductions

    @property
    def measured(self) -> tuple[str, ...]:
        """Those of the wrapped client, and the mark."""
        return (*self.client.measured, MARK)

    @property
    def personalizes(self) -> bool:
        """Whether the wrapped client does."""
        return self.client.personalizes

    def run(self, start: Broadcast, kept: Any, rows: Any, key: jax.Array) -> tuple[Upload, Any]:
        """The wrapped client's round; an attacker's upload is then replaced."""
        if MARK not in rows.arrays:
            keys = ", ".join(rows.arrays)
            raise ValueError(f"Malicious: expected an array {MARK!r} in the data that is not 0 on attackers' rows, got {keys}.")
        attacks = rows.arrays[MARK][rows.start] != 0
        upload, kept = self.client.run(start, kept, rows, key)
        if self.attack is not None:
            false = self.attack(upload, jax.random.fold_in(key, ATTACK))
            upload = trees.select(attacks, trees.cast_like(false, upload), upload)
        return upload._replace(metrics=upload.metrics | {MARK: attacks.astype(float)}), kept

    def personalize(self, start: Broadcast, kept: Any, rows: Any, key: jax.Array) -> Any:
        """As the wrapped client: an attack is on others."""
        return self.client.personalize(start, kept, rows, key)


class ALittleIsEnough(Aggregator, register=False):
    r"""Attackers who see all honest updates and send what lies just inside their spread, then the aggregator under attack.

    .. math:: u_i = \mu - z \sigma \quad \text{for every attacker } i

    with the mean and the standard deviation of the honest clients' updates at every coordinate. An attack and no choice of
    aggregation: it has no name in a config. Clients are marked by :class:`Malicious`.

    Args:
        aggregator: What the server uses.
        z: How far from the mean; :func:`largest_shift` says how far a majority rule can be led.

    Raises:
        ValueError: While tracing, if clients are not marked.

    Example:
        >>> marks = {"attacker": jnp.array([0.0, 0.0, 1.0])}
        >>> uploads = Upload(jnp.array([[1.0], [3.0], [2.5]]), {}, {}, marks)
        >>> info = CohortInfo(0, 3, 3.0, 3, 3.0)
        >>> combined, _ = ALittleIsEnough("median", z=2.0).combine(uploads, jnp.ones(3), (), info)
        >>> print(combined.delta)
        [1.]

    References:
        Baruch et al., `A Little Is Enough <https://arxiv.org/abs/1902.06156>`_, 2019
    """

    name = "a-little-is-enough"
    stacks = True
    aggregator: Aggregator = part.part("aggregator")
    z: float = part.number(default=1.0)

    @property
    def reads(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the aggregator under attack reads."""
        return self.aggregator.reads

    def init(self, params: Params) -> Any:
        """The state of the aggregator under attack."""
        return self.aggregator.init(params)

    def weigh(self, metrics: dict[str, jax.Array]) -> jax.Array:
        """A client's weight as the aggregator under attack has it."""
        return self.aggregator.weigh(metrics)

    def combine(self, uploads: Upload, weights: jax.Array, state: Any, info: CohortInfo) -> tuple[Upload, Any]:
        """Replaces the attackers' updates, then combines."""
        if MARK not in uploads.metrics:
            raise ValueError(f"{self.name} finds no metric {MARK!r} in the uploads. Wrap the client in Malicious(client).")
        attacks = uploads.metrics[MARK] != 0
        honest = jnp.where(attacks | (weights == 0), 0.0, 1.0)
        mean = trees.weighted_mean(uploads.delta, honest)
        gaps = jax.vmap(trees.subtract, in_axes=(0, None))(uploads.delta, mean)
        spread = jax.tree.map(jnp.sqrt, trees.weighted_mean(trees.square(gaps), honest))
        false = trees.add_scaled(mean, -self.z, spread)
        delta = jax.vmap(lambda attack, true: trees.select(attack, false, true))(attacks & (weights > 0), uploads.delta)
        return self.aggregator.combine(uploads._replace(delta=delta), weights, state, info)


def largest_shift(clients: int, attackers: int) -> float:
    r"""How many standard deviations off the mean attackers can be with a majority's support, by the paper's count.

    .. math:: z = \Phi^{-1}\Big(\frac{n - f - s}{n - f}\Big), \quad s = \lfloor n / 2 + 1 \rfloor - f

    Args:
        clients: :math:`n`, the cohort size.
        attackers: :math:`f`.

    Raises:
        ValueError: If attackers are a majority already, or so few clients leave none to win over.

    >>> f"{largest_shift(50, 24):.2f}"
    '1.43'
    """
    supporters = clients // 2 + 1 - attackers
    honest = clients - attackers
    if not (attackers >= 0 and 0 < supporters < honest):
        raise ValueError(f"largest_shift: expected attackers in a minority, got {attackers} of {clients} clients.")
    return NormalDist().inv_cdf((honest - supporters) / honest)


def flip_labels(labels: Any, attacker: Any, classes: int) -> Any:
    """Labels ``y`` as ``classes - 1 - y`` on attackers' rows: an attack on data, made before they are federated.

    Args:
        labels: ``[examples]`` integers from 0.
        attacker: ``[examples]``, not 0 on attackers' rows.
        classes: How many classes there are.

    >>> import numpy as np
    >>> print(flip_labels(np.array([0, 1, 9]), np.array([True, False, True]), 10))
    [9 1 0]
    """
    flipped = attacker != 0
    return flipped * (classes - 1 - labels) + ~flipped * labels
