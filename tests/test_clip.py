"""The tokenizer and the text encoder. At full size against transformers: test_sd.py."""
import warnings

import pytest
import torch

from clip import BOS, EOS, Tokenizer
from tests.common import awkward_prompts, reference_tokenizer, small_pair


@pytest.mark.filterwarnings("ignore:the prompt has")
def test_ids_match_transformers():
    """377 awkward prompts, padded with the end token to 77 and cut to 77."""
    prompts = awkward_prompts()
    ours = Tokenizer()(prompts).tolist()
    theirs = reference_tokenizer()(prompts, padding="max_length", max_length=77, truncation=True)
    different = {prompt: (a, b) for prompt, a, b in zip(prompts, ours, theirs.input_ids) if a != b}
    assert different == {}


def test_known_ids():
    tokenizer = Tokenizer()
    known = [49406, 328, 793, 3989, 537, 3255, 269, 49407]
    assert tokenizer("I love cats and dogs.")[0, :8].tolist() == known
    assert tokenizer("").tolist() == [[49406] + [49407] * 76]
    assert [token.id for token in tokenizer.tokenize("4k !")] == [275, 330, 256]
    assert tokenizer(["a", "b", "c"]).shape == (3, 77)
    assert tokenizer([]).shape == (0, 77)
    assert Tokenizer(pad=0, length=5)("a cat").tolist() == [[BOS, 320, 2368, EOS, 0]]


def test_tokens_know_where_they_stand():
    prompt = "Two xylographs!"
    tokens = Tokenizer().tokenize(prompt)
    assert [token.text for token in tokens] == ["two</w>", "xy", "lo", "graphs</w>", "!</w>"]
    pieces = [prompt[slice(*token.span)] for token in tokens]
    assert pieces == ["Two", "xy", "lo", "graphs", "!"]
    assert [token.word for token in tokens] == [0, 1, 1, 1, 2]


def test_a_cut_prompt_keeps_its_end_and_warns():
    """The warning holds the words that are cut off."""
    with pytest.warns(UserWarning) as record:
        ids = Tokenizer()("cat " * 75 + "and two Dogs, café")[0]
    assert ids[75] == 2368 and ids[76] == 49407
    assert len(record) == 1 and "'and two Dogs, café'" in str(record[0].message)
    with warnings.catch_warnings(action="error"):
        Tokenizer()("cat " * 75)


def test_text_is_causal():
    """A later word leaves the vectors of earlier ones equal to the bit, and changes its own."""
    sd, _ = small_pair()
    a, b = sd.encode_prompt(["I book a ticket to buy that book",
                             "I book a ticket to buy that car"])["context"]
    assert torch.equal(a[:8], b[:8]) and not torch.allclose(a[8], b[8])  # start and seven words
    assert not torch.allclose(a[2], a[8])  # "book" twice: one row of the table, two vectors


def test_half_a_character_is_named():
    with pytest.raises(UnicodeEncodeError, match=r"'\\ud800' in position 2"):
        Tokenizer()(["a cat", "a \ud800 cat"])
