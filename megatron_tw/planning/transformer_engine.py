"""What a layer of Transformer Engine's modules keeps for its backward pass, tensor by tensor. Read, not run.

From the sources of Transformer Engine 2.10 and Megatron-Core 0.16, in bf16: `LayerNormLinear` and `Linear` save their
input as this rank holds it (under sequence parallelism a shard, which is gathered again in the backward pass), the
former also the norm's input and its inverse deviation; fused attention saves queries, keys, values, output and the
softmax's log-sum-exp, under context parallelism those of this rank's tokens (`context_parallel.py`, p2p, all_gather;
with a2a those of all tokens and fewer heads, which is as much). What Megatron-Core adds is the same with both makes.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_tw.config import RunConfig
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.families.layers import decoder_layer

STATUS = "not run: read in the sources of Transformer Engine 2.10"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one module of a layer keeps: bytes by tensor with this project's layers, as simulated, and with Transformer
    Engine's, as read (`STATUS`)."""

    module: str
    simulated: dict[str, int]
    read: dict[str, int]

    @property
    def bytes(self) -> int:
        """What Transformer Engine keeps more."""
        return sum(self.read.values()) - sum(self.simulated.values())


def saved_by_te_layer(config: RunConfig, architecture: Architecture) -> dict[str, int] | None:
    """Bytes that one layer of Transformer Engine's keeps for a micro-batch on a rank, "module: tensor [shape] dtype"
    -> bytes; None for a family whose layer is another (Phi).

    Shapes: S tokens of this rank, P those of a sequence-parallel shard, B rows, D head size; sizes by tensor-parallel
    rank.
    """
    if architecture.family.layer is not decoder_layer:
        return None
    parallel = config.parallel
    tp, rows = parallel.tensor_model_parallel_size, config.train.micro_batch_size
    tokens = config.data.seq_length // parallel.context_parallel_size
    shard = tokens // tp if parallel.uses_sequence_parallel else tokens
    hidden, heads = architecture.hidden_size, architecture.num_attention_heads // tp
    groups, size, ffn = (
        max(1, architecture.num_query_groups // tp),
        architecture.head_dim,
        architecture.ffn_hidden_size // tp,
    )
    gated = bool(architecture.family.megatron.get("gated_linear_unit"))
    up = 2 * ffn if gated else ffn
    attention = "self_attention.core_attention"
    tensors: list[tuple[str, str, tuple[int, ...], str]] = []
    for module, name in (("self_attention.linear_qkv", "attention"), ("mlp.linear_fc1", "MLP")):
        tensors += [
            (module, f"input of the norm before the {name}", (shard, rows, hidden), "bfloat16"),
            (module, "its inverse deviation", (shard * rows,), "float32"),
            (module, "output of the norm", (shard, rows, hidden), "bfloat16"),
        ]
    for name, of in (("queries", heads), ("keys", groups)):
        if architecture.family.megatron.get("qk_layernorm"):
            tensors.append((f"self_attention.{name[0]}_layernorm", name, (tokens, rows, of, size), "bfloat16"))
            tensors.append(
                (
                    f"self_attention.{name[0]}_layernorm",
                    f"inverse deviation of {name}",
                    (tokens * rows * of,),
                    "float32",
                )
            )
        tensors += [
            (
                attention,  # where this project's layers rotate queries and keys just before
                f"{part} of the rotary embedding of {name}",
                (tokens, 1, 1, architecture.rotary_dim),
                "bfloat16",
            )
            for part in ("cosines", "sines")
        ]
    tensors += [
        (attention, "queries", (tokens, rows, heads, size), "bfloat16"),
        (attention, "keys", (tokens, rows, groups, size), "bfloat16"),
        (attention, "values", (tokens, rows, groups, size), "bfloat16"),
        (attention, "output, which linear_proj keeps too", (tokens, rows, heads, size), "bfloat16"),
        (attention, "log-sum-exp", (rows, heads, tokens, 1), "float32"),
        ("mlp.linear_fc2", "input of the activation", (tokens, rows, up), "bfloat16"),
        ("mlp.linear_fc2", "input", (tokens, rows, ffn), "bfloat16"),
    ]
    saved: dict[str, int] = {}
    for module, name, shape, dtype in tensors:
        count = 1
        for length in shape:
            count *= length
        saved[f"{module}: {name} {list(shape)} {dtype}"] = count * (2 if dtype == "bfloat16" else 4)
    return saved


def differences(simulated: dict[str, int], read: dict[str, int]) -> list[Difference]:
    """`Simulation.saved_by_layer` beside `saved_by_te_layer`, module by module; the norms of this project's layers
    beside the linear layers into which Transformer Engine fuses them."""
    fused = {"input_layernorm": "self_attention.linear_qkv", "pre_mlp_layernorm": "mlp.linear_fc1"}

    def module_of(name: str) -> str:
        module = name.partition(":")[0]
        return fused.get(module, module)

    modules = dict.fromkeys(map(module_of, [*read, *simulated]))
    return [
        Difference(
            module=module,
            simulated={name: size for name, size in simulated.items() if module_of(name) == module},
            read={name: size for name, size in read.items() if module_of(name) == module},
        )
        for module in modules
    ]


@dataclass(frozen=True, kw_only=True)
class Unpaired:
    """A tensor that one make of layers keeps, and the other none of the same size. Bytes with each, 0 with one."""

    name: str
    simulated: int
    read: int


def unpaired(rows: Iterable[Difference]) -> list[Unpaired]:
    """What is left of the tensors of both makes when those of the same size are taken away, within a module first.

    >>> unpaired([Difference(module="mlp", simulated={"a": 8, "b": 4}, read={"c": 8, "d": 2})])
    [Unpaired(name='b', simulated=4, read=0), Unpaired(name='d', simulated=0, read=2)]
    """
    left = [_without_pairs(row.simulated, row.read) for row in rows]
    simulated, read = _without_pairs(*({k: v for pair in left for k, v in pair[side].items()} for side in (0, 1)))
    return [Unpaired(name=name, simulated=size, read=0) for name, size in simulated.items()] + [
        Unpaired(name=name, simulated=0, read=size) for name, size in read.items()
    ]


def _without_pairs(one: dict[str, int], other: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """Both without tensors that have the same size, one for one."""
    pairs = Counter(one.values()) & Counter(other.values())

    def rest(tensors: dict[str, int]) -> dict[str, int]:
        taken = Counter(pairs)
        kept = {}
        for name, size in tensors.items():
            if taken[size]:
                taken[size] -= 1
            else:
                kept[name] = size
        return kept

    return rest(one), rest(other)
