"""The typed errors of edgepass, on the lowest floor so that every layer can raise them."""


class EdgepassError(Exception):
    """Base of every error that edgepass raises on bad input: one line that names the thing.

    ``code`` is the stable name under which ``docs/errors.md`` explains it. On the command line
    each of these is printed as one line and ends the process with exit code 2.
    """

    code = "error"


class InvalidArgumentError(EdgepassError):
    """An argument, option or recipe value is not one of those accepted."""

    code = "invalid-argument"


class CheckpointError(EdgepassError):
    """A checkpoint is missing, truncated, of a foreign format or of an unsupported architecture."""

    code = "checkpoint"


class ProgramError(EdgepassError):
    """An exported program or a ``.pte`` file cannot be used as given."""

    code = "program"


class PassError(EdgepassError):
    """A pass broke its contract, or a pipeline is ordered against its passes' declarations."""

    code = "pass"


class VerificationError(EdgepassError):
    """``verify=True`` found a pass whose outputs differ from those before it."""

    code = "verification"


class OutputError(EdgepassError):
    """The output cannot be written."""

    code = "output"


class SimulatorError(EdgepassError):
    """The simulator does not know an operator, or the device's runtime would end the process."""

    code = "simulator"


class LibraryError(EdgepassError):
    """A library that an optional extra brings is absent or cannot be used."""

    code = "library"


class EncodingError(EdgepassError):
    """An encoding is missing, ambiguous, malformed or of another model."""

    code = "encoding"


class CalibrationError(EdgepassError):
    """A calibration text cannot be used, or a checkpoint is of another calibration."""

    code = "calibration"


class AllocationError(EdgepassError):
    """No choice of candidates keeps to the budget."""

    code = "allocation"
