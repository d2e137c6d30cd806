"""Fixtures of all the tests in this folder."""
from tests.common import fixed_seed  # noqa: F401
