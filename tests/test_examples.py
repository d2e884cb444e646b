"""Every example runs, and does what its first line says."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """An example as a module; what it writes goes to a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


# Examples may broadcast as NumPy does.
@pytest.fixture(autouse=True)
def strict():
    """Replaces the tests' strictness."""


def test_quickstart(load, tmp_path):
    assert load("quickstart").main(rounds=50) > 0.9
    assert (tmp_path / "quickstart.png").stat().st_size > 5_000


def test_own_module(load):
    assert load("own_module").main().modules[0].beta_1 == 0.95


def test_with_optax(load):
    for weights in load("with_optax").main().values():
        np.testing.assert_allclose(weights, 1, atol=0.02)


def test_client_drift(load):
    """The fixed points in closed form: FedAvg's is sum m b / sum m with m = 1 - (1 - lr a)^10."""
    found = load("client_drift").main()
    m = 1 - (1 - 0.05 * np.array([1.0, 10.0])) ** 10
    assert found["fedavg"] == pytest.approx(m[1] / m.sum(), abs=1e-5)
    assert found["scaffold"] == pytest.approx(10 / 11, abs=1e-5)


def test_selection(load):
    """Not to wait for the last takes less time, and to ask whoever is worth it less again."""
    hours = load("selection").main(rounds=60)
    assert hours["Oort"] < 0.8 * hours["chance, the first to finish"] < 0.8 * hours["chance, waits for all"] < np.inf


def test_private(load):
    """A small budget costs accuracy."""
    accuracy = load("private").main((0.5, np.inf))
    assert 0.5 < accuracy[0.5] < accuracy[np.inf] - 0.05


def test_robust(load, capsys):
    table = load("robust").main(("mean", "median"), ("sign flip",), rounds=20)
    assert table[0] < 0.3 < 0.7 < table[1]
    assert capsys.readouterr().out.split()[-2:] == ["median", f"{table[1, 0]:.3f}"]


def slow_fedcm(rounds, alpha=0.1, rate=0.05, steps=10):
    """Xu et al., 2021: y <- y - rate (alpha g + (1 - alpha) d), then d is the mean of (w - y) / (rate * steps)."""
    w, direction, curvature, centre = 0.0, 0.0, np.array([1.0, 10.0]), np.array([0.0, 1.0])
    for _ in range(rounds):
        y = np.full(2, w)
        for _ in range(steps):
            y = y - rate * (alpha * curvature * (y - centre) + (1 - alpha) * direction)
        direction, w = (w - y).mean() / (rate * steps), y.mean()
    return w


def test_four_steps(load):
    """The paper's loop, and the fixed point that it shares with FedAvg at a tenth of the rate."""
    example, m = load("four_steps"), 1 - (1 - 0.005 * np.array([1.0, 10.0])) ** 10
    assert example.main(rounds=3)["fedcm"] == pytest.approx(slow_fedcm(3), abs=1e-5)
    found = example.main()
    assert found["fedcm"] == pytest.approx(m[1] / m.sum(), abs=1e-5)
    assert abs(found["fedcm"] - 10 / 11) < abs(found["fedavg"] - 10 / 11) / 3


def test_personal(load):
    for common, own in load("personal").main().values():
        assert own > common > 0.7


def test_fair(load):
    """The minima in closed form: of 9 w^p + (1 - w)^p with p = 2 (q + 1), and where both groups' losses are the same."""
    found = load("fair").main()
    expected = {f"q-FedAvg, q = {q}": 1 / (1 + 9 ** (1 / (2 * q + 1))) for q in (1, 5)}
    for name, w in (expected | {"FedAvg": 0.1, "AFL": 0.5}).items():
        assert found[name] == pytest.approx((w, 0.45 * w**2 + 0.05 * (1 - w) ** 2, max(w, 1 - w) ** 2 / 2), abs=1e-4)


def test_stragglers(load):
    """Partial work is worth more than none, whatever becomes of it."""
    dropped, *partial = load("stragglers").main(rounds=20).values()
    assert min(partial) > dropped + 0.15


def test_early_stopping(load):
    """It stops ten evaluations after the best validation loss of all, whose model does better on test rows than the last."""
    best, history, losses = load("early_stopping").main()
    rounds, curves = history.by_client("loss")
    assert curves.shape == (len(rounds), 30)
    evaluated = history["eval_loss"][history["round"] % 5 == 0]
    assert (best.round, best.value) == (rounds[evaluated.argmin()], evaluated.min())
    assert len(rounds) - 1 - evaluated.argmin() == 10
    assert losses["best"] < losses["last"]


def test_learn_server_rate(load):
    """The learned rate does as well as the best of a fine grid, and FedAvg's own far worse."""
    found = load("learn_server_rate").main()
    assert found["learned"][0] == pytest.approx(found["grid"][0], rel=0.1)
    assert found["learned"][1] < found["grid"][1] * 1.001
    assert found["learned"][1] < found["fedavg"][1] / 2


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    assert all(f'"{path.stem}"' in here for path in EXAMPLES.glob("*.py"))
