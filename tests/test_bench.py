"""tools/bench.py."""
import subprocess
import sys

from tests.common import ROOT


def test_bench_ends_when_one_of_its_processes_does():
    """It does not wait for it for ever: such as where diffusers is not installed."""
    for build in ("partial(sys.exit, 3)",
                  "bench.OtherCheckout(bench.ROOT, 'nothing', torch.float32, 'cpu')"):
        code = ("import sys; sys.path.insert(0, 'tools'); import bench, torch; "
                f"from functools import partial; bench.in_processes(1, this={build})")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 1 and "EOFError" in done.stderr


def test_figures_are_read_from_tables():
    """As bench.py and that of older commits print them."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from bench import figures
    finally:
        sys.path.remove(str(ROOT / "tools"))
    said = """
the machine, product in float32: 123 GFLOP/s at best
| guided step | median s (min to max) | ours takes |
|---|---|---|
| this (321 GFLOP/s) | 2.50 (2.40 to 2.60) |  |
| diffusers, fp32 | 5.00 (4.90 to 5.10) | 0.50 |

| side | guided step | decoding | memory |
|---|---|---|---|
| 256 | 1.5 s | 0.5 s | 1.0 GB |
"""
    assert figures(said) == [
        ("product in float32", 123), ("this (321 GFLOP/s)", 2.5), ("diffusers, fp32", 5.0),
        ("256", 1.5), ("256", 0.5), ("256", 1.0)]
