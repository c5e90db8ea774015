"""
A dense GPT: embeddings, a stack of pre-norm blocks (attention, then MLP), a language-model head, the loss.
It knows nothing of experts; moe_model.py extends it.

With the default settings it is GPT-2 as nanoGPT computes it, under nanoGPT's parameter names, so that a nanoGPT
checkpoint loads. The other settings are the parts of today's models: RMSNorm, RoPE, grouped-query attention, SwiGLU
and squared ReLU, QK-norm, untied embeddings.

Shapes: B sequences of T tokens, D = n_embd, V = vocab_size, H = hidden width of the MLP.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def out_of_range(values, at_least, choices, below_one):
    """What is wrong with values, a dict, given {name: least}, {name: what it may be} and the names of shares of 1."""
    found = [
        f"{name} is {values[name]}, expected at least {least}"
        for name, least in at_least.items()
        if not values[name] >= least
    ]
    found += [
        f"{name} is {values[name]!r}, expected one of {', '.join(map(str, allowed))}"
        for name, allowed in choices.items()
        if values[name] not in allowed
    ]
    return found + [
        f"{name} is {values[name]}, expected 0 <= {name} < 1"
        for name in below_one
        if not 0 <= values[name] < 1
    ]


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = (
        50304  # GPT-2's 50257, padded to a multiple of 64 because GPUs multiply round sizes faster
    )
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms
    norm: str = "layernorm"
    position: str = "learned"
    n_kv_head: int = 0  # key/value heads, each shared by n_head / n_kv_head query heads; 0 = n_head
    mlp: str = "gelu"  # 'gelu_tanh' is the approximation that OpenAI's GPT-2 was trained with
    mlp_dim: int = 0  # hidden width of the MLP; 0: the usual one, see mlp_hidden_dim
    qk_norm: bool = False  # RMSNorm on queries and keys
    qk_norm_over: str = "head"  # each head by itself, or the 'width' of all together, each element with a weight of its own
    tie_weights: bool = True  # one matrix for token embedding and language-model head
    gradient_checkpointing: bool = (
        False  # recompute each block in backward instead of keeping its activations
    )

    choices: ClassVar = {
        "norm": ("layernorm", "rmsnorm"),
        "position": ("learned", "rope"),
        "mlp": ("gelu", "gelu_tanh", "swiglu", "relu2"),
        "qk_norm_over": ("head", "width"),
    }
    at_least: ClassVar = {
        "block_size": 1,
        "vocab_size": 1,
        "n_layer": 1,
        "n_head": 1,
        "n_embd": 1,
        "n_kv_head": 0,
        "mlp_dim": 0,
    }
    below_one = ("dropout",)

    def __post_init__(self):
        if problems := self.problems():
            raise ValueError("; ".join(problems))

    def problems(self):
        """Everything that is wrong with this configuration, a list of sentences; empty when it can be built."""
        found = out_of_range(vars(self), self.at_least, self.choices, self.below_one)
        if not found and self.n_embd % self.n_head:
            found.append(f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head})")
        elif not found and self.position == "rope" and self.head_dim % 2:
            found.append(f"rope needs an even head width, but n_embd / n_head is {self.head_dim}")
        if not found and self.n_head % (self.n_kv_head or self.n_head):
            found.append(f"n_head ({self.n_head}) is not divisible by n_kv_head ({self.n_kv_head})")
        return found

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def mlp_hidden_dim(self):
        """H of the dense MLP. By default 4 D, or for SwiGLU, which has three matrices, 8/3 D rounded up to a multiple of 64."""
        return self.mlp_dim or (
            64 * math.ceil(self.n_embd * 8 / 3 / 64) if self.mlp == "swiglu" else 4 * self.n_embd
        )


def build_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def fc_out_features(kind, hidden_dim):
    """Rows of the first matrix of an MLP: SwiGLU's holds the gate's rows, then the up-projection's, as one GEMM."""
    return 2 * hidden_dim if kind == "swiglu" else hidden_dim


def activate(h, kind):
    """The MLP's nonlinearity, from (..., fc_out_features) to (..., H).

    SwiGLU is Shazeer 2020 (arXiv 2002.05202, eq. 6), squared ReLU is Primer (So et al. 2021, arXiv 2109.08668, sec. 4).
    """
    if kind == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "relu2":
        return F.relu(h).square()
    return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")


def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the halves of a head paired as in Llama.

    x (B, T, heads, head_dim); cos, sin (T, 1, head_dim), float32, the first half of sin negated: (a, b) becomes
    (a cos - b sin, b cos + a sin).
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


def cross_entropy(logits, targets):
    """Mean cross-entropy in nats, in float32, of logits (N, V) and targets (N,), of which -1 is ignored."""
    size = (
        2**22 if logits.device.type == "cpu" else 2**27
    )  # numbers at a time: on a CPU, those that its caches hold
    if logits.numel() <= size or torch.compiler.is_compiling():  # a compiler fuses it all
        # CPU autocast, unlike CUDA's, would take the softmax over the vocabulary in bfloat16
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)
    return ChunkedCrossEntropy.apply(logits, targets, max(1, size // logits.shape[1]))


class ChunkedCrossEntropy(torch.autograd.Function):
    """cross_entropy, some rows at a time: of the size of the logits there are only they and their gradient, in their own
    precision, where autograd would hold three or four such tensors in float32."""

    @staticmethod
    def forward(ctx, logits, targets, rows):
        ctx.save_for_backward(logits, targets)
        ctx.rows = rows
        total = sum(
            F.cross_entropy(some.float(), target, ignore_index=-1, reduction="sum")
            for some, target in zip(logits.split(rows), targets.split(rows), strict=True)
        )
        return total / (targets != -1).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        factor, grads = grad * (targets != -1) / (targets != -1).sum(), torch.empty_like(logits)
        for out, some, target, scale in zip(
            *(t.split(ctx.rows) for t in (grads, logits, targets, factor)), strict=True
        ):
            p = some.softmax(dim=-1, dtype=torch.float32)
            target = target.clamp_min(0).unsqueeze(1)
            p.scatter_(1, target, p.gather(1, target) - 1)
            out.copy_(p.mul_(scale.unsqueeze(1)))
        return grads, None, None


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim, self.dropout = config.head_dim, config.dropout
        # queries, keys and values in one GEMM
        self.c_attn = nn.Linear(
            config.n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=config.bias
        )
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm, self.qk_norm_over = config.qk_norm, config.qk_norm_over
        if config.qk_norm:
            width = (1, 1) if config.qk_norm_over == "head" else (self.n_head, self.n_kv_head)
            self.q_norm, self.k_norm = (nn.RMSNorm(n * self.head_dim, eps=1e-5) for n in width)

    def normalize(self, qk):
        """QK-norm (Henry et al. 2020, arXiv 2010.04245), in the RMSNorm form of Qwen3, or over the width that of OLMoE; qk
        (B, T, heads, head_dim). In float32 also under autocast: the weights are, and mixed types take torch's slow path."""
        heads, weights = (self.n_head, self.n_kv_head), (self.q_norm.weight, self.k_norm.weight)
        if self.qk_norm_over == "head":
            weight = torch.cat([w.expand(n, -1) for w, n in zip(weights, heads, strict=True)])
            return F.rms_norm(qk.float(), (self.head_dim,), eps=1e-5) * weight
        return torch.cat(
            [
                F.rms_norm(part.float().flatten(2), w.shape, w, eps=1e-5).view_as(part)
                for part, w in zip(qk.split(heads, dim=2), weights, strict=True)
            ],
            dim=2,
        )

    def forward(self, x, rope=None, past=None):
        """x (B, T, D) to (B, T, D); position t sees positions up to t. rope: (cos, sin) of these T positions. past: the
        KVCache of the positions before, which these T are added to: all from the first on, or one more."""
        B, T, D = x.shape
        heads = self.n_head, self.n_kv_head
        qk, v = (
            self.c_attn(x).view(B, T, -1, self.head_dim).split((sum(heads), self.n_kv_head), dim=2)
        )
        if self.qk_norm:
            qk = self.normalize(qk)
        if rope is not None:
            qk = rotate(qk.float(), *rope)
        # on a CPU torch's attention is slower in bfloat16 than in float32 (2 to 6 times, see assets/LOG.md)
        dtype = torch.float32 if x.device.type == "cpu" else v.dtype
        q, k, v = (
            part.transpose(1, 2).to(dtype) for part in (*qk.split(heads, dim=2), v)
        )  # (B, heads, T, head_dim)
        if past is not None:
            k, v = past.append(k, v)
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=k.shape[2] == T,
                enable_gqa=self.n_kv_head != self.n_head,
                dropout_p=self.dropout if self.training else 0.0,
            )
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, D))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config, hidden_dim=None):
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        hidden_dim = hidden_dim or config.mlp_hidden_dim
        self.c_fc = nn.Linear(
            config.n_embd, fc_out_features(config.mlp, hidden_dim), bias=config.bias
        )
        self.c_proj = nn.Linear(hidden_dim, config.n_embd, bias=config.bias)

    def forward(self, x):
        return F.dropout(
            self.c_proj(activate(self.c_fc(x), self.kind)), self.dropout, self.training
        )


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, past=None):
        x = x + self.attn(self.ln_1(x), rope, past)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stats = {}
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["h"] = nn.ModuleList(self.build_block(i) for i in range(config.n_layer))
        self.transformer["ln_f"] = build_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        if config.position == "rope":
            frequency = 10000.0 ** (-torch.arange(0, config.head_dim, 2) / config.head_dim)
            angle = torch.outer(torch.arange(config.block_size), frequency).unsqueeze(
                1
            )  # (block_size, 1, head_dim / 2)
            self.register_buffer(
                "rope_cos", torch.cat((angle.cos(), angle.cos()), dim=-1), persistent=False
            )
            self.register_buffer(
                "rope_sin", torch.cat((-angle.sin(), angle.sin()), dim=-1), persistent=False
            )
        self.init_weights()

    def build_block(self, layer):
        return Block(self.config)

    def init_weights(self):
        """GPT-2's initialisation: normal(0, 0.02), and every projection that writes into the residual stream scaled by
        1 / sqrt(2 n_layer), so that the stream's variance does not grow with depth (Radford et al. 2019, sec. 2.3).

        It goes by name and not by module type, so stacked expert weights get what their dense twins get.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                residual = name.removesuffix(".weight").endswith("c_proj")
                nn.init.normal_(
                    p, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                )

    # -----------------------------------------------------------------------------
    # forward

    def embed(self, idx, first=0):
        """idx (B, T) int64, at positions from `first` on, to the residual stream (B, T, D) and the rotary tables of the
        positions (or None)."""
        last = first + idx.shape[1]
        if last > self.config.block_size:
            raise ValueError(
                f"a sequence of {last} tokens is longer than block_size ({self.config.block_size})"
            )
        x = self.transformer.wte(idx)
        rope = None
        if self.config.position == "rope":
            rope = self.rope_cos[first:last], self.rope_sin[first:last]
        else:
            x = x + self.transformer.wpe(torch.arange(first, last, device=idx.device))
        return F.dropout(x, self.config.dropout, self.training), rope

    def compile_parts(self, **options):
        """torch.compile every block, and the head with the loss, in place, with torch.compile's options. Blocks are alike and
        share one compilation, which takes a fraction of the time that the whole model's would."""
        for block in self.transformer.h:
            block.compile(**options)
        self.logits_and_loss = torch.compile(self.logits_and_loss, **options)

    def run_block(self, layer, x, rope, cache=None):
        block = self.transformer.h[layer]
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, use_reentrant=False)
        return block(x, rope, cache[layer] if cache else None)

    def logits_and_loss(self, x, targets):
        """The last stream (B, T, D) to logits and mean cross-entropy in nats; targets (B, T) or None, see forward."""
        if targets is None:
            return self.lm_head(self.transformer.ln_f(x[:, [-1]])), None
        logits = self.lm_head(self.transformer.ln_f(x))
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) int64 -> logits (B, 1, V) of the last position, and None.
        With targets (B, T) int64, where -1 is ignored -> logits (B, T, V) and the loss: the training objective in train
        mode, the pure cross-entropy in eval mode (for a dense model they are the same).

        cache: a list of KVCache, one for each block, of the tokens before these (of all of them, or none yet), to
        which these are added.

        Leaves `self.stats`, a dict of detached tensors, after a call with targets. Raises ValueError if there are more tokens
        than block_size.
        """
        x, rope = self.embed(idx, cache[0].length if cache else 0)
        for layer in range(self.config.n_layer):
            x = self.run_block(layer, x, rope, cache)
        logits, loss = self.logits_and_loss(x, targets)
        if loss is not None:
            self.stats = {"cross_entropy": loss.detach()}
        return logits, loss

    def update_balance(self, stats, skipped=False):
        """To be called after each optimizer step, with `stats` summed over the step's micro-batches and processes, and
        `skipped` (a bool or a bool tensor) if the step was: for what it keeps beside its parameters, a dense GPT nothing."""

    def remarks(self, device_type, dtype, compiled):
        """What a user should know about how the model runs there (a torch.dtype); a list of lines."""
        return []

    # -----------------------------------------------------------------------------
    # sizes and cost

    def num_params(self):
        """Parameters without the position embeddings, as nanoGPT counts (tied embeddings count once)."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)

    def num_active_params(self):
        """Parameters that work on one token, counted as num_params does: all of them, in a dense model."""
        return sum(
            self.active_numel(name, p) for name, p in self.named_parameters() if "wpe" not in name
        )

    def active_numel(self, name, p):
        """How many elements of a parameter work on one token."""
        return p.numel()

    def flops_per_token(self):
        """Matmul FLOPs of forward + backward per token: 6 per active weight of blocks and head (embeddings are looked
        up, not multiplied), and 12 n_layer D T for attention's two products, causality not discounted
        (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B)."""
        c = self.config
        weights = sum(
            self.active_numel(name, p)
            for name, p in self.transformer.h.named_parameters()
            if is_matrix(name, p)
        )
        return (
            6 * (weights + self.lm_head.weight.numel()) + 12 * c.n_layer * c.n_embd * c.block_size
        )

    # -----------------------------------------------------------------------------
    # optimizer

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW with weight decay on matrices and embeddings, none on biases and norms; fused where torch has it.

        Stacked expert matrices are matrices and stacked biases are biases: names decide, not the number of dimensions.
        """
        named = list(self.named_parameters())
        groups = [
            {"params": [p for n, p in named if is_matrix(n, p)], "weight_decay": weight_decay},
            {"params": [p for n, p in named if not is_matrix(n, p)], "weight_decay": 0.0},
        ]
        fused = device_type in (
            "cuda",
            "cpu",
        )  # mps's ignores found_inf, by which train.py skips a step
        return torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=fused
        )

    # -----------------------------------------------------------------------------
    # sampling

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Continue idx (B, T) by max_new_tokens sampled tokens (fewer, if all have met `stop`), to (B, T + max_new_tokens).
        Options, and what is sampled: see generate_tokens, which yields token after token."""
        new = list(generate_tokens(self, idx, max_new_tokens, temperature, top_k, **options))
        return torch.cat((idx, *(token.unsqueeze(1).to(idx.device) for token in new)), dim=1)


def is_matrix(name, p):
    return p.dim() >= 2 and not name.endswith("bias")


# -----------------------------------------------------------------------------
# sampling


class KVCache:
    """Keys and values of the tokens so far in one block's attention, with room for `size` of them."""

    def __init__(self, size):
        self.size, self.length = size, 0
        self.k = self.v = None

    def append(self, k, v):
        """k, v (B, heads, T, head_dim) of new tokens to those of all tokens, (B, heads, length, head_dim)."""
        first, self.length = self.length, self.length + k.shape[2]
        if first and k.shape[2] > 1:
            raise ValueError("with keys and values of earlier tokens, new ones come one by one")
        if self.k is None:
            self.k, self.v = (t.new_empty(*t.shape[:2], self.size, t.shape[3]) for t in (k, v))
        self.k[:, :, first : self.length], self.v[:, :, first : self.length] = k, v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def sample_next_token(logits, share, temperature=1.0, top_k=None, top_p=None):
    """One token for each row of logits (B, V), to (B,): the one at `share` (B,), from 0 to below 1, of the probabilities, the
    likeliest one coming first. temperature 0: the likeliest. Raises FloatingPointError for logits that are not finite.

    top_k: only the k likeliest count. top_p: only the likeliest that make up this share of the probability (Holtzman et al.
    2019, arXiv 1904.09751, sec. 3.1), at least one; of what top_k left.
    """
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits, token = logits.double().topk(min(top_k or logits.shape[1], logits.shape[1]), dim=-1)
    p = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    upto = p.cumsum(dim=-1)
    if top_p is not None:
        p = p.where(upto - p < top_p, 0.0)
        upto = p.cumsum(dim=-1)
    # the first one whose sum is above the share; 24 bits of it leave no way to round beyond the last one
    rank = torch.searchsorted(upto, share.double().unsqueeze(1) * upto[:, -1:], right=True)
    return token.gather(1, rank).squeeze(1)


@torch.no_grad()
def generate_tokens(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    top_p=None,
    vocab_size=None,
    seed=None,
    stop=None,
    cached=True,
):
    """Continue the B sequences of idx (B, T), T >= 1, and yield each next token, (B,) int64 on the CPU; temperature, top_k
    and top_p: see sample_next_token.

    The context: all tokens, as long as they are not more than the model's block_size; of a longer idx its last block_size.
    When it is full, it is cut to its last half and grows again, because every shift by one token would change all keys and
    values, and each token would cost as much as a whole context. So `cached` changes how long it takes, and nothing else.

    vocab_size: ids from there on, the padding of the vocabulary, are never drawn. stop: a sequence that has met this token
    repeats it, and when all have, there are no more. Sequence i draws from a generator of its own, seeded with seed + i
    (None: with anything), on the CPU: what it becomes depends neither on the others nor on the kind of device, but for
    rounding. The global state that dropout draws from is left alone, and train or eval mode is as before between two tokens,
    so a sample between two training steps changes nothing.
    """
    block_size = model.config.block_size
    seed = torch.Generator().seed() if seed is None else seed
    shares = torch.stack(
        [
            torch.rand(max_new_tokens, generator=torch.Generator().manual_seed((seed + i) % 2**64))
            for i in range(len(idx))
        ]
    )
    ended = torch.zeros(len(idx), dtype=torch.bool)
    context, cache = idx[:, -block_size:], None
    for n in range(max_new_tokens):
        if context.shape[1] > block_size:
            context, cache = context[:, -max(1, block_size // 2) :], None
        if cached and cache is None:
            room = min(block_size, context.shape[1] + max_new_tokens - n)
            cache, new = [KVCache(room) for _ in range(model.config.n_layer)], context
        else:
            new = context[:, -1:] if cached else context
        if was_training := model.training:
            model.eval()
        logits = model(new, cache=cache)[0][:, -1, :vocab_size].float().cpu()
        if was_training:
            model.train()
        token = sample_next_token(logits, shares[:, n], temperature, top_k, top_p)
        if stop is not None:
            token = token.where(~ended, stop)
            ended |= token == stop
        yield token
        if ended.all():
            return
        context = torch.cat((context, token.unsqueeze(1).to(context.device)), dim=1)
