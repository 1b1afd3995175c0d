"""The names of what the embedded suite finds of a model like FLAVA, no more and no fewer."""

from __future__ import annotations

WAYS = [f"{way}{order}" for way in ("text_to_image", "image_to_text") for order in ("", "_reranked")]
RETRIEVAL = {
    f"retrieval.{protocol}.{way}_{figure}"
    for protocol in ("style", "concepts")
    for way in WAYS
    for figure in ("r1", "r5", "r10", "median_rank")
}
IMAGE_TO_IMAGE = {
    "retrieval.style.image_to_image_r1",
    *(
        f"retrieval.style.image_to_image.{name}_r1"
        for name in ("class_token", "projected", "mean_of_patches", "pixels")
    ),
}
CLASSIFICATION = {
    f"{protocol}.{level}"
    for protocol in ("zero_shot", "knn", "knn.other_concepts", "probe")
    for level in ("group", "subgroup")
}
OF_THE_MODEL = {*RETRIEVAL, *IMAGE_TO_IMAGE, *CLASSIFICATION, "itm.accuracy", "itm.auroc"}
