"""What real processes need, as in tests/cluster."""

from tests.cluster.conftest import native_code, pytest_runtest_makereport

__all__ = ["native_code", "pytest_runtest_makereport"]
