"""Chapter 3, words: a text into tokens, tokens into vectors, and vectors that know the words before them.

    tokens     a text is cut into pieces seen often enough to have a number        byte-pair encoding, Sennrich et al. 2016
    table      each number has a row of its own, x_i = table[id_i]                  near rows, like uses: Mikolov et al. 2013
    context    h_i <- h_i + sum over j <= i of a_ij v_j, layer after layer          Vaswani et al. 2017, equation 1, masked
The sum ends at i because GPT (Radford et al. 2018) learned to guess the next word and must not see it; BERT (Devlin et al. 2019) guesses words
blotted out and looks both ways. CLIP's text side learned neither, but to match pictures (contrastive.py); it kept GPT's mask, and what
Stable Diffusion is told about a prompt is its last h, a vector for every token: clip.py.

    python lecture/words.py
    python lecture/words.py --text "a bank by the river, a bank with money" --word dog night --ckpt v1-5-pruned-emaonly.safetensors
"""
import json
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from draw import UserError, beside, grid, run, save
from clip import Tokenizer
from sd import StableDiffusion

CAT, DOG = 2368, 1929
KINDS = {  # some words by meaning, to see whether the table's rows are sorted so too
    "colours": "red orange yellow green blue purple black white brown",
    "animals": "cat dog lion tiger horse cow pig goat camel elephant mouse rabbit panda fox wolf frog",
    "fruit": "apple banana grapes melon lemon peach cherries strawberry kiwi tomato pineapple mango",
    "vehicles": "car bus train truck taxi ambulance tractor bicycle helicopter rocket ship boat",
    "clothes": "shirt dress jeans coat socks shoe hat scarf gloves kimono",
}


# --- a text into tokens ---

def show_tokens(tokenizer: Tokenizer, text: str) -> None:
    """Each piece above its id; </w> ends a word, so `cat` of `cats` and the word `cat` are two tokens."""
    tokens = tokenizer.tokens(text)
    widths = [max(len(piece), 5) + 1 for _, piece in tokens]
    print(f"\n{text!r}: {len(tokens)} tokens")
    print("  " + "".join(f"{piece:<{w}}" for w, (_, piece) in zip(widths, tokens)))
    print("  " + "".join(f"{id:<{w}}" for w, (id, _) in zip(widths, tokens)))


def show_row(tokenizer: Tokenizer, text: str) -> None:
    """What the network reads: start, at most 75 tokens, end, and the end token again as padding."""
    print(f"\nthe row for {text!r}: {tokenizer(text)[0].tolist()[:12]} ... {tokenizer.length} long")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        row = tokenizer(text + 12 * (" " + text))[0].tolist()
    print(f"the same 13 times over: {caught[0].message if caught else 'fits'}; the row ends with {row[-3:]}")


# --- tokens into vectors ---

def known_words(sd: StableDiffusion) -> dict[str, int]:
    """The words of letters that are one token, with its id; of a model that tells its captions, only theirs: its other rows have not learned."""
    if "captions" in sd.metadata:
        pairs = {pair for caption in set(json.loads(sd.metadata["captions"])) for pair in sd.tokenizer.tokens(caption)}
    else:
        pairs = {(id, piece) for piece, id in sd.tokenizer.bpe.get_vocab().items()}
    return {piece.removesuffix("</w>"): id for id, piece in sorted(pairs) if piece.endswith("</w>") and piece[:-4].isalpha()}


def nearest(sd: StableDiffusion, words: dict[str, int], word: str, k: int = 7) -> list[tuple[str, float]]:
    """The k words whose rows have the greatest cosine with the row of `word`, greatest first."""
    ids, names, tokens = list(words.values()), list(words), sd.tokenizer.tokens(word)
    if len(tokens) != 1:
        raise UserError(f"--word {word!r} is {len(tokens)} tokens, {' '.join(piece for _, piece in tokens)}: give a word that is one, such as cat")
    if tokens[0][0] not in ids:
        why = "in none of the captions this model tells of, so its row means nothing" if "captions" in sd.metadata else "not made of letters"
        raise UserError(f"--word {word!r} is {why}: give another, such as {', '.join([name for name in names if len(name) > 2][:5])}")
    rows = F.normalize(sd.text.embeddings.token_embedding.weight[ids], dim=1)
    near = rows @ rows[ids.index(tokens[0][0])]
    return [(names[i], float(near[i])) for i in near.argsort(descending=True) if ids[i] != tokens[0][0]][:k]


def sorted_by_meaning(sd: StableDiffusion, words: dict[str, int]) -> tuple[float, float]:
    """Of the words in KINDS, the share whose nearest other one is of the same kind, and the share that chance would give."""
    found = [(kind, words[w]) for kind, members in KINDS.items() for w in members.split() if w in words]
    if len(found) < 2:
        return math.nan, math.nan
    ids, kinds = [id for _, id in found], np.array([kind for kind, _ in found])
    rows, same = F.normalize(sd.text.embeddings.token_embedding.weight[ids], dim=1), kinds[:, None] == kinds
    best = (rows @ rows.T).fill_diagonal_(-2).argmax(1).numpy()
    return float(same[np.arange(len(ids)), best].mean()), float((same.sum(1) - 1).mean() / (len(ids) - 1))


# --- vectors in context ---

def layers(sd: StableDiffusion, tokens: Tensor) -> dict[str, Tensor]:
    """The vectors (T, D) of a row of tokens (1, T): from the table, with the place added, after each layer, and normalised at the end."""
    h = sd.text.embeddings(tokens)
    states = {"table": sd.text.embeddings.token_embedding(tokens)[0], "+ place": h[0]}
    for i, layer in enumerate(sd.text.encoder.layers):
        h = layer(h)
        states[f"layer {i + 1}"] = h[0]
    return states | {"out": sd.text.final_layer_norm(h)[0]}


def cosines(h: Tensor) -> np.ndarray:
    """All pairs of rows of h (T, D): (T, T)."""
    h = F.normalize(h, dim=1)
    return (h @ h.T).numpy()


def compare(sd: StableDiffusion, one: str, other: str, word: str) -> None:
    """The same word at the same place of two texts."""
    ids = [id for id, _ in sd.tokenizer.tokens(one)]
    place = 1 + ids.index(sd.tokenizer.tokens(word)[0][0])
    a, b = (sd.text(sd.tokenizer(text))[0, place] for text in (one, other))
    verdict = "equal bit for bit" if torch.equal(a, b) else f"{100 * float((a - b).norm() / a.norm()):.1f}% of its length apart"
    print(f"  {word!r} in {one!r} and in {other!r}: {verdict}")


def effect_of_edits(sd: StableDiffusion, tokens: Tensor, n: int) -> np.ndarray:
    """Entry i, j: how far the vector at place j moves, as a share of its length, when the i-th of n words gives way to `cat`. NaN: not by a bit."""
    before, moved = sd.text(tokens)[0], np.full((n, n + 2), np.nan)
    for i in range(n):
        edited = tokens.clone()
        edited[0, 1 + i] = CAT if tokens[0, 1 + i] != CAT else DOG
        after = sd.text(edited)[0]
        for j in range(n + 2):
            if not torch.equal(before[j], after[j]):
                moved[i, j] = (after[j] - before[j]).norm() / before[j].norm()
    return moved


@torch.no_grad()
def main(args):
    torch.set_num_threads(2)
    sd = StableDiffusion.load(args.ckpt, "cpu", torch.float32)
    ids, pieces = [id for id, _ in sd.tokenizer.tokens(args.text)], [piece.removesuffix("</w>") for _, piece in sd.tokenizer.tokens(args.text)]
    n = len(ids)
    if not 2 <= n <= 20:
        raise UserError(f"--text is {n} tokens long: the picture has room for 2 to 20")
    words = known_words(sd)
    neighbours = {word: nearest(sd, words, word) for word in args.word}

    for text in dict.fromkeys(["I love cats and dogs .", args.text, "Schrödinger's unphotographable catfish, 1935"]):
        show_tokens(sd.tokenizer, text)
    show_row(sd.tokenizer, "I love cats and dogs .")

    table = sd.text.embeddings.token_embedding.weight
    print(f"\nthe table has {len(table):,} rows of {table.shape[1]} numbers. Looked at here: {len(words):,} of them, " +
          ("the words of this model's captions" if "captions" in sd.metadata else "all that are a word"))
    for word, best in neighbours.items():
        print(f"  nearest to {word}: " + ", ".join(f"{other} {cosine:.2f}" for other, cosine in best))
    share, chance = sorted_by_meaning(sd, words)
    print(f"  of words of {len(KINDS)} kinds ({', '.join(KINDS)}), {share:.0%} have one of their own kind nearest; by chance {chance:.0%}")

    tokens = sd.tokenizer(args.text)[:, :n + 2]  # the padding comes after, so it can be left out
    states = layers(sd, tokens)
    twins = [(i, j) for i in range(n) for j in range(i + 1, n) if ids[i] == ids[j]]
    for i, j in twins:
        print(f"\n{pieces[i]!r} at places {i + 1} and {j + 1}, the cosine of its two vectors:")
        print("  " + ", ".join(f"{name} {cosines(h)[1 + i, 1 + j]:.2f}" for name, h in states.items()))
    print("\nthe place has a share in that; with the place the same, the words before still count, and the words after do not:")
    compare(sd, "I book a table", "a book of tables", "book")
    compare(sd, "book a table", "book of tables", "book")

    moved = effect_of_edits(sd, tokens, n)
    print(f"each of {n} words replaced by 'cat' in turn: {int(np.isnan(moved).sum())} of {moved.size} vectors stay equal bit for bit, "
          f"of which {int(np.isnan(moved)[np.tri(n, n + 2, dtype=bool)].sum())} stand before the edit")
    cell, mark = max(12, min(28, 750 // (3 * n + 2))), [pair for i, j in twins for pair in ((i, j), (j, i))]
    save(beside([
        grid(cosines(states["table"])[1:-1, 1:-1], pieces, pieces, "cosines, from the table", cell, high=1, mark=mark),
        grid(cosines(states["out"])[1:-1, 1:-1], pieces, [""] * n, "cosines, after the last layer", cell, high=1, mark=mark),
        grid(moved, ["start", *pieces, "end"], [f"{piece} > cat" for piece in pieces], "moved by an edit (white: not a bit)", cell, low=0)],
        "a word has one row in the table (framed: a word that comes twice), but a vector of its own at every place"), args.out / "words.png")


if __name__ == "__main__":
    run(main, __doc__, text=dict(default="I book a ticket to buy that book", help="2 to 20 tokens; best with a word in it twice"),
        word=dict(nargs="+", default=["dog", "green"], help="to find the nearest words of (default dog green)"),
        ckpt=dict(help="an SD 1.x .safetensors or .ckpt, or a file of train.py; default: the built-in model"))
