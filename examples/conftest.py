"""Fixtures of the examples' tests."""
import sys
from collections.abc import Callable
from types import ModuleType

import pytest

from tests.common import fixed_seed  # noqa: F401


@pytest.fixture
def command(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """command(module, *args): `python module.py args` in this process.

    It returns the exit status, stderr and stdout.
    """
    def run(module: ModuleType, *args: object) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
            code = 0
            try:
                module.main()
            except SystemExit as stop:
                code = stop.code
        out, err = capsys.readouterr()
        return code, err, out
    return run
