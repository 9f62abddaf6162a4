"""Models by hub id: their files in huggingface_hub's own cache, fetched once, used offline from then on."""

from __future__ import annotations

import re
from pathlib import Path

from edgelora.errors import MachineError, ModelError

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "README.md"]
# other forms of the same weights, and folders of other runtimes
UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*.safetensors", "*.msgpack", "*.h5"]


def looks_like_hub_id(reference: str) -> bool:
    """Whether a reference that is no path reads as `org/name` (with `@revision` behind it, if wanted)."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", reference) is not None and not reference.startswith((".", "/"))


def fetch(reference: str) -> Path:
    """Return the local folder of `org/name` or `org/name@revision`, fetching what is not there yet.

    Raises ModelError when the hub has no such model (or asks for an account), MachineError when it is out of reach and
    the model was never fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, _, revision = reference.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError:
        raise ModelError(f"{name} is gated: its owner wants you to ask for access", hint="hf auth login") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"the hub has no model {name}, or it is private, and there is no such path here", hint="hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{name} has no revision {revision}") from None
    except HFValidationError as error:
        raise ModelError(f"{reference} is not a path here, nor a hub id: {error}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MachineError(
            f"{name} is not here and could not be fetched: {reason}",
            hint="connect once to fetch it, or give a folder, a .gguf file or package:NAME",
        ) from None
