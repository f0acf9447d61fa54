"""Every error that moecompile raises on purpose; each message is one line that says what is wrong and what to do."""

from __future__ import annotations


class MoECompileError(Exception):
    """Base of all errors that moecompile raises on purpose."""


class InputError(MoECompileError):
    """A path, a file or an option that cannot be used as given."""


class CaptureError(MoECompileError):
    """The model could not be captured as a graph."""


class MatchError(MoECompileError):
    """No feed-forward network was found, or one that was asked for cannot be rewritten."""


class PlanError(MoECompileError):
    """A plan or a recipe that does not fit the model, or that contradicts itself."""


class ParityError(MoECompileError):
    """The split model, all experts on, is not the dense model."""


class CheckpointError(MoECompileError):
    """A checkpoint that cannot be read or written."""


class CompileError(MoECompileError):
    """Something could not be compiled, and falling back was not allowed."""
