"""Reports, evaluations and histories as plain numbers."""

import json

import numpy as np
import pytest

from jaxfed import Evaluation, History, RoundReport


def report(round=1, counted=(True, True, False), evaluation=None):
    metrics = {
        "examples": np.array([10.0, 30.0, 5.0], np.float32),
        "steps": np.array([2.0, 6.0, 1.0], np.float32),
        "loss": np.array([1.0, 3.0, np.nan], np.float32),
    }
    return RoundReport(round, np.array([4, 0, 7]), np.array(counted), metrics, 0.5, evaluation)


def test_the_loss_is_of_those_who_counted_by_examples():
    assert report().loss == 2.5
    assert report(counted=(True, False, False)).loss == 1.0
    assert np.isnan(report(counted=(False, False, False)).loss)


def test_a_row_is_plain_data():
    row = report().row()
    expected = {"round": 1, "loss": 2.5, "clients": 2, "excluded": [7], "examples": 40, "steps": 8, "update_norm": 0.5}
    assert row == json.loads(json.dumps(row)) == expected


def test_examples_are_counted_exactly():
    metrics = {"examples": np.full(999, 20_001.0, np.float32), "steps": np.ones(999), "loss": np.ones(999)}
    row = RoundReport(1, np.arange(999), np.ones(999, bool), metrics, 0.0).row()
    assert row["examples"] == 999 * 20_001


SUMS, EXAMPLES = {"loss": [2.0, 9.0, 0.0, 40.0], "accuracy": [2.0, 0.0, 0.0, 5.0]}, np.array([2, 3, 0, 10])


def test_an_evaluation_from_sums():
    found = Evaluation.from_sums(SUMS, EXAMPLES)
    assert found.metrics == {"loss": 51 / 15, "accuracy": 7 / 15}
    np.testing.assert_allclose(found.by_client["loss"], [1, 3, np.nan, 4])
    np.testing.assert_allclose(found.by_client["accuracy"], [1, 0, np.nan, 0.5])


def test_clients_in_a_row_of_an_evaluation():
    row = Evaluation.from_sums(SUMS, EXAMPLES).row()
    assert row["loss_client_mean"] == pytest.approx(8 / 3)
    assert row["loss_worst_decile"] == np.percentile([1, 3, 4], 90)
    assert row["accuracy_worst_decile"] == np.percentile([1, 0, 0.5], 10)
    assert json.loads(json.dumps(row)) == row


def test_a_client_whose_loss_is_nan_is_not_hidden():
    row = Evaluation.from_sums({"loss": [2.0, np.nan, 0.0]}, np.array([2, 3, 0])).row()
    assert np.isnan(row["loss"])
    assert np.isnan(row["loss_worst_decile"])
    assert np.isnan(row["loss_client_mean"])


def test_a_table_has_a_row_for_every_client():
    table = Evaluation.from_sums(SUMS, EXAMPLES).table()
    assert table[1] == {"client": 1, "examples": 3, "loss": 3.0, "accuracy": 0.0}
    assert [row["examples"] for row in table] == [2, 3, 0, 10]
    assert np.isnan(table[2]["loss"])
    assert all(type(value) in (int, float) for row in table for value in row.values())


def history():
    evaluated = Evaluation.from_sums(SUMS, EXAMPLES)
    return History([report(1), report(2, evaluation=evaluated), report(3)])


def test_a_history_is_a_sequence_of_reports_with_columns():
    found = history()
    assert len(found) == 3
    assert [r.round for r in found] == [1, 2, 3]
    assert found[-1].round == 3
    assert [r.round for r in found[1:]] == [2, 3]
    np.testing.assert_array_equal(found["loss"], [2.5] * 3)
    np.testing.assert_array_equal(found["eval_loss"], [np.nan, 51 / 15, np.nan])
    assert repr(found) == "History(3 rounds, last loss 2.5)"
    assert repr(History()) == "History(0 rounds)"


def test_a_history_grows():
    found = history()
    found.extend([report(4)])
    assert found["round"].tolist() == [1, 2, 3, 4]
    assert found.rows()[3] == report(4).row()


@pytest.mark.parametrize("column", ["los", "excluded"])
def test_unknown_columns_are_refused(column):
    with pytest.raises(ValueError, match=f"No column is called '{column}'"):
        history()[column]


def test_clients_that_diverged_make_no_warning():
    """NumPy would say at every report that it cannot tell infinities apart."""
    row = Evaluation.from_sums({"loss": [1.0, np.inf, np.inf]}, np.array([1, 1, 1])).row()
    assert (row["loss"], row["loss_client_mean"]) == (np.inf, np.inf)
