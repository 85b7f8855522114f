"""From what a user names (a folder, a model shipped with the package, a hub id) to a folder."""

import re
from pathlib import Path

from qnext.io.hf_config import CONFIG_NAME

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONFIG_PATTERNS = ["*.json", "*.jinja", "*.txt"]


def resolve_checkpoint(name: str | Path, *, with_weights: bool = True) -> Path:
    """Returns the folder of a checkpoint, downloading it where the name is a hub id.

    Args:
        name: an existing folder, the name of a shipped model (`nano`), or `organisation/model`.
        with_weights: False fetches the small files only.

    Raises:
        ValueError: no such folder, and no such model on the hub or no way to it.
    """
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(
            f"model is {name!r}: a folder, the name of a shipped model or a hub id is allowed"
        )
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file: the folder that holds {CONFIG_NAME} is allowed here")
    shipped = shipped_folder(str(name))
    if shipped is not None:
        return shipped
    if not _HUB_ID.fullmatch(str(name)):
        raise ValueError(
            f"model {str(name)!r} is neither a folder, nor shipped with qnext, nor a hub id of the "
            "form organisation/model"
        )
    return _download(str(name), with_weights)


def shipped_folder(name: str) -> Path | None:
    """Returns the folder of a model that comes with the package, None where none has the name."""
    folder = _ASSETS / name
    is_name = re.fullmatch(r"[\w-]+", name) is not None
    return folder if is_name and (folder / CONFIG_NAME).is_file() else None


def _download(name: str, with_weights: bool) -> Path:
    # Imported here because it takes a tenth of a second and local folders do without.
    import huggingface_hub

    patterns = [*_CONFIG_PATTERNS, "*.safetensors"] if with_weights else _CONFIG_PATTERNS
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    # What the hub's client raises without a network, for an unknown id, and for a broken download.
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"model {name!r} is no folder here, and could not be fetched from the Hugging Face hub "
            f"({reason}); check the name and the network, or give a local folder"
        ) from error
