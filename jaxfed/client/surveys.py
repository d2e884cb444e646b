"""First passes over a round's cohort."""

from typing import Any

import jax

from jaxfed import checks
from jaxfed.base import Broadcast, ClientUpdate, Params
from jaxfed.client.batches import ClientRows
from jaxfed.client.local import LocalTraining
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
        """Refuses what is not plain local training: another client's weights are not the broadcast ones.

        Raises:
            TypeError: For another client.
        """
        checks.instance("survey: client", client, LocalTraining, "Its gradient is taken at the broadcast weights.")

    def run(self, client: ClientUpdate, start: Broadcast, rows: ClientRows, key: jax.Array) -> Params:
        """One client's gradient over all its rows."""
        training: LocalTraining = client  # type: ignore[assignment]
        return training.full_gradient(start.params, start.stats, training.batches.of(rows, key))
