"""ALBEF's towers started from others: the picture's from a ViT, text and fusion from a BERT, as in the paper."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.bundle import Bundle
from trivium.data.tokenizer import Tokenizer
from trivium.errors import TriviumError
from trivium.load import load
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.bert import Bert
from trivium.models.dino import Dino
from trivium.models.vit import ViT


@dataclass(frozen=True)
class Towers:
    """What a run starts from, where it does not start from a whole ALBEF."""

    image: ViT | None = None
    image_path: str = ""
    text: Bert | None = None
    text_path: str = ""
    tokenizer: Tokenizer | None = None  # of the BERT

    @classmethod
    def open(cls, image_path: str | None, text_path: str | None, config: AlbefConfig) -> Towers:
        """Raises TriviumError where one is of another family or shape, with what differs."""
        image = text = tokenizer = None
        if image_path is not None:
            image = _image(load(image_path), image_path, config)
        if text_path is not None:
            bundle = load(text_path)
            text, tokenizer = _text(bundle, text_path, config), bundle.tokenizer
        return cls(image, image_path or "", text, text_path or "", tokenizer)

    def start(self, model: Albef) -> list[str]:
        """Give a model what carries over. A sentence for each tower."""
        said = []
        if self.image is not None:
            model.start_image(self.image)
            said.append(f"the picture's tower starts from {self.image_path}")
        if self.text is not None:
            words, config = len(self.text.embeddings.word.weight), model.config
            if words != config.vocab_size:
                raise TriviumError(
                    f"the BERT of {self.text_path} has {words:,} words, the vocabulary of this run"
                    f" {config.vocab_size:,}: choose with --data.vocabulary the one that it was trained with"
                )
            model.start_text(self.text)
            head = "" if self.text.mlm_head is not None else "; it has no head of masked words, which starts at random"
            said.append(f"text and fusion start from {self.text_path}, cross-attention at random{head}")
        return said


def _image(start: Bundle, path: str, config: AlbefConfig) -> ViT:
    tower = start.model.backbone if isinstance(start.model, Dino) else start.model
    if not isinstance(tower, ViT):
        raise TriviumError(f"{path} holds a {start.family}, and the picture's tower starts from a ViT: give one")
    theirs, ours = tower.config, config.image_tower
    for name in ("width", "num_layers", "num_heads", "mlp_width", "patch_size"):
        _same(path, name, getattr(theirs, name), getattr(ours, name))
    return tower


def _text(start: Bundle, path: str, config: AlbefConfig) -> Bert:
    bert = start.model
    if not isinstance(bert, Bert):
        raise TriviumError(f"{path} holds a {start.family}, and text and fusion start from a BERT: give one")
    ours = config.text_tower
    for name in ("width", "num_heads", "mlp_width", "max_length", "num_segments"):
        _same(path, name, getattr(bert.config, name), getattr(ours, name))
    _same(path, "num_layers", bert.config.num_layers, config.text_layers + config.fusion_layers)
    return bert


def _same(path: str, name: str, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise TriviumError(
            f"{path} has {name} {theirs}, the model {ours}: choose a checkpoint of its shape, or change --model"
        )
