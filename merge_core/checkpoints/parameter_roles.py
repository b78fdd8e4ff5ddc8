"""What each parameter is, told from its name and shape, and what spectral methods do with it.

CART (arXiv:2412.12153) decomposes the matrices of attention and MLP; biases, norms, embeddings,
positional and patch embeddings, logit scales are averaged; heads are never merged. The tables
below name the layers of timm, torchvision, OpenAI's CLIP, open_clip and transformers by the ends
of their paths; what no table names is decided by structure: a layer's weight with two or more
dimensions is decomposed. A suite may override either way (``decompose:``, ``average:``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache

from merge_core.checkpoints.shards import TensorInfo

Table = tuple[tuple[str, tuple[str, ...]], ...]


def _table(text: str) -> Table:
    """Parse lines of a kind, a colon and patterns; lines without a colon continue the last."""
    rows: list[tuple[str, tuple[str, ...]]] = []
    for line in text.strip().splitlines():
        kind, colon, patterns = line.strip().rpartition(":")
        if not colon:
            kind, known = rows.pop()
            patterns = " ".join((*known, patterns))
        rows.append((kind, tuple(patterns.split())))
    return tuple(rows)


# Ends of the paths of matrices inside a block, with ``*``, ``?`` and ``[0-9]``.
MATRICES = _table(
    """
    attention qkv: attn.qkv attention.qkv attn.in_proj self_attn.in_proj attention.in_proj
        self_attention.in_proj attn.c_attn attn.Wqkv self_attn.qkv_proj query_key_value
    attention q: attn.q q_proj self.query attention.query SelfAttention.q q_lin
    attention k: attn.k k_proj self.key attention.key SelfAttention.k k_lin
    attention v: attn.v v_proj self.value attention.value SelfAttention.v v_lin
    attention out: attn.proj *attn.out_proj *attention.out_proj attention.output.dense
        *attention.dense o_proj attn.c_proj attnpool.c_proj SelfAttention.o out_lin attn.Wo
    cross-attention q: EncDecAttention.q crossattention.q_attn
    cross-attention k: EncDecAttention.k
    cross-attention v: EncDecAttention.v
    cross-attention kv: crossattention.c_attn
    cross-attention out: EncDecAttention.o crossattention.c_proj
    mlp in: mlp.fc1 mlp.fc1_x mlp.c_fc mlp.linear_1 *[0-9].mlp.0 intermediate.dense up_proj
        mlp.dense_h_to_4h DenseReluDense.wi DenseReluDense.wi_1 ffn.lin1
    mlp gate and in: gate_up_proj
    mlp gate: gate_proj DenseReluDense.wi_0 mlp.fc1_g
    mlp out: mlp.fc2 mlp.c_proj mlp.linear_2 *[0-9].mlp.3 output.dense down_proj
        mlp.dense_4h_to_h DenseReluDense.wo ffn.lin2
    """
)
# Ends of the paths of what is averaged; the first match counts, after the table above.
OTHERS = _table(
    """
    constant: *position_ids *token_type_ids attn.masked attn_mask *relative_position_index
        *relative_coords_table cos_cached sin_cached n_averaged num_batches_tracked
    rotary frequencies: *inv_freq
    norm statistics: running_mean running_var
    norm: *norm *norm[0-9] *Norm *[nN]orm.gamma *[nN]orm.beta layernorm_* ln ln_* *_ln bn bn[0-9]
    patch embedding: *patch_embed* conv_proj
    position embedding: *pos_embed* *position*embedding* *embed_positions* wpe rel_pos_[hw]
        relative_position_bias_table relative_attention_bias
    class token: cls_token class_token class_embedding dist_token reg_token mask_token
    token embedding: wte embed_tokens shared word_embeddings token_embedding tok_embeddings embed_in
    embedding: *embed* *token_type*
    language head: lm_head lm_head.decoder cls.predictions cls.predictions.decoder embed_out
        vocab_projector
    projection: visual_projection text_projection visual.proj
    layer scale: gamma gamma_[0-9] gamma[0-9] layer_scale* lambda_[0-9]
    logit scale: logit_scale logit
    """
)
# Modules outside numbered blocks that belong to a task rather than to the backbone; ``fc`` only
# at the end of a path.
HEADS = (
    *("head", "heads", "head_dist", "*classifier*", "score", "cls", "lm_head", "qa_outputs"),
    *("vocab_transform", "classification_head", "multiple_choice_head", "logits_proj"),
    "last_linear",
)
POOLERS = ("pooler",)

VOCABULARY = ("token embedding", "language head")
MATRIX, CONVOLUTION = "weight matrix", "convolution kernel, as o x (i·kh·kw)"
NO_MATRIX = "not a matrix"
BUFFER = "integer buffer, kept as it is"
ROTARY = "rotary frequencies"
CONSTANTS = (BUFFER, "constant", ROTARY)
MASK = "attn.bias"  # GPT-2's causal mask, 1 x 1 x n x n
# Thirds of a fused matrix's outputs are queries, keys and values; but GPT-NeoX, BLOOM and Falcon
# (query_key_value) and timm's MaxViT interleave the heads, and others may share keys among queries.
_GROUPED = ("*.qkv_proj", "*.Wqkv", "*.c_attn")
_INTERLEAVED = ("*query_key_value*", "*attn_block.attn.*", "*attn_grid.attn.*")
# transformers' Conv1D, of GPT and GPT-2, keeps weights as in x out.
_CONV1D = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention|mlp)\.(c_attn|q_attn|c_fc|c_proj)$")
_QUERY_WORDS = {"q_proj": "{}_proj", "q_lin": "{}_lin", "q": "{}"}


@dataclass(frozen=True)
class Role:
    """What a parameter is in its network.

    Attributes:
        kind: such as ``attention qkv``, ``mlp in``, ``norm``, ``head``.
        block: the numbers in its path, outermost first (stage and block, say); empty outside.
        parts: names of the equal parts of its outputs (q, k and v), or empty.
        stored_transposed: stored as in x out, the transpose of a linear layer's weight.
    """

    kind: str
    block: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    stored_transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether spectral methods decompose it."""
        return self.kind in _DECOMPOSED

    @property
    def is_constant(self) -> bool:
        """Whether it belongs to the architecture or counts, so that it is copied, not merged."""
        return self.kind in CONSTANTS

    @property
    def is_vocabulary(self) -> bool:
        """Whether its first dimension counts the tokens of a vocabulary."""
        return self.kind in VOCABULARY


_DECOMPOSED = frozenset({MATRIX, CONVOLUTION, *(kind for kind, _ in MATRICES)})


@dataclass(frozen=True)
class Treatment:
    """What a spectral method does with a parameter, and why."""

    decomposed: bool
    reason: str


def layer_of(name: str) -> tuple[str, str]:
    """The path of the layer that owns a parameter, and the parameter's own name there.

    ``blocks.0.attn.qkv.weight`` is ``weight`` of ``blocks.0.attn.qkv``, ``attn.in_proj_bias`` is
    ``bias`` of ``attn.in_proj``; ``cls_token`` has no own name.
    """
    found = re.fullmatch(r"(?:(.*)[._])?(weight|bias)", name)
    return (found[1] or "", found[2]) if found else (name, "")


def block_of(name: str) -> tuple[int, ...]:
    """The numbers in the path of the layer that owns a parameter, outermost first.

    ``layers.0.blocks.1.attn.qkv.weight`` lies in (0, 1), ``layer1.0.conv2.weight`` in (1, 0).
    """
    path, _ = layer_of(name)
    return tuple(int(number) for number in re.findall(r"(\d+)(?=\.)", path))


def matrix_kind(name: str) -> str | None:
    """The kind of a matrix of attention or MLP, told from its name; None for all else."""
    path, own = layer_of(name)
    return _kind_in_table(path, MATRICES) if own == "weight" else None


@lru_cache(maxsize=20_000)
def describe(name: str, info: TensorInfo) -> Role:
    """What a parameter is, told from its name and shape.

    Args:
        name: in the file, wrapper prefixes removed.
        info: its stored shape and dtype.

    A square weight of transformers' Conv1D cannot be told from a linear layer's by its shape and
    is taken for a Conv1D's; a c_attn or c_fc that is higher than wide is a linear layer's.

    Source: the models of timm, torchvision, OpenAI CLIP, open_clip and transformers.

    Example:
        >>> describe("blocks.3.attn.qkv.weight", TensorInfo.of(torch.zeros(18, 6)))
        Role(kind='attention qkv', block=(3,), parts=('q', 'k', 'v'), stored_transposed=False)
    """
    path, own = layer_of(name)
    if not info.is_floating:
        return Role(BUFFER)
    block = block_of(name)
    matrix = _kind_in_table(path, MATRICES)
    if matrix is not None:
        if own != "weight" or not _is_matrix(info):
            return Role("bias" if own == "bias" else NO_MATRIX, block)
        stored_transposed = _is_conv1d(path, info)
        return Role(matrix, block, _parts(path, matrix, info, stored_transposed), stored_transposed)
    known = _kind_in_table(path, OTHERS)
    if known is None and _is_patch_kernel(info):
        known = "patch embedding"
    if known is None or known == "embedding":
        known = _task_part(path) or known
    if known is not None:
        return Role(known, block)
    if own == "bias":
        return Role("bias", block)
    if not _is_matrix(info):
        return Role(NO_MATRIX, block)
    if own != "weight":
        return Role("not a layer's weight", block)
    return Role(MATRIX if len(info.shape) == 2 else CONVOLUTION, block)


def treatment(
    name: str,
    info: TensorInfo,
    decompose: Sequence[str] = (),
    average: Sequence[str] = (),
) -> Treatment:
    """Whether a parameter is decomposed (spectral methods) or averaged.

    Args:
        name: parameter name.
        info: its shape and dtype.
        decompose: shell patterns of the suite that force decomposition (of tensors with two
            or more dimensions); they win over `average`.
        average: shell patterns of the suite that force averaging.

    Source: rule of CART, arXiv:2412.12153, section 5; for language models AdaRank's.
    """
    role = describe(name, info)
    if info.is_floating and _is_matrix(info):
        if any(fnmatchcase(name, pattern) for pattern in decompose):
            return Treatment(True, "named under 'decompose' in the suite")
        if any(fnmatchcase(name, pattern) for pattern in average):
            return Treatment(False, "named under 'average' in the suite")
    return Treatment(role.is_matrix, role.kind)


def query_key_value(name: str) -> tuple[str, str, str] | None:
    """Names of the weights of queries, keys and values, given that of separate queries.

    Returns:
        None where `name` is no such weight.
    """
    path, _ = layer_of(name)
    if matrix_kind(name) != "attention q":
        return None
    owner, _, word = path.rpartition(".")
    pattern = _QUERY_WORDS.get(word)
    words = [pattern.format(part) for part in "qkv"] if pattern else ["query", "key", "value"]
    query, key, value = (f"{owner}.{each}.weight".lstrip(".") for each in words)
    return query, key, value


def _kind_in_table(path: str, table: Table) -> str | None:
    whole = f".{path}"
    for kind, ends in table:
        if any(fnmatchcase(whole, f"*.{end}") for end in ends):
            return kind
    return None


def _task_part(path: str) -> str | None:
    """Whether a path outside the numbered blocks belongs to a head or a pooler."""
    words = path.split(".")
    for index, word in enumerate(words):
        if word.isdigit():
            return None
        if any(fnmatchcase(word, head) for head in HEADS):
            return "head"
        if word in POOLERS:
            return "pooler"
        if word == "fc" and index == len(words) - 1:
            return "head"
    return None


def _is_matrix(info: TensorInfo) -> bool:
    shape = info.shape
    return len(shape) >= 2 and min(shape[0], info.numel // max(1, shape[0])) >= 2


def _is_patch_kernel(info: TensorInfo) -> bool:
    """Whether a kernel embeds patches: it reads RGB, with an even side of 4 or more."""
    shape = info.shape
    side = shape[-1] if len(shape) == 4 and shape[1] == 3 and shape[2] == shape[3] else 0
    return side >= 4 and side % 2 == 0


def _is_conv1d(path: str, info: TensorInfo) -> bool:
    found = _CONV1D.search(path)
    if found is None or len(info.shape) != 2:
        return False
    rows, columns = info.shape
    widens = found[3] in ("c_attn", "c_fc")
    # An MLP's c_proj narrows, all others keep or widen.
    return rows <= columns if widens or found[2] != "mlp" else rows >= columns


def _parts(path: str, kind: str, info: TensorInfo, stored_transposed: bool) -> tuple[str, ...]:
    if kind != "attention qkv" or any(fnmatchcase(path, pattern) for pattern in _INTERLEAVED):
        return ()
    outputs = info.shape[-1] if stored_transposed else info.shape[0]
    if any(fnmatchcase(path, pattern) for pattern in _GROUPED):
        return ("q", "k", "v") if outputs == 3 * (info.numel // outputs) else ()
    return ("q", "k", "v") if outputs % 3 == 0 else ()
