"""`python program.py words` in a process that is forked from one that has torch already.

Starting Python with torch takes seconds, which tests of many commands would pay for each.
`forkserver` imports LIBRARIES once; nothing of this project is among them.
"""
import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

LIBRARIES = ["torch", "torch._dynamo", "PIL.Image", "safetensors.torch", "tokenizers", "tqdm"]
ROOT = Path(__file__).resolve().parents[1]


def run_forked(program: str | Path, *words: object, folder: Path = ROOT) -> CompletedProcess:
    """Run the program in that folder, with one thread."""
    with TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = start_forked(program, *words, folder=folder, out=out, err=err)
        process.join(600)
        process.kill()
        process.join()
        args = [str(program), *map(str, words)]
        return CompletedProcess(args, process.exitcode, out.read_text(), err.read_text())


def start_forked(program: str | Path, *words: object, out: Path, err: Path, folder: Path = ROOT,
                 **env: str) -> BaseProcess:
    """The same, still running. What it prints is added to the files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    args = [str(program), *map(str, words)]
    process = context.Process(target=run_program, args=(folder, out, err, args, env))
    process.start()
    return process


def run_program(folder: Path, out: Path, err: Path, args: list[str], env: dict[str, str]) -> None:
    for number, path in ((1, out), (2, err)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    os.environ.update(env)
    # a server of its own for DataLoader would outlive a kill
    multiprocessing.set_start_method(None, force=True)
    import torch

    torch.set_num_threads(1)    # threads wait for each other on a busy machine
    os.chdir(folder)
    # as `python program.py`: the program's folder first, and no other of this project
    program = Path(args[0]).resolve()
    elsewhere = [path for path in sys.path if Path(path).resolve() != ROOT]
    sys.path[:] = [str(program.parent), *elsewhere]
    sys.argv = args
    runpy.run_path(str(program), run_name="__main__")
