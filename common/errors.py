"""The one family of errors that a user may see.

Every message is a single line that names the thing, says what was expected and gives the remedy.
The command line turns a `PspError` into exit code 1; any other exception is a bug and keeps its
traceback.
"""

_HEAD, _TAIL = 600, 300
"""Characters of a long message that are kept: where it begins, and the remedy."""


FETCH_AGAIN = "fetch the checkpoint again"
COLLECT_AGAIN = "collect the traces again"
TRAIN_AGAIN = "train the predictors again"
EXPORT_AGAIN = "export the file again"
"""Remedies that more than one place names."""


class PspError(Exception):
    """Something outside the program is wrong and the user can mend it.

    Attributes:
        problem: what is wrong with which thing, one line.
        remedy: what the user can do about it; None where the problem says it.
    """

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        """Keep the message on one line of bearable length, whatever a hostile file's names hold."""
        self.problem = printable(problem, None)
        self.remedy = None if remedy is None else printable(remedy, None)
        line = "; ".join(part for part in (self.problem, self.remedy) if part is not None)
        if len(line) > _HEAD + _TAIL:
            line = f"{line[:_HEAD]} … {line[-_TAIL:]}"
        super().__init__(line)


def printable(text: str, limit: int | None = 120) -> str:
    """Return at most `limit` characters of `text` on one line, control characters escaped."""
    cut = text if limit is None or len(text) <= limit else text[:limit] + "…"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def reason(error: BaseException) -> str:
    """Return the first line of what an error of a library says, its kind if it says nothing."""
    said = [line for line in str(error).splitlines() if line.strip()]
    return said[0] if said else type(error).__name__


class SettingsError(PspError):
    """Settings that do not go together or with what they name; wrong usage on the command line."""


class DataError(PspError):
    """Text input that cannot be read or is too little."""


class CheckpointError(PspError):
    """A model directory that is incomplete, damaged or of an unsupported kind."""


class SparsityError(PspError):
    """A model that cannot be made sparse, or measured, as the settings want it."""


class TraceError(PspError):
    """A trace store that is damaged, of another model, or not fit for the request."""


class PredictorError(PspError):
    """A predictor artifact that is damaged, incomplete or does not fit the model."""


class ExportError(PspError):
    """A file that PowerInfer could not run if it were written."""


class FormatError(PspError):
    """A GGUF or PWRI file that is damaged or breaks PowerInfer's contract."""


class EngineError(PspError):
    """An engine, embedded or PowerInfer's, that cannot run or did not answer."""


class ClusterError(PspError):
    """A Ray cluster that is not there, lacks something, or lost its workers."""


class ResultError(PspError):
    """A file of results that is missing, damaged or of another kind."""


class OutputError(PspError):
    """An output that exists already or cannot be written."""
