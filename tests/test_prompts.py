"""Prompts of any length, weights for words, and LoRAs named in a prompt."""
import contextlib
import random
import re

import pytest
import torch

from clip import Tokenizer
from extras import prompts
from extras.lora import LoRA
from extras.lora_tags import LoraTag, common_tags, find_file, find_tags
from extras.textual_inversion import add_word
from sd import StableDiffusion, UserError
from tests.command import array, run_cli
from tests.common import (
    SMALL,
    assert_linear,
    random_model,
    reference_text,
    reference_tokenizer,
    relative_error,
    small,
)
from tests.training import tiny  # noqa: F401


@pytest.fixture(scope="module")
def sd():
    sd = random_model()
    prompts.attach(sd)
    return sd


def test_long_prompts_are_chunks_of_75(sd):
    """Each chunk has its own start and end, and the shorter prompt's others are empty.

    All are as transformers encodes them, and the vectors stand one chunk after the other. The
    negative prompt gets as many chunks as the prompt, and the prompt as many as it.
    """
    reference = reference_text(SMALL.text_encoders[0], sd.state_dict())
    tokenizer = reference_tokenizer()
    texts = ["a cat", " ".join(f"word{i}" for i in range(40))]
    short, long = (tokenizer(text, add_special_tokens=False).input_ids for text in texts)
    assert 75 < len(long) <= 150
    rows = [[49406, *short], [49406], [49406, *long[:75]], [49406, *long[75:]]]
    rows = torch.tensor([row + [49407] * (77 - len(row)) for row in rows])
    theirs = reference(rows).last_hidden_state.reshape(2, 154, -1)

    assert relative_error(sd.encode_prompt(texts)["context"], theirs) < 1e-5
    cond, uncond = sd.encode_both(["a cat"], texts[1], 64, 64)
    assert cond["context"].shape[1] == uncond["context"].shape[1] == 154
    assert relative_error(cond["context"], theirs[:1]) < 1e-5
    cond, uncond = sd.encode_both([texts[1]], "a cat", 64, 64)
    assert relative_error(cond["context"], theirs[1:]) < 1e-5
    assert relative_error(uncond["context"], theirs[:1]) < 1e-5
    assert [prompts.count_chunks(sd, [text]) for text in texts] == [1, 2]


def test_weighted_words(sd):
    """The vectors of the words in brackets are multiplied, and nothing else changes.

    Brackets and numbers are no tokens.
    """
    plain, = sd.encode_prompt(["a red, big apple"])["context"]
    factors = torch.ones(77)
    factors[[2, 3, 4]] = 1.3                                            # "red", ",", "big"
    factors[5] = 0.5                                                    # "apple"
    expected = plain * factors[:, None]
    found, = sd.encode_prompt(["a (red, big:1.3) (apple:.5)"])["context"]
    assert relative_error(found, expected) < 1e-5
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("prompt", [
    "a red apple", ") a red ] apple", ":1.3)", "a: b :c", ""])
def test_a_plain_prompt_is_the_single_chunk_it_was(sd, prompt):
    encoder = sd.text_encoders[0]
    features, pooled = encoder(encoder.tokenizer([prompt]))
    assert torch.equal(sd.encode_prompt([prompt])["context"], features)
    assert torch.equal(encoder.encode([prompt])["y"], pooled)


@pytest.mark.parametrize("prompt, pieces", [
    ("a (red:1.3) apple", [("a ", 1), ("red", 1.3), (" apple", 1)]),
    ("(a (red:2) apple:1.5)", [("a ", 1.5), ("red", 3), (" apple", 1.5)]),
    ("(a (dark) apple:2)", [("a ", 2), ("dark", 2.2), (" apple", 2)]),
    ("((red:1.3))", [("red", 1.43)]), ("((red))", [("red", 1.21)]), ("[red]", [("red", 1 / 1.1)]),
    ("[(a] b)", [("a", 1), (" b", 1.1)]), ("(a [b)", [("a ", 1.1), ("b", 1)]),
    ("a (b:1.2:-1.3) (c:+.5)d", [("a ", 1), ("b:1.2", -1.3), (" ", 1), ("c", 0.5), ("d", 1)]),
    ("(a:1.) (b: 1.2 ) c:2)", [("a ", 1), ("b", 1.2), (" c:2)", 1)]), ("(:1.3)", []),
    ("a (cat:1.3", [("a ", 1), ("cat:1.3", 1.1)]), ("(miku \\(v\\):1.2)", [("miku (v)", 1.2)]),
    ("\\[a\\] \\\\ \\b", [("[a] \\ b", 1)]), ("(a:1e1)", [("a:1e1", 1.1)]),
    ("a <lora:x:0.8> <lyco:y>b", [("a  b", 1)]), ("(a)(b)", [("ab", 1.1)]),
    (":) (a:2) :(", [(":) ", 1), ("a", 2), (" :", 1)]), ("", [])])
def test_grammar_of_a1111(prompt, pieces):
    """What its `parse_prompt_attention` makes of these; brackets multiply."""
    section, = prompts.parse(prompt)
    assert [piece.text for piece in section] == [text for text, _ in pieces]
    assert [piece.weight for piece in section] == pytest.approx([weight for _, weight in pieces])
    for piece in section:
        assert [prompt[place] for place in piece.places] == list(piece.text)
    spans = [prompt[start:stop] for start, stop, _ in prompts.weighted_spans(prompt)]
    assert "".join(spans) == "".join(text for text, _ in pieces)


def chunk_lengths(prompt: str) -> list[int]:
    return [len(chunk) for chunk in prompts.prompt_chunks(Tokenizer(), prompt)]


def test_break_begins_a_chunk(sd):
    assert chunk_lengths("a cat BREAK a big dog") == [2, 3]
    assert chunk_lengths("BREAK a") == [0, 1] and chunk_lengths("a BREAK") == [1]
    assert chunk_lengths("BREAKFAST break") == [2] and chunk_lengths("a\nBREAK\nb") == [1, 1]
    both = sd.encode_prompt(["a cat BREAK a big dog"])["context"]
    parts = [sd.encode_prompt([text])["context"] for text in ("a cat", "a big dog")]
    assert torch.allclose(both, torch.cat(parts, 1), atol=1e-6)


def test_a_chunk_ends_at_a_comma_that_is_near():
    """As in A1111: at most 20 tokens before the end of the chunk."""
    assert chunk_lengths("cat " * 80) == [75, 5]
    assert chunk_lengths("cat " * 60 + ", " + "cat " * 20) == [61, 20]
    assert chunk_lengths("cat " * 54 + ", " + "cat " * 30) == [75, 10]
    assert chunk_lengths("cat " * 75 + ", cat") == [75, 2]


def test_a_learned_word_stays_in_one_chunk():
    tokenizer = Tokenizer()
    add_word(tokenizer, "<cat>", list(range(49408, 49418)))
    assert [len(chunk) for chunk in prompts.prompt_chunks(tokenizer, "cat " * 70 + "<cat> a")] \
        == [70, 11]
    assert [len(chunk) for chunk in prompts.prompt_chunks(tokenizer, "<cat> <cat> <CAT>" + 45 *
                                                          " a" + " <Cat>")] == [75, 10]


def test_tokens_and_their_places_in_chunks():
    tokenizer = Tokenizer()
    found = prompts.places(tokenizer, "(a:1.2) cat BREAK dog \\(x\\)")
    assert [(place, token.text) for place, token in found] == [
        (1, "a</w>"), (2, "cat</w>"), (78, "dog</w>"), (79, "(</w>"), (80, "x</w>"), (81, ")</w>")]
    assert [token.word for _, token in found] == list(range(6))


@pytest.mark.parametrize("name", ["sd1", "sd2-base", "sdxl"])
def test_weights_near_1_turn_and_blow_up_nothing(name):
    """Of known vectors, each keeps its direction and has its weight's length."""
    sd = random_model(small(name))
    prompts.attach(sd)
    rng = random.Random(0)
    words = "masterpiece sky dress hat flower forest night city rain castle light".split()
    for _ in range(10):
        chosen = [(word, rng.choice([0.5, 0.8, 1, 1.1, 1.3, 1.5])) for word in words]
        plain = sd.encode_prompt([", ".join(word for word, _ in chosen)])["context"][0]
        found = sd.encode_prompt([", ".join(f"({word}:{weight})" for word, weight in chosen)])
        found = found["context"][0]
        assert torch.cosine_similarity(found, plain, dim=-1).min() > 0.9999
        ratio = found.norm(dim=-1) / plain.norm(dim=-1)
        assert ratio.min() > 0.499 and ratio.max() < 1.501
        assert torch.equal(found[0], plain[0])      # the start token


@pytest.mark.parametrize("prompt, said", [
    ("a cat AND a dog", "AND joins"), ("[cat:dog:0.5]", "changes the prompt"),
    ("[cat:0.5]", "changes the prompt"), ("[cat|dog]", "takes turns"), ("{red|blue}", "at random"),
    ("__animal__ x", "line of a file"), ("embedding:Easy", "ComfyUI"), ("a （red:1.3）", "wide"),
    ("(red:1,3)", "number such as"), ("(cat:1e1)", "number such as"),
    ("(a:1.2.3)", "number such as"),
    ("(time 12:30)", "a weight here"), ("(3:2)", "a weight here"), ("(cat:999)", "a weight here"),
    ("${x=a} b", "a variable"), ("a cat --ar 16:9", "Midjourney"), ("a::2 b", "Midjourney"),
    ("a (red:1.3", "no ) behind"), ("a (red:.5, big dog)", "no ) behind"),
    ("(red:-1)", "below 0"), ("(red: -.5 )", "below 0"),
    ("<hypernet:x:1>", "not supported and left out")])
def test_what_is_not_supported_is_told_in_one_line(prompt, said, sd):
    line, = prompts.unsupported(prompt)
    assert said in line and "\n" not in line
    with pytest.warns(UserWarning, match=re.escape(line)):
        sd.encode_prompt([prompt])


@pytest.mark.parametrize("prompt", [
    "a (red:1.3) apple", "a red apple, (big)", "hatsune miku \\(vocaloid\\)", "snake_case a__b",
    "a <lora:x:1>", "[dark]", "photo (f/1.8:1.1)", ":-) 12:30", "ANDROID", "a: b]"])
def test_nothing_is_said_of_the_rest(prompt):
    assert prompts.unsupported(prompt) == []


@pytest.mark.parametrize("prompt", ["(a:99999)", "(" * 80 + "a"])
def test_weights_out_of_range_are_refused(prompt):
    with pytest.raises(UserError, match="the weight .* in the prompt is out of range"):
        prompts.parse(prompt)


def test_clip_skip_takes_the_layer():
    """A1111's numbers: 1 is the last layer, whose norm follows."""
    sd = random_model(small("sd1"))
    encoder, tokens = sd.text_encoders[0], Tokenizer()(["a red apple"])
    for number in (1, 2, 3):
        prompts.set_clip_skip(sd, number)
        state = encoder.embeddings(tokens)
        for layer in encoder.encoder.layers[:3 - number + 1]:
            state = layer(state)
        assert torch.equal(encoder(tokens)[0], encoder.final_layer_norm(state))
    for number in (0, 4, -1):
        with pytest.raises(UserError, match="has the layers 1 to 3"):
            prompts.set_clip_skip(sd, number)
    sd = random_model(small("sdxl"))
    usual = sd.encode_prompt(["a"])["context"]
    prompts.set_clip_skip(sd, 2)
    assert torch.equal(sd.encode_prompt(["a"])["context"], usual)


# --- LoRAs in a prompt ---

@pytest.mark.parametrize("prompt, tags", [
    ("a <lora:x:0.8> <lyco:y>", [("x", 0.8, 0.8), ("y", 1, 1)]), ("a <lora:x", []),
    ("<lora:x:1:0.5>", [("x", 0.5, 1)]), ("<lora:x:te=0.2:unet=0.3>", [("x", 0.3, 0.2)]),
    ("<lora:a b (c):-1>", [("a b (c)", -1, -1)])])
def test_tags(prompt, tags):
    assert [tuple(tag) for tag in find_tags(prompt)] == tags


@pytest.mark.parametrize("prompt", ["<lora:x:big>", "<lora:x:1:2:3>", "<lora::1>", "<lora:x:nan>",
                                    "<lora:x:dyn=3>", "<lora: :1>"])
def test_tags_that_cannot_be_read_are_refused(prompt):
    with pytest.raises(UserError, match="write <lora:name:1>"):
        find_tags(prompt)


def test_files_of_tags(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in "pixel.safetensors", "sub/Art v2.safetensors", "a.pt", "sub/a.pt", "x.png":
        (tmp_path / name).touch()

    def file(name):
        return find_file(tmp_path, LoraTag(name, 1, 1)).relative_to(tmp_path).as_posix()

    assert file("pixel") == file("PIXEL") == file("pixel.safetensors") == "pixel.safetensors"
    assert file("Art v2") == "sub/Art v2.safetensors"
    for name, said in (("pixle", "did you mean pixel"), ("a", "may be"), ("x", "no file of that"),
                       ("../pixel", "no file of that"), (str(tmp_path / "pixel"), "no file")):
        with pytest.raises(UserError, match=said):
            file(name)
    with pytest.raises(UserError, match="name different LoRAs"):
        common_tags(["<lora:a:1>", "b"])


def test_lora_named_in_a_prompt_is_applied(tiny, tmp_path, capsys):  # noqa: F811
    lora = LoRA(StableDiffusion.load(tiny), 2)
    for pair in lora.layers.values():
        torch.nn.init.normal_(pair["lora_up"].weight)
    (tmp_path / "loras").mkdir()
    lora.save(tmp_path / "loras/pixel.safetensors")
    common = ["--ckpt", tiny, "--steps", 1, "--device", "cpu", "--out"]
    pictures = {}
    for name, prompt, more in (
            ("tag", "a cat <lora:pixel:0.8>", ["--lora-dir", tmp_path / "loras"]),
            ("none", "a cat <lora:pixel:0.8>", []),
            ("given", "a cat", ["--lora", f"{tmp_path}/loras/pixel.safetensors:8e-1"])):
        code, err, _ = run_cli(capsys, prompt, *common, tmp_path / f"{name}.png", *more)
        assert code == 0 and ("--lora-dir FOLDER" in err) == (name == "none")
        pictures[name] = array(tmp_path / f"{name}.png")
    assert (pictures["tag"] == pictures["given"]).all()
    assert not (pictures["tag"] == pictures["none"]).all()


# --- time and odd prompts ---

@pytest.mark.parametrize("unit", [
    "(", "[", ")", "]", "(a:1", "(a:1.1", ":1", "1", "\\", "<lora:", "<lora:a", "<", "a:", " ",
    "BREAK ", " BREAK", ": ", "(a:111", "[a:", "[a|", "{a|", "__", "__ ", "_", "a", "a ", ",",
    "(a)", "\n", "é", "（", ":1.1.", ":1)", "<a:b>", "AND ", "(:", "e1)", "[("])
@pytest.mark.parametrize("shape", ["{}", "({}", "(a:{}" + ")" * 1000])
def test_awkward_prompts_take_no_time(unit, shape):
    def read(prompt):
        prompts.unsupported(prompt)
        with contextlib.suppress(UserError):
            prompts.parse(prompt)
        with contextlib.suppress(UserError):
            find_tags(prompt)
    assert_linear(read, lambda length: shape.format(unit * (length // len(unit))))


def test_random_prompts_are_parsed_or_refused_in_one_line():
    rng = random.Random(0)
    parts = ["(", ")", "[", "]", ":", "1.3", ":1.2)", "cat", " ", "BREAK", "\\", ",", "<lora:a:1>",
             "<", ">", "AND", "|", "{", "}", "é", "猫", "\n", "__", "-", ".", "999999"]
    tokenizer = Tokenizer()
    for _ in range(300):
        prompt = "".join(rng.choice(parts) for _ in range(rng.randint(1, 30)))
        try:
            chunks = prompts.prompt_chunks(tokenizer, prompt)
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert all(len(chunk) <= 75 for chunk in chunks)
        for one in (one for chunk in chunks for one in chunk):
            assert prompt[one.token.span[0]:one.token.span[1]] != ""


def test_tokens_keep_their_place_in_the_prompt():
    prompt = "A (floofycat:1.3),  cat!!"
    found = prompts.weighted_tokens(Tokenizer(), prompt)
    words = {}
    for token, weight in found:
        words.setdefault(token.word, []).append((prompt[slice(*token.span)], weight))
    joined = ["".join(text for text, _ in word) for word in words.values()]
    assert joined == ["A", "floofycat", ",", "cat", "!!"] and list(words) == [0, 1, 2, 3, 4]
    assert {weight for _, weight in words[1]} == {1.3}
    assert {weight for i in (0, 2, 3, 4) for _, weight in words[i]} == {1.0}


def test_a_text_encoder_of_another_class_is_left_alone():
    class Other(torch.nn.Module):
        def encode(self, prompts: list[str]) -> dict:
            return {"context": torch.zeros(len(prompts), 77, 32)}

    sd = random_model()
    sd.text_encoders.append(Other())
    prompts.attach(sd)
    assert "encode" in vars(sd.text_encoders[0]) and "encode" not in vars(sd.text_encoders[1])
    assert prompts.count_chunks(sd, ["cat " * 100]) == 2
    sd.text_encoders = [Other()]
    assert prompts.count_chunks(sd, ["cat " * 100]) == 1
