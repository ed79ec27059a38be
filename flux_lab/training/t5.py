"""Stage 4a: the T5 encoder, text to text.

    python -m flux_lab.training.t5 --scenes runs/scenes --tokenizers runs/tokenizers --out runs/t5 --steps 2500

The task is to rewrite a caption in the standard wording, with a small decoder that is thrown away afterwards: what the decoder is to
say, with every attribute at the right object and the objects in the right relation, must be in the encoder's vectors.
Writes `text_encoder_2/` (a transformers folder).
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from flux_lab.checkpoints import save_model
from flux_lab.config import MINI_T5, T5Config
from flux_lab.t5 import T5EncoderModel
from flux_lab.training.loop import Settings, is_main_process, load_trained, train
from flux_lab.training.options import text_stage_options
from flux_lab.training.texts import CaptionIds, caption_ids

PAD = 0
DECODER_LAYERS = 2


class Rewriter(nn.Module):
    """The encoder that we keep and a decoder that says its vectors in the standard wording."""

    def __init__(self, config: T5Config, length: int):
        super().__init__()
        self.encoder = T5EncoderModel(config)
        layer = nn.TransformerDecoderLayer(
            config.d_model, config.num_heads, 4 * config.d_model, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.decoder = nn.TransformerDecoder(layer, DECODER_LAYERS, norm=nn.LayerNorm(config.d_model))
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Parameter(0.02 * torch.randn(length, config.d_model))
        self.head = nn.Linear(config.d_model, config.vocab_size)

    def forward(self, source: Int[Tensor, "batch length"], target: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
        # The decoder sees the target one place late, starting with the padding id, as T5 does.
        previous = F.pad(target, (1, -1), value=PAD)
        future = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        said = self.decoder(self.embedding(previous) + self.positions, self.encoder(source), tgt_mask=future, tgt_is_causal=True)
        logits = self.head(said)
        real = target != PAD
        right = (logits.argmax(-1) == target) | ~real
        return {
            "loss": F.cross_entropy(logits[real], target[real]),
            "tokens_right": right[real].float().mean(),
            "captions_right": right.all(dim=1).float().mean(),
        }


class Rewrites:
    """Batches of captions with their standard wordings."""

    def __init__(self, ids: CaptionIds, settings: Settings):
        self.source, self.target, self.settings = ids.t5.flatten(0, 1), ids.target.flatten(0, 1), settings

    def __call__(self, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        which = torch.randint(len(self.source), (self.settings.batch_size,), generator=generator)
        return {"source": self.source[which].long(), "target": self.target[which].long()}


def main(arguments: list[str] | None = None) -> None:
    options, settings = text_stage_options(__doc__, arguments, out=Path("runs/t5"), steps=2500)
    ids = caption_ids(options.scenes, options.tokenizers)
    torch.manual_seed(options.seed)
    train(Rewriter(MINI_T5, ids.t5.shape[-1]), Rewrites(ids, settings), options.out, settings)
    trained = load_trained(options.out, "encoder")
    # One tensor under two names, of which a checkpoint of parameters has the first.
    trained["encoder.embed_tokens.weight"] = trained["shared.weight"]
    encoder = T5EncoderModel(MINI_T5)
    encoder.load_state_dict(trained)
    if is_main_process():
        save_model(encoder, options.out / "text_encoder_2")


if __name__ == "__main__":
    main()
