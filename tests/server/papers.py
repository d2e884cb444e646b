"""Robust rules as their papers write them, one client after the other, in float64.

Updates ``x [n, d]`` and weights ``w [n]`` are those of the clients that count.
"""

import numpy as np

from jaxfed import Bulyan, CentredClipping, GeometricMedian, Krum, Median, NormBound, TrimmedMean


def norm(v):
    return np.sqrt((v**2).sum(-1))


def trimmed(x, w, ratio):
    cut = int(np.floor(ratio * len(x)))
    return np.sort(x, axis=0)[cut : len(x) - cut].mean(0)


def krum_order(x, f):
    """Clients by their scores; of equals first the one with less distance to all, then the first."""
    squares = [sorted(norm(x[i] - x[j]) ** 2 for j in range(len(x)) if j != i) for i in range(len(x))]
    near = max(len(x) - f - 2, 1)
    return sorted(range(len(x)), key=lambda i: (sum(squares[i][:near]), sum(squares[i]), i))


def krum(x, w, f, chosen=1):
    best = krum_order(x, f)[:chosen]
    return (w[best] @ x[best]) / w[best].sum()


def bulyan(x, w, f):
    rest, selected = list(range(len(x))), []
    while len(selected) < len(x) - 2 * f:
        selected.append(rest.pop(krum_order(x[rest], f)[0]))
    columns = [sorted(column, key=lambda v: abs(v - np.median(column))) for column in x[selected].T]
    return np.array([np.mean(column[: len(x) - 4 * f]) for column in columns])


def weiszfeld(x, w, smoothing, iterations):
    v = np.median(x, axis=0)
    for _ in range(iterations):
        beta = w / np.maximum(smoothing, norm(x - v))
        v = beta @ x / beta.sum()
    return v


def clipped_about(x, w, radius, iterations, v=0.0):
    for _ in range(iterations):
        v = v + sum(wi * (xi - v) * min(1, radius / norm(xi - v)) for wi, xi in zip(w, x)) / w.sum()
    return v


def norm_bounded(x, w, max_norm):
    return sum(wi * xi * min(1, max_norm / norm(xi)) for wi, xi in zip(w, x)) / w.sum()


RULES = {
    "median": (Median(), lambda x, w: np.median(x, axis=0)),
    "trimmed mean": (TrimmedMean(0.2), lambda x, w: trimmed(x, w, 0.2)),
    "krum": (Krum(2), lambda x, w: krum(x, w, 2)),
    "multi-krum": (Krum(1, 4), lambda x, w: krum(x, w, 1, 4)),
    "bulyan": (Bulyan(1), lambda x, w: bulyan(x, w, 1)),
    "geometric median": (GeometricMedian(0.5, 4), lambda x, w: weiszfeld(x, w, 0.5, 4)),
    "centred clipping": (CentredClipping(1.5, 3), lambda x, w: clipped_about(x, w, 1.5, 3)),
    "norm bound": (NormBound(1.5, by="examples"), lambda x, w: norm_bounded(x, w, 1.5)),
}
