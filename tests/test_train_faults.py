"""train.py when things break: two runs in one folder, damaged files, full disks, dead workers."""
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
from PIL import Image

import train as train_module
from extras.data import load_with_workers
from extras.files import atomic_write, make_folder
from extras.locks import UNFINISHED, alone_in
from extras.shards import Shards
from sd import UserError
from tests.training import (  # noqa: F401
    ROOT,
    command,
    five,
    metrics,
    numbered_picture,
    original_signals,
    shards,
    tiny,
    torchrun,
    trained,
    write_tar,
)


@pytest.fixture
def args(tiny, five, tmp_path):  # noqa: F811
    return ["--data", five, "--init", tiny, "--batch", 2, "--device", "cpu", "--sample-every", 0,
            "--train", "unet", "--out", tmp_path / "out"]


def refused(capsys, *args: object) -> str:
    """train.py must end with status 2 and one line. Returns it."""
    code, err, _ = command(train_module.main, capsys, *args)
    assert code == 2 and err.count("\n") == 1, (code, err)
    return err


# --- folders ---

def hold(folder) -> subprocess.Popen:
    """Another process that locks a folder."""
    code = ("import sys, time; from pathlib import Path; from extras.locks import try_lock; "
            f"try_lock(Path({str(folder)!r})); print('held', flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    return process


def test_two_runs_in_one_folder(args, tmp_path, capsys):
    """The second is refused. A run that is killed leaves no lock behind."""
    (tmp_path / "out").mkdir()
    other = hold(tmp_path / "out")
    try:
        assert "another train.py is training in" in refused(capsys, *args, "--steps", 1)
        assert not list((tmp_path / "out").iterdir())
    finally:
        other.kill()
        other.wait()
    trained(capsys, *args, "--steps", 1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "metrics.jsonl", "model.safetensors", "sample-0000001.png", "state.pt"]


@pytest.mark.parametrize("name, value", [
    ("RANK", "x"), ("RANK", "2"), ("WORLD_SIZE", "-1"), ("LOCAL_RANK", ""), ("RANK", "9" * 99)])
def test_a_damaged_environment_of_torchrun(args, capsys, monkeypatch, name, value):
    whole = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    for variable, text in (whole | {name: value}).items():
        monkeypatch.setenv(variable, text)
    assert "start many processes with torchrun" in refused(capsys, *args, "--steps", 1)


def test_a_misspelt_row_is_told(args, capsys):
    assert "no row of PRESETS (sd1" in refused(capsys, *args, "--init", "emojii", "--steps", 1)


@pytest.mark.parametrize("given, said", [
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--stepss", "3"], "did you mean --steps?")])
def test_a_wrong_option_is_one_line(args, capsys, given, said):
    assert said in refused(capsys, *args, *given)


def test_ctrl_c_before_the_first_step_is_one_line(args, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_module, "load_model", interrupt)
    code, err, _ = command(train_module.main, capsys, *args)
    assert (code, err) == (130, "train.py: stopped before a step was made\n")


def test_ctrl_c_while_torch_is_imported_is_one_line():
    code = ("import builtins, runpy; usual = builtins.__import__\n"
            "def interrupt(name, *rest):\n"
            "    if name == 'torch': raise KeyboardInterrupt\n"
            "    return usual(name, *rest)\n"
            "builtins.__import__ = interrupt\n"
            "runpy.run_path('train.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == "train.py: stopped\n"


def test_only_what_killed_runs_left_is_removed(args, tmp_path, capsys):
    """By its name, and while no process holds it."""
    out = tmp_path / "out"
    names = ["tmpmine.tmp", f"{UNFINISHED}old", f"{UNFINISHED}held", "my-unfinished-work"]
    for name in names:
        (out / name).mkdir(parents=True)
        (out / name / "x").write_text("x")
    (out / f"{UNFINISHED}file").write_text("x")
    (out / f"{UNFINISHED}link").symlink_to(out / "tmpmine.tmp")
    other = hold(out / names[2])
    try:
        make_folder(out)
    finally:
        other.kill()
        other.wait()
    assert [(out / name / "x").exists() for name in names] == [True, False, True, True]
    assert (out / f"{UNFINISHED}file").exists() and (out / f"{UNFINISHED}link").is_symlink()
    trained(capsys, *args, "--steps", 1)
    assert [(out / name / "x").exists() for name in names] == [True, False, False, True]


def test_killed_while_it_writes(tmp_path):
    code = ("import time; from pathlib import Path; from extras.files import atomic_write\n"
            f"with atomic_write(Path({str(tmp_path / 'x')!r})) as path:\n"
            "    path.write_text('half'); print('written', flush=True); time.sleep(600)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    make_folder(tmp_path)
    left, = tmp_path.iterdir()                      # it is held
    assert left.name.startswith(UNFINISHED)
    process.kill()
    process.wait()
    with atomic_write(tmp_path / "y") as path:
        path.write_text("whole")
    make_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_one_process_may_train_in_two_folders(tmp_path):
    with alone_in(tmp_path, 1), alone_in(tmp_path, 0):
        (tmp_path / "more").mkdir()
        with alone_in(tmp_path / "more"), pytest.raises(UserError), alone_in(tmp_path):
            pass


# --- damaged files ---

def test_damaged_or_foreign_state_is_told_and_kept(args, tmp_path, capsys):
    trained(capsys, *args, "--steps", 1)
    path = tmp_path / "out/state.pt"
    good = path.read_bytes()
    saved = torch.load(path)
    cases = [good[:len(good) // 2], b"", b"hello", good[:-40] + bytes(40)]
    for change in ({"step": None}, {"params": 3}, {"params": ["x"] * len(saved["params"])},
                   {"optimizer": {}}, {"positions": [{0: {"strange": 1}}]}, {"ema": []},
                   {"settings": 3}):
        torch.save(saved | change, tmp_path / "changed.pt")
        cases.append((tmp_path / "changed.pt").read_bytes())
    for other in ([1, 2], {"state_dict": {}}, torch.zeros(3)):
        torch.save(other, tmp_path / "changed.pt")
        cases.append((tmp_path / "changed.pt").read_bytes())
    for case in cases:
        path.write_bytes(case)
        err = refused(capsys, *args, "--steps", 2)
        assert "state.pt is " in err or "was written by" in err, err
        assert path.read_bytes() == case
    path.write_bytes(good)
    assert "steps 1 to 2" in trained(capsys, *args, "--steps", 2)


def test_broken_line_of_metrics_is_told_and_kept(args, tmp_path, capsys):
    out = tmp_path / "out"
    trained(capsys, *args, "--steps", 1, "--log-every", 1)
    broken = [b'{"step": 1, "lo', b"\xff\xfe", b"[1]", b'{"step": "x", "loss": 1}']
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(whole + b"\n".join(broken) + b"\n")
    said = trained(capsys, *args, "--steps", 3, "--log-every", 1)
    assert said.count("line 2 cannot be read (4 in all)") == 1
    lines = (out / "metrics.jsonl").read_bytes().splitlines()
    assert lines[1:5] == broken
    assert [json.loads(lines[i])["step"] for i in (0, 5, 6)] == [1, 2, 3]
    Image.open(out / "train.png").load()


def test_full_disk_loses_nothing(args, tmp_path, capsys):
    """A limit on the size of files stands for it. The state before is kept, and resumed from."""
    trained(capsys, *args, "--steps", 1)
    before = (tmp_path / "out/state.pt").read_bytes()
    code = ("import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
            "import train; train.main()")
    done = subprocess.run([sys.executable, "-c", code, *map(str, args), "--steps", "2"], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and "train.py: cannot write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out/state.pt").read_bytes() == before
    assert "steps 1 to 2" in trained(capsys, *args, "--steps", 2)
    assert not list((tmp_path / "out").glob(f"{UNFINISHED}*"))


# --- streams ---

def test_bad_samples_are_skipped_and_counted(tmp_path, capfd):
    """Half a character, JSON in JSON without end, no picture; odd headers end the shard alone."""
    files = {f"{i}.png": numbered_picture(i) for i in range(3)}
    files |= {f"{i}.txt": b"x" for i in range(3)} | {
        "a.png": numbered_picture(5), "a.json": b'{"caption": "\\ud800"}',
        "b.png": numbered_picture(5), "b.json": b'{"caption":' * 50_000,
        "c.png": numbered_picture(5), "c.json": b'{"caption": {"x": 3}}',
        "d.png": b"x", "d.txt": b"x",
        "e.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "e.txt": b"x"}
    write_tar(tmp_path / "0.tar", dict(sorted(files.items())))
    huge = tarfile.TarInfo("x.png")
    huge.size = 10**12
    pax = tarfile.TarInfo("x")
    pax.type, pax.size = tarfile.XHDTYPE, 10**12
    for name, header in (("1", huge.tobuf()), ("2", pax.tobuf()), ("3", b"\xff" * 512)):
        (tmp_path / f"{name}.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:-10240] + header)
    reader = Shards([f"{tmp_path}/{{0..3}}.tar"], [(16, 16)], 3, 0)
    positions: dict = {}
    batches = reader.batches(positions, 0)
    for _ in range(6):
        assert len(next(batches).captions) == 3
    assert positions[0].skipped + positions[0].skipped_since > 0
    assert "breaks off" in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_without_a_usable_sample_stop(tmp_path, workers, args, capsys):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", {f"{n}.png": b"x" for n in range(4)})
    err = refused(capsys, *args, "--data", f"{tmp_path}/{{0..1}}.tar", "--steps", 1,
                  "--workers", workers)
    assert "no sample in 2 shards can be used; the last: " in err and "has no caption" in err


class Dies(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield 1
        os.kill(os.getpid(), signal.SIGKILL)


def test_dead_worker_ends_in_a_line():
    batches = load_with_workers(Dies(), 1)
    with pytest.raises(UserError, match="a process of --workers ended") as error:
        list(batches)
    assert "\n" not in str(error.value)


def wait_for_line(process: subprocess.Popen, text: str) -> str:
    seen = ""
    while text not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    return seen


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_is_heeded_while_no_pictures_come(tiny, shards, tmp_path, workers):  # noqa: F811
    """After some steps the stream stands still. What was learned is saved."""
    first = shards.replace("{0000..0015}", "0000")
    stream = f"pipe:cat {first}; sleep 600"
    process = torchrun(0, "--data", stream, "--init", tiny, "--batch", 2, "--device", "cpu",
                       "--sample-every", 0, "--log-every", 1, "--shuffle", 4, "--train", "unet",
                       "--out", tmp_path / "out", "--workers", workers)
    wait_for_line(process, "step 2/")
    time.sleep(5)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "the same command resumes" in out, out
    step = torch.load(tmp_path / "out/state.pt")["step"]
    assert step >= 2 and f"after step {step};" in out


def test_sheets_after_a_resume_show_the_same_captions(tiny, shards, tmp_path, capsys):  # noqa: F811
    """Those of the first batch, as without an interruption."""
    common = ["--data", shards, "--init", tiny, "--batch", 2, "--device", "cpu", "--train", "unet",
              "--sample-every", 0, "--out", tmp_path / "out"]
    trained(capsys, *common, "--steps", 1)
    first = torch.load(tmp_path / "out/state.pt")["shown"]
    trained(capsys, *common, "--steps", 2)
    assert len(first) == 2 and torch.load(tmp_path / "out/state.pt")["shown"] == first
