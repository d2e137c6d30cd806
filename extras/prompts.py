"""Prompts of any length, and weights for their words: "a (red:1.3) apple".

CLIP reads 77 tokens: a start token, 75 tokens of text, an end token. `attach(sd)` makes the text
encoders read longer prompts in chunks of 75 tokens, each with a start and an end of its own, and
joins the vectors of the chunks. Neither chunks nor weights are part of CLIP. The grammar is that of
A1111's web UI (`parse_prompt_attention` there):

    (red:1.3)   times 1.3; spaces beside the number do not count
    (red)       times 1.1, ((red)) times 1.21        [red]   divided by 1.1
    \\( \\) \\[ \\] \\\\  the character itself             BREAK   begin a new chunk

Brackets within brackets multiply. A bracket that is never closed counts up to the end.
`<lora:name:1>` is no text: extras/lora_tags.py reads it. `unsupported` names what A1111 and ComfyUI
have beside these.

Shapes: B prompts, N chunks, 77 tokens in a chunk, D width.
"""
import math
import re
import warnings
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from clip import BOS, EOS, CLIPTextModel, Token, Tokenizer
from sd import StableDiffusion, UserError

# One part of a prompt. No alternative can match the same text in two ways: it is linear.
PART = re.compile(r"(?P<escaped>\\[()\[\]\\]?)"
                  r"|:\s*(?P<weight>[+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)"
                  r"|(?P<tag><\w+:[^<>]+>)"
                  r"|(?P<bracket>[()\[\]])"
                  r"|\s*\b(?P<chunk>BREAK)\b\s*"
                  r"|(?P<text>\w+|\s+|.)", re.S)
MOST_WEIGHT = 1000  # of a word: more is a slip, and overflows in fp16
COMMA_REACH = 20    # a chunk ends at a comma that stands among its last 20 tokens, as in A1111
BIG_WEIGHT = 3      # of a word: more is told


def attach(sd: StableDiffusion) -> None:
    """Let `sd.encode_prompt` read weights and prompts of any length.

    Its context is (B, N*77, D) then, with as many chunks N as the longest of the prompts fills.
    The pooled vector is the first chunk's. Text encoders of other classes stay as they are.
    It warns of what is `unsupported`, and raises UserError for weights that make no sense.
    """
    encoders = clip_encoders(sd)
    for encoder in encoders:
        encoder.encode = partial(encode, encoder, encoders)


def clip_encoders(sd: StableDiffusion) -> list[CLIPTextModel]:
    return [encoder for encoder in sd.text_encoders if isinstance(encoder, CLIPTextModel)]


def count_chunks(sd: StableDiffusion, prompts: list[str]) -> int:
    """How many chunks of context the longest of the prompts fills; 1 without CLIP."""
    counts = [num_chunks(encoder.tokenizer, prompts) for encoder in clip_encoders(sd)]
    return max(counts, default=1)


def encode(
    encoder: CLIPTextModel, encoders: list[CLIPTextModel], prompts: list[str]
) -> dict[str, Tensor]:
    """As `CLIPTextModel.encode`, in as many chunks as the longest prompt fills in any encoder.

    Encoders may differ in it: a learned word can have another number of vectors in each.
    """
    if encoder is encoders[0]:
        for line in dict.fromkeys(line for prompt in prompts for line in unsupported(prompt)):
            warnings.warn(line, stacklevel=4)
    count = max(num_chunks(one.tokenizer, prompts) for one in encoders)
    tokens, weights = chunks(encoder.tokenizer, prompts, count)
    features, pooled = encoder(tokens.flatten(0, 1).to(next(encoder.parameters()).device))
    if (weights != 1).any():
        features = apply_token_weights(features, weights.flatten(0, 1))
    features = features.unflatten(0, (-1, count)).flatten(1, 2)     # (b n) t d -> b (n t) d
    return {"context": features, "y": pooled[::count]}


def apply_token_weights(features: Tensor, weights: Tensor) -> Tensor:
    """Vectors (B, T, D) times their weights (B, T): each keeps its direction.

    A1111 calls this rule "No norm". Its other one, "Original", then scales all vectors to the mean
    that they had. That mean is near 0 without a last LayerNorm, as in SDXL: the factor was -9.7
    with small random encoders, so it turned every vector around.
    """
    return features * weights[..., None].to(features)


def set_clip_skip(sd: StableDiffusion, number: int) -> None:
    """Take the vectors of the text encoders' last layer (1), of the one before it (2) and so on.

    SD 1.x was trained with 1, SD 2.x and SDXL with 2. A1111 and ComfyUI (-1, -2) count like this.
    Raises UserError if there are not so many layers.
    """
    for encoder in clip_encoders(sd):
        config = encoder.config
        # folders of SD 2.x do not hold the last layer, which is never used
        dropped = int(config.openclip and config.final_norm and config.clip_skip == 0)
        layers = config.num_hidden_layers + dropped
        if not 1 + dropped <= number <= layers:
            raise UserError(f"--clip-skip {number}: a text encoder of this model has the layers "
                            f"{1 + dropped} to {layers}, counted from the last")
        config.clip_skip = number - 1 - dropped


# --- chunks ---

class Weighted(NamedTuple):
    token: Token
    weight: float
    learned: bool   # one of several vectors of a word, which stay in one chunk


def num_chunks(tokenizer: Tokenizer, prompts: list[str]) -> int:
    """How many chunks the longest of the prompts fills; an empty one fills one."""
    return max(len(prompt_chunks(tokenizer, prompt)) for prompt in prompts)


def chunks(tokenizer: Tokenizer, prompts: list[str], count: int) -> tuple[Tensor, Tensor]:
    """Token ids and weights of the prompts, each (B, count, 77). What a prompt leaves is empty."""
    ids = torch.full((len(prompts), count, tokenizer.length), tokenizer.pad)
    weights = torch.ones(ids.shape)
    ids[:, :, 0], ids[:, :, 1] = BOS, EOS
    for i, prompt in enumerate(prompts):
        for j, chunk in enumerate(prompt_chunks(tokenizer, prompt)):
            stop = len(chunk) + 1
            ids[i, j, 1:stop] = torch.tensor([one.token.id for one in chunk], dtype=torch.long)
            ids[i, j, stop] = EOS
            weights[i, j, 1:stop] = torch.tensor([one.weight for one in chunk])
    return ids, weights


def prompt_chunks(tokenizer: Tokenizer, prompt: str) -> list[list[Weighted]]:
    """The tokens of each chunk: 75 at most, and fewer where a comma is near or BREAK stands."""
    found: list[list[Weighted]] = []
    for section in weighted_sections(tokenizer, prompt):
        found += split_section(tokenizer, section)
    if len(found) > 1 and found[-1] == []:      # BREAK at the end
        found.pop()
    return found


def split_section(tokenizer: Tokenizer, tokens: list[Weighted]) -> list[list[Weighted]]:
    """The tokens between two BREAKs in chunks; none are one empty chunk."""
    room, found, chunk, comma = tokenizer.length - 2, [], [], -1
    for unit in units(tokens):
        is_comma = unit[0].token.text == ",</w>"
        if len(chunk) + len(unit) > room:
            cut = len(chunk)
            if not is_comma and cut == room and 0 <= comma and cut - comma <= COMMA_REACH:
                cut = comma + 1
            found.append(chunk[:cut])
            chunk, comma = chunk[cut:], -1
        if is_comma:
            comma = len(chunk)
        chunk += unit
    return [*found, chunk]


def units(tokens: list[Weighted]) -> list[list[Weighted]]:
    """Tokens that may not be parted: the vectors of a learned word."""
    found: list[list[Weighted]] = []
    for one in tokens:
        before = found[-1][-1] if found else None
        if before and one.learned and before.learned and one.token.word == before.token.word:
            found[-1].append(one)
        else:
            found.append([one])
    return found


def places(tokenizer: Tokenizer, prompt: str) -> list[tuple[int, Token]]:
    """All tokens, each with its place among all chunks' tokens; the start token has place 0."""
    return [(j * tokenizer.length + 1 + i, one.token)
            for j, chunk in enumerate(prompt_chunks(tokenizer, prompt))
            for i, one in enumerate(chunk)]


def weighted_tokens(tokenizer: Tokenizer, prompt: str) -> list[tuple[Token, float]]:
    """All tokens of a prompt with their weights. Spans and words are those of the whole prompt."""
    return [(one.token, one.weight) for section in weighted_sections(tokenizer, prompt)
            for one in section]


def weighted_sections(tokenizer: Tokenizer, prompt: str) -> list[list[Weighted]]:
    """`weighted_tokens` of what stands between BREAKs."""
    table = len(tokenizer.bpe.get_vocab()) if hasattr(tokenizer, "words") else None
    sections, first_word = [], 0
    for section in parse(prompt):
        found: list[Weighted] = []
        for piece in section:
            tokens = tokenizer.tokenize(piece.text)
            for token in tokens:
                start, stop = token.span
                span = piece.places[start], piece.places[max(start, stop - 1)] + 1
                learned = table is not None and token.id >= EOS + 1
                found.append(Weighted(token._replace(span=span, word=first_word + token.word),
                                      piece.weight, learned))
            first_word += tokens[-1].word + 1 if tokens else 0
        sections.append(found)
    return sections


# --- the grammar ---

class Piece(NamedTuple):
    text: str           # without brackets, numbers and backslashes
    weight: float
    places: list[int]   # where each of its characters stands in the prompt


class Brackets:
    """The open brackets of one kind, and the weights that they will turn out to give."""

    def __init__(self, usual: float):
        self.usual, self.open = usual, []
        self.factors: list[float] = []      # of every bracket, in the order in which they open

    def close(self, factor: float) -> int:
        number = self.open.pop()
        self.factors[number] = factor
        return number

    def start(self) -> int:
        self.factors.append(self.usual)     # unless it is closed by a number
        self.open.append(len(self.factors) - 1)
        return self.open[-1]


def parse(prompt: str) -> list[list[Piece]]:
    """A prompt's pieces of one weight each, in sections between BREAKs. Linear in its length.

    Raises UserError for a weight that is out of range.
    """
    kinds = {"(": Brackets(1.1), "[": Brackets(1 / 1.1)}
    # what stands in the prompt, in order: ("text", text, place), ("BREAK",) and brackets
    events: list[tuple] = []
    for part in PART.finditer(prompt):
        kind, opener = part.lastgroup, None
        text, place = part[0], part.start()
        if kind == "tag":
            continue
        if kind == "chunk":
            events.append(("BREAK",))
        elif kind == "escaped":
            events.append(("text", text[1:], place + 1))
        elif text in kinds:
            events.append((text, kinds[text].start()))
        else:
            opener = {")": "(", "]": "["}.get(text[-1]) if kind in ("bracket", "weight") else None
            if opener and kinds[opener].open:
                factor = kinds[opener].usual if kind == "bracket" else float(part["weight"])
                events.append((f"/{opener}", kinds[opener].close(factor)))
            else:
                events.append(("text", text, place))
    return join(prompt, events, kinds)


def join(prompt: str, events: list[tuple], kinds: dict[str, Brackets]) -> list[list[Piece]]:
    """The pieces: text of equal weight is one of them, whatever brackets stood between."""
    sections: list[list[Piece]] = [[]]
    weights = {"(": [1.0], "[": [1.0]}      # products of the brackets that are open, outer first
    for kind, *found in events:
        if kind == "BREAK":
            sections.append([])
        elif kind in weights:
            weights[kind].append(weights[kind][-1] * kinds[kind].factors[found[0]])
        elif kind != "text":
            weights[kind[1]].pop()
        else:
            text, place = found
            weight = weights["("][-1] * weights["["][-1]
            if not abs(weight) <= MOST_WEIGHT:
                raise UserError(f"the weight {weight:g} in the prompt is out of range: give "
                                "0 to 2, as in (red:1.3)")
            pieces = sections[-1]
            if not pieces or not math.isclose(pieces[-1].weight, weight, rel_tol=1e-9):
                pieces.append(Piece([], weight, []))
            pieces[-1].text.append(text)
            pieces[-1].places.extend(range(place, place + len(text)))
    return [[piece._replace(text="".join(piece.text)) for piece in section]
            for section in sections]


def weighted_spans(prompt: str) -> list[tuple[int, int, float]]:
    """The pieces (start, stop, weight) of a prompt, without the brackets that give weights."""
    found = []
    for piece in (piece for section in parse(prompt) for piece in section):
        start = piece.places[0]
        for before, after in zip(piece.places, [*piece.places[1:], -1]):
            if after != before + 1:
                found.append((start, before + 1, piece.weight))
                start = after
    return found


# --- what is not supported ---

ELSEWHERE = [  # what other programs read in a prompt, and what to say of it
    (r"\bAND\b", "AND joins prompts in A1111's web UI: here it is a word, write it in lower case"),
    (r"\[[^\[\]:|]{0,200}:[^\[\]|]{0,200}\]",
     "[a:b:0.5] changes the prompt on the way in A1111's web UI: here its words all count"),
    (r"\[[^\[\]|]{0,200}\|[^\[\]]{0,200}\]",
     "[a|b] takes turns in A1111's web UI: here its words all count"),
    (r"\{[^{}|]{0,200}\|[^{}]{0,200}\}",
     "{a|b} chooses one at random elsewhere: here its words all count, so choose yourself"),
    (r"\$\{", "${x=a} is a variable elsewhere: here it is text, so put the words in"),
    (r"(?<!\S)--[a-z]{1,20}\b|\S::-?\d",
     "--ar, ::2 and the like are Midjourney's: here they are words, so give options to sd.py"),
    (r"(?<!\w)__[\w/ -]{1,100}?__(?!\w)",
     "__name__ stands for a line of a file elsewhere: here it is a word, so put the line in"),
    (r"\bembedding:", "embedding:name is ComfyUI's way: write the learned word alone"),
    (r"[（）［］]", "wide brackets （ ） give no weight: use ( and )"),
    (r":\s{0,9}[+-]?\d{1,9}(,\d|e\d|\.\d{0,9}\.)[^()]{0,20}\)",
     "a weight is a number such as 1.3 with a point: other forms are taken as words, times 1.1"),
    (r"\([^()]{0,200}[^\s():]\s{0,9}:\s{0,9}\d?\.\d{1,3}\s{0,9}(?:[(,]|$)",
     "a weight has no ) behind it, as in (red:1.3): so it is text, times 1.1"),
    (r":\s{0,9}-\s{0,9}(\d|\.\d)[\d.]{0,9}\s{0,9}\)",
     "a weight below 0 turns a word's vectors around: what is not wanted goes into --negative"),
    (r"<(?!lora:|lyco:)\w{1,50}:[^<>]+>",
     "<name:...> of that kind is not supported and left out: only <lora:name:1> is"),
]
ELSEWHERE = [(re.compile(pattern), line) for pattern, line in ELSEWHERE]
ESCAPED = re.compile(r"\\.", re.S)
WEIGHT = re.compile(r"(\d?)\s{0,9}:\s{0,9}(\d{1,9}(?:\.\d*)?)\s{0,9}\)")


def unsupported(prompt: str) -> list[str]:
    """A line for each thing in a prompt that other programs read in another way."""
    plain = ESCAPED.sub("  ", prompt)
    lines = [line for pattern, line in ELSEWHERE if pattern.search(plain)]
    for match in WEIGHT.finditer(plain):
        if float(match[2]) > BIG_WEIGHT or (match[1] and match[2].isdigit()):
            lines.append(f"\":{match[2]})\" is a weight here, and much: write \\( and \\) around "
                         "what is text")
            break
    return lines
