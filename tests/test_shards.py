"""extras/shards.py: every sample once, resumed readers, damage, URLs, memory."""
import os
import subprocess
import sys
import tarfile
import threading
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from extras import shards as shards_module
from extras.shards import Shards
from sd import UserError
from tests.training import ROOT, SQUARE, numbered_picture, shards, write_tar  # noqa: F401


def captions(batches, n):
    return [[next(batches).captions for _ in range(n)] for batches in batches]


def numbered_files(numbers) -> dict[str, bytes]:
    return {f"{i}.{kind}": numbered_picture(i) if kind == "png" else str(i).encode()
            for i in numbers for kind in ("png", "txt")}


def test_every_sample_once_an_epoch(shards):  # noqa: F811
    """4 processes with 2 workers each: 20 samples per worker, 8 batches of 5 per process.

    Then all again in another order.
    """
    def process(rank, seed=0):
        reader = Shards([shards], SQUARE, batch=5, seed=seed, shuffle=7, rank=rank, world=4)
        return reader.batches({}, 0, workers=2)

    ranks = [process(rank) for rank in range(4)]
    epochs = [captions(ranks, 8) for _ in range(2)]
    for epoch in epochs:
        numbers = sorted(int(caption) for rank in epoch for batch in rank for caption in batch)
        assert numbers == list(range(160))
    assert epochs[0] != epochs[1]
    again = [process(1, seed) for seed in (0, 1)]
    assert captions(again[:1], 8)[0] == epochs[0][1] != captions(again[1:], 8)[0]


def test_sample_indices_differ_and_captions_belong_to_their_pictures(shards):  # noqa: F811
    ranks = [Shards([shards], SQUARE, batch=5, seed=0, rank=rank, world=2).batches({}, 0, workers=2)
             for rank in range(2)]
    batches = [next(rank) for rank in ranks for _ in range(20)]
    indices = [index for batch in batches for index in batch.sample_index]
    assert len(set(indices)) == len(indices) == 200
    for batch in batches:
        assert [int(x[0, 8, 8]) for x in batch.pixels] == [int(c) for c in batch.captions]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_shards_repeat_and_skip_nothing(shards, tmp_path, workers):  # noqa: F811
    """After any number of batches, in blocks, sizes and epochs of any length."""
    def start(positions, number):
        reader = Shards([shards], [(16, 16), (32, 16)], batch=3, seed=0, shuffle=11, rank=1,
                        world=3)
        return reader.batches(positions, number, workers)

    whole = start({}, 0)
    whole = [next(whole) for _ in range(48)]
    assert {batch.position.epoch for batch in whole} == {0, 1, 2}
    assert any(batch.position.left for batch in whole)
    for number in (0, 1, 2, 5, 12, 23, 37):
        positions = {}
        before = start(positions, 0)
        for _ in range(number):
            next(before)
        saved = {worker: asdict(position) for worker, position in positions.items()}
        torch.save(saved, tmp_path / "p.pt")
        loaded = torch.load(tmp_path / "p.pt", weights_only=True)
        positions = {worker: shards_module.Position(**position)
                     for worker, position in loaded.items()}
        after = start(positions, number)
        for expected in whole[number:number + 10]:
            batch = next(after)
            assert batch.captions == expected.captions
            assert batch.sample_index == expected.sample_index
            assert torch.equal(batch.pixels, expected.pixels)


def test_damaged_shards_are_survived(tmp_path, capfd):
    """All that is not damaged comes once.

    One shard ends within a picture, one between two members, one within a header, one is no
    archive, one is a command that fails; one has a caption and a picture that are none.
    """
    files = numbered_files(range(12))
    parts = [dict(list(files.items())[8 * i:8 * i + 8]) for i in range(3)]
    for i, part in enumerate(parts):
        write_tar(tmp_path / f"{i}.tar", part)
    whole = (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        third = tar.getmembers()[4]
    ends = {"within": third.offset_data + 20, "between": third.offset,
            "header": third.offset + 100}
    for name, end in ends.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:end])
    (tmp_path / "none.tar").write_bytes(b"no archive" * 1000)
    write_tar(tmp_path / "odd.tar", {
        "a.png": numbered_picture(0), "a.txt": b" \n", "b.png": numbered_picture(1)[:40],
        "b.txt": b"b", "c.txt": b"c", "d.png": numbered_picture(20),
        "d.json": b'{"caption": "20"}'})
    # the last sample before an end that is missing may be incomplete
    before_the_end = {"within": [4, 5], "none": [], "fails": [*range(8, 12)]}
    for name in ("within", "between", "header", "none", "fails"):
        url = "pipe:cat 2.tar; exit 3" if name == "fails" else str(tmp_path / f"{name}.tar")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            paths = [str(tmp_path / "0.tar"), url, str(tmp_path / "odd.tar")]
            batches = Shards(paths, SQUARE, batch=1, seed=0, shuffle=3).batches({}, 0)
            expected = [*range(4), 20] + before_the_end.get(name, [4])
            found = [next(batches) for _ in expected]
            assert sorted(int(batch.captions[0]) for batch in found) == sorted(expected), name
            found += [next(batches) for _ in expected]
            last = found[-1].position
            assert last.skipped + last.skipped_since in (3, 4, 5, 6)
        line = f"{url} breaks off after {len(expected) - 5} samples"
        assert line in capfd.readouterr().err, name


def test_shards_come_from_urls(tmp_path, capfd):
    """Two whole ones, one that ends before its promised length, one that is missing.

    All that came comes once in each epoch, and lines say what did not.
    """
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", numbered_files(range(4 * shard, 4 * shard + 4)))
    with tarfile.open(tmp_path / "2.tar") as tar:
        end = tar.getmembers()[4].offset_data + 20  # within the third sample's picture
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            path = tmp_path / self.path[1:]
            if not path.exists():
                return self.send_error(404)
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:end] if path.name == "2.tar" else content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        assert shards_module.is_shards(url + "{0..3}.tar")
        reader = Shards([url + "{0..3}.tar"], SQUARE, batch=5, seed=0, shuffle=100)
        batches = reader.batches({}, 0)
        for _ in range(2):
            found = [next(batches) for _ in range(2)]
            numbers = [int(caption) for batch in found for caption in batch.captions]
            assert sorted(numbers) == list(range(10))
            assert all(int(x[0, 8, 8]) == int(caption) for batch in found
                       for caption, x in zip(batch.captions, batch.pixels))
    finally:
        server.shutdown()
        server.server_close()
    said = capfd.readouterr().err
    assert f"{url}2.tar breaks off after 2 samples" in said
    assert f"{url}3.tar breaks off after 0 samples" in said
    assert "0.tar" not in said and "1.tar" not in said
    assert sorted(asked[:4]) == [f"/{i}.tar" for i in range(4)]


ENDLESS = """
import io, itertools, sys, tarfile
kind = sys.argv[1]
try:
    with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
        for i in itertools.count() if kind != "zeros" else range(1):
            name = {"same": "x.png", "others": f"{i}.cls"}.get(kind, f"{i}.png")
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if kind == "folders" else tarfile.REGTYPE
            tar.addfile(member)
            tar.members.clear()
    while True:
        sys.stdout.buffer.write(bytes(1 << 16))
except BrokenPipeError:
    pass
"""


@pytest.mark.parametrize("kind, said", [
    ("damaged", "20 samples in a row cannot be used; the last: .*no caption"),
    ("folders", "no samples in 1 shards"), ("others", "no samples in 1 shards"),
    ("same", "no samples in 1 shards"), ("zeros", "no sample in 1 shards can be used")])
def test_endless_stream_without_use_ends_in_a_line(kind, said, tmp_path, monkeypatch, capfd):
    for name, value in dict(MAX_USELESS=20, MAX_FILES=20, MAX_BEHIND=2**17).items():
        monkeypatch.setattr(shards_module, name, value)
    (tmp_path / "make.py").write_text(ENDLESS)
    reader = Shards([f"pipe:{sys.executable} {tmp_path}/make.py {kind} 2>&-"], [(8, 8)], 2, 0,
                    shuffle=10)
    with pytest.raises(UserError, match=said):
        next(reader.batches({}, 0))
    assert kind == "damaged" or "breaks off after" in capfd.readouterr().err


def test_endless_stream_takes_no_memory(tmp_path):
    """Shards that a command makes while they are read, by 4 processes of 2 workers.

    All samples come once, and memory does not grow. STREAM=1000000 does it at full size.
    """
    n, count = int(os.environ.get("STREAM", 16_000)), 16
    (tmp_path / "make.py").write_text(MAKE)
    url = f"pipe:{sys.executable} {tmp_path}/make.py {{00..{count - 1:02}}} {n // count}"
    (tmp_path / "read.py").write_text(READ)
    readers = []
    for rank in range(4):
        arguments = [sys.executable, tmp_path / "read.py", url, str(rank), str(n)]
        readers.append(subprocess.Popen(
            arguments, stdout=open(tmp_path / str(rank), "w"), cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}))
    seen = bytearray(n)
    for rank, reader in enumerate(readers):
        assert reader.wait() == 0
        *numbers, memory = (tmp_path / str(rank)).read_text().splitlines()
        for line in numbers:
            for number in map(int, line.split()):
                seen[number] += 1
        early, late = map(float, memory.split())
        print("memory of a process with its workers after a tenth and at the end: "
              f"{early:.0f} and {late:.0f} MB")
        assert late < 1.1 * early + 20
    assert set(seen) == {1}


MAKE = """
import io, sys, tarfile
from PIL import Image
shard, n = map(int, sys.argv[1:])
stream = io.BytesIO()
Image.new("RGB", (8, 8), (shard, 0, 0)).save(stream, "PNG")
picture = stream.getvalue()
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for i in range(shard * n, shard * n + n):
        for kind, content in (("png", picture), ("txt", str(i).encode())):
            member = tarfile.TarInfo(f"{i:09}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.members.clear()
"""
READ = """
import os, sys
from pathlib import Path
from extras.shards import Shards
from sd import UserError

def memory(pid):
    # not the clean pages: those of libraries count as private once the other processes ended
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    kb = sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return kb / 1024 + sum(map(memory, children))

url, rank, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
reader = Shards([url], [(8, 8)], batch=50, seed=0, shuffle=500, rank=rank, world=4)
batches = reader.batches({}, 0, workers=2)
for i in range(n // 4 // 50):
    print(*next(batches).captions)
    if i == n // 4 // 50 // 10:
        early = memory(os.getpid())
print(early, memory(os.getpid()), flush=True)
os._exit(0)
"""
