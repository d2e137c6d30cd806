"""`python program.py words` in a process that is forked from one that has torch already.

Starting Python with torch takes seconds, which tests of many commands would pay for each.
`forkserver` imports LIBRARIES once; nothing of this project is among them.
"""
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

LIBRARIES = ["torch", "torch._dynamo", "PIL.Image", "safetensors.torch", "tokenizers", "tqdm"]
ROOT = Path(__file__).resolve().parents[1]


def run_forked(program: str | Path, *words: object, folder: Path = ROOT) -> CompletedProcess:
    """Run the program in that folder, with one thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        args = [str(program), *map(str, words)]
        process = context.Process(target=run_program, args=(folder, out, err, args))
        process.start()
        process.join(600)
        process.kill()
        process.join()
        return CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def run_program(folder: Path, out: Path, err: Path, args: list[str]) -> None:
    for number, path in ((1, out), (2, err)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), number)
    import torch

    torch.set_num_threads(1)    # threads wait for each other on a busy machine
    os.chdir(folder)
    # as `python program.py`: the program's folder first, and not this project's
    program = Path(args[0]).resolve()
    elsewhere = [path for path in sys.path if Path(path).resolve() != ROOT]
    sys.path[:] = [str(program.parent), *elsewhere]
    sys.argv = args
    runpy.run_path(str(program), run_name="__main__")
