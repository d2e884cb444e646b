"""First passes over a round's cohort."""

from typing import Any

import jax

from jaxfed.base import ClientUpdate
from jaxfed.client.batches import ClientRows
from jaxfed.client.local import LocalTraining
from jaxfed.messages import Broadcast, Params
from jaxfed.part import Part


class Survey(Part, kind="survey"):
    """A first pass over a round's cohort, whose mean by the aggregator's weights joins the broadcast (Mime, FedLin)."""

    def check_client(self, client: ClientUpdate) -> None:
        """Raises TypeError for a client that it cannot ask; called when an algorithm is composed."""
        del client

    def run(self, client: ClientUpdate, start: Broadcast, rows: ClientRows, key: jax.Array) -> Any:
        """What one client answers, a pytree."""
        raise NotImplementedError(f"{type(self).__name__} defines no run(client, start, rows, key).")


class FullGradient(Survey):
    r"""The cohort's mean gradient at the broadcast weights.

    .. math:: c = \frac{\sum_{i \in S} n_i \nabla f_i(w_t)}{\sum_{i \in S} n_i}

    with the aggregator's weights.
    """

    name = "full-gradient"

    def check_client(self, client: ClientUpdate) -> None:
        """Refuses clients whose global model is not trained by plain local training, from all of the broadcast weights.

        Raises:
            TypeError: For another client.
        """
        if not isinstance(client.of_global, LocalTraining):
            reason = "A gradient at the broadcast weights is that of a client which trains all of them, and nothing else"
            raise TypeError(f"survey: expected LocalTraining, got {type(client.of_global).__name__}. {reason}.")

    def run(self, client: ClientUpdate, start: Broadcast, rows: ClientRows, key: jax.Array) -> Params:
        """One client's gradient over all its rows."""
        training: LocalTraining = client.of_global  # type: ignore[assignment]
        return training.full_gradient(start.params, start.stats, training.batches.of(rows, key))
