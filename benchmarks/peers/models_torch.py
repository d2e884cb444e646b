"""The three models in PyTorch for the peers that are PyTorch, with the start weights of ``workloads``."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class LogisticRegression(nn.Module):
    """W1."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(60, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(x)


class CNN(nn.Module):
    """W2; images ``[B, 1, 28, 28]``."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.d1, self.d2 = nn.Linear(9216, 128), nn.Linear(128, 62)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.c2(F.relu(self.c1(x)))), 2)
        return self.d2(F.relu(self.d1(x.flatten(1))))


class Letters(nn.Module):
    """W3."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(90, 8)
        self.lstm = nn.LSTM(8, 256, 2, batch_first=True)
        self.d = nn.Linear(256, 90)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.lstm(self.emb(x))[0])


def make(workload: str, params: dict[str, np.ndarray] | None = None) -> nn.Module:
    """The network, with start weights where they are given."""
    net = {"W1": LogisticRegression, "W2": CNN, "W3": Letters}[workload]()
    if params is not None:
        arrays = _layouts(workload, params)
        net.load_state_dict({key: torch.tensor(np.ascontiguousarray(x)) for key, x in arrays.items()})
    return net


def tensors(workload: str, x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as the network wants them."""
    if workload == "W2":
        x = x.transpose(0, 3, 1, 2)
    inputs = torch.from_numpy(np.ascontiguousarray(x))
    return inputs.long() if workload == "W3" else inputs, torch.from_numpy(np.ascontiguousarray(y)).long()


def example_losses(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Values ``[B]``; for sequences the mean over letters."""
    if logits.ndim == 3:
        return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)
    return F.cross_entropy(logits, y, reduction="none")


def batch_loss(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Their mean."""
    return F.cross_entropy(logits.flatten(0, -2), y.flatten())


@torch.no_grad()
def mean_loss(workload: str, net: nn.Module, x: np.ndarray, y: np.ndarray, rows: int = 250) -> float:
    """The mean loss over all rows."""
    net.eval()
    inputs, labels = tensors(workload, x, y)
    parts = range(0, len(x), rows)
    return sum(float(example_losses(net(inputs[i : i + rows]), labels[i : i + rows]).sum()) for i in parts) / len(x)


def _layouts(workload: str, p: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """PyTorch's names and layouts; JAX's images are channels last."""
    if workload == "W1":
        return {"d.weight": p["w"].T, "d.bias": p["b"]}
    if workload == "W2":
        dense = p["d1"].reshape(12, 12, 64, 128).transpose(3, 2, 0, 1).reshape(128, 9216)
        kernels = {f"{key}.weight": p[key].transpose(3, 2, 0, 1) for key in ("c1", "c2")}
        biases = {f"{key}.bias": p[f"{key}b"] for key in ("c1", "c2", "d1", "d2")}
        return {**kernels, **biases, "d1.weight": dense, "d2.weight": p["d2"].T}
    names = {"wi": "weight_ih", "wh": "weight_hh", "bi": "bias_ih", "bh": "bias_hh"}
    layers = {f"lstm.{name}_l{i}": p[f"l{i}{key}"] for i in (0, 1) for key, name in names.items()}
    return {"emb.weight": p["emb"], "d.weight": p["d"].T, "d.bias": p["db"], **layers}
