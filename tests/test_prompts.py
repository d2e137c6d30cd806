"""Prompts of any length, and weights for words."""
import pytest
import torch

from clip import Tokenizer
from extras import prompts
from tests.common import SMALL, random_model, reference_text, reference_tokenizer, relative_error


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
    """The vectors of the words in brackets are multiplied, then all scaled to the mean they had.

    Brackets and numbers are no tokens.
    """
    plain, = sd.encode_prompt(["a red, big apple"])["context"]
    factors = torch.ones(77)
    factors[[2, 3, 4]] = 1.3                                            # "red", ",", "big"
    factors[5] = 0.5                                                    # "apple"
    expected = plain * factors[:, None]
    expected = expected * (plain.mean() / expected.mean())
    found, = sd.encode_prompt(["a (red, big:1.3) (apple:.5)"])["context"]
    assert relative_error(found, expected) < 1e-5
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("prompt", [
    "a red apple", "(a red apple)", "((red)) [apple]", "a (red: apple)", ":1.3)", ""])
def test_a_plain_prompt_is_the_single_chunk_it_was(sd, prompt):
    encoder = sd.text_encoders[0]
    features, pooled = encoder(encoder.tokenizer([prompt]))
    assert torch.equal(sd.encode_prompt([prompt])["context"], features)
    assert torch.equal(encoder.encode([prompt])["y"], pooled)


@pytest.mark.parametrize("prompt, pieces", [
    ("a (red:1.3) apple", [("a ", 1), ("red", 1.3), (" apple", 1)]),
    ("(a (red:2) apple:1.5)", [("a ", 1.5), ("red", 3), (" apple", 1.5)]),
    ("(a (dark) apple:2)", [("a (dark) apple", 2)]),
    ("((red:1.3))", [("(", 1), ("red", 1.3), (")", 1)]),
    ("a (b:1.2:-1.3) (c:+.5)d", [("a ", 1), ("b:1.2", -1.3), (" ", 1), ("c", 0.5), ("d", 1)]),
    ("(:1.3) (a:1.) (a) b:2)", [("(:1.3) (a:1.) (a) b:2)", 1)]),
    (":( (a:2) :)", [(":( ", 1), ("a", 2), (" :)", 1)]), ("", [])])
def test_brackets_with_a_number_give_weight(prompt, pieces):
    """Within one another they multiply; all other brackets and numbers are text."""
    found = [(prompt[start:stop], weight) for start, stop, weight in prompts.weighted_spans(prompt)]
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


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
