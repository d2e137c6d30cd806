"""What the tensors of one layer in a LoRA file change: LoRA, LoCon, LoHa, LoKr, DoRA, full, IA3.

Yeh et al. 2024 (LyCORIS), section 3, and the names of the lycoris-lora package; DoRA is Liu et al.
2024. `role` is what stands behind the layer's name in a file. peft's names are among these too.

Shapes: W the layer's weight (out, in, ...), r the rank.
"""
import math

import torch
from torch import Tensor

from extras.checks import reason
from sd import UserError

Roles = dict[str, Tensor]   # role -> tensor

KINDS = {  # name: (tensors that are needed, tensors that may be there)
    "LoRA": ({"down", "up"}, {"mid", "bias_up"}),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, {"hada_t1", "hada_t2"}),
    "LoKr": (set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b",
                     "lokr_t2"}),
    "difference": (set(), {"diff", "diff_b"}),
    "norm": (set(), {"w_norm", "b_norm"}),
    "IA3": ({"weight", "on_input"}, set()),
}
ANYWHERE = {"alpha", "dora_scale", "magnitude"}   # kohya's and LyCORIS's lengths, and peft's
ROLES = ANYWHERE.union(*(needed | others for needed, others in KINDS.values()))
BIASES = {"bias_up", "diff_b", "b_norm"}


def kind_of(roles: Roles) -> str:
    """The row of KINDS that these tensors are. Raises UserError if they are none, or in part."""
    names = roles.keys() - ANYWHERE
    for kind, (needed, others) in KINDS.items():
        if names & (needed | others):
            missing = sorted(needed - names)
            if kind == "LoKr":
                missing = [part for part in ("lokr_w1", "lokr_w2") if not lokr_has(names, part)]
            strange = sorted(names - needed - others - BIASES)
            if missing or strange:
                raise UserError(f"of a {kind} it holds only {', '.join(sorted(names))}")
            return kind
    raise UserError(f"it holds only {', '.join(sorted(roles))}")


def lokr_has(names: set[str], part: str) -> bool:
    return part in names or {f"{part}_a", f"{part}_b"} <= names


def whole_lokr(names: set[str]) -> bool:
    """Both matrices are whole, so there is no rank: `alpha` is the factor."""
    return {"lokr_w1", "lokr_w2"} <= names


@torch.no_grad()
def changed_weight(roles: Roles, weight: Tensor, alpha: float | None, rslora: bool,
                   scale: float) -> Tensor:
    """The weight (out, in, ...) with the change, in fp32. `alpha` None: the rank.

    Raises UserError if the shapes do not fit.
    """
    weight = weight.float()
    for name, tensor in roles.items():
        if tensor.ndim == 0 and name not in ("alpha", "on_input"):
            raise UserError(f"{name} is a single number")
    try:
        change = weight_change(roles, weight, alpha, rslora).reshape(weight.shape)
        for name in "dora_scale", "magnitude":
            if name in roles:
                rows = name == "magnitude" or len(roles[name]) == len(weight)
                change = decompose(weight + change, roles[name], rows) - weight
    except (RuntimeError, IndexError, ValueError) as error:
        raise UserError(reason(error)) from error
    return weight + scale * change


def weight_change(roles: Roles, weight: Tensor, alpha: float | None, rslora: bool) -> Tensor:
    """What is added to the weight at scale 1."""
    if "down" in roles:
        return locon(roles) * factor(alpha, len(roles["down"]), rslora)
    if "hada_w1_a" in roles:
        return loha(roles) * factor(alpha, len(roles["hada_w1_b"]), rslora)
    if lokr_has(roles.keys(), "lokr_w1"):
        factored = [roles[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in roles]
        return lokr(roles) * factor(alpha, len(factored[0]) if factored else 1, rslora)
    if "on_input" in roles:
        along = [1, -1] if bool(roles["on_input"]) else [-1, 1]
        return weight * roles["weight"].reshape(along + [1] * (weight.ndim - 2))
    for name in "diff", "w_norm":
        if name in roles:
            return roles[name]
    return torch.zeros_like(weight)     # it changes the bias alone


def factor(alpha: float | None, rank: int, rslora: bool) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (Kalajdzievski 2023)."""
    if alpha is None or rank == 0:
        return 1.0
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def locon(roles: Roles) -> Tensor:
    """up @ down, or with `mid` (r, r, kh, kw) the Tucker form: mid times both."""
    down, up = roles["down"].flatten(1), roles["up"].flatten(1)
    if "mid" in roles:
        return tucker(roles["mid"], up.T, down)
    return up @ down


def loha(roles: Roles) -> Tensor:
    """The product, number by number, of two matrices of low rank."""
    parts = []
    for i in "12":
        a, b = roles[f"hada_w{i}_a"], roles[f"hada_w{i}_b"]
        core = roles.get(f"hada_t{i}")
        parts.append(a @ b if core is None else tucker(core, a, b))
    return parts[0] * parts[1]


def lokr(roles: Roles) -> Tensor:
    """The Kronecker product of two matrices, each whole or of low rank."""
    w1, w2 = roles.get("lokr_w1"), roles.get("lokr_w2")
    if w1 is None:
        w1 = roles["lokr_w1_a"] @ roles["lokr_w1_b"]
    if w2 is None:
        a, b = roles["lokr_w2_a"], roles["lokr_w2_b"]
        if "lokr_t2" in roles:
            w2 = tucker(roles["lokr_t2"], a, b)
        else:
            w2 = (a @ b.flatten(1)).reshape(len(a), *b.shape[1:])
    return torch.kron(w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim)), w2.contiguous())


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """core (r, r, kh, kw), a (r, out), b (r, in) -> (out, in, kh, kw)."""
    return torch.einsum("i j ..., i p, j q -> p q ...", core, a, b)


def decompose(weight: Tensor, magnitude: Tensor, rows: bool) -> Tensor:
    """DoRA: the weight with other lengths of its rows (out), or else of its columns (in)."""
    matrices = weight if rows else weight.transpose(0, 1)
    norm = matrices.flatten(1).norm(dim=1) + torch.finfo(weight.dtype).eps
    shape = [-1 if rows else 1, 1 if rows else -1] + [1] * (weight.ndim - 2)
    return weight * (magnitude.flatten() / norm).reshape(shape)
