"""extras/data.py: folders of captioned pictures, their order, their crops."""
import json
import pickle
import shutil

import pytest
import torch
from PIL import Image

from extras import data as data_module
from extras.data import Folder
from extras.files import atomic_write
from extras.png_info import png_chunk
from tests.training import five, numbered_picture  # noqa: F401


def test_folders_say_what_they_skip(five, tmp_path, capfd):  # noqa: F811
    """metadata.jsonl, prompts in PNGs; broken pictures and empty captions are counted."""
    (tmp_path / "sub").mkdir()
    shutil.copy(five / "red.png", tmp_path / "sub/red.png")
    (tmp_path / "broken.png").write_bytes((five / "blue.png").read_bytes()[:300])
    rows = [{"file_name": "sub/red.png", "text": "red"}, {"file_name": "broken.png", "text": "x"},
            {"file_name": "gone.png", "text": "x"}, {"file_name": "sub/red.png", "text": ""}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = Folder([str(tmp_path), str(five)], [(32, 32)], 2, 0)
    assert "3 of 9 pictures skipped" in capfd.readouterr().err
    captions = [sample.captions for sample in folder.samples]
    assert captions[:2] == [["red"], ["black disc", "a black disc"]]
    (tmp_path / "drawn").mkdir()
    parameters = "a cat\nNegative prompt: a dog\nSteps: 3"
    with atomic_write(tmp_path / "drawn/x.png") as path:
        Image.new("RGB", (32, 32)).save(path, pnginfo=png_chunk(parameters))
    drawn = Folder([str(tmp_path / "drawn")], [(32, 32)], 1, 0)
    assert drawn.samples[0].captions == ["a cat"]


def test_pictures_keep_their_shape():
    """Bucket sizes of 512 and 64. A wide picture is cropped at its sides, SDXL's numbers say so."""
    for size, f in ((512, 8), (64, 8), (1024, 8)):
        sizes = data_module.bucket_sizes(size, f, True)
        assert (size, size) in sizes
        for w, h in sizes:
            assert w * h <= size**2 and w % f == h % f == 0 and max(w, h) <= 2 * size
            assert (h, w) in sizes and w * h >= 0.8 * size**2
    wide = data_module.nearest((1920, 1080), data_module.bucket_sizes(512, 8, True))
    assert wide == (640, 384)
    sample = data_module.Sample("x", numbered_picture(7, (300, 100)), ["x"])
    crop = data_module.crop(sample, [(64, 32)])
    assert crop.pixels.shape == (3, 32, 64) and crop.size == [100, 300, 0, 16, 32, 64]


def test_folder_order_is_fair(five):  # noqa: F811
    """Batches of 4 from 5 pictures: each once before any comes again.

    Two processes share what one would have.
    """
    folder = Folder([str(five)], [(16, 16)], 4, 0)
    one = folder.batches(0, 1)
    indices = [index for _ in range(5) for index in next(one).sample_index]
    assert indices == list(range(20))
    order = folder.order()
    pictures = [i for _ in range(5) for _, i in next(order)]
    assert all(sorted(pictures[i:i + 5]) == list(range(5)) for i in range(0, 20, 5))
    one, two = folder.batches(0, 1), [folder.batches(rank, 2, workers=rank) for rank in range(2)]
    for n in range(6):
        a, b = next(one), next(two[n % 2])
        assert a.captions == b.captions and torch.equal(a.pixels, b.pixels)


def test_text_scope_restores_the_encoders():
    """Token length and `encode` are as before, whatever they were and whatever is raised."""
    class Encoder(torch.nn.Linear):
        tokenizer = type("Tokenizer", (), {"length": 77})()

        def encode(self, captions):
            return {"context": torch.zeros(len(captions), 2)}

    encoder, cache = Encoder(1, 1), data_module.TensorCache(None)
    with pytest.raises(KeyError), data_module.text_scope([encoder], 16, (cache, ["k"])):
        assert encoder.tokenizer.length == 16
        assert encoder.encode(["a", "b", "a"])["context"].shape == (3, 2)
        raise KeyError
    assert len(cache.memory) == 2
    assert encoder.tokenizer.length == 77 and "encode" not in vars(encoder)
    encoder.encode = own = lambda captions: {}
    with data_module.text_scope([encoder], 16, (cache, ["k"])):
        assert encoder.encode is not own
    assert encoder.encode is own


def test_folder_with_latents_can_be_sent_to_a_worker(five):  # noqa: F811
    """Where processes are spawned, as on macOS, it is pickled: the cached latents, not the VAE."""
    folder, calls = Folder([str(five)], [(16, 16)], 2, 0), []

    def encode(pixels):
        calls.append(len(pixels))
        return pixels.float(), -pixels.float()

    cache = data_module.TensorCache(None)
    folder.moments = data_module.CachedMoments(folder, cache, "", encode)
    for i in range(len(folder)):
        folder.moments(i)
    sent = pickle.loads(pickle.dumps(folder))
    batch, other = next(folder.batches(0, 1)), next(sent.batches(0, 1))
    assert calls == [1] * 5
    assert all(torch.equal(a, b) for a, b in zip(batch.moments, other.moments, strict=True))
