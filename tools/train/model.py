"""Qwen3-MoE for training: the architecture of Hugging Face's ``Qwen3MoeForCausalLM`` with quick mixture layers.

Shapes: ``T`` tokens (batch and time flattened), ``H`` hidden size, ``I`` expert size, ``E`` experts, ``k`` experts per
token, ``P = T * k`` pairs of a token and an expert, ``V`` vocabulary entries.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Config:
    """Sizes of the model, in the names of Hugging Face's ``config.json``."""

    vocab_size: int = 8192
    hidden_size: int = 256
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 256
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    router_aux_loss_coef: float = 3e-3
    router_z_loss_coef: float = 1e-4

    def to_hf(self) -> dict[str, Any]:
        """``config.json`` as transformers reads it."""
        own = asdict(self)
        del own["router_z_loss_coef"]
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **own,
            "intermediate_size": 2 * self.hidden_size,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "output_router_logits": False,
            "rope_scaling": None,
            "use_sliding_window": False,
            "sliding_window": None,
            "use_cache": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
            "torch_dtype": "bfloat16",
        }

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Config:
        """The sizes in a ``config.json``; raises ``ValueError`` on what this model does not do."""
        if config.get("model_type") != "qwen3_moe" or not config.get("tie_word_embeddings"):
            raise ValueError("only qwen3_moe with tied embeddings is read here")
        if not config.get("norm_topk_prob") or config.get("mlp_only_layers") or config.get("rope_scaling"):
            raise ValueError("only renormalised weights, mixtures in every layer and plain rope are read here")
        return cls(**{key: config[key] for key in cls.__dataclass_fields__ if key in config})


def _grouped(x: Tensor) -> bool:
    # A GPU wants one launch for all experts; a processor wants the rows of one expert in its cache.
    return x.is_cuda


def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    product: Tensor = F.grouped_mm(a, b, offs=ends)
    return product


class MixtureFunction(torch.autograd.Function):
    """``y[t] = sum_j weights[t, j] * expert(picks[t, j])(x[t])`` with an expert ``down @ (silu(gate @ x) * (up @ x))``.

    Pairs are sorted by expert, so that an expert is one plain product over its own rows. One function with its gradient
    written out: autograd would record several hundred small nodes a layer, and keep more of them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, picks: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """``x [T, H]``, ``weights`` and ``picks [T, k]``, ``gate_up [E, 2 I, H]``, ``down [E, H, I]`` -> ``[T, H]``."""
        experts, size = gate_up.shape[0], down.shape[2]
        order = picks.flatten().argsort(stable=True)
        counts = torch.bincount(picks.flatten(), minlength=experts)
        # A processor's products are compiled for each number of rows: rows of scale 0 leave few different numbers.
        unit = 1 if _grouped(x) else 32
        padded = (counts + unit - 1) // unit * unit
        ends = padded.cumsum(0)
        slots = torch.arange(len(order), device=x.device)
        slots += (ends - padded - counts.cumsum(0) + counts).repeat_interleave(counts)
        length = int(ends[-1])
        token = order.new_zeros(length).index_copy_(0, slots, order // picks.shape[1])
        scale = weights.new_zeros(length).index_copy_(0, slots, weights.flatten().index_select(0, order))
        rows = x.index_select(0, token)
        if _grouped(x):
            ends32 = ends.to(torch.int32)
            hidden = _grouped_mm(rows, gate_up.transpose(1, 2), ends32)
            y = _grouped_mm(F.silu(hidden[:, :size]) * hidden[:, size:], down.transpose(1, 2), ends32)
            bounds: list[int] = []
        else:
            bounds = [0, *ends.tolist()]
            hidden, y = x.new_empty(length, 2 * size), x.new_empty(length, x.shape[1])
            # An expert at a time: its rows stay in cache from the first product to the last.
            for e in range(experts):
                own = slice(bounds[e], bounds[e + 1])
                h = torch.mm(rows[own], gate_up[e].t(), out=hidden[own])
                torch.mm(F.silu(h[:, :size]).mul_(h[:, size:]), down[e].t(), out=y[own])
        ctx.save_for_backward(rows, scale, order, slots, token, ends, hidden, gate_up, down)
        ctx.bounds, ctx.shape = bounds, weights.shape
        return torch.zeros_like(x).index_add_(0, token, y.mul_(scale[:, None]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, Tensor, Tensor]:
        rows, scale, order, slots, token, ends, hidden, gate_up, down = ctx.saved_tensors
        size = down.shape[2]
        grad_rows = grad.contiguous().index_select(0, token)
        grad_scale = torch.empty_like(scale)
        if _grouped(grad):
            ends32 = ends.to(torch.int32)
            gate, up = hidden[:, :size], hidden[:, size:]
            silu = F.silu(gate)
            act = silu * up
            grad_act = _grouped_mm(grad_rows, down, ends32)
            grad_scale = (grad_act.float() * act.float()).sum(1).to(scale.dtype)
            grad_act = grad_act * scale[:, None]
            grad_down = _grouped_mm(grad_rows.t(), act * scale[:, None], ends32)
            grad_gate = torch.ops.aten.silu_backward(grad_act * up, gate)
            grad_hidden = torch.cat([grad_gate, grad_act * silu], 1)
            grad_gate_up = _grouped_mm(grad_hidden.t(), rows, ends32)
            grad_rows = _grouped_mm(grad_hidden, gate_up, ends32)
        else:
            bounds = ctx.bounds
            grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
            for e in range(len(bounds) - 1):
                own = slice(bounds[e], bounds[e + 1])
                gate, up, weight = hidden[own, :size], hidden[own, size:], scale[own, None]
                silu = F.silu(gate)
                act = silu * up
                grad_act = grad_rows[own] @ down[e]
                # The gradient of a pair's weight is grad . y = (grad @ down) . act, so y need not be kept.
                torch.sum(grad_act * act, 1, out=grad_scale[own])
                grad_act.mul_(weight)
                torch.mm(grad_rows[own].t(), act.mul_(weight), out=grad_down[e])
                grad_hidden = rows.new_empty(gate.shape[0], 2 * size)
                grad_hidden[:, :size] = torch.ops.aten.silu_backward(grad_act * up, gate)
                torch.mul(grad_act, silu, out=grad_hidden[:, size:])
                torch.mm(grad_hidden.t(), rows[own], out=grad_gate_up[e])
                torch.mm(grad_hidden, gate_up[e], out=grad_rows[own])
        grad_x = torch.zeros_like(grad).index_add_(0, token, grad_rows)
        grad_weights = grad_scale.new_empty(len(order)).index_copy_(0, order, grad_scale.index_select(0, slots))
        return grad_x, grad_weights.view(ctx.shape), None, grad_gate_up, grad_down


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``hidden @ weight.T``, a slice of tokens at a time: all logits are never there at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        """``hidden [T, H]``, ``weight [V, H]``, ``targets [T]`` -> mean loss in nats, loss of each target ``[T]``.

        Only the mean has a gradient.
        """
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)  # a sum over many slices
        for first in range(0, len(targets), chunk):
            part, target = hidden[first : first + chunk], targets[first : first + chunk, None]
            logits = (part @ weight.t()).float()
            top = logits.amax(1, keepdim=True)
            right = logits.gather(1, target)
            logits.sub_(top).exp_()
            mass = logits.sum(1, keepdim=True)
            losses[first : first + chunk] = (mass.log() + top - right)[:, 0]
            logits.div_(mass)
            logits.scatter_add_(1, target, torch.full_like(right, -1.0))
            grad = logits.mul_(1 / len(targets)).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[first : first + chunk])
            if weight.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), part)
            else:
                grad_weight += grad.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses)
        return losses.mean(), losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., size] -> [..., size]``."""
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


def rotary_tables(config: Config, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary embedding, each ``[length, head_dim]``."""
    inverse = config.rope_theta ** (-torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim)
    angles = torch.arange(length, device=device).float()[:, None] * inverse
    angles = torch.cat([angles, angles], 1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _causal_blocks(q: Tensor, k: Tensor, v: Tensor, rows: int = 128) -> Tensor:
    """Causal attention of ``q, k, v [batch, heads, time, size]``, a block of queries at a time against the keys so far.

    On a processor twice as quick, with its gradient, as ``F.scaled_dot_product_attention``.
    """
    batch, heads, time, size = q.shape
    q, k, v = (x.reshape(batch * heads, time, size) for x in (q * size**-0.5, k, v))
    blocks = []
    for first in range(0, time, rows):
        last = min(first + rows, time)
        future = torch.full((last - first, last), -torch.inf, dtype=q.dtype).triu(first + 1)
        scores = torch.baddbmm(future, q[:, first:last], k[:, :last].transpose(1, 2))
        blocks.append(torch.bmm(scores.softmax(-1), v[:, :last]))
    return torch.cat(blocks, 1).view(batch, heads, time, size)


class Attention(nn.Module):
    """Causal grouped-query attention with per-head normalisation of queries and keys."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)
        self.q_norm = RMSNorm(size, config.rms_norm_eps)
        self.k_norm = RMSNorm(size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x [batch, time, H] -> [batch, time, H]``."""
        batch, time, _ = x.shape
        size, config = self.config.head_dim, self.config
        q = self.q_norm(self.q_proj(x).view(batch, time, -1, size)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, time, -1, size)).transpose(1, 2)
        v = self.v_proj(x).view(batch, time, -1, size).transpose(1, 2)
        q, k = _rotate(q, cos, sin).to(v.dtype), _rotate(k, cos, sin).to(v.dtype)
        share = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True) if q.is_cuda else _causal_blocks(q, k, v)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))
        return out


@dataclass
class Routing:
    """What the routers of one forward pass did, a list entry per layer."""

    picks: list[Tensor] = field(default_factory=list)  # [T, k], the heaviest expert first
    balance: list[Tensor] = field(default_factory=list)  # scalars
    z: list[Tensor] = field(default_factory=list)  # scalars
    losses: Tensor | None = None  # [batch, time], nats


class Mixture(nn.Module):
    """A softmax router and its experts."""

    load: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        hidden, size, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * size, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, size))
        # Share of all picks that fell on each expert over a long window; the training loop keeps it.
        self.register_buffer("load", torch.full((experts,), 1 / experts))

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """``x [T, H] -> [T, H]``; appends to ``routing``."""
        config = self.config
        half = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False):
            logits = x.float() @ self.gate.weight.t()
            probs = logits.softmax(-1)
            weights, picks = probs.topk(config.num_experts_per_tok, -1)
            weights = weights / weights.sum(-1, keepdim=True)
            # The window's load is a constant here: its product with the batch's mean probability moves the routers away
            # from experts that were busy over the window, and says nothing about any one sequence.
            routing.balance.append(config.num_experts * (self.load * probs.mean(0)).sum())
            routing.z.append(logits.logsumexp(-1).square().mean())
            routing.picks.append(picks)
            gate_up: Tensor = self.gate_up
            down: Tensor = self.down
            if half:
                x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
            mixed = MixtureFunction.apply(x, weights.to(x.dtype), picks, gate_up, down)  # type: ignore[no-untyped-call]
            y: Tensor = mixed
            return y


class Layer(nn.Module):
    """Attention and mixture, each behind a norm and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mixture(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, routing: Routing) -> Tensor:
        """``x [batch, time, H] -> [batch, time, H]``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        y: Tensor = self.mlp(self.post_attention_layernorm(x).flatten(0, 1), routing)
        return x + y.view_as(x).to(x.dtype)


class Model(nn.Module):
    """The language model with tied embeddings."""

    def __init__(self, config: Config, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # What is added to the stream begins small, the more layers the smaller.
                last = name.endswith(("o_proj.weight", "mlp.down"))
                std = 0.02 / (2 * config.num_hidden_layers) ** 0.5 if last else 0.02
                nn.init.normal_(parameter, 0.0, std, generator=generator)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Routing]:
        """``tokens [batch, time]`` -> normalised hidden states ``[batch, time, H]`` and what the routers did."""
        x = self.embed_tokens(tokens)
        cos, sin = rotary_tables(self.config, tokens.shape[1], tokens.device)
        routing = Routing()
        for layer in self.layers:
            x = layer(x, cos, sin, routing)
        return self.norm(x), routing

    def logits(self, tokens: Tensor) -> Tensor:
        """``tokens [batch, time] -> [batch, time, V]``."""
        hidden, _ = self(tokens)
        logits: Tensor = hidden @ self.embed_tokens.weight.t()
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """Mean cross-entropy in nats, the routers' extra loss, and what the routers did.

        ``tokens`` and ``targets [batch, time]``; ``routing.losses`` holds the loss of each target. Under
        ``torch.autocast`` the products are of bfloat16; the routers' stay float32.
        """
        hidden, routing = self(tokens)
        weight = self.embed_tokens.weight
        if torch.is_autocast_enabled(hidden.device.type):
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        chunk = 8192 if hidden.is_cuda else 512
        cross, losses = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden.flatten(0, 1), weight, targets.flatten(), chunk
        )
        routing.losses = losses.view_as(targets)
        extra = self.config.router_aux_loss_coef * torch.stack(routing.balance).sum()
        extra = extra + self.config.router_z_loss_coef * torch.stack(routing.z).sum()
        return cross, extra, routing

    def mixtures(self) -> list[Mixture]:
        """The mixture of every layer."""
        return [layer.mlp for layer in self.layers if isinstance(layer, Layer)]


def to_hf_state(model: Model) -> dict[str, Tensor]:
    """Weights by the names of Hugging Face's checkpoints (an expert is three matrices), as they are in memory."""
    state: dict[str, Tensor] = {}
    size = model.config.moe_intermediate_size
    for name, tensor in model.state_dict().items():
        name = f"model.{name}"
        if name.endswith("mlp.load"):
            continue
        if name.endswith("mlp.gate_up"):
            for e, expert in enumerate(tensor):
                stem = name.removesuffix("gate_up") + f"experts.{e}."
                state[stem + "gate_proj.weight"] = expert[:size].contiguous()
                state[stem + "up_proj.weight"] = expert[size:].contiguous()
        elif name.endswith("mlp.down"):
            for e, expert in enumerate(tensor):
                state[name.removesuffix("down") + f"experts.{e}.down_proj.weight"] = expert.contiguous()
        else:
            state[name] = tensor.contiguous()
    return state


def from_hf(folder: Path) -> Model:
    """A model from a Hugging Face folder of one ``model.safetensors``, in float32."""
    from safetensors.torch import load_file

    config = Config.from_hf(json.loads((folder / "config.json").read_text()))
    model = Model(config)
    state = {
        name.removeprefix("model."): tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    state.pop("lm_head.weight", None)
    for n in range(config.num_hidden_layers):
        stem = f"layers.{n}.mlp."
        gates, downs = [], []
        for e in range(config.num_experts):
            gate, up, down = (state.pop(f"{stem}experts.{e}.{part}_proj.weight") for part in ("gate", "up", "down"))
            gates.append(torch.cat([gate, up]))
            downs.append(down)
        state[stem + "gate_up"], state[stem + "down"] = torch.stack(gates), torch.stack(downs)
        state[stem + "load"] = torch.full((config.num_experts,), 1 / config.num_experts)
    model.load_state_dict(state)
    return model
