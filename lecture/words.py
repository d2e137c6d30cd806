"""Chapter 3, words: a text becomes tokens, tokens become vectors, and vectors learn their context.

    tokens     a text is cut into frequent pieces, each with    byte-pair encoding,
               a number                                         Sennrich et al. 2016
    table      each number has a row, x_i = table[id_i]         near rows are used alike:
                                                                Mikolov et al. 2013
    context    h_i <- h_i + sum over j <= i of a_ij v_j,        Vaswani et al. 2017, equation 1,
               layer after layer                                with a mask
The sum ends at i because GPT (Radford et al. 2018) learned to guess the next word and must not see
it. BERT (Devlin et al. 2019) guesses hidden words and looks both ways. CLIP's text encoder learned
neither: it learned to match pictures (contrastive.py). It kept GPT's mask. Stable Diffusion gets
its last h, one vector per token, as the prompt: clip.py.

    python lecture/words.py
    python lecture/words.py --text "a bank by the river, a bank with money" --word dog night \\
        --ckpt v1-5-pruned-emaonly.safetensors
"""
import json
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from draw import UserError, beside, grid, run, save
from PIL import Image
from torch import Tensor

from clip import Tokenizer
from sd import StableDiffusion

CAT, DOG = 2368, 1929
EXAMPLE = "I love cats and dogs ."
KINDS = {  # some words by meaning, to see whether the rows of the table are sorted like them
    "colours": "red orange yellow green blue purple black white brown",
    "animals": "cat dog lion tiger horse cow pig goat camel elephant mouse rabbit panda fox wolf"
               " frog",
    "fruit": "apple banana grapes melon lemon peach cherries strawberry kiwi tomato pineapple"
             " mango",
    "vehicles": "car bus train truck taxi ambulance tractor bicycle helicopter rocket ship boat",
    "clothes": "shirt dress jeans coat socks shoe hat scarf gloves kimono",
}


# --- a text into tokens ---

def show_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Print each piece above its id.

    </w> ends a word. So the `cat` of `cats` and the word `cat` are two different tokens.
    """
    tokens = tokenizer.tokenize(text)
    widths = [max(len(token.text), 5) + 1 for token in tokens]
    print(f"\n{text!r}: {len(tokens)} tokens")
    print("  " + "".join(f"{token.text:<{w}}" for w, token in zip(widths, tokens)))
    print("  " + "".join(f"{token.id:<{w}}" for w, token in zip(widths, tokens)))


def show_row(tokenizer: Tokenizer, text: str) -> None:
    """Print what the network reads: start, at most 75 tokens, end, and end tokens as padding."""
    row = tokenizer(text)[0].tolist()
    print(f"\nthe row of {text!r}: {row[:12]} ... {tokenizer.length} long")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = tokenizer(text + 12 * (" " + text))[0].tolist()
    message = caught[0].message if caught else "it fits"
    print(f"the same text 13 times: {message}; the row ends with {row[-3:]}")


# --- tokens into vectors ---

def table_of(sd: StableDiffusion) -> Tensor:
    """The token table (49408, D)."""
    return sd.text_encoders[0].embeddings.token_embedding.weight


def known_words(sd: StableDiffusion) -> dict[str, int]:
    """The words of letters that are one token, and their ids.

    If the model lists its captions, only the words in them: its other rows were never trained.
    """
    tokenizer = sd.text_encoders[0].tokenizer
    if "captions" in sd.metadata:
        captions = set(json.loads(sd.metadata["captions"]))
        pairs = {(token.id, token.text) for caption in captions
                 for token in tokenizer.tokenize(caption)}
    else:
        pairs = {(id, piece) for piece, id in tokenizer.bpe.get_vocab().items()}
    return {piece.removesuffix("</w>"): id for id, piece in sorted(pairs)
            if piece.endswith("</w>") and piece[:-4].isalpha()}


def nearest(sd: StableDiffusion, words: dict[str, int], word: str,
            k: int = 7) -> list[tuple[str, float]]:
    """The k words whose rows have the largest cosine with the row of `word`, largest first.

    Raises UserError for a word that is several tokens, or none of `words`.
    """
    ids, names = list(words.values()), list(words)
    tokens = sd.text_encoders[0].tokenizer.tokenize(word)
    if len(tokens) != 1:
        pieces = " ".join(token.text for token in tokens)
        raise UserError(f"--word {word!r} is {len(tokens)} tokens, {pieces}: give a word that is"
                        " one, such as cat")
    own = tokens[0].id
    if own not in ids:
        why = "not made of letters"
        if "captions" in sd.metadata:
            why = "in none of the captions that this model lists, so its row was never trained"
        some = [name for name in names if len(name) > 2][:5]
        raise UserError(f"--word {word!r} is {why}: give another, such as {', '.join(some)}")
    rows = F.normalize(table_of(sd)[ids], dim=1)
    near = rows @ rows[ids.index(own)]
    order = near.argsort(descending=True).tolist()
    return [(names[i], float(near[i])) for i in order if ids[i] != own][:k]


def sorted_by_meaning(sd: StableDiffusion, words: dict[str, int]) -> tuple[float, float]:
    """Of the words in KINDS, the share whose nearest other word is of the same kind; and chance's.

    Both are NaN if fewer than two of the words are known.
    """
    found = [(kind, words[word]) for kind, members in KINDS.items()
             for word in members.split() if word in words]
    if len(found) < 2:
        return math.nan, math.nan
    ids, kinds = [id for _, id in found], np.array([kind for kind, _ in found])
    rows, same = F.normalize(table_of(sd)[ids], dim=1), kinds[:, None] == kinds
    best = (rows @ rows.T).fill_diagonal_(-2).argmax(1).numpy()
    share = same[np.arange(len(ids)), best].mean()
    chance = (same.sum(1) - 1).mean() / (len(ids) - 1)
    return float(share), float(chance)


# --- vectors in context ---

def layers(sd: StableDiffusion, tokens: Tensor) -> dict[str, Tensor]:
    """The vectors (T, D) of a row of tokens (1, T) at every stage.

    The stages: from the table, plus the position, after each layer, and normalised at the end.
    """
    text = sd.text_encoders[0]
    h = text.embeddings(tokens)
    states = {"table": text.embeddings.token_embedding(tokens)[0], "+ position": h[0]}
    for i, layer in enumerate(text.encoder.layers):
        h = layer(h)
        states[f"layer {i + 1}"] = h[0]
    return states | {"out": text.final_layer_norm(h)[0]}


def encode(sd: StableDiffusion, tokens: Tensor) -> Tensor:
    """Tokens (1, T) -> their vectors in context (T, D)."""
    features, _ = sd.text_encoders[0](tokens)
    return features[0]


def cosines(h: Tensor) -> np.ndarray:
    """All pairs of rows of h (T, D): (T, T)."""
    h = F.normalize(h, dim=1)
    return (h @ h.T).numpy()


def compare(sd: StableDiffusion, one: str, other: str, word: str) -> None:
    """The same word at the same position of two texts."""
    tokenizer = sd.text_encoders[0].tokenizer
    ids = [token.id for token in tokenizer.tokenize(one)]
    position = 1 + ids.index(tokenizer.tokenize(word)[0].id)
    a, b = (encode(sd, tokenizer(text))[position] for text in (one, other))
    verdict = "bitwise equal"
    if not torch.equal(a, b):
        verdict = f"{100 * float((a - b).norm() / a.norm()):.1f}% of its length apart"
    print(f"  {word!r} in {one!r} and in {other!r}: {verdict}")


def effect_of_edits(sd: StableDiffusion, tokens: Tensor, n: int) -> np.ndarray:
    """How far each vector moves when one of the n tokens is replaced by `cat`: (n, n + 2).

    Entry i, j is the distance that vector j moves when token i is replaced, as a share of its
    length. NaN: vector j stays bitwise equal.
    """
    before, moved = encode(sd, tokens), np.full((n, n + 2), np.nan)
    for i in range(n):
        edited = tokens.clone()
        edited[0, 1 + i] = CAT if tokens[0, 1 + i] != CAT else DOG
        after = encode(sd, edited)
        for j in range(n + 2):
            if not torch.equal(before[j], after[j]):
                moved[i, j] = (after[j] - before[j]).norm() / before[j].norm()
    return moved


# --- what is shown ---

def show_table(sd: StableDiffusion, words: dict[str, int],
               neighbours: dict[str, list[tuple[str, float]]]) -> None:
    table = table_of(sd)
    which = "all that are a word"
    if "captions" in sd.metadata:
        which = "the words of this model's captions"
    print(f"\nthe table has {len(table):,} rows of {table.shape[1]} numbers. Looked at here:"
          f" {len(words):,} of them, {which}")
    for word, best in neighbours.items():
        listed = ", ".join(f"{other} {cosine:.2f}" for other, cosine in best)
        print(f"  nearest to {word}: {listed}")
    share, chance = sorted_by_meaning(sd, words)
    print(f"  of the words of {len(KINDS)} kinds ({', '.join(KINDS)}), {share:.0%} have a word of"
          f" their own kind nearest; by chance {chance:.0%}")


def show_context(sd: StableDiffusion, text: str) -> Image.Image:
    """The vectors of a text, before and after the encoder, as three matrices."""
    tokenizer = sd.text_encoders[0].tokenizer
    ids = [token.id for token in tokenizer.tokenize(text)]
    pieces = [token.text.removesuffix("</w>") for token in tokenizer.tokenize(text)]
    n = len(ids)
    tokens = tokenizer(text)[:, :n + 2]  # padding comes later, so nothing here depends on it
    states = layers(sd, tokens)
    twins = [(i, j) for i in range(n) for j in range(i + 1, n) if ids[i] == ids[j]]
    for i, j in twins:
        print(f"\n{pieces[i]!r} at positions {i + 1} and {j + 1}, the cosine of its two vectors:")
        print("  " + ", ".join(f"{name} {cosines(h)[1 + i, 1 + j]:.2f}"
                               for name, h in states.items()))
    print("\nthe position has a part in that; at the same position, the words before still count,"
          " and the words after do not:")
    compare(sd, "I book a table", "a book of tables", "book")
    compare(sd, "book a table", "book of tables", "book")

    moved = effect_of_edits(sd, tokens, n)
    equal = np.isnan(moved)
    before = equal[np.tri(n, n + 2, dtype=bool)]
    print(f"each of {n} tokens replaced by 'cat' in turn: {int(equal.sum())} of {moved.size}"
          f" vectors stay bitwise equal; {int(before.sum())} of these stand before the edit")
    cell = max(12, min(28, 750 // (3 * n + 2)))
    mark = [pair for i, j in twins for pair in ((i, j), (j, i))]
    inner = {name: cosines(states[name])[1:-1, 1:-1] for name in ("table", "out")}
    return beside([
        grid(inner["table"], pieces, pieces, "cosines, from the table", cell, high=1, mark=mark),
        grid(inner["out"], pieces, [""] * n, "cosines, after the last layer", cell, high=1,
             mark=mark),
        grid(moved, ["start", *pieces, "end"], [f"{piece} > cat" for piece in pieces],
             "moved by an edit (white: not at all)", cell, low=0)],
        "a word has one row in the table (framed: a repeated word), but a vector of its own at"
        " every position")


@torch.no_grad()
def main(args) -> None:
    torch.set_num_threads(2)
    sd = StableDiffusion.load(args.ckpt, "cpu", torch.float32)
    tokenizer = sd.text_encoders[0].tokenizer
    n = len(tokenizer.tokenize(args.text))
    if not 2 <= n <= 20:
        raise UserError(f"--text is {n} tokens long: the picture has room for 2 to 20")
    words = known_words(sd)
    neighbours = {word: nearest(sd, words, word) for word in args.word}

    texts = [EXAMPLE, args.text, "Schrödinger's unphotographable catfish, 1935"]
    for text in dict.fromkeys(texts):
        show_tokens(tokenizer, text)
    show_row(tokenizer, EXAMPLE)
    show_table(sd, words, neighbours)
    save(show_context(sd, args.text), args.out / "words.png")


if __name__ == "__main__":
    run(main, __doc__,
        text=dict(default="I book a ticket to buy that book",
                  help="2 to 20 tokens; best with a repeated word"),
        word=dict(nargs="+", default=["dog", "green"],
                  help="words whose nearest words are shown (default dog green)"),
        ckpt=dict(help="an SD 1.x .safetensors or .ckpt, or a file of train.py; default: the"
                       " built-in model"))
