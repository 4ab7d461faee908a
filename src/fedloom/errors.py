"""Everything that can go wrong for a user, each said in one sentence.

    FedloomError
    ├── RecipeError        a recipe that cannot be run: a file, a key, a value
    ├── DataError          a manifest, a partition or a split that cannot be used
    │   └── ImageError     an image that is missing, truncated or unreadable
    ├── BackboneError      a backbone that is missing, or of another architecture
    ├── AdapterError       tensors that do not fit the backbone they are put into
    ├── MethodError        a method that cannot run on this task, or with these options
    ├── TrainingError      a loss that is not finite
    ├── UpdateError        an update that is refused: names, shapes, dtypes, finiteness, size
    ├── QuorumError        too few sites answered
    ├── ExportError        what cannot be exported as it was asked, or is no longer what was exported
    ├── LawError           a method that breaks a law that every method obeys
    ├── StoreError         a file of state that cannot be read or written
    ├── RunError           a run folder that is in the way, unfinished, or of another recipe
    ├── LinkError          a site or a server that cannot be reached
    ├── PolicyError        a recipe that a site does not allow
    └── DeployError        a certificate, a kit or a configuration that cannot be used

A message says what was found, what was expected, where, and the remedy. The command line prints it and exits with 2.
"""


class FedloomError(Exception):
    """The root: one sentence for the user, never a traceback."""


class RecipeError(FedloomError):
    """A recipe that cannot be run."""


class DataError(FedloomError):
    """Data that cannot be used."""


class ImageError(DataError):
    """An image that is missing, truncated or unreadable."""


class BackboneError(FedloomError):
    """A backbone that is missing, or of another architecture."""


class AdapterError(FedloomError):
    """Tensors that do not fit the backbone they are put into."""


class MethodError(FedloomError):
    """A method that cannot run on this task, or with these options."""


class TrainingError(FedloomError):
    """A loss that is not finite."""


class UpdateError(FedloomError):
    """An update that the server refuses."""


class QuorumError(FedloomError):
    """Too few sites answered."""


class ExportError(FedloomError):
    """What cannot be exported as it was asked, or is no longer what was exported."""


class LawError(FedloomError):
    """A method that breaks a law."""


class StoreError(FedloomError):
    """A file of state that cannot be read or written."""


class RunError(FedloomError):
    """A run folder that is in the way, unfinished, or of another recipe."""


class LinkError(FedloomError):
    """A site or a server that cannot be reached."""


class PolicyError(FedloomError):
    """A recipe that a site does not allow."""


class DeployError(FedloomError):
    """A certificate, a kit or a configuration that cannot be used."""
