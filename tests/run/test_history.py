import json
import math

import numpy as np
import pytest

from jaxfed.reports import Evaluation, RoundReport
from jaxfed.run.history import HistoryFile, check_mark, column, line_of, read_history, row_of


def report(round=1, loss=0.5, accuracies=None):
    evaluation = None
    if accuracies is not None:
        examples = np.where(np.isnan(accuracies), 0, 2)
        sums = np.nan_to_num(np.array(accuracies)) * examples
        evaluation = Evaluation.from_sums({"accuracy": sums}, examples)
    metrics = {"examples": np.array([2.0, 3.0]), "steps": np.array([1.0, 2.0]), "loss": np.array([loss, loss])}
    return RoundReport(round, np.array([0, 4]), np.array([True, True]), metrics, math.inf, evaluation)


def test_a_row_holds_the_report_and_no_nan():
    row = row_of(report(loss=math.nan))
    assert (row["round"], row["loss"], row["update_norm"], row["examples"]) == (1, None, None, 5)
    assert json.loads(line_of(row)) == row


def test_deciles_are_those_of_the_clients_with_rows():
    values = [math.nan, *np.linspace(0, 1, 21)]
    row = row_of(report(accuracies=values))
    np.testing.assert_allclose(row["eval_accuracy_deciles"], np.arange(1, 10) / 10)
    assert row["eval_accuracy_worst_decile"] == pytest.approx(0.1)


def test_deciles_without_any_rows_are_null():
    evaluation = Evaluation({"loss": math.nan}, {"loss": np.full(3, np.nan)}, np.zeros(3))
    one = report()
    one.evaluation = evaluation
    assert row_of(one)["eval_loss_deciles"] == [None] * 9


def test_floats_come_back_with_all_their_digits(tmp_path):
    values = [0.1 + 0.2, 1e-300, float(np.float32(1 / 3)), 5e300]
    (tmp_path / "h").write_text("".join(line_of({"round": i, "loss": x}) for i, x in enumerate(values, 1)))
    assert [row["loss"] for row in read_history(tmp_path / "h")] == values


def test_a_history_grows_is_marked_and_cut(tmp_path):
    path = tmp_path / "h"
    path.write_bytes(b"")
    history = HistoryFile(path)
    history.append([{"round": 1}])
    mark = history.mark
    history.append([{"round": 2}, {"round": 3}])
    assert HistoryFile(path).mark == history.mark != mark
    check_mark(path, mark)
    cut = HistoryFile.cut(path, mark["size"])
    assert (path.read_text(), cut.mark) == ('{"round": 1}\n', mark)
    cut.append([{"round": 2}])
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n'


def test_a_missing_history_is_made_anew(tmp_path):
    assert HistoryFile.cut(tmp_path / "h", 0).size == 0
    assert (tmp_path / "h").read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "text"), [(b"", "was cut short: expected 13 bytes or more, got 0"), (b"x" * 13, "was altered")]
)
def test_a_history_that_does_not_fit_its_mark_is_refused(tmp_path, content, text):
    (tmp_path / "h").write_bytes(b'{"round": 1}\n')
    mark = HistoryFile(tmp_path / "h").mark
    (tmp_path / "h").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        check_mark(tmp_path / "h", mark)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"not json\n", "h, line 1 is no row of a history: "),
        (b'{"round": 1}\n[2]\n', r"h, line 2 was altered: expected the row of round 2, got '\[2\]'"),
        (b'{"round": 2}\n', "expected the row of round 1"),
        (b'{"round": 1, "loss": "low"}\n', "h, line 1, loss: expected a number, null or a list of them, got 'low'"),
        (b'{"round": 1, "loss": [true]}\n', "got True"),
        (b"[" * 100_000 + b"\n", "is no row of a history"),
        (b'{"round": 1, "loss": "\xff"}\n', "was altered: 'utf-8' codec"),
        (b"\n", "is no row"),
    ],
)
def test_a_history_that_is_none_is_refused_by_its_line(tmp_path, content, text):
    (tmp_path / "h").write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_history(tmp_path / "h")


def test_a_folder_without_history_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no history\.jsonl, the history of a run"):
        read_history(tmp_path / "history.jsonl")


def test_a_column_has_the_rounds_that_have_it():
    rows = [{"round": 1}, {"round": 2, "a": 0.5}, {"round": 3, "a": 0.25}]
    rounds, values = column(rows, "a")
    assert (rounds.tolist(), values.tolist()) == ([2, 3], [0.5, 0.25])
    assert column(rows, "b")[0].size == 0
