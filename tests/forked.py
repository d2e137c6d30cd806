"""`python program.py words` in a process that is forked from one that has torch already.

Starting Python with torch takes seconds, which tests of many commands would pay for each.
`forkserver` imports LIBRARIES once; nothing of this project is among them.
"""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

LIBRARIES = ["torch", "torch._dynamo", "PIL.Image", "safetensors.torch", "tokenizers", "tqdm"]
ROOT = Path(__file__).resolve().parents[1]


def run_forked(folder: Path, program: str, *words: str) -> tuple[int, str]:
    """Run the program of that folder, in that folder -> exit status, what it printed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with TemporaryDirectory() as place:
        printed = Path(place, "printed")
        process = context.Process(target=run_program, args=(folder, printed, program, words))
        process.start()
        process.join(600)
        process.kill()
        process.join()
        return process.exitcode, printed.read_text()


def run_program(folder: Path, printed: Path, program: str, words: tuple[str, ...]) -> None:
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)    # threads wait for each other on a busy machine
    os.chdir(folder)
    # as `python program.py`: the program's folder first, and not this project's
    sys.path[:] = [str(folder)] + [path for path in sys.path if Path(path).resolve() != ROOT]
    sys.argv = [program, *words]
    runpy.run_path(program, run_name="__main__")
