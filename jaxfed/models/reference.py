"""The models of the papers, by name: Linen modules, and functions that make a ``Model`` of each.

All take the inputs at ``"x"`` and class labels (integers) at ``"y"``, one for each row, or for each character of a text. Images
are ``[B, 28, 28]`` or ``[B, 28, 28, 1]``; **unsigned bytes are divided by 255 inside the model**, so that a data set may stay
four times smaller on the device. Kernels begin Glorot-uniform and biases at zero, as in the Keras models of the papers.
Convolutions and pooling are those of :mod:`jaxfed.models.layers`, recurrent layers those of
:mod:`jaxfed.models.rnn`.

Example:
    >>> sample = {"x": jnp.zeros((1, 28, 28), jnp.uint8), "y": jnp.zeros(1, int)}
    >>> model = build_model("emnist-cnn", sample)
    >>> params, stats = model.init(jax.random.key(0))
    >>> sum(leaf.size for leaf in jax.tree.leaves(params))
    1206590
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxfed import checks
from jaxfed.base import Model
from jaxfed.models import layers, rnn
from jaxfed.models.adapters import from_linen
from jaxfed.models.functions import row_shapes

_Dense = partial(nn.Dense, kernel_init=nn.initializers.glorot_uniform())


class _ConvReLUPool(nn.Module):
    """A convolution, ReLU and max pooling with the weights of ``nn.Conv``."""

    channels: int
    window: tuple[int, int]
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        """``[B, height / 2, width / 2, channels]``."""
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), (*self.window, x.shape[-1], self.channels))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.channels,))
        return layers.conv_relu_max_pool(x, kernel, bias, (2, 2), padding=self.padding, mask=mask)


def _conv(channels: int, window: tuple[int, int], mask: jax.Array | None, **options: Any) -> nn.Conv:
    convolution = partial(layers.conv_general_dilated, mask=mask)
    return nn.Conv(channels, window, kernel_init=nn.initializers.glorot_uniform(), conv_general_dilated=convolution, **options)


class LogisticRegression(nn.Module):
    """``logits = x @ kernel + bias`` from zero weights; inputs of any shape are flattened."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[B, classes]``."""
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros_init())(_flat(_scaled(x)))


class MLP(nn.Module):
    """Dense layers with ReLU between them; inputs of any shape are flattened."""

    hidden: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[B, classes]``."""
        x = _flat(_scaled(x))
        for width in self.hidden:
            x = nn.relu(_Dense(width)(x))
        return _Dense(self.classes)(x)


class EmnistCNN(nn.Module):
    """Two 3x3 convolutions (32 and 64 channels), 2x2 max pooling and 128 dense units, with dropout before and after those."""

    classes: int = 62
    dropout: tuple[float, float] = (0.25, 0.5)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, classes]``."""
        x = _image(x)
        x = nn.relu(_conv(32, (3, 3), mask, padding="VALID")(x))
        x = _flat(_ConvReLUPool(64, (3, 3), "VALID", name="Conv_1")(x, mask))
        x = nn.Dropout(self.dropout[0], deterministic=not train)(x)
        x = nn.relu(_Dense(128)(x))
        x = nn.Dropout(self.dropout[1], deterministic=not train)(x)
        return _Dense(self.classes)(x)


class MnistCNN(nn.Module):
    """Two 5x5 convolutions (32 and 64 channels), each with 2x2 max pooling, and 512 dense units."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, classes]``."""
        x = _image(x)
        for number, channels in enumerate((32, 64)):
            x = _ConvReLUPool(channels, (5, 5), name=f"Conv_{number}")(x, mask)
        return _Dense(self.classes)(nn.relu(_Dense(512)(_flat(x))))


class LeNet(nn.Module):
    """Two 5x5 convolutions (6 and 16 channels), each with 2x2 max pooling, and 120 and 84 dense units."""

    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, classes]``."""
        x = _image(x)
        for number, channels in enumerate((6, 16)):
            x = _ConvReLUPool(channels, (5, 5), "VALID", name=f"Conv_{number}")(x, mask)
        x = _flat(x)
        for width in (120, 84):
            x = nn.relu(_Dense(width)(x))
        return _Dense(self.classes)(x)


class ConvNet2(nn.Module):
    """Two 5x5 convolutions (32 and 64 channels), each with batch norm and 2x2 max pooling, and dense units."""

    classes: int = 62
    hidden: int = 2048

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False, mask: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, classes]``."""
        x = _image(x)
        for channels in (32, 64):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(_conv(channels, (5, 5), mask)(x))
            # The largest first: ReLU keeps the order, and then has a quarter of the work.
            x = nn.relu(layers.max_pool(x, (2, 2), (2, 2)))
        x = nn.relu(_Dense(self.hidden)(_flat(x)))
        return _Dense(self.classes)(x)


class CharLSTM(nn.Module):
    """Characters embedded in 8 dimensions, two LSTM layers of 256 units, and a dense layer at every position."""

    classes: int = 90
    embedding: int = 8
    hidden: tuple[int, ...] = (256, 256)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits ``[B, T, classes]``."""
        x = nn.Embed(self.classes, self.embedding)(x)
        for width in self.hidden:
            x = rnn.RNN(nn.OptimizedLSTMCell(width, kernel_init=nn.initializers.glorot_uniform()))(x)
        return _Dense(self.classes)(x)


def logistic_regression(sample: Mapping[str, Any], *, classes: int | None = None) -> Model:
    """Multinomial logistic regression from zero weights.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, ...]`` and ``"y"``.
        classes: How many; by default one more than the sample's largest label, so give it all training rows then.

    Raises:
        ValueError: If the labels are not integers from 0 to classes - 1.

    Example:
        >>> model = logistic_regression({"x": np.ones((3, 5)), "y": np.array([0, 2, 1])})
        >>> params, _ = model.init(jax.random.key(0))
        >>> params["Dense_0"]["kernel"].shape
        (5, 3)
    """
    return from_linen(LogisticRegression(_num_classes(sample, classes)), sample)


def mlp(sample: Mapping[str, Any], *, hidden: Sequence[int] = (200, 200), classes: int | None = None) -> Model:
    """A multilayer perceptron; by default the "2NN" of McMahan et al.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, ...]`` and ``"y"``.
        hidden: The widths of the hidden layers.
        classes: How many; by default one more than the sample's largest label, so give it all training rows then.

    Raises:
        ValueError: If the labels are not integers from 0 to classes - 1, or a width is below 1.

    Example:
        >>> model = mlp({"x": np.ones((3, 5)), "y": np.array([0, 2, 1])}, hidden=(8,))
        >>> params, _ = model.init(jax.random.key(0))
        >>> params["Dense_0"]["kernel"].shape
        (5, 8)

    References:
        McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
        <https://arxiv.org/abs/1602.05629>`_, 2017
    """
    widths = tuple(_width("mlp: hidden", width) for width in hidden)
    return from_linen(MLP(widths, _num_classes(sample, classes)), sample)


def emnist_cnn(sample: Mapping[str, Any], *, classes: int = 62, dropout: Sequence[float] = (0.25, 0.5)) -> Model:
    """The EMNIST CNN of Reddi et al.: 1,206,590 weights for 62 classes.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, 28, 28]`` and ``"y"``.
        classes: 62 for digits and letters, 10 for digits.
        dropout: Rates after pooling and after the dense layer; ``(0, 0)`` trains without.

    Raises:
        ValueError: If the labels are not integers from 0 to classes - 1, the inputs no images, or a rate is not in [0, 1).

    Example:
        >>> model = emnist_cnn({"x": np.ones((1, 28, 28)), "y": np.array([0])}, classes=10, dropout=(0, 0))
        >>> params, stats = model.init(jax.random.key(0))
        >>> model.predict(params, stats, {"x": jnp.ones((5, 28, 28))}).shape
        (5, 10)

    References:
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, 2021, table 4
    """
    _check_images(sample)
    rates = tuple(checks.number("emnist_cnn: dropout", rate, checks.Bounds(at_least=0, below=1)) for rate in dropout)
    if len(rates) != 2:
        raise ValueError(f"emnist_cnn: expected two dropout rates, got {len(rates)}.")
    return from_linen(EmnistCNN(_num_classes(sample, classes), rates), sample)


def mnist_cnn(sample: Mapping[str, Any], *, classes: int = 10) -> Model:
    """The MNIST CNN of McMahan et al.: 1,663,370 weights for 10 classes.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, 28, 28]`` and ``"y"``.
        classes: How many.

    Raises:
        ValueError: If the labels are not integers from 0 to classes - 1, or the inputs no images.

    Example:
        >>> model = mnist_cnn({"x": np.ones((1, 28, 28, 1)), "y": np.array([0])})
        >>> params, stats = model.init(jax.random.key(0))
        >>> model.predict(params, stats, {"x": jnp.ones((5, 28, 28, 1))}).shape
        (5, 10)

    References:
        McMahan et al., `Communication-Efficient Learning of Deep Networks from Decentralized Data
        <https://arxiv.org/abs/1602.05629>`_, 2017
    """
    _check_images(sample)
    return from_linen(MnistCNN(_num_classes(sample, classes)), sample)


def lenet(sample: Mapping[str, Any], *, classes: int = 10) -> Model:
    """The LeNet of NIID-Bench: 44,426 weights for 28x28 pixels and 10 classes.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, height, width]`` (and channels) and ``"y"``.
        classes: How many.

    Raises:
        ValueError: If the labels are not integers from 0 to classes - 1, or the inputs no images.

    References:
        Li et al., `Federated Learning on Non-IID Data Silos <https://arxiv.org/abs/2102.02079>`_, 2022
    """
    _check_images(sample)
    return from_linen(LeNet(_num_classes(sample, classes)), sample)


def convnet2(sample: Mapping[str, Any], *, classes: int = 62, hidden: int = 2048) -> Model:
    """The ConvNet2 of FederatedScope, with batch norms: 6,603,902 weights for 62 classes.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, 28, 28]`` and ``"y"``.
        classes: How many.
        hidden: Dense units.

    Raises:
        ValueError: If the labels are not integers from 0 to classes - 1, or the inputs no images.

    References:
        Xie et al., `FederatedScope <https://arxiv.org/abs/2204.05011>`_, 2022
    """
    _check_images(sample)
    return from_linen(ConvNet2(_num_classes(sample, classes), _width("convnet2: hidden", hidden)), sample)


def char_lstm(sample: Mapping[str, Any], *, classes: int = 90, embedding: int = 8, hidden: Sequence[int] = (256, 256)) -> Model:
    """The character LSTM of Reddi et al. for Shakespeare: 820,522 weights for 90 characters.

    Args:
        sample: Rows of the data at ``"x"`` ``[1 or more, T]``, characters as integers from 0 to classes - 1, and at ``"y"``
            ``[1 or more, T]``, for each position the character that follows.
        classes: How many characters.
        embedding: Dimensions of a character.
        hidden: The widths of the LSTM layers.

    Raises:
        ValueError: If characters or labels are not integers from 0 to classes - 1, or not shaped alike, or a width is below 1.

    Example:
        >>> text = np.array([[1, 2, 3, 1]])
        >>> model = char_lstm({"x": text[:, :-1], "y": text[:, 1:]}, classes=4, hidden=(16,))
        >>> params, stats = model.init(jax.random.key(0))
        >>> model.predict(params, stats, {"x": jnp.zeros((5, 3), int)}).shape
        (5, 3, 4)

    References:
        Reddi et al., `Adaptive Federated Optimization <https://arxiv.org/abs/2003.00295>`_, 2021, table 6
    """
    widths = tuple(_width("char_lstm: hidden", width) for width in hidden)
    shapes = row_shapes(sample, "x", "y")
    if len(shapes["x"].shape) != 1 or shapes["x"].shape != shapes["y"].shape:
        got = f"got rows of {shapes['x'].shape} and {shapes['y'].shape}"
        raise ValueError(f'char_lstm: expected texts at "x" and the characters that follow at "y", both [B, T], {got}.')
    count = _num_classes(sample, classes)
    _num_classes({"x": sample["x"], "y": sample["x"]}, count)  # characters are held to what labels are held to
    return from_linen(CharLSTM(count, _width("char_lstm: embedding", embedding), widths), sample)


MODELS: dict[str, Callable[..., Model]] = {
    "logistic-regression": logistic_regression,
    "mlp": mlp,
    "emnist-cnn": emnist_cnn,
    "mnist-cnn": mnist_cnn,
    "lenet": lenet,
    "convnet2": convnet2,
    "char-lstm": char_lstm,
}
"""The functions ``(sample, **options) -> Model`` by name."""


def build_model(name: str, sample: Mapping[str, Any], **options: Any) -> Model:
    """A reference model by its name, as a config names it.

    Args:
        name: One of :data:`MODELS`.
        sample: Rows of the data at ``"x"`` and ``"y"``; where the number of classes is not given, all of them.
        options: What the model's function takes.

    Raises:
        ValueError: If the name or an option is unknown.

    Example:
        >>> build_model("mlp", {"x": np.ones((2, 3)), "y": np.array([0, 1])}, width=10)
        Traceback (most recent call last):
        ...
        ValueError: mlp has no option 'width'. It accepts: hidden, classes.
    """
    checks.known_name("model", name, MODELS)
    accepted = inspect.signature(MODELS[name]).parameters
    checks.known_options(name, options, [option for option in accepted if option != "sample"])
    return MODELS[name](sample, **options)


def _scaled(x: jax.Array) -> jax.Array:
    return x / jnp.float32(255) if x.dtype == jnp.uint8 else x


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _image(x: jax.Array) -> jax.Array:
    x = _scaled(x)
    return x[..., None] if x.ndim == 3 else x


def _check_images(sample: Mapping[str, Any]) -> None:
    shape = row_shapes(sample, "x")["x"].shape
    if len(shape) not in (2, 3):
        raise ValueError(f'Expected images at "x", [B, height, width] or [B, height, width, channels], got rows of {shape}.')


def _width(where: str, value: Any) -> int:
    return int(checks.count(where, value, checks.Bounds(at_least=1)))


def _num_classes(sample: Mapping[str, Any], classes: int | None) -> int:
    row_shapes(sample, "x", "y")
    labels = np.asarray(sample["y"])
    if not np.issubdtype(labels.dtype, np.integer):
        remedy = "Cast class labels to int; for other targets use from_linen with a loss of your own."
        raise ValueError(f"Expected integer class labels at 'y', got {labels.dtype}. {remedy}")
    most = classes if classes is None else _width("classes", classes)
    if labels.min() < 0 or (most is not None and labels.max() >= most):
        top = "up" if most is None else f"to {most - 1}"
        raise ValueError(
            f"Expected class labels from 0 {top}, got {labels.min()} to {labels.max()}. Renumber them or set classes."
        )
    return most or int(labels.max()) + 1
