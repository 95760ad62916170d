"""What went wrong between this machine and the Hugging Face hub, in one sentence with a remedy."""

from __future__ import annotations

from huggingface_hub import errors as hub_errors

from companion.base import hub
from companion.base.errors import InputError
from companion.base.hub import HubId

TOKEN_HELP = "make a token at huggingface.co/settings/tokens and put it into the variable HF_TOKEN"
FAILURES = (OSError, ValueError, RuntimeError, hub_errors.HTTPError)  # hf_xet raises RuntimeError if the network goes
AGAIN = "run the same command again, it goes on from there"


def is_network(error: BaseException) -> bool:
    """Whether the hub could not be reached at all, and did not merely refuse."""
    unreached = (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)
    answered = isinstance(error, hub_errors.HfHubHTTPError)
    return not answered and isinstance(error, (*unreached, hub_errors.HTTPError))


def explain(hub_id: HubId, error: Exception, kind: str = "model") -> InputError:
    """One sentence for an error of the hub: what was wrong, and what to do."""
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and isinstance(error.__cause__, hub_errors.HfHubHTTPError):
        error = error.__cause__  # the library looked into the cache because the hub refused, and that is the reason
    if is_network(error):
        return _no_network(hub_id, error)
    page = f"huggingface.co/{'datasets/' if kind == 'data set' else ''}{hub_id.repo}"
    if isinstance(error, hub_errors.GatedRepoError):  # it is also a RepositoryNotFoundError, so it comes first
        what = f"{hub_id.repo} is gated: accept its terms at {page} with your account, then {TOKEN_HELP}"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        what = f"{hub_id.repo} has no revision {hub_id.revision!r}: see its branches and commits at {page}/commits"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        what = (
            f"no {kind} {hub_id.repo!r}: there is no folder of that name here and the hub has none that you may see; "
            f"check the spelling at {page}, or if it is private, {TOKEN_HELP}"
        )
    elif isinstance(error, hub_errors.DisabledRepoError):
        what = f"{hub_id.repo} was disabled by the hub: use another {kind}"
    elif isinstance(error, hub_errors.HfHubHTTPError | hub_errors.HFValidationError | hub_errors.HTTPError):
        what = f"the hub did not give {hub_id.repo}: {_line(error)}; try again later, or use a folder"
    elif isinstance(error, OSError) and error.errno is not None:  # without a number it is the hub library's own
        what = (
            f"{hub_id.repo} could not be written to {hub.cache()}: {_line(error)}; HF_HOME names another place for it"
        )
    else:
        what = f"the transfer of {hub_id.repo} broke off: {_line(error)}; {AGAIN}"
    return InputError(what)


def _no_network(hub_id: HubId, error: Exception) -> InputError:
    offline = isinstance(error, hub_errors.OfflineModeIsEnabled)
    why = "HF_HUB_OFFLINE forbids downloads" if offline else f"the hub cannot be reached ({_line(error)})"
    have = "only a part of it is" if hub.snapshot(hub_id) is not None else "it is not"
    return InputError(
        f"{hub_id.repo} at {hub_id.revision!r}: {why}, and {have} in the cache {hub.cache()}; "
        + ("unset HF_HUB_OFFLINE" if offline else "connect")
        + ", or copy the cache of a machine that has the model and name it in HF_HOME"
    )


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
