"""Survival analysis: a loss and a measure for times of which some are censored.

A row's ``"time"`` is that of its event where ``"event"`` is 1, and the last at which it was seen without one where that is 0. A
model predicts a risk: the higher, the sooner the event.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed.messages import Batch


def cox(risks: jax.Array, batch: Batch) -> jax.Array:
    r"""Each event's share of Cox's negative log partial likelihood, by Breslow's rule for ties.

    .. math:: e_i \Big(\log \sum_{j: t_j \ge t_i} e^{r_j} - r_i\Big)

    A row is weighed against those of its batch that are still at risk, so its value depends on the batch: the rows of an
    evaluation come in another division than those of a local step. Censored rows have value 0 and count in a mean. Padded rows
    are nobody's rivals.

    Args:
        risks: ``[B]`` or ``[B, 1]``.
        batch: Holds ``"time"`` ``[B]`` and ``"event"`` ``[B]``, 1 or 0; ``"mask"`` ``[B]`` if some rows are padded.

    Returns:
        Values ``[B]``.

    Raises:
        ValueError: If risks and times differ in shape.

    Example:
        >>> print(cox(jnp.zeros(3), {"time": jnp.array([1.0, 2.0, 3.0]), "event": jnp.array([1, 0, 1])}))
        [1.0986123 0.        0.       ]

    References:
        Cox, `Regression Models and Life-Tables <https://doi.org/10.1111/j.2517-6161.1972.tb00899.x>`_, 1972
    """
    if risks.ndim == 2 and risks.shape[1] == 1:
        risks = risks[:, 0]
    time, event = batch["time"], batch["event"].astype(risks.dtype)
    if risks.shape != time.shape:
        raise ValueError(f"cox: expected risks [B] or [B, 1] for times [B], got {risks.shape} for {time.shape}.")
    rivals = time[None, :] >= time[:, None]
    if "mask" in batch:
        # A padded row is a copy of a real one; it keeps itself, so that its value, which is left out later, is finite.
        rivals &= batch["mask"][None, :] | jnp.eye(len(time), dtype=bool)
    return event * (jax.nn.logsumexp(jnp.where(rivals, risks[None, :], -jnp.inf), axis=1) - risks)


def concordance_index(risks: ArrayLike, time: ArrayLike, event: ArrayLike) -> jax.Array:
    """Harrell's C: the share of comparable pairs in which the higher risk has the earlier event.

    A pair is comparable if one row has its event before the other's time, or at the same time as the other is censored. Equal
    risks count half. 0.5 is chance. NaN without comparable pairs.

    Args:
        risks: ``[n]``.
        time: ``[n]``.
        event: ``[n]``, 1 or 0.

    Example:
        >>> print(concordance_index([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1, 1, 0]))
        1.0

    References:
        Harrell et al., `Evaluating the Yield of Medical Tests <https://doi.org/10.1001/jama.1982.03320430047030>`_, 1982
    """
    risks, time, event = jnp.asarray(risks), jnp.asarray(time), jnp.asarray(event, bool)
    later = (time[:, None] < time[None, :]) | ((time[:, None] == time[None, :]) & ~event[None, :])
    comparable = event[:, None] & later
    score = (risks[:, None] > risks[None, :]) + 0.5 * (risks[:, None] == risks[None, :])
    return jnp.where(comparable, score, 0).sum() / comparable.sum()
