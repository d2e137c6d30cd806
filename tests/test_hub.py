"""Models of the Hugging Face hub. A server on this machine answers as huggingface.co does."""
import functools
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch

from extras.hub import allow_patterns, resolve_checkpoint
from sd import StableDiffusion
from tests.common import ROOT
from tests.folders import (  # noqa: F401
    SHARDED,
    assert_one_line,
    load,
    rows,
    small_model_and_pipeline,
    their_folder,
)
from tests.test_formats import same_tensors

# diffusers with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FP16 = dict(variant="fp16")
# Seconds that a client waits for an answer. The default is 10. The server is a thread of this
# process, and may need longer on a busy machine: "the download stopped (timed out)".
PATIENCE = 300


# --- the server ---

class Hub(ThreadingHTTPServer):
    """Models me/NAME from folders under `root`.

    `gated`: files are refused. `breaks`: from which byte -> how many more until the connection
    ends. `asked`: (method, path, range) of all requests.
    """
    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.gated, self.breaks, self.asked = root, False, None, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass

    def close(self):
        self.shutdown()
        self.server_close()

    def downloads(self) -> set[str]:
        """The files that were fetched."""
        return {path.split("/", 5)[-1] for method, path, _ in self.asked
                if method == "GET" and "/resolve/" in path}


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):  # noqa: N802
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        about = re.fullmatch(r"/api/models/(me/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path)
        if path.endswith("/revision/unknown"):
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if about:
            return self.answer_about(hub.root / about[1], about[1], about[2] or "")
        match = re.fullmatch(r"/(me/[^/]+)/resolve/[^/]+/(.*)", path)
        if match is None or not (hub.root / match[1]).is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo",
                               X_Error_Message="Access to this model is restricted.")
        file = hub.root / match[1] / match[2]
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        return self.answer_file(file.read_bytes(), match[2].replace("/", "-"))

    do_HEAD = do_GET  # noqa: N815

    def answer_about(self, folder: Path, name: str, what: str):
        """The list of a model's files."""
        if not folder.is_dir():
            return self.answer(401, b'{"error": "Invalid username or password."}',
                               X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = [{"type": "file", "path": file.relative_to(folder).as_posix(),
                  "size": file.stat().st_size, "oid": "0" * 40}
                 for file in sorted(folder.rglob("*")) if file.is_file()]
        found = {"id": name, "sha": COMMIT,
                 "siblings": [{"rfilename": file["path"]} for file in files]}
        if "tree" in what:
            found = files
        return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")

    def answer_file(self, body: bytes, etag: str):
        """A file, or the rest of it from a byte on."""
        start = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        code = 206 if start else 200
        headers = dict(X_Repo_Commit=COMMIT, ETag=f'"{etag}"', Accept_Ranges="bytes")
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        if self.command != "GET" or self.server.breaks is None:
            return self.answer(code, body[start:], **headers)
        part = body[start:start + self.server.breaks(start)]
        self.answer(code, part, **headers | dict(Content_Length=len(body) - start))
        self.wfile.flush()
        self.connection.shutdown(2)
        self.close_connection = True


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """me/both has everything twice and more beside, me/plain is an ordinary folder, me/shards a
    sharded one, me/files no folder of diffusers."""
    root = tmp_path_factory.mktemp("hub")
    for name, settings in (("plain", {}), ("both", {}), ("both", FP16), ("shards", SHARDED),
                           ("shards", SHARDED | FP16)):
        their_folder("sd1", root / "me" / name, **settings)
    for name in ("unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin",
                 "v1-5.safetensors", "unet/flax_model.msgpack", "safety_checker/model.safetensors"):
        (root / "me/both" / name).parent.mkdir(exist_ok=True)
        (root / "me/both" / name).write_bytes(b"not wanted")
    (root / "me/files").mkdir()
    (root / "me/files/model.safetensors").write_bytes(b"weights")
    return root


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    """The server, in place of huggingface.co, and an empty cache."""
    server = Hub(repositories)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
                        "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"),
                        "HF_HUB_DOWNLOAD_TIMEOUT": PATIENCE,
                        "HF_HUB_ETAG_TIMEOUT": PATIENCE}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.chdir(tmp_path)
    yield server
    server.close()


@pytest.fixture
def no_waiting(monkeypatch):
    """huggingface_hub waits a second between its tries, and keeps what it has in pieces of
    10 MB."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def reference() -> StableDiffusion:
    return small_model_and_pipeline("sd1")[0]


# --- what is fetched ---

def test_a_model_of_the_hub_is_loaded_and_kept(hub, rows):  # noqa: F811
    """The second time nothing is fetched, and offline nothing is asked."""
    rows("sd1")
    assert same_tensors(load("me/plain"), reference())
    assert hub.downloads() == {
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
        "vae/config.json", "text_encoder/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    hub.asked.clear()
    load("me/plain")
    assert hub.downloads() == set()
    hub.asked.clear()
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # monkeypatch puts it back
    load("me/plain")
    assert hub.asked == []


def test_no_network_and_the_model_is_there_already(hub, rows):  # noqa: F811
    rows("sd1")
    resolve_checkpoint("me/plain")
    hub.close()
    load("me/plain")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["both", "shards"])
def test_only_what_is_read_is_fetched(hub, rows, name, half):  # noqa: F811
    rows("sd1")
    dtype = torch.float16 if half else torch.float32
    sd = load(f"me/{name}", dtype)
    weights = {file for file in hub.downloads() if not file.endswith("json")}
    assert all(file.endswith(".safetensors") and ("fp16" in file) == half for file in weights)
    assert len(weights) == 3 if name == "both" else len(weights) > 6
    assert same_tensors(sd, reference(), dtype)


def test_a_path_that_is_there_wins(hub, tmp_path):
    (tmp_path / "me/plain").mkdir(parents=True)
    assert resolve_checkpoint("me/plain") == Path("me/plain") and hub.asked == []
    for name in ("nowhere.safetensors", "a/b.safetensors", "a/b.ckpt", "/a/b", "a/b/c", "../b",
                 "./b", "a", ""):
        assert resolve_checkpoint(name) == Path(name) and hub.asked == []


def test_allow_patterns_of_the_published_list():
    """Of what such repositories hold: one set of weights, shards by the index's name."""
    unet = "unet/diffusion_pytorch_model"
    files = {
        "model_index.json", "unet/config.json", f"{unet}.safetensors.index.json",
        f"{unet}.safetensors.index.fp16.json", f"{unet}-00001-of-00002.safetensors",
        f"{unet}-00002-of-00002.safetensors", f"{unet}.fp16-00001-of-00001.safetensors",
        f"{unet}-00001-of-00001.fp16.safetensors", "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin",
        "text_encoder/pytorch_model.fp16.bin"}
    always = {"model_index.json", "unet/config.json", "vae/config.json",
              "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.bin",
              "text_encoder/model.fp16.safetensors"}
    full = {file for file in files if re.search(r"unet/.*(-\d+-of-00002|index)(?!.*fp16)", file)}
    half = {file for file in files if "unet" in file and "fp16" in file}
    assert set(allow_patterns(files, half=False)) - always == full
    assert set(allow_patterns(files, half=True)) - always == half


# --- what goes wrong ---

def test_what_the_hub_refuses(hub):
    for name, said in {
            "me/nothing": "me/nothing is no file or folder here, and no model at",
            "me/files": "me/files is no diffusers folder: download the file you want",
            "me/a--b": "me/a--b is no file or folder here, and no model"}.items():
        assert_one_line(lambda: StableDiffusion.load(name), said)
    hub.gated = True
    assert_one_line(lambda: StableDiffusion.load("me/plain"),
                    f"me/plain is gated: agree to its terms at {hub.url}/me/plain, then log in")


def test_offline_and_not_there(hub):
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    assert_one_line(lambda: StableDiffusion.load("me/plain"),
                    "me/plain .*was not downloaded before.*HF_HUB_OFFLINE is set: unset it")
    assert hub.asked == []


def test_no_network_and_not_there(hub):
    hub.close()
    assert_one_line(lambda: StableDiffusion.load("me/plain"),
                    "me/plain .*was not downloaded before.*cannot be reached: connect")


def test_a_file_by_its_address(hub, monkeypatch):
    """It is fetched, and there without a network too. Without both, nobody waits for retries."""
    def address(name: str, revision: str = "main") -> str:
        return f"{hub.url}/me/files/blob/{revision}/{name}"

    found = resolve_checkpoint(address("model.safetensors"))
    assert found.read_bytes() == b"weights"
    assert_one_line(lambda: resolve_checkpoint(address("other.ckpt")),
                    "me/files has no file other.ckpt at revision main")
    assert_one_line(lambda: resolve_checkpoint(address("model.safetensors", "unknown")),
                    "me/files has no revision unknown")
    hub.close()
    huggingface_hub.close_session()  # it would keep the connection
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tried again"))
    assert resolve_checkpoint(address("model.safetensors")) == found
    assert_one_line(lambda: resolve_checkpoint(address("third.ckpt")),
                    "me/files .*was not downloaded before.*cannot be reached: connect")


def test_a_connection_that_breaks_is_taken_up_again(hub, rows, no_waiting):  # noqa: F811
    """The network ends every answer after 1 MB: each file goes on where it stopped, within one
    command."""
    rows("sd1")
    hub.breaks = lambda start: 1_000_000
    assert same_tensors(load("me/plain"), reference())
    starts = [int(asked[6:].split("-")[0]) for method, path, asked in hub.asked
              if method == "GET" and path.endswith("text_encoder/model.safetensors") and asked]
    assert starts == list(range(1_000_000, 1_000_000 * (len(starts) + 1), 1_000_000))
    assert len(starts) > 3


def test_a_download_that_stopped_goes_on_at_the_next_command(
        hub, rows, no_waiting):  # noqa: F811
    """The UNet's file ends in the middle, at every try. Then the connection holds: what was
    complete is not fetched again."""
    rows("sd1")
    hub.breaks = lambda start: 1_000_000 if start == 0 else 0
    line = assert_one_line(lambda: load("me/plain"),
                           "the download of me/plain stopped .*: run it again, the files that are "
                           "complete are kept")
    assert "peer closed connection" in line or "incomplete" in line
    hub.breaks = None
    hub.asked.clear()
    assert same_tensors(load("me/plain"), reference())
    assert "model_index.json" not in hub.downloads()
    assert "unet/diffusion_pytorch_model.safetensors" in hub.downloads()


# --- the command ---

def test_the_command_with_a_model_of_the_hub(hub, tmp_path):
    """A new process, which finds the server by the usual variables. A start with the built-in
    model does not import huggingface_hub."""
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1",
        "HF_HUB_ETAG_TIMEOUT": str(PATIENCE), "HF_HUB_DOWNLOAD_TIMEOUT": str(PATIENCE)}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=env, capture_output=True, text=True)
    command = [sys.executable, ROOT / "sd.py", "a cat", "--ckpt"]
    done = run([*command, "me/nothing"])
    assert done.returncode == 2
    assert re.fullmatch(r"sd.py: me/nothing is no file or folder here, and no model at .*\n",
                        done.stderr)
    done = run([*command, "me/plain"])  # it has the size of no row
    assert done.returncode == 2 and "32; known are 4 and 768" in done.stderr
    assert "Fetching" in done.stderr  # the progress bar
    snapshot = tmp_path / "home/hub/models--me--plain/snapshots" / COMMIT
    assert (snapshot / "model_index.json").exists()
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import sd; sd.StableDiffusion.load(); "
            "print('huggingface_hub' in sys.modules)")
    done = run([sys.executable, "-c", code, str(ROOT)])
    assert done.stdout.strip() == "False", done.stderr
