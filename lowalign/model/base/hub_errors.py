"""What the Hub's client raises, in words that say what to do."""

from huggingface_hub import get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# RuntimeError: of hf_xet, which transfers large files. ValueError: a file name that would leave the cache.
HUB_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def explain(error: BaseException, revision: str | None = None) -> str:
    """Why a request about one repository failed, and what to do. revision: the one that was requested."""
    if isinstance(error, LocalEntryNotFoundError | RuntimeError) and isinstance(error.__cause__, HUB_ERRORS):
        return explain(error.__cause__, revision)
    if isinstance(error, HFValidationError):
        return "this is not the name of a repository; write NAMESPACE/NAME, of letters, digits, -, _ and ."
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on (HF_HUB_OFFLINE) and the cache does not hold all of it"
    if isinstance(error, RevisionNotFoundError):
        return f"the repository has no revision {revision}"
    if isinstance(error, GatedRepoError):
        return f"its owner grants access on request: accept the terms on its page, then {LOG_IN}"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and " + (
            "your token may not read it" if get_token() else f"you are not logged in: {LOG_IN}"
        )
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error)
    if isinstance(error, HTTPError):
        return f"the connection failed ({type(error).__name__}); check it and run the command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())[:300] or type(error).__name__


def _explain_status(error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, error.server_message
    details = f" ({said})" if said else ""
    if status == 401:
        return f"your token was not accepted{details}: {LOG_IN}" if get_token() else f"you are not logged in: {LOG_IN}"
    if status == 403:
        return (
            f"your token has no right to do this{details}; it takes a token with write access, and a NAMESPACE that is you "
            "or an organization of yours"
        )
    if status == 429 or status >= 500:
        return f"the Hub answered {status}; run the command again later"
    return f"the Hub answered {status}{details}"
