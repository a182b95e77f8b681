"""Conformance suites for objectives, and what they run on: tiny models and batches, a pool of two gloo processes.

A plug-in runs the suite over its own objectives with::

    from armillary.testing.objective_suite import ObjectiveSuite

    class TestMine(ObjectiveSuite):
        objectives = ("my_objective",)
"""

import pytest

pytest.register_assert_rewrite("armillary.testing.objective_suite")
