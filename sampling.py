"""
Text from a model, token by token: the next one is drawn from the logits, and what attention needs of the earlier ones is kept.
It knows nothing of the model but its forward.
"""

import torch


class KeyValues:
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
        self.k[:, :, first:self.length], self.v[:, :, first:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


def draw(logits, share, temperature=1.0, top_k=None, top_p=None):
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
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, vocab_size=None, seed=None, stop=None,
           cached=True):
    """Continue the B sequences of idx (B, T), T >= 1, and yield each next token, (B,) int64 on the CPU; temperature, top_k
    and top_p: see draw.

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
    shares = torch.stack([torch.rand(max_new_tokens, generator=torch.Generator().manual_seed((seed + i) % 2**64))
                          for i in range(len(idx))])
    ended = torch.zeros(len(idx), dtype=torch.bool)
    context, cache = idx[:, -block_size:], None
    for n in range(max_new_tokens):
        if context.shape[1] > block_size:
            context, cache = context[:, -max(1, block_size // 2):], None
        if cached and cache is None:
            room = min(block_size, context.shape[1] + max_new_tokens - n)
            cache, new = [KeyValues(room) for _ in range(model.config.n_layer)], context
        else:
            new = context[:, -1:] if cached else context
        if was_training := model.training:
            model.eval()
        logits = model(new, cache=cache)[0][:, -1, :vocab_size].float().cpu()
        if was_training:
            model.train()
        token = draw(logits, shares[:, n], temperature, top_k, top_p)
        if stop is not None:
            token = token.where(~ended, stop)
            ended |= token == stop
        yield token
        if ended.all():
            return
        context = torch.cat((context, token.unsqueeze(1).to(context.device)), dim=1)
