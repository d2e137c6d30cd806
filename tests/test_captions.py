"""extras/captions.py: what folders of captioned pictures hold, as people bring them."""
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip import CLIPTextConfig, CLIPTextModel
from extras import data as data_module
from extras.data import Folder
from sd import UserError

TEXT = "a red square"


def pictures(folder: Path, suffix: str = ".png", caption: str | None = ".txt",
             text: str = TEXT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40, 40), color).save(folder / f"{i}{suffix}")
        if caption:
            (folder / f"{i}{caption}").write_text(text, "utf-8")
    return folder


def captions(*folders: Path) -> list[list[str]]:
    folder = Folder([str(one) for one in folders], [(16, 16)], 2, 0)
    return [sample.captions for sample in folder.samples]


@pytest.mark.parametrize("suffix, caption", [
    (".png", ".txt"), (".png", ".caption"), (".png", ".png.txt"), (".PNG", ".txt"),
    (".png", ".TXT"), (".JPG", ".txt"), (".bmp", ".txt"), (".tif", ".caption"), (".gif", ".txt"),
    (".avif", ".txt")])
def test_captions_beside_pictures(suffix, caption, tmp_path):
    assert captions(pictures(tmp_path, suffix, caption)) == [[TEXT]] * 3


def test_folders_of_kohya(tmp_path, capfd):
    """10_name: each picture 10 times an epoch. Its name is the caption if there is no other."""
    pictures(tmp_path / "set/2_dog dog", caption=None)
    pictures(tmp_path / "set/3_cat")
    (tmp_path / "set/log").mkdir()
    assert captions(tmp_path / "set") == [["dog dog"]] * 6 + [[TEXT]] * 9
    assert captions(tmp_path / "set/2_dog dog") == [["dog dog"]] * 6
    pictures(tmp_path / "whole/img/2_dog")
    assert captions(tmp_path / "whole") == [[TEXT]] * 6
    order = Folder([str(tmp_path / "set")], [(16, 16)], 3, 0).order()
    seen = [i for _ in range(5) for _, i in next(order)]
    assert sorted(seen) == list(range(15))
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("name, rows, said", [
    ("metadata.jsonl", '{{"file_name": "{i}.png", "text": "a red square"}}', ""),
    ("metadata.jsonl", '{{"file_name": "{i}.png", "caption": "a red square"}}', "caption"),
    ("metadata.jsonl", '{{"file_name": "{i}.png", "prompt": "a red square"}}', "prompt"),
    ("metadata.jsonl", '{{"image": "{i}.png", "text": "a red square"}}', ""),
    ("metadata.jsonl", '{{"file_name": "{i}.png", "text": ["a red square"]}}', ""),
    ("metadata.csv", "{i}.png,a red square", "")])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_tables_of_captions(name, rows, said, mark, tmp_path, capfd):
    """Of other field names one line says which; a byte order mark does not matter."""
    lines = ["file_name,text"] * name.endswith("csv") + [rows.format(i=i) for i in range(3)]
    pictures(tmp_path, caption=None)
    (tmp_path / name).write_bytes(mark + "\n".join(lines).encode())
    assert captions(tmp_path) == [[TEXT]] * 3
    err = capfd.readouterr().err
    assert err == (f"{tmp_path / name}: captions are read from {said}\n" if said else "")


def test_unknown_field_names_are_named(tmp_path, capfd):
    pictures(tmp_path, caption=None)
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "0.png", "label": "x"}\n')
    with pytest.raises(UserError, match="has no caption"):
        captions(tmp_path)
    assert "it has 'file_name', 'label'" in capfd.readouterr().err
    for row in ('{"picture": "0.png", "text": "x"}', '["0.png", "x"]', '{"file_name": 3}', "{",
                "[" * 100_000, '"x"', "null"):
        table.write_text(row)
        with pytest.raises(UserError, match="is damaged, each line must be like") as error:
            captions(tmp_path)
        assert "\n" not in str(error.value)


def test_what_is_left_out_is_counted(tmp_path, capfd):
    pictures(tmp_path)
    pictures(tmp_path / "more")
    for name in ("a.heic", "b.heic", "c.psd", ".DS_Store", "._0.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "gone.txt").write_text("x")
    (tmp_path / "x.png").mkdir()
    (tmp_path / "broken.png").write_bytes(b"")
    (tmp_path / "2.txt").write_text("")
    assert captions(tmp_path) == [[TEXT]] * 2
    err = capfd.readouterr().err
    assert "2 of a format that is not read (.heic)" in err and "3 in subfolders" in err
    assert "1 of a format that is not read (.psd)" in err and "3 of 5 pictures skipped" in err
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}\n')
    captions(tmp_path)
    assert "4 not in the table of captions" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["../outside.png", "/etc/hostname", "pipe.png"])
def test_tables_do_not_lead_out_of_their_folder(name, tmp_path, capfd):
    import os
    pictures(tmp_path / "in", caption=None)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    os.mkfifo(tmp_path / "in/fifo")
    (tmp_path / "in/pipe.png").symlink_to(tmp_path / "in/fifo")
    rows = [{"file_name": one, "text": "x"} for one in (name, "0.png")]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(tmp_path / "in") == [["x"]]
    assert "1 of 2 pictures skipped" in capfd.readouterr().err


def test_encodings(tmp_path):
    """UTF-16 has a mark. Other bytes than UTF-8 are refused, not misread."""
    pictures(tmp_path, caption=None)
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("ein roter Würfel", "utf-16")
    assert captions(tmp_path) == [["ein roter Würfel"]] * 3
    (tmp_path / "1.txt").write_text("ein roter Würfel", "latin-1")
    with pytest.raises(UserError, match="1.txt are not UTF-8"):
        captions(tmp_path)


def test_half_a_character_is_skipped(tmp_path, capfd):
    pictures(tmp_path, caption=None)
    rows = ['{"file_name": "0.png", "text": "\\ud800"}', '{"file_name": "1.png", "text": "x"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert captions(tmp_path) == [["x"]]
    assert "1 of 2 pictures skipped: a caption of" in capfd.readouterr().err


# --- long captions ---

def encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(CLIPTextConfig(hidden_size=32, num_hidden_layers=1,
                                        num_attention_heads=2)).requires_grad_(False)


@pytest.mark.parametrize("cached", [False, True])
def test_long_captions_fill_further_rows(cached):
    """Words 1 to 75 and 76 to 120, each row by itself; a short caption gets an empty row."""
    text = encoder()
    words = ["word"] * 75, ["cat"] * 45
    cache = (data_module.TensorCache(None), ["key"]) if cached else None
    with data_module.text_scope([text], 77, cache):
        found = text.encode([" ".join(words[0] + words[1]), "a dog", ""])
        short = text.encode(["a dog"])
    first, second, dog, empty = (text.encode([one]) for one in (
        " ".join(words[0]), " ".join(words[1]), "a dog", ""))
    rows = [(first, second), (dog, empty), (empty, empty)]
    wanted = torch.cat([torch.cat([one["context"] for one in row], 1) for row in rows])
    torch.testing.assert_close(found["context"], wanted)
    torch.testing.assert_close(found["y"], torch.cat([one["y"] for one, _ in rows]))
    torch.testing.assert_close(short["context"], dog["context"])


def test_captions_are_cut_where_fewer_tokens_are_asked_for():
    text = encoder()
    with data_module.text_scope([text], 16, None):
        assert text.encode(["word " * 300])["context"].shape == (1, 16, 32)
    with data_module.text_scope([text], 77, None):
        rows = data_module.MAX_ROWS
        assert text.encode(["word " * 3000])["context"].shape == (1, rows * 77, 32)
    assert "encode" not in vars(text)
