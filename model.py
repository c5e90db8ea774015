"""
A dense GPT: embeddings, a stack of pre-norm blocks (attention, then MLP), a language-model head,
the loss, and sampling. It imports torch alone and knows nothing of experts, which moe_model.py
adds.

With the default settings it is GPT-2 as nanoGPT computes it, under nanoGPT's parameter names, so
that a nanoGPT checkpoint loads. The other settings are the parts of today's models: RMSNorm, RoPE,
grouped-query attention, SwiGLU and squared ReLU, QK-norm, untied embeddings.

Shapes: B sequences of T tokens, D = n_embd, V = vocab_size, H = hidden width of the MLP.
"""

import math
from dataclasses import dataclass, field, fields
from operator import ge, gt, le, lt

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# -----------------------------------------------------------------------------
# config


class ConfigError(ValueError):
    """A configuration that cannot be built; `problems` lists everything that is wrong with it."""

    def __init__(self, problems):
        super().__init__("; ".join(problems))
        self.problems = problems


LIMITS = {"at_least": ge, "more_than": gt, "at_most": le, "less_than": lt}


def out_of_range(name, value, choices=(), **limits):
    """What is wrong with the value of a setting, a list of one sentence or none. It has to be one
    of the choices if there are any, and a number has to be finite and within its limits."""
    if choices:
        good = value in choices
        expected = f"one of {', '.join(map(str, choices))}"
    elif isinstance(value, str):
        return []
    elif -math.inf < value < math.inf:  # isfinite() fails for a number of 400 digits
        good = all(LIMITS[key](value, limit) for key, limit in limits.items())
        expected = " and ".join(f"{key.replace('_', ' ')} {limits[key]}" for key in limits)
    else:
        good, expected = False, "a finite number"
    return [] if good else [f"{name} is {value!r}, expected {expected}"]


def limited(default, **limits):
    """A field of a config with its default and its limits, see out_of_range."""
    return field(default=default, metadata=limits)


@dataclass
class GPTConfig:
    block_size: int = limited(1024, at_least=1)
    # GPT-2's 50257, padded: GPUs multiply multiples of 64 faster
    vocab_size: int = limited(50304, at_least=1)
    n_layer: int = limited(12, at_least=1)
    n_head: int = limited(12, at_least=1)
    n_embd: int = limited(768, at_least=1)
    dropout: float = limited(0.0, at_least=0, less_than=1)
    bias: bool = True  # in linear layers and LayerNorms
    norm: str = limited("layernorm", choices=("layernorm", "rmsnorm"))
    position: str = limited("learned", choices=("learned", "rope"))
    # key/value heads, each for n_head / n_kv_head query heads; 0 = n_head
    n_kv_head: int = limited(0, at_least=0)
    # 'gelu_tanh' is OpenAI's GPT-2
    mlp: str = limited("gelu", choices=("gelu", "gelu_tanh", "swiglu", "relu2"))
    mlp_dim: int = limited(0, at_least=0)  # H; 0 = the usual width, see mlp_hidden_dim
    qk_norm: bool = False  # RMSNorm on each head's queries and keys
    tie_weights: bool = True  # one matrix for token embedding and language-model head
    gradient_checkpointing: bool = False  # recompute each block in backward: less memory, slower

    def __post_init__(self):
        if problems := self.problems():
            raise ConfigError(problems)

    def problems(self):
        """Everything that is wrong with this configuration, as sentences; empty if nothing is."""
        problems = []
        for f in fields(self):
            problems += out_of_range(f.name, getattr(self, f.name), **f.metadata)
        if problems:
            return problems
        if self.n_embd % self.n_head:
            problems.append(f"n_embd ({self.n_embd}) is not divisible by n_head ({self.n_head})")
        elif self.position == "rope" and self.head_dim % 2:
            problems.append(f"rope needs an even n_embd / n_head, but it is {self.head_dim}")
        kv_heads = self.n_kv_head or self.n_head
        if self.n_head % kv_heads:
            problems.append(f"n_head ({self.n_head}) is not divisible by n_kv_head ({kv_heads})")
        return problems

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def mlp_hidden_dim(self):
        """H of the dense MLP. The usual width is 4 D. SwiGLU has three matrices instead of two, so
        its usual width is 8/3 D, rounded up to a multiple of 64."""
        if self.mlp_dim:
            return self.mlp_dim
        if self.mlp == "swiglu":
            return 64 * math.ceil(self.n_embd * 8 / 3 / 64)
        return 4 * self.n_embd


# -----------------------------------------------------------------------------
# parts


def build_norm(config):
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def fc_out_features(kind, hidden_dim):
    """Rows of an MLP's first matrix. SwiGLU's holds the gate's rows, then the up-projection's."""
    return 2 * hidden_dim if kind == "swiglu" else hidden_dim


def activate(h, kind):
    """The MLP's nonlinearity, from (..., fc_out_features) to (..., H).

    SwiGLU is Shazeer 2020 (arXiv 2002.05202, eq. 6), squared ReLU is Primer (So et al. 2021, arXiv
    2109.08668, sec. 4)."""
    if kind == "swiglu":
        gate, up = h.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "relu2":
        return SquaredReLU.apply(h)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")
    raise ValueError(f"mlp {kind!r} has no branch in activate")


class SquaredReLU(torch.autograd.Function):
    """relu(h)^2. Autograd's own backward would pass over the hidden units four times, this one
    twice; on a CPU that is a tenth of an MLP's time."""

    @staticmethod
    def forward(ctx, h):
        h = F.relu(h)
        ctx.save_for_backward(h)
        return h * h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return (grad * ctx.saved_tensors[0]).mul_(2)


def apply_rotary_emb(x, cos, sin):
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in float32. The halves of a
    head are paired, as in Llama: (a, b) becomes (a cos - b sin, b cos + a sin).

    x (B, T, heads, head_dim); cos and sin (T, 1, head_dim), the first half of sin negated."""
    x = x.float()
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# logits that the loss works on at a time: on a CPU 16 MB in float32, which stay in its caches
CPU_CHUNK, GPU_CHUNK = 2**22, 2**27


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats, in float32. logits (N, V), targets (N,); targets of -1 do not
    count."""
    size = CPU_CHUNK if logits.device.type == "cpu" else GPU_CHUNK
    if logits.numel() <= size or torch.compiler.is_compiling():  # a compiler fuses it all
        # .float(): CPU autocast, unlike CUDA's, would take the softmax in bfloat16
        return F.cross_entropy(logits.float(), targets, ignore_index=-1)
    return ChunkedCrossEntropy.apply(logits, targets, max(1, size // logits.shape[1]))


class ChunkedCrossEntropy(torch.autograd.Function):
    """cross_entropy in chunks of rows. Peak memory is the logits and their gradient; autograd
    would keep three or four float32 tensors of that size."""

    @staticmethod
    def forward(ctx, logits, targets, rows):
        ctx.save_for_backward(logits, targets)
        ctx.rows = rows
        total = 0.0
        for chunk, target in zip(logits.split(rows), targets.split(rows), strict=True):
            chunk = chunk.float()  # the only float32 copy, of one chunk
            total += F.cross_entropy(chunk, target, ignore_index=-1, reduction="sum")
        return total / (targets != -1).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, targets = ctx.saved_tensors
        counts = targets != -1
        scale = grad * counts / counts.sum()
        logits_grad = torch.empty_like(logits)
        for i in range(0, len(logits), ctx.rows):
            chunk = slice(i, i + ctx.rows)
            p = logits[chunk].softmax(dim=-1, dtype=torch.float32)
            # the gradient is softmax minus one-hot target
            target = targets[chunk].clamp_min(0).unsqueeze(1)
            p.scatter_(1, target, p.gather(1, target) - 1)
            logits_grad[chunk] = p.mul_(scale[chunk].unsqueeze(1))
        return logits_grad, None, None


class KVCache:
    """Keys and values of the tokens so far in one block's attention, with room for max_length."""

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0
        self.k = self.v = None

    def append(self, k, v):
        """Add new tokens' k and v, (B, heads, T, head_dim); returns those of all tokens."""
        first, last = self.length, self.length + k.shape[2]
        if first and k.shape[2] > 1:
            raise ValueError("with a filled KV cache, pass one token at a time")
        if self.k is None:
            B, heads, _, head_dim = k.shape
            self.k = k.new_empty(B, heads, self.max_length, head_dim)
            self.v = v.new_empty(B, heads, self.max_length, head_dim)
        self.k[:, :, first:last] = k
        self.v[:, :, first:last] = v
        self.length = last
        return self.k[:, :, :last], self.v[:, :, :last]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.n_kv_head = config.n_kv_head or config.n_head
        # queries, keys and values in one matrix
        heads = config.n_head + 2 * self.n_kv_head
        self.c_attn = nn.Linear(config.n_embd, heads * config.head_dim, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-5)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-5)

    def forward(self, x, rope=None, kv_cache=None):
        """x (B, T, D) to (B, T, D); position t sees positions up to t.

        rope: (cos, sin) of these T positions. kv_cache: this block's KVCache, which is extended:
        pass the whole prompt while it is empty, then one token at a time."""
        c = self.config
        B, T, D = x.shape
        heads = (c.n_head, self.n_kv_head, self.n_kv_head)
        q, k, v = self.c_attn(x).view(B, T, -1, c.head_dim).split(heads, dim=2)
        if c.qk_norm:
            q = normalize_heads(q, self.q_norm.weight)
            k = normalize_heads(k, self.k_norm.weight)
        if rope is not None:
            q = apply_rotary_emb(q, *rope)
            k = apply_rotary_emb(k, *rope)
        # on a CPU torch's attention is 2 to 6 times slower in bfloat16 (assets/LOG.md)
        own_dtype = v.dtype
        dtype = torch.float32 if x.device.type == "cpu" else own_dtype
        # (B, heads, T, head_dim)
        q, k, v = [part.transpose(1, 2).to(dtype) for part in (q, k, v)]
        if kv_cache is not None:
            k, v = kv_cache.append(k, v)
        options = {"is_causal": k.shape[2] == T, "enable_gqa": self.n_kv_head != c.n_head}
        dropout = c.dropout if self.training else 0.0
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **options)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, D).to(own_dtype))
        return F.dropout(y, c.dropout, self.training)


def normalize_heads(x, weight):
    """QK-norm (Henry et al. 2020, arXiv 2010.04245) as an RMSNorm of each head, as Qwen3 has it.

    x (B, T, heads, head_dim). In float32 also under autocast: mixed types take torch's slow
    path, so the weights, which FSDP may hand over in bfloat16, are cast, too."""
    x, weight = x.float(), weight.float()
    # expanded, so that backward sums the gradient of each head before it adds them up
    return F.rms_norm(x, weight.shape, eps=1e-5) * weight.expand(x.shape[2], -1)


class MLP(nn.Module):
    def __init__(self, config, hidden_dim=None):
        super().__init__()
        self.config = config
        hidden_dim = hidden_dim or config.mlp_hidden_dim
        out_features = fc_out_features(config.mlp, hidden_dim)
        self.c_fc = nn.Linear(config.n_embd, out_features, bias=config.bias)
        self.c_proj = nn.Linear(hidden_dim, config.n_embd, bias=config.bias)

    def forward(self, x):
        h = activate(self.c_fc(x), self.config.mlp)
        return F.dropout(self.c_proj(h), self.config.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rope=None, kv_cache=None):
        x = x + self.attn(self.ln_1(x), rope, kv_cache)
        return x + self.mlp(self.ln_2(x))


# -----------------------------------------------------------------------------
# model


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
            self.build_rope_tables()
        self.init_weights()

    def build_block(self, layer):
        return Block(self.config)

    def build_rope_tables(self):
        """cos and sin for apply_rotary_emb, both (block_size, 1, head_dim)."""
        c = self.config
        frequency = 10000.0 ** (-torch.arange(0, c.head_dim, 2) / c.head_dim)
        angle = torch.outer(torch.arange(c.block_size), frequency).unsqueeze(1)
        cos = torch.cat((angle.cos(), angle.cos()), dim=-1)
        sin = torch.cat((-angle.sin(), angle.sin()), dim=-1)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    def init_weights(self):
        """GPT-2's initialisation (Radford et al. 2019, sec. 2.3): normal(0, 0.02), and every
        projection that writes into the residual stream scaled by 1 / sqrt(2 n_layer), so that the
        stream's variance does not grow with depth.

        It goes by name and not by module type, so stacked expert weights get what the dense MLP's
        weights get."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() >= 2:
                residual = name.removesuffix(".weight").endswith("c_proj")
                nn.init.normal_(p, std=residual_std if residual else 0.02)

    # -----------------------------------------------------------------------------
    # forward

    def forward(self, idx, targets=None, kv_cache=None):
        """idx (B, T) int64 -> logits (B, 1, V) of the last position, and None.

        With targets (B, T) int64, where -1 does not count -> logits (B, T, V) and the loss: the
        training objective in train mode, the pure cross-entropy in eval mode (for a dense model
        they are the same). Such a call leaves `self.stats`, a dict of detached tensors.

        kv_cache: a list with one KVCache per block, new or holding the earlier tokens; idx is
        added to it. Raises ValueError if there are more tokens than block_size."""
        x, rope = self.embed(idx, kv_cache)
        for layer in range(self.config.n_layer):
            x = self.run_block(layer, x, rope, kv_cache)
        logits, loss = self.logits_and_loss(x, targets)
        if loss is not None:
            self.stats = {"cross_entropy": loss.detach()}
        return logits, loss

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """Continue idx (B, T) by max_new_tokens sampled tokens, or fewer if all sequences have met
        `stop`; returns (B, T + new tokens). Options: see generate_tokens, which yields one token
        after the other."""
        drawn = generate_tokens(self, idx, max_new_tokens, temperature, top_k, **options)
        tokens = [token.unsqueeze(1).to(idx.device) for token in drawn]
        return torch.cat([idx, *tokens], dim=1)

    def embed(self, idx, kv_cache=None):
        """idx (B, T) to the residual stream (B, T, D), and (cos, sin) of RoPE or None."""
        first = kv_cache[0].length if kv_cache else 0
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

    def run_block(self, layer, x, rope, kv_cache=None):
        block = self.transformer.h[layer]
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rope, use_reentrant=False)
        return block(x, rope, kv_cache[layer] if kv_cache else None)

    def logits_and_loss(self, x, targets):
        """The last residual stream (B, T, D) to logits and loss, see forward."""
        if targets is None:
            return self.head(x[:, [-1]]), None
        logits = self.head(x)
        return logits, self.loss(logits, targets)

    def head(self, x):
        return self.lm_head(self.transformer.ln_f(x))

    def loss(self, logits, targets):
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    def compile_parts(self, **options):
        """torch.compile, with these options, every block, the head and the loss, in place. All
        blocks share one compilation, which takes a fraction of the whole model's time. Head and
        loss are two parts: one part that returned both would make a gradient of zeros for the
        logits, as large as they are."""
        for block in self.transformer.h:
            block.compile(**options)
        self.head = torch.compile(self.head, **options)
        self.loss = torch.compile(self.loss, **options)

    def update_balance(self, stats, skipped=False):
        """Call it after each optimizer step: MoEGPT balances its experts here, a dense GPT does
        nothing. stats: self.stats, summed over the step's micro-batches and processes. skipped:
        a bool or a bool tensor, whether the step was skipped."""

    # -----------------------------------------------------------------------------
    # sizes and cost

    def num_params(self):
        """Parameters without the position embeddings, as nanoGPT counts; tied ones count once."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)

    def num_active_params(self):
        """Parameters that work on one token, counted as num_params counts."""
        params = self.named_parameters()
        return sum(self.active_numel(name, p) for name, p in params if "wpe" not in name)

    def active_numel(self, name, p):
        """How many elements of a parameter work on one token."""
        return p.numel()

    def flops_per_token(self):
        """Matmul FLOPs of forward and backward per token (Chowdhery et al. 2022, PaLM, arXiv
        2204.02311, appendix B): 6 per active weight of blocks and head (embeddings are looked up,
        not multiplied), and 12 n_layer D T for attention's two products, causal or not."""
        c = self.config
        weights = self.lm_head.weight.numel()
        for name, p in self.transformer.h.named_parameters():
            if is_matrix(name, p):
                weights += self.active_numel(name, p)
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def is_matrix(name, p):
    return p.dim() >= 2 and not name.endswith("bias")


# -----------------------------------------------------------------------------
# sampling


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
    use_kv_cache=True,
):
    """Continue the B sequences of idx (B, T), T >= 1, and yield each next token, (B,) int64 on the
    CPU.

    temperature, top_k, top_p: see sample_next_token. vocab_size: ids from there on, the padding of
    the vocabulary, are never drawn. stop: a sequence that has met this token repeats it; when all
    have, the generator ends. seed: sequence i draws from its own CPU generator, seeded with
    seed + i, so it depends neither on the other sequences nor (but for rounding) on the device;
    None: a random seed. use_kv_cache changes the speed and, but for rounding, nothing else.

    A prompt longer than block_size is cut to its last block_size tokens. When the context is full
    it is cut to its last half and grows again: sliding it by one token would invalidate the whole
    cache at every step.

    Neither torch's global random state nor the model's train or eval mode changes, so a sample
    between two training steps changes nothing."""
    block_size = model.config.block_size
    u = uniform_numbers(len(idx), max_new_tokens, seed)
    stopped = torch.zeros(len(idx), dtype=torch.bool)
    context, kv_cache = idx[:, -block_size:], None
    for n in range(max_new_tokens):
        # cut a context that has grown too long
        if context.shape[1] > block_size:
            context, kv_cache = context[:, -max(1, block_size // 2) :], None
        # what the model has to read: all of it, or with a filled cache the last token
        new = context
        if use_kv_cache and kv_cache is None:
            length = min(block_size, context.shape[1] + max_new_tokens - n)
            kv_cache = [KVCache(length) for _ in range(model.config.n_layer)]
        elif use_kv_cache:
            new = context[:, -1:]
        # the logits of the next token
        was_training = model.training
        if was_training:
            model.eval()
        logits = model(new, kv_cache=kv_cache)[0]
        if was_training:
            model.train()
        logits = logits[:, -1, :vocab_size].float().cpu()
        # draw it; a sequence that has stopped repeats its last one
        token = sample_next_token(logits, u[:, n], temperature, top_k, top_p)
        if stop is not None:
            token = token.where(~stopped, stop)
            stopped |= token == stop
        yield token
        if stopped.all():
            return
        context = torch.cat((context, token.unsqueeze(1).to(context.device)), dim=1)


def uniform_numbers(B, count, seed):
    """(B, count) numbers from 0 to below 1; row i comes from a generator seeded with seed + i."""
    if seed is None:
        seed = torch.Generator().seed()
    rows = []
    for i in range(B):
        generator = torch.Generator().manual_seed((seed + i) % 2**64)
        rows.append(torch.rand(count, generator=generator))
    return torch.stack(rows)


def sample_next_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """Draw one token for each row of logits (B, V), to (B,), by the inverse of the cumulative
    distribution at u (B,), 0 <= u < 1. Raises FloatingPointError for logits that are not finite.

    temperature 0: the likeliest token. top_k: only the k likeliest count. top_p: of those, only
    the likeliest that together have this probability, at least one (nucleus sampling, Holtzman et
    al. 2019, arXiv 1904.09751, sec. 3.1)."""
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = min(top_k or logits.shape[1], logits.shape[1])
    logits, token = logits.double().topk(k, dim=-1)  # the likeliest first
    p = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)
    cdf = p.cumsum(dim=-1)
    if top_p is not None:
        p = p.where(cdf - p < top_p, 0.0)
        cdf = p.cumsum(dim=-1)
    # the first token whose cdf exceeds u; u is at most 1 - 2**-24 and the cdf is float64, so
    # rounding never leads past the last token
    index = torch.searchsorted(cdf, u.double().unsqueeze(1) * cdf[:, -1:], right=True)
    return token.gather(1, index).squeeze(1)
