"""Words learned by textual inversion, against diffusers. No downloads."""
import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clip import CLIPTextModel, Tokenizer
from extras import prompts
from extras.formats import save
from extras.textual_inversion import add_embedding, add_embeddings, add_word
from sd import StableDiffusion, UserError
from tests.command import run_cli
from tests.common import assert_agree, our_picture, psnr, random_model, small, their_picture
from tests.test_lora import NEGATIVE, SETTINGS, copies, copy_model
from tests.training import tiny  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers'


def picture_by_diffusers(pipe, prompt: str, guidance: float):
    return their_picture(pipe, prompt, negative_prompt=NEGATIVE, num_inference_steps=4,
                         guidance_scale=guidance, height=64, width=64)


def tokenizer_of(sd: StableDiffusion) -> Tokenizer:
    return sd.text_encoders[0].tokenizer


@pytest.mark.parametrize("vectors", [1, 3])
def test_learned_word_draws_what_diffusers_draws(vectors, tmp_path):
    sd, pipe = copies("sd1")
    pipe.tokenizer = deepcopy(pipe.tokenizer)  # it gets a word
    learned = torch.randn(vectors, 32)
    file = tmp_path / "learned_embeds.bin"
    torch.save({"<my-cat>": learned if vectors > 1 else learned[0]}, file)
    prompt = "a photo of <my-cat>, on a <my-cat> mat"
    before = our_picture(sd, prompt, **SETTINGS)[0]
    assert add_embedding(sd, file) == ["<my-cat>"]
    assert psnr(our_picture(sd, prompt, **SETTINGS)[0], before) < 45
    pipe.load_textual_inversion(str(file))
    assert_agree(our_picture(sd, prompt, **SETTINGS), picture_by_diffusers(pipe, prompt, 7.5), 80)


def test_two_encoders_learn_each_their_own(tmp_path):
    """SDXL's files hold clip_l and clip_g, and the word is the file's name."""
    sd, pipe = copies("sdxl")
    pipe.tokenizer, pipe.tokenizer_2 = deepcopy((pipe.tokenizer, pipe.tokenizer_2))
    state = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(state, tmp_path / "mycat.safetensors")
    assert add_embedding(sd, tmp_path / "mycat.safetensors") == ["mycat", "mycat"]
    pipe.load_textual_inversion(state["clip_l"], token="mycat", text_encoder=pipe.text_encoder,
                                tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(state["clip_g"], token="mycat", text_encoder=pipe.text_encoder_2,
                                tokenizer=pipe.tokenizer_2)
    prompt = "a mycat on a mat"
    assert_agree(our_picture(sd, prompt, **SETTINGS), picture_by_diffusers(pipe, prompt, 5.0), 80)


def test_the_word_in_the_metadata_counts(tmp_path):
    """train.py leaves out of the file's name what Windows does not take."""
    sd = copy_model("sdxl")
    state = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(state, tmp_path / "cat-toy.safetensors", {"word": "<cat-toy>"})
    assert add_embedding(sd, tmp_path / "cat-toy.safetensors") == ["<cat-toy>", "<cat-toy>"]


def test_a_learned_word_is_found_alone_only_and_not_in_others_tokenizers(tmp_path):
    sd = copy_model("sd1")
    other = tokenizer_of(StableDiffusion(small("sd1")))
    # as A1111 writes it
    torch.save({"string_to_param": {"*": torch.randn(2, 32)}, "name": "zyxcat"},
               tmp_path / "zyxcat.pt")
    plain = other("a zyxcats photo")
    add_embedding(sd, tmp_path / "zyxcat.pt")
    ids = tokenizer_of(sd)("a zyxcat photo")[0, :6]
    assert ids.tolist() == [49406, 320, 49408, 49409, 1125, 49407]
    assert torch.equal(tokenizer_of(sd)("a zyxcats photo"), plain)
    new = tokenizer_of(StableDiffusion(small("sd1")))
    assert torch.equal(other("a zyxcat photo"), new("a zyxcat photo"))
    assert 49408 not in other("a zyxcat photo")


def test_the_tokens_of_a_learned_word():
    """One for each vector, all with the word's place in the prompt."""
    tokenizer = Tokenizer()
    add_word(tokenizer, "<my-cat>", [49408, 49409])
    tokens = tokenizer.tokenize("a <my-cat> photo")
    assert [token.id for token in tokens] == [320, 49408, 49409, 1125]
    assert [token.span for token in tokens] == [(0, 1), (2, 10), (2, 10), (11, 16)]
    assert tokens[0].word < tokens[1].word == tokens[2].word < tokens[3].word


def test_two_learned_words():
    """Each has its own rows, in the order in which they came."""
    sd = copy_model("sd1")
    encoder, rows = sd.text_encoders[0], torch.randn(3, 32)
    add_word(encoder.tokenizer, "<one>", add_embeddings(encoder, rows[:2]))
    add_word(encoder.tokenizer, "<two>", add_embeddings(encoder, rows[2:]))
    tokens = encoder.tokenizer("<two> a <one>")
    assert tokens[0, 1:5].tolist() == [49410, 320, 49408, 49409]
    found = encoder.embeddings.token_embedding(tokens)[0]
    assert torch.equal(found[1], rows[2]) and torch.equal(found[3:5], rows[:2])
    assert torch.equal(found[2], encoder.embeddings.token_embedding.weight[320])


def test_learned_words_go_with_weights_and_long_prompts(tmp_path):
    sd = copy_model("sd1")
    prompts.attach(sd)
    torch.save({"<my-cat>": torch.randn(2, 32)}, tmp_path / "w.bin")
    texts = ["a (<my-cat>:1.3) " + 80 * "photo "]
    before = sd.encode_prompt(texts)["context"]
    add_embedding(sd, tmp_path / "w.bin")
    after = sd.encode_prompt(texts)["context"]
    assert before.shape == after.shape == (1, 154, 32) and not torch.allclose(before, after)


def test_a_learned_word_is_not_in_a_saved_folder(tmp_path):
    """Whose token table has no row for it."""
    sd = copy_model("sd1")
    torch.save({"<my-cat>": torch.randn(2, 32)}, tmp_path / "w.bin")
    add_embedding(sd, tmp_path / "w.bin")
    save(sd, tmp_path / "folder")
    vocab = json.loads((tmp_path / "folder/tokenizer/vocab.json").read_text("utf-8"))
    assert max(vocab.values()) == 49407


def test_learned_rows_are_trained_and_are_no_weights_of_the_encoder():
    """A parameter gets gradients; state dict, parameters and copies of the encoder are right."""
    encoder = random_model(small("sd1")).text_encoders[0]
    names = encoder.state_dict().keys()
    vectors = nn.Parameter(torch.randn(2, 32))
    add_word(encoder.tokenizer, "<my-cat>", add_embeddings(encoder, vectors))
    encoder.encode(["a <my-cat>"])["context"].square().mean().backward()
    assert vectors.grad.abs().min() > 0
    assert encoder.state_dict().keys() == names
    assert all(p is not vectors for p in encoder.parameters())
    copied = deepcopy(encoder)
    with torch.no_grad():
        before = copied.encode(["a <my-cat>"])["context"]
        vectors.zero_()  # as an optimizer does, in place
        assert torch.equal(copied.encode(["a <my-cat>"])["context"], before)
        assert not torch.equal(encoder.encode(["a <my-cat>"])["context"], before)
        encoder.half()
        assert encoder.encode(["a <my-cat>"])["context"].dtype == torch.float16


def test_pickles_with_a_parameter_dict_are_read(tmp_path):
    """A1111's first files and those of the paper's code."""
    vectors = nn.Parameter(torch.randn(2, 32))
    stored = {"string_to_token": {"*": torch.tensor(265)},
              "string_to_param": nn.ParameterDict({"*": vectors})}
    file = tmp_path / "zyxcat.pt"
    torch.save(stored, file)
    sd = copy_model("sd1")
    assert add_embedding(sd, file) == ["zyxcat"]
    table = sd.text_encoders[0].embeddings.token_embedding
    assert torch.equal(table(torch.tensor([49408, 49409])), vectors)


@pytest.mark.parametrize("keys", [("text_encoders_0", "text_encoders_1"), ("clip_g", "clip_l")])
def test_names_of_encoders(keys, tmp_path):
    widths = {"text_encoders_0": 32, "clip_l": 32, "text_encoders_1": 48, "clip_g": 48}
    save_file({key: torch.randn(2, widths[key]) for key in keys}, tmp_path / "mycat.safetensors")
    sd = copy_model("sdxl")
    assert add_embedding(sd, tmp_path / "mycat.safetensors") == ["mycat", "mycat"]
    save_file({key: torch.randn(2, 80 - widths[key]) for key in keys}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="another family of models"):
        add_embedding(copy_model("sdxl"), tmp_path / "x.safetensors")


def test_a_word_is_found_in_any_case(tmp_path):
    save_file({"EasyNegative": torch.randn(1, 32)}, tmp_path / "x.safetensors")
    sd = copy_model("sd1")
    add_embedding(sd, tmp_path / "x.safetensors")
    for prompt in ("a EasyNegative", "a easynegative", "A EASYNEGATIVE"):
        tokens = tokenizer_of(sd).tokenize(prompt)
        assert [token.id for token in tokens] == [320, 49408]
        assert tokens[1].span == (2, 14)


def test_one_line_tells_the_words_and_whether_the_prompt_has_one(
    tiny, tmp_path, capsys  # noqa: F811
):
    save_file({"<zz>": torch.randn(2, 32)}, tmp_path / "w.safetensors")
    for prompt, said in (("a <ZZ>", "which the prompt has"), ("a cat", "has none of them")):
        code, err, _ = run_cli(capsys, prompt, "--ckpt", tiny, "--embedding",
                               tmp_path / "w.safetensors", "--steps", 1, "--device", "cpu", "--out",
                               tmp_path / "o.png")
        line, = [line for line in err.split("\n") if "brings" in line]
        assert code == 0 and "w.safetensors brings <zz>" in line and said in line


# --- what is refused ---

@pytest.mark.parametrize("tensor, said", [
    (torch.ones(76, 32), "1 to 75 vectors"), (torch.ones(0, 32), "1 to 75 vectors"),
    (torch.ones(2, 2, 32), "1 to 75 vectors"), (torch.tensor(1.0), "1 to 75 vectors"),
    (torch.full((1, 32), float("nan")), "NaN or infinity in '<x>'")])
def test_vectors_that_are_none_are_refused(tensor, said, tmp_path):
    save_file({"<x>": tensor}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        add_embedding(copy_model("sd1"), tmp_path / "x.safetensors")



def test_a_word_for_one_of_two_encoders_is_refused(tmp_path):
    """As one of SD 1.x is, whose width SDXL's first encoder has."""
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "zyxcat.safetensors")
    sd = copy_model("sdxl")
    said = "another family of models: it has vectors for 1 of 2 text encoders"
    with pytest.raises(UserError, match=said):
        add_embedding(sd, tmp_path / "zyxcat.safetensors")
    # the model stays as it was
    assert type(sd.text_encoders[0].embeddings.token_embedding) is nn.Embedding
    assert "zyxcat" not in tokenizer_of(sd).bpe.get_vocab()


@pytest.mark.parametrize("state, name, said", [
    ({"<x>": torch.ones(1, 33)}, "x.safetensors",
     "another family of models: its vectors are 33 wide, here 32"),
    ({"emb_params": torch.ones(1, 32)}, "cat.safetensors", "'cat' is in the vocabulary already"),
])
def test_words_that_do_not_fit_are_refused(state, name, said, tmp_path):
    save_file(state, tmp_path / name)
    with pytest.raises(UserError, match=said):
        add_embedding(copy_model("sd1"), tmp_path / name)


def test_other_text_encoders_are_refused(tmp_path):
    class OtherTokenizer(Tokenizer):
        pass

    save_file({"<x>": torch.ones(1, 32)}, tmp_path / "x.safetensors")
    sd = copy_model("sd1")
    sd.text_encoders[0].tokenizer = OtherTokenizer()
    with pytest.raises(UserError, match="tokenizer of clip.py, and this model has OtherTokenizer"):
        add_embedding(sd, tmp_path / "x.safetensors")
    sd.text_encoders[0] = nn.Linear(2, 2)
    with pytest.raises(UserError, match="text encoder of clip.py, and this model has Linear"):
        add_embedding(sd, tmp_path / "x.safetensors")
    assert not isinstance(sd.text_encoders[0], CLIPTextModel)
