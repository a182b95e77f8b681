"""Every registered objective passes the conformance suite."""

from armillary.testing.objective_suite import ObjectiveSuite


class TestRegistered(ObjectiveSuite):
    """All of them, each with every option."""
