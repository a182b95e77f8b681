"""A dataset's tables, brought to the positions of the part that is evaluated."""

import numpy as np
import pyarrow as pa

from armillary.evaluation.suite import comparisons
from armillary.evaluation.tables import located


def test_rows_are_located_in_any_order() -> None:
    assert located(np.array([7, 3, 5, 7, 0, 9]), np.array([5, 7, 3])).tolist() == [1, 2, 0, 1, -1, -1]


def test_tables_are_used_when_all_of_them_is_evaluated() -> None:
    tables = {
        "pairs": pa.table({"first": [10, 12], "second": [11, 10], "same": [True, False], "fold": [0, 1]}),
        "templates": pa.table({"row": [12, 11], "template": [4, 5], "media": [0, 0]}),
        "matches": pa.table({"first": [4], "second": [5], "same": [False]}),
    }
    pairs, templates, warnings = comparisons(tables, np.array([12, 10, 11]))
    assert pairs is not None
    assert (pairs.first.tolist(), pairs.second.tolist()) == ([1, 0], [2, 1])
    assert pairs.fold is not None
    assert templates is not None
    assert templates.row.tolist() == [0, 2]
    assert templates.matches is not None
    assert templates.matches.second.tolist() == [5]
    assert warnings == {}
    pairs, templates, warnings = comparisons(tables, np.array([12, 11]))
    assert pairs is None
    assert templates is not None
    assert "2 of the dataset's 2 pairs" in warnings["verification"][0]
    assert comparisons({}, np.array([1])) == (None, None, {})
