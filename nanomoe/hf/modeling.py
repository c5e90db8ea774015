"""nanoMoE's model as a class of transformers. The files beside this one are nanoMoE's own code."""

import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .model import GPT
from .moe_model import build_config, build_model


class NanoMoEConfig(PretrainedConfig):
    model_type = "nanomoe"

    def __init__(self, nanomoe=None, **rest):
        self.nanomoe = nanomoe  # {"model": nanoMoE's config, "tokenizer": ...}
        super().__init__(**rest)


class NanoMoEForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoMoEConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = build_model(build_config(config.nanomoe["model"]))
        if self.model.config.tie_weights:
            self._tied_weights_keys = {"model.lm_head.weight": "model.transformer.wte.weight"}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        """Compute RoPE's tables, which are not in the file. The weights come from the file."""
        if isinstance(module, GPT) and module.config.position == "rope":
            with module.rope_cos.device:
                module.build_rope_tables()

    def get_input_embeddings(self):
        return self.model.transformer.wte

    def get_output_embeddings(self):
        return self.model.lm_head

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        """input_ids, labels (B, T), labels of -100 ignored; logits (B, T, V), and the loss, in
        training with the balance losses. Padding may follow the tokens, not precede them."""
        if attention_mask is not None and (attention_mask.diff(dim=1) > 0).any():
            raise ValueError("padding before the tokens: use a tokenizer with padding_side='right'")
        targets = input_ids.clone()
        if labels is not None:
            targets[:, :-1], targets[:, -1] = labels[:, 1:], -1
            targets[targets == -100] = -1
        logits, loss = self.model(input_ids, targets)
        return CausalLMOutput(loss=loss if labels is not None else None, logits=logits)
