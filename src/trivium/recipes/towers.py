"""FLAVA's and ALBEF's towers started from models that were trained alone; what carries over is said, and what not."""

from __future__ import annotations

from dataclasses import dataclass

from trivium.bundle import Bundle
from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.errors import TriviumError
from trivium.load import image_tokenizer_hash, load
from trivium.models import towers
from trivium.models.albef import Albef
from trivium.models.bert import Bert as WholeBert
from trivium.models.dino import Dino
from trivium.models.flava import Flava
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.models.towers import State
from trivium.models.vit import ViT, ViTConfig
from trivium.recipes.bert import Bert

TEXT_FIELDS = ("width", "num_heads", "mlp_width", "max_length", "num_segments")  # that a text tower must agree in


@dataclass(frozen=True)
class TextTower:
    """The text encoder of a FLAVA, its head of masked words and its vocabulary."""

    path: str
    bundle: Bundle

    def vocabulary(self) -> Tokenizer:
        """Its own. Raises TriviumError where it came without."""
        if self.bundle.tokenizer is None:
            raise TriviumError(f"{self.path} came without a tokenizer: its words cannot be told from others")
        return self.bundle.tokenizer

    def start(self, model: Flava) -> str:
        """Give a model the tower, and say so. Raises TriviumError for another shape, with the flags to set."""
        assert isinstance(self.bundle.model, Flava)
        its = self.bundle.model.config
        fields = (*TEXT_FIELDS, "text_layers")
        towers.check_shape(f"the text encoder of {self.path}", {f: getattr(its, f) for f in fields}, model.config)
        taken = towers.parts_of(self.bundle.model.state_dict(), towers.TEXT)
        model.load_state_dict(taken, strict=False)
        return (
            f"{self.path}: taken are the text encoder of {its.text_layers} blocks, its {its.vocab_size:,} words and its"
            " head of masked words; the rest of it is left out"
        )


@dataclass(frozen=True)
class ImageTower:
    """A ViT, alone, with DINO's head, or as the image encoder of a FLAVA."""

    path: str
    config: ViTConfig
    state: State  # by the ViT's names
    transform: ImageTransform
    image_tokenizer: ImageTokenizer | None = None  # and the head that was trained with it
    head: State | None = None  # by FLAVA's names

    @classmethod
    def read(cls, path: str) -> ImageTower:
        """Raises TriviumError where there is no tower that FLAVA could take."""
        bundle = load(path)
        model, vit = bundle.model, _vit(bundle)
        if vit is not None:
            return cls(path, vit.config, vit.state_dict(), bundle.transform)
        if not isinstance(model, Flava):
            raise TriviumError(
                f"{path} holds a model of the family {bundle.family}: the image encoder starts from a FLAVA, a DINO, a"
                " ViT, a DeiT or a BEiT"
            )
        vit = towers.vit_of(model)
        head = towers.parts_of(model.state_dict(), ("mim_head.",))
        return cls(path, vit.config, vit.state_dict(), bundle.transform, bundle.image_tokenizer, head)

    def start(self, model: Flava, image_tokenizer: ImageTokenizer | None) -> list[str]:
        """Give a model the tower, and the head where it speaks of the same codes, and say so.

        Raises TriviumError for another shape, with the flags to set.
        """
        try:
            taken, said = towers.image_from_vit(self.state, self.config, model.config)
        except TriviumError as error:
            raise TriviumError(f"{self.path}: {error}") from None
        parts = f"the image encoder of {self.config.num_layers} blocks"
        if self.head is not None and self._same_codes(image_tokenizer):
            taken |= self.head
            parts += " and its head of masked patches"
        elif self.head is not None:
            said.append("its head of masked patches is left out, since it speaks of the codes of another tokenizer")
        model.load_state_dict({name: tensor.float() for name, tensor in taken.items()}, strict=False)
        return [f"{self.path}: taken is {parts}", *(f"{self.path}: {sentence}" for sentence in said)]

    def _same_codes(self, other: ImageTokenizer | None) -> bool:
        mine = self.image_tokenizer
        return mine is not None and other is not None and image_tokenizer_hash(mine) == image_tokenizer_hash(other)


def read_text(path: str) -> Bert | TextTower:
    """A FLAVA or a BERT, of ours or of others. Raises TriviumError where it is neither."""
    bundle = load(path)
    if isinstance(bundle.model, WholeBert):
        return Bert(path, bundle)
    if isinstance(bundle.model, Flava):
        return TextTower(path, bundle)
    raise TriviumError(
        f"{path} holds a model of the family {bundle.family}: the text encoder starts from a FLAVA, or its embeddings"
        " from a BERT"
    )


# ----------------------------------------------------------------------------------------------------- ALBEF's


@dataclass(frozen=True)
class AlbefImageTower:
    """A ViT, alone or with DINO's head (the paper: DeiT-B/16)."""

    path: str
    vit: ViT

    @classmethod
    def read(cls, path: str) -> AlbefImageTower:
        """Raises TriviumError where there is no ViT."""
        bundle = load(path)
        vit = _vit(bundle)
        if vit is None:
            raise TriviumError(f"{path} holds a {bundle.family}, and the picture's tower starts from a ViT: give one")
        return cls(path, vit)

    def start(self, model: Albef) -> str:
        """Give a model the tower, and say so. Raises TriviumError for another shape, with the flags to set."""
        towers.check_shape(f"the ViT of {self.path}", towers.shape_of(self.vit.config), model.config)
        model.start_image(self.vit)
        return f"the picture's tower starts from {self.path}"


@dataclass(frozen=True)
class AlbefTextTower:
    """A BERT of as many blocks as text and fusion have (the paper: bert-base-uncased)."""

    path: str
    bert: WholeBert
    tokenizer: Tokenizer | None

    @classmethod
    def read(cls, path: str) -> AlbefTextTower:
        """Raises TriviumError where there is no BERT."""
        bundle = load(path)
        if not isinstance(bundle.model, WholeBert):
            raise TriviumError(f"{path} holds a {bundle.family}, and text and fusion start from a BERT: give one")
        return cls(path, bundle.model, bundle.tokenizer)

    def start(self, model: Albef) -> str:
        """Give a model what carries over, and say so.

        Raises TriviumError for another shape, with the flags to set, and for another vocabulary.
        """
        its, config = self.bert.config, model.config
        shape = {name: getattr(its, name) for name in TEXT_FIELDS}
        if its.num_layers != config.text_layers + config.fusion_layers:  # half of them for each, as in the paper
            shape |= {"text_layers": its.num_layers // 2, "fusion_layers": its.num_layers - its.num_layers // 2}
        towers.check_shape(f"the BERT of {self.path}", shape, config)
        words = len(self.bert.embeddings.word.weight)
        if words != config.vocab_size:
            raise TriviumError(
                f"the BERT of {self.path} has {words:,} words, the vocabulary of this run {config.vocab_size:,}:"
                " choose with --data.vocabulary the one that it was trained with"
            )
        model.start_text(self.bert)
        head = "" if self.bert.mlm_head is not None else "; it has no head of masked words, which starts at random"
        return f"text and fusion start from {self.path}, cross-attention at random{head}"


def _vit(bundle: Bundle) -> ViT | None:
    tower = bundle.model.backbone if isinstance(bundle.model, Dino) else bundle.model
    return tower if isinstance(tower, ViT) else None
