"""An export on the Hugging Face hub."""

from pathlib import Path

from fedloom.backbones import reason
from fedloom.errors import ExportError


def named(repository: str) -> str:
    """The name, if a repository of the hub can have it; raises ExportError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented as public

    try:
        validate_repo_id(repository)
    except HFValidationError as e:
        raise ExportError(f"'{repository}' is no name of a repository, OWNER/NAME: {reason(e)}") from None
    return repository


def push(folder: Path, repository: str) -> str:
    """Upload a site's folder to a repository, made private where there is none yet; its address.

    raises ExportError: there is no token, or the hub refuses or cannot be reached; the folder stays as it is
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if get_token() is None:
        raise ExportError(
            f"'{folder}' is ready, and there is no token of the Hugging Face hub to push it with; run 'hf auth login', "
            f"or set HF_TOKEN, and then: hf upload {repository} '{folder}'."
        )
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of fedloom")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as e:
        raise ExportError(
            f"'{folder}' is ready, and the hub did not take it as '{repository}': {reason(e)} "
            f"Once it can: hf upload {repository} '{folder}'."
        ) from e
    return str(address)
