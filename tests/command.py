"""What the tests of sd.py's command share: the command in this process, pictures as arrays."""
import re
from pathlib import Path

import numpy as np
from PIL import Image

from extras import cli

ROOT = Path(__file__).resolve().parents[1]
SHEET = ROOT / "docs" / "emoji.png"     # some picture


def run_cli(capsys, *words: object) -> tuple[int, str, str]:
    """`python sd.py words` in this process -> exit status, stderr, stdout."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return code, err, out


def lines_of(err: str) -> list[str]:
    """What stands on stderr beside a progress bar."""
    lines = err.replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip() and not re.search(r"\d+%\|", line)]


def assert_refused(capsys, out: Path | str, *words: object) -> str:
    """sd.py must end with status 2 and one line, and write no file beside `out`.

    Returns the line.
    """
    folder = Path(out).parent
    before = set(folder.glob("*"))
    code, err, _ = run_cli(capsys, "a cat", "--out", out, *words)
    lines = lines_of(err)
    assert code == 2 and len(lines) == 1, (code, lines)
    assert set(folder.glob("*")) == before
    return lines[0]


def array(path: Path) -> np.ndarray:
    """A picture's values, 0 to 255, as floats."""
    return np.asarray(Image.open(path), float)


def params(path: Path) -> str:
    """The settings in a PNG."""
    return Image.open(path).text["parameters"]
