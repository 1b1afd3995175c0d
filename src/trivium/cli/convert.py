"""`trivium convert IN --to FORMAT --out DIR`: weights of one library for another."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.bundle import Bundle
    from trivium.models.image_tokenizer import ImageTokenizer


PROCESSORS = {"hf-flava": "FlavaProcessor", "hf-clip": "CLIPProcessor"}


def convert(
    path: Path,
    *,
    to: Annotated[str, arg(metavar="FORMAT")],
    out: Path,
    from_: Annotated[str | None, arg(name="from", metavar="FORMAT")] = None,
    shard_mb: float = 5000,
) -> None:
    """Read a checkpoint of any layout and write it in another, whole or not at all.

    Args:
        path: a run folder, checkpoint, model folder, or a file or folder of another library.
        to: trivium (a model folder), hf-flava, torchmultimodal-flava, hf-clip, open-clip, hf-vit, timm-vit, dino,
            hf-bert, albef, albef-retrieval (as mscoco.pth has it), albef-grounding (as refcoco.pth), mmf-unit or detr;
            an image tokenizer alone also to dalle (encoder.safetensors and decoder.safetensors).
        out: a folder that does not exist yet, or is empty.
        from_: the layout of PATH, where its tensors' names should not decide: one of those, openai-clip or dalle.
        shard_mb: weights of more megabytes are written as several files with an index; below, as one.

    Raises TriviumError as `trivium.load` does, where a layout has no place for this model, and where `out` is taken.
    """
    from trivium.convert import FORMATS, read_foreign
    from trivium.hub import located
    from trivium.load import bundle_of, image_tokenizer_alone, model_folder, open_own

    if to not in (*FORMATS, "dalle"):
        raise TriviumError(f"no format is called {to!r}: choose one of {', '.join(FORMATS)}, dalle")
    if shard_mb <= 0:
        raise TriviumError(f"--shard-mb is {shard_mb:g}: it must be above 0")
    shard_bytes = int(shard_mb * 1e6)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):  # told before anything is read, and said
        raise TriviumError(f"{out} exists already and is not empty: name a new folder, or remove it first")
    said: list[str] = []
    path = located(path)
    folder = model_folder(path, said) if from_ is None else None
    foreign = None if folder is not None else read_foreign(path, from_)
    tokenizer: ImageTokenizer | None = None
    if folder is not None:
        tokenizer = image_tokenizer_alone(folder)
    elif foreign is not None and foreign.model is None:
        tokenizer = foreign.image_tokenizer
    if tokenizer is not None:
        _write_image_tokenizer(tokenizer, to, out)
        print(f"{out} holds the image tokenizer ({tokenizer.num_codes:,} codes) in the layout {to}")
        return
    if to == "dalle":
        raise TriviumError(f"dalle is a layout of image tokenizers, and {path} holds a model: convert it to another")
    if folder is not None:
        bundle = open_own(folder)
    else:
        assert foreign is not None
        bundle, said = bundle_of(foreign), foreign.said
    for sentence in said:
        print(sentence)
    if to == "trivium":
        bundle.save(out, shard_bytes=shard_bytes)
    else:
        _write_foreign(bundle, to, out, shard_bytes)
    print(f"{out} holds the model in the layout {to}")


def _write_image_tokenizer(tokenizer: ImageTokenizer, to: str, out: Path) -> None:
    """One alone: as ours, under DALL-E's names, or as transformers' FlavaImageCodebook."""
    from trivium.convert import dalle
    from trivium.load import save_image_tokenizer
    from trivium.manifest import written_beside
    from trivium.models.dvae import DVae
    from trivium.tensor_files import save_tensors

    if to == "trivium":
        save_image_tokenizer(tokenizer, out)
        return
    if not isinstance(tokenizer, DVae) or to not in ("dalle", "hf-flava"):
        raise TriviumError(f"{to} has no place for an image tokenizer of the kind {tokenizer.kind} alone")
    if to == "hf-flava" and tokenizer.decoder is not None:
        print(f"left out: {to} has no place for the decoder of the image tokenizer")
    parts = ["encoder"] if tokenizer.decoder is None else ["encoder", "decoder"]
    with written_beside(out) as folder:
        if to == "dalle":
            for part in parts:
                save_tensors(dalle.to_dalle(tokenizer, part), folder / f"{part}.safetensors")
        else:
            state, config = dalle.to_hf(tokenizer)
            save_tensors(state, folder / "model.safetensors")
            named = {"architectures": ["FlavaImageCodebook"], "model_type": "flava_image_codebook"}
            _write_json(folder / "config.json", named | config)


def _write_foreign(bundle: Bundle, to: str, out: Path, shard_bytes: int) -> None:
    from trivium.convert import ADAPTERS, processor
    from trivium.manifest import written_beside
    from trivium.models.dvae import DVae
    from trivium.models.flava import Flava
    from trivium.tensor_files import save_tensors

    model, image_tokenizer = bundle.model, bundle.image_tokenizer
    adapter = ADAPTERS[to]
    write = adapter.write
    assert write is not None
    if bundle.family in adapter.tower_of:
        print(f"left out: {to} has no place for the head of a {bundle.family}, its tower alone is written")
    elif bundle.family != adapter.family:
        raise TriviumError(f"{to} is a layout of {adapter.family}, and this model is of the family {bundle.family}")
    if image_tokenizer is not None and not isinstance(image_tokenizer, DVae):
        print(f"left out: {to} has no place for an image tokenizer of the kind {image_tokenizer.kind}")
        image_tokenizer = None
    if isinstance(image_tokenizer, DVae) and image_tokenizer.decoder is not None:
        print(f"left out: {to} has no place for the decoder of the image tokenizer")
    if isinstance(model, Flava) and model.config.pads_visible != adapter.pads_visible:
        there, here = ("sees", "does not") if adapter.pads_visible else ("is kept from", "sees them")
        print(
            f"left out: {to} has no place for pads_visible; its multimodal encoder {there} the pads of a text and this"
            f" model's {here}, so texts with pads are fused otherwise there"
        )
    if bundle.false_pairs is not None:
        print(
            f"left out: {to} has no place for false_pairs; the share of false ones among the training pairs"
            f" ({bundle.false_pairs:g}) is needed for the exact accuracy of matching"
        )
    if bundle.fusion_trained is False:
        print(
            f"left out: {to} has no place for fusion_trained; that no loss has reached what reads pictures and texts"
            " together is not known to a fine-tuning from there, which needs --head.fusion concatenated"
        )
    whole = None
    if adapter.write_head is not None and bundle.head is not None and bundle.head_config is not None:
        whole = adapter.write_head(model, bundle.head, bundle.head_config, bundle.labels or ())
    state, config = whole or write(model, image_tokenizer)
    if adapter.family == "albef":
        config["max_length"] = bundle.max_length
    lacking = [] if adapter.lacks is None else adapter.lacks(model, bundle.head_config if whole else None)
    if drawn := [part for part in bundle.untrained if part not in lacking]:
        print(f"left out: {to} has no place for untrained; that nothing has trained {', '.join(drawn)} is not known"
              " there")  # fmt: skip
    if lacking:
        print(f"left out: {to} has no place here for {', '.join(lacking)}; whoever reads it back draws them at random")
    with written_beside(out) as folder:
        apart = {name: tensor.clone() for name, tensor in state.items()}  # some stand there under two names
        if to == "open-clip":
            config["preprocess_cfg"] = processor.open_clip_preprocessing(**asdict(bundle.transform))
            if bundle.transform.resize is not None:
                print(
                    f"left out: {to} has no place for a resize to {bundle.transform.resize} pixels before the middle is"
                    f" cut out; pictures are resized to {bundle.transform.size} there"
                )
        elif to in ("timm-vit", "dino"):
            config["pretrained_cfg"] = processor.transform_to_timm(**asdict(bundle.transform))
        save_tensors(apart, folder / adapter.weights, shard_bytes)
        _write_json(folder / adapter.configs[0], config)
        if to in ("hf-flava", "hf-clip"):
            _write_processor(bundle, folder, PROCESSORS[to])
            _write_tokenizer(bundle, folder, {"processor_class": PROCESSORS[to]})
        elif to == "hf-bert":
            _write_tokenizer(bundle, folder, {})
        elif to == "open-clip" and bundle.tokenizer is not None:
            bundle.tokenizer.save(folder / "tokenizer.json")
        elif adapter.family == "albef":
            _write_tokenizer(bundle, folder, {})
            if whole is not None and bundle.head_config.gives == "text" and bundle.labels:  # type: ignore[union-attr]
                _write_json(folder / "answer_list.json", list(bundle.labels))
        elif to in ("mmf-unit", "detr"):
            _write_unit_files(bundle, folder, to)
        elif to == "hf-vit":
            _write_json(folder / "preprocessor_config.json", processor.vit_processor_to_hf(**asdict(bundle.transform)))
    if bundle.head is not None and whole is None:
        print(f"left out: {to} has no place for the head that was trained for {bundle.head_config.task}")  # type: ignore[union-attr]


def _write_processor(bundle: Bundle, folder: Path, name: str) -> None:
    """What a processor's from_pretrained reads, beside the tokenizer."""
    from trivium.convert import processor
    from trivium.models.flava import Flava

    preprocessor = processor.image_processor_to_hf(**asdict(bundle.transform))
    if isinstance(bundle.model, Flava):
        stride = bundle.image_tokenizer.stride if bundle.image_tokenizer is not None else 8
        grid = bundle.model.config.grid
        preprocessor |= processor.masks_and_codebook_to_hf(grid, grid * stride)
    preprocessor |= {"processor_class": name, "image_processor_type": name.replace("Processor", "ImageProcessor")}
    _write_json(folder / "preprocessor_config.json", preprocessor)


def _write_unit_files(bundle: Bundle, folder: Path, to: str) -> None:
    """What `trivium.load` reads beside the weights of a UniT or a DETR: tokenizer and names of labels."""
    from trivium.convert.unit import TRANSFORM
    from trivium.data.transforms import ImageTransform

    if bundle.model.config.text_layers:  # type: ignore[union-attr]
        _write_tokenizer(bundle, folder, {})
    if bundle.labels_of is not None:
        _write_json(folder / "labels.json", bundle.labels_of)
    published, own = asdict(ImageTransform(**TRANSFORM)), asdict(bundle.transform)
    if differing := [name for name in own if own[name] != published[name]]:
        here, there = (", ".join(f"{name} {each[name]}" for name in differing) for each in (own, published))
        print(
            f"left out: {to} has no place for how pictures are prepared; whoever reads it back prepares them with"
            f" {there}, and this model was made for {here}"
        )


def _write_tokenizer(bundle: Bundle, folder: Path, settings: dict[str, str]) -> None:
    """What a tokenizer's from_pretrained reads. settings: of tokenizer_config.json beside the usual ones."""
    from trivium.convert import processor

    if bundle.tokenizer is None:
        print("left out: the tokenizer files, since the checkpoint came without a tokenizer")
        return
    bundle.tokenizer.save(folder / "tokenizer.json")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = processor.tokenizer_to_hf(tokenizer, bundle.tokenizer.specials, bundle.max_length)
    _write_json(folder / "tokenizer_config.json", settings | config)
    if tokenizer["model"]["type"] == "WordPiece":
        pieces = "\n".join(processor.vocabulary(tokenizer)) + "\n"
        (folder / "vocab.txt").write_text(pieces, encoding="utf-8")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
