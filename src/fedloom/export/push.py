"""An export on the Hugging Face hub."""

from pathlib import Path

from fedloom.errors import ExportError


def push(folder: Path, repository: str) -> str:
    """Upload a site's folder to a repository, made private where there is none yet; its address.

    raises ExportError: there is no token, or the hub refuses or cannot be reached; the folder stays as it is
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    if get_token() is None:
        raise ExportError(
            f"'{folder}' is ready, and there is no token of the Hugging Face hub to push it with; run 'hf auth login', "
            "or set HF_TOKEN."
        )
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of fedloom")
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as e:
        raise ExportError(
            f"'{folder}' is ready, and the hub did not take it as '{repository}': {str(e).strip().splitlines()[0]}"
        ) from e
    return str(address)
