"""ALBEF (Li et al., 2021, arXiv 2107.07651), composed from transformers' ViT and BERT parts.

    image -> ViT ---------------------------+------------------+
                                            |                  |
    text -> embeddings -> text layers -> fusion layers -> answer decoder -> word head
                                                               |
                                      answer so far -----------+  (it reads the fused states, not the image)

The last `fusion_layers` of the text layers attend to the image, between self-attention and feed-forward. The decoder
is as deep; its weights start as theirs, and it reads the fused states where they read the image. The base model has 12
ViT blocks, 12 text layers of which 6 fuse, and 6 decoder layers.

Saved and loaded as a Hugging Face folder of model type "albef".
"""

# mypy: disallow-untyped-calls=False
# (transformers' parts have no annotations)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPredictionHeadTransform,
    BertPreTrainedModel,
)

from fedloom.backbones.network import Junction
from fedloom.errors import BackboneError

TEMPERATURE = 0.07  # of the contrastive loss, at the start


class AlbefConfig(PreTrainedConfig):
    """Sizes of an ALBEF; the defaults are those of the published base model at 256 pixels."""

    model_type = "albef"
    sub_configs_defaults = {"vision_config": ViTConfig, "text_config": BertConfig}  # type: ignore[dict-item]  # noqa: RUF012

    vision_config: ViTConfig | dict[str, Any] | None = None
    text_config: BertConfig | dict[str, Any] | None = None
    fusion_layers: int = 6  # how many of the last text layers attend to the image; the decoder's depth
    projection_dim: int = 256  # of the contrastive features
    tie_word_embeddings: bool = True  # the word head shares the embeddings' weights

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = {"image_size": 256, "layer_norm_eps": 1e-6}
        super().__post_init__(**kwargs)


class Layer(GradientCheckpointingLayer):
    r"""A BERT layer that may read another sequence between self-attention and feed-forward.

    .. math:: z = LN(r + h), \quad out = LN(r + A(z) + h)

    h is what the attentions made, r what the feed-forward made of h, A an adapter; without one, out = z.
    """

    def __init__(self, config: BertConfig, reads: bool):
        super().__init__()
        self.attention = BertAttention(config)
        self.crossattention = BertAttention(config, is_cross_attention=True) if reads else None
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config)
        self.junction = Junction()

    def forward(
        self, hidden: Tensor, mask: Tensor, states: Tensor | None = None, states_mask: Tensor | None = None
    ) -> Tensor:
        """hidden (n, length, dim) and states (n, positions, dim), with their additive masks (n or 1, 1, *, keys)."""
        hidden, _ = self.attention(hidden, attention_mask=mask)
        if self.crossattention is not None:
            hidden, _ = self.crossattention(hidden, encoder_hidden_states=states, encoder_attention_mask=states_mask)
        output = self.output
        fed = output.dropout(output.dense(self.intermediate(hidden)))
        out: Tensor = output.LayerNorm(fed + hidden)
        added = self.junction(out, fed)
        return out if added is fed else output.LayerNorm(added + hidden)


class TextEncoder(BertPreTrainedModel):
    """Embeddings, text layers and, above them, fusion layers."""

    def __init__(self, config: BertConfig, fusion_layers: int):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        first = config.num_hidden_layers - fusion_layers
        self.layers = nn.ModuleList([Layer(config, reads=i >= first) for i in range(config.num_hidden_layers)])
        self.text_layers = first
        self.post_init()


class WordHead(nn.Module):
    """Hidden states to logits over the vocabulary."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.decoder(self.transform(hidden))
        return logits


class AlbefModel(PreTrainedModel):
    """The model, in the parts of which its uses are made: `image`, `text`, `fuse`, `answer`.

    Texts come as ids (n, length) and mask (n, length), 1 for a word piece and 0 for padding.
    """

    config: AlbefConfig
    config_class = AlbefConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"head.decoder.weight": "text.embeddings.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: AlbefConfig):
        super().__init__(config)
        vision: Any = config.vision_config
        text: Any = config.text_config
        if vision.hidden_size != text.hidden_size or not 0 < config.fusion_layers <= text.num_hidden_layers:
            raise BackboneError(
                f"an ALBEF needs images and texts of one width and 1 to {text.num_hidden_layers} fusion layers; "
                f"config.json has widths {vision.hidden_size} and {text.hidden_size} and fusion_layers = "
                f"{config.fusion_layers}."
            )
        self.vision = ViTModel(vision, add_pooling_layer=False)
        self.text = TextEncoder(text, config.fusion_layers)
        self.decoder = nn.ModuleList([Layer(text, reads=True) for _ in range(config.fusion_layers)])
        self.head = WordHead(text)
        self.vision_proj = nn.Linear(text.hidden_size, config.projection_dim)
        self.text_proj = nn.Linear(text.hidden_size, config.projection_dim)
        self.match = nn.Linear(text.hidden_size, 2)  # from the fused [CLS]: not its text, its text
        self.temperature = nn.Parameter(torch.tensor(TEMPERATURE))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, AlbefModel):
            initialization.constant_(module.temperature, TEMPERATURE)

    def get_input_embeddings(self) -> nn.Module:
        """Of word pieces; PEFT asks which modules share their weights."""
        words: nn.Module = self.text.embeddings.word_embeddings
        return words

    def image(self, pixels: Tensor) -> Tensor:
        """Image states (n, positions, dim) of normalised pixels (n, 3, size, size)."""
        states: Tensor = self.vision(pixels).last_hidden_state
        return states

    def words(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Text states (n, length, dim) below fusion."""
        hidden: Tensor = self.text.embeddings(ids)
        for layer in self.text.layers[: self.text.text_layers]:
            hidden = layer(hidden, self.additive(mask[:, None, None]))
        return hidden

    def fuse(self, words: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """Fused states (n, length, dim) of text states, their mask, and image states."""
        hidden, everywhere = words, self.additive(image.new_ones(1, 1, 1, image.shape[1]))
        for layer in self.text.layers[self.text.text_layers :]:
            hidden = layer(hidden, self.additive(mask[:, None, None]), image, everywhere)
        return hidden

    def decode(self, ids: Tensor, position: Tensor, reads: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """Decoder states (n, length, dim) of answers so far, given fused states (n, question, dim) and their mask.

        ids and position (n or 1, length): word pieces and how many stand before them
        reads (n or 1, length, length) bool: whether a piece (row) may read another (column)
        """
        hidden: Tensor = self.text.embeddings(ids, position_ids=position).expand(states.shape[0], -1, -1)
        for layer in self.decoder:
            hidden = layer(hidden, self.additive(reads[:, None]), states, self.additive(states_mask[:, None, None]))
        return hidden

    def answer(self, ids: Tensor, mask: Tensor, states: Tensor, states_mask: Tensor) -> Tensor:
        """Logits (n, length, words) of each answer piece's successor: the decoder under a causal mask."""
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        position = torch.arange(length, device=ids.device)[None]
        decoded = self.decode(ids, position, causal & mask[:, None].bool(), states, states_mask)
        logits: Tensor = self.head(decoded)
        return logits

    def contrast(self, image: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Image and text features (n, projection_dim) of unit length, from the two [CLS] below fusion."""
        return F.normalize(self.vision_proj(image[:, 0]), dim=-1), F.normalize(self.text_proj(words[:, 0]), dim=-1)

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> BaseModelOutput:
        """Fused states of image-text pairs."""
        words = self.words(input_ids, attention_mask)
        return BaseModelOutput(last_hidden_state=self.fuse(words, attention_mask, self.image(pixel_values)))

    def additive(self, keep: Tensor) -> Tensor:
        """What is added to attention scores: zero where `keep`, the lowest number elsewhere."""
        return torch.zeros_like(keep, dtype=self.dtype).masked_fill(~keep.bool(), torch.finfo(self.dtype).min)

    def copy_fusion_to_decoder(self) -> None:
        """Start the decoder as a copy of the fusion layers, as ALBEF does for question answering."""
        for layer, source in zip(self.decoder, self.text.layers[self.text.text_layers :], strict=True):
            layer.load_state_dict(source.state_dict())


AutoConfig.register("albef", AlbefConfig, exist_ok=True)
AutoModel.register(AlbefConfig, AlbefModel, exist_ok=True)
