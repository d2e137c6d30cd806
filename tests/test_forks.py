"""Each patch of examples/forks/ is applied to a copy, trained for two steps, saved and drawn."""
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.forked import run_forked

ROOT = Path(__file__).resolve().parents[1]
FORKS = sorted((ROOT / "examples" / "forks").glob("*.patch"))
MOST = {  # lines of existing files that a patch may change
    "linear_attention": 10, "class_labels": 4, "f4": 6, "heun": 12, "rope": 12, "positions": 6,
    "dit": 4, "rectified_flow": 8, "perturbed_attention": 20, "t5": 4}
TRAIN = {  # fork: what train.py is given beside data, steps and sizes
    "class_labels": ["--init", "labels"], "dit": ["--init", "dit"], "t5": ["--init", "t5"],
    "rectified_flow": ["--init", "flow"],
    "f4": ["--init", "f4", "--vae", "runs/vae/model.safetensors"]}
DRAW = {"heun": ["--sampler", "heun"]}


def changed_lines(patch: str) -> int:
    """Lines added or removed in files that exist, whichever are more; blank lines aside."""
    changed = 0
    for file in re.split(r"^(?=--- )", patch, flags=re.MULTILINE)[1:]:
        lines = file.splitlines()
        if lines[0] != "--- /dev/null":
            changed += max(sum(line[0] == mark and line[1:].strip() != "" for line in lines[2:])
                           for mark in "+-")
    return changed


def copy_project(folder: Path) -> Path:
    """The files that draw and train; the weights by a link."""
    for file in ("sd.py", "model.py", "sampler.py", "clip.py", "vae.py", "train.py"):
        shutil.copy(ROOT / file, folder)
    shutil.copytree(ROOT / "extras", folder / "extras", ignore=shutil.ignore_patterns("__pyc*"))
    (folder / "weights").symlink_to(ROOT / "weights")
    return folder


def run(folder: Path, *words: str) -> str:
    done = run_forked(folder / words[0], *words[1:], folder=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All with one caption: the sample sheet at the end of a run has one picture, then."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        Image.new("RGB", (64, 64), (60 * i, 200 - 50 * i, 90)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("apple")
    return folder


def test_the_table_names_every_patch() -> None:
    assert {fork.stem for fork in FORKS} == MOST.keys()


@pytest.mark.parametrize("fork", FORKS, ids=lambda fork: fork.stem)
def test_fork_trains_saves_loads_and_draws(fork: Path, pictures: Path, tmp_path: Path) -> None:
    patch = fork.read_text()
    assert changed_lines(patch) <= MOST[fork.stem]
    if shutil.which("git") is None:
        pytest.skip("git is not installed: it applies the patch")
    folder = copy_project(tmp_path)
    subprocess.run(["git", "apply", str(fork)], cwd=folder, check=True)
    usual = ["train.py", "--data", str(pictures), "--steps", "2", "--batch", "2"]
    usual += ["--sample-every", "0", "--ema", "0"]
    if fork.stem == "f4":
        run(folder, *usual, "--init", "f4", "--train", "vae", "--out", "runs/vae")
    run(folder, *usual, *TRAIN.get(fork.stem, []), "--out", "runs/fork")
    warned = run(folder, "sd.py", "apple", "--ckpt", "runs/fork", "--steps", "2",
                 "--out", "apple.png", *DRAW.get(fork.stem, []))
    # extras/fast.py has versions of CrossAttention: it says that it leaves the edited one alone
    edits_attention = fork.stem in ("linear_attention", "rope")
    assert ("model.CrossAttention was edited" in warned) == edits_attention
    with Image.open(folder / "apple.png") as image:
        assert image.size == (128, 128) and image.convert("L").getextrema()[1] > 0
