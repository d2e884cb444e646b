"""What personal algorithms share: a ClientUpdate around another, refusals, and what a client does that has never trained."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxfed import part
from jaxfed.base import ClientUpdate, Model
from jaxfed.client.batches import ClientRows
from jaxfed.client.local import LocalTraining
from jaxfed.messages import Batch, Broadcast, Params, Upload
from jaxfed.optimizer.optimizer import Optimizer, as_optimizer


class Wrapper(ClientUpdate, register=False):
    """A ClientUpdate that does what the wrapped ``client`` does, apart from what a subclass changes."""

    client: ClientUpdate = part.part("client")

    @property
    def model(self) -> Model:
        """The model that is trained."""
        return training_of(self.client).model

    @property
    def optimizers(self) -> tuple[Optimizer, ...]:
        """Those of the wrapped client: what trains beside it exchanges nothing with the server."""
        return self.client.optimizers

    @property
    def measured(self) -> tuple[str, ...]:
        """What the wrapped client measures."""
        return self.client.measured

    @property
    def needs_survey(self) -> bool:
        """Whether the wrapped client does."""
        return self.client.needs_survey

    def num_steps(self, sizes: ArrayLike, work: ArrayLike, capacity: int) -> jax.Array:
        """The wrapped client's steps."""
        return self.client.num_steps(sizes, work, capacity)

    def shared(self, params: Params) -> Params:
        """What the wrapped client shares."""
        return self.client.shared(params)

    def init_kept(self, start: Broadcast, key: jax.Array) -> Any:
        """What the wrapped client keeps."""
        return self.client.init_kept(start, key)

    def run(self, start: Broadcast, kept: Any, rows: ClientRows, key: jax.Array) -> tuple[Upload, Any]:
        """The wrapped client's round."""
        return self.client.run(start, kept, rows, key)

    def metrics(self, personal: Any, batch: Batch) -> dict[str, jax.Array]:
        """The wrapped client's metrics."""
        return self.client.metrics(personal, batch)


def training_of(client: ClientUpdate) -> LocalTraining:
    """The local training inside of all wrappers.

    Raises:
        TypeError: If there is none.
    """
    while isinstance(client, Wrapper):
        client = client.client
    refuse_unless("client", client, (LocalTraining,), "That is what can be wrapped.")
    return client  # type: ignore[return-value]


def refuse_unless(where: str, client: Any, allowed: tuple[type, ...], reason: str) -> None:
    """Raises TypeError with the reason unless ``client`` is of an allowed type."""
    if not isinstance(client, allowed):
        names = " or ".join(cls.__name__ for cls in allowed)
        raise TypeError(f"{where}: expected {names}, got {type(client).__name__}. {reason}")


def refuse_pairs(where: str, optimizer: Optimizer, reason: str) -> None:
    """Raises ValueError with the reason if an Optimizer exchanges an auxiliary variable with the server."""
    for module in optimizer.parts:
        if module.aux_name:
            raise ValueError(f"{where}: {module.name!r} exchanges the auxiliary variable {module.aux_name!r}. {reason}")


def optional_optimizer() -> Any:
    """A field that holds an Optimizer, given as one or as a learning rate; or None."""
    return part.field(lambda where, value: None if value is None else as_optimizer(where, value), default=None)


def idle_if(trained: jax.Array, rows: ClientRows) -> ClientRows:
    """The rows, with no work to do for a client that has trained before."""
    return dataclasses.replace(rows, work=jnp.where(trained, 0.0, rows.work))
