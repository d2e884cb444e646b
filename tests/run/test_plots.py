import math

import numpy as np
import pytest

from jaxfed.run.client_curves import ClientCurves
from jaxfed.run.client_plots import curves_by_client, save_curves_by_client
from jaxfed.run.history import line_of
from jaxfed.run.plots import curves, read_runs, save_curves


def rows(rounds=6, every=2, offset=0.0):
    """A history whose accuracy rises and whose deciles lie around it."""
    made = []
    for i in range(1, rounds + 1):
        row = {"round": i, "loss": 1 / i + offset, "update_norm": 0.1}
        if every and i % every == 0:
            row |= {f"eval_{name}": i / 10 + offset for name in ("accuracy", "loss")}
            row |= {f"eval_{name}_deciles": (i / 10 + np.arange(9) / 100).tolist() for name in ("accuracy", "loss")}
        made.append(row)
    return made


@pytest.mark.parametrize("runs", [1, 2, 9])
def test_every_run_has_a_line_in_every_panel_and_a_band_where_evaluated(runs):
    figure = curves({f"run {i}": rows(offset=i / 50) for i in range(runs)})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Evaluation: accuracy", "Evaluation: loss", "Training loss", "Norm of the update"]
    assert [len(axes.lines) for axes in figure.axes] == [runs] * 4
    assert [len(axes.collections) for axes in figure.axes] == [runs, runs, 0, 0]
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(styles) == runs


def test_lines_and_bands_are_the_history():
    figure = curves({"one": rows()})
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[2, 0.2], [4, 0.4], [6, 0.6]])
    np.testing.assert_allclose(figure.axes[2].lines[0].get_ydata(), 1 / np.arange(1, 7))
    low, high = figure.axes[0].collections[0].get_datalim(figure.axes[0].transData).intervaly
    assert (low, high) == pytest.approx((0.2, 0.68))


def test_a_history_without_evaluations_has_two_panels():
    assert len(curves({"one": rows(every=0)}).axes) == 2


def test_missing_numbers_leave_gaps():
    history = rows()
    history[2]["loss"] = math.nan
    figure = curves({"one": history})
    assert np.isnan(figure.axes[2].lines[0].get_ydata()).tolist() == [False, False, True, False, False, False]


def test_a_run_without_rounds_has_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing to draw: one has done no round yet"):
        curves({"one": []})


def test_the_picture_is_a_png_and_equal_for_equal_histories(tmp_path):
    first, second = (save_curves({"one": rows()}, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first.startswith(b"\x89PNG\r\n")
    assert first == second


def test_runs_are_labelled_by_their_folders(tmp_path):
    for name in ("a/run", "b/run", "b/other"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "history.jsonl").write_text("".join(map(line_of, rows())))
    assert list(read_runs([tmp_path / "a/run", tmp_path / "b/other"])) == ["run", "other"]
    assert list(read_runs([tmp_path / "a/run", tmp_path / "b/run"])) == [str(tmp_path / "a/run"), str(tmp_path / "b/run")]


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no history\.jsonl"):
        read_runs([tmp_path])


def curves_of(clients, evaluations=5, without_rows=0):
    """Losses that fall from client to client and from evaluation to evaluation; the last clients have no rows."""
    values = np.arange(clients, 0, -1.0) / np.arange(1.0, evaluations + 1)[:, None]
    values[:, clients - without_rows :] = np.nan
    return ClientCurves(10 * np.arange(1, evaluations + 1), {"loss": values, "accuracy": 1 / (1 + values)})


def test_few_clients_have_a_line_each_and_many_a_spread():
    few, many = curves_of(4), curves_of(500, without_rows=20)
    figure = curves_by_client({"few": few, "many": many})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["few: accuracy", "many: accuracy", "few: loss", "many: loss"]
    assert [len(axes.lines) for axes in figure.axes] == [5, 3, 5, 3]
    assert [len(axes.collections) for axes in figure.axes] == [0, 2, 0, 2]
    best, worst, median = (line.get_ydata() for line in figure.axes[3].lines)
    values = many.metrics["loss"][:, :480]
    np.testing.assert_allclose(median, np.median(values, 1))
    # The losses fall with the number: the last tenth that has rows ends best, the first worst.
    np.testing.assert_allclose(best, values[:, -48:].mean(1))
    np.testing.assert_allclose(worst, values[:, :48].mean(1))
    wide, narrow = (band.get_datalim(figure.axes[3].transData).intervaly for band in figure.axes[3].collections)
    for band, percentiles in ((wide, (10, 90)), (narrow, (25, 75))):
        low, high = np.percentile(values, percentiles, axis=1)
        assert tuple(band) == pytest.approx((low.min(), high.max()))


def test_clients_that_all_lack_rows_leave_an_empty_panel(tmp_path):
    path = save_curves_by_client({"none": curves_of(20, without_rows=20)}, tmp_path / "none.png")
    assert path.read_bytes().startswith(b"\x89PNG")
