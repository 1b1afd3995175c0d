"""Models by their id on Hugging Face's hub: `hf-hub:facebook/flava-full`, with a revision `hf-hub:owner/name@v1.0`.

They are kept in the cache of huggingface_hub (the extra ``hub``), so a second call needs no network.
"""

from __future__ import annotations

from pathlib import Path

from trivium.errors import TriviumError

PREFIX = "hf-hub:"
SETTINGS = ("*.json", "*.txt", "*.safetensors")  # weights, their index, tokenizer and image settings
PICKLES = ("*.bin", "*.pt", "*.pkl")  # fetched only where there are no weights in safetensors


def is_id(path: str | Path) -> bool:
    return str(path).startswith(PREFIX)


def located(path: str | Path) -> Path:
    """Where a model lies on this machine: a path as it is, an id of the hub after its files were fetched.

    Raises:
        TriviumError: the extra is not installed, the id has a wrong form, or the hub lacks it or is not reached.
    """
    if not is_id(path):
        return Path(path)
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise TriviumError(f"{path} is an id of a hub, which takes an extra: pip install 'trivium[hub]'") from None
    name, _, revision = str(path).removeprefix(PREFIX).partition("@")

    def fetched(patterns: tuple[str, ...]) -> Path:
        try:
            folder = huggingface_hub.snapshot_download(name, revision=revision or None, allow_patterns=list(patterns))
        except HFValidationError:
            raise TriviumError(f"{path} is no id of a hub: write {PREFIX}owner/name") from None
        except LocalEntryNotFoundError:
            raise TriviumError(
                f"{path} is not kept on this machine and the hub was not reached: try again with a network, or name a"
                " folder that holds the model"
            ) from None
        except (HfHubHTTPError, OSError) as error:
            first = str(error).strip().partition("\n")[0]
            raise TriviumError(f"{path} could not be fetched ({first}): check the id, and your access to it") from None
        return Path(folder)

    folder = fetched(SETTINGS)
    return folder if any(folder.rglob("*.safetensors")) else fetched(SETTINGS + PICKLES)
